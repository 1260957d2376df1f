"""What all figures share: the paper's numbers, and how a verdict is reached from intervals."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minireuse.common.metrics import interval

PAPER: dict[str, Any] = json.loads((Path(__file__).parent / "numbers.json").read_text(encoding="utf-8"))
HOLDS, FAILS, UNCLEAR = "holds", "does not hold", "unclear"


class Verdict(NamedTuple):
    """word: `holds`, `does not hold` or `unclear`. sentence: the numbers that it rests on."""

    word: str
    sentence: str


def judged(holds: bool, fails: bool) -> str:
    """The word, from what would prove the statement and what would refute it; neither leaves it open."""
    return HOLDS if holds else FAILS if fails else UNCLEAR


def all_of(words: Collection[str]) -> str:
    """The word of a statement that has several parts."""
    return judged(bool(words) and set(words) == {HOLDS}, FAILS in words)


def above(gains: Collection[Sequence[float]]) -> str:
    """Whether every gain is above 0. gains: paired differences, prompt by prompt, each a list.

    It holds where all 95 % intervals lie above 0, and does not where one lies below.
    """
    ends = [interval(gain) for gain in gains]
    return judged(bool(ends) and all(low > 0 for low, _ in ends), any(high < 0 for _, high in ends))


def gain(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Paired differences, prompt by prompt."""
    return np.subtract(ours, theirs).tolist()


def spread(values: Sequence[float], digits: int = 1, sign: bool = False) -> str:
    """A mean and its 95 % interval: "27.0 [26.1, 27.9]"."""
    plus = "+" if sign else ""
    mean, low, high = (f"{value:{plus}.{digits}f}" for value in (np.mean(values), *interval(values)))
    return f"{mean} [{low}, {high}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, followed by an empty line."""
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]

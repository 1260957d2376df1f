"""What the tests of faults have tried, counted by kind and outcome, for the table in the README.

`FAULTS=README.md pytest` writes it there.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

TRIED: dict[str, Counter[str]] = {}
MARKS = ("<!-- faults: written by FAULTS=README.md pytest -->", "<!-- end of faults -->")


def note(kind: str, outcome: str, times: int = 1) -> None:
    TRIED.setdefault(kind, Counter())[outcome] += times


def table() -> str:
    lines = ["| fault | cases | outcome |", "|---|---|---|"]
    for kind, found in sorted(TRIED.items()):
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in found.most_common())
        lines.append(f"| {kind} | {found.total()} | {outcomes} |")
    return "\n".join(lines)


def write(path: Path) -> None:
    """Put the table between its marks."""
    text = path.read_text(encoding="utf-8")
    first, last = map(re.escape, MARKS)
    new, times = re.subn(f"{first}.*?{last}", lambda _: f"{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}", text, flags=re.DOTALL)
    if times != 1:
        raise ValueError(f"{path} has {times} places for the table, expected one between {MARKS[0]!r} and {MARKS[1]!r}")
    path.write_text(new, encoding="utf-8")

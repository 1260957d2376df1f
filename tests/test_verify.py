"""What verify.py prints of a model: shares of right answers, distances, and what the VAE gives back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minireuse.evaluate.classifier import ClassifierConfig

import verify
from world import QUESTIONS, caption, parse_caption


class Reader:
    """Reads every picture as the same scene."""

    def __init__(self, seen: dict[str, str]) -> None:
        self.seen = seen
        self.config = ClassifierConfig(QUESTIONS)

    def read(self, images: list[np.ndarray]) -> list[dict[str, str]]:
        return [self.seen] * len(images)


def test_shares_are_counted_by_question_and_by_what_is_named() -> None:
    seen = dict.fromkeys(QUESTIONS, "none") | {"time": "at noon", "ground": "red dunes", "trees": "a pine"}
    prompts = ["red dunes with a pine at noon", "red dunes with two pines and a lake at noon"]
    found = verify.obedience(Reader(seen), [np.zeros(1)] * 2, prompts)
    assert found["time"] == found["ground"] == found["house"] == 1
    assert found["trees"] == found["lake"] == 0.5
    assert found["all questions"] == 14 / 16
    assert found["what is named"] == 5 / 7
    assert found["whole prompts"] == 0.5
    with pytest.raises(ValueError, match="not a caption"):
        verify.obedience(Reader(seen), [np.zeros(1)], ["a fox"])


def test_renders_of_prompts_differ_in_what_is_left_to_chance() -> None:
    prompts = ["green hills with a lake at noon", "snowy hills at night"]
    one, again, other = verify.renders(prompts, 0), verify.renders(prompts, 0), verify.renders(prompts, 1)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(caption(scene) in prompts for scene in map(parse_caption, prompts) if scene)


def test_the_figures_of_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, sheet = tmp_path / "v.json", tmp_path / "sheet.png"
    sizes = ["--prompts", "8", "--held-out", "20", "--steps", "8"]
    verify.main([*sizes, "--policy", "hurry", "--sheet", str(sheet), "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["classifier on renders"].keys() == QUESTIONS.keys()
    assert found["pictures"]["all questions"] > 0.7
    distances = found["Fréchet distance"]
    assert 0 < distances["renders to other renders"] < distances["the pictures to renders"]
    assert found["VAE"]["PSNR, dB"] > 33
    printed = capsys.readouterr().out
    assert f"| all questions |  | {100 * found['pictures']['all questions']:.1f} |" in printed
    assert sheet.stat().st_size > 1000

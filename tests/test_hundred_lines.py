"""The method in a hundred lines computes what the package computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import minireuse
from minireuse.cache import ReuseCache
from minireuse.plan import ReusePlan
from minireuse.policies import select

from conftest import relative_error

PATH = Path(__file__).parents[1] / "docs" / "reuse_in_100_lines.py"


@pytest.fixture(scope="module")
def lesson() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reuse_in_100_lines", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_a_hundred_lines(lesson: ModuleType) -> None:
    assert len(PATH.read_text(encoding="utf-8").splitlines()) <= 100


def test_the_latents_are_the_packages(lesson: ModuleType) -> None:
    pipe = minireuse.load(device="cpu")
    for name in ("full", "paper"):
        marks = np.array([mark == "#" for mark in lesson.PLANS[name]])
        plan = ReusePlan.stepwise(marks, select(pipe.sites))
        settings = {"steps": lesson.STEPS, "attention": "explicit", "cache": ReuseCache(torch.float32)}
        expected = pipe.generate(lesson.PROMPT, seeds=lesson.SEED, plan=plan, **settings).latents
        assert relative_error(lesson.sample(pipe, lesson.PLANS[name]), expected) < 1e-4


def test_it_prints_and_writes(
    lesson: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lesson, "STEPS", 2)
    monkeypatch.setattr(lesson, "PLANS", {"full": "..", "hurry": ".#"})
    lesson.main(tmp_path)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["full", "hurry"]
    assert Image.open(tmp_path / "hurry.png").size == (128, 128)

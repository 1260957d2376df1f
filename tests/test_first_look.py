"""The first look at the paper's claims: its plans, and its table on a model of one block."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import minireuse
from minireuse.plan import ReusePlan
from minireuse.policies import select

import first_look


def test_plans_that_no_policy_makes(tmp_path: Path, pipeline: minireuse.Pipeline) -> None:
    maps = select(pipeline.sites)
    files = first_look.plan_files(tmp_path, maps)
    plans = {title: ReusePlan.from_json(Path(path).read_text(), maps).grid for path, title in files.items()}
    assert plans["call 1 alone"] == ".#.................."
    assert plans["call 19 alone"] == "...................#"
    assert plans["the paper's plan for SD 1.5, 10"] == "........#.###.######"
    assert len(plans) == 20


def test_rows_of_the_table(tmp_path: Path) -> None:
    rows = {name: {"psnr": [20.0 + i, 30.0 + i]} for i, name in enumerate([*first_look.RANDOM, *first_look.PLAIN, "a"])}
    found = first_look.figures({"rows": rows}, {"a": "call 1 alone"})
    assert found["random, 10, mean of 5"] == [22.0, 32.0]
    assert found["19 plain steps"] == [25.0, 35.0]
    text = first_look.table({"leading": found, "trailing": found})
    assert text.splitlines()[0] == "| plan | `leading`, dB [95 %] | `trailing`, dB [95 %] |"
    assert "| random, 10, mean of 5 | 27.0 [22.0, 32.0] | 27.0 [22.0, 32.0] |" in text


def test_the_whole_on_the_smallest_model(
    smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red house\nan oak\n")
    monkeypatch.setattr(first_look, "RANDOM", first_look.RANDOM[:1])
    monkeypatch.setattr(first_look, "PLAIN", first_look.PLAIN[:1])
    monkeypatch.setattr(first_look, "POLICIES", {"hurry:k=10": "HURRY, last 10"})
    argv = ["--model", str(smallest_folder), "--prompts-file", str(prompts), "--prompts", "2", "--spacings", "leading"]
    first_look.main([*argv, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "results.json").read_text())["psnr"]["leading"]
    assert len(found["call 19 alone"]) == 2
    assert np.isfinite(found["HURRY, last 10"]).all()
    assert (tmp_path / "out" / "single.png").stat().st_size > 1000
    assert "HURRY, last 10" in (tmp_path / "out" / "table.md").read_text()

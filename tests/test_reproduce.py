"""The claims' experiments on a tiny model: they run, resume, and measure what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import minireuse

import claims
import reproduce
from claims import Neighbours, Perturber, Study

PROMPTS = ["a red circle", "a star", "a blue heart", "a ring"]


@pytest.fixture
def study(pipeline: minireuse.Pipeline) -> Study:
    return Study(pipeline, PROMPTS, [], steps=5)


def test_neighbours_are_compared_with_the_call_before(study: Study) -> None:
    site, watcher = study.maps[0], Neighbours()
    for call, row in enumerate(([1.0, 0.0], [0.6, 0.8], [0.0, 2.0])):
        watcher.call = call
        watcher.store(site, torch.tensor([row]), minireuse.reuse.PLAIN, torch.float32)
    change, cosine, since = watcher.found[site.address, 2]
    assert change == pytest.approx(np.hypot(0.6, 1.2))
    assert cosine == pytest.approx(0.8)
    assert since == pytest.approx(np.sqrt(5))


def test_a_perturbed_map_keeps_its_rows_normalised() -> None:
    watcher = Perturber(at=1, size=0.1, seed=0)
    probs = torch.softmax(torch.randn(2, 3, 4), dim=-1)
    before = probs.clone()
    watcher.store(minireuse.reuse.Site("x.attn1", "map"), probs, minireuse.reuse.PLAIN, torch.float32)
    assert torch.equal(probs, before)  # call 0
    watcher.call = 1
    watcher.store(minireuse.reuse.Site("x.attn1", "map"), probs, minireuse.reuse.PLAIN, torch.float32)
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(2, 3))
    assert 0.01 < ((probs - before).norm() / before.norm()).item() < 0.3


def test_perturbations_are_followed_to_the_end(study: Study) -> None:
    found = claims.growth(study, count=2)
    assert set(found["exponents"]) == {0, 1, 2, 3}
    assert all(len(values) == 2 and np.isfinite(values).all() for values in found["exponents"].values())


def test_single_reuse_damages_every_call_alike_often(study: Study) -> None:
    found = claims.single(study, count=2)
    assert np.shape(found["damage"]) == (4, 2)
    full = study.pipe.generate(PROMPTS[:2], seeds=[0, 1], steps=5).images.astype(float)
    plan = minireuse.reuse.ReusePlan.stepwise(np.arange(5) == 3, study.maps)
    changed = study.pipe.generate(PROMPTS[:2], seeds=[0, 1], steps=5, plan=plan).images
    np.testing.assert_allclose(found["damage"][2], np.square(changed - full).mean(axis=(1, 2, 3)))


def test_report_states_every_claim_and_goes_on(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS * 3))
    given = ["--model", str(model_folder), "--prompts-file", str(tmp_path / "prompts.txt"), "--steps", "4"]
    few = ["--prompts", "2", "--draws", "3", "--out", str(tmp_path / "out")]
    reproduce.main([*given, *few, "--stages", "redundancy", "precision"])
    kept = (tmp_path / "out" / "precision.json").read_bytes()
    reproduce.main([*given, *few, "--stages", "redundancy", "single", "growth", "precision", "chain", "tensors"])
    assert (tmp_path / "out" / "precision.json").read_bytes() == kept
    report = (tmp_path / "out" / "report.md").read_text()
    for title in ("1. ", "2. ", "3. ", "5. ", "7. ", "8. "):
        assert f"## {title}" in report
    assert "![1. Maps of neighbouring calls are redundant](redundancy.png)" in report
    assert (tmp_path / "out" / "redundancy.png").exists()
    verdicts = {json.loads(p.read_text()).get("verdict") for p in (tmp_path / "out").glob("*.json")}
    assert verdicts <= {"holds", "does not hold", "unclear", "measured"}

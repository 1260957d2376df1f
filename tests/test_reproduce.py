"""The claims' experiments on a model of one block: they run, resume, and measure what they say."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import claims
import numpy as np
import pytest
import torch
from claims import Neighbours, Perturber, Study

import minireuse
from minireuse.policies import interval, select

import reproduce

PROMPTS = ["a red house", "a lake", "a blue house", "an oak"]


@pytest.fixture(scope="module")
def pipeline(smallest_folder: Path) -> minireuse.Pipeline:
    return minireuse.load(smallest_folder, device="cpu")


@pytest.fixture
def study(pipeline: minireuse.Pipeline) -> Study:
    return Study(pipeline, PROMPTS, [], steps=5)


def test_neighbours_are_compared_with_the_call_before(study: Study) -> None:
    site, watcher = study.maps[0], Neighbours()
    for call, row in enumerate(([1.0, 0.0], [0.6, 0.4], [0.1, 0.9])):
        watcher(site, call, torch.tensor([row]).log())
    change, cosine, since = watcher.found[site.address, 2]
    assert change == pytest.approx(np.hypot(0.5, 0.5) / np.hypot(0.6, 0.4))
    assert cosine == pytest.approx((0.06 + 0.36) / np.hypot(0.6, 0.4) / np.hypot(0.1, 0.9))
    assert since == pytest.approx(np.hypot(0.9, 0.9))


def test_a_perturbed_map_keeps_its_rows_normalised() -> None:
    """A factor of 1 + noise on every probability, the rows normalised again."""
    perturb, scores = Perturber(at=1, size=0.1, seed=0), torch.randn(2, 3, 4)
    before = torch.softmax(scores, dim=-1)
    site = minireuse.plan.Site("x.attn1", "map")
    assert perturb(site, 0, scores) is None
    changed = perturb(site, 1, scores)
    assert changed is not None
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    expected = before * (1 + 0.1 * noise)
    probs = torch.softmax(changed, dim=-1)
    torch.testing.assert_close(probs, expected / expected.sum(dim=-1, keepdim=True))
    assert 0.01 < ((probs - before).norm() / before.norm()).item() < 0.3


def test_perturbations_are_followed_to_the_end(study: Study) -> None:
    found = claims.growth(study, count=2)
    assert set(found["exponents"]) == {0, 1, 2, 3}
    assert all(len(values) == 2 and np.isfinite(values).all() for values in found["exponents"].values())


def test_single_reuse_damages_every_call_alike_often(study: Study) -> None:
    found = claims.single(study, count=2)
    assert np.shape(found["damage"]) == (4, 2)
    full = study.pipe.generate(PROMPTS[:2], seeds=[1000, 1001], steps=5).images.astype(float)
    plan = minireuse.plan.ReusePlan.stepwise(np.arange(5) == 3, study.maps)
    changed = study.pipe.generate(PROMPTS[:2], seeds=[1000, 1001], steps=5, plan=plan).images
    np.testing.assert_allclose(found["damage"][2], np.square(changed - full).mean(axis=(1, 2, 3)))


@pytest.fixture
def given(smallest_folder: Path, tmp_path: Path, pipeline: minireuse.Pipeline) -> list[str]:
    """The smallest model with plans that look searched, and prompts."""
    model = tmp_path / "model"
    shutil.copytree(smallest_folder, model)
    (model / "plans").mkdir()
    for kind, order in itertools.product(reproduce.KINDS, (0, 1)):
        plan = replace(interval(4, select(pipeline.sites, kind=kind), k=2), order=order)
        about = {"about": {"model": pipeline.fingerprint, "sampler": "ddim"}}
        (model / "plans" / f"{kind}-{order}.json").write_text(json.dumps(json.loads(plan.to_json()) | about))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS * 3))
    files = ["--prompts-file", str(tmp_path / "prompts.txt"), "--calibration-file", str(tmp_path / "prompts.txt")]
    few = ["--prompts", "2", "--draws", "3", "--steps", "4", "--rounds", "1", "--out", str(tmp_path / "out")]
    few += ["--layerwise-budget", "250", "--search-budget", "20"]  # U-Net calls
    return ["--model", str(model), *files, *few]


def test_every_claim_gets_its_verdict_and_its_figures(given: list[str], tmp_path: Path) -> None:
    reproduce.main([*given, "--sibling", str(tmp_path / "model")])
    report = (tmp_path / "out" / "report.md").read_text()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found) == list(reproduce.STAGES)
    gains = found["generalisation"]["gains"]
    assert gains["map, a sibling of the model"] == gains["map, as searched"]  # the sibling being the model itself
    assert {result["verdict"] for result in found.values()} <= {"holds", "does not hold", "unclear", "measured"}
    verdicts = (tmp_path / "out" / "verdicts.md").read_text().splitlines()[2:]
    assert verdicts == [f"| {title} | {found[name]['verdict']} |" for name, (title, _) in reproduce.STAGES.items()]
    for name, (title, _) in reproduce.STAGES.items():
        assert f"## {title}: {found[name]['verdict']}\n\n{found[name]['text']}\n" in report
    for plot in ("redundancy", "single", "growth", "heuristic", "precision"):
        assert f"({plot}.png)" in report
        assert (tmp_path / "out" / f"{plot}.png").stat().st_size > 5000


def test_a_finished_stage_is_not_done_again(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reproduce.main([*given, "--stages", "precision"])
    monkeypatch.setattr(claims, "precision", None)
    reproduce.main([*given, "--stages", "single", "precision"])
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())) == ["single", "precision"]
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        reproduce.main([*given, "--draws", "4", "--stages", "precision"])


def test_without_searched_plans_no_claim_is_made_about_them(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "model" / "plans" / "out-1.json").unlink()
    with pytest.raises(ValueError, match=r"kind out and order 1; .* leave out lines"):
        reproduce.main([*given, "--stages", "single", "lines"])
    shutil.rmtree(tmp_path / "model" / "plans")
    with pytest.raises(ValueError, match="no plan was searched for this model, ddim, 4 steps"):
        reproduce.main([*given, "--stages", "chain"])
    assert not (tmp_path / "out").exists()  # nothing is begun that could not go on once the plan is there

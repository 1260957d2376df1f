"""The search command: plan files, budgets, resuming, and errors, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import minireuse
from minireuse import search
from minireuse.phast import search as phast_search
from minireuse.policies import hurry, select
from minireuse.reuse import ReusePlan

COMMON = ["--steps", "6", "--prompts", "2", "--check", "1", "--quiet", "--device", "cpu"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na star\n\na blue heart\n")
    return path


@pytest.fixture
def run(model_folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]):
    def run(*argv: str) -> tuple[int, str, str]:
        given = ["--model", str(model_folder), "--prompts-file", str(prompts), *COMMON, *argv]
        status = search.main(given)
        return status, *capsys.readouterr()

    return run


def test_plan_file_holds_the_plan_and_its_story(run, tmp_path: Path, pipeline: minireuse.Pipeline) -> None:
    status, out, err = run("--reuse", "2", "--out", str(tmp_path / "p.json"))
    assert (status, err) == (0, "")
    text = (tmp_path / "p.json").read_text()
    plan, about = ReusePlan.from_json(text), json.loads(text)["about"]
    assert plan.reused == 2
    assert about["score"] >= about["score_hurry"]
    assert about["finished"] is True
    assert about["calls_made"] < about["calls_naive"]
    assert (about["model"], about["prompts"]) == (pipeline.fingerprint, ["a red circle", "a star"])
    assert about["unseen_prompts"] == ["a blue heart"]
    assert str(plan) in out
    assert "unseen" in out

    # The same search by hand, every plan rendered from noise.
    def render(p: ReusePlan) -> object:
        return pipeline.generate(["a red circle", "a star"], seeds=[0, 1], steps=6, plan=p).images

    reference = render(ReusePlan.nothing(6))
    start = hurry(6, select(pipeline.sites), k=2)
    by_hand = phast_search(render, start, start.sites, k=2, score=lambda images: search.fidelity(images, reference))
    assert by_hand.plan == plan
    assert by_hand.score == about["score"]


def test_a_search_cut_short_goes_on_to_the_same_plan(run, tmp_path: Path) -> None:
    run("--reuse", "2", "--out", str(tmp_path / "whole.json"))
    status, _, _ = run("--reuse", "2", "--budget", "20", "--out", str(tmp_path / "cut.json"))
    assert status == 0
    assert json.loads((tmp_path / "cut.json").read_text())["about"]["finished"] is False
    run("--reuse", "2", "--out", str(tmp_path / "cut.json"))
    whole, cut = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "cut"))
    assert cut["sites"] == whole["sites"]
    assert cut["about"]["score"] == whole["about"]["score"]


def test_several_counts_fill_a_folder(run, tmp_path: Path) -> None:
    assert run("--reuse", "1", "3", "--kind", "deep", "--check", "0", "--out", str(tmp_path / "plans"))[0] == 0
    names = {p.name for p in (tmp_path / "plans").glob("*.json")}
    assert names == {"ddim-6-deep-1.json", "ddim-6-deep-3.json"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--out", "p.json", "--reuse", "1", "2"), "one file for 2 plans"),
        (("--out", "p.json", "--budget", "soon"), "--budget is 'soon'"),
        (("--out", "p.json", "--budget", "3"), "was spent before the search for k = 3 began"),
        (("--out", "p.json", "--prompts", "9"), "holds 3 prompts, 10 are wanted"),
        (("--out", "p.json", "--reuse", "6"), "k is 6, expected"),
        (("--out", "taken.json"), "exists; remove it"),
    ],
)
def test_bad_input(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.json").write_text("{}")
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert message in err


def test_a_foreign_model_needs_prompts(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--model", str(model_folder), *COMMON, "--out", "p.json"]) == 2
    assert "--prompts-file" in capsys.readouterr().err


def test_fingerprint_tells_weights_apart(model_folder: Path, pipeline: minireuse.Pipeline) -> None:
    other = minireuse.load(model_folder, device="cpu")
    assert other.fingerprint == pipeline.fingerprint
    other.unet.half()
    in_half = other.fingerprint
    assert in_half != pipeline.fingerprint
    assert (other.unet.float(), other.fingerprint)[1] == in_half  # float32 holds half precision exactly
    other.unet.up_blocks[0].resnets[0].conv1.bias[0] += 1
    assert other.fingerprint != in_half


def test_minutes_and_calls_as_budget() -> None:
    assert search.parse_budget("2min")(10**9, 119.0)
    assert not search.parse_budget("2min")(0, 121.0)
    assert search.parse_budget("50")(49, 1e9)
    assert not search.parse_budget("50")(50, 0.0)
    assert search.parse_budget(None)(10**9, 1e9)

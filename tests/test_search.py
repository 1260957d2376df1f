"""The search command: plan files, budgets, resuming, and errors, on a tiny model."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import minireuse
from minireuse.plan import ReusePlan, Site
from minireuse.policies import select
from minireuse.search import command as search
from minireuse.search import read_searched
from minireuse.search.budget import groups_of
from minireuse.search.costs import Costs
from minireuse.search.depth import entry_sites
from minireuse.search.plan_files import read_plan
from minireuse.search.render import Renderer

from conftest import in_two_processes

COMMON = ["--steps", "6", "--prompts", "2", "--check", "1", "--quiet", "--device", "cpu"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red house\na lake\n\na blue house\n")
    return path


@pytest.fixture
def run(model_folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]):
    def run(*argv: str) -> tuple[int, str, str]:
        given = ["--model", str(model_folder), "--prompts-file", str(prompts), *COMMON, *argv]
        status = search.main(given)
        return status, *capsys.readouterr()

    return run


def by_hand(pipeline: minireuse.Pipeline, row: str) -> tuple[str, float]:
    """The search written down naively: every plan is rendered from noise, and a move is a new string."""

    def score(row: str) -> float:
        plan = ReusePlan.stepwise([cell == "#" for cell in row], select(pipeline.sites))
        return mean_psnr(pipeline.generate(["a red house", "a lake"], seeds=[0, 1], steps=6, plan=plan).images)

    def mean_psnr(images: np.ndarray) -> float:
        errors = ((images / 255 - full / 255) ** 2).mean(axis=(1, 2, 3))
        return float(np.mean([100 if error == 0 else min(100, -10 * math.log10(error)) for error in errors]))

    full = pipeline.generate(["a red house", "a lake"], seeds=[0, 1], steps=6).images
    best, improved = score(row), True
    while improved:
        pairs = [(a, b) for a in range(6) for b in range(1, 6) if row[a] == "#" and row[b] == "."]
        moves = ["".join("#" if i == b else "." if i == a else cell for i, cell in enumerate(row)) for a, b in pairs]
        value, moved = max((score(move), move) for move in moves)
        improved = value > best + 0.02
        if improved:
            row, best = moved, value
    return row, best


def test_plan_file_holds_the_plan_and_its_story(run, tmp_path: Path, pipeline: minireuse.Pipeline) -> None:
    status, out, err = run("--reuse", "2", "--out", str(tmp_path / "p.json"))
    assert (status, err) == (0, "")
    text = (tmp_path / "p.json").read_text()
    plan, about = ReusePlan.from_json(text), json.loads(text)["about"]
    assert plan.reused == 2
    assert about["score"] >= about["score_start"]
    assert about["finished"] is True
    assert about["calls_made"] < about["calls_naive"]
    assert (about["model"], about["prompts"]) == (pipeline.fingerprint, ["a red house", "a lake"])
    assert about["unseen_prompts"] == ["a blue house"]
    assert str(plan) in out
    assert "unseen" in out

    assert by_hand(pipeline, "....##") == (plan.grid, pytest.approx(about["score"], rel=1e-12))


def test_a_search_may_start_elsewhere(run, tmp_path: Path) -> None:
    assert run("--reuse", "2", "--start", "interval", "--budget", "7", "--out", str(tmp_path / "p.json"))[0] == 0
    plan, about = read_plan(tmp_path / "p.json")
    assert plan.grid == "..#..#"  # the budget ended before any move
    assert about["start"] == "interval"
    assert set(about["scores_unseen"]) == {"phast", "hurry", "interval"}
    within = ("--budget-latency", "0.9", "--start", "early", "--out", str(tmp_path / "q.json"))
    status, _, err = run(*within)
    assert status == 2
    assert "--start early goes with --reuse" in err


def test_plans_of_order_1_are_searched_with_their_order(run, tmp_path: Path) -> None:
    assert run("--reuse", "2", "3", "--order", "1", "--check", "0", "--out", str(tmp_path))[0] == 0
    for path in (tmp_path / "ddim-6-map-order1-2.json", tmp_path / "ddim-6-map-order1-3.json"):
        plan, about = read_plan(path)
        assert (plan.order, about["order"]) == (1, 1)
    status, _, err = run("--reuse", "2", "--order", "0", "--out", str(tmp_path / "ddim-6-map-order1-2.json"))
    assert status == 2
    assert "exists; remove it, or give another --out" in err


def test_ctrl_c_ends_a_search_quietly_and_it_goes_on(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--reuse", "2", "--out", str(tmp_path / "whole.json"))[0] == 0
    out, render, made = tmp_path / "cut.json", Renderer.__call__, []

    def stopping(self: Renderer, plan: ReusePlan) -> object:
        made.append(plan)
        if len(made) == 5:
            raise KeyboardInterrupt
        return render(self, plan)

    with monkeypatch.context() as patched:
        patched.setattr(Renderer, "__call__", stopping)
        status, said, err = run("--reuse", "2", "--out", str(out))
    assert (status, said, err) == (130, "", "interrupted; the same command goes on from the journal\n")
    assert not out.exists()
    assert run("--reuse", "2", "--out", str(out))[0] == 0
    whole, cut = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "cut"))
    assert (cut["sites"], cut["about"]["score"]) == (whole["sites"], whole["about"]["score"])


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


def test_a_branch_of_the_deep_features_is_searched(run, tmp_path: Path, pipeline: minireuse.Pipeline) -> None:
    argv = ["--reuse", "2", "--kind", "deep", "--branch", "2", "--order", "1", "--check", "0", "--out", str(tmp_path)]
    assert run(*argv)[0] == 0
    searched = read_searched(tmp_path / "ddim-6-deep-branch2-order1-2.json")
    assert set(searched.plan.sites) == set(select(pipeline.sites, kind="deep", branch=2))
    phast = partial(minireuse.policies.phast, plans=[searched], model=searched.model)
    plan = phast(6, select(pipeline.sites, kind="deep", branch=2), k=2, order=1)
    assert plan == searched.plan.on(plan.sites)
    with pytest.warns(UserWarning, match="searched with other sites for ddim, 6 calls, 2 of them reused with order 1,"):
        phast(6, select(pipeline.sites, kind="deep"), k=2, order=1)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch):
    """Costs as if they had been measured: times on a busy machine must not decide what a test sees."""

    def made_up(groups: list[tuple[Site, ...]], saved: list[float]) -> Costs:
        costs = Costs(1.0, tuple(groups), (0.05,) * len(groups), tuple(-value for value in saved))
        monkeypatch.setattr(search, "measure", lambda pipeline, groups, order: costs)
        return costs

    return made_up


def test_a_latency_chooses_the_number_of_reuse_calls(
    run, made_up, tmp_path: Path, pipeline: minireuse.Pipeline
) -> None:
    costs = made_up([select(pipeline.sites, kind="deep")], [0.7])
    argv = ["--budget-latency", "0.6", "--kind", "deep", "--out", str(tmp_path / "p.json")]
    assert run(*argv)[0] == 0
    text = (tmp_path / "p.json").read_text()
    plan, about = ReusePlan.from_json(text), json.loads(text)["about"]
    assert {s.kind for s in plan.sites} == {"deep"}
    assert about["latency_estimated"] == costs.latency(plan.on(pipeline.sites)) <= 0.6
    assert about["latency"] > 0
    assert set(about["scores_unseen"]) == {"phast", "hurry deep", "interval deep"}
    made_up([select(pipeline.sites, kind="deep")], [0.01])  # another day: a search goes on by the costs it began with
    (tmp_path / "p.json").unlink()
    assert run(*argv)[0] == 0
    assert json.loads((tmp_path / "p.json").read_text())["about"]["costs"] == costs.to_json()


def test_layers_and_kinds_side_by_side(run, made_up, tmp_path: Path, pipeline: minireuse.Pipeline) -> None:
    groups = groups_of(pipeline.sites, 3)
    names = ["map of self attention at resolution 0", "out of cross attention at resolution 0", "deep of up_blocks.2"]
    saved = [0.4 if name in names else 0.001 for name in groups]
    costs = made_up(list(groups.values()), saved)
    argv = ["--layerwise", "--budget-latency", "0.83", "--steps", "4", "--out", str(tmp_path)]
    assert run(*argv)[0] == 0
    text = (tmp_path / "ddim-4-layerwise-0.83.json").read_text()
    plan, about = ReusePlan.from_json(text), json.loads(text)["about"]
    assert about["latency_estimated"] == costs.latency(plan.on(pipeline.sites)) <= 0.83
    reused = {site for site, column in zip(plan.sites, plan.mask.T, strict=True) if column.any()}
    assert reused <= {site for name in names for site in groups[name]}  # the others save too little to be looked at
    assert about["finished"]
    step_wise = {f"{name} {kind}" for name in ("hurry", "interval") for kind in ("map", "out", "deep")}
    assert set(about["scores_unseen"]) == {"phast", *step_wise}
    tried = (tmp_path / "ddim-4-layerwise-0.83.journal.jsonl").read_text()
    for alone in ("..##/..../....", "..../..../..##", ".#.#/..../....", "..../..../.#.#"):
        assert f'"{alone}"' in tried  # HURRY and the even plan of a kind, as starts


def test_a_ladder_of_depth_plans_is_one_search(run, made_up, tmp_path: Path, pipeline: minireuse.Pipeline) -> None:
    entries = entry_sites(pipeline.sites)
    costs = made_up([(entry,) for entry in entries], [0.1 * (i + 1) for i in range(len(entries) - 1)] + [1.0])
    argv = ["--kind", "depth", "--order", "1", "--steps", "4", "--out", str(tmp_path), "--budget-latency"]
    assert run(*argv, "0.4", "0.8")[0] == 0
    for rung in (0.4, 0.8):
        text = (tmp_path / f"ddim-4-depth-order1-{rung}.json").read_text()
        plan, about = ReusePlan.from_json(text, pipeline.sites), json.loads(text)["about"]
        assert plan.order == 1
        assert {s.kind for s in plan.sites} == {"deep", "eps"}
        assert (plan.mask.sum(axis=1) <= 1).all()
        assert about["latency_estimated"] == costs.latency(plan.on(pipeline.sites)) <= rung == about["budget_latency"]
        assert set(about["scores_unseen"]) == {"phast", "even"}
    before = (tmp_path / "ddim-4-depth-order1.journal.jsonl").read_bytes()
    assert "holds the plan of this search already" in run(*argv, "0.8", "0.4")[1]
    # One more rung goes by the same scores.
    assert run(*argv, "0.6")[0] == 0
    assert (tmp_path / "ddim-4-depth-order1-0.6.json").exists()
    assert (tmp_path / "ddim-4-depth-order1.journal.jsonl").read_bytes().startswith(before)


def test_costs_are_measured_where_none_are_known(run, tmp_path: Path, pipeline: minireuse.Pipeline) -> None:
    run("--budget-latency", "0.001", "--kind", "out", "--out", str(tmp_path / "p.json"))
    (_, record) = (tmp_path / "p.journal.jsonl").read_text().splitlines()
    costs = Costs.from_json(json.loads(record)["value"], pipeline.sites)
    assert costs.groups == (select(pipeline.sites, kind="out"),)
    assert costs.plain > 0


def test_a_finished_search_is_not_made_again(run, tmp_path: Path) -> None:
    run("--reuse", "1", "--out", str(tmp_path))
    before = (tmp_path / "ddim-6-map-1.json").read_bytes()
    status, out, _ = run("--reuse", "1", "2", "--out", str(tmp_path))
    assert status == 0
    assert "holds the plan of this search already" in out
    assert (tmp_path / "ddim-6-map-1.json").read_bytes() == before
    assert (tmp_path / "ddim-6-map-2.json").exists()


@pytest.mark.usefixtures("one_thread")
def test_two_processes_find_the_plan_of_one(run, model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    _, alone, _ = run("--reuse", "2", "--out", str(tmp_path / "one.json"))
    argv = ["--model", str(model_folder), "--prompts-file", str(prompts), *COMMON, "--reuse", "2"]
    together = in_two_processes("minireuse.search", [*argv, "--out", str(tmp_path / "two.json")])
    assert (alone.count("U-Net calls made"), together.count("U-Net calls made")) == (1, 1)  # one speaks for both
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for name in ("score", "score_start", "scores_unseen", "rounds", "plans_tried"):
        assert one["about"][name] == two["about"][name], name
    assert (one["sites"], one["guided"]) == (two["sites"], two["guided"])
    assert two["about"]["calls_made"] < one["about"]["calls_made"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--out", "p.json", "--reuse", "1", "2"), "one file for 2 plans"),
        (("--out", "p.json", "--budget", "soon"), "--budget is 'soon'"),
        (("--out", "p.json", "--budget", "3"), "the budget of 3 ended before the search for p.json began"),
        (("--out", "p.json", "--budget-latency", "1.5"), "--budget-latency is 1.5, expected a fraction"),
        (("--out", "p.json", "--budget-latency", "0.5", "--reuse", "2"), "or --reuse, not both"),
        (("--out", "p.json", "--layerwise"), "add --budget-latency 0.7"),
        (("--out", "p.json", "--kind", "depth"), "--kind depth searches all branches within a latency; add"),
        (("--out", "p.json", "--budget-latency", "0.5", "0.50"), "names a latency twice"),
        (("--out", "p.json", "--budget-latency", "0.5", "0.6"), "one file for 2 plans"),
        (("--out", "p.json", "--layerwise", "--budget-latency", "0.5", "--branch", "1"), "leave out --branch"),
        (("--out", "p.json", "--branch", "1"), "branch numbers the deep features, but kind is 'map'"),
        (("--out", "p.json", "--budget-latency", "0.001", "--kind", "deep"), "as fast as 0.001 of the full"),
        (("--out", "p.json", "--prompts", "9"), "holds 3 prompts, but 10 are needed"),
        (("--out", "p.json", "--reuse", "6"), "k is 6, expected"),
        (("--out", "p.json", "--prompts", "-1"), "--prompts is -1, expected 1 or more"),
        (("--out", "p.json", "--check", "-1"), "--check is -1, expected 0 or more"),
        (
            ("--out", "p.json", "--kind", "deep", "--sites", "self"),
            "belong to no attention layer; leave out sites=self",
        ),
        (("--out", "spoilt.json"), "spoilt.json is not a plan"),
        (("--out", "taken.json"), "exists; remove it"),
    ],
)
def test_bad_input(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.json").write_text("{}")
    (tmp_path / "spoilt.json").write_text("[]")
    (tmp_path / "spoilt.journal.jsonl").touch()
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

"""The paper's figures on a model of one block: they measure what they say, resume, and judge by the numbers alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minireuse
from minireuse.common.metrics import fidelity
from minireuse.plan import ReusePlan, Site
from minireuse.policies import hurry, select

import reproduce
from paper import (
    exhaustive,
    extrapolation,
    figure_2,
    figure_3,
    figure_4,
    figure_5,
    layers,
    page,
    precision,
    search_rules,
    searches,
    steps_and_reuse,
    table_1,
    table_2,
    tensors,
    tolerance,
)
from paper.prompts import FREE, MANY, PLAIN, UNSEEN, sets_of
from paper.study import DISTILLED, OWN, SIBLING, STEPS, TUNED_FIXED, TUNED_RANDOM, Scale, Study, Way
from paper.verdicts import PAPER
from world import parse_caption

PROMPTS = [
    "green hills with a pine and a lake at noon",
    "red dunes at night",
    "snowy hills with two oaks, a red house and mountains at dawn",
]
MAP = Site("block.attn1", "map")


@pytest.fixture
def study(smallest_folder: Path, tmp_path: Path) -> Study:
    scale = replace(Scale(draws=1, ks=(4, 10), fewer=(12, 13), rounds=1).with_prompts(2))
    return Study({OWN: smallest_folder}, PROMPTS, scale, tmp_path / "plans", tmp_path, tmp_path / "work")


# --- what is measured -------------------------------------------------------------------------------------------------


def test_maps_are_compared_with_those_a_step_before() -> None:
    watcher = figure_2.Neighbours()
    for call, rows in enumerate(([[1.0, 0.0], [0.5, 0.5]], [[0.6, 0.4], [0.5, 0.5]], [[0.6, 0.4], [0.0, 1.0]])):
        watcher(MAP, call, torch.tensor(rows).log())
    # Rows sum to 1, so the norm of each map is its number of rows, 2.
    assert watcher.found["self"] == {1: [pytest.approx(0.8 / 2)], 2: [pytest.approx(1.0 / 2)]}
    assert watcher.found["cross"] == {}


def test_scores_are_perturbed_in_proportion_to_their_norm_before_the_softmax() -> None:
    perturb, scores = figure_3.Perturb(call=3, size=0.05, seed=0), 10 * torch.randn(2, 3, 4, 5)
    assert perturb(MAP, 2, scores) is None
    changed = perturb(MAP, 3, scores)
    assert changed is not None
    for image in range(2):  # each of the batch by its own norm
        share = (changed[image] - scores[image]).norm() / scores[image].norm()
        assert share.item() == pytest.approx(0.05, rel=1e-4)


def test_a_run_that_begins_at_a_step_is_the_rest_of_the_whole_run(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figure 3 begins at the step that it perturbs; whole runs that are perturbed there find the same."""
    monkeypatch.setattr(figure_3, "STEPS", 5)
    found = figure_3.one_prompt(study.pipe(), PROMPTS[0], 1000)
    assert (len(found["distance"]), len(found["exponent"])) == (5, 4)

    def latents(call: int) -> torch.Tensor:
        watch = figure_3.Perturb(call, figure_3.SIZE, 1000)
        return study.pipe().generate(PROMPTS[0], seeds=1000, steps=5, watch=watch).latents

    for step in (1, 4):
        expected = (latents(step - 1) - latents(-1)).abs().mean().item()
        assert found["distance"][step - 1] == pytest.approx(expected, rel=1e-3)


def curve(k2: float, jump: float, noise: float = 0.0) -> list[list[float]]:
    """Distances of 8 prompts: exponential up to step 18, then a jump."""
    rng, steps = np.random.default_rng(0), np.arange(1, STEPS + 1)
    rows = []
    for _ in range(8):
        row = np.exp(-k2 * steps) * (1 + 0.05 * rng.normal(size=STEPS)) + noise * rng.random(STEPS)
        row[-2], row[-1] = row[-3] * jump, 0.0
        rows.append(row.tolist())
    return rows


def test_the_exponent_of_an_exponential_is_found() -> None:
    """Scaling subtracts the last step's distance, which is 0 here, so the exponent stays the one that was made."""
    fitted = figure_3.fit(curve(0.15, 3.0))
    assert fitted.k2 == pytest.approx(0.15, rel=0.05)
    assert fitted.correlation > 0.99
    assert fitted.jump == pytest.approx(3.0)
    assert (fitted.scaled.min(), fitted.scaled.max()) == (0, 1)


def test_all_strategies_are_tried_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    assert math.comb(exhaustive.STEPS - 1, exhaustive.REUSED) == PAPER["exhaustive"]["strategies"]
    monkeypatch.setattr(exhaustive, "STEPS", 5)
    monkeypatch.setattr(exhaustive, "REUSED", 2)
    found = exhaustive.measure(study)
    assert sorted(found["psnr"]) == ["10011", "10101", "10110", "11001", "11010", "11100"]
    plan = hurry(5, study.maps, k=2)
    settings = {"steps": 5, "sampler": "dpmpp_2m", "seeds": [1000, 1001]}
    full, ours = (study.pipe().generate(PROMPTS[:2], plan=p, **settings).images for p in (None, plan))
    np.testing.assert_allclose(found["psnr"]["11100"], fidelity(ours, full), atol=1e-9)
    best = np.max(list(found["psnr"].values()), axis=0)
    again = search_rules.measure(replace(study, finished={"exhaustive": found}))
    assert again["best"] == best.tolist()
    assert all(np.all(row["psnr"] <= best) for row in again["rules"].values())


def test_what_was_judged_is_known_again(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"full": Way(study.full(4), 4), "HURRY": Way(study.hurry(2, 4), 4), "small": Way(study.full(4), 4, size=8)}
    alike = {name: way for name, way in ways.items() if name != "small"}
    found = study.judge("a", alike, PROMPTS[:2])
    assert found["full"]["psnr"] == [100, 100]
    assert study.picture("a", "HURRY", 1).shape == (16, 16, 3)
    assert study.between("a", "HURRY", "full", 2) == found["HURRY"]["psnr"]
    assert study.judge("b", {"full": ways["small"]}, PROMPTS[:2])["full"]["psnr"] == [100, 100]
    assert study.picture("b", "full").shape == (8, 8, 3)
    monkeypatch.setattr(Study, "_pictures", None)
    assert study.judge("a", alike, PROMPTS[:2]) == found


def test_the_estimated_latency_is_the_papers() -> None:
    """20 calls of 152 ms, of which 10 take 47 ms; 13 steps."""
    assert figure_5.latency({}, "PHAST 10", "estimated") == pytest.approx((10 * 152 + 10 * 47) / (20 * 152))
    assert figure_5.latency({}, "DDIM 13", "estimated") == pytest.approx(13 / 20)
    assert figure_5.papers_gain() == pytest.approx(27.0 - 19.2, abs=0.2)
    for steps in range(13, 21):
        k = steps_and_reuse.reuse_for(steps, 0.65)
        assert k is not None
        time = lambda k, steps=steps: (152 * (steps - k) + 47 * k) / (20 * 152)  # noqa: E731
        assert time(k) <= 0.65 + 1e-9
        assert k == 0 or time(k - 1) > 0.65


def test_sets_of_prompts_differ_as_they_say() -> None:
    found = sets_of(PROMPTS)
    assert found[PLAIN] == [PROMPTS[0], PROMPTS[1]]
    assert found[MANY] == [PROMPTS[2]]
    assert len(found[FREE]) == 3
    assert found[UNSEEN] == [
        "green hills with a pine, an oak and a lake at noon",
        "snowy hills with two oaks, a pine, a red house and mountains at dawn",
    ]
    assert [parse_caption(text) for text in found[UNSEEN]] == [None, None]  # no scene has both
    assert sets_of(["a photo of a cat"]) == {}


def test_searches_cover_both_grids_and_all_rules() -> None:
    names = [search.name for search in searches.searches((4, 10), "4min", "18min")]
    assert names[:2] == ["phast-leading-10", "phast-trailing-10"]
    assert {"phast-leading-4", "first-leading-4", "exact-leading-10", "within-layers", "within-deep"} <= set(names)
    exact = next(s for s in searches.searches((10,), "4min", "18min") if s.name.startswith("exact"))
    assert exact.options[-1] == "20min"


# --- verdicts on made data: each statement can hold, fail, and stay open ----------------------------------------------

rng = np.random.default_rng(1)


def near(value: float) -> list[float]:
    """Eight prompts around a value, in dB."""
    return (value + 0.2 * rng.normal(size=8)).tolist()


def wide(value: float) -> list[float]:
    return [value - 9, value + 9] * 4


def mixed(value: float) -> list[float]:
    """As far apart, and in another order each time, so that paired differences are, too."""
    return rng.permutation(wide(value)).tolist()


def maps_change(most: float) -> dict[str, Any]:
    return {kind: [np.linspace(most, 0.01, STEPS - 1).tolist()] * 8 for kind in ("self", "cross")}


def perturbed(k2: float, jump: float) -> dict[str, Any]:
    exponents = [[0.1] * (STEPS - 1)] * 8
    return {grid: {"distance": curve(k2, jump), "exponent": exponents} for grid in ("leading", "trailing")}


def all_strategies(best: str, worst: str) -> dict[str, Any]:
    names = [format(n, "010b") for n in range(512, 1024) if format(n, "b").count("0") == 3]
    scores = {name: near(20 + i / 10) for i, name in enumerate(sorted(names))}
    return {"psnr": scores | {best: near(60), worst: near(1)}, "phast": best, "phast_tried": 42}


def four_strategies(phast: float, hurry: float, others: float, make: Any = near) -> dict[str, Any]:
    psnr = {"random 0": make(others), "random 1": make(others), "early": make(others)}
    psnr |= {"HURRY": make(hurry), "PHAST": make(phast)}
    return {"psnr": psnr, "phast": "." * 10 + "#" * 10, "note": "", "prompts": PROMPTS}


def figure_5_found(phast: float, hurry: float, plain: float, make: Any = near) -> dict[str, Any]:
    """PSNR at 4 reuse steps; each further one costs 1 dB. Plain DDIM is flat on `leading` and steep on `trailing`."""
    grids = {}
    for grid, slope in (("leading", 0.0), ("trailing", 2.0)):
        psnr = {f"PHAST {k}": make(phast - k + 4) for k in (4, 10, 12)}
        psnr |= {f"HURRY {k}": make(hurry - k + 4) for k in (4, 10, 12)}
        psnr |= {f"DDIM {n}": make(plain + slope * (n - 12)) for n in range(12, 19)}
        grids[grid] = {"psnr": psnr, "plans": {}, "notes": {}}
    times = {name: {"seconds": [0.9], "seconds_explicit": [0.7]} for name in grids["leading"]["psnr"]}
    times |= {f"DDIM {n}": {"seconds": [n / 20], "seconds_explicit": [n / 20]} for n in range(12, 19)}
    return {"grids": grids, "times": times | {"full": {"seconds": [1.0], "seconds_explicit": [1.0]}}}


def carried(phast: float, fewer: float, make: Any = near) -> dict[str, Any]:
    cell = {"full": {"psnr": [100.0] * 8, "fid": 2.0}, "13 steps": {"psnr": make(fewer), "fid": 2.5}}
    cell["PHAST"] = {"psnr": make(phast), "fid": 2.1}
    names = (PLAIN, FREE, MANY, UNSEEN, "96 pixels", "192 pixels")
    return {"rows": dict.fromkeys(names, cell), "phast": "", "note": "", "sibling": False}


def two_samplers(phast: float, fewer: float, eight_bits: float, make: Any = near) -> dict[str, Any]:
    def row(values: list[float]) -> dict[str, Any]:
        return {"psnr": values, "follows": [0.9] * 8, "fid": 0.5}

    ours = make(phast)
    rows = {"20 steps": row([100.0] * 8), "13 steps": row(make(fewer)), "PHAST": row(ours)}
    rows["PHAST, float16 cache"] = row(ours)
    rows["PHAST, 8-bit cache"] = row([value + eight_bits for value in ours])
    taken = {"20 steps": 1.0, "13 steps": 0.65}
    times = {
        f"{model}/{name}": {
            "seconds": [taken.get(name, 0.9)],
            "seconds_explicit": [taken.get(name, 0.7)],
            "cache_mib": 30.0,
        }
        for model in (OWN, DISTILLED)
        for name in rows
    }
    return {"rows": {model: dict.fromkeys(table_2.SAMPLERS, rows) for model in (OWN, DISTILLED)}, "times": times}


def rules(found_best: int) -> dict[str, Any]:
    """found_best: of 8 prompts, those on which the whole neighbourhood finds the best strategy."""
    best = near(30)
    whole = [value - (i >= found_best) for i, value in enumerate(best)]
    made = {"plans": ["a"] * 8, "psnr": whole, "tried": [43] * 8}
    first = {"plans": ["a"] * 6 + ["b"] * 2, "psnr": [value - 0.5 for value in whole], "tried": [20] * 8}
    searched = {"grid": "..##", "psnr": near(30), "calls": 300, "finished": True}
    pairs = dict(zip(search_rules.RULES, (made, first), strict=True))
    return {"best": best, "rules": pairs, "searches": {"10": {"phast": searched, "first": searched}}}


def by_layer(layers_: float, deep: float, slower: float = 0.0, make: Any = near) -> dict[str, Any]:
    times = {"full": {"seconds": [1.0]}, "layers": {"seconds": [0.7 + slower]}, "deep": {"seconds": [0.7]}}
    return {"psnr": {"layers": make(layers_), "deep": make(deep)}, "times": times}


def by_tensor(out: float, deep: float, plain: float, make: Any = near) -> dict[str, Any]:
    values = {"map": 30.0, "out": out, "deep": deep}
    psnr = {f"{policy}, {kind}": make(v) for kind, v in values.items() for policy in ("HURRY", "even", "PHAST")}
    psnr |= {f"{n} steps": make(plain) for n in tensors.PLAIN}
    times = {name: {"seconds": [0.6], "seconds_explicit": [0.7], "cache_mib": 1.0} for name in psnr}
    times |= {f"{n} steps": {"seconds": [n / 20], "seconds_explicit": [n / 20], "cache_mib": 0} for n in tensors.PLAIN}
    return {"psnr": psnr, "times": times | {"full": {"seconds": [1.0], "seconds_explicit": [1.0]}}}


def together(fewer: float, all_steps: float, make: Any = near) -> dict[str, Any]:
    rows = {f"{latency}/16/2": make(fewer) for latency in steps_and_reuse.LATENCIES}
    rows |= {f"{latency}/20/8": make(all_steps) for latency in steps_and_reuse.LATENCIES}
    return {"psnr": {"leading": rows, "trailing": rows}}


def tuned(fixed: float, before: float, make: Any = near) -> dict[str, Any]:
    rows = {}
    for model, value in ((OWN, before), (TUNED_FIXED, fixed), (TUNED_RANDOM, before - 2)):
        for plan in ("full", *tolerance.PLANS):
            rows[f"{model}, {plan}"] = {"original": make(value), "own": make(value), "follows": 0.9}
    return {"rows": rows}


def over_runs(timestep: float, share: float, make: Any = near) -> dict[str, Any]:
    row = {"share": {"psnr": make(share), "plan": ".#"}, "timestep": {"psnr": make(timestep), "plan": "#."}}
    return {"plan": ".#", "rows": {"trailing": row, "10 steps": row}}


def orders(held: float, extrapolated: float, make: Any = near) -> dict[str, Any]:
    names = [f"{name}, {kind}" for name in ("even", "HURRY") for kind in extrapolation.KINDS]
    rows = {f"{n}, {order}": make((held, extrapolated)[order]) for n in names for order in (0, 1)}
    return {"psnr": rows}


def bits(value: float) -> dict[str, Any]:
    return {"psnr": {cache: near(value) for cache in precision.BITS}}


PAPERS_BEST, HURRY = PAPER["exhaustive"]["phast"], exhaustive.HURRY
MADE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # holds, does not hold, unclear
    "figure-2": (maps_change(0.15), maps_change(0.9), maps_change(0.35)),
    "figure-3": (perturbed(0.1, 4.0), perturbed(0.1, 0.3), perturbed(0.1, 1.0)),
    "exhaustive": (
        all_strategies(PAPERS_BEST, "1000111111"),
        all_strategies("1000111111", HURRY),
        all_strategies("1111001110", "1111111001") | {"phast": HURRY},
    ),
    "figure-4": (
        four_strategies(40, 30, 20),
        four_strategies(20, 30, 40),
        four_strategies(30, 30, 20, wide),
    ),
    "figure-5": (figure_5_found(50, 45, 20), figure_5_found(20, 25, 60), figure_5_found(30, 29, 22, wide)),
    "table-1": (carried(40, 30), carried(30, 40), carried(30, 30, wide)),
    "table-2": (two_samplers(40, 30, 0.0), two_samplers(40, 30, -5.0), two_samplers(40, 30, -0.5)),
    "search-rules": (rules(8), rules(1), rules(6)),
    "precision": (bits(60), bits(20), bits(40)),
    "layers": (by_layer(40, 30), by_layer(30, 40), by_layer(40, 30, slower=0.1)),
    "tensors": (by_tensor(30, 40, 30), by_tensor(20, 20, 30), by_tensor(30, 30, 30, wide)),
    "steps-and-reuse": (together(40, 30), together(30, 40), together(31, 30, mixed)),
    "tolerance": (tuned(40, 30), tuned(20, 30), tuned(30, 30, wide)),
    "carrying": (over_runs(40, 30), over_runs(30, 40), over_runs(31, 30, mixed)),
    "extrapolation": (orders(30, 40), orders(40, 30), orders(30, 31, mixed)),
}


@pytest.mark.parametrize("name", MADE)
def test_each_statement_can_hold_fail_and_stay_open(name: str) -> None:
    words = [page.FIGURES[name].verdict(found).word for found in MADE[name]]
    assert words == ["holds", "does not hold", "unclear"]


def test_nothing_is_said_of_models_and_plans_that_are_not_there() -> None:
    assert tolerance.verdict({"rows": {f"{OWN}, full": {}}}).word == "unclear"
    assert layers.verdict({"psnr": {"deep": near(30)}, "times": {}}).word == "unclear"


def test_the_share_of_the_grid_is_what_the_rival_gains_from_it() -> None:
    """At 10 reuse steps, so 0.65 of the time, the rival has 20 dB on `leading` and 22.2 on `trailing`; PHAST 44."""
    found = figure_5_found(50, 45, 20, lambda value: [value] * 8)
    assert np.mean(figure_5.plain_at(found, "leading", 0.655, "estimated")) == pytest.approx(20)
    assert figure_5.share_of_grid(found) == pytest.approx(2 * (20 * 0.65461 - 12) / 24, rel=1e-3)
    assert "9 % of the gain on `leading` is the grid of the rival" in figure_5.verdict(found).sentence


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def made_results(tmp_path: Path) -> Path:
    """A folder of results that were made up: the first of each."""
    setting = {"model": "abc", "prediction": "epsilon", "spacing": "leading", "guidance_scale": 7.5}
    setting |= {"dtype": "float32", "device": "cpu", "threads": 1, "torch": "2"}
    stages = {name: {"setting": setting, "settings": {}, "found": found[0]} for name, found in MADE.items()}
    out = tmp_path / "docs" / "paper"
    out.mkdir(parents=True)
    (out / "results.json").write_text(json.dumps({"command": "python scripts/reproduce.py", "stages": stages}))
    figure_4.Image.fromarray(np.zeros((80, 48, 3), np.uint8)).save(out / figure_4.PICTURES)
    return out


def numbers_of(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers_of(part)]
    return [n for part in value for n in numbers_of(part)] if isinstance(value, list) else [value]


def test_the_page_is_made_from_results_alone(
    made_results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(minireuse, "load", None)
    reproduce.main(["--report", "--out", str(made_results)])
    path = made_results.with_suffix(".md")
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text()
    for name, module in page.FIGURES.items():
        assert f"### {module.TITLE}\n" in text
        assert f"](paper/{name}.png)" in text
        assert f"](#{page.anchor(module.TITLE)})" in text
        assert (made_results / f"{name}.png").stat().st_size > 5000
        word, sentence = module.verdict(MADE[name][0])
        assert f"**Verdict: {word}.** {sentence}" in text
        assert f"| {module.TITLE} | {word} | {sentence} |" in (made_results / "verdicts.md").read_text()
    for number in numbers_of({n: v for n, v in PAPER.items() if n.startswith(("figure", "table"))}):
        assert number is None or any(f"{number:{form}}" in text for form in ("", ".1f", ".2f", ".4f")), number


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def given(smallest_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS * 4))
    files = ["--prompts-file", str(tmp_path / "prompts.txt"), "--calibration-file", str(tmp_path / "prompts.txt")]
    few = ["--quick", "--prompts", "2", "--rounds", "1", "--out", str(tmp_path / "out" / "paper")]
    return ["--model", str(smallest_folder), *files, *few, "--work", str(tmp_path / "work")]


def test_a_finished_stage_is_not_done_again(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reproduce.main([*given, "--stages", "precision"])
    before = (tmp_path / "out" / "paper" / "results.json").read_text()
    monkeypatch.setattr(precision, "measure", None)
    reproduce.main([*given, "--stages", "figure-2", "precision"])
    found = json.loads((tmp_path / "out" / "paper" / "results.json").read_text())["stages"]
    assert list(found) == ["precision", "figure-2"]
    assert found["precision"] == json.loads(before)["stages"]["precision"]
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        reproduce.main([*given, "--prompts", "3", "--stages", "precision"])


def test_searches_are_kept_with_the_timesteps_of_their_calls(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = searches.Search("phast-trailing-10", "trailing", ("--reuse", "10", "--check", "1", "--budget", "50"))
    monkeypatch.setattr(searches, "searches", lambda *args: [one])
    argv = [*given, "--search-prompts", "1", "--stages", "searches"]
    reproduce.main(argv)
    file = tmp_path / "out" / "paper" / "plans" / "phast-trailing-10.json"
    data = json.loads(file.read_text())
    assert data["timesteps"] == list(range(999, 0, -50))
    assert (data["about"]["spacing"], data["calls"]) == ("trailing", 20)
    monkeypatch.setattr(searches.command, "main", None)
    reproduce.main(argv)
    other = file.with_name("other.json")
    file.rename(other)
    file.write_text(json.dumps(data | {"about": data["about"] | {"model": "another"}}))
    with pytest.raises(ValueError, match="was searched for another model; remove it"):
        reproduce.main(argv)
    other.replace(file)
    study = reproduce.study_of(reproduce.parser().parse_args(given), Scale().with_prompts(2))
    plan, note = study.phast(10, "trailing")
    assert (plan, note) == (ReusePlan.from_json(file.read_text(), select(study.pipe().sites)), "")
    assert "fitted" in study.phast(10, "leading")[1] or "scaled" in study.phast(10, "leading")[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "a"], "--model needs --prompts-file and --calibration-file"),
        (["--prompts", "0"], "--prompts is 0, expected 1 or more"),
        (["--prompts", "1000"], "holds 400 prompts, but 1000 are needed; lower --prompts"),
    ],
)
def test_what_cannot_be_run_is_refused(argv: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        reproduce.main([*argv, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_world_has_its_rows(study: Study) -> None:
    """Prompts that are no scenes: one set, the file's own, and distances to the full sampler's pictures."""
    other = replace(
        study, prompts=["a photo of a cat", "a photo of a dog"], models=study.models | {SIBLING: study.models[OWN]}
    )
    found = table_1.measure(other)
    assert list(found["rows"]) == ["prompts", "another model", "12 pixels", "24 pixels"]
    assert found["rows"]["prompts"]["full"]["fid"] == pytest.approx(0, abs=1e-6)
    assert found["rows"]["another model"]["PHAST"]["psnr"] == found["rows"]["prompts"]["PHAST"]["psnr"]
    assert table_1.verdict(found).word in ("holds", "does not hold", "unclear")

"""Plans that lie beside a model: which one a run takes, how it is fitted, and what is said about it."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

import minireuse
from minireuse.config import SD1_UNET, SD2_UNET, UNetConfig
from minireuse.plan import PlanError, ReusePlan, Site
from minireuse.policies import Policy, fit, interval, papers_plan, phast, select
from minireuse.sample import command as sample
from minireuse.search import build, plans_of, read_searched
from minireuse.search.plan_files import plan_text
from minireuse.unet import UNet

MAPS = tuple(Site(f"block.{name}", "map") for name in ("attn1", "attn2"))
OUTS = tuple(Site(s.address, "out") for s in MAPS)
DEEP = (Site("up_blocks.1", "deep", 0), Site("up_blocks.0", "deep", 1))
EVERY = (*MAPS, *OUTS, *DEEP)


def row(grid: str) -> tuple[bool, ...]:
    return tuple(cell == "#" for cell in grid)


def written(
    folder: Path,
    name: str,
    grid: str,
    model: str = "aa",
    sampler: str = "ddim",
    sites: tuple = MAPS,
    order: int = 0,
    **about: object,
) -> Path:
    plan = json.loads(ReusePlan.stepwise(row(grid), sites, order).to_json())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(plan | {"about": {"model": model, "sampler": sampler} | about}))
    return folder / name


@pytest.mark.parametrize(
    ("grid", "calls", "k", "fitted"),
    [
        (".#..#.##", 8, 4, ".#..#.##"),
        (".#.#.#.#", 4, 2, ".#.#"),
        (".#.#", 8, 4, "..##..##"),
        ("....####", 16, 8, "........########"),
        ("....####", 8, 6, "..######"),
        ("....####", 8, 2, ".....#.#"),
        (".#######", 3, 2, ".##"),
        ("........", 8, 2, "......##"),
        (".#.#.#.#", 8, 0, "........"),
        (".#", 1, 0, "."),
    ],
)
def test_fit(grid: str, calls: int, k: int, fitted: str) -> None:
    assert "".join(".#"[int(c)] for c in fit(row(grid), calls, k)) == fitted


def test_fit_gives_k_calls_and_never_call_0() -> None:
    for grid in (".#", ".##########", "..........#", ".#.#.#.###.", "......#...."):
        for calls in range(1, 30):
            for k in range(calls):
                fitted = fit(row(grid), calls, k)
                assert (len(fitted), fitted.sum(), fitted[0]) == (calls, k, False)


def test_a_plan_searched_for_this_very_run_is_taken_without_a_word(tmp_path: Path) -> None:
    plan = read_searched(written(tmp_path, "p.json", "..#.##"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert partial(phast, plans=[plan], model="aa")(6, MAPS, k=3).grid == "..#.##"


def test_plans_of_each_order_stand_for_themselves(tmp_path: Path) -> None:
    written(tmp_path / "plans", "a.json", "..#.##")
    written(tmp_path / "plans", "b.json", ".#.#.#", order=1)
    policy = partial(phast, plans=plans_of(tmp_path), sampler="ddim", model="aa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert policy(6, MAPS, k=3) == ReusePlan.stepwise(row("..#.##"), MAPS)
        assert policy(6, MAPS, k=3, order=1) == ReusePlan.stepwise(row(".#.#.#"), MAPS, 1)
    (tmp_path / "plans" / "b.json").unlink()
    with pytest.warns(
        UserWarning, match=r"run \(ddim, 6 calls, 3 of them reused with order 1\); .* 3 of them reused, scaled"
    ):
        plan = partial(phast, plans=plans_of(tmp_path), sampler="ddim", model="aa")(6, MAPS, k=3, order=1)
    assert (plan.grid, plan.order) == ("..#.##", 1)


def test_the_nearest_plan_is_taken_and_named(tmp_path: Path) -> None:
    written(tmp_path / "plans", "a.json", "...#.##", sampler="plms")
    written(tmp_path / "plans", "b.json", ".#.###")
    written(tmp_path / "plans", "c.json", "..#.##", model="bb")
    written(tmp_path / "plans", "d.json", ".#.#.#.#.#.#")
    written(tmp_path / "plans", "e.json", "...#.#", sites=OUTS)
    policy = partial(phast, plans=plans_of(tmp_path), sampler="ddim", model="aa")
    with pytest.warns(
        UserWarning, match=r"run \(ddim, 7 calls, 3 .* searched for ddim, 6 calls, 4 of them reused, scaled"
    ):
        assert policy(7, MAPS, k=3).reused == 3  # b: the model and the sampler count more than the number of calls
    with pytest.warns(UserWarning, match="searched for ddim, 12 calls"):
        assert policy(10, MAPS, k=5).grid == fitted_grid(".#.#.#.#.#.#", 10, 5)
    with pytest.warns(UserWarning, match="searched with another model for plms"):
        partial(phast, plans=plans_of(tmp_path), sampler="plms", model="cc")(7, MAPS, k=3)
    with pytest.warns(UserWarning, match="6 calls, 2 of them"):
        assert policy(6, OUTS, k=3).sites == OUTS


def fitted_grid(grid: str, calls: int, k: int) -> str:
    return "".join(".#"[int(c)] for c in fit(row(grid), calls, k))


def test_a_plan_is_carried_over_by_timestep(tmp_path: Path) -> None:
    """Each call does what the plan does at the nearest timestep."""
    leading, trailing = tuple(range(951, 0, -50)), tuple(range(999, 0, -50))
    # Call i of `leading` is at 951 - 50 i, and so is call i + 1 of `trailing`, but for 2. Its last call has none there.
    for grid, k, carried in (
        (".....#.......#......", 2, "......#.......#....."),
        ("........#.###.######", 10, ".........#.#########"),
    ):
        fitted = fit(row(grid), 20, k, leading, trailing)
        assert "".join(".#"[int(c)] for c in fitted) == carried
    assert fit(row("......#..##.####.###"), 10, 5, leading, leading[1::2]).tolist() == list(row("....#.####"))
    early = (900, 800, 700, 600, 500, 100)  # calls 5 to 9 of the other run are nearest to its last two
    assert "".join(".#"[int(c)] for c in fit(row("....##"), 10, 2, early, tuple(range(950, 0, -100)))) == "......#.#."
    written(tmp_path / "plans", "a.json", "....##")
    data = json.loads((tmp_path / "plans" / "a.json").read_text())
    (tmp_path / "plans" / "a.json").write_text(json.dumps(data | {"timesteps": early}))
    policy = partial(phast, plans=plans_of(tmp_path), model="aa", timesteps=tuple(range(950, 0, -100)))
    with pytest.warns(UserWarning, match="scaled to this run"):
        assert policy(10, MAPS, k=2).grid == "......#.#."
    with pytest.warns(UserWarning, match="scaled to this run"):
        assert partial(phast, plans=plans_of(tmp_path), model="aa")(10, MAPS, k=2).grid == fitted_grid("....##", 10, 2)


def test_a_plan_file_keeps_the_timesteps_of_its_calls(tmp_path: Path) -> None:
    plan = ReusePlan.stepwise(row("..#"), MAPS)
    (tmp_path / "p.json").write_text(plan_text(plan, [800, 500.5, 20], {"model": "aa", "sampler": "ddim"}))
    found = read_searched(tmp_path / "p.json")
    assert (found.plan, found.timesteps) == (plan, (800, 500.5, 20))
    for wrong in ([800, 500], [800, 500, 600], "800", [800, True, 20], [800, 500, -3]):
        data = json.loads((tmp_path / "p.json").read_text()) | {"timesteps": wrong}
        (tmp_path / "q.json").write_text(json.dumps(data))
        with pytest.raises(PlanError, match=r"plan field timesteps is .*, expected 3 numbers that fall"):
            read_searched(tmp_path / "q.json")


def maps_of(config: UNetConfig) -> tuple[Site, ...]:
    with torch.device("meta"):
        return select(UNet(config).sites)


@pytest.mark.parametrize("config", [SD1_UNET, SD2_UNET])
def test_the_papers_own_plan_serves_stable_diffusion(config: UNetConfig, tmp_path: Path) -> None:
    """Section 5: steps 1-8, 10 and 14 of DDIM's 20 compute."""
    maps, leading = maps_of(config), tuple(range(951, 0, -50))
    computed = {1, 2, 3, 4, 5, 6, 7, 8, 10, 14}
    drawn = "".join(".#"[step not in computed] for step in range(1, 21))
    policy = partial(phast, plans=plans_of(), model="aa", timesteps=leading)
    with pytest.warns(
        UserWarning, match=r"uses the paper's plan, searched for Stable Diffusion 1\.5 and ddim, 20 calls"
    ):
        assert policy(20, maps).grid == drawn
    with pytest.warns(UserWarning, match="uses the paper's plan"):
        assert policy(20, select(maps, "cross")).grid == drawn
    with pytest.warns(UserWarning, match="uses the paper's plan"):  # each of 10 calls is two of 20
        assert partial(policy, timesteps=tuple(range(901, 0, -100)))(10, maps).reused == 5
    written(tmp_path / "plans", "own.json", "." * 10 + "#" * 10, sites=maps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert partial(policy, plans=plans_of(tmp_path))(20, maps).grid == "." * 10 + "#" * 10


def test_the_papers_plan_is_kept_from_other_models_and_kinds(pipeline: minireuse.Pipeline) -> None:
    assert papers_plan(select(pipeline.sites)) is None
    assert papers_plan(select(minireuse.load(device="meta").sites)) is None
    with torch.device("meta"):
        assert papers_plan(select(UNet(SD1_UNET).sites, kind="out")) is None
    blocks = ["mid_block.attentions.0"]  # where Stable Diffusion XL has its transformers
    blocks += [f"down_blocks.{i}.attentions.{j}" for i in (1, 2) for j in range(2)]
    blocks += [f"up_blocks.{i}.attentions.{j}" for i in (0, 1) for j in range(3)]
    xl = [Site(f"{block}.transformer_blocks.{n}.attn{a}", "map") for block in blocks for n in (0, 1) for a in (1, 2)]
    assert papers_plan(xl) is not None
    assert papers_plan(xl[:-4]) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not a plan"),
        (ReusePlan.stepwise(row(".#"), MAPS).to_json(), "does not say what it was searched for"),
        ("[]", "is not a plan"),
    ],
)
def test_other_files_among_the_plans_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "x.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        plans_of(tmp_path)


def test_plans_by_site_are_chosen_by_their_time_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "plans", "p.json", ".#")
    depth = ReusePlan.stepwise(row(".#.."), DEEP[:1]) | ReusePlan.stepwise(row("...#"), DEEP[1:])
    about = {"model": "aa", "sampler": "ddim", "latency": 0.5, "scores_unseen": {"phast": 30.0}}
    path.write_text(json.dumps(json.loads(depth.to_json()) | {"about": about}))
    policy = partial(phast, plans=plans_of(tmp_path), model="aa")
    with pytest.warns(UserWarning, match="phast reuses deep features, in 2 of 4 calls: 0.50 of"):
        assert policy(4, EVERY) == depth
    with pytest.warns(UserWarning, match="no searched plan covers these sites, so phast uses hurry"):
        assert phast(4, DEEP[:1], k=1, plans=[read_searched(path)], model="aa").grid == "...#"


def test_without_a_plan_for_such_sites_phast_is_hurry_and_says_so(tmp_path: Path) -> None:
    maps = read_searched(written(tmp_path, "p.json", "..#.##"))
    deep = (Site("up_blocks.0", "deep"),)
    with pytest.warns(UserWarning, match="no searched plan covers these sites, so phast uses hurry"):
        assert phast(6, deep, k=2, plans=[maps], model="aa").grid == "....##"
    with pytest.warns(UserWarning, match="phast uses one searched with another model and other sites"):
        assert phast(9, MAPS, k=3, plans=plans_of()).reused == 3  # of those that ship


@pytest.fixture
def ladder(tmp_path: Path) -> Policy:
    """`phast` with plans of several kinds and times, of this run and of others."""
    folder, this = tmp_path / "plans", {"spacing": "leading"}
    for name, grid, sites, order, took, unseen in (
        ("maps", "..#.##", MAPS, 0, 1.1, 45.0),
        ("outs", ".#.#.#", OUTS, 0, 0.9, 41.0),
        ("deep", ".#.#.#", DEEP[:1], 1, 0.58, 37.0),
        ("deeper", "..#.##", DEEP[:1], 0, 0.57, 35.0),
        ("branch", ".#.#.#", DEEP[1:], 1, 0.7, 40.0),
    ):
        scores = {"phast": unseen, "hurry": 1.0}
        written(folder, f"{name}.json", grid, sites=sites, order=order, latency=took, scores_unseen=scores, **this)
    written(folder, "other.json", ".#####", sites=DEEP[:1], model="bb", latency=0.1, scores_unseen={"phast": 99.0})
    written(folder, "untimed.json", "...###", sites=DEEP[:1], scores_unseen={"phast": 99.0}, **this)
    written(folder, "unscored.json", "....##", sites=DEEP[:1], latency=0.1, **this)
    written(folder, "grid.json", ".###.#", sites=DEEP[:1], latency=0.1, scores_unseen={"phast": 99.0}, spacing="karras")
    return partial(phast, plans=plans_of(tmp_path), model="aa", spacing="leading")


@pytest.mark.parametrize(
    ("expression", "given", "grid", "sites", "order"),
    [
        ("phast", {}, ".#.#.#", DEEP[:1], 1),  # 0.6 of the time
        ("phast", {"latency": 0.575}, "..#.##", DEEP[:1], 0),
        ("phast", {"latency": 0.75}, ".#.#.#", DEEP[1:], 1),
        ("phast:latency=0.95", {}, ".#.#.#", OUTS, 0),
        ("phast:latency=0.95,kind=deep", {}, ".#.#.#", DEEP[1:], 1),
        ("phast:latency=0.95,order=0,kind=deep", {}, "..#.##", DEEP[:1], 0),
        ("phast", {"latency": 0.95, "kind": "out"}, ".#.#.#", OUTS, 0),
    ],
)
def test_phast_is_the_closest_plan_within_a_time(
    ladder: Policy, expression: str, given: dict, grid: str, sites: tuple, order: int
) -> None:
    with pytest.warns(UserWarning, match=r"phast reuses .* of the full sampler's time, .* dB on unseen prompts"):
        plan = build(expression, 6, EVERY, policies={"phast": ladder}, **given)
    assert (plan.grid, set(plan.sites), plan.order) == (grid, set(sites), order)


def test_what_was_chosen_is_told(ladder: Policy) -> None:
    with pytest.warns(
        UserWarning, match="reuses deep features, extrapolated, in 3 of 6 calls: 0.58 of .* time, 37.0 dB"
    ):
        ladder(6, EVERY)


@pytest.mark.parametrize("given", [{"kind": "map"}, {"k": 3}, {"which": "both"}])
def test_a_kind_or_a_number_of_calls_asks_for_the_papers_plan(ladder: Policy, given: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build("phast", 6, EVERY, policies={"phast": ladder}, **given).sites == MAPS


def test_where_nothing_was_searched_deep_features_are_extrapolated_evenly(ladder: Policy) -> None:
    said = (
        r"no plan searched .* at most 0.5 .*, in 6 of 10 calls, evenly; `python -m minireuse.search --kind depth .* 0.5"
    )
    with pytest.warns(UserWarning, match=said):
        plan = ladder(10, EVERY, latency=0.5)
    assert (plan.grid, plan.sites, plan.order) == (interval(10, DEEP, k=6).grid, DEEP[:1], 1)
    with pytest.raises(PlanError, match="leave out the kind of site"):
        ladder(10, MAPS, latency=0.5)
    with pytest.raises(PlanError, match=r"latency is 1\.5, expected a share"):
        ladder(10, EVERY, latency=1.5)
    with pytest.raises(PlanError, match="hurry takes none; ask for phast"):
        build("hurry", 6, EVERY, latency=0.5)


@pytest.mark.parametrize("wrong", [True, "fast", [0.5], float("nan"), None])
def test_times_and_scores_that_are_no_numbers_count_as_unknown(tmp_path: Path, wrong: object) -> None:
    found = read_searched(written(tmp_path, "p.json", ".#", latency=wrong, scores_unseen={"phast": wrong}))
    assert (found.latency, found.unseen) == (None, None)


@pytest.mark.parametrize("given", [{}, {"plans": None}, {"plans": []}])
def test_phast_reads_no_files_and_says_how_to_get_plans(given: dict) -> None:
    with pytest.raises(
        PlanError, match=r"search one with .*minireuse\.search`, or read them with minireuse\.search\.plans_of"
    ):
        phast(8, MAPS, **given)


def test_the_command_line_looks_for_plans_beside_the_model(
    model_folder: Path, pipeline: minireuse.Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for part in model_folder.iterdir():
        (model / part.name).symlink_to(part)
    sites = select(pipeline.sites)
    written(model / "plans", "p.json", ".#.##", model=pipeline.fingerprint, sites=sites)
    argv = ["--model", str(model), "--device", "cpu", "--prompt", "a lake", "--steps", "5", "--quiet", "--json"]
    assert sample.main([*argv, "--policy", "phast", "--reuse", "3", "--out", str(tmp_path / "a.png")]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["plan"], err) == (".#.##", "")
    assert sample.main([*argv, "--policy", "phast", "--reuse", "2", "--out", str(tmp_path / "b.png")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["plan"] == fitted_grid(".#.##", 5, 2)
    assert err.startswith(
        "note: there is no plan for this run (ddim, 5 calls, 2 of them reused); phast uses one searched "
    )
    assert "searched for ddim, 5 calls, 3 of them reused, scaled to this run" in err

"""Every policy's grid, drawn by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minireuse.plan import PlanError, ReusePlan, Site
from minireuse.policies import POLICIES, cfg_interval, interval, select
from minireuse.search.language import build

SITES = tuple(Site(f"block.{name}", kind) for kind in ("map", "out") for name in ("attn1", "attn2"))


@pytest.mark.parametrize(
    ("policy", "calls", "k", "grid"),
    [
        ("hurry", 8, 3, ".....###"),
        ("hurry", 8, None, "....####"),
        ("hurry", 7, None, "....###"),
        ("hurry", 8, 0, "........"),
        ("hurry", 8, 7, ".#######"),
        ("hurry", 1, None, "."),
        ("early", 8, 3, ".###...."),
        ("interval", 8, 4, ".#.#.#.#"),
        ("interval", 9, 6, ".##.##.##"),
        ("interval", 8, 2, "...#...#"),
        ("interval", 8, 7, ".#######"),
        ("interval", 8, 0, "........"),
    ],
)
def test_grids(policy: str, calls: int, k: int | None, grid: str) -> None:
    assert POLICIES[policy](calls, SITES, k=k).grid == grid


def test_none_reuses_nothing() -> None:
    assert POLICIES["none"](8, SITES).grid == "........"


def test_random_is_a_seeded_draw_of_k_calls() -> None:
    grids = {str(POLICIES["random"](10, SITES, k=4, seed=seed)) for seed in range(20)}
    assert len(grids) > 10
    assert all(g.count("#") == 4 and g[0] == "." for g in grids)
    assert POLICIES["random"](10, SITES, k=4, seed=3) == POLICIES["random"](10, SITES, k=4, seed=3)


@pytest.mark.parametrize("k", [-1, 8, 9])
@pytest.mark.parametrize("policy", ["hurry", "phast", "early", "interval", "random"])
def test_impossible_counts_are_refused(policy: str, k: int) -> None:
    with pytest.raises(PlanError, match="expected a whole number from 0 to 7"):
        POLICIES[policy](8, SITES, k=k)


def test_select_by_kind_and_attention() -> None:
    assert select(SITES) == (Site("block.attn1", "map"), Site("block.attn2", "map"))
    assert select(SITES, "cross", "out") == (Site("block.attn2", "out"),)
    assert select(SITES, "self") == (Site("block.attn1", "map"),)
    with pytest.raises(PlanError, match="self, cross or both"):
        select(SITES, "neither")


DEEP = tuple(Site(f"up_blocks.{i}", "deep", depth) for i, depth in enumerate((4, 2, 0)))


def column(plan: ReusePlan, site: Site) -> str:
    return "".join(".#"[int(cell)] for cell in plan.mask[:, plan.sites.index(site)])


@pytest.mark.parametrize(
    ("every", "branch", "grid"),
    [(2, 0, ".#.#.#.#"), (3, 1, ".##.##.#"), (5, 2, ".####.##"), (1, 0, "........"), (8, 0, ".#######")],
)
def test_deepcache_grid(every: int, branch: int, grid: str) -> None:
    plan = POLICIES["deepcache"](8, SITES + DEEP, every=every, branch=branch)
    assert (plan.grid, plan.sites) == (grid, (DEEP[2 - branch],))


def test_tgate_grid() -> None:
    plan = POLICIES["tgate"](16, SITES, gate=12, every=4, warmup=2)
    self_out, cross_out = select(SITES, "self", "out")[0], select(SITES, "cross", "out")[0]
    assert column(plan, self_out) == "...#.###.##....."
    assert column(plan, cross_out) == "............####"
    assert "".join(".#"[g] for g in plan.guided) == "############...."
    # Stored with both guidance halves at the last guided call, read without.
    assert plan.step(11).store == plan.step(12).half == {cross_out}
    assert plan.step(7).half == set()
    assert POLICIES["tgate"](10, SITES).guided == (True,) * 5 + (False,) * 5
    with pytest.raises(PlanError, match="gate is 0"):
        POLICIES["tgate"](10, SITES, gate=0)


def test_pab_grid() -> None:
    plan = POLICIES["pab"](20, SITES, self_every=2, cross_every=6)
    assert column(plan, select(SITES, "self", "out")[0]) == ".....#.#.#.#.#.#.#.."
    assert column(plan, select(SITES, "cross", "out")[0]) == ".....#.#####.#####.."
    with pytest.raises(PlanError, match="cross_every is 0"):
        POLICIES["pab"](20, SITES, cross_every=0)


def test_plans_combine() -> None:
    plan = POLICIES["hurry"](8, select(SITES), k=4) | POLICIES["tgate"](8, SITES, gate=6)
    assert column(plan, select(SITES, "self")[0]) == "....####"
    assert plan.guided == (True,) * 6 + (False,) * 2
    # The maps of call 3 have both guidance halves; unguided calls read the conditional one. Cross attention is skipped.
    read_without = {*select(SITES, "self"), *select(SITES, "cross", "out")}
    assert [set(plan.step(i).half) for i in range(8)] == [set()] * 6 + [read_without] * 2


def test_deep_selects_one_branch_counted_from_the_outside() -> None:
    assert select(SITES + DEEP, kind="deep") == (DEEP[2],)
    assert select(SITES + DEEP, kind="deep", branch=2) == (DEEP[0],)
    with pytest.raises(PlanError, match="branch is 3, expected a whole number from 0 to 2"):
        select(SITES + DEEP, kind="deep", branch=3)


def test_a_term_may_name_its_branch() -> None:
    for branch in range(3):
        plan = build(f"interval:kind=deep,branch={branch}", 6, SITES + DEEP)
        assert plan == build(f"deepcache:branch={branch}", 6, SITES + DEEP)
        assert plan.sites == (DEEP[2 - branch],)
    with pytest.raises(PlanError, match="branch numbers the deep features, but kind is 'map'"):
        build("hurry:branch=1", 6, SITES + DEEP)
    with pytest.raises(PlanError, match=r"tgate has gate, every, warmup, order$"):
        build("tgate:branch=1", 6, SITES + DEEP)
    with pytest.raises(PlanError, match=r"none has order, kind, sites, branch$"):
        build("none:k=1", 6, SITES + DEEP)


def test_every_policy_may_be_of_another_order() -> None:
    for name in POLICIES.keys() - {"phast"}:
        plan, *curves = (build(name + order, 6, SITES + DEEP) for order in ("", ":order=1", ":order=2"))
        assert curves == [replace(plan, order=order) for order in (1, 2)]
    with pytest.raises(PlanError, match="plan order is 3"):
        build("hurry:order=3", 6, SITES)
    with pytest.raises(PlanError, match="no knob 'ordr'; none has order"):
        build("none:ordr=1", 6, SITES)


def test_a_term_may_name_its_own_kind_and_sites() -> None:
    plan = build("hurry:k=2,kind=out,sites=cross|early:k=1", 6, SITES, k=3)
    drawn = {site: column(plan, site) for site in plan.sites}
    assert drawn == {SITES[3]: "....##", SITES[0]: ".#....", SITES[1]: ".#...."}
    with pytest.raises(PlanError, match="sites is 'some', expected self, cross or both"):
        build("hurry:sites=some", 6, SITES)
    with pytest.raises(PlanError, match="is not knob=number"):
        build("deepcache:kind=out", 6, DEEP)


def test_guidance_inside_an_interval() -> None:
    plan = cfg_interval(10, SITES, start=0.2, end=0.8)
    assert "".join(".g"[g] for g in plan.guided) == "..gggggg.."
    assert plan.reused == 0
    assert all(cfg_interval(5, SITES, start=0.0, end=1.0).guided)
    with pytest.raises(PlanError, match="the interval is"):
        cfg_interval(5, SITES, start=0.6, end=0.5)


def test_where_guidance_begins_again_everything_is_computed() -> None:
    """Of two halves the unguided calls know one: the first guided call after them can read nothing of theirs."""
    maps = select(SITES)
    joined = interval(8, maps, k=4) | cfg_interval(8, SITES, start=0.375, end=0.75)
    assert interval(8, maps, k=4).grid == ".#.#.#.#"
    row = "".join(".#"[int(cell)] for cell in joined.mask.any(axis=1))
    assert row == ".#...#.#"  # call 3 is the first guided one
    assert "".join(".g"[g] for g in joined.guided) == "...ggg.."
    assert joined.step(5).reuse == set(maps)
    assert joined.step(7).half == frozenset()  # call 6 computed without guidance, as call 7 reads it

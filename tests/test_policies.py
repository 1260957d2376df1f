"""Every policy's grid, drawn by hand."""

from __future__ import annotations

import pytest

from minireuse.policies import POLICIES, select
from minireuse.reuse import PlanError, Site

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


def test_phast_without_a_searched_plan_is_hurry_and_says_so() -> None:
    with pytest.warns(UserWarning, match="hurry"):
        assert POLICIES["phast"](8, SITES, k=3).grid == ".....###"


@pytest.mark.parametrize("k", [-1, 8, 9])
@pytest.mark.parametrize("policy", ["hurry", "early", "interval", "random"])
def test_impossible_counts_are_refused(policy: str, k: int) -> None:
    with pytest.raises(PlanError, match="expected 0 to 7"):
        POLICIES[policy](8, SITES, k=k)


def test_select_by_kind_and_attention() -> None:
    assert select(SITES) == (Site("block.attn1", "map"), Site("block.attn2", "map"))
    assert select(SITES, "cross", "out") == (Site("block.attn2", "out"),)
    assert select(SITES, "self") == (Site("block.attn1", "map"),)
    with pytest.raises(PlanError, match="self, cross or both"):
        select(SITES, "neither")


def test_deep_selects_one_branch_counted_from_the_outside() -> None:
    deep = tuple(Site(f"up_blocks.{i}", "deep", depth) for i, depth in enumerate((4, 2, 0)))
    assert select(SITES + deep, kind="deep") == (deep[2],)
    assert select(SITES + deep, kind="deep", branch=2) == (deep[0],)
    with pytest.raises(PlanError, match="branch is 3, expected 0 to 2"):
        select(SITES + deep, kind="deep", branch=3)

"""Depth plans: how they are written down, and the ladder's search, against every plan there is in a small world."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from minireuse.plan import PREDICTION, PlanError, ReusePlan, Site
from minireuse.search.depth import Ladder, depth_plan, entry_sites, even_entries
from minireuse.search.phast import BudgetSpent, Rounds

OUTER, INNER = Site("up_blocks.1", "deep", 0), Site("up_blocks.0", "deep", 3)
SITES = (PREDICTION, OUTER, Site("a.attn1", "map"), INNER)
SHARES = {0: 1.0, 1: 0.7, 2: 0.3, 3: 0.0}  # of a whole call's time, by depth


def test_entries_go_from_the_one_that_computes_most_to_none() -> None:
    assert entry_sites(SITES) == (INNER, OUTER, PREDICTION)


def test_each_call_of_a_depth_plan_begins_at_one_entry() -> None:
    plan = depth_plan((0, 2, 0, 1, 3), entry_sites(SITES), order=1)
    rows = {site: "".join(".#"[int(cell)] for cell in plan.mask[:, i]) for i, site in enumerate(plan.sites)}
    assert rows == {INNER: "...#.", OUTER: ".#...", PREDICTION: "....#"}
    assert plan.order == 1
    # The call at the inner feature computes the outer one anew, and the prediction with it.
    assert plan.step(3).store == {PREDICTION}
    assert plan.step(4).reuse == {PREDICTION}


def test_even_entries_leave_whole_calls_as_far_apart_as_they_can_be() -> None:
    assert even_entries(6, 2, 3) == (0, 2, 0, 2, 0, 2)
    assert even_entries(6, 1, 4) == (0, 1, 1, 0, 1, 1)
    assert even_entries(3, 1, 0) == (0, 0, 0)


def entries_of(plan: ReusePlan) -> tuple[int, ...]:
    return tuple(int(np.argmax(row)) + 1 if row.any() else 0 for row in plan.mask)


def share_of(plan: ReusePlan) -> float:
    return sum(SHARES[d] for d in entries_of(plan)) / plan.calls


class World:
    """Scores plans by a table of errors, one a call and depth, and more where deep calls follow each other."""

    def __init__(self, calls: int, seed: int, following: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        self.calls, self.following = calls, following
        self.error = np.cumsum(rng.exponential(1.0, (calls, 4)), axis=1)
        self.error[:, 0] = 0
        self.asked: list[Sequence[int] | None] = []

    def score(self, depths: tuple[int, ...]) -> float:
        error = sum(self.error[call, depth] for call, depth in enumerate(depths))
        error += self.following * sum(a * b for a, b in itertools.pairwise(depths))
        return 100.0 if error == 0 else -10 * math.log10(error / 255**2)

    def __call__(self, plans: Sequence[ReusePlan], prompts: Sequence[int] | None) -> Iterator[float]:
        for plan in plans:
            self.asked.append(prompts)
            yield self.score(entries_of(plan))

    def best(self, budget: float) -> float:
        able = itertools.product(range(4), repeat=self.calls - 1)
        return max(self.score((0, *rest)) for rest in able if sum(SHARES[d] for d in (0, *rest)) <= budget * self.calls)


def ladder(world: World, how: Rounds) -> Ladder:
    return Ladder(world, world.calls, entry_sites(SITES), share_of, how=how)


@pytest.mark.parametrize("seed", range(6))
def test_where_errors_add_up_the_ladder_comes_close_to_the_best_of_all_plans(seed: int) -> None:
    world = World(6, seed)
    found = dict(ladder(world, Rounds(finalists=12)).search([0.9, 0.7, 0.5, 0.3]))
    assert list(found) == [0.9, 0.7, 0.5, 0.3]
    for budget, result in found.items():
        assert share_of(result.plan) <= budget
        assert result.score == world.score(entries_of(result.plan)) <= world.best(budget) + 1e-9
        assert result.score > world.best(budget) - 0.7, "within 0.7 dB of an exhaustive search"
        assert result.finished and result.score >= result.start_score


@pytest.mark.parametrize("seed", range(4))
def test_no_rung_is_worse_than_the_best_even_plan(seed: int) -> None:
    world = World(8, seed, following=0.5)
    search = ladder(world, Rounds())
    for budget, result in search.search([0.8, 0.6, 0.4]):
        fitting = (even_entries(8, depth, k) for depth in (1, 2, 3) for k in range(8))
        even = [plan for plan in fitting if sum(SHARES[d] for d in plan) / 8 <= budget]
        first = {depth: next(p for p in even if depth in p) for depth in (1, 2, 3) if any(depth in p for p in even)}
        assert result.score >= max(map(world.score, first.values()))
        assert search.best_even(budget) in first.values()


def test_changes_are_proposed_on_some_prompts_and_decided_on_all() -> None:
    world = World(6, 0)
    dict(ladder(world, Rounds(heat=(0, 1), finalists=4)).search([0.5]))
    on_all = world.asked.count(None)
    assert set(world.asked) == {None, (0, 1)}
    assert on_all < len(world.asked) / 4


def test_a_latency_out_of_reach_is_refused() -> None:
    with pytest.raises(PlanError, match=r"no plan over these sites is as fast as 0\.1 .* the fastest takes 0\.167"):
        dict(ladder(World(6, 0), Rounds()).search([0.5, 0.1]))


def test_a_spent_budget_keeps_what_was_found() -> None:
    world = World(6, 0)

    def few(limit: int):
        def score(plans: Sequence[ReusePlan], prompts: Sequence[int] | None) -> Iterator[float]:
            for plan in plans:
                if len(world.asked) >= limit:
                    return
                yield from world([plan], prompts)

        return Ladder(score, world.calls, entry_sites(SITES), share_of, how=Rounds())

    with pytest.raises(BudgetSpent, match="ended after 2 of 15 plans"):
        dict(few(3).search([0.5]))
    list(ladder(world, Rounds()).search([0.5]))
    whole = len(world.asked)
    world.asked.clear()
    ((_, cut),) = few(whole - 5).search([0.5])
    assert not cut.finished
    assert share_of(cut.plan) <= 0.5

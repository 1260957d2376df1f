"""Layer-wise plans on made-up damages and costs, and the costs of a plan from those of its calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

import minireuse
from minireuse.plan import PlanError, ReusePlan, Site
from minireuse.policies import hurry, interval, select
from minireuse.search import ScoreMany
from minireuse.search.budget import (
    alike_in,
    cheapest_first,
    greedy,
    groups_of,
    layerwise,
    sensitivity,
    starts,
    step_wise,
)
from minireuse.search.costs import Costs, measure
from minireuse.search.phast import BudgetSpent

A, B = Site("down_blocks.0.attn1", "map"), Site("down_blocks.0.attn2", "map")
DEEP = Site("up_blocks.1", "deep", depth=0)
COSTS = Costs(plain=10.0, groups=((A,), (B,)), store=(1.0, 0.0), reuse=(-2.0, -3.0))


def scored(score: Callable[[ReusePlan], float], budget: int | None = None) -> ScoreMany:
    """What the search asks for scores; `budget` is how many it gives."""
    left = itertools.count() if budget is None else iter(range(budget))

    def score_many(plans: Sequence[ReusePlan], prompts: Sequence[int] | None) -> Iterator[float]:
        for plan in plans:
            if next(left, None) is None:
                return
            yield score(plan)

    return score_many


def test_latency_of_a_plan_counts_stores_and_reuses() -> None:
    assert COSTS.latency(ReusePlan.nothing(4)) == 1
    assert COSTS.latency(hurry(4, [A], k=3)) == pytest.approx((40 + 1 - 3 * 2) / 40)
    assert COSTS.latency(interval(4, [A], k=2)) == pytest.approx((40 + 2 * 1 - 2 * 2) / 40)
    assert COSTS.latency(hurry(4, [A, B], k=2)) == pytest.approx((40 + 1 - 2 * 2 - 2 * 3) / 40)


def test_what_a_deep_site_skips_costs_nothing() -> None:
    inner = Site("down_blocks.1.attn1", "map", depth=2)
    costs = Costs(10.0, ((inner,), (DEEP,)), store=(1.0, 0.5), reuse=(-2.0, -8.0))
    both = hurry(4, [DEEP], k=2) | hurry(4, [inner], k=2)
    assert costs.latency(both) == costs.latency(hurry(4, [DEEP], k=2)) == pytest.approx((40 + 0.5 - 16) / 40)


def test_of_a_group_that_is_skipped_in_part_the_rest_counts() -> None:
    outer, inner = (Site(f"down_blocks.{i}.attn1", "map", depth=2 * i) for i in range(2))
    middle = Site("up_blocks.1", "deep", depth=1)
    costs = Costs(10.0, ((outer, inner), (middle,)), store=(1.0, 0.5), reuse=(-2.0, -4.0))
    plan = hurry(4, [outer, inner], k=2) | hurry(4, [middle], k=1)
    assert costs.latency(plan) == pytest.approx((40 + 1 - 2 - 2 / 2 + 0.5 - 4) / 40)


def test_costs_survive_json() -> None:
    assert Costs.from_json(COSTS.to_json(), [A, B]) == COSTS
    with pytest.raises(ValueError, match="do not fit this model"):
        Costs.from_json(COSTS.to_json(), [A])


def test_costs_are_measured_by_group(pipeline: minireuse.Pipeline) -> None:
    groups = [select(pipeline.sites), select(pipeline.sites, kind="deep")]
    costs = measure(pipeline, groups, rounds=2)
    assert costs.plain > 0
    assert costs.groups == tuple(map(tuple, groups))
    assert len(costs.store) == len(costs.reuse) == 2


def test_groups_by_kind_attention_and_resolution(pipeline: minireuse.Pipeline) -> None:
    groups = groups_of(pipeline.sites, levels=3)
    assert sorted(itertools.chain(*groups.values())) == sorted(pipeline.sites)
    maps = {name: {s.address.split(".attentions")[0] for s in group} for name, group in groups.items() if "map" in name}
    assert maps == {
        f"map of {which} attention at resolution {level}": {f"down_blocks.{level}", f"up_blocks.{2 - level}"}
        for which in ("self", "cross")
        for level in (0, 1)
    } | {f"map of {which} attention at resolution 2": {"mid_block"} for which in ("self", "cross")}
    assert all(len(group) == 1 for name, group in groups.items() if "deep" in name)


DAMAGE, SAVED, BYTES = (dict(zip("abcd", row, strict=True)) for row in ([1, 6, 2, 0], [1, 2, 4, 0], [5, 2, 4, 1]))


def price(chosen: Sequence[str], option: str) -> float:
    """Damage for the time saved: 1 of a, 3 of b, 0.5 of c; d saves none."""
    return DAMAGE[option] / SAVED[option] if SAVED[option] else math.inf


@pytest.mark.parametrize(("budget", "expected"), [(11, "cab"), (10, "ca"), (8, "cb"), (5, "c"), (3, "b"), (1, "")])
def test_the_cheapest_come_first_as_long_as_they_fit(budget: int, expected: str) -> None:
    fits = lambda chosen, option: sum(BYTES[name] for name in (*chosen, option)) <= budget  # noqa: E731
    assert "".join(cheapest_first(["a", "b", "c", "d"], price, allowed=fits)) == expected


@pytest.mark.parametrize(("least", "expected"), [(0, ""), (4, "c"), (5, "ca"), (9, "cab")])
def test_choosing_ends_when_it_is_enough(least: int, expected: str) -> None:
    enough = lambda chosen: sum(SAVED[name] for name in chosen) >= least  # noqa: E731
    assert "".join(cheapest_first(["abcd"], price, enough=enough)) == expected  # 9 cannot be reached


def test_a_choice_changes_the_prices_of_its_own_group() -> None:
    """The price of b is 3, and 0.5 beside a."""

    def together(chosen: Sequence[str], option: str) -> float:
        return {"a": 1.0, "b": 3.0, "c": 2.0}[option] - 2.5 * ("a" in chosen and option == "b")

    assert "".join(cheapest_first(["ab", "c"], together)) == "abc"
    assert "".join(cheapest_first(["a", "b", "c"], together)) == "acb"  # nothing says that a touches b


def test_greedy_takes_the_least_damage_for_the_time_saved() -> None:
    damage = np.array([[np.inf, np.inf], [9.0, 30.0], [1.0, 30.0], [2.0, 2.0]])
    latency = lambda state: 1 - 0.1 * state[:, 0].sum() - 0.2 * state[:, 1].sum()  # noqa: E731
    drawn = ["".join(".#"[int(c)] for c in row) for row in greedy(damage, latency, 0.75).T]
    assert drawn == ["..#.", "...#"]  # first (3, B) at 10 a unit, then (2, A) at 10; 0.7 <= 0.75
    with pytest.raises(PlanError, match=r"the fastest takes 0\.100"):
        greedy(damage, latency, 0.05)


def test_greedy_sees_that_reuse_pays_only_in_a_row() -> None:
    """Each run of reuse stores once, which costs as much as one reuse saves."""

    def latency(state: np.ndarray) -> float:
        row = state[:, 0]
        runs = (row[1:] & ~row[:-1]).sum()
        return float(1 - 0.1 * row.sum() + 0.1 * runs)

    damage = np.array([np.inf, 1, 9, 1, 9, 1, 2])[:, None]
    assert "".join(".#"[int(c)] for c in greedy(damage, latency, 0.9)[:, 0]) == ".....##"


def test_layerwise_finds_the_best_plan_of_an_additive_world() -> None:
    damage = np.random.default_rng(0).uniform(1, 20, (5, 2))

    def score(plan: ReusePlan) -> float:
        state = np.stack([plan.mask[:, plan.sites.index(s)] for s in (A, B)], axis=1)
        return -10 * np.log10(((damage * state).sum() + 1e-9) / 255**2)

    result = layerwise(scored(score), 5, [[A], [B]], latency=COSTS.latency, budget=0.85)
    assert COSTS.latency(result.plan) <= 0.85
    lines = layerwise(scored(score), 5, [[A], [B]], latency=COSTS.latency, budget=0.85, order=1)
    assert (lines.plan.order, COSTS.latency(lines.plan) <= 0.85) == (1, True)
    assert result.finished
    assert result.score >= result.start_score
    swaps = []
    best = np.stack([result.plan.mask[:, result.plan.sites.index(s)] for s in (A, B)], axis=1)
    for g, a, b in itertools.product(range(2), range(1, 5), range(1, 5)):
        if best[a, g] and not best[b, g]:
            other = best.copy()
            other[a, g], other[b, g] = False, True
            plan = ReusePlan(other, (A, B))
            if COSTS.latency(plan) <= 0.85:
                swaps.append(score(plan))
    assert max(swaps, default=-np.inf) <= result.score


def test_step_wise_chooses_k_and_places_within_a_latency() -> None:
    """Of all plans that fit, by exhaustion: here the best stores twice, which three reuse calls pay for."""
    value = np.array([0, 9, 1, 1, 9, 9])
    score = lambda plan: -float(plan.mask[:, 0] @ (10 - value))  # noqa: E731
    costs = Costs(10.0, ((A,),), store=(1.0,), reuse=(-4.0,))
    result = step_wise(scored(score), 6, [A], latency=costs.latency, budget=0.85)
    rows = [row for row in itertools.product((False, True), repeat=6) if not row[0]]
    plans = [ReusePlan.stepwise(row, [A]) for row in rows]
    assert result.score == max(score(plan) for plan in plans if costs.latency(plan) <= 0.85)
    lines = step_wise(scored(score), 6, [A], latency=costs.latency, budget=0.85, order=1)
    assert (lines.plan.order, lines.score) == (1, result.score)
    with pytest.raises(PlanError, match=r"the fastest takes 0\.683"):
        step_wise(scored(score), 6, [A], latency=costs.latency, budget=0.5)


def test_starts_are_those_that_fit_with_the_fewest_reuse_calls() -> None:
    """Reuse saves 4 of 10 and storing costs 1, so that the even plan of three calls stores too often for 0.84."""
    costs = Costs(10.0, ((A,),), store=(1.0,), reuse=(-4.0,))
    found = starts(6, [A], latency=costs.latency, budget=0.85, order=1)
    assert {plan.order for plans in found for plan in plans.values()} == {1}
    assert [{name: plan.grid for name, plan in plans.items()} for plans in found] == [
        {"hurry": "...###", "interval": ".#.#.#"},
        {"hurry": "..####", "interval": ".##.##"},
        {"hurry": ".#####", "interval": ".#####"},
    ]
    first, *_ = starts(6, [A], latency=costs.latency, budget=0.84)
    assert {name: plan.grid for name, plan in first.items()} == {"hurry": "...###"}
    assert starts(6, [A], latency=costs.latency, budget=0.5) == []
    many = starts(12, [A], latency=costs.latency, budget=0.9)
    assert [plans["hurry"].reused for plans in many] == [4, 5, 6]  # no more than three numbers


def test_step_wise_begins_at_the_even_plan_where_that_is_better() -> None:
    costs = Costs(10.0, ((A,),), store=(0.0,), reuse=(-4.0,))
    scores = {"...###": 1.0, ".#.#.#": 5.0}
    score = lambda plan: scores.get(plan.grid, 0.0)  # noqa: E731
    result = step_wise(scored(score), 6, [A], latency=costs.latency, budget=0.8)
    assert (str(result.plan), result.start_score) == (".#.#.#", 5.0)


def test_layerwise_is_never_worse_than_the_plans_it_may_begin_at() -> None:
    """Two groups that ruin the image together although each alone is harmless: greedy takes both."""

    def score(plan: ReusePlan) -> float:
        first, second = (plan.mask[:, plan.sites.index(s)] if s in plan.sites else np.zeros(5, bool) for s in (A, B))
        return 60.0 - first.sum() - 4 * second.sum() - 40 * (first.any() and second.any())

    budget = {"latency": COSTS.latency, "budget": 0.77}
    alone = layerwise(scored(score), 5, [[A], [B]], **budget)
    even = interval(5, [B], k=4)
    better = layerwise(scored(score), 5, [[A], [B]], others=[even], **budget)
    assert COSTS.latency(even) <= 0.77
    assert alone.score < 20
    assert (better.score, better.start_score) == (score(even), score(even)) == (44.0, 44.0)
    assert better.plan.on([A, B]) == even.on([A, B])


def test_layerwise_begins_elsewhere_where_greedy_gets_stuck() -> None:
    """Storing is so dear that no three reuse calls pay for it, as five do."""
    costs = Costs(10.0, ((A,),), store=(7.0,), reuse=(-2.0,))
    within, nothing = {"latency": costs.latency, "budget": 0.96}, scored(lambda plan: 0.0)
    with pytest.raises(PlanError, match=r"no plan found is as fast as 0\.96"):
        layerwise(nothing, 6, [[A]], **within)
    result = layerwise(nothing, 6, [[A]], others=[hurry(6, [A], k=5)], **within)
    assert result.plan == hurry(6, [A], k=5)


def test_a_step_wise_plan_takes_all_of_attention_and_one_deep_site() -> None:
    inner = Site("up_blocks.2", "deep", depth=3)
    assert alike_in([[DEEP], [A], [inner], [B]]) == {"map": (A, B), "deep": (DEEP,)}


def test_sensitivities_are_the_squared_errors_of_single_reuses() -> None:
    """A PSNR of 20 dB is a squared error of 255^2 / 100, and 10 dB more are a tenth of that."""
    score = {".#../....": 20.0, "..#./....": 30.0, "...#/....": 40.0, "..../.#..": 20.0, "..../..#.": 10.0}

    def drawn(plan: ReusePlan) -> str:
        return "/".join("".join(".#"[int(cell)] for cell in plan.mask[:, plan.sites.index(site)]) for site in (A, B))

    damage = sensitivity(scored(lambda plan: score.get(drawn(plan), 50.0)), 4, [[A], [B]])
    assert np.isinf(damage[0]).all()
    np.testing.assert_allclose(damage[1:] / 255**2, [[0.01, 0.01], [0.001, 0.1], [0.0001, 0.00001]])


def test_sensitivities_need_the_whole_budget() -> None:
    with pytest.raises(BudgetSpent, match="ended after 3 of 4"):
        sensitivity(scored(lambda plan: 20.0, budget=3), 5, [[A]])


def test_step_wise_gives_what_it_has_when_the_budget_ends_between_two_searches() -> None:
    costs = Costs(10.0, ((A,),), store=(1.0,), reuse=(-4.0,))
    within = {"latency": costs.latency, "budget": 0.85}
    count = itertools.count()
    value = lambda plan: float(next(count) == 0)  # the first start is the best of all  # noqa: E731
    whole = step_wise(scored(lambda plan: 0.0), 6, [A], **within)
    assert whole.finished
    # Two starts with three reuse calls, then the 4 moves of the first that are fast enough; nothing is left for more.
    cut = step_wise(scored(value, budget=6), 6, [A], **within)
    assert (str(cut.plan), cut.score, cut.finished) == ("...###", 1.0, False)
    with pytest.raises(BudgetSpent, match="ends before the starting plan is scored"):
        step_wise(scored(value, budget=0), 6, [A], **within)

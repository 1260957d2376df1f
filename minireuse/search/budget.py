"""The best plan within a latency: step-wise with any number of reuse calls, or with layers that differ.

Layer-wise plans are left open by the paper; here maps, outputs and deep features stand side by side. Sites go in
groups. What a single reuse of a group in one call does to the image is measured once for every call; then reuse is
added where it does least damage for the time it saves; then swaps refine what came out.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np

from minireuse.plan import KINDS, PlanError, ReusePlan, Site
from minireuse.policies import hurry, interval
from minireuse.search.phast import METHOD, BudgetSpent, Rounds, ScoreMany, SearchResult, grouped, improve

COUNTS = 3  # numbers of reuse calls that are searched for a latency
LONGEST = 3  # calls in a row that are added together: reuse may only pay once several share what one of them stored


def step_wise(
    score_many: ScoreMany,
    calls: int,
    sites: Iterable[Site],
    *,
    latency: Callable[[ReusePlan], float],
    budget: float,
    order: int = 0,
    how: Rounds = METHOD,
) -> SearchResult:
    """The best step-wise plan of at most `budget` latency, for the smallest number of reuse calls that can meet it and
    a few more: storing costs time, so a plan that reuses more may store more often. Each search begins at the better of
    HURRY and the even plan.

    latency: of a plan, as a fraction of the full sampler's. order: of the plans. The rest is as in `improve`.
    Raises: PlanError where even reusing in every call but the first is too slow; BudgetSpent where no start was scored.
    """
    sites = tuple(sites)
    fitting = starts(calls, sites, latency=latency, budget=budget, order=order)
    if not fitting:
        fastest = min(latency(replace(hurry(calls, sites, k=k), order=order)) for k in range(calls))
        raise PlanError(
            f"no plan over these sites is as fast as {budget} of the full sampler's time; "
            f"the fastest takes {fastest:.3f}"
        )
    allowed = lambda plan: latency(plan) <= budget  # noqa: E731
    results: list[SearchResult] = []
    for plans in fitting:
        plan, *others = plans.values()
        try:
            result = improve(score_many, plan, sites, k=plan.reused, others=others, allowed=allowed, how=how)
        except BudgetSpent:
            if not results:
                raise
            break
        results.append(result)
        if not result.finished:
            break
    finished = len(results) == len(fitting) and results[-1].finished
    return replace(max(results, key=lambda result: result.score), finished=finished)


def starts(
    calls: int, sites: Iterable[Site], *, latency: Callable[[ReusePlan], float], budget: float, order: int = 0
) -> list[dict[str, ReusePlan]]:
    """The plans to begin at, by name: HURRY and the even plan where they meet the budget, for the smallest numbers of
    reuse calls with which HURRY does. Of all plans with as many it stores least."""
    sites, found = tuple(sites), []
    for k in range(calls):
        plans = {policy.__name__: replace(policy(calls, sites, k=k), order=order) for policy in (hurry, interval)}
        fitting = {name: plan for name, plan in plans.items() if latency(plan) <= budget}
        if "hurry" in fitting:
            found.append(fitting)
    return found[:COUNTS]


def groups_of(sites: Iterable[Site], levels: int) -> dict[str, tuple[Site, ...]]:
    """Attention sites by kind, self or cross, and resolution; other sites each for itself.

    levels: of the U-Net; resolution 0 is the latents' own, each further one half of it.
    """
    groups: dict[str, tuple[Site, ...]] = {}
    for site in sites:
        name = site.address
        if site.kind in ("map", "out"):
            name = f"{'cross' if site.is_cross else 'self'} attention at resolution {_level(site.address, levels)}"
        key = f"{site.kind} of {name}"
        groups[key] = (*groups.get(key, ()), site)
    return groups


def alike_in(groups: Sequence[Sequence[Site]]) -> dict[str, Sequence[Site]]:
    """The sites of a step-wise plan, by kind: of attention all, of deep features one group, the first.

    groups: what saves most comes first.
    """
    by_kind = {kind: [group for group in groups if group[0].kind == kind] for kind in KINDS}
    some = {kind: found[:1] if kind == "deep" else found for kind, found in by_kind.items() if found}
    return {kind: tuple(itertools.chain(*found)) for kind, found in some.items()}


def _level(address: str, levels: int) -> int:
    part, number = address.split(".")[:2]
    return int(number) if part == "down_blocks" else levels - 1 - int(number) if part == "up_blocks" else levels - 1


def layerwise(
    score_many: ScoreMany,
    calls: int,
    groups: Sequence[Sequence[Site]],
    *,
    latency: Callable[[ReusePlan], float],
    budget: float,
    order: int = 0,
    others: Sequence[ReusePlan] = (),
    how: Rounds = METHOD,
) -> SearchResult:
    """A plan of at most `budget` latency: sensitivities, then greedily by damage per time saved, then swaps.

    score_many: mean PSNR in dB, of which the damage (mean squared error) is computed. latency: of a plan, as a fraction
    of the full sampler's. order: of the plan. others: plans within the budget to begin at where one of them is better
    than the greedy one, which adds up damages as if they did not touch each other. The rest is as in `improve`.

    Raises: BudgetSpent where the search budget ends before the sensitivities are known; PlanError where no plan is
    fast enough.
    """
    made = lambda state: grouped(state, groups, order=order)  # noqa: E731
    damage = sensitivity(score_many, calls, groups, order)
    plans = list(others)
    try:
        plans.insert(0, made(greedy(damage, lambda state: latency(made(state)), budget)))
    except PlanError:
        if not plans:
            raise
    return improve(
        score_many,
        plans[0],
        tuple(itertools.chain(*groups)),
        k=None,
        others=plans[1:],
        groups=groups,
        allowed=lambda plan: latency(plan) <= budget,
        how=how,
    )


def error_of(psnr: float) -> float:
    """The mean squared error, of pixels from 0 to 255, that a PSNR in dB stands for."""
    return float(255**2 * 10 ** (-psnr / 10))


def sensitivity(score_many: ScoreMany, calls: int, groups: Sequence[Sequence[Site]], order: int = 0) -> np.ndarray:
    """Squared error (pixels 0 to 255) of one group reusing in one call, computed from the mean PSNR over prompts.

    Shapes: -> (calls, groups), infinite in call 0. Raises: BudgetSpent where the search budget ends before.
    """
    cells = [(call, g) for g in range(len(groups)) for call in range(1, calls)]
    plans = []
    for cell in cells:
        state = np.zeros((calls, len(groups)), dtype=bool)
        state[cell] = True
        plans.append(grouped(state, groups, order=order))
    values = list(score_many(plans, None))
    if len(values) < len(plans):
        raise BudgetSpent(
            f"the search budget ended after {len(values)} of {len(plans)} sensitivities; give a larger one"
        )
    damage = np.full((calls, len(groups)), np.inf)
    for cell, value in zip(cells, values, strict=True):
        damage[cell] = error_of(value)
    return damage


Option = TypeVar("Option")


def cheapest_first(
    groups: Sequence[Sequence[Option]],
    price: Callable[[tuple[Option, ...], Option], float],
    *,
    allowed: Callable[[tuple[Option, ...], Option], bool] = lambda chosen, option: True,
    enough: Callable[[tuple[Option, ...]], bool] = lambda chosen: False,
) -> tuple[Option, ...]:
    """What reuses within a budget: options are chosen by their damage for the time they save, the cheapest first.

    groups: the options. Within a group they touch each other, so that one that is chosen changes the others' prices.
    price: of an option beside those that are chosen already; infinite for one that saves no time, which never is.
    allowed: whether an option may join those chosen. One that may not when its turn comes is left out.
    enough: whether those chosen will do. Without it all options get their turn.

    Prices of other groups are looked at again only when their turn comes: most changes leave most prices as they are.
    """
    numbers = itertools.count()  # of equal prices the first option counts
    chosen: tuple[Option, ...] = ()
    queue = [(price(chosen, option), next(numbers), g, option) for g, group in enumerate(groups) for option in group]
    heapq.heapify(queue)
    while queue and not enough(chosen) and queue[0][0] < np.inf:
        promised, number, own, option = heapq.heappop(queue)
        if not allowed(chosen, option):
            continue
        value = price(chosen, option)
        if value > promised:
            heapq.heappush(queue, (value, number, own, option))
            continue
        chosen = (*chosen, option)
        touched = [(n, other) for _, n, g, other in queue if g == own and allowed(chosen, other)]
        queue = [entry for entry in queue if entry[2] != own]
        queue += [(price(chosen, other), n, own, other) for n, other in touched]
        heapq.heapify(queue)
    return chosen


class Run(NamedTuple):
    """Calls in a row in which a group reuses."""

    group: int
    first: int
    length: int


def greedy(damage: np.ndarray, latency: Callable[[np.ndarray], float], budget: float) -> np.ndarray:
    """Reuse where it does least damage for the time it saves, until a plan fits the budget.

    Up to `LONGEST` calls in a row are added at once, since a tensor that is stored already is cheap to reuse again.
    Shapes: damage (calls, groups) -> (calls, groups) bool. Raises: PlanError where no plan fits.
    """
    calls, groups = damage.shape
    runs = [
        [Run(g, first, n) for first in range(1, calls) for n in range(1, min(LONGEST, calls - first) + 1)]
        for g in range(groups)
    ]

    def state_of(chosen: Sequence[Run]) -> np.ndarray:
        state = np.zeros((calls, groups), dtype=bool)
        for g, first, length in chosen:
            state[first : first + length, g] = True
        return state

    @cache
    def time(chosen: tuple[Run, ...]) -> float:
        return latency(state_of(chosen))

    def price(chosen: tuple[Run, ...], run: Run) -> float:
        saved = time(chosen) - time((*chosen, run))
        added = state_of((*chosen, run)) & ~state_of(chosen)
        return float(damage[added].sum() / saved) if saved > 1e-6 else np.inf

    def allowed(chosen: tuple[Run, ...], run: Run) -> bool:
        return not (state_of(chosen) & state_of([run])).any()

    chosen = cheapest_first(runs, price, allowed=allowed, enough=lambda chosen: time(chosen) <= budget)
    if time(chosen) > budget:
        fastest = f"the fastest takes {time(chosen):.3f}"
        raise PlanError(f"no plan found is as fast as {budget} of the full sampler's time; {fastest}")
    return state_of(chosen)

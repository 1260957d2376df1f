"""The best plan within a latency: step-wise with any number of reuse calls, or with layers that differ.

Layer-wise plans are left open by the paper; here maps, outputs and deep features stand side by side. Sites go in
groups. What a single reuse of a group in one call does to the image is measured once for every call; then reuse is
added where it does least damage for the time it saves; then swaps refine what came out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from minireuse.plan import KINDS, PlanError, ReusePlan, Site
from minireuse.policies import hurry, interval
from minireuse.search.phast import BudgetSpent, ScoreMany, SearchResult, grouped, improve

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
    steepest: bool = True,
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
            f"no plan over these sites takes {budget} of the full sampler's time; the fastest {fastest:.3f}"
        )
    allowed = lambda plan: latency(plan) <= budget  # noqa: E731
    results: list[SearchResult] = []
    for plans in fitting:
        plan, *others = plans.values()
        try:
            result = improve(score_many, plan, sites, k=plan.reused, others=others, allowed=allowed, steepest=steepest)
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
    """Attention sites by kind, self or cross, and resolution; deep sites each for itself.

    levels: of the U-Net; resolution 0 is the latents' own, each further one half of it.
    """
    groups: dict[str, tuple[Site, ...]] = {}
    for site in sites:
        name = site.address
        if site.kind != "deep":
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
    return {kind: tuple(chain(*found)) for kind, found in some.items()}


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
    steepest: bool = False,
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
        tuple(chain(*groups)),
        k=None,
        others=plans[1:],
        groups=groups,
        allowed=lambda plan: latency(plan) <= budget,
        steepest=steepest,
    )


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
        damage[cell] = 255**2 * 10 ** (-value / 10)
    return damage


def greedy(damage: np.ndarray, latency: Callable[[np.ndarray], float], budget: float) -> np.ndarray:
    """Reuse where it does least damage for the time it saves, until a plan fits the budget.

    Up to `LONGEST` calls in a row are added at once. Values are brought up to date when their turn comes, and those of
    a group when it has changed, since a tensor that is stored already is cheap to reuse again.
    Shapes: damage (calls, groups) -> (calls, groups) bool. Raises: PlanError where no plan fits.
    """
    calls, groups = damage.shape
    state = np.zeros((calls, groups), dtype=bool)
    now = latency(state)
    queue: list[tuple[float, int, int, int]] = []

    def price(g: int, first: int, length: int) -> float:
        added = state.copy()
        added[first : first + length, g] = True
        saved = now - latency(added)
        return damage[added & ~state].sum() / saved if saved > 1e-6 else np.inf

    def refresh(g: int) -> None:
        runs = [(i, n) for i in range(1, calls) for n in range(1, min(LONGEST, calls - i) + 1)]
        free = [(i, n) for i, n in runs if not state[i : i + n, g].any()]
        queue[:] = [entry for entry in queue if entry[1] != g] + [(price(g, i, n), g, i, n) for i, n in free]
        heapq.heapify(queue)

    for g in range(groups):
        refresh(g)
    while now > budget:
        if not queue or queue[0][0] == np.inf:
            raise PlanError(f"no plan found takes {budget} of the full sampler's time; the fastest {now:.3f}")
        promised, g, first, length = heapq.heappop(queue)
        value = price(g, first, length)
        if value > promised:
            heapq.heappush(queue, (value, g, first, length))
            continue
        state[first : first + length, g] = True
        now = latency(state)
        refresh(g)
    return state

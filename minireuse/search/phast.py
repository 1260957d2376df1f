"""PHAST: a local search for a better plan, around HURRY, with the number of reuse calls unchanged.

The search knows no model, no sampler and no clock. It asks one callable, `score_many(plans, prompts)`, how good plans
are; `minireuse.search.Scoring` is the one that renders them.

Source: arXiv 2401.01008 algorithm 1; the order of the moves, the heats and the budget are this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from minireuse.plan import PlanError, ReusePlan, Site

# The score of each plan, larger is better, in order and one by one: who needs no more of them stops asking. It may end
# early, when a budget is spent. The second argument says which of the calibration prompts count; None is all of them.
ScoreMany = Callable[[Sequence[ReusePlan], Sequence[int] | None], Iterator[float]]


class BudgetSpent(PlanError):
    """The budget of a search ended before it had anything to show."""


@dataclass(frozen=True)
class Rounds:
    """How a round of the search goes over the moves; by default as in the paper's algorithm 1.

    first: take the first move that improves, not the best of all. epsilon: what a move has to gain at least; the paper
    has such a threshold and does not tell it.
    heat: the numbers of a few prompts on which all moves are scored first; the best `finalists` of them are then scored
    on all prompts. None scores every move on all prompts.
    """

    first: bool = False
    epsilon: float = 0.0
    heat: tuple[int, ...] | None = None
    finalists: int = 8


METHOD = Rounds()  # the paper's


@dataclass(frozen=True)
class SearchResult:
    """The best plan found, its score, the start's score, and every plan that was tried on all prompts, in order."""

    plan: ReusePlan
    score: float
    start_score: float
    rounds: int
    finished: bool  # False where the budget ended the search before a local optimum was reached
    tried: tuple[tuple[str, float], ...] = field(repr=False)


def improve(
    score_many: ScoreMany,
    plan: ReusePlan,
    sites: Iterable[Site],
    *,
    k: int | None,
    others: Sequence[ReusePlan] = (),
    groups: Sequence[Sequence[Site]] | None = None,
    allowed: Callable[[ReusePlan], bool] = lambda plan: True,
    how: Rounds = METHOD,
) -> SearchResult:
    """Improve a plan by moving one reuse call at a time, until a round improves the score no more.

    plan: where to start, with k reuse calls; HURRY is the method's choice. Plans that are tried have its order.
    sites: what reuses at those calls.
    others: further plans to start at, of the same order and guidance; the search begins at the best of all.
    groups: the sites in groups, each of which moves its own calls; without them plans are step-wise, the method's.
    allowed: False for plans that are not to be tried, for being too slow, say. The start is not asked about.
    how: a round goes over the moves.

    Raises: PlanError where a start is not step-wise (differs within a group), does not have k reuse calls, or differs
    from the others in order or guidance; BudgetSpent where no start was scored.
    """
    sites = tuple(sites)
    if any((other.order, other.guided) != (plan.order, plan.guided) for other in others):
        raise PlanError("the plans to start at differ in order or guidance, expected the same")
    starts = [_row(start, k) if groups is None else state_of(start, groups) for start in (plan, *others)]
    groups = [sites] if groups is None else groups
    made = lambda state: grouped(state, groups, plan.guided, plan.order)  # noqa: E731
    tried: dict[str, float] = {}

    def score(states: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, float]]:
        for state, value in zip(states, score_many([made(state) for state in states], None), strict=False):
            tried[draw(state)] = value
            yield state, value

    def shortlist(moves: list[np.ndarray]) -> tuple[list[np.ndarray], bool]:
        """The moves to score on all prompts, and whether the budget was enough to tell which."""
        if how.heat is None or len(moves) <= how.finalists:
            return moves, True
        values = list(score_many([made(move) for move in moves], how.heat))
        ranked = sorted(range(len(values)), key=lambda i: -values[i])
        return [moves[i] for i in ranked[: how.finalists]], len(values) == len(moves)

    scored = list(score(starts))
    if not scored:
        raise BudgetSpent("the search budget ends before the starting plan is scored; give a larger one")
    state, start = max(scored, key=lambda found: found[1])
    best = start
    rounds, improved, finished = 0, True, len(scored) == len(starts)
    while improved and finished:
        rounds, improved = rounds + 1, False
        moves, finished = shortlist([move for move in _moves(state) if allowed(made(move))])
        least, seen = best + how.epsilon, 0
        for move, value in score(moves):
            seen += 1
            if value > best and value > least:
                state, best, improved = move, value, True
                if how.first:
                    break
        finished = finished and (seen == len(moves) or (improved and how.first))
    return SearchResult(made(state), best, start, rounds, finished, tuple(tried.items()))


def grouped(
    state: np.ndarray, groups: Sequence[Sequence[Site]], guided: tuple[bool, ...] = (), order: int = 0
) -> ReusePlan:
    """The plan in which the sites of a group reuse together. Shapes: state (calls, groups)."""
    columns = [g for g, group in enumerate(groups) for _ in group]
    return ReusePlan(state[:, columns], tuple(site for group in groups for site in group), guided, order)


def state_of(plan: ReusePlan, groups: Sequence[Sequence[Site]]) -> np.ndarray:
    """Which calls each group reuses: the inverse of `grouped`.

    Shapes: -> (calls, groups). Raises: PlanError where the sites of a group differ.
    """
    column = dict(zip(plan.sites, plan.mask.T, strict=True))
    state = np.array([column.get(group[0], np.zeros(plan.calls, dtype=bool)) for group in groups]).T
    if grouped(state, groups, plan.guided, plan.order) != plan:
        raise PlanError("the search starts from a plan whose sites agree within each group; these do not")
    return state


def draw(state: np.ndarray) -> str:
    """A row of '.' and '#' for each group, joined by '/'. Shapes: state (calls, groups)."""
    return "/".join("".join(".#"[int(cell)] for cell in row) for row in state.T)


def _row(plan: ReusePlan, k: int | None) -> np.ndarray:
    """Which calls a step-wise plan reuses. Shapes: -> (calls, 1)."""
    if plan.grid is None:
        raise PlanError("the search starts from a step-wise plan; this one gives sites different rows")
    row = np.array([[cell == "#"] for cell in plan.grid])
    if k is not None and row.sum() != k:
        raise PlanError(f"the plan to start from has {row.sum()} reuse calls, expected k = {k}")
    return row


def _moves(state: np.ndarray) -> Iterator[np.ndarray]:
    """Every exchange of a reuse call with a computing one, never call 0; short moves first, late ones before early.

    Late calls share the longest prefix with what was rendered before, so they are the cheapest to try.
    """
    exchanges = [
        (abs(a - b), -min(a, b), a, b, g)
        for g, row in enumerate(state.T)
        for a in np.flatnonzero(row)
        for b in np.flatnonzero(~row)
        if b > 0
    ]
    for _, _, a, b, g in sorted(exchanges):
        moved = state.copy()
        moved[a, g], moved[b, g] = False, True
        yield moved

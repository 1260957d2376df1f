"""PHAST: a local search for a better plan, around HURRY, with the number of reuse calls unchanged.

The search knows neither a model nor a sampler. It asks a `render` callable for what a plan produces and a `score`
callable how good that is; which work two plans share is the renderer's affair.

Source: arXiv 2401.01008 for the method; the neighbourhood, order and stopping rule are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from minireuse.common.journal import Journal
from minireuse.common.ranks import ALONE, Ranks
from minireuse.plan import PlanError, ReusePlan, Site


@dataclass(frozen=True)
class SearchResult:
    """The best plan found, its score, the start's score, and every plan that was tried, in order."""

    plan: ReusePlan
    score: float
    start_score: float
    rounds: int
    finished: bool  # False where the budget ended the search before a local optimum was reached
    tried: tuple[tuple[str, float], ...] = field(repr=False)


def search(
    render: Callable[[ReusePlan], Any],
    plan: ReusePlan,
    sites: Iterable[Site],
    *,
    k: int | None,
    score: Callable[[Any], float],
    others: Sequence[ReusePlan] = (),
    groups: Sequence[Sequence[Site]] | None = None,
    allowed: Callable[[ReusePlan], bool] = lambda plan: True,
    journal: Journal | None = None,
    steepest: bool = True,
    more: Callable[[], bool] = lambda: True,
    on_try: Callable[[ReusePlan, float, float], object] = lambda plan, value, best: None,
    ranks: Ranks = ALONE,
) -> SearchResult:
    """Improve a plan by moving one reuse call at a time, until no move improves the score.

    plan: where to start, with k reuse calls; HURRY is the method's choice. Plans that are tried have its order.
    sites: what reuses at those calls.
    score: of what `render` gave; larger is better.
    others: further plans to start at, of the same order and guidance; the search begins at the best of all.
    groups: the sites in groups, each of which moves its own calls; without them plans are step-wise, the method's.
    allowed: False for plans that are not to be tried, for being too slow, say. The start is not asked about.
    steepest: try every move and take the best, as the method says; False takes the first that improves.
    more: asked before each try; False ends the search.
    on_try: told each plan, its score and the best score so far.
    journal: scores of plans tried before, so that an interrupted search goes on where it was.
    ranks: processes that take turns at the tries and come to the same answer; the journal is the first one's.

    Raises: PlanError where a start is not step-wise (differs within a group), does not have k reuse calls, or differs
    from the others in order or guidance.
    """
    sites = tuple(sites)
    if any((other.order, other.guided) != (plan.order, plan.guided) for other in others):
        raise PlanError("the plans to start at differ in order or guidance, expected the same")
    starts = [_row(start, k) if groups is None else _state(start, groups) for start in (plan, *others)]
    groups = [sites] if groups is None else groups
    made = lambda state: grouped(state, groups, plan.guided, plan.order)  # noqa: E731
    tries = Tries(made, render, score, Journal() if journal is None else journal, more, on_try, ranks)
    scored = list(tries(starts))
    if not scored:
        raise PlanError("the search budget does not even cover the start; give a larger one")
    state, start = max(scored, key=lambda tried: tried[1])
    best = start
    rounds, improved, finished = 0, True, len(scored) == len(starts)
    while improved and finished:
        rounds, improved = rounds + 1, False
        moves = [move for move in _moves(state) if allowed(made(move))]
        seen = 0
        for move, value in tries(moves):
            seen += 1
            if value > best:
                state, best, improved = move, value, True
                if not steepest:
                    break
        finished = seen == len(moves) or (improved and not steepest)
    return SearchResult(made(state), best, start, rounds, finished, tuple(tries.tried.items()))


def grouped(
    state: np.ndarray, groups: Sequence[Sequence[Site]], guided: tuple[bool, ...] = (), order: int = 0
) -> ReusePlan:
    """The plan in which the sites of a group reuse together. Shapes: state (calls, groups)."""
    columns = [g for g, group in enumerate(groups) for _ in group]
    return ReusePlan(state[:, columns], tuple(site for group in groups for site in group), guided, order)


class Tries:
    """Scores states, each plan once, as many at a time as there are ranks; see `search` for what it is given."""

    def __init__(
        self,
        made: Callable[[np.ndarray], ReusePlan],
        render: Callable[[ReusePlan], Any],
        score: Callable[[Any], float],
        journal: Journal,
        more: Callable[[], bool],
        on_try: Callable[[ReusePlan, float, float], object],
        ranks: Ranks,
    ) -> None:
        self.made, self.render, self.score = made, render, score
        self.journal, self.more, self.on_try, self.ranks = journal, more, on_try, ranks
        self.known: dict[str, float] = dict(ranks.gather(journal.records)[0])
        self.tried: dict[str, float] = {}  # since this began, in order, known before or not

    def __call__(self, states: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, float]]:
        """Each state with its score; ends early with the budget. Shapes: (calls, groups) each."""
        unknown = iter({_drawn(state): state for state in states if _drawn(state) not in self.known}.values())
        for state in states:
            if _drawn(state) not in self.known:
                if not all(self.ranks.gather(self.more())):
                    return
                self._take_turns(list(islice(unknown, self.ranks.size)))
            value = self.tried[_drawn(state)] = self.known[_drawn(state)]
            self.on_try(self.made(state), value, max(self.tried.values()))
            yield state, value

    def _take_turns(self, states: list[np.ndarray]) -> None:
        own = None
        if self.ranks.rank < len(states):
            own = self.score(self.render(self.made(states[self.ranks.rank])))
        for state, value in zip(states, self.ranks.gather(own), strict=False):
            if math.isnan(value):
                raise PlanError(f"plan {_drawn(state)} scored nan; the renderer gave an image that cannot be compared")
            self.journal.add(_drawn(state), value)
            self.known[_drawn(state)] = value


def _state(plan: ReusePlan, groups: Sequence[Sequence[Site]]) -> np.ndarray:
    """Which calls each group reuses. Shapes: -> (calls, groups)."""
    column = dict(zip(plan.sites, plan.mask.T, strict=True))
    state = np.array([column.get(group[0], np.zeros(plan.calls, dtype=bool)) for group in groups]).T
    if grouped(state, groups, plan.guided, plan.order) != plan:
        raise PlanError("the search starts from a plan whose sites agree within each group; these do not")
    return state


def _row(plan: ReusePlan, k: int | None) -> np.ndarray:
    """Which calls a step-wise plan reuses. Shapes: -> (calls, 1)."""
    if plan.grid is None:
        raise PlanError("the search starts from a step-wise plan; this one differs by site")
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


def _drawn(state: np.ndarray) -> str:
    return "/".join("".join(".#"[int(cell)] for cell in row) for row in state.T)

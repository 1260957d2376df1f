"""Scores for the search, by one process or by the ranks of torchrun; and the search with such scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from minireuse.common.journal import Journal
from minireuse.common.ranks import ALONE, Ranks
from minireuse.plan import PlanError, ReusePlan, Site
from minireuse.search.phast import METHOD, Rounds, SearchResult, draw, improve, state_of


class Scoring:
    """A `score_many` that renders plans: each plan once, and as many at a time as there are ranks.

    What has a score already, from this run or from the journal, is not rendered again.
    """

    def __init__(
        self,
        render: Callable[..., Any],
        score: Callable[..., float],
        groups: Sequence[Sequence[Site]],
        *,
        journal: Journal | None = None,
        more: Callable[[], bool] = lambda: True,
        on_try: Callable[[ReusePlan, float, bool], object] = lambda plan, value, whole: None,
        ranks: Ranks = ALONE,
    ) -> None:
        """render: of a plan, what it produces. score: of that, a number; larger is better.

        Where only some prompts count, both are given these as one more argument.
        groups: of sites that reuse together; the journal knows a plan by a row of '.' and '#' for each of them.
        journal: keeps scores, so that an interrupted search goes on where it was. Only the first rank's is read.
        more: asked before every turn; where it says False, no plan is rendered any more.
        on_try: is given every plan that is asked for, with its score, and whether that is of all prompts.
        ranks: the processes that take turns. All of them must ask for the same plans.
        """
        self.render, self.score, self.groups = render, score, groups
        self.journal = Journal() if journal is None else journal
        self.more, self.on_try, self.ranks = more, on_try, ranks
        self.known: dict[str, float] = dict(ranks.gather(self.journal.records)[0])

    def __call__(self, plans: Sequence[ReusePlan], prompts: Sequence[int] | None = None) -> Iterator[float]:
        """The score of each plan, in order; it ends early when the budget is spent.

        prompts: the numbers of the prompts that count; None is all of them.
        Raises: PlanError for a score that is not a number.
        """
        keys = [self._key(plan, prompts) for plan in plans]
        unknown = iter({key: plan for key, plan in zip(keys, plans, strict=True) if key not in self.known}.items())
        for key, plan in zip(keys, plans, strict=True):
            if key not in self.known:
                if not all(self.ranks.gather(self.more())):
                    return
                self._take_turns(list(islice(unknown, self.ranks.size)), prompts)
            self.on_try(plan, self.known[key], prompts is None)
            yield self.known[key]

    def _take_turns(self, pairs: Sequence[tuple[str, ReusePlan]], prompts: Sequence[int] | None) -> None:
        """Score at most one plan on each rank, then exchange the scores."""
        own = None
        if self.ranks.rank < len(pairs):
            chosen = () if prompts is None else (prompts,)
            own = self.score(self.render(pairs[self.ranks.rank][1], *chosen), *chosen)
        for (key, _), value in zip(pairs, self.ranks.gather(own), strict=False):
            if math.isnan(value):
                raise PlanError(f"plan {key} scored nan; the renderer gave an image that cannot be compared")
            self.journal.add(key, value)
            self.known[key] = value

    def _key(self, plan: ReusePlan, prompts: Sequence[int] | None) -> str:
        drawn = draw(state_of(plan, self.groups))
        return drawn if prompts is None else f"{drawn} on {','.join(map(str, prompts))}"


def search(
    render: Callable[..., Any],
    plan: ReusePlan,
    sites: Iterable[Site],
    *,
    k: int | None,
    score: Callable[..., float],
    others: Sequence[ReusePlan] = (),
    groups: Sequence[Sequence[Site]] | None = None,
    allowed: Callable[[ReusePlan], bool] = lambda plan: True,
    how: Rounds = METHOD,
    journal: Journal | None = None,
    more: Callable[[], bool] = lambda: True,
    on_try: Callable[[ReusePlan, float, bool], object] = lambda plan, value, whole: None,
    ranks: Ranks = ALONE,
) -> SearchResult:
    """Improve a plan by moving one reuse call at a time: `improve`, with scores by `Scoring`.

    The arguments are explained there. Raises: PlanError, as they do.
    """
    sites = tuple(sites)
    scores = Scoring(
        render,
        score,
        [sites] if groups is None else groups,
        journal=journal,
        more=more,
        on_try=on_try,
        ranks=ranks,
    )
    return improve(scores, plan, sites, k=k, others=others, groups=groups, allowed=allowed, how=how)

"""Depth plans: how much of the U-Net runs at each call, searched for a ladder of latencies in one run.

A depth plan is one number a call. 0 runs the whole U-Net; each further depth enters it nearer to its end, at a feature
that is reused, and computes less; the last makes no call and reuses the prediction itself. DeepCache and skipped calls
are two of its corners.

The search walks down once from the full sampler, by the change that does least damage for the time it saves, and comes
past every latency of the ladder on its way. Then each rung is refined: what one call's depth does there is measured
around the plan found so far, and proposes exchanges; only their scores on all prompts decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minireuse.plan import PlanError, ReusePlan, Site
from minireuse.policies import interval
from minireuse.search.phast import METHOD, BudgetSpent, Rounds, ScoreMany, SearchResult

Depths = tuple[int, ...]  # of each call, 0 for the whole U-Net

PROPOSED = 4  # changes that are tried at each step down
SHORTLIST = 3  # starts of a rung that are scored on all prompts
AROUND = 10  # changes of one call towards more depth, and as many towards less, that are looked at around a plan


def entries_of(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The sites a call can begin at, from the one that computes most to the one that computes nothing."""
    return tuple(sorted((s for s in sites if s.kind in ("deep", "eps")), key=lambda s: (s.kind == "eps", -s.depth)))


def depth_plan(depths: Sequence[int], entries: Sequence[Site], order: int = 0) -> ReusePlan:
    """The plan in which a call of depth d > 0 begins at entries[d - 1]. Shapes: depths (calls,)."""
    return ReusePlan(np.array(depths)[:, None] == np.arange(1, len(entries) + 1), tuple(entries), order=order)


def even_depths(calls: int, depth: int, reused: int) -> Depths:
    """Evenly spread calls of one depth among whole ones, as `interval` spreads them."""
    return tuple(depth * int(cell) for cell in interval(calls, [Site("one", "out")], k=reused).mask[:, 0])


@dataclass
class Ladder:
    """One search of depth plans for several latencies.

    score_many: as in `improve`, in dB. latency: of a plan, as a fraction of the full sampler's. order: of the plans.
    how: `heat` names the prompts on which changes are proposed, None for all; `finalists` how many of them are scored
    on all prompts; `epsilon` what a change has to gain; `first` is not used.
    """

    score_many: ScoreMany
    calls: int
    entries: tuple[Site, ...]
    latency: Callable[[ReusePlan], float]
    order: int = 0
    how: Rounds = METHOD

    def __post_init__(self) -> None:
        self._times: dict[Depths, float] = {}
        self._tried: dict[str, float] = {}
        self.whole: Depths = (0,) * self.calls
        self.deepest = len(self.entries)
        # What one call of a depth is known to do, by (call, depth): the squared error it adds to a plan that is alike.
        self._known = {(call, 0): 0.0 for call in range(self.calls)}

    def search(self, budgets: Sequence[float]) -> Iterator[tuple[float, SearchResult]]:
        """The plan of each rung, the slowest first, each as soon as it is found.

        budgets: the most that each rung may take of the full sampler's time.
        Raises: PlanError where no plan is as fast as the lowest rung; BudgetSpent where the search budget ends before
        a rung has anything to show.
        """
        fastest = self.time((0, *(self.deepest,) * (self.calls - 1)))
        if fastest > min(budgets):
            raise PlanError(
                f"no plan over these sites is as fast as {min(budgets)} of the full sampler's time; "
                f"the fastest takes {fastest:.3f}"
            )
        self._known |= self.singles()
        way = list(self.descend(self.whole, min(budgets)))
        above = self.whole  # what the next slower rung found
        for budget in sorted(budgets, reverse=True):
            (*_, on_from_above) = self.descend(above, budget)
            starts = [next(plan for plan in way if self.time(plan) <= budget), on_from_above, *self.even(budget)]
            above, result = self.refine(starts, budget)
            yield budget, result

    def time(self, depths: Depths) -> float:
        """A plan's share of the full sampler's time."""
        if depths not in self._times:
            self._times[depths] = self.latency(self.plan(depths))
        return self._times[depths]

    def plan(self, depths: Depths) -> ReusePlan:
        return depth_plan(depths, self.entries, self.order)

    def singles(self) -> dict[tuple[int, int], float]:
        """What one call of a depth does in a run of whole ones: the squared error, by (call, depth)."""
        cells = list(itertools.product(range(1, self.calls), range(1, self.deepest + 1)))
        return dict(zip(cells, self._damage([changed(self.whole, *cell) for cell in cells]), strict=True))

    def descend(self, depths: Depths, least: float) -> Iterator[Depths]:
        """Plans ever faster, until one takes at most `least`: each makes one call of the one before deeper.

        What is known of one call's depth says which changes are tried, and learns from what these do.
        """
        yield depths
        (error,) = self._damage([depths])
        while self.time(depths) > least:
            deeper = [
                (call, depth) for call in range(1, self.calls) for depth in range(depths[call] + 1, self.deepest + 1)
            ]
            tried = self._cheapest(depths, deeper)[:PROPOSED]
            errors = self._damage([changed(depths, *cell) for cell in tried])
            for (call, depth), value in zip(tried, errors, strict=True):
                self._known[call, depth] = self._known[call, depths[call]] + value - error
            saved = [self.time(depths) - self.time(changed(depths, *cell)) for cell in tried]
            prices = [(value - error) / time for value, time in zip(errors, saved, strict=True)]
            best = prices.index(min(prices))
            depths, error = changed(depths, *tried[best]), errors[best]
            yield depths

    def _cheapest(self, depths: Depths, cells: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """The changes of one call that save time, by the error they are known to add for the time they save."""
        prices = []
        for call, depth in cells:
            saved = self.time(depths) - self.time(changed(depths, call, depth))
            added = self._known[call, depth] - self._known[call, depths[call]]
            if saved > 0:
                prices.append((max(added, 0.0) / saved, call, depth))
        return [(call, depth) for _, call, depth in sorted(prices)]

    def even(self, budget: float) -> list[Depths]:
        """The even plan of each depth that fits a latency with fewest calls of that depth."""
        found = []
        for depth in range(1, self.deepest + 1):
            plans = (even_depths(self.calls, depth, reused) for reused in range(self.calls))
            found += [next((plan for plan in plans if self.time(plan) <= budget), None)]
        return [plan for plan in found if plan is not None]

    def best_even(self, budget: float) -> Depths:
        """The one of `even` that does least damage on the prompts that propose; it is scored already."""
        plans = self.even(budget)
        return min(zip(self._damage(plans), plans, strict=True))[1]

    def refine(self, starts: Sequence[Depths], budget: float) -> tuple[Depths, SearchResult]:
        """The best of the starts, improved by changes of one call's depth, or of two that exchange time.

        Raises: BudgetSpent where no start was scored.
        """
        scored = self._scores(self._shortlist(list(dict.fromkeys(starts))))
        if not scored:
            raise BudgetSpent("the search budget ends before a plan of this latency is scored; give a larger one")
        start = best = max(scored.values())
        depths = max(scored, key=lambda plan: scored[plan])
        rounds, finished = 0, False
        while not finished:
            rounds += 1
            try:
                moves = self._exchanges(depths, budget)
            except BudgetSpent:
                break
            values = self._scores(moves)
            finished = len(values) == len(moves)
            move = max(values, key=lambda plan: values[plan], default=None)
            if move is not None and values[move] > best + self.how.epsilon:
                depths, best, finished = move, values[move], False
            elif not finished:
                break
        result = SearchResult(self.plan(depths), best, start, rounds, finished, tuple(self._tried.items()))
        return depths, result

    def _exchanges(self, depths: Depths, budget: float) -> list[Depths]:
        """The changes of one call or two that fit and promise most, by what each call's change does alone."""
        deeper = [(call, d + 1) for call, d in enumerate(depths) if call and d < self.deepest]
        less_deep = list(dict.fromkeys((call, e) for call, d in enumerate(depths) if d for e in (0, d - 1)))
        worst = sorted(less_deep, key=lambda cell: self._known[cell] - self._known[cell[0], depths[cell[0]]])
        near = [*self._cheapest(depths, deeper)[:AROUND], *worst[:AROUND]]
        (now, *errors) = self._damage([depths, *(changed(depths, *cell) for cell in near)])
        gains = {cell: error - now for cell, error in zip(near, errors, strict=True)}
        promised: dict[Depths, float] = {}
        for (a, x), gain in gains.items():
            promised[changed(depths, a, x)] = gain
            for (b, y), other in gains.items():
                if a < b:
                    promised[changed(changed(depths, a, x), b, y)] = gain + other
        able = sorted((promise, plan) for plan, promise in promised.items() if promise < 0)
        fitting = (plan for _, plan in able if self.time(plan) <= budget)
        moves = list(itertools.islice(fitting, self.how.finalists))
        return list(dict.fromkeys([*self._together(depths, moves, budget), *moves]))

    def _together(self, depths: Depths, moves: Sequence[Depths], budget: float) -> list[Depths]:
        """Plans in which moves are made one after the other, those that promise most first, where they do not touch."""
        plans, plan = [], depths
        for move in moves:
            cells = [call for call in range(self.calls) if move[call] != depths[call]]
            if all(plan[call] == depths[call] for call in cells):
                joined = plan
                for call in cells:
                    joined = changed(joined, call, move[call])
                if self.time(joined) <= budget:
                    plan = joined
                    plans.append(plan)
        return plans[1:]  # the first is a move by itself

    def _shortlist(self, plans: list[Depths]) -> list[Depths]:
        if self.how.heat is None or len(plans) <= SHORTLIST:
            return plans
        errors = self._damage(plans)
        return [plan for _, plan in sorted(zip(errors, plans, strict=True))[:SHORTLIST]]

    def _damage(self, plans: Sequence[Depths]) -> list[float]:
        """Squared error (pixels 0 to 255) on the prompts that propose, from their mean PSNR. Raises: BudgetSpent."""
        values = list(self.score_many([self.plan(depths) for depths in plans], self.how.heat))
        if len(values) < len(plans):
            raise BudgetSpent(f"the search budget ended after {len(values)} of {len(plans)} plans; give a larger one")
        return [255**2 * 10 ** (-value / 10) for value in values]

    def _scores(self, plans: Sequence[Depths]) -> dict[Depths, float]:
        """The scores on all prompts, of as many plans as the search budget allows."""
        found = zip(plans, self.score_many([self.plan(depths) for depths in plans], None), strict=False)
        scores = dict(found)
        self._tried |= {drawn(depths): value for depths, value in scores.items()}
        return scores


def changed(depths: Depths, call: int, depth: int) -> Depths:
    """The same plan with another depth at one call."""
    return (*depths[:call], depth, *depths[call + 1 :])


def drawn(depths: Depths) -> str:
    """One digit a call, '.' for the whole U-Net."""
    return " ".join("." if depth == 0 else str(depth) for depth in depths)

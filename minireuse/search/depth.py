"""Depth plans: how deep the U-Net runs at each call, searched for a ladder of latencies in one run.

A depth plan is one number a call, its entry. 0 is the U-Net's beginning, so that all of it runs. Each further entry is
a feature nearer to the end, which is reused, and less is computed; at the last one no call is made, and the prediction
itself is reused. DeepCache and skipped calls are two corners of such plans.

The search goes once from the full sampler to the lowest latency, by the change that does least harm for the time it
saves. On its way it passes every latency of the ladder. Then each rung is refined: what a change of one call does is
measured around the plan found so far, and proposes exchanges; only their scores on all prompts decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minireuse.plan import PlanError, ReusePlan, Site
from minireuse.policies import interval
from minireuse.search.budget import error_of
from minireuse.search.phast import METHOD, BudgetSpent, Rounds, ScoreMany, SearchResult

Entries = tuple[int, ...]  # of the calls of a plan
Change = tuple[int, int]  # a call and its new entry

PROPOSED = 4  # changes that are tried at each step to a faster plan
SHORTLIST = 3  # starts of a rung that are scored on all prompts
AROUND = 10  # changes to a later entry, and as many to an earlier one, that are looked at around a plan
NO_TIME = 1e-6  # of the full sampler's: what saves less saves nothing


def entry_sites(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Where a call can enter, from the site that leaves most to compute to the one that leaves nothing."""
    return tuple(sorted((s for s in sites if s.kind in ("deep", "eps")), key=lambda s: (s.kind == "eps", -s.depth)))


def depth_plan(entries: Sequence[int], sites: Sequence[Site], order: int = 0) -> ReusePlan:
    """The plan in which a call of entry e > 0 reuses sites[e - 1]. Shapes: entries (calls,)."""
    return ReusePlan(np.array(entries)[:, None] == np.arange(1, len(sites) + 1), tuple(sites), order=order)


def even_entries(calls: int, entry: int, reused: int) -> Entries:
    """Evenly spread calls of one entry among whole ones, as `interval` spreads them."""
    return tuple(entry * int(cell) for cell in interval(calls, [Site("one", "out")], k=reused).mask[:, 0])


def changed(entries: Entries, *changes: Change) -> Entries:
    """The same plan with another entry at some calls."""
    new = list(entries)
    for call, entry in changes:
        new[call] = entry
    return tuple(new)


@dataclass
class Ladder:
    """One search of depth plans for several latencies.

    score_many: as in `improve`, in dB. sites: where calls can enter, as `entry_sites` orders them. latency: of a plan,
    as a fraction of the full sampler's. order: of the plans.
    how: `heat` names the prompts on which changes are proposed, None for all; `finalists` is how many proposals are
    scored on all prompts; `epsilon` is what a change has to gain. `first` is not used.
    """

    score_many: ScoreMany
    calls: int
    sites: tuple[Site, ...]
    latency: Callable[[ReusePlan], float]
    order: int = 0
    how: Rounds = METHOD

    def __post_init__(self) -> None:
        self._times: dict[Entries, float] = {}
        self._errors: dict[Entries, float] = {}  # on the prompts that propose
        self._tried: dict[str, float] = {}  # scores on all prompts
        self.whole: Entries = (0,) * self.calls

    def search(self, budgets: Sequence[float]) -> Iterator[tuple[float, SearchResult]]:
        """The plan of each rung, the slowest first, each as soon as it is found.

        budgets: the most that each rung may take of the full sampler's time.
        Raises: PlanError where no plan is as fast as the lowest rung; BudgetSpent where the search budget ends before
        a rung has anything to show.
        """
        fastest = self.time((0, *(len(self.sites),) * (self.calls - 1)))
        if fastest > min(budgets):
            raise PlanError(
                f"no plan over these sites is as fast as {min(budgets)} of the full sampler's time; "
                f"the fastest takes {fastest:.3f}"
            )
        way = list(self.descend(self.whole, min(budgets)))
        slower = self.whole  # what the rung before found
        for budget in sorted(budgets, reverse=True):
            (*_, on_from_slower) = self.descend(slower, budget)
            passed = next(plan for plan in way if self.time(plan) <= budget)
            slower, result = self.refine([passed, on_from_slower, *self.even(budget)], budget)
            yield budget, result

    def time(self, entries: Entries) -> float:
        """A plan's share of the full sampler's time."""
        if entries not in self._times:
            self._times[entries] = self.latency(self.plan(entries))
        return self._times[entries]

    def plan(self, entries: Entries) -> ReusePlan:
        return depth_plan(entries, self.sites, self.order)

    @cached_property
    def harm(self) -> dict[Change, float]:
        """The squared error that a call of this entry is known to add.

        At first it is what the call does among whole ones. Each descent replaces what it finds out about the plans that
        it passes, so it is a guess for plans that are alike: it says what to try, and decides nothing.
        """
        cells = list(itertools.product(range(1, self.calls), range(1, len(self.sites) + 1)))
        alone = self._damage([changed(self.whole, cell) for cell in cells])
        return {(call, 0): 0.0 for call in range(self.calls)} | dict(zip(cells, alone, strict=True))

    def descend(self, entries: Entries, least: float) -> Iterator[Entries]:
        """Plans ever faster, until one takes at most `least`: each makes one call of the plan before enter later.

        Raises: PlanError where no change saves time; BudgetSpent.
        """
        yield entries
        if self.time(entries) <= least:
            return
        (error,) = self._damage([entries])
        while self.time(entries) > least:
            tried = self._cheapest(entries, self._later(entries))[:PROPOSED]
            if not tried:
                raise PlanError(f"no change makes a plan of {self.time(entries):.3f} of the full sampler's time faster")
            plans = [changed(entries, change) for change in tried]
            errors = self._damage(plans)
            for (call, entry), value in zip(tried, errors, strict=True):
                self.harm[call, entry] = self.harm[call, entries[call]] + value - error
            saved = [self.time(entries) - self.time(plan) for plan in plans]
            prices = [(max(value - error, 0.0) / time, -time) for value, time in zip(errors, saved, strict=True)]
            best = prices.index(min(prices))
            entries, error = plans[best], errors[best]
            yield entries

    def even(self, budget: float) -> list[Entries]:
        """The even plan of each entry that fits a latency with fewest such calls."""
        found = []
        for entry in range(1, len(self.sites) + 1):
            plans = (even_entries(self.calls, entry, reused) for reused in range(self.calls))
            found += [next((plan for plan in plans if self.time(plan) <= budget), None)]
        return [plan for plan in found if plan is not None]

    def best_even(self, budget: float) -> Entries | None:
        """The one of `even` with the least error on the prompts that propose, of those that were tried there."""
        known = [(self._errors[plan], plan) for plan in self.even(budget) if plan in self._errors]
        return min(known)[1] if known else None

    def refine(self, starts: Sequence[Entries], budget: float) -> tuple[Entries, SearchResult]:
        """The best of the starts, improved by changes of one call, or of two that exchange time.

        Raises: BudgetSpent where no start was scored.
        """
        shortlist = self._shortlist(list(dict.fromkeys(starts)))
        scored = self._scores(shortlist)
        if not scored:
            raise BudgetSpent(f"the search budget ends before a plan of latency {budget} is scored; give a larger one")
        start = best = max(scored.values())
        entries = max(scored, key=lambda plan: scored[plan])
        rounds, finished, goes_on = 0, False, len(scored) == len(shortlist)
        while goes_on:
            rounds += 1
            try:
                moves = self._exchanges(entries, budget)
            except BudgetSpent:
                break
            values = self._scores(moves)
            move = max(values, key=lambda plan: values[plan], default=None)
            goes_on = move is not None and values[move] > best + self.how.epsilon
            if move is not None and goes_on:
                entries, best = move, values[move]
            finished = not goes_on and len(values) == len(moves)
        result = SearchResult(self.plan(entries), best, start, rounds, finished, tuple(self._tried.items()))
        return entries, result

    def _later(self, entries: Entries) -> list[Change]:
        """Every change of one call to a later entry."""
        return [(call, e) for call in range(1, self.calls) for e in range(entries[call] + 1, len(self.sites) + 1)]

    def _cheapest(self, entries: Entries, changes: Iterable[Change]) -> list[Change]:
        """The changes that save time, by the harm they are known to do for the time they save."""
        prices = []
        for call, entry in changes:
            saved = self.time(entries) - self.time(changed(entries, (call, entry)))
            if saved > NO_TIME:
                added = self.harm[call, entry] - self.harm[call, entries[call]]
                prices.append((max(added, 0.0) / saved, call, entry))
        return [(call, entry) for _, call, entry in sorted(prices)]

    def _exchanges(self, entries: Entries, budget: float) -> list[Entries]:
        """The changes of one call or two that fit and promise most, by what each change does alone.

        A call goes to the next later entry, to the one before its own, or runs whole.
        """
        later = [(call, e) for call, e in self._later(entries) if e == entries[call] + 1]
        earlier = list(dict.fromkeys((call, to) for call, e in enumerate(entries) if e for to in (0, e - 1)))
        relief = sorted(earlier, key=lambda change: self.harm[change] - self.harm[change[0], entries[change[0]]])
        near = [*self._cheapest(entries, later)[:AROUND], *relief[:AROUND]]
        (now, *errors) = self._damage([entries, *(changed(entries, change) for change in near)])
        gains = {change: error - now for change, error in zip(near, errors, strict=True)}
        promised = {changed(entries, change): gain for change, gain in gains.items()}
        for (one, gain), (other, further) in itertools.combinations(gains.items(), 2):
            if one[0] != other[0]:
                promised[changed(entries, one, other)] = gain + further
        able = sorted((promise, plan) for plan, promise in promised.items() if promise < 0)
        fitting = (plan for _, plan in able if self.time(plan) <= budget)
        moves = list(itertools.islice(fitting, self.how.finalists))
        return list(dict.fromkeys([*self._together(entries, moves, budget), *moves]))

    def _together(self, entries: Entries, moves: Sequence[Entries], budget: float) -> list[Entries]:
        """Plans in which moves are made one after the other, those that promise most first, where they do not touch."""
        plans, plan = [], entries
        for move in moves:
            changes = [(call, move[call]) for call in range(self.calls) if move[call] != entries[call]]
            joined = changed(plan, *changes)
            if all(plan[call] == entries[call] for call, _ in changes) and self.time(joined) <= budget:
                plan = joined
                plans.append(plan)
        return plans[1:]  # the first is a move by itself

    def _shortlist(self, plans: list[Entries]) -> list[Entries]:
        """The starts to score on all prompts."""
        if self.how.heat is None:
            return plans
        return [plan for _, plan in sorted(zip(self._damage(plans), plans, strict=True))[:SHORTLIST]]

    def _damage(self, plans: Sequence[Entries]) -> list[float]:
        """Squared error (pixels 0 to 255) on the prompts that propose, from their mean PSNR. Raises: BudgetSpent."""
        values = list(self.score_many([self.plan(entries) for entries in plans], self.how.heat))
        if len(values) < len(plans):
            raise BudgetSpent(f"the search budget ended after {len(values)} of {len(plans)} plans; give a larger one")
        errors = list(map(error_of, values))
        self._errors |= dict(zip(plans, errors, strict=True))
        return errors

    def _scores(self, plans: Sequence[Entries]) -> dict[Entries, float]:
        """The scores on all prompts, of as many plans as the search budget allows."""
        scores = dict(zip(plans, self.score_many([self.plan(entries) for entries in plans], None), strict=False))
        if self.how.heat is None:
            self._errors |= {entries: error_of(value) for entries, value in scores.items()}
        self._tried |= {" ".join(map(str, entries)): value for entries, value in scores.items()}
        return scores

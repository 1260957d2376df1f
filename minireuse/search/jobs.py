"""What the arguments of the search ask for: jobs, each with the way it is searched."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minireuse.common.options import grid
from minireuse.pipeline import Pipeline
from minireuse.plan import KINDS, ReusePlan, Site
from minireuse.policies import POLICIES, hurry, select
from minireuse.search.budget import alike_in, groups_of, layerwise, starts, step_wise
from minireuse.search.costs import Costs
from minireuse.search.depth import Ladder, entry_sites
from minireuse.search.phast import Rounds, ScoreMany, SearchResult, improve
from minireuse.search.plan_files import read_plan

DEPTH = "depth"  # what --kind calls plans of one depth a call
HEAT = 4  # prompts on which all moves of a round are scored
FINALISTS = 8  # moves that are scored on all prompts
LEAST = 0.01  # of a plain call: groups that save less are not worth searching
MARGIN = 0.015  # of the full sampler's time: by so much a ladder's plans are to be faster than asked, since what a plan
# takes is estimated from single calls while it is searched
LEAST_DEPTH = 0.1  # of a plain call: depths that save less are left out, since a ladder has many to try


@dataclass(frozen=True)
class Job:
    """One search: for a plan with k reuse calls, or, where k is None, for one within a latency, or for several at once.

    outs, budgets: a file for each plan, and what that may take of the full sampler's time, None where k says it.
    groups: of sites that reuse together. about: what the answer depends on, beside what holds for all jobs.
    """

    outs: tuple[Path, ...]
    budgets: tuple[float | None, ...]
    groups: Sequence[Sequence[Site]]
    k: int | None
    about: dict[str, Any]
    journal: Path

    def state(self, number: int, settings: dict[str, Any]) -> bool | None:
        """Whether a plan file holds the end of this very search, or of another part of it; None where there is none.

        Raises: ValueError for a file of anything else, which stays.
        """
        out, budget = self.outs[number], self.budgets[number]
        if not out.exists():
            return None
        known = json.loads(json.dumps(settings | ({} if budget is None else {"budget_latency": budget})))
        about = read_plan(out)[1] if self.journal.exists() else {}
        if not about.items() >= known.items():
            raise ValueError(f"{out} exists; remove it, or give another --out")
        return about.get("finished") is True


class Found(NamedTuple):
    """A plan that was found, and others to score on unseen prompts beside it."""

    result: SearchResult
    rivals: dict[str, ReusePlan]


@dataclass(frozen=True)
class Approach:
    """How a job is searched.

    find: the plans of a job, in the order of its files, each as soon as it is found.
    groups: of sites that reuse together; the journal's names of plans go by them.
    """

    find: Callable[[ScoreMany], Iterable[Found]]
    groups: Sequence[Sequence[Site]] = field(repr=False)


def rounds_of(args: argparse.Namespace) -> Rounds:
    """How the rounds of the search go over the moves."""
    exact = args.exact or args.first or args.prompts <= HEAT
    return Rounds(args.first, args.epsilon, None if exact else tuple(range(HEAT)), FINALISTS)


def make_jobs(args: argparse.Namespace, pipeline: Pipeline) -> list[Job]:
    """What the arguments ask for. Raises: ValueError for an impossible number of reuse calls, or files that clash."""
    calls = pipeline.calls(args.sampler, grid(args))
    latencies = sorted(args.budget_latency or (), reverse=True)
    start = "the best that fits" if latencies else args.start
    about = {"sites": args.sites, "branch": args.branch, "order": args.order, "start": start}
    if args.kind == DEPTH:
        about |= {"kind": DEPTH, "kinds": ["deep", "eps"]}
        groups: list[Sequence[Site]] = [(entry,) for entry in entry_sites(pipeline.sites)]
    else:
        kinds = [args.kind] if args.kind else list(KINDS) if args.layerwise else ["map"]
        about |= {"kind": "layerwise" if args.layerwise else kinds[0], "kinds": kinds}
        groups = [select(pipeline.sites, args.sites, kind, args.branch) for kind in kinds]
        if args.layerwise:
            attention = set(itertools.chain(*groups))
            some = [s for s in pipeline.sites if s in attention or (s.kind == "deep" and "deep" in kinds)]
            groups = list(groups_of(some, len(pipeline.unet.config.block_out_channels)).values())
    counts = [] if latencies else args.reuse or [calls // 2]
    for k in counts:
        hurry(calls, groups[0], k=k)  # refuses an impossible number before any work
    stem = f"{args.sampler}-{args.steps if args.timesteps is None else 'listed'}-{about['kind']}"
    stem += f"-branch{args.branch}" * (args.branch > 0) + f"-order{args.order}" * args.order
    names = [f"{stem}-{value}.json" for value in counts or latencies]
    if args.out.suffix == ".json" and len(names) > 1:
        raise ValueError(f"--out {args.out} names one file for {len(names)} plans; give a folder")
    files = [args.out if args.out.suffix == ".json" else args.out / name for name in names]

    journals = [file.with_suffix(".journal.jsonl") for file in files]
    if args.kind == DEPTH:  # one search for all, whose scores serve further rungs as well
        shared = journals[0] if args.out.suffix == ".json" else args.out / f"{stem}.journal.jsonl"
        return [Job(tuple(files), tuple(latencies), groups, None, about, shared)]
    each = zip(files, journals, counts or latencies, strict=True)
    if counts:
        return [Job((file,), (None,), groups, k, about | {"k": k}, journal) for file, journal, k in each]
    return [Job((file,), (latency,), groups, None, about, journal) for file, journal, latency in each]


def approach(args: argparse.Namespace, job: Job, costs: Costs | None, calls: int) -> Approach:
    """The search a job calls for. costs: of calls that store or reuse, where the job has a latency to keep."""
    if costs is None:
        return _with_count(args, job, calls)
    if job.about["kind"] == DEPTH:
        return _of_depths(args, job, costs, calls)
    return _within_latency(args, job, costs, calls)


def _with_count(args: argparse.Namespace, job: Job, calls: int) -> Approach:
    sites = job.groups[0]
    simple = dict.fromkeys(("hurry", args.start))
    rivals = {n: replace(POLICIES[n](calls, sites, k=job.k), order=args.order) for n in simple}
    find = partial(improve, plan=rivals[args.start], sites=sites, k=job.k, how=rounds_of(args))
    return Approach(lambda scores: [Found(find(scores), rivals)], [sites])


def _of_depths(args: argparse.Namespace, job: Job, costs: Costs, calls: int) -> Approach:
    saved = {group: -seconds for group, seconds in zip(costs.groups, costs.reuse, strict=True)}
    sites = tuple(site for (site,) in job.groups if saved[(site,)] > LEAST_DEPTH * costs.plain)
    limits = {budget - MARGIN: budget for budget in job.budgets if budget is not None}

    def find(scores: ScoreMany) -> Iterator[Found]:
        ladder = Ladder(scores, calls, sites, costs.latency, args.order, rounds_of(args))
        for limit, result in ladder.search(list(limits)):
            even = ladder.best_even(limit)
            yield Found(result, {} if even is None else {"even": ladder.plan(even)})

    return Approach(find, job.groups)


def _within_latency(args: argparse.Namespace, job: Job, costs: Costs, calls: int) -> Approach:
    rivals: dict[str, ReusePlan] = {}
    within: dict[str, Any] = {"latency": costs.latency, "budget": job.budgets[0], "order": args.order}
    groups = job.groups
    alike: dict[str, Sequence[Site]] = {job.about["kind"]: groups[0]}
    if args.layerwise:
        saving = sorted(zip(costs.reuse, costs.groups, strict=True))  # what saves most comes first
        groups = [g for saved, g in saving if -saved > LEAST * costs.plain]
        alike = alike_in(groups)
    fitting = {kind: starts(calls, sites, **within) for kind, sites in alike.items()}
    for kind, found in fitting.items():
        for name, plan in itertools.chain(*(plans.items() for plans in found)):
            rivals.setdefault(f"{name} {kind}", plan)  # the one with fewest reuse calls, which comes first
    within["how"] = rounds_of(args)
    others = [plan for plans in itertools.chain(*fitting.values()) for plan in plans.values()]

    def find(scores: ScoreMany) -> list[Found]:
        if args.layerwise:
            return [Found(layerwise(scores, calls, groups, others=others, **within), rivals)]
        return [Found(step_wise(scores, calls, groups[0], **within), rivals)]

    return Approach(find, groups)

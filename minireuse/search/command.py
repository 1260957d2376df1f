"""Search a plan: `python -m minireuse.search --steps 20 --reuse 10 --out plan.json`."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minireuse.common.journal import Journal
from minireuse.common.metrics import fidelity
from minireuse.common.options import (
    HelpFormatter,
    add_grid_options,
    add_guidance_option,
    add_model_options,
    grid,
    guidance_scale,
    load_model,
    loras_of,
    spacing_of,
)
from minireuse.common.ranks import Ranks, shared_status
from minireuse.common.status import command_line
from minireuse.files import read_prompts, write_whole
from minireuse.pipeline import Pipeline
from minireuse.plan import KINDS, ORDERS, ReusePlan, Site
from minireuse.policies import POLICIES, hurry, select
from minireuse.samplers import SAMPLERS
from minireuse.search.budget import alike_in, groups_of, layerwise, starts, step_wise
from minireuse.search.costs import Costs, measure, measured_latency
from minireuse.search.phast import Rounds, ScoreMany, SearchResult, improve
from minireuse.search.plan_files import read_plan
from minireuse.search.render import Renderer
from minireuse.search.scoring import Scoring

STARTS = ("hurry", "interval", "early")
HEAT = 4  # prompts on which all moves of a round are scored
FINALISTS = 8  # moves that are scored on all prompts
LEAST = 0.01  # of a plain call: groups that save less are not worth searching


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m minireuse.search",
        description="Search which U-Net calls should reuse (PHAST), scored by PSNR to the full sampler's images.",
        formatter_class=HelpFormatter,
    )
    add_grid_options(p)
    p.add_argument("--sampler", choices=list(SAMPLERS), default="ddim")
    reuse_help = "number of U-Net calls that reuse; default: half of the calls"
    p.add_argument("--reuse", type=int, nargs="+", metavar="N", help=reuse_help)
    latency_help = (
        "also choose the number of reuse calls, so that the plan takes at most R times the full sampler's time"
    )
    p.add_argument("--budget-latency", type=float, metavar="R", help=latency_help)
    layerwise_help = "allow a different row for each group of layers and kind; needs --budget-latency"
    p.add_argument("--layerwise", action="store_true", help=layerwise_help)
    p.add_argument("--kind", choices=KINDS, help="default: map; with --layerwise: all kinds")
    p.add_argument("--sites", choices=("self", "cross", "both"), default="both")
    branch_help = "for --kind deep: branch 0 computes the fewest layers; larger branches compute more"
    p.add_argument("--branch", type=int, default=0, help=branch_help)
    start_help = "the plan that a search with --reuse begins at"
    p.add_argument("--start", choices=STARTS, default="hurry", help=start_help)
    order_help = "1: extrapolate along the line through the last two values; 2: along the parabola through three"
    p.add_argument("--order", type=int, choices=ORDERS, default=0, help=order_help)
    add_guidance_option(p)
    p.add_argument("--prompts-file", type=Path, help="calibration prompts, one per line; default: the shipped model's")
    prompts_help = "number of prompts; prompt i uses seed SEED + i"
    p.add_argument("--prompts", type=int, default=16, metavar="N", help=prompts_help)
    p.add_argument("--seed", type=int, default=0, help="seed of the first prompt")
    check_help = "number of further prompts, on which the found plan is scored"
    p.add_argument("--check", type=int, default=8, metavar="N", help=check_help)
    exact_help = f"score every move on all prompts; without it, on {HEAT} of them, and the best {FINALISTS} on all"
    p.add_argument("--exact", action="store_true", help=exact_help)
    p.add_argument("--first", action="store_true", help="take the first move that improves, not the best of all")
    epsilon_help = "dB that a move has to gain for the search to go on"
    p.add_argument("--epsilon", type=float, default=0.02, metavar="DB", help=epsilon_help)
    p.add_argument("--steepest", action="store_true", help="what is done anyway; for commands of version 0.2")
    budget_help = "stop this run after N U-Net calls, or after N minutes (20min)"
    p.add_argument("--budget", metavar="N|Nmin", help=budget_help)
    add_model_options(p)
    out_help = "plan file; a folder where --reuse names several numbers"
    p.add_argument("--out", type=Path, required=True, help=out_help)
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    args = parser().parse_args(argv)
    return shared_status(lambda ranks: run(args, ranks, command_line("minireuse.search", argv)))


@dataclass(frozen=True)
class Job:
    """One plan to search: with k reuse calls, or, where k is None, within a latency."""

    out: Path
    groups: Sequence[Sequence[Site]]  # of sites that reuse together
    k: int | None
    about: dict[str, Any]  # what the answer depends on, beside what holds for all jobs

    @property
    def journal(self) -> Path:
        return self.out.with_suffix(".journal.jsonl")

    def finished(self, settings: dict[str, Any]) -> bool:
        """Whether the plan file holds the end of this very search."""
        if not self.out.exists():
            return False
        about = read_plan(self.out)[1]
        return about.get("finished") is True and about.items() >= json.loads(json.dumps(settings)).items()


@dataclass(frozen=True)
class Approach:
    """How a job is searched."""

    find: Callable[[ScoreMany], SearchResult]
    groups: Sequence[Sequence[Site]]  # of sites that reuse together; the journal's names of plans go by them
    rivals: dict[str, ReusePlan]  # to score on unseen prompts beside what is found


def run(args: argparse.Namespace, ranks: Ranks, command: str) -> None:
    """Search the plans that the arguments ask for. Raises: ValueError, OSError for bad input.

    command: what was typed, for the plan files.
    """
    more = parse_budget(args.budget)
    check_options(args)
    prompts = read_prompts(
        args.prompts_file, args.model, "calibration", args.prompts + args.check, "--prompts or --check"
    )
    pipeline = load_model(args, ranks.device(args.device))
    jobs = make_jobs(args, pipeline)
    for job in jobs:
        if job.out.exists() and not job.journal.exists():
            raise ValueError(f"{job.out} exists; remove it, or give another --out")
    ranks.gather(None)  # nobody writes before all have looked
    began = time.monotonic()
    calibration, unseen = prompts[: args.prompts], prompts[args.prompts :]
    render = make_renderer(args, pipeline, calibration, args.seed)
    calls = pipeline.calls(args.sampler, grid(args))
    reference = render(ReusePlan.nothing(calls))
    common = describe(args, pipeline, calibration)

    def score(images: np.ndarray, chosen: Sequence[int] | None = None) -> float:
        return float(fidelity(images, reference if chosen is None else reference[list(chosen)]).mean())

    def left() -> bool:  # other processes make about as many calls as this one
        return bool(more(render.calls * ranks.size, time.monotonic() - began))

    for job in jobs:
        settings = common | job.about
        if ranks.gather(job.finished(settings))[0]:
            if ranks.first:
                print(f"{job.out} holds the plan of this search already")
            continue
        if not all(ranks.gather(left())):
            raise ValueError(
                f"the budget of {args.budget} ended before the search for {job.out} began; give a larger one"
            )
        job.out.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(job.journal, settings) if ranks.first else Journal()
        costs = None if job.k is not None else known_costs(journal, pipeline, job.groups, args.order, ranks)
        way = approach(args, job, costs, calls)
        before = render.calls, render.naive_calls
        fits = lambda plan, costs=costs: costs is None or costs.latency(plan) <= args.budget_latency  # noqa: E731
        with progress(job.out.stem, fits, hidden=args.quiet or not ranks.first) as show:
            scores = Scoring(render, score, way.groups, journal=journal, more=left, on_try=show, ranks=ranks)
            result = way.find(scores)
        if ranks.first:
            about = settings | {
                "calls_made": render.calls - before[0],  # by this process, since the last resumption, like the next
                "calls_naive": render.naive_calls - before[1],
                "command": command,
            }
            report(args, pipeline, job.out, result, costs, about, unseen, way.rivals)


def check_options(args: argparse.Namespace) -> None:
    """Raises: ValueError for options that do not go together, or are out of range."""
    latency = args.budget_latency
    for name, least in (("prompts", 1), ("check", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected {least} or more")
    if not (math.isfinite(args.epsilon) and args.epsilon >= 0):
        raise ValueError(f"--epsilon is {args.epsilon}, expected dB from 0")
    if args.layerwise and latency is None:
        raise ValueError("--layerwise needs a time limit; add --budget-latency 0.7")
    if args.layerwise and args.branch:
        raise ValueError("--layerwise searches all branches; leave out --branch")
    if latency is not None and not 0 < latency < 1:
        raise ValueError(f"--budget-latency is {latency}, expected a fraction of the full sampler's time, such as 0.7")
    if latency is not None and args.reuse:
        raise ValueError("--budget-latency chooses how many calls reuse; give it or --reuse, not both")
    if latency is not None and args.start != "hurry":
        raise ValueError(f"--start {args.start} goes with --reuse; with --budget-latency a search finds its own start")


def rounds_of(args: argparse.Namespace) -> Rounds:
    """How the rounds of the search go over the moves."""
    exact = args.exact or args.first or args.prompts <= HEAT
    return Rounds(args.first, args.epsilon, None if exact else tuple(range(HEAT)), FINALISTS)


@contextmanager
def progress(
    title: str, fits: Callable[[ReusePlan], bool], *, hidden: bool
) -> Iterator[Callable[[ReusePlan, float, bool], None]]:
    """A progress bar, moved by `show(plan, value, whole)`, which is yielded; it shows the best plan that fits, too.

    whole: whether the value is of all prompts.
    """
    best = -math.inf
    with tqdm(desc=title, unit="plan", disable=hidden) as bar:

        def show(plan: ReusePlan, value: float, whole: bool) -> None:
            nonlocal best
            best = max(best, value) if whole and fits(plan) else best
            bar.set_postfix_str(f"{plan.grid or 'by site'} {value:.2f} dB, best {best:.2f}")
            bar.update()

        yield show


def report(
    args: argparse.Namespace,
    pipeline: Pipeline,
    out: Path,
    result: SearchResult,
    costs: Costs | None,
    about: dict[str, Any],
    unseen: list[str],
    rivals: dict[str, ReusePlan],
) -> None:
    """Measure what was found, write the plan file, and print a summary.

    about: what the plan file says beside the result. unseen: prompts on which the plan and its rivals are scored.
    """
    about = about | {
        "score": result.score,
        "score_start": result.start_score,
        "rounds": result.rounds,
        "finished": result.finished,
        "plans_tried": len(result.tried),
        "versions": f"torch {torch.__version__}, python {platform.python_version()}",
    }
    summary = f"{result.plan}\n{result.score:.2f} dB, started from {result.start_score:.2f}"
    latency = measured_latency(
        pipeline, result.plan, sampler=args.sampler, steps=grid(args), guidance_scale=args.guidance_scale
    )
    about |= {"latency": latency}
    summary += f", {latency:.2f} of the full sampler's time"
    if costs is not None:
        about |= {"costs": costs.to_json(), "latency_estimated": costs.latency(result.plan)}
        summary += f" ({costs.latency(result.plan):.2f} estimated)"
    if unseen:
        scores = score_unseen(args, pipeline, unseen, args.seed + args.prompts, {"phast": result.plan} | rivals)
        about |= {"unseen_prompts": unseen, "scores_unseen": scores}
        listed = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
        summary += f"; on {len(unseen)} unseen prompts {listed}"
    text = json.dumps(json.loads(result.plan.to_json()) | {"about": about}, indent=2) + "\n"
    write_whole([out], text.encode(), overwrite=True)  # only ever over a plan of this very search
    made, naive = about["calls_made"], about["calls_naive"]
    print(f"{summary}; {made} U-Net calls made, {naive} without sharing; {out}")


def make_jobs(args: argparse.Namespace, pipeline: Pipeline) -> list[Job]:
    """What the arguments ask for. Raises: ValueError for an impossible number of reuse calls, or files that clash."""
    calls = pipeline.calls(args.sampler, grid(args))
    kinds = [args.kind] if args.kind else list(KINDS) if args.layerwise else ["map"]
    groups: list[Sequence[Site]] = [select(pipeline.sites, args.sites, kind, args.branch) for kind in kinds]
    if args.layerwise:
        attention = set(itertools.chain(*groups))
        some = [s for s in pipeline.sites if s in attention or (s.kind == "deep" and "deep" in kinds)]
        groups = list(groups_of(some, len(pipeline.unet.config.block_out_channels)).values())
    about = {"kind": "layerwise" if args.layerwise else kinds[0], "kinds": kinds, "sites": args.sites}
    start = args.start if args.budget_latency is None else "the best that fits"
    about |= {"branch": args.branch, "order": args.order, "start": start}
    counts = [] if args.budget_latency is not None else args.reuse or [calls // 2]
    for k in counts:
        hurry(calls, groups[0], k=k)  # refuses an impossible number before any work
    stem = f"{args.sampler}-{args.steps if args.timesteps is None else 'listed'}-{about['kind']}"
    stem += f"-branch{args.branch}" * (args.branch > 0) + f"-order{args.order}" * args.order
    names = [f"{stem}-{value}.json" for value in counts or [args.budget_latency]]
    if args.out.suffix == ".json" and len(names) > 1:
        raise ValueError(f"--out {args.out} names one file for {len(names)} plans; give a folder")
    files = [args.out if args.out.suffix == ".json" else args.out / name for name in names]
    if counts:
        return [Job(out, groups, k, about | {"k": k}) for k, out in zip(counts, files, strict=True)]
    return [Job(files[0], groups, None, about | {"budget_latency": args.budget_latency})]


def approach(args: argparse.Namespace, job: Job, costs: Costs | None, calls: int) -> Approach:
    """The search a job calls for. costs: of calls that store or reuse, where the job has a latency to keep."""
    rivals: dict[str, ReusePlan] = {}
    if costs is None:
        sites = job.groups[0]
        simple = dict.fromkeys(("hurry", args.start))
        rivals = {n: replace(POLICIES[n](calls, sites, k=job.k), order=args.order) for n in simple}
        find = partial(improve, plan=rivals[args.start], sites=sites, k=job.k, how=rounds_of(args))
        return Approach(find, [sites], rivals)
    within: dict[str, Any] = {"latency": costs.latency, "budget": args.budget_latency, "order": args.order}
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
    if not args.layerwise:
        return Approach(partial(step_wise, calls=calls, sites=groups[0], **within), [groups[0]], rivals)
    others = [plan for plans in itertools.chain(*fitting.values()) for plan in plans.values()]
    return Approach(partial(layerwise, calls=calls, groups=groups, others=others, **within), groups, rivals)


def known_costs(
    journal: Journal, pipeline: Pipeline, groups: Sequence[Sequence[Site]], order: int, ranks: Ranks
) -> Costs:
    """Costs as the journal has them, or measured now by one process: a resumed search must go by the same ones."""
    if ranks.first:
        journal.known("costs", lambda: measure(pipeline, groups, order=order).to_json())
    return Costs.from_json(ranks.gather(journal.records.get("costs"))[0], pipeline.sites)


def make_renderer(args: argparse.Namespace, pipeline: Pipeline, prompts: list[str], seed: int) -> Renderer:
    seeds = [seed + i for i in range(len(prompts))]
    return Renderer(
        pipeline, prompts, seeds, sampler=args.sampler, steps=grid(args), guidance_scale=args.guidance_scale
    )


def score_unseen(
    args: argparse.Namespace, pipeline: Pipeline, prompts: list[str], seed: int, plans: dict[str, ReusePlan]
) -> dict[str, float]:
    """The score of each plan on prompts that the search has not seen."""
    render = make_renderer(args, pipeline, prompts, seed)
    reference = render(ReusePlan.nothing(next(iter(plans.values())).calls))
    return {name: float(fidelity(render(plan), reference).mean()) for name, plan in plans.items()}


def parse_budget(text: str | None) -> Any:
    """`more(calls, seconds) -> bool` for a number of U-Net calls ("5000") or minutes ("20min"). Raises: ValueError."""
    if text is None:
        return lambda calls, seconds: True
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(min)?", text)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"--budget is {text!r}, expected U-Net calls such as 5000, or minutes such as 20min")
    limit = float(match[1])
    if match[2]:
        return lambda calls, seconds: seconds < 60 * limit
    return lambda calls, seconds: calls < limit


def describe(args: argparse.Namespace, pipeline: Pipeline, prompts: list[str]) -> dict[str, Any]:
    """What every answer depends on: a journal must agree with it to be resumed."""
    return {
        "model": pipeline.fingerprint,
        "prediction_type": pipeline.schedule.prediction_type,
        "sampler": args.sampler,
        "steps": grid(args),
        "spacing": spacing_of(grid(args), pipeline),
        "guidance_scale": guidance_scale(args, pipeline),
        "prompts": prompts,
        "first_seed": args.seed,
        "rounds_go": asdict(rounds_of(args)),
        "dtype": str(pipeline.dtype),
        **loras_of(pipeline),
    }

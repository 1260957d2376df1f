"""Search a plan: `python -m minireuse.search --steps 20 --reuse 10 --out plan.json`."""

from __future__ import annotations

import argparse
import math
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
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
from minireuse.samplers import SAMPLERS
from minireuse.search.costs import Costs, measure, measured_latency
from minireuse.search.jobs import DEPTH, FINALISTS, HEAT, Found, approach, make_jobs, rounds_of
from minireuse.search.plan_files import plan_text
from minireuse.search.render import Renderer
from minireuse.search.scoring import Scoring

STARTS = ("hurry", "interval", "early")


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
        "also choose the number of reuse calls, so that the plan takes at most R times the full sampler's time; "
        "several make several plans"
    )
    p.add_argument("--budget-latency", type=float, nargs="+", metavar="R", help=latency_help)
    layerwise_help = "allow a different row for each group of layers and kind; needs --budget-latency"
    p.add_argument("--layerwise", action="store_true", help=layerwise_help)
    kind_help = (
        f"default: map; with --layerwise: all kinds; {DEPTH}: deep features of every branch and predictions, so that "
        "each call runs as much of the U-Net as it needs (with --budget-latency)"
    )
    p.add_argument("--kind", choices=(*KINDS, DEPTH), help=kind_help)
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
    out_help = "plan file; a folder where several plans are asked for"
    p.add_argument("--out", type=Path, required=True, help=out_help)
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    args = parser().parse_args(argv)
    return shared_status(lambda ranks: run(args, ranks, command_line("minireuse.search", argv)))


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
    # The last ones of the file are left unseen, whatever the number of prompts that a search sees.
    unseen = list(enumerate(prompts))[len(prompts) - args.check :]
    calibration = prompts[: args.prompts]
    common = describe(args, pipeline, calibration)
    ended = {out: job.state(i, common | job.about) for job in jobs for i, out in enumerate(job.outs)}
    ended = ranks.gather(ended)[0]  # nobody writes before all have looked
    began = time.monotonic()
    render = make_renderer(args, pipeline, list(enumerate(calibration)))
    calls = pipeline.calls(args.sampler, grid(args))
    reference = render(ReusePlan.nothing(calls))

    def score(images: np.ndarray, chosen: Sequence[int] | None = None) -> float:
        return float(fidelity(images, reference if chosen is None else reference[list(chosen)]).mean())

    def left() -> bool:  # other processes make about as many calls as this one
        return bool(more(render.calls * ranks.size, time.monotonic() - began))

    for job in jobs:
        settings = common | job.about
        if ranks.first:
            for out in job.outs:
                if ended[out]:
                    print(f"{out} holds the plan of this search already")
        if all(ended[out] for out in job.outs):
            continue
        if not all(ranks.gather(left())):
            raise ValueError(
                f"the budget of {args.budget} ended before the search for {job.outs[0]} began; give a larger one"
            )
        job.outs[0].parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(job.journal, settings) if ranks.first else Journal()
        costs = None if job.k is not None else known_costs(journal, pipeline, job.groups, args.order, ranks)
        way = approach(args, job, costs, calls)
        before = render.calls, render.naive_calls
        with progress(job.outs[0].stem, hidden=args.quiet or not ranks.first) as show:
            scores = Scoring(render, score, way.groups, journal=journal, more=left, on_try=show, ranks=ranks)
            for out, budget, found in zip(job.outs, job.budgets, way.find(scores), strict=False):
                if ranks.first and not ended[out]:
                    about = settings | {
                        **({} if budget is None else {"budget_latency": budget}),
                        "calls_made": render.calls - before[0],  # by this process, since the last resumption
                        "calls_naive": render.naive_calls - before[1],
                        "command": command,
                    }
                    report(args, pipeline, out, found, costs, about, unseen)
                ranks.gather(None)  # nobody works while one measures time


def check_options(args: argparse.Namespace) -> None:
    """Raises: ValueError for options that do not go together, or are out of range."""
    latencies = args.budget_latency or []
    for name, least in (("prompts", 1), ("check", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected {least} or more")
    if not (math.isfinite(args.epsilon) and args.epsilon >= 0):
        raise ValueError(f"--epsilon is {args.epsilon}, expected dB from 0")
    if args.layerwise and not latencies:
        raise ValueError("--layerwise needs a time limit; add --budget-latency 0.7")
    if args.layerwise and args.branch:
        raise ValueError("--layerwise searches all branches; leave out --branch")
    if args.kind == DEPTH and (not latencies or args.layerwise or args.branch or args.first or args.sites != "both"):
        raise ValueError(
            f"--kind {DEPTH} searches all branches within a latency; add --budget-latency 0.6, "
            "and leave out --layerwise, --branch, --first and --sites"
        )
    for latency in latencies:
        if not 0 < latency < 1:
            expected = "expected a fraction of the full sampler's time, such as 0.7"
            raise ValueError(f"--budget-latency is {latency}, {expected}")
    if len(set(latencies)) < len(latencies):
        raise ValueError("--budget-latency names a latency twice; name each once")
    if latencies and args.reuse:
        raise ValueError("--budget-latency chooses how many calls reuse; give it or --reuse, not both")
    if latencies and args.start != "hurry":
        raise ValueError(f"--start {args.start} goes with --reuse; with --budget-latency a search finds its own start")


@contextmanager
def progress(title: str, *, hidden: bool) -> Iterator[Callable[[ReusePlan, float, bool], None]]:
    """A progress bar, moved by `show(plan, value, whole)`, which is yielded."""
    with tqdm(desc=title, unit="plan", disable=hidden) as bar:

        def show(plan: ReusePlan, value: float, whole: bool) -> None:
            bar.set_postfix_str(f"{plan.grid or 'by site'} {value:.2f} dB{' on some prompts' * (not whole)}")
            bar.update()

        yield show


def report(
    args: argparse.Namespace,
    pipeline: Pipeline,
    out: Path,
    found: Found,
    costs: Costs | None,
    about: dict[str, Any],
    unseen: Sequence[tuple[int, str]],
) -> None:
    """Measure what was found, write the plan file, and print a summary.

    about: what the plan file says beside the result. unseen: numbered prompts, on which the plan and its rivals are
    scored.
    """
    result = found.result
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
        scores = score_unseen(args, pipeline, unseen, {"phast": result.plan} | found.rivals)
        about |= {"unseen_prompts": [prompt for _, prompt in unseen], "scores_unseen": scores}
        listed = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
        summary += f"; on {len(unseen)} unseen prompts {listed}"
    text = plan_text(result.plan, pipeline.call_timesteps(args.sampler, grid(args)), about)
    write_whole([out], text.encode(), overwrite=True)  # only ever over a plan of this very search
    made, naive = about["calls_made"], about["calls_naive"]
    print(f"{summary}; {made} U-Net calls made, {naive} without sharing; {out}")


def known_costs(
    journal: Journal, pipeline: Pipeline, groups: Sequence[Sequence[Site]], order: int, ranks: Ranks
) -> Costs:
    """Costs as the journal has them, or measured now by one process: a resumed search must go by the same ones."""
    if ranks.first:
        journal.known("costs", lambda: measure(pipeline, groups, order=order).to_json())
    return Costs.from_json(ranks.gather(journal.records.get("costs"))[0], pipeline.sites)


def make_renderer(args: argparse.Namespace, pipeline: Pipeline, prompts: Sequence[tuple[int, str]]) -> Renderer:
    """prompts: with their numbers, from which their seeds follow."""
    return Renderer(
        pipeline,
        [prompt for _, prompt in prompts],
        [args.seed + number for number, _ in prompts],
        sampler=args.sampler,
        steps=grid(args),
        guidance_scale=args.guidance_scale,
    )


def score_unseen(
    args: argparse.Namespace,
    pipeline: Pipeline,
    prompts: Sequence[tuple[int, str]],
    plans: dict[str, ReusePlan],
) -> dict[str, float]:
    """The score of each plan on prompts that the search has not seen."""
    render = make_renderer(args, pipeline, prompts)
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

"""Search a plan: `python -m minireuse.search --steps 20 --reuse 10 --out plan.json`."""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minireuse import phast
from minireuse.files import read_lines, shipped_model, write_whole
from minireuse.metrics import psnr
from minireuse.pipeline import Pipeline, load
from minireuse.policies import hurry, select
from minireuse.render import Renderer
from minireuse.reuse import KINDS, ReusePlan
from minireuse.samplers import SAMPLERS

CEILING = 100.0  # dB counted for an image equal to the full sampler's, whose PSNR is infinite


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m minireuse.search",
        description="Search which U-Net calls should reuse (PHAST), scored by PSNR to the full sampler's images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--sampler", choices=list(SAMPLERS), default="ddim")
    p.add_argument("--reuse", type=int, nargs="+", metavar="K", help="calls that reuse; default: half of them")
    p.add_argument("--kind", choices=KINDS, default="map")
    p.add_argument("--sites", choices=("self", "cross", "both"), default="both")
    p.add_argument("--guidance-scale", type=float, default=7.5)
    p.add_argument("--prompts-file", type=Path, help="calibration prompts, one per line; default: the shipped model's")
    p.add_argument("--prompts", type=int, default=8, metavar="N", help="how many of them; prompt i takes seed i")
    p.add_argument("--seed", type=int, default=0, help="seed of the first prompt")
    p.add_argument("--check", type=int, default=8, metavar="N", help="further prompts, for scoring the plan found")
    p.add_argument("--first", action="store_true", help="take the first move that improves, not the best of all")
    p.add_argument("--budget", metavar="N|Nmin", help="stop after so many U-Net calls, or minutes")
    p.add_argument("--model", type=Path, metavar="PATH")
    p.add_argument("--tokenizer", metavar="PATH|NAME")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--out", type=Path, required=True, help="plan file; a folder for several K")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    args = parser().parse_args(argv)
    args.command = shlex.join(["python", "-m", "minireuse.search", *(sys.argv[1:] if argv is None else argv)])
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the journal", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    """Search one plan for each K. Raises: ValueError, OSError for bad input."""
    more = parse_budget(args.budget)
    prompts = read_prompts(args.prompts_file, args.model, args.prompts + args.check)
    pipeline = load(args.model, device=args.device, dtype=args.dtype, tokenizer=args.tokenizer)
    calls = pipeline.calls(args.sampler, args.steps)
    counts = args.reuse or [calls // 2]
    as_file = args.out.suffix == ".json"
    if as_file and len(counts) > 1:
        raise ValueError(f"--out {args.out} names one file for {len(counts)} plans; give a folder")
    sites = select(pipeline.sites, args.sites, args.kind)
    starts = {k: hurry(calls, sites, k=k) for k in counts}  # refuses an impossible k before any work
    files = {k: args.out if as_file else args.out / f"{args.sampler}-{args.steps}-{args.kind}-{k}.json" for k in counts}
    for out in files.values():
        if out.exists() and not _journal(out).exists():
            raise ValueError(f"{out} exists; remove it, or give another --out")
        out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    calibration, unseen = prompts[: args.prompts], prompts[args.prompts :]
    render = make_renderer(args, pipeline, calibration, args.seed)
    reference = render(ReusePlan.nothing(calls))
    for k, start in starts.items():
        if not more(render.calls, time.monotonic() - began):
            raise ValueError(f"--budget {args.budget} was spent before the search for k = {k} began; give a larger one")
        out, settings = files[k], describe(args, pipeline, calibration, k)
        journal = phast.Journal(_journal(out), settings)
        before = render.calls, render.naive_calls
        with tqdm(desc=f"k = {k}", unit="plan", disable=args.quiet) as bar:

            def show(plan: ReusePlan, value: float, best: float, bar: tqdm = bar) -> None:
                bar.set_postfix_str(f"{plan} {value:.2f} dB, best {best:.2f}")
                bar.update()

            result = phast.search(
                render,
                start,
                sites,
                k=k,
                score=lambda images: fidelity(images, reference),
                journal=journal,
                steepest=not args.first,
                more=lambda: more(render.calls, time.monotonic() - began),
                on_try=show,
            )
        spent, naive = render.calls - before[0], render.naive_calls - before[1]
        about = settings | {
            "score": result.score,
            "score_hurry": result.start_score,
            "rounds": result.rounds,
            "finished": result.finished,
            "plans_tried": len(result.tried),
            "calls_made": spent,  # since the last resumption, like the next
            "calls_naive": naive,
            "command": args.command,
            "versions": f"torch {torch.__version__}, python {platform.python_version()}",
        }
        summary = f"{result.plan}  {result.score:.2f} dB, HURRY {result.start_score:.2f}"
        if unseen:
            scores = check(args, pipeline, unseen, args.seed + args.prompts, {"phast": result.plan, "hurry": start})
            about |= {"unseen_prompts": unseen, "score_unseen": scores["phast"], "score_unseen_hurry": scores["hurry"]}
            summary += f"; on {len(unseen)} unseen prompts {scores['phast']:.2f}, HURRY {scores['hurry']:.2f}"
        text = json.dumps(json.loads(result.plan.to_json()) | {"about": about}, indent=2) + "\n"
        write_whole([out], text.encode(), overwrite=True)  # only ever over a plan of this very search
        print(f"{summary}; {spent} U-Net calls made, {naive} without sharing; {out}")


def _journal(out: Path) -> Path:
    return out.with_suffix(".journal.jsonl")


def make_renderer(args: argparse.Namespace, pipeline: Pipeline, prompts: list[str], seed: int) -> Renderer:
    seeds = [seed + i for i in range(len(prompts))]
    return Renderer(
        pipeline, prompts, seeds, sampler=args.sampler, steps=args.steps, guidance_scale=args.guidance_scale
    )


def fidelity(images: np.ndarray, reference: np.ndarray) -> float:
    """Mean PSNR in dB, an equal image counted as `CEILING`."""
    return float(np.minimum(psnr(images, reference), CEILING).mean())


def check(
    args: argparse.Namespace, pipeline: Pipeline, prompts: list[str], seed: int, plans: dict[str, ReusePlan]
) -> dict[str, float]:
    """The score of each plan on prompts that the search has not seen."""
    render = make_renderer(args, pipeline, prompts, seed)
    reference = render(ReusePlan.nothing(next(iter(plans.values())).calls))
    return {name: fidelity(render(plan), reference) for name, plan in plans.items()}


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


def read_prompts(path: Path | None, model: Path | None, count: int) -> list[str]:
    """The first `count` prompts of a file. Raises: ValueError where there are fewer."""
    if path is None and model is not None:
        raise ValueError("no calibration prompts are known for this model; give --prompts-file, one prompt per line")
    path = path or shipped_model() / "prompts" / "calibration.txt"
    prompts = read_lines(path)
    if count < 1 or len(prompts) < count:
        raise ValueError(f"{path} holds {len(prompts)} prompts, {count} are wanted; lower --prompts or --check")
    return prompts[:count]


def describe(args: argparse.Namespace, pipeline: Pipeline, prompts: list[str], k: int) -> dict[str, Any]:
    """All that the answer depends on: what a journal must agree with to be resumed."""
    return {
        "model": pipeline.fingerprint,
        "sampler": args.sampler,
        "steps": args.steps,
        "spacing": pipeline.schedule.spacing,
        "k": k,
        "kind": args.kind,
        "sites": args.sites,
        "guidance_scale": args.guidance_scale,
        "prompts": prompts,
        "first_seed": args.seed,
        "steepest": not args.first,
        "dtype": str(pipeline.dtype),
    }


if __name__ == "__main__":
    sys.exit(main())

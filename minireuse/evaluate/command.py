"""Compare policies in one run: `python -m minireuse.evaluate --policies hurry phast steps:13 --out results`."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from minireuse.cache import ReuseCache
from minireuse.common.journal import Journal
from minireuse.common.metrics import fidelity, ssim
from minireuse.common.options import (
    HelpFormatter,
    add_grid_options,
    add_guidance_option,
    add_model_options,
    count_of,
    grid,
    guidance_scale,
    load_model,
    loras_of,
    spacing_of,
)
from minireuse.common.ranks import Ranks, shared_status
from minireuse.common.status import command_line
from minireuse.common.timing import alternate
from minireuse.evaluate.classifier import own_classifier
from minireuse.evaluate.distribution import EXTRACTORS, Follow, extractor, prompt_check, score_all
from minireuse.evaluate.report import FULL, KERNELS, summarise, write_report
from minireuse.files import read_prompts, write_whole
from minireuse.pipeline import Pipeline, Result
from minireuse.plan import ReusePlan
from minireuse.samplers import SAMPLERS
from minireuse.search import Renderer, build, policies_for, takes_count

SEARCHED = ("phast", "phast:kind=map", "phast:kind=out", "phast:kind=deep")
LINES = ("phast:kind=map,order=1", "phast:kind=out,order=1", "phast:kind=deep,order=1")
DEFAULT = ("hurry", *SEARCHED, *LINES, "interval", "deepcache", "tgate", "pab")
SEED = 1000  # of the first prompt; searches use those from 0
T = TypeVar("T")
FEWER = (0.75, 0.65, 0.5)  # of the steps, for the plain sampler


@dataclass(frozen=True)
class Row:
    """One way to sample: a policy, or the plain sampler with fewer steps."""

    name: str
    steps: int | tuple[float, ...]
    plan: ReusePlan
    note: str = ""  # what the policy had to say: that it took another plan than asked for


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m minireuse.evaluate",
        description="Fidelity to the full sampler, time and memory of policies, on the same prompts, in one run.",
        formatter_class=HelpFormatter,
    )
    names = "names with knobs, plan files, joined by |, and steps:N for the plain sampler with fewer steps"
    p.add_argument("--policies", nargs="+", metavar="POLICY", help=names)
    p.add_argument("--sampler", choices=list(SAMPLERS), default="ddim")
    add_grid_options(p)
    reuse_help = "number of reusing calls, for policies that do not set k; default: half of the calls"
    p.add_argument("--reuse", type=int, metavar="N", help=reuse_help)
    add_guidance_option(p)
    p.add_argument("--prompts-file", type=Path, help="one per line; default: the shipped model's evaluation prompts")
    prompts_help = "number of prompts; prompt i uses seed SEED + i"
    p.add_argument("--prompts", type=int, default=40, metavar="N", help=prompts_help)
    p.add_argument("--seed", type=int, default=SEED, help="seed of the first prompt; searches use those from 0")
    p.add_argument("--batch-size", type=int, default=4, metavar="N", help="prompts rendered together")
    rounds_help = "number of timing rounds; each round times every policy once; 0 skips timing"
    p.add_argument("--rounds", type=int, default=7, help=rounds_help)
    equal_help = "for each policy, add the plain sampler that takes the same time"
    p.add_argument("--equal-latency", action="store_true", help=equal_help)
    against_help = "also print each row's paired difference to this row"
    p.add_argument("--against", default=FULL, metavar="POLICY", help=against_help)
    fid_help = "Fréchet distance to the full sampler's images, computed from these features"
    p.add_argument("--fid", choices=EXTRACTORS, help=fid_help)
    p.add_argument("--clip-score", metavar="MODEL", help="a CLIP model on the hub, or a folder")
    check_help = "Python file that scores how well images follow prompts; default: the shipped model's classifier"
    p.add_argument("--check", type=Path, metavar="FILE.py", help=check_help)
    add_model_options(p)
    p.add_argument("--out", type=Path, required=True, help="a folder: results.json, table.md, plots, images")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    args = parser().parse_args(argv)
    return shared_status(lambda ranks: run(args, ranks, command_line("minireuse.evaluate", argv)))


def run(args: argparse.Namespace, ranks: Ranks, command: str) -> None:
    """Evaluate and write the report. Raises: ValueError, OSError for bad input.

    command: what was typed, for the report.
    """
    for name in ("prompts", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 1 or more")
    if args.equal_latency and args.rounds < 1:
        raise ValueError("--equal-latency needs times; give --rounds 1 or more")
    begun = (args.out / "journal.jsonl").exists()
    if (args.out / "results.json").exists() or (not begun and args.out.is_dir() and any(args.out.iterdir())):
        raise ValueError(f"{args.out} holds results or other files already; remove them, or name another folder")
    count = count_of(grid(args))
    fewer = dict.fromkeys(f"steps:{max(1, round(count * f))}" for f in FEWER)
    policies = [*DEFAULT, *fewer] if args.policies is None else args.policies
    prompts = read_prompts(args.prompts_file, args.model, "evaluation", args.prompts, "--prompts")[: args.prompts]
    classifier = own_classifier(args.model)
    follow = prompt_check(args.check) if args.check else classifier and classifier.follow
    pipeline = load_model(args, ranks.device(args.device))
    features = extractor(args.fid, pipeline.vae, classifier)
    rows = make_rows(args, pipeline, policies)
    if args.against not in {row.name for row in rows}:
        raise ValueError(f"--against is {args.against!r}, expected one of {', '.join(row.name for row in rows)}")
    settings = describe(args, pipeline, prompts, rows)
    args.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.out / "journal.jsonl", settings) if ranks.first else Journal()

    # Time first, by one process alone: which plain sampler takes equally long decides what is rendered.
    timings = ranks.gather(measure(args, pipeline, rows, prompts[0], journal) if ranks.first else None)[0]
    twins = {kernel: equals(rows, timings, kernel) for kernel in KERNELS} if args.equal_latency else {}
    wanted = {FULL, args.against, *policies, *(twin for pairs in twins.values() for twin in pairs.values())}
    rendered = [row for row in rows if row.name in wanted]
    scores = judge(args, pipeline, rendered, prompts, follow, journal, ranks)
    if ranks.first:
        pictures = {row.name: picture(args.out, row.name, 0).parent for row in rendered}
        sets, notes = score_all(pictures, prompts, features, args.clip_score)
        results = {
            "settings": settings,
            "command": command,
            "versions": f"torch {torch.__version__}, python {platform.python_version()}, "
            f"{pipeline.device}, {torch.get_num_threads()} threads",
            "rows": {
                row.name: {
                    "plan": row.plan.grid,
                    "order": row.plan.order,
                    "calls": row.plan.calls,
                    "reused": row.plan.reused,
                    **scores[row.name],
                    **sets[row.name],
                    "note": row.note,
                    **timings.get(row.name, {}),
                }
                for row in rendered
            },
            "equal_latency": twins,
        }
        text = write_report(args.out, summarise(results, args.against), pictures, prompts)
        write_whole([args.out / "results.json"], json.dumps(results, indent=1).encode())  # last: it marks the end
        print(text, *notes, sep="\n")


def make_rows(args: argparse.Namespace, pipeline: Pipeline, names: Sequence[str]) -> list[Row]:
    """The full sampler, the policies named and, for --equal-latency, the plain sampler with every step count."""
    steps = grid(args)
    timesteps, count = pipeline.call_timesteps(args.sampler, steps), count_of(steps)
    calls, spacing = len(timesteps), spacing_of(steps, pipeline)
    policies = policies_for("|".join(names), args.model, args.sampler, lambda: pipeline.fingerprint, spacing, timesteps)
    rows = {FULL: Row(FULL, steps, ReusePlan.nothing(calls))}
    fewer = [f"steps:{n}" for n in range(2, count)] if args.equal_latency else []
    for text in dict.fromkeys([*names, *fewer]):
        kind, _, number = text.partition(":")
        if kind == "steps":
            if not number.isdigit() or not int(number) > 0:
                raise ValueError(f"{text!r} is not a number of steps, such as steps:13")
            rows[text] = Row(text, int(number), ReusePlan.nothing(pipeline.calls(args.sampler, int(number))))
        else:
            k = args.reuse if takes_count(text, policies) else None
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                plan = build(text, calls, pipeline.sites, k=k, policies=policies).on(pipeline.sites)
            plan.check_calls(calls, args.sampler)
            rows[text] = Row(text, steps, plan, "; ".join(str(w.message) for w in said))
    return list(rows.values())


def measure(
    args: argparse.Namespace, pipeline: Pipeline, rows: Sequence[Row], prompt: str, journal: Journal
) -> dict[str, dict[str, Any]]:
    """Seconds of the sampling loop and of everything, of one image, the rows in turn; and the cache's peak.

    By row: seconds, seconds_total, seconds_explicit (every attention map written out), each a list over rounds.
    """
    works = {row.name: partial(time_row, args, pipeline, prompt, row) for row in rows}
    measured = timed_rounds(journal, args.rounds, works, args.quiet)
    kinds = ("seconds", "seconds_total", "seconds_explicit")
    return {
        row.name: {kind: [found[row.name][kind] for found in measured] for kind in kinds}
        | {"cache_peak_bytes": measured[0][row.name]["cache_peak_bytes"] if measured else 0}
        for row in rows
    }


def timed_rounds(
    journal: Journal, rounds: int, works: Mapping[str, Callable[[], T]], quiet: bool = False
) -> list[dict[str, T]]:
    """What each work measures in each round: known from the journal, or measured now, once warmed up.

    Each round has an order of its own, so that no work always runs after the same one.
    """
    warmup, names = 1, list(works)
    for i in tqdm(range(rounds), desc="time", disable=quiet):
        if f"round {i}" in journal.records:
            continue
        order = np.random.default_rng(i).permutation(len(names))
        found = alternate({names[j]: works[names[j]] for j in order}, rounds=1, warmup=warmup)
        journal.add(f"round {i}", {name: value for name, (value,) in found.items()})
        warmup = 0
    return [journal.records[f"round {i}"] for i in range(rounds)]


def time_row(args: argparse.Namespace, pipeline: Pipeline, prompt: str, row: Row) -> dict[str, float]:
    """Seconds of one image with the fused kernel and with every map written out; and the bytes of the cache."""

    def generate(attention: str) -> Result:
        return pipeline.generate(
            prompt,
            steps=row.steps,
            sampler=args.sampler,
            guidance_scale=args.guidance_scale,
            seeds=args.seed,
            plan=row.plan,
            cache=ReuseCache(),
            attention=attention,
        )

    began = time.perf_counter()
    result = generate("fused")
    return {
        "seconds_total": time.perf_counter() - began,
        "seconds": result.seconds,
        "cache_peak_bytes": result.cache_peak_bytes,
        "seconds_explicit": generate("explicit").seconds,
    }


def equals(rows: Sequence[Row], timings: dict[str, dict[str, Any]], kernel: str) -> dict[str, str]:
    """For each policy the plain sampler whose time is nearest to its own, both with this kernel."""
    seconds = {row.name: float(np.median(timings[row.name][kernel])) for row in rows}
    plain = [name for name in seconds if name == FULL or name.startswith("steps:")]
    return {
        row.name: min(plain, key=lambda name: abs(seconds[name] - seconds[row.name]))
        for row in rows
        if row.name not in plain
    }


def judge(
    args: argparse.Namespace,
    pipeline: Pipeline,
    rows: Sequence[Row],
    prompts: Sequence[str],
    follow: Follow | None,
    journal: Journal,
    ranks: Ranks,
) -> dict[str, dict[str, list]]:
    """Fidelity of every row to the full sampler, prompt by prompt; ranks take batches in turn.

    What a batch holds does not depend on the number of ranks, nor does any figure.
    """
    known = dict(ranks.gather(journal.records)[0])
    starts = range(0, len(prompts), args.batch_size)
    missing = [start for start in starts if any(f"{row.name}/{start}" not in known for row in rows)]
    turns = [missing[i : i + ranks.size] for i in range(0, len(missing), ranks.size)]
    for turn in tqdm(turns, desc="render", disable=args.quiet or not ranks.first):
        own: dict[str, Any] = {}
        if ranks.rank < len(turn):
            start = turn[ranks.rank]
            own = judge_batch(args, pipeline, rows, prompts[start : start + args.batch_size], start, follow)
        for key, value in itertools.chain(*(found.items() for found in ranks.gather(own))):
            known[key] = value
            journal.add(key, value)
    return {
        row.name: {
            measure: [v for start in starts for v in known[f"{row.name}/{start}"][measure]]
            for measure in ("psnr", "ssim", "follows")
        }
        for row in rows
    }


def judge_batch(
    args: argparse.Namespace,
    pipeline: Pipeline,
    rows: Sequence[Row],
    prompts: Sequence[str],
    start: int,
    follow: Follow | None,
) -> dict[str, dict[str, list]]:
    """The figures of one batch by row, and its pictures in the output folder."""
    seeds = [args.seed + start + i for i in range(len(prompts))]
    renderers = {
        steps: Renderer(pipeline, prompts, seeds, sampler=args.sampler, steps=steps, guidance_scale=args.guidance_scale)
        for steps in {row.steps for row in rows}
    }
    reference = renderers[grid(args)](next(row.plan for row in rows if row.name == FULL))
    found = {}
    for row in rows:
        images = renderers[row.steps](row.plan)
        save_pictures(args.out, row.name, start, images)
        found[f"{row.name}/{start}"] = {
            "psnr": fidelity(images, reference).tolist(),
            "ssim": ssim(images, reference).tolist(),
            "follows": [None] * len(images) if follow is None else follow(list(images), prompts),
        }
    return found


def picture(out: Path, row: str, index: int) -> Path:
    """Where the picture of one prompt lies. A row's name may hold what a file's may not."""
    return out / "images" / "".join(c if c.isalnum() or c in "-_=.," else "_" for c in row) / f"{index:05d}.png"


def save_pictures(out: Path, row: str, start: int, images: np.ndarray) -> None:
    """Write the pictures of the prompts from number `start` on."""
    for i, image in enumerate(images, start):
        path = picture(out, row, i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def describe(args: argparse.Namespace, pipeline: Pipeline, prompts: list[str], rows: Sequence[Row]) -> dict[str, Any]:
    """What the figures depend on: a journal must agree with it to be resumed."""
    return {
        "model": pipeline.fingerprint,
        "prediction_type": pipeline.schedule.prediction_type,
        "sampler": args.sampler,
        "steps": grid(args),
        "spacing": spacing_of(grid(args), pipeline),
        "guidance_scale": guidance_scale(args, pipeline),
        "policies": {r.name: hashlib.sha256(r.plan.to_json().encode()).hexdigest()[:12] for r in rows},
        "check": str(args.check),
        "equal_latency": args.equal_latency,
        "prompts": prompts,
        "first_seed": args.seed,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "dtype": str(pipeline.dtype),
        **loras_of(pipeline),
    }

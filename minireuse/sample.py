"""Generate images from prompts: `python -m minireuse.sample --prompt "..." --policy hurry`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from minireuse.command import exit_status
from minireuse.files import read_lines, write_whole
from minireuse.forecast import Forecast, forecast
from minireuse.maps import MapRecorder, words_of
from minireuse.memory import choose, weigh
from minireuse.options import CACHE_DTYPES, load_model, mebibytes, parse_bytes, sample_parser
from minireuse.pipeline import ATTENTIONS, Pipeline
from minireuse.policies import build, policies_for, select
from minireuse.recipe import SHIPPED, Recipe, digest_of, from_png, to_png, versions
from minireuse.reuse import ReuseCache, ReusePlan
from minireuse.samplers import SAMPLERS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    args = sample_parser().parse_args(argv)
    return exit_status(lambda: tell(args, run(args)))


def tell(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print what was done: JSON, a line, or nothing."""
    if args.json:
        print(json.dumps(report, indent=2))
    elif args.dry_run:
        for site, size in report["sites"].items():
            print(f"{mebibytes(size):>14}  {site}")
        print(f"{mebibytes(report['cache_peak_bytes']):>14}  at once, for a batch of {report['batch']}")
    elif not args.quiet:
        calls, reused = report["calls"], report["reused"]
        files = report["images"][0] if len(report["images"]) == 1 else f"{len(report['images'])} images"
        peak = mebibytes(report["cache_peak_bytes"])
        print(f"{report['seconds']:.2f} s, {calls} calls ({reused} reused), cache peak {peak}, {files}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the arguments say. Returns what `--json` prints. Raises: ValueError, OSError for bad input."""
    started = time.perf_counter()
    again = None if args.from_png is None else replay(args)
    jobs = list(itertools.product(_prompts(args), _seeds(args))) if again is None else list(again.jobs)
    wanted = range(len(jobs)) if again is None else [again.place]
    targets = _targets(args.out, len(wanted))
    _check(args)
    pipeline = load_model(args, "meta" if args.dry_run else None)
    if again is not None and again.fingerprint != pipeline.fingerprint:
        raise ValueError(f"{args.from_png} was made by another model than {_model_name(args)}; give its with --model")
    init_image = None if args.init_image is None else _read_image(args.init_image, args, pipeline)
    strength = None if init_image is None else args.strength
    calls = pipeline.calls(args.sampler, args.steps, strength)
    plan = again.plan if again is not None else _plan(args, pipeline, calls)
    if args.dry_run:
        return foretell(args, pipeline, plan, min(len(jobs), args.batch_size))
    if args.cache_budget is not None:
        plan = within_budget(args, pipeline, plan, min(len(jobs), args.batch_size), jobs[0])

    recipe = _recipe(args, pipeline, plan)
    seconds, peak, written = 0.0, 0, list[Path]()
    batches = [jobs[i : i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
    steps = len(pipeline.timesteps(args.steps, strength)) * len(batches)
    hidden = args.quiet or args.json
    with tqdm(total=steps, desc=plan.grid or "reuse by site", unit="step", disable=hidden, dynamic_ncols=True) as bar:
        for number, batch in enumerate(batches):
            prompts = [prompt for prompt, _ in batch]
            cache = _cache(args, pipeline, plan, prompts, len(written))
            try:
                result = pipeline.generate(
                    prompts,
                    negative_prompts=args.negative_prompt,
                    steps=args.steps,
                    sampler=args.sampler,
                    guidance_scale=args.guidance_scale,
                    seeds=[seed for _, seed in batch],
                    height=args.height,
                    width=args.width,
                    plan=plan,
                    init_images=None if init_image is None else init_image.expand(len(batch), -1, -1, -1),
                    strength=args.strength,
                    eta=args.eta,
                    cache=cache,
                    attention=args.attention,
                    on_step=lambda step: bar.update(),
                    wrap=cache.wrap if isinstance(cache, MapRecorder) else None,
                    watch=select(pipeline.sites, args.sites) if isinstance(cache, MapRecorder) else (),
                )
            except RuntimeError as error:
                raise _out_of_memory(error, args, plan, len(batch)) from error
            if isinstance(cache, MapRecorder):
                cache.finish(result.images, (result.latents.shape[2], result.latents.shape[3]))
            seconds, peak = seconds + result.seconds, max(peak, result.cache_peak_bytes)
            for place, image in enumerate(result.images):
                if number * args.batch_size + place in wanted:
                    png = to_png(image, replace(recipe, jobs=tuple(batch), place=place))
                    written.append(write_whole(targets(), png, overwrite=args.overwrite))
    return {
        "images": [str(path) for path in written],
        "seconds": seconds,
        "seconds_total": time.perf_counter() - started,
        "calls": calls,
        "reused": plan.reused,
        "cache_peak_bytes": peak,
        "plan": plan.grid,
        "policy": args.policy,
        "sampler": args.sampler,
        "steps": args.steps,
        "seeds": list(dict.fromkeys(jobs[i][1] for i in wanted)),
        "model": _model_name(args),
    }


def replay(args: argparse.Namespace) -> Recipe:
    """Set the arguments to what `--from-png` was made with. Raises: ValueError where others are given beside it."""
    free = {"from_png", "out", "overwrite", "json", "quiet", "device", "model", "tokenizer", "save_maps", "dry_run"}
    defaults = sample_parser()
    given = [name for name, value in vars(args).items() if name not in free and value != defaults.get_default(name)]
    if given:
        raise ValueError(f"--from-png takes everything from the file; leave out --{given[0].replace('_', '-')}")
    recipe, made_with = from_png(args.from_png)
    if made_with != versions():
        print(f"note: it was made with {made_with}; this is {versions()}, so pixels may differ", file=sys.stderr)
    for name in ("negative_prompt", "sampler", "steps", "guidance_scale", "eta", "height", "width", "strength"):
        setattr(args, name, getattr(recipe, name))
    for name in ("attention", "dtype", "cache_dtype", "policy"):
        setattr(args, name, getattr(recipe, name))
    args.batch_size = len(recipe.jobs)
    if args.model is None and recipe.model != SHIPPED:
        args.model = Path(recipe.model)
    if recipe.init_image:
        path, digest = recipe.init_image
        args.init_image = Path(path)
        if not args.init_image.is_file() or digest_of(args.init_image) != digest:
            raise ValueError(f"{args.from_png} began with the image {path}, which is gone or has changed; put it back")
    return recipe


def _check(args: argparse.Namespace) -> None:
    if args.save_maps is not None and args.save_maps.exists() and any(args.save_maps.iterdir()):
        raise ValueError(f"--save-maps {args.save_maps} is not empty; name a new folder")
    if args.dry_run and args.cache_budget is not None:
        raise ValueError("--cache-budget measures with the model's weights, --dry-run reads none; give one of them")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, expected 1 or more")
    for name, known in (("sampler", SAMPLERS), ("cache_dtype", CACHE_DTYPES), ("attention", ATTENTIONS)):
        if getattr(args, name) not in known:  # a file may say anything
            raise ValueError(f"{name} is {getattr(args, name)!r}, expected one of {', '.join(known)}")


def _plan(args: argparse.Namespace, pipeline: Pipeline, calls: int) -> ReusePlan:
    return build(
        args.policy,
        calls,
        pipeline.sites,
        k=args.reuse,
        which=args.sites,
        kind=args.kind,
        policies=policies_for(args.policy, args.model, args.sampler, lambda: pipeline.fingerprint),
    )


def _recipe(args: argparse.Namespace, pipeline: Pipeline, plan: ReusePlan) -> Recipe:
    """What all pictures of this run have in common."""
    factor, (height, width) = pipeline.vae.config.factor, pipeline.latent_size(args.height, args.width)
    return Recipe(
        jobs=(),
        place=0,
        negative_prompt=args.negative_prompt,
        sampler=args.sampler,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        eta=args.eta,
        height=factor * height,
        width=factor * width,
        init_image=() if args.init_image is None else (str(args.init_image), digest_of(args.init_image)),
        strength=args.strength,
        attention=args.attention,
        dtype=str(pipeline.dtype).removeprefix("torch."),
        device=str(pipeline.device),
        cache_dtype=args.cache_dtype,
        policy=args.policy,
        plan=plan,
        model=_model_name(args),
        fingerprint=pipeline.fingerprint,
    )


def _out_of_memory(error: RuntimeError, args: argparse.Namespace, plan: ReusePlan, batch: int) -> Exception:
    """The error, or, if it is that memory ran out, one that says what would help."""
    if not isinstance(error, torch.cuda.OutOfMemoryError) and "alloc" not in str(error).lower():
        return error
    peak = mebibytes(_forecast(args, load_model(args, "meta"), plan, batch).peak)
    return ValueError(
        f"out of memory with a batch of {batch}, of which the cache takes up to {peak}; try --batch-size 1, "
        "--cache-dtype uint8, --cache-budget, --sites cross, or a smaller --height and --width"
    )


def _model_name(args: argparse.Namespace) -> str:
    return SHIPPED if args.model is None else str(args.model)


def foretell(args: argparse.Namespace, pipeline: Pipeline, plan: ReusePlan, batch: int) -> dict[str, Any]:
    """What `--dry-run` tells: the bytes that a batch will keep, by site and at its fullest moment."""
    found = _forecast(args, pipeline, plan, batch)
    return {
        "sites": {f"{site.kind} of {site.address}": size for site, size in found.sites.items()},
        "cache_peak_bytes": found.peak,
        "cache_dtype": args.cache_dtype,
        "batch": batch,
        "calls": plan.calls,
        "reused": plan.reused,
        "plan": plan.grid,
    }


def within_budget(
    args: argparse.Namespace, pipeline: Pipeline, plan: ReusePlan, batch: int, job: tuple[str, int]
) -> ReusePlan:
    """The plan with as many sites as `--cache-budget` has room for, chosen on the first image; tells which."""
    budget = parse_bytes(args.cache_budget)
    empty = load_model(args, "meta")
    if _forecast(args, empty, plan, batch).peak <= budget:
        return plan
    shares = weigh(
        pipeline,
        plan.on(pipeline.sites),
        job[0],
        seed=job[1],
        steps=args.steps,
        sampler=args.sampler,
        guidance_scale=args.guidance_scale,
        cache_dtype=getattr(torch, args.cache_dtype),
    )
    fitting, names = choose(plan, shares, lambda p: _forecast(args, empty, p, batch).peak, budget)
    for name, share in shares.items():
        does = "reuses" if name in names else "computes"
        effect = f"squared error {share.damage:.3g}, {1000 * share.saved:.1f} ms saved a call"
        print(f"note: {name} {does} ({effect})", file=sys.stderr)
    return fitting


def _forecast(args: argparse.Namespace, pipeline: Pipeline, plan: ReusePlan, batch: int) -> Forecast:
    return forecast(
        pipeline.unet,
        plan,
        batch=batch,
        size=pipeline.latent_size(args.height, args.width),
        tokens=pipeline.text.length,
        guided=args.guidance_scale != 1,
        cache_dtype=getattr(torch, args.cache_dtype),
    )


def _cache(args: argparse.Namespace, pipeline: Pipeline, plan: ReusePlan, prompts: list[str], first: int) -> ReuseCache:
    """What keeps the reused tensors of a batch; with --save-maps it writes all maps down as well."""
    dtype = getattr(torch, args.cache_dtype)
    if args.save_maps is None:
        return ReuseCache(dtype)
    words = [words_of(pipeline.text.pieces(prompt)) for prompt in prompts]
    return MapRecorder(args.save_maps, plan.on(pipeline.sites), words, first=first, dtype=dtype)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or [])
    if args.prompts_file is not None:
        prompts += read_lines(args.prompts_file)
    if not prompts:
        raise ValueError('no prompt given; use --prompt "a red circle" or --prompts-file FILE')
    return prompts


def _seeds(args: argparse.Namespace) -> list[int]:
    if args.num_images < 1:
        raise ValueError(f"--num-images is {args.num_images}, expected 1 or more")
    if len(args.seed) > 1 and args.num_images > 1:
        raise ValueError("several seeds and --num-images were given; use one seed with --num-images, or seeds alone")
    for seed in args.seed:
        if not 0 <= seed < 2**63:
            raise ValueError(f"--seed is {seed}, expected 0 to 2^63 - 1")
    return args.seed if len(args.seed) > 1 else [args.seed[0] + i for i in range(args.num_images)]


def _targets(out: Path | None, count: int) -> Callable[[], Iterator[Path]]:
    """The file names to try for an image, in order. Raises: ValueError for a path that cannot hold `count` images."""
    out = out or Path("out.png" if count == 1 else "out")
    if out.suffix.lower() in IMAGE_SUFFIXES and not out.is_dir():
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out is {out}, but images are written as PNG; name a .png file or a folder")
        if count > 1:
            raise ValueError(f"--out {out} names one file for {count} images; give a folder")
        return lambda: itertools.chain([out], (out.with_stem(f"{out.stem}-{i}") for i in itertools.count(1)))
    # Whether the place can be written to is found out now, not after the work.
    above = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out {out} cannot be made a folder in {above}; choose another place")
    numbers = itertools.count()  # shared: what was taken once is not tried again
    return lambda: (out / f"{i:05d}.png" for i in numbers)


def _read_image(path: Path, args: argparse.Namespace, pipeline: Pipeline) -> Tensor:
    """Shapes: -> (1, 3, H, W) in -1 ... 1, resized to the size asked for, or the model's own."""
    own = pipeline.unet.config.sample_size * pipeline.vae.config.factor
    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((args.width or own, args.height or own), Image.Resampling.LANCZOS)
    except UnidentifiedImageError:
        raise ValueError(f"--init-image {path} is not an image that Pillow can read; convert it to PNG") from None
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 127.5 - 1


if __name__ == "__main__":
    sys.exit(main())

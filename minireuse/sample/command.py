"""Generate images from prompts: `python -m minireuse.sample --prompt "..." --policy hurry`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minireuse.attention import Watch
from minireuse.cache import ReuseCache
from minireuse.common.options import CACHE_DTYPES, guidance_scale, load_model, mebibytes
from minireuse.common.status import exit_status
from minireuse.devices import is_available
from minireuse.files import read_lines, write_whole
from minireuse.pipeline import ATTENTIONS, Pipeline, Result
from minireuse.plan import ReusePlan
from minireuse.policies import select
from minireuse.sample.maps import MapRecorder, words_of
from minireuse.sample.memory import advice_on_memory, foretell, within_budget
from minireuse.sample.options import sample_parser
from minireuse.sample.recipe import SHIPPED, Recipe, digest_of, from_png, read_image, to_png, versions
from minireuse.samplers import SAMPLERS, Step
from minireuse.search import build, names_in, policies_for, takes_sites

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
    args.sites, args.kind = args.sites or "both", args.kind or "map"  # whether they were given matters no longer
    # A dry run reads no weights, but for phast, which has to know whose plan it looks for.
    pipeline = load_model(args, "meta" if args.dry_run and "phast" not in names_in(args.policy) else None)
    if again is not None and not args.dry_run and again.fingerprint != pipeline.fingerprint:
        raise ValueError(f"{args.from_png} was made by another model than {_model_name(args)}; give its with --model")
    init_image = None if args.init_image is None else _read_image(args.init_image, args, pipeline)
    strength = None if init_image is None else args.strength
    calls = pipeline.calls(args.sampler, args.steps, strength)
    plan = again.plan if again is not None else _plan(args, pipeline, calls)
    batches = [jobs[i : i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
    if args.dry_run:
        return foretell(args, pipeline, plan, len(batches[0]))
    if args.cache_budget is not None:
        with advice_on_memory(args, pipeline, plan, len(batches[0])):
            render = lambda p: paint(args, pipeline, init_image, jobs[:1], p).images  # noqa: E731
            plan = within_budget(args, pipeline, plan, len(batches[0]), render)

    recipe = _recipe(args, pipeline, plan)
    recipe.check_text()
    if args.compile:
        from minireuse.compilation import CompiledUNet  # a room that is entered only where it is asked for

        pipeline.compiled = CompiledUNet(pipeline.unet)
    seconds, peak, written = 0.0, 0, list[Path]()
    steps = len(pipeline.timesteps(args.steps, strength)) * len(batches)
    hidden = args.quiet or args.json
    with tqdm(total=steps, desc=plan.grid or "reuse by site", unit="step", disable=hidden, dynamic_ncols=True) as bar:
        for number, batch in enumerate(batches):
            recorder = None if args.save_maps is None else _recorder(args, pipeline, batch, len(written))
            with advice_on_memory(args, pipeline, plan, len(batch)):
                result = paint(args, pipeline, init_image, batch, plan, recorder, lambda step: bar.update())
            if recorder is not None:
                recorder.finish(result.images, (result.latents.shape[2], result.latents.shape[3]))
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


def paint(
    args: argparse.Namespace,
    pipeline: Pipeline,
    init_image: Tensor | None,
    batch: Sequence[tuple[str, int]],
    plan: ReusePlan,
    watch: Watch | None = None,
    on_step: Callable[[Step], object] | None = None,
) -> Result:
    """One batch of prompts and seeds, as the arguments say. Shapes: init_image (1, 3, H, W)."""
    return pipeline.generate(
        [prompt for prompt, _ in batch],
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
        cache=ReuseCache(getattr(torch, args.cache_dtype)),
        attention=args.attention,
        on_step=on_step,
        watch=watch,
    )


def replay(args: argparse.Namespace) -> Recipe:
    """Set the arguments to what `--from-png` was made with. Raises: ValueError where others are given beside it."""
    free = {"from_png", "out", "overwrite", "json", "quiet", "device", "model", "tokenizer", "save_maps", "dry_run"}
    free |= {"compile"}  # where nothing can be compiled now
    free |= {"init_image"}  # it may lie elsewhere now, but has to be the same one
    defaults = sample_parser()
    given = [name for name, value in vars(args).items() if name not in free and value != defaults.get_default(name)]
    if given:
        raise ValueError(f"--from-png takes everything from the file; leave out --{given[0].replace('_', '-')}")
    recipe, made_with = from_png(args.from_png)
    differs = [] if made_with == versions() else [f"with {made_with}, and this is {versions()}"]
    for name in ("negative_prompt", "sampler", "steps", "guidance_scale", "eta", "height", "width", "strength"):
        setattr(args, name, getattr(recipe, name))
    for name in ("attention", "dtype", "cache_dtype", "policy", "prediction_type"):
        setattr(args, name, getattr(recipe, name))
    args.batch_size = len(recipe.jobs)
    if args.model is None and recipe.model != SHIPPED:
        args.model = Path(recipe.model)
    if args.device == "auto" and re.fullmatch(r"cpu|mps|cuda(:\d+)?", recipe.device) and is_available(recipe.device):
        args.device = recipe.device
    elif args.device != recipe.device:
        differs.append(f"on {recipe.device}")
    if args.compile is None:
        args.compile = recipe.compile
    elif args.compile != recipe.compile:
        differs.append(f"with{'' if recipe.compile else 'out'} --compile")
    if recipe.watched:
        args.sites = recipe.watched
        if args.save_maps is None:
            differs.append("with --save-maps, whose maps are computed by another kernel")
    if differs:
        print(f"note: it was made {' and '.join(differs)}, so pixels may differ", file=sys.stderr)
    if not recipe.init_image and args.init_image is not None:
        raise ValueError(f"{args.from_png} began with noise; leave out --init-image")
    if recipe.init_image:
        path, digest = recipe.init_image
        args.init_image = args.init_image or Path(path)
        if not args.init_image.is_file() or digest_of(args.init_image) != digest:
            advice = "put it back, or say with --init-image where it is"
            raise ValueError(f"{args.from_png} began with the image {path}, which is gone or has changed; {advice}")
    return recipe


def _check(args: argparse.Namespace) -> None:
    if args.save_maps is not None and args.save_maps.exists() and any(args.save_maps.iterdir()):
        raise ValueError(f"--save-maps {args.save_maps} is not empty; name a new folder")
    if args.save_maps is not None and args.compile:
        raise ValueError("--save-maps looks at maps, which --compile hides inside one graph; give one of them")
    if args.dry_run and args.cache_budget is not None:
        raise ValueError("--cache-budget measures with the model's weights, --dry-run reads none; give one of them")
    sites = args.kind or (None if args.save_maps else args.sites)  # which maps to save is asked with --sites, too
    if sites is not None and args.from_png is None and not takes_sites(args.policy):
        raise ValueError(f"--policy {args.policy} chooses what it reuses itself; leave out --kind and --sites")
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
        guidance_scale=guidance_scale(args, pipeline),
        eta=args.eta,
        height=factor * height,
        width=factor * width,
        init_image=() if args.init_image is None else (str(args.init_image), digest_of(args.init_image)),
        strength=args.strength,
        attention=args.attention,
        compile=bool(args.compile),
        dtype=str(pipeline.dtype).removeprefix("torch."),
        device=str(pipeline.device),
        cache_dtype=args.cache_dtype,
        policy=args.policy,
        plan=plan,
        model=_model_name(args),
        fingerprint=pipeline.fingerprint,
        prediction_type=pipeline.schedule.prediction_type,
        watched="" if args.save_maps is None else args.sites,
    )


def _model_name(args: argparse.Namespace) -> str:
    return SHIPPED if args.model is None else str(args.model)


def _recorder(
    args: argparse.Namespace, pipeline: Pipeline, batch: Sequence[tuple[str, int]], first: int
) -> MapRecorder:
    """What writes all maps of a batch down."""
    words = [words_of(pipeline.text.pieces(prompt)) for prompt, _ in batch]
    return MapRecorder(args.save_maps, select(pipeline.sites, args.sites), words, first=first)


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
        _check_writable(out.parent)
        return lambda: itertools.chain([out], (out.with_stem(f"{out.stem}-{i}") for i in itertools.count(1)))
    _check_writable(out)
    numbers = itertools.count()  # shared: what was taken once is not tried again
    return lambda: (out / f"{i:05d}.png" for i in numbers)


def _check_writable(folder: Path) -> None:
    """Raises: ValueError where nothing can be written to the folder, or it cannot be made: now, not after the work."""
    above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out: {above} is no folder that can be written to; choose another place")


def _read_image(path: Path, args: argparse.Namespace, pipeline: Pipeline) -> Tensor:
    """Shapes: -> (1, 3, H, W) in -1 ... 1, resized to the size asked for, or the model's own."""
    own = pipeline.unet.config.sample_size * pipeline.vae.config.factor
    image = read_image(path, "give --init-image a picture, as PNG, say").convert("RGB")
    resized = image.resize((args.width or own, args.height or own), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 127.5 - 1

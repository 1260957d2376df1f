"""Generate images from prompts: `python -m minireuse.sample --prompt "..." --policy hurry`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minireuse.attention import Watch
from minireuse.cache import ReuseCache
from minireuse.common.metrics import WINDOW
from minireuse.common.options import count_of, mebibytes, parse_bytes, spacing_of
from minireuse.common.status import exit_status
from minireuse.files import digest_of, write_whole
from minireuse.pipeline import Pipeline, Result, load
from minireuse.plan import ReusePlan
from minireuse.policies import select
from minireuse.sample.compare import Comparison, summary
from minireuse.sample.maps import MapRecorder, words_of
from minireuse.sample.memory import CacheShape, advice_on_memory, within_budget
from minireuse.sample.options import sample_parser
from minireuse.sample.pictures import read_init_image
from minireuse.sample.recipe import Recipe, to_png, tokens_of
from minireuse.sample.settings import Settings, read_settings
from minireuse.samplers import Step
from minireuse.search import build, names_in, policies_for

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    args = sample_parser().parse_args(argv)
    return exit_status(lambda: show(args, run(args)))


def show(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print what was done: JSON, a line, or nothing."""
    if args.json:
        print(json.dumps(report, indent=2))
    elif args.dry_run:
        for site, size in report["sites"].items():
            print(f"{mebibytes(size):>14}  {site}")
        print(f"{mebibytes(report['cache_peak_bytes']):>14}  at the fullest moment, for a batch of {report['batch']}")
    elif not args.quiet:
        calls, reused = report["calls"], report["reused"]
        files = report["images"][0] if len(report["images"]) == 1 else f"{len(report['images'])} images"
        peak = mebibytes(report["cache_peak_bytes"])
        print(f"{report['seconds']:.2f} s, {calls} calls ({reused} reused), cache peak {peak}, {files}")
    if args.compare and not args.quiet:
        print(summary(report), file=sys.stderr)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the arguments say. Returns what `--json` prints. Raises: ValueError, OSError for bad input."""
    started = time.perf_counter()
    settings = read_settings(args)
    next_target = targets(args.out, len(settings.wanted))
    # A dry run reads no weights, but for phast, which has to know whose plan it looks for.
    pipeline = load_pipeline(settings, "meta" if args.dry_run and "phast" not in names_in(settings.policy) else None)
    settings = replace(settings, guidance_scale=pipeline.guidance(settings.guidance_scale))
    if settings.recipe is not None and not args.dry_run:
        check_model(args.from_png, settings.recipe, settings.model_name, pipeline)
    init_image: Tensor | None = None
    strength: float | None = None
    if settings.init_image is not None:
        init_image = read_init_image(settings.init_image, settings.height, settings.width, pipeline)
        height, width = init_image.shape[2:]
        settings = replace(settings, height=height, width=width)
        strength = settings.strength
    timesteps = pipeline.call_timesteps(settings.sampler, settings.steps, strength)
    calls = len(timesteps)
    plan = make_plan(settings, pipeline, timesteps)
    shape = CacheShape(
        batch=len(settings.batches[0]),
        size=pipeline.latent_size(settings.height, settings.width),
        tokens=pipeline.text.length,
        guided=settings.guidance_scale != 1,
        dtype=getattr(torch, settings.cache_dtype),
    )
    if args.compare:
        check_comparison(plan, pipeline.vae.config.factor * min(shape.size))
    if args.dry_run:
        return shape.report(pipeline.unet, plan)
    if args.cache_budget is not None:
        with advice_on_memory(pipeline.unet, plan, shape):
            render = lambda p: paint(settings, pipeline, init_image, settings.jobs[:1], p).images  # noqa: E731
            plan = within_budget(parse_bytes(args.cache_budget), pipeline, plan, shape, render)

    recipe = make_recipe(settings, pipeline, plan, watched="" if args.save_maps is None else settings.sites or "both")
    recipe.check_text()
    tokens = [tokens_of(pipeline.text, batch, settings.negative_prompt) for batch in settings.batches]
    if settings.compile:
        from minireuse.compilation import CompiledUNet  # a room that is entered only where it is asked for

        pipeline.compiled = CompiledUNet(pipeline.unet)
    seconds, peak, written = 0.0, 0, list[Path]()
    full = ReusePlan.nothing(calls)
    compared = Comparison(settings.policy) if args.compare else None
    runs = len(settings.batches) if compared is None else 2 * (1 + len(settings.batches))
    steps = len(pipeline.timesteps(settings.steps, strength)) * runs
    hidden = args.quiet or args.json
    with tqdm(total=steps, desc=plan.grid or "reuse by site", unit="step", disable=hidden, dynamic_ncols=True) as bar:
        painted = partial(paint, settings, pipeline, init_image, on_step=lambda step: bar.update())
        for warmup in (plan, full) if compared is not None else ():
            with advice_on_memory(pipeline.unet, plan, shape):
                painted(settings.batches[0], warmup)
        for number, batch in enumerate(settings.batches):
            recorder = None
            if args.save_maps is not None:
                words = [words_of(pipeline.text.pieces(prompt)) for prompt, _ in batch]
                sites = select(pipeline.sites, settings.sites or "both")
                recorder = MapRecorder(args.save_maps, sites, words, first=len(written))
            with advice_on_memory(pipeline.unet, plan, replace(shape, batch=len(batch))):
                result = painted(batch, plan, recorder)
            if recorder is not None:
                recorder.finish(result.images, (result.latents.shape[2], result.latents.shape[3]))
            seconds, peak = seconds + result.seconds, max(peak, result.cache_peak_bytes)
            pictures = dict[int, Path]()
            for place, image in enumerate(result.images):
                if number * settings.batch_size + place in settings.wanted:
                    png = to_png(image, replace(recipe, jobs=batch, place=place, tokens=tokens[number]))
                    pictures[place] = write_whole(next_target(), png, overwrite=args.overwrite)
            written += pictures.values()
            if compared is not None:
                compared.add(pictures, result, painted(batch, full), overwrite=args.overwrite)
    return {
        "images": [str(path) for path in written],
        "seconds": seconds,
        "seconds_total": time.perf_counter() - started,
        "calls": calls,
        "reused": plan.reused,
        "cache_peak_bytes": peak,
        "plan": plan.grid,
        "policy": settings.policy,
        "sampler": settings.sampler,
        "steps": count_of(settings.steps),
        "timesteps": pipeline.timesteps(settings.steps, strength),
        "seeds": list(dict.fromkeys(settings.jobs[i][1] for i in settings.wanted)),
        "model": settings.model_name,
        **({} if compared is None else {"compare": compared.report()}),
    }


def load_pipeline(settings: Settings, device: str | None) -> Pipeline:
    """The model to paint with; device: another one than asked for."""
    return load(
        settings.model,
        device=device or settings.device,
        dtype=settings.dtype,
        prediction_type=settings.prediction_type,
        spacing=settings.spacing,
        tokenizer=settings.tokenizer,
        loras=settings.loras,
    )


def check_model(png: Path, recipe: Recipe, name: str, pipeline: Pipeline) -> None:
    """Raises: ValueError where the model is not the one that a picture was made by, with the parts that differ."""
    other = recipe.other_parts(pipeline.digests, tokens_of(pipeline.text, recipe.jobs, recipe.negative_prompt))
    if recipe.fingerprint != pipeline.fingerprint and "U-Net" not in other:
        other = ["U-Net", *other]
    if other:
        advice = "name the tokenizer with --tokenizer" if other == ["tokenizer"] else "name that model with --model"
        raise ValueError(f"{png} was made by another model than {name} (another {', '.join(other)}); {advice}")


def make_plan(settings: Settings, pipeline: Pipeline, timesteps: Sequence[float]) -> ReusePlan:
    """The plan that the policy makes, or the one of the PNG that is made again. timesteps: of the U-Net's calls."""
    if settings.recipe is not None:
        return settings.recipe.plan_over(pipeline.sites)
    policies = policies_for(
        settings.policy,
        settings.model,
        settings.sampler,
        lambda: pipeline.fingerprint,
        spacing_of(settings.steps, pipeline),
        timesteps,
    )
    return build(
        settings.policy,
        len(timesteps),
        pipeline.sites,
        k=settings.reuse,
        which=settings.sites,
        kind=settings.kind,
        latency=settings.latency,
        policies=policies,
    )


def check_comparison(plan: ReusePlan, side: int) -> None:
    """Raises: ValueError where `--compare` has nothing to compare, or a picture of this shorter side is too small."""
    if plan == ReusePlan.nothing(plan.calls):
        raise ValueError("--compare needs a plan that reuses something, and this is the full sampler; name a --policy")
    if side < WINDOW:
        raise ValueError(f"--compare needs images of {WINDOW}x{WINDOW} pixels or more; give a larger size")


def paint(
    settings: Settings,
    pipeline: Pipeline,
    init_image: Tensor | None,
    batch: Sequence[tuple[str, int]],
    plan: ReusePlan,
    watch: Watch | None = None,
    on_step: Callable[[Step], object] | None = None,
) -> Result:
    """One batch of prompts and seeds. Shapes: init_image (1, 3, H, W)."""
    return pipeline.generate(
        [prompt for prompt, _ in batch],
        negative_prompts=settings.negative_prompt,
        steps=settings.steps,
        sampler=settings.sampler,
        guidance_scale=settings.guidance_scale,
        guidance_rescale=settings.guidance_rescale,
        clip_skip=settings.clip_skip,
        seeds=[seed for _, seed in batch],
        height=settings.height,
        width=settings.width,
        plan=plan,
        init_images=None if init_image is None else init_image.expand(len(batch), -1, -1, -1),
        strength=settings.strength,
        eta=settings.eta,
        cache=ReuseCache(getattr(torch, settings.cache_dtype)),
        attention=settings.attention,
        on_step=on_step,
        watch=watch,
    )


def make_recipe(settings: Settings, pipeline: Pipeline, plan: ReusePlan, watched: str) -> Recipe:
    """What all pictures of this run have in common."""
    factor, (height, width) = pipeline.vae.config.factor, pipeline.latent_size(settings.height, settings.width)
    image = settings.init_image
    return Recipe(
        jobs=(),
        place=0,
        negative_prompt=settings.negative_prompt,
        sampler=settings.sampler,
        steps=settings.steps,
        spacing=pipeline.schedule.spacing,
        guidance_rescale=settings.guidance_rescale,
        guidance_scale=pipeline.guidance_scale if settings.guidance_scale is None else settings.guidance_scale,
        eta=settings.eta,
        height=factor * height,
        width=factor * width,
        init_image=() if image is None else (str(image), digest_of(image)),
        strength=settings.strength,
        attention=settings.attention,
        compile=settings.compile,
        dtype=str(pipeline.dtype).removeprefix("torch."),
        device=str(pipeline.device),
        cache_dtype=settings.cache_dtype,
        policy=settings.policy,
        plan=plan.to_json(),
        model=settings.model_name,
        fingerprint=pipeline.fingerprint,
        digests=pipeline.digests,
        loras=tuple((str(lora.path), lora.strength, lora.digest) for lora in pipeline.loras),
        prediction_type=pipeline.schedule.prediction_type,
        watched=watched,
        clip_skip=settings.clip_skip,
    )


def targets(out: Path | None, count: int) -> Callable[[], Iterator[Path]]:
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

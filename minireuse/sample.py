"""Generate images from prompts: `python -m minireuse.sample --prompt "..." --policy hurry`."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from minireuse.command import exit_status
from minireuse.files import read_lines, write_whole
from minireuse.forecast import Forecast, forecast
from minireuse.maps import MapRecorder, words_of
from minireuse.memory import choose, weigh
from minireuse.options import CACHE_DTYPES, add_model_options, load_model, mebibytes, parse_bytes
from minireuse.pipeline import ATTENTIONS, Pipeline
from minireuse.policies import POLICIES, build, policies_for, select
from minireuse.reuse import KINDS, ReuseCache, ReusePlan
from minireuse.samplers import SAMPLERS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where the default is to do nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", False) else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m minireuse.sample",
        description="Generate images with Stable Diffusion, reusing attention maps between sampling steps.",
        formatter_class=HelpFormatter,
    )
    what = p.add_argument_group("what to paint")
    what.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="one or several prompts")
    what.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt per line")
    what.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to stay away from")
    what.add_argument("--seed", nargs="+", type=int, default=[0], metavar="N", help="one or several seeds")
    what.add_argument("--num-images", type=int, default=1, metavar="N", help="images per prompt, from seed upwards")
    what.add_argument("--height", type=int, help="pixels; default: what the model was trained at")
    what.add_argument("--width", type=int, help="pixels; default: what the model was trained at")
    what.add_argument("--init-image", type=Path, metavar="FILE", help="start from this image instead of noise")
    what.add_argument("--strength", type=float, default=0.8, help="how far to leave the initial image, 0 to 1")
    how = p.add_argument_group("how to sample")
    how.add_argument("--sampler", choices=list(SAMPLERS), default="ddim")
    how.add_argument("--steps", type=int, default=20)
    how.add_argument("--guidance-scale", type=float, default=7.5, help="1 is off")
    how.add_argument("--eta", type=float, default=0.0, help="noise added by ddim, 0 none to 1")
    how.add_argument("--attention", choices=ATTENTIONS, default="fused", help="kernel of calls that keep no map")
    how.add_argument("--batch-size", type=int, default=4, metavar="N", help="images sampled together")
    reuse = p.add_argument_group("what to reuse")
    policy_help = f"{', '.join(POLICIES)} (with knobs: deepcache:every=3), a plan file, or several joined by |"
    reuse.add_argument("--policy", default="none", metavar="POLICY", help=policy_help)
    reuse.add_argument("--reuse", type=int, metavar="K", help="U-Net calls that reuse; default: half of them")
    reuse.add_argument("--sites", choices=("self", "cross", "both"), default="both", help="of which attention")
    reuse.add_argument(
        "--kind", choices=KINDS, default="map", help="attention maps, attention outputs, or deep features"
    )
    reuse.add_argument("--cache-dtype", choices=CACHE_DTYPES, default="float16")
    reuse.add_argument(
        "--cache-budget", metavar="SIZE", help="let only so many sites reuse that the cache stays below this: 512MiB"
    )
    add_model_options(p)
    out = p.add_argument_group("output")
    out.add_argument("--out", type=Path, metavar="PATH", help="file for one image, folder for several")
    out.add_argument("--save-maps", type=Path, metavar="DIR", help="write every attention map as a picture, too")
    out.add_argument("--overwrite", action="store_true", help="replace files instead of taking the next free number")
    out.add_argument("--dry-run", action="store_true", help="only tell what the cache will hold; no weights are read")
    out.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    args = parser().parse_args(argv)
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
    prompts, seeds = _prompts(args), _seeds(args)
    jobs = list(itertools.product(prompts, seeds))
    targets = _targets(args.out, len(jobs))
    if args.save_maps is not None and args.save_maps.exists() and any(args.save_maps.iterdir()):
        raise ValueError(f"--save-maps {args.save_maps} is not empty; name a new folder")
    written: list[Path] = []
    if args.dry_run and args.cache_budget is not None:
        raise ValueError("--cache-budget measures with the model's weights, --dry-run reads none; give one of them")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, expected 1 or more")
    pipeline = load_model(args, "meta" if args.dry_run else None)
    init_image = None if args.init_image is None else _read_image(args.init_image, args, pipeline)
    strength = None if init_image is None else args.strength
    calls = pipeline.calls(args.sampler, args.steps, strength)
    plan = build(
        args.policy,
        calls,
        pipeline.sites,
        k=args.reuse,
        which=args.sites,
        kind=args.kind,
        policies=policies_for(args.policy, args.model, args.sampler, lambda: pipeline.fingerprint),
    )
    batch = min(len(jobs), args.batch_size)
    if args.dry_run:
        return foretell(args, pipeline, plan, batch)
    if args.cache_budget is not None:
        plan = within_budget(args, pipeline, plan, batch, jobs[0])

    seconds, peak = 0.0, 0
    batches = [jobs[i : i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
    steps = len(pipeline.timesteps(args.steps, strength)) * len(batches)
    hidden = args.quiet or args.json
    with tqdm(total=steps, desc=plan.grid or "reuse by site", unit="step", disable=hidden, dynamic_ncols=True) as bar:
        for batch in batches:
            cache = _cache(args, pipeline, plan, [prompt for prompt, _ in batch], len(written))
            result = pipeline.generate(
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
                cache=cache,
                attention=args.attention,
                on_step=lambda step: bar.update(),
                wrap=cache.wrap if isinstance(cache, MapRecorder) else None,
                watch=select(pipeline.sites, args.sites) if isinstance(cache, MapRecorder) else (),
            )
            if isinstance(cache, MapRecorder):
                cache.finish(result.images, (result.latents.shape[2], result.latents.shape[3]))
            seconds, peak = seconds + result.seconds, max(peak, result.cache_peak_bytes)
            for (prompt, seed), image in zip(batch, result.images, strict=True):
                png = _png(image, _metadata(args, prompt, seed, plan, image))
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
        "seeds": seeds,
        "model": _model_name(args),
    }


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


def _metadata(args: argparse.Namespace, prompt: str, seed: int, plan: ReusePlan, image: np.ndarray) -> dict[str, str]:
    try:
        own = version("minireuse")
    except PackageNotFoundError:
        own = "source"
    return {
        "prompt": prompt,
        "negative_prompt": args.negative_prompt,
        "seed": str(seed),
        "sampler": args.sampler,
        "steps": str(args.steps),
        "guidance_scale": str(args.guidance_scale),
        "eta": str(args.eta),
        "init_image": "none" if args.init_image is None else f"{args.init_image}, strength {args.strength}",
        "attention": args.attention,
        "dtype": args.dtype,
        "size": f"{image.shape[1]}x{image.shape[0]}",
        "model": _model_name(args),
        "policy": args.policy,
        "plan": plan.to_json(),
        "cache_dtype": args.cache_dtype,
        "versions": f"minireuse {own}, torch {torch.__version__}, python {platform.python_version()}",
    }


def _model_name(args: argparse.Namespace) -> str:
    return "shipped" if args.model is None else str(args.model)


def _png(image: np.ndarray, metadata: dict[str, str]) -> bytes:
    chunks = PngInfo()
    for key, value in metadata.items():
        chunks.add_itxt(key, value)
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", pnginfo=chunks)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())

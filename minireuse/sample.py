"""Generate images from prompts: `python -m minireuse.sample --prompt "..." --policy hurry`."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import operator
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterable
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from minireuse.config import PREDICTION_TYPES
from minireuse.pipeline import ATTENTIONS, Pipeline, load
from minireuse.policies import POLICIES, RELATIVES, select
from minireuse.reuse import KINDS, ReuseCache, ReusePlan
from minireuse.samplers import SAMPLERS

DTYPES = ("float32", "float16", "bfloat16")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m minireuse.sample",
        description="Generate images with Stable Diffusion, reusing attention maps between sampling steps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
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
    reuse = p.add_argument_group("what to reuse")
    policy_help = f"{', '.join(POLICIES)} (with knobs: deepcache:every=3), a plan file, or several joined by |"
    reuse.add_argument("--policy", default="none", metavar="POLICY", help=policy_help)
    reuse.add_argument("--reuse", type=int, metavar="K", help="U-Net calls that reuse; default: half of them")
    reuse.add_argument("--sites", choices=("self", "cross", "both"), default="both", help="of which attention")
    reuse.add_argument(
        "--kind", choices=KINDS, default="map", help="attention maps, attention outputs, or deep features"
    )
    reuse.add_argument("--cache-dtype", choices=DTYPES, default="float16")
    model = p.add_argument_group("model and machine")
    model.add_argument(
        "--model", type=Path, metavar="PATH", help="diffusers folder or .safetensors file; default: ours"
    )
    model.add_argument("--tokenizer", metavar="PATH|NAME", help="for single files: a folder or a name on the hub")
    model.add_argument("--prediction-type", choices=PREDICTION_TYPES, help="if the checkpoint is wrong")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    model.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    model.add_argument("--attention", choices=ATTENTIONS, default="fused", help="kernel of calls that keep no map")
    model.add_argument("--batch-size", type=int, default=4, metavar="N", help="images sampled together")
    out = p.add_argument_group("output")
    out.add_argument("--out", type=Path, metavar="PATH", help="file for one image, folder for several")
    out.add_argument("--overwrite", action="store_true", help="replace files instead of taking the next free number")
    out.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    args = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *rest, **more: print(f"note: {message}", file=sys.stderr)
        try:
            report = run(args)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
    if args.json:
        print(json.dumps(report, indent=2))
    elif not args.quiet:
        calls, reused = report["calls"], report["reused"]
        files = report["images"][0] if len(report["images"]) == 1 else f"{len(report['images'])} images"
        peak = report["cache_peak_bytes"] / 2**20
        print(f"{report['seconds']:.2f} s, {calls} calls ({reused} reused), cache peak {peak:.1f} MiB, {files}")
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the arguments say. Returns what `--json` prints. Raises: ValueError, OSError for bad input."""
    started = time.perf_counter()
    prompts, seeds = _prompts(args), _seeds(args)
    jobs = list(itertools.product(prompts, seeds))
    targets = _targets(args.out, len(jobs), args.overwrite)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, expected 1 or more")
    pipeline = load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        prediction_type=args.prediction_type,
        tokenizer=args.tokenizer,
    )
    init_image = None if args.init_image is None else _read_image(args.init_image, args, pipeline)
    strength = None if init_image is None else args.strength
    calls = pipeline.calls(args.sampler, args.steps, strength)
    plan = make_plan(args, calls, pipeline)

    seconds, peak = 0.0, 0
    batches = [jobs[i : i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
    steps = len(pipeline.timesteps(args.steps, strength)) * len(batches)
    hidden = args.quiet or args.json
    with tqdm(total=steps, desc=plan.grid or "reuse by site", unit="step", disable=hidden, dynamic_ncols=True) as bar:
        for start, batch in zip(itertools.count(0, args.batch_size), batches, strict=False):
            cache = ReuseCache(getattr(torch, args.cache_dtype))
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
            )
            seconds, peak = seconds + result.seconds, max(peak, result.cache_peak_bytes)
            for (prompt, seed), image, target in zip(batch, result.images, targets[start:], strict=False):
                _save(target, image, _metadata(args, prompt, seed, plan, image))
    return {
        "images": [str(t) for t in targets],
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


def make_plan(args: argparse.Namespace, calls: int, pipeline: Pipeline) -> ReusePlan:
    """The plan that --policy, --reuse, --sites and --kind describe. Raises: PlanError, ValueError."""
    plans = [_one_plan(term.strip(), args, calls, pipeline) for term in args.policy.split("|")]
    return reduce(operator.or_, plans)


def _one_plan(term: str, args: argparse.Namespace, calls: int, pipeline: Pipeline) -> ReusePlan:
    """The plan of a file, or of a policy with its knobs: `deepcache:every=3,branch=1`."""
    name, _, settings = term.partition(":")
    if name not in POLICIES:
        if not Path(term).is_file():
            known = ", ".join(POLICIES)
            raise ValueError(f"--policy is {term!r}, expected one of {known}, or an existing plan file")
        return ReusePlan.from_json(Path(term).read_text(encoding="utf-8"))
    policy = POLICIES[name]
    accepted = [p for p in inspect.signature(policy).parameters if p not in ("calls", "sites")]
    knobs: dict[str, float | None] = {"k": args.reuse} if "k" in accepted else {}
    for setting in filter(None, settings.split(",")):
        knob, _, value = setting.partition("=")
        try:
            knobs[knob] = float(value) if "." in value else int(value)
        except ValueError:
            raise ValueError(f"--policy {term}: {setting!r} is not knob=number") from None
        if knob not in accepted:
            raise ValueError(f"--policy {term}: no knob {knob!r}; {name} has {', '.join(accepted) or 'none'}")
    sites = pipeline.sites if name in RELATIVES else select(pipeline.sites, args.sites, args.kind)
    return policy(calls, sites, **knobs)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or [])
    if args.prompts_file is not None:
        lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        prompts += [line for line in lines if line.strip()]
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


def _targets(out: Path | None, count: int, overwrite: bool) -> list[Path]:
    """Where the images go: checked before any work, so that nothing is lost to a bad path at the end."""
    out = out or Path("out.png" if count == 1 else "out")
    as_file = out.suffix.lower() == ".png" and not out.is_dir()
    if as_file and count > 1:
        raise ValueError(f"--out {out} names one file for {count} images; give a folder")
    if not as_file and out.suffix and not out.is_dir():
        raise ValueError(f"--out {out} is neither a .png file nor a folder; images are written as PNG")
    folder = out.parent if as_file else out
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out folder {folder} is not writable; choose another")
    names: Iterable[Path]
    if as_file:
        names = itertools.chain([out], (out.with_stem(f"{out.stem}-{i}") for i in itertools.count(1)))
    else:
        names = (folder / f"{i:05d}.png" for i in itertools.count())
    free = (name for name in names if overwrite or not name.exists())
    return list(itertools.islice(free, count))


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
        "size": f"{image.shape[1]}x{image.shape[0]}",
        "model": _model_name(args),
        "policy": args.policy,
        "plan": plan.to_json(),
        "cache_dtype": args.cache_dtype,
        "versions": f"minireuse {own}, torch {torch.__version__}, python {platform.python_version()}",
    }


def _model_name(args: argparse.Namespace) -> str:
    return "shipped" if args.model is None else str(args.model)


def _save(path: Path, image: np.ndarray, metadata: dict[str, str]) -> None:
    """Write a PNG under its final name only once it is whole."""
    chunks = PngInfo()
    for key, value in metadata.items():
        chunks.add_itxt(key, value)
    part = path.with_suffix(".part")
    try:
        Image.fromarray(image).save(part, format="PNG", pnginfo=chunks)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())

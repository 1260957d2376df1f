"""Options that several command lines share, and what is made of them."""

from __future__ import annotations

import argparse
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from minireuse.pipeline import Pipeline, load
from minireuse.schedule import PREDICTION_TYPES, SPACINGS

DTYPES = ("float32", "float16", "bfloat16")
CACHE_DTYPES = (*DTYPES, "uint8")
UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where the default is to do nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default in (None, "") or action.default is False  # a zero is shown
        return action.help if nothing else super()._get_help_string(action)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, on which device, in which precision."""
    group = parser.add_argument_group("model and machine")
    model_help = "diffusers folder, .safetensors file, or name on the hub (owner/name); default: the shipped model"
    group.add_argument("--model", type=Path, metavar="PATH|NAME", help=model_help)
    lora_help = "LoRA files to merge into the model, each with a strength that may be negative; default: 1"
    group.add_argument("--lora", nargs="+", action="extend", metavar="FILE[:STRENGTH]", help=lora_help)
    group.add_argument(
        "--tokenizer", metavar="PATH|NAME", help="a folder or a name on the hub; default: the model's own, or CLIP's"
    )
    prediction_help = "what the U-Net predicts; overrides what the checkpoint says"
    group.add_argument("--prediction-type", choices=PREDICTION_TYPES, help=prediction_help)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    group.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")


def add_grid_options(parser: argparse._ActionsContainer) -> None:
    """At which timesteps the model is called; `grid` reads them."""
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--spacing", choices=SPACINGS, help="of the timesteps; default: the model's own")
    parser.add_argument("--timesteps", metavar="T,T,...", help="the timesteps themselves, falling, instead of --steps")


def grid(args: argparse.Namespace) -> int | tuple[float, ...]:
    """The number of steps, or the timesteps, that `add_grid_options` was given. Raises: ValueError."""
    if args.timesteps is None:
        return int(args.steps)
    if args.steps != 20 or args.spacing is not None:
        raise ValueError("--timesteps says where all steps are; leave out --steps and --spacing")
    return parse_timesteps(args.timesteps)


def count_of(steps: int | tuple[float, ...]) -> int:
    """The number of steps that `grid` gave, or of the timesteps."""
    return steps if isinstance(steps, int) else len(steps)


def spacing_of(steps: int | tuple[float, ...], pipeline: Pipeline) -> str:
    """How the timesteps of a run are spaced, in a word: "listed" where they were given one by one."""
    return pipeline.schedule.spacing if isinstance(steps, int) else "listed"


def parse_timesteps(text: str) -> tuple[float, ...]:
    """Timesteps, as in 999,850,736.5. Raises: ValueError for what is none, or does not fall."""
    try:
        timesteps = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--timesteps is {text!r}, expected numbers such as 999,749,499,249") from None
    if not all(a > b for a, b in pairwise((*timesteps, -1e-9))) or not all(map(math.isfinite, timesteps)):
        raise ValueError(f"--timesteps is {text!r}, expected numbers that fall, down to 0 or more")
    return tuple(int(t) if t == int(t) else t for t in timesteps)


def add_guidance_option(parser: argparse._ActionsContainer) -> None:
    """How far to follow the prompt; `guidance_scale` says what a model makes of it."""
    help = "how strongly to follow the prompt; 1 turns guidance off; default: the value in the model's files, else 7.5"
    parser.add_argument("--guidance-scale", type=float, metavar="G", help=help)


def guidance_scale(args: argparse.Namespace, pipeline: Pipeline) -> float:
    """The guidance scale that `add_guidance_option` was given, or the model's own."""
    return pipeline.guidance(args.guidance_scale)


def load_model(args: argparse.Namespace, device: str | None = None) -> Pipeline:
    """The model that `add_model_options` names; device: another one than asked for. Raises: ValueError."""
    return load(
        args.model,
        device=device or args.device,
        dtype=args.dtype,
        prediction_type=args.prediction_type,
        spacing=args.spacing,
        tokenizer=args.tokenizer,
        loras=args.lora or (),
    )


def loras_of(pipeline: Pipeline) -> dict[str, Any]:
    """What a journal or a plan file says of the LoRAs in a model: their digests and strengths; without any, nothing."""
    return {"loras": [[lora.digest, lora.strength] for lora in pipeline.loras]} if pipeline.loras else {}


def parse_bytes(text: str) -> int:
    """A number of bytes, as in 512MiB or 1.5GB. Raises: ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no amount of memory; write it like 512MiB or 2GiB")
    return int(float(found[1]) * UNITS[found[2]])


def mebibytes(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"

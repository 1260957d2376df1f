"""Options that several command lines share, and what is made of them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from minireuse.pipeline import Pipeline, load
from minireuse.schedule import PREDICTION_TYPES

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
    group.add_argument(
        "--model", type=Path, metavar="PATH", help="diffusers folder or .safetensors file; default: the shipped model"
    )
    group.add_argument("--tokenizer", metavar="PATH|NAME", help="for single files: a folder or a name on the hub")
    prediction_help = "what the U-Net predicts; overrides what the checkpoint says"
    group.add_argument("--prediction-type", choices=PREDICTION_TYPES, help=prediction_help)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    group.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")


def add_guidance_option(parser: argparse._ActionsContainer) -> None:
    """How far to follow the prompt; `guidance_scale` says what a model makes of it."""
    help = "how strongly to follow the prompt; 1 turns guidance off; default: the value in the model's files, else 7.5"
    parser.add_argument("--guidance-scale", type=float, metavar="G", help=help)


def guidance_scale(args: argparse.Namespace, pipeline: Pipeline) -> float:
    """The guidance scale that `add_guidance_option` was given, or the model's own."""
    return pipeline.guidance_scale if args.guidance_scale is None else float(args.guidance_scale)


def load_model(args: argparse.Namespace, device: str | None = None) -> Pipeline:
    """The model that `add_model_options` names; device: another one than asked for. Raises: ValueError."""
    return load(
        args.model,
        device=device or args.device,
        dtype=args.dtype,
        prediction_type=args.prediction_type,
        tokenizer=args.tokenizer,
    )


def parse_bytes(text: str) -> int:
    """A number of bytes, as in 512MiB or 1.5GB. Raises: ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no amount of memory; write it like 512MiB or 2GiB")
    return int(float(found[1]) * UNITS[found[2]])


def mebibytes(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"

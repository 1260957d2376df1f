"""Options that several command lines share, and what is made of them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from minireuse.config import PREDICTION_TYPES
from minireuse.pipeline import ATTENTIONS, Pipeline, load
from minireuse.policies import POLICIES
from minireuse.reuse import KINDS
from minireuse.samplers import SAMPLERS

DTYPES = ("float32", "float16", "bfloat16")
CACHE_DTYPES = (*DTYPES, "uint8")
UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, on which device, in which precision."""
    group = parser.add_argument_group("model and machine")
    group.add_argument(
        "--model", type=Path, metavar="PATH", help="diffusers folder or .safetensors file; default: ours"
    )
    group.add_argument("--tokenizer", metavar="PATH|NAME", help="for single files: a folder or a name on the hub")
    group.add_argument("--prediction-type", choices=PREDICTION_TYPES, help="if the checkpoint is wrong")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    group.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where the default is to do nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", False) else super()._get_help_string(action)


def sample_parser() -> argparse.ArgumentParser:
    """The options of `python -m minireuse.sample`."""
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
    what.add_argument("--from-png", type=Path, metavar="FILE", help="make again what this file was made from")
    what.add_argument("--height", type=int, help="pixels; default: what the model was trained at")
    what.add_argument("--width", type=int, help="pixels; default: what the model was trained at")
    what.add_argument("--init-image", type=Path, metavar="FILE", help="start from this image instead of noise")
    what.add_argument("--strength", type=float, default=0.8, help="how far to leave the initial image, 0 to 1")
    how = p.add_argument_group("how to sample")
    how.add_argument("--sampler", choices=list(SAMPLERS), default="ddim")
    how.add_argument("--steps", type=int, default=20)
    add_guidance_option(how)
    how.add_argument("--eta", type=float, default=0.0, help="noise added by ddim, 0 none to 1")
    how.add_argument("--attention", choices=ATTENTIONS, default="fused", help="kernel of calls that keep no map")
    told = "torch.compile the U-Net: slow at first, faster after that"
    how.add_argument("--compile", action=argparse.BooleanOptionalAction, help=told)
    how.add_argument("--batch-size", type=int, default=4, metavar="N", help="images sampled together")
    reuse = p.add_argument_group("what to reuse")
    policy_help = f"{', '.join(POLICIES)} (with knobs: deepcache:every=3,order=1), a plan file, or several joined by |"
    reuse.add_argument("--policy", default="none", metavar="POLICY", help=policy_help)
    reuse.add_argument("--reuse", type=int, metavar="K", help="U-Net calls that reuse; default: half of them")
    reuse.add_argument("--sites", choices=("self", "cross", "both"), help="of which attention; default: both")
    reuse.add_argument("--kind", choices=KINDS, help="attention maps (default), attention outputs, or deep features")
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


def add_guidance_option(parser: argparse._ActionsContainer) -> None:
    """How far to follow the prompt; `load_model` fills in the model's own."""
    told = "1 is off; default: the model's own, 7.5 where it does not tell"
    parser.add_argument("--guidance-scale", type=float, metavar="G", help=told)


def load_model(args: argparse.Namespace, device: str | None = None) -> Pipeline:
    """The model that `add_model_options` names; device: another one than asked for. Raises: ValueError."""
    pipeline = load(
        args.model,
        device=device or args.device,
        dtype=args.dtype,
        prediction_type=args.prediction_type,
        tokenizer=args.tokenizer,
    )
    args.guidance_scale = pipeline.guidance_scale if args.guidance_scale is None else args.guidance_scale
    return pipeline


def parse_bytes(text: str) -> int:
    """A number of bytes, as in 512MiB or 1.5GB. Raises: ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no amount of memory; write it like 512MiB or 2GiB")
    return int(float(found[1]) * UNITS[found[2]])


def mebibytes(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"

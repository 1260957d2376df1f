"""The options of `python -m minireuse.sample`."""

from __future__ import annotations

import argparse
from pathlib import Path

from minireuse.common.options import CACHE_DTYPES, add_guidance_option, add_model_options
from minireuse.pipeline import ATTENTIONS
from minireuse.plan import KINDS
from minireuse.policies import POLICIES
from minireuse.samplers import SAMPLERS


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
    compile_help = "torch.compile the U-Net: slow at first, faster after that"
    how.add_argument("--compile", action=argparse.BooleanOptionalAction, help=compile_help)
    how.add_argument("--batch-size", type=int, default=4, metavar="N", help="images sampled together")
    reuse = p.add_argument_group("what to reuse")
    policy_help = f"{', '.join(POLICIES)} (with knobs: deepcache:every=3,order=1), a plan file, or several joined by |"
    reuse.add_argument("--policy", default="none", metavar="POLICY", help=policy_help)
    reuse.add_argument("--reuse", type=int, metavar="N", help="U-Net calls that reuse; default: half of them")
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

"""The options of `python -m minireuse.sample`."""

from __future__ import annotations

import argparse
from pathlib import Path

from minireuse.common.options import (
    CACHE_DTYPES,
    HelpFormatter,
    add_grid_options,
    add_guidance_option,
    add_model_options,
)
from minireuse.pipeline import ATTENTIONS
from minireuse.plan import KINDS
from minireuse.policies import POLICIES
from minireuse.samplers import SAMPLERS


def sample_parser() -> argparse.ArgumentParser:
    """The options of `python -m minireuse.sample`."""
    p = argparse.ArgumentParser(
        prog="python -m minireuse.sample",
        description="Generate images with Stable Diffusion, reusing tensors of the U-Net between sampling steps.",
        formatter_class=HelpFormatter,
    )
    what = p.add_argument_group("what to paint")
    what.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="one or several prompts")
    what.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt per line")
    what.add_argument("--negative-prompt", metavar="TEXT", help="what the image should not show; default: nothing")
    what.add_argument("--seed", nargs="+", type=int, default=[0], metavar="N", help="one or several seeds")
    images_help = "images per prompt; their seeds count up from --seed"
    what.add_argument("--num-images", type=int, default=1, metavar="N", help=images_help)
    png_help = "make this PNG again from the settings stored in it"
    what.add_argument("--from-png", type=Path, metavar="FILE", help=png_help)
    size_help = "pixels; default: what the model was trained at, in the proportions of --init-image"
    what.add_argument("--height", type=int, help=size_help)
    what.add_argument("--width", type=int, help=size_help)
    what.add_argument("--init-image", type=Path, metavar="FILE", help="start from this image instead of noise")
    strength_help = "how much to change the initial image: near 0 keeps it, 1 keeps a faint trace of it"
    what.add_argument("--strength", type=float, default=0.8, help=strength_help)
    how = p.add_argument_group("how to sample")
    how.add_argument("--sampler", choices=list(SAMPLERS), default="ddim")
    add_grid_options(how)
    add_guidance_option(how)
    rescale_help = "how much of the contrast that guidance adds is taken back: 0 is none, 1 is all"
    how.add_argument("--guidance-rescale", type=float, default=0.0, metavar="R", help=rescale_help)
    skip_help = "the layer of the text encoder to read: 1 is the last, 2 the one before; default: the model's own"
    how.add_argument("--clip-skip", type=int, metavar="N", help=skip_help)
    eta_help = "noise that ddim adds: 0 is none, 1 is as much as DDPM"
    how.add_argument("--eta", type=float, default=0.0, help=eta_help)
    attention_help = "attention kernel of calls that store no map"
    how.add_argument("--attention", choices=ATTENTIONS, default="fused", help=attention_help)
    compile_help = "compile the U-Net with torch.compile; the first image takes longer, later ones less"
    how.add_argument("--compile", action=argparse.BooleanOptionalAction, help=compile_help)
    how.add_argument("--batch-size", type=int, default=4, metavar="N", help="images sampled together")
    reuse = p.add_argument_group("what to reuse")
    policy_help = f"{', '.join(POLICIES)} (with knobs: deepcache:every=3,order=1), a plan file, or several joined by |"
    reuse.add_argument("--policy", default="none", metavar="POLICY", help=policy_help)
    count_help = "number of U-Net calls that reuse; default: half of the calls"
    reuse.add_argument("--reuse", type=int, metavar="N", help=count_help)
    sites_help = "which attention layers reuse; default: both"
    reuse.add_argument("--sites", choices=("self", "cross", "both"), help=sites_help)
    kind_help = "attention maps (default, but for phast), outputs, deep features, or the prediction"
    reuse.add_argument("--kind", choices=KINDS, help=kind_help)
    reuse.add_argument("--cache-dtype", choices=CACHE_DTYPES, default="float16")
    budget_help = "the most memory the cache may take, such as 512MiB; fewer sites reuse if needed"
    reuse.add_argument("--cache-budget", metavar="SIZE", help=budget_help)
    latency_help = "for phast: the closest searched plan that takes at most R of the full sampler's time; default: 0.6"
    reuse.add_argument("--latency", type=float, metavar="R", help=latency_help)
    add_model_options(p)
    out = p.add_argument_group("output")
    out.add_argument("--out", type=Path, metavar="PATH", help="file for one image, folder for several")
    maps_help = "also write every attention map as a picture into this folder"
    out.add_argument("--save-maps", type=Path, metavar="DIR", help=maps_help)
    compare_help = "also run the full sampler, warmed up; tell PSNR, SSIM and the share of time; write NAME-compare.png"
    out.add_argument("--compare", action="store_true", help=compare_help)
    out.add_argument("--overwrite", action="store_true", help="replace files instead of taking the next free number")
    dry_help = "print how much the cache will hold and stop; reads weights only for phast"
    out.add_argument("--dry-run", action="store_true", help=dry_help)
    out.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    return p

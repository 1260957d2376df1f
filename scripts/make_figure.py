"""The README's picture: `python scripts/make_figure.py --out docs/example.png`.

One row for each policy, with its name at the left; one column for each prompt. All rows start from the same noise. Also
prints how close each row comes to the first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import minireuse
from minireuse.common.metrics import psnr
from minireuse.search.language import build, policies_for

ROWS = {  # policy: what the picture calls it, and what it does
    "none": ("none", "full sampler"),
    "hurry": ("hurry", "attention maps,\nlast 10 calls"),
    "phast:kind=map": ("phast:kind=map", "attention maps,\n10 calls, searched"),
    "interval:kind=out": ("interval:kind=out", "attention outputs,\nevery other call"),
    "phast": ("phast", "the closest plan\nwithin 0.6 of\nthe time"),
}
PROMPTS = (
    "snowy hills with two pines, a red house and mountains at sunset",
    "green hills with three oaks, a lake and clouds at noon",
    "golden hills with a white house, mountains and a red balloon at dawn",
    "red dunes with a pine, a yellow house and mountains at night",
    "green hills with an oak, a blue house and a lake at sunset",
    "snowy hills with three pines, a lake and a yellow balloon at noon",
    "golden hills with two oaks, a red house and clouds at sunset",
    "snowy hills with a white house, a lake and mountains at night",
)
LABEL_WIDTH = 150  # pixels


def label(name: str, what: str, height: int) -> np.ndarray:
    """A row's name above what it does, black on white. Shapes: -> (height, LABEL_WIDTH, 3) uint8."""
    image = Image.new("RGB", (LABEL_WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    lines = [(line, 16, "black") for line in name.split("\n")] + [(line, 14, "dimgray") for line in what.split("\n")]
    top = (height - 20 * len(lines)) // 2
    for i, (line, size, colour) in enumerate(lines):
        draw.text((6, top + 20 * i), line, font=ImageFont.load_default(size), fill=colour)
    return np.array(image)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/example.png"))
    args = parser.parse_args(argv)

    pipe = minireuse.load()
    policies = policies_for("|".join(ROWS), None, "ddim", lambda: pipe.fingerprint)
    plans = {name: build(name, pipe.calls("ddim", 20), pipe.sites, policies=policies) for name in ROWS}
    seeds = list(range(len(PROMPTS)))
    rows = {name: pipe.generate(PROMPTS, seeds=seeds, plan=plan).images for name, plan in plans.items()}
    strips = [
        np.concatenate([label(*ROWS[name], images.shape[1]), *images], axis=1)  # (H, LABEL_WIDTH + B * W, 3)
        for name, images in rows.items()
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(strips)).save(args.out)
    for name in list(ROWS)[1:]:
        print(f"{name}: {np.mean(psnr(rows[name], rows['none'])):.1f} dB")


if __name__ == "__main__":
    main()

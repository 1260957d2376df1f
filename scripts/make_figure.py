"""The README's picture: `python scripts/make_figure.py --out docs/example.png`.

From above: the full sampler; HURRY and PHAST, both with 10 of 20 calls reusing their attention maps; PHAST with deep
features instead, held and extrapolated. Prints how close the rows are to the first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import minireuse
from minireuse.common.metrics import psnr
from minireuse.search.language import build, policies_for

ROWS = ("none", "hurry", "phast", "phast:kind=deep", "phast:kind=deep,order=1")
PROMPTS = (
    "a large red circle above a small blue star on a yellow background",
    "a large striped teal heart on a pink background",
    "a small white ring to the left of a large purple square on an orange background",
    "a large orange star right of a small black diamond on a green background",
    "a small green triangle below a large striped yellow circle on a blue background",
    "a large striped black cross on a white background",
    "a large pink diamond above a large teal ring on a purple background",
    "a small striped red square left of a small yellow heart on a black background",
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/example.png"))
    args = parser.parse_args(argv)

    pipe = minireuse.load()
    policies = policies_for("|".join(ROWS), None, "ddim", lambda: pipe.fingerprint)
    plans = {name: build(name, pipe.calls("ddim", 20), pipe.sites, policies=policies) for name in ROWS}
    seeds = list(range(len(PROMPTS)))
    rows = {name: pipe.generate(PROMPTS, seeds=seeds, plan=plan).images for name, plan in plans.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.concatenate(list(images), axis=1) for images in rows.values()])).save(args.out)
    for name in ROWS[1:]:
        print(f"{name}: {np.mean(psnr(rows[name], rows['none'])):.1f} dB")


if __name__ == "__main__":
    main()

"""The README's picture and its figures: `python scripts/make_figure.py --out docs/example.png`.

Above the full sampler, below the same prompts and seeds with 10 of 20 calls reusing their attention maps. Prints how
close the rows are and how long each policy takes, measured in turn.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import minireuse
from minireuse.metrics import psnr
from minireuse.policies import POLICIES, select
from minireuse.reuse import ReusePlan

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


def timed(pipe: minireuse.Pipeline, plans: dict[str, ReusePlan], rounds: int) -> dict[str, float]:
    """Median seconds of the sampling loop of one image per plan, the plans taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for _ in tqdm(range(rounds + 1), desc="time"):
        for name, plan in plans.items():
            seconds[name].append(pipe.generate(PROMPTS[0], plan=plan).seconds)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first round warms up


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/example.png"))
    parser.add_argument("--rounds", type=int, default=9, help="timed runs per policy")
    args = parser.parse_args(argv)

    pipe = minireuse.load()
    maps, outs = select(pipe.sites), select(pipe.sites, kind="out")
    plans = {
        "none": ReusePlan.nothing(20),
        "hurry map": POLICIES["hurry"](20, maps, k=10),
        "hurry out": POLICIES["hurry"](20, outs, k=10),
        "interval map": POLICIES["interval"](20, maps, k=10),
        "deepcache": POLICIES["deepcache"](20, pipe.sites, every=2),
    }
    seeds = list(range(len(PROMPTS)))
    rows = {name: pipe.generate(PROMPTS, seeds=seeds, plan=plan) for name, plan in plans.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grid = np.concatenate([np.concatenate(list(rows[name].images), axis=1) for name in ("none", "hurry map")])
    Image.fromarray(grid).save(args.out)

    seconds = timed(pipe, plans, args.rounds)
    print("| plan | seconds | of the full sampler | PSNR to it, dB | cache, MiB per image |")
    print("|---|---|---|---|---|")
    for name, result in rows.items():
        fidelity = float(np.mean(psnr(result.images, rows["none"].images)))
        cache = result.cache_peak_bytes / 2**20 / len(PROMPTS)
        ratio = seconds[name] / seconds["none"]
        print(f"| {name} | {seconds[name]:.2f} | {ratio:.2f} | {fidelity:.1f} | {cache:.1f} |")


if __name__ == "__main__":
    main()

"""A page to play with: `python scripts/explorer.py` writes docs/explorer.html, one file that loads nothing else.

Around each of four named plans, every single call is changed from computing to reusing or back, for each kind of
tensor. For each of these plans the page shows the picture, its difference to the full sampler's, how close it is and
how long it takes. scripts/explorer_page.html is the page without its data. An interrupted run goes on with the same
command.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import minireuse
from minireuse.common.journal import Journal
from minireuse.common.metrics import psnr
from minireuse.common.status import exit_status
from minireuse.files import write_whole
from minireuse.pipeline import Pipeline
from minireuse.plan import ReusePlan
from minireuse.policies import hurry, interval, phast, select
from minireuse.search import Costs, Renderer, measure, plans_of

STEPS, REUSED = 20, 10
PROMPTS = (  # no search has seen them
    "snowy hills with two pines, a red house and mountains at sunset",
    "green hills with three oaks, a lake and clouds at noon",
    "golden hills with a white house, mountains and a red balloon at dawn",
    "red dunes with a pine, a yellow house and mountains at night",
)
KINDS = {  # what the page calls them, and the order of the plans
    "map": ("attention maps, held", 0),
    "out": ("attention outputs, held", 0),
    "deep": ("deep features, extrapolated", 1),
}
PLAIN = (10, 11, 12, 13, 14, 15, 16, 17, 18)  # steps of plain samplers, to compare with
TIMES = 8  # differences are shown so many times as large
PICTURES, DIFFERENCES = 80, 60  # quality of WebP
TEMPLATE = Path(__file__).with_name("explorer_page.html")
PLACE = "/* the data */"  # in the template


def named_rows(pipe: Pipeline, kind: str) -> dict[str, str]:
    """The plans around which the page lets one call be changed, as rows of '.' and '#'."""
    sites = select(pipe.sites, kind=kind)
    # No plan of outputs is searched for: what is kept of a layer is nearly what its map decides.
    searched = "deep" if kind == "deep" else "map"
    run = {"plans": plans_of(), "sampler": "ddim", "model": pipe.fingerprint, "spacing": pipe.schedule.spacing}
    found = phast(STEPS, select(pipe.sites, kind=searched), k=REUSED, order=KINDS[searched][1], **run)
    plans = {
        "Full sampler": ReusePlan.stepwise([False] * STEPS, sites),
        "HURRY": hurry(STEPS, sites, k=REUSED),
        "Even": interval(STEPS, sites, k=REUSED),
        "Searched": found,
    }
    return {name: str(plan.grid) for name, plan in plans.items()}


def around(row: str, calls: Sequence[int]) -> list[str]:
    """The row, and the rows in which one of these calls is changed; late calls first, as they share most with it."""
    changed = [row[:call] + (".", "#")[row[call] == "."] + row[call + 1 :] for call in sorted(calls, reverse=True)]
    return [row, *changed]


def encoded(image: np.ndarray, quality: int) -> str:
    """A picture as WebP, in base64. Shapes: image (H, W, 3) uint8."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "WebP", quality=quality, method=6)
    return base64.b64encode(file.getvalue()).decode()


def decibels(images: np.ndarray, full: np.ndarray) -> list[float | None]:
    """How close pictures are to the full sampler's; None where there is no difference, since JSON has no infinity."""
    return [round(float(value), 2) if np.isfinite(value) else None for value in psnr(images, full)]


def compared(images: np.ndarray, full: np.ndarray) -> dict[str, Any]:
    """Of each picture: how close it is to the full sampler's, itself, and the difference, taken before compression.

    Shapes: two of (B, H, W, 3) uint8. Units: dB; null where there is no difference.
    """
    difference = np.abs(images.astype(int) - full) * TIMES
    return {
        "psnr": decibels(images, full),
        "pictures": [encoded(image, PICTURES) for image in images],
        "differences": [encoded(image, DIFFERENCES) for image in difference.clip(0, 255).astype(np.uint8)],
    }


def collect(pipe: Pipeline, journal: Journal, prompts: Sequence[str], *, quick: bool) -> dict[str, Any]:
    """All that the page shows: from the journal, or rendered now."""
    seeds = range(len(prompts))
    render = Renderer(pipe, prompts, seeds, steps=STEPS)
    full = render(ReusePlan.nothing(STEPS))
    kinds = []
    for kind, (title, order) in KINDS.items():
        sites, named = select(pipe.sites, kind=kind), named_rows(pipe, kind)
        rounds = 1 if quick else 15
        known = journal.known(f"costs {kind}", lambda s=sites, o=order, r=rounds: measure_costs(pipe, s, o, r))
        costs = Costs.from_json(known, pipe.sites)
        rows = [*named.values(), *around(named["Full sampler"], (3, 10, 17))]
        if not quick:
            rows = [row for start in named.values() for row in around(start, range(1, STEPS))]
        plans = []
        for row in tqdm(list(dict.fromkeys(rows)), desc=title, disable=None):
            plan = ReusePlan.stepwise([mark == "#" for mark in row], sites, order)
            found = journal.known(f"{kind} {row}", lambda p=plan: compared(render(p), full))
            plans.append({"row": row, "time": round(costs.latency(plan), 3)} | found)
        kinds.append({"kind": kind, "title": title, "named": named, "plans": plans})
    plain = []
    for steps in PLAIN[:2] if quick else PLAIN:
        shorter = lambda n=steps: pipe.generate(prompts, seeds=seeds, steps=n).images  # noqa: E731
        close = journal.known(f"plain {steps}", lambda f=shorter: decibels(f(), full))
        plain.append({"steps": steps, "time": steps / STEPS, "psnr": close})
    return {"steps": STEPS, "times": TIMES, "prompts": list(prompts), "kinds": kinds, "plain": plain}


def measure_costs(pipe: Pipeline, sites: Sequence[Any], order: int, rounds: int) -> dict[str, Any]:
    """What calls that store or reuse these sites take, as the journal keeps it."""
    return measure(pipe, [sites], rounds=rounds, order=order).to_json()


def page(data: dict[str, Any]) -> str:
    """The page with its data."""
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")  # which would end the script
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the shipped model")
    parser.add_argument("--quick", action="store_true", help="one prompt and few plans, to look at the page")
    parser.add_argument("--work", type=Path, default=Path("runs/explorer.jsonl"), help="for what is known already")
    parser.add_argument("--out", type=Path, default=Path("docs/explorer.html"))
    args = parser.parse_args(argv)

    pipe = minireuse.load(args.model, device="cpu")
    prompts = PROMPTS[:1] if args.quick else PROMPTS
    settings = {"model": pipe.digests, "prompts": prompts, "steps": STEPS, "quality": [PICTURES, DIFFERENCES]}
    args.work.parent.mkdir(parents=True, exist_ok=True)
    text = page(collect(pipe, Journal(args.work, settings), prompts, quick=args.quick))
    write_whole([args.out], text.encode(), overwrite=True)
    print(f"{args.out}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(exit_status(main, "interrupted; the same command goes on"))

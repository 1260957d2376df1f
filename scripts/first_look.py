"""The paper's claims on the shipped model, a first look: `python scripts/first_look.py --out docs/first-look`.

On each grid of timesteps, plans that reuse attention maps, DeepCache, and fewer steps are compared with the full
sampler's image of the same grid. `--out` receives the table, the curve of what a single reuse does at each call, and
the figures behind them. An interrupted run goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import minireuse
from minireuse.common.metrics import interval
from minireuse.common.status import exit_status
from minireuse.evaluate import command as evaluate
from minireuse.files import write_whole
from minireuse.plan import ReusePlan, Site
from minireuse.policies import select

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS, REUSED = 20, 10
PAPERS_PLAN = "1111111101 0001000000"  # arXiv 2401.01008, PHAST for Stable Diffusion 1.5: 1 computes, 0 reuses
RANDOM = [f"random:seed={seed}" for seed in range(5)]
POLICIES = {  # what the table calls them
    "hurry:k=4": "HURRY, last 4",
    "hurry:k=7": "HURRY, last 7",
    "hurry:k=10": "HURRY, last 10",
    "early:k=10": "its mirror image, early 10",
    "interval:k=10": "even, 10",
    "phast:kind=map,k=10": "PHAST, 10",
    "deepcache": "DeepCache, every other call",
    "deepcache:order=1": "DeepCache, extrapolated",
    "phast:kind=deep,k=10,order=1": "PHAST over deep features, extrapolated, 10",
}
PLAIN = [f"steps:{n}" for n in range(STEPS - 1, STEPS // 2 - 1, -1)]


def single(call: int, sites: Sequence[Site]) -> ReusePlan:
    """The plan in which one call alone reuses."""
    return ReusePlan.stepwise(np.arange(STEPS) == call, sites)


def plan_files(folder: Path, sites: Sequence[Site]) -> dict[str, str]:
    """Plans that no policy makes, written to files. Returns what the table calls each of them, by path."""
    computed = [digit == "1" for digit in PAPERS_PLAN.replace(" ", "")]
    plans = {"paper": ("the paper's plan for SD 1.5, 10", ReusePlan.stepwise(~np.array(computed), sites))}
    plans |= {f"single-{call:02d}": (f"call {call} alone", single(call, sites)) for call in range(1, STEPS)}
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, (title, plan) in plans.items():
        path = folder / f"{name}.json"
        if not path.exists():
            write_whole([path], plan.to_json().encode())
        paths[str(path)] = title
    return paths


def figures(results: dict[str, Any], titles: dict[str, str]) -> dict[str, list[float]]:
    """PSNR to the full sampler's image, prompt by prompt, by the row's title; the random plans are one row."""
    rows = {title: results["rows"][name]["psnr"] for name, title in titles.items()}
    rows["random, 10, mean of 5"] = np.mean([results["rows"][name]["psnr"] for name in RANDOM], axis=0).tolist()
    return rows | {f"{name.partition(':')[2]} plain steps": results["rows"][name]["psnr"] for name in PLAIN}


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """One row for each plan, one column for each grid: the mean and its 95 % interval, dB."""

    def cell(values: Sequence[float]) -> str:
        low, high = interval(values)
        return f"{np.mean(values):.1f} [{low:.1f}, {high:.1f}]"

    lines = ["| plan | " + " | ".join(f"`{grid}`, dB [95 %]" for grid in found) + " |", "|---" * (len(found) + 1) + "|"]
    for title in next(iter(found.values())):
        lines += [f"| {title} | " + " | ".join(cell(rows[title]) for rows in found.values()) + " |"]
    return "\n".join(lines) + "\n"


def plot(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """What reusing the maps of one call does, by call."""
    figure, axes = plt.subplots(figsize=(7, 4))
    calls = np.arange(1, STEPS)
    for grid, rows in found.items():
        values = [rows[f"call {call} alone"] for call in calls]
        low, high = np.array([interval(v) for v in values]).T
        axes.plot(calls, np.mean(values, axis=1), "o-", label=grid)
        axes.fill_between(calls, low, high, alpha=0.2)
    axes.set(xlabel="the call that reuses its maps", ylabel="PSNR to the full sampler's image, dB", xticks=calls)
    axes.legend(title="grid")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the shipped model")
    parser.add_argument("--prompts-file", type=Path, help="default: the shipped evaluation prompts")
    parser.add_argument("--prompts", type=int, default=24, metavar="N")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--spacings", nargs="+", default=["leading", "trailing"])
    parser.add_argument("--work", type=Path, default=Path("runs/first-look"), help="for pictures and what is known")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)

    titles = plan_files(args.work / "plans", select(minireuse.load(args.model, device="meta").sites))
    named = {path: title for path, title in titles.items() if "alone" not in title} | POLICIES
    alone = {path: title for path, title in titles.items() if "alone" in title}
    found = {}
    for spacing in args.spacings:
        folder = args.work / spacing
        if not (folder / "results.json").exists():
            model = [] if args.model is None else ["--model", str(args.model)]
            prompts = [] if args.prompts_file is None else ["--prompts-file", str(args.prompts_file)]
            own = ["--steps", str(STEPS), "--spacing", spacing, "--prompts", str(args.prompts), "--rounds", "0"]
            own += ["--batch-size", str(args.batch_size), "--out", str(folder)]
            if evaluate.main([*model, *prompts, *own, "--policies", *alone, *named, *RANDOM, *PLAIN]):
                raise ValueError(f"the evaluation on {spacing} stopped; the same command goes on")
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        found[spacing] = figures(results, alone | named)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(found, args.out / "single.png")
    data = {"steps": STEPS, "prompts": args.prompts, "psnr": found}
    for name, text in (("table.md", table(found)), ("results.json", json.dumps(data, indent=1))):
        write_whole([args.out / name], text.encode(), overwrite=True)
    print(table(found))


if __name__ == "__main__":
    sys.exit(exit_status(main, "interrupted; the same command goes on"))

"""Left open by the paper: the number of steps and of reuse steps chosen together, under a latency."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from paper.plots import save
from paper.study import GRIDS, STEPS, Study, Way
from paper.verdicts import PAPER, Verdict, gain, interval, judged, spread, table

NEEDS_PLANS = ("phast-",)
TITLE = "Steps and reuse steps chosen together"
LATENCIES = (0.65, 0.75)  # of the full sampler's time, estimated as in the paper
LEAST = 13  # steps


def reuse_for(steps: int, latency: float) -> int | None:
    """The fewest reuse steps with which so many steps take at most this time; None where it takes all of them."""
    ms = PAPER["figure_5"]["milliseconds"]
    saved = 1 - ms["reusing"] / ms["call"]
    k = math.ceil(round((steps - latency * STEPS) / saved, 9))
    return max(k, 0) if k < steps else None


def measure(study: Study) -> dict[str, Any]:
    """By grid and latency: PSNR to the 20-step image of the same grid for each number of steps, prompt by prompt."""
    prompts, found = study.prompts[: study.scale.left_open], {}
    for grid in GRIDS:
        ways = {"full": Way(study.full(), spacing=grid)}
        for latency in LATENCIES:
            for steps in range(LEAST, STEPS + 1):
                k = reuse_for(steps, latency)
                if k is None or steps < latency * STEPS:
                    continue
                plan = study.full(steps) if k == 0 else study.phast(k, grid, steps=steps)[0]
                ways[f"{latency}/{steps}/{k}"] = Way(plan, steps, spacing=grid)
        judged_ = study.judge(f"steps-and-reuse-{grid}", ways, prompts)
        found[grid] = {name: row["psnr"] for name, row in judged_.items() if name != "full"}
    return {"psnr": found}


def of(found: dict[str, Any], grid: str, latency: float) -> dict[tuple[int, int], list[float]]:
    """PSNR by (steps, reuse steps) at a latency."""
    named = {tuple(name.split("/")): values for name, values in found["psnr"][grid].items()}
    return {(int(n), int(k)): values for (at, n, k), values in named.items() if float(at) == latency}


def verdict(found: dict[str, Any]) -> Verdict:
    said, intervals = [], []
    for grid in GRIDS:
        for latency in LATENCIES:
            rows = of(found, grid, latency)
            best = max(rows, key=lambda pair: np.mean(rows[pair]))
            all_steps = next(pair for pair in rows if pair[0] == STEPS)
            gains = gain(rows[best], rows[all_steps])
            intervals.append(interval(gains))
            said.append(
                f"at {latency} on `{grid}` {best[0]} steps with {best[1]} reused are best, "
                f"{spread(gains, sign=True)} dB over "
                f"{STEPS} with {all_steps[1]}"
            )
    word = judged(all(low > 0 for low, _ in intervals), all(high <= 0 for _, high in intervals))
    return Verdict(word, f"The statement is that fewer steps with fewer reused beat {STEPS}: {'; '.join(said)}.")


def draw(found: dict[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, len(GRIDS), figsize=(11, 4), sharey=True)
    for axes, grid in zip(panels, GRIDS, strict=True):
        for latency in LATENCIES:
            rows = of(found, grid, latency)
            axes.plot([n for n, _ in rows], [np.mean(values) for values in rows.values()], "o-", label=f"{latency}")
            for (n, k), values in rows.items():
                axes.annotate(
                    str(k), (n, float(np.mean(values))), textcoords="offset points", xytext=(4, 4), fontsize=8
                )
        axes.set_xticks(range(LEAST, STEPS + 1))
        axes.set(title=grid, xlabel="steps (at each mark the number of reuse steps)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("PSNR to the 20-step image, dB")
    panels[0].legend(title="latency, estimated")
    save(figure, path)


def papers() -> list[str]:
    return [
        "The paper fixes the number of steps, and leaves open to choose it together with the number of reuse steps."
    ]


def ours(found: dict[str, Any]) -> list[str]:
    lines = [
        "Each row takes about the same time by the paper's estimate. Plans are those searched for 20 steps, fitted by "
        "timestep.",
        "",
    ]
    for grid in GRIDS:
        for latency in LATENCIES:
            rows = of(found, grid, latency)
            head = [f"`{grid}`, {latency}: steps, reused", *(f"{n}, {k}" for n, k in rows)]
            lines += table(head, [["PSNR, dB", *(f"{np.mean(values):.1f}" for values in rows.values())]])
    return lines

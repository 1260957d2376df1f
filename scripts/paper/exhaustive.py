"""The exhaustive search: all ways to reuse in 3 of 10 steps of DPM-Solver++(2M)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from minireuse.plan import ReusePlan
from minireuse.policies import hurry
from minireuse.search.phast import improve

from paper.plots import save
from paper.study import Study, Way
from paper.verdicts import PAPER, Verdict, judged, spread, table

TITLE = "Exhaustive search: HURRY and PHAST among all strategies"
STEPS, REUSED, SAMPLER = 10, 3, "dpmpp_2m"


def digits(plan: ReusePlan) -> str:
    """The strategy as the paper writes it: 1 computes, 0 reuses."""
    assert plan.grid is not None
    return plan.grid.replace(".", "1").replace("#", "0")


HURRY = "1" * (STEPS - REUSED) + "0" * REUSED


def measure(study: Study) -> dict[str, Any]:
    """PSNR of every strategy, prompt by prompt; and the one that PHAST's search finds on the mean."""
    calls = range(1, STEPS)  # the first step computes
    plans = [
        ReusePlan.stepwise(np.isin(np.arange(STEPS), chosen), study.maps)
        for chosen in itertools.combinations(calls, REUSED)
    ]
    ways = {digits(plan): Way(plan, STEPS, SAMPLER) for plan in plans}
    ways = {"full": Way(study.full(STEPS), STEPS, SAMPLER)} | ways
    found = study.judge("exhaustive", ways, study.prompts[: study.scale.exhaustive])
    psnr = {name: found[name]["psnr"] for name in ways if name != "full"}
    means = {name: float(np.mean(values)) for name, values in psnr.items()}
    start = hurry(STEPS, study.maps, k=REUSED)
    result = improve(lambda plans, prompts: iter([means[digits(p)] for p in plans]), start, study.maps, k=REUSED)
    return {"psnr": psnr, "phast": digits(result.plan), "phast_tried": len(result.tried)}


def ranked(found: dict[str, Any]) -> list[str]:
    """The strategies, best first."""
    return sorted(found["psnr"], key=lambda name: -np.mean(found["psnr"][name]))


def verdict(found: dict[str, Any]) -> Verdict:
    order = ranked(found)
    hurry_rank, phast_rank = order.index(HURRY) + 1, order.index(found["phast"]) + 1
    tenth = len(order) // 10
    word = judged(hurry_rank <= tenth and phast_rank == 1, hurry_rank > len(order) // 2 or phast_rank > tenth)
    papers_rank = order.index(PAPER["exhaustive"]["phast"]) + 1
    return Verdict(
        word,
        f"Of {len(order)} strategies HURRY is number {hurry_rank} (paper: {PAPER['exhaustive']['hurry_rank']}) and "
        f"the one that PHAST finds here is number {phast_rank} (paper: 1); the paper's own is number "
        f"{papers_rank} here.",
    )


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    order = ranked(found)
    means = [float(np.mean(found["psnr"][name])) for name in order]
    axes.plot(range(1, len(order) + 1), means, ".", color="0.6", label="all strategies")
    marked: Sequence[tuple[str, str, str]] = (
        (HURRY, "HURRY", "C0s"),
        (found["phast"], "PHAST", "C1o"),
        (PAPER["exhaustive"]["phast"], "the paper's PHAST", "C2^"),
    )
    for name, label, style in marked:
        place = order.index(name)
        axes.plot(place + 1, means[place], style, markersize=9, fillstyle="none", label=f"{label}, {name}")
    axes.set(xlabel="rank", ylabel="PSNR to the full sampler's image, dB")
    axes.legend(fontsize="small")
    save(figure, path)


def papers() -> list[str]:
    numbers = PAPER["exhaustive"]
    best = ", ".join(f"`{name}` {value} dB" for name, value in numbers["best"].items())
    return [
        f"The paper scores all {numbers['strategies']} strategies that reuse in {REUSED} of {STEPS} steps of DPM++.",
        f"The best three are {best}. PHAST finds the first, and HURRY is the third.",
    ]


def ours(found: dict[str, Any]) -> list[str]:
    order, prompts = ranked(found), len(found["psnr"][HURRY])
    shown = dict.fromkeys([*order[:3], found["phast"], HURRY, *PAPER["exhaustive"]["best"], order[-1]])
    names = {HURRY: "HURRY", found["phast"]: "PHAST here", PAPER["exhaustive"]["phast"]: "the paper's PHAST"}
    if found["phast"] == PAPER["exhaustive"]["phast"]:
        names[found["phast"]] = "PHAST, here and in the paper"
    rows = [
        [str(order.index(n) + 1), f"`{n}`", names.get(n, ""), spread(found["psnr"][n])]
        for n in sorted(shown, key=order.index)
    ]
    return [
        f"Ours is DPM-Solver++(2M) on the model's own grid, of {prompts} prompts. PHAST found its strategy "
        "after scoring "
        f"{found['phast_tried']} of {len(order)}.",
        "",
        *table(["rank", "strategy", "", "PSNR, dB [95 %]"], rows),
    ]

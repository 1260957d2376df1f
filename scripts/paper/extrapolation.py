"""Beyond the paper: going on along the line through the last two values, instead of holding the last one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from minireuse.policies import hurry, interval, select

from paper.plots import save
from paper.study import REUSED, STEPS, Study, Way
from paper.verdicts import Verdict, above, gain, spread, table

TITLE = "Extrapolated values instead of held ones"
KINDS = {"map": "maps", "out": "outputs", "deep": "deep features"}


def measure(study: Study) -> dict[str, Any]:
    """PSNR of even plans and of HURRY, of order 0 and 1, over each kind of tensor."""
    ways = {"full": Way(study.full())}
    for kind in KINDS:
        sites = select(study.pipe().sites, kind=kind)
        for name, policy in (("even", interval), ("HURRY", hurry)):
            for order in (0, 1):
                ways[f"{name}, {kind}, {order}"] = Way(replace(policy(STEPS, sites, k=REUSED), order=order))
    found = study.judge("extrapolation", ways, study.prompts[: study.scale.beyond])
    return {"psnr": {name: found[name]["psnr"] for name in ways if name != "full"}}


def gains(found: dict[str, Any]) -> dict[str, list[float]]:
    """What order 1 gains over order 0, by plan and kind."""
    psnr = found["psnr"]
    return {name[:-3]: gain(psnr[f"{name[:-3]}, 1"], psnr[name]) for name in psnr if name.endswith(", 0")}


def verdict(found: dict[str, Any]) -> Verdict:
    even = {name: values for name, values in gains(found).items() if name.startswith("even")}
    listed = ", ".join(f"{KINDS[name.split(', ')[1]]} {spread(values, sign=True)} dB" for name, values in even.items())
    return Verdict(above(even.values()), f"Extrapolated against held, in even plans: {listed}.")


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    found_gains = gains(found)
    means = [np.mean(values) for values in found_gains.values()]
    axes.bar_label(axes.bar(range(len(means)), means), fmt="%+.1f", fontsize="small")
    axes.axhline(0, color="0.5", linewidth=1)
    axes.set_xticks(range(len(means)), [name.replace(", ", "\n") for name in found_gains], fontsize="small")
    axes.set_ylabel("dB gained by extrapolating")
    save(figure, path)


def papers() -> list[str]:
    return ["The paper holds the last value. Extrapolation is of TaylorSeer (arXiv 2503.06923), first order."]


def ours(found: dict[str, Any]) -> list[str]:
    rows = [
        [name, *(spread(found["psnr"][f"{name}, {order}"]) for order in (0, 1)), spread(values, sign=True)]
        for name, values in gains(found).items()
    ]
    head = ["plan", "held, dB [95 %]", "extrapolated, dB [95 %]", "difference, dB"]
    return [f"Every plan reuses in {REUSED} of {STEPS} steps.", "", *table(head, rows)]

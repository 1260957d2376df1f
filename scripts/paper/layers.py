"""Left open by the paper: plans in which layers differ, against step-wise ones of equal measured latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from minireuse.common.timing import median_ratio
from minireuse.search.plan_files import read_plan

from paper.plots import save
from paper.study import GRIDS, Study, Way
from paper.verdicts import UNCLEAR, Verdict, above, gain, spread, table

NEEDS_PLANS = ("within-",)
TITLE = "Layer-wise plans at equal measured latency"
NAMES = {"layers": "layers differ", "map": "maps", "out": "outputs", "deep": "deep features"}
ALIKE = 0.02  # of the full sampler's time: plans that differ by more are not equally fast


def measure(study: Study) -> dict[str, Any]:
    """PSNR and time of the plans that searches found within 0.7 of the time."""
    ways = {"full": Way(study.full(), spacing=GRIDS[0])}
    for name in NAMES:
        file = study.plans / f"within-{name}.json"
        if file.exists():
            ways[name] = Way(read_plan(file, study.pipe().sites)[0], spacing=GRIDS[0])
    found = study.judge("layers", ways, study.prompts[: study.scale.left_open])
    return {"psnr": {name: found[name]["psnr"] for name in ways if name != "full"}, "times": study.times(ways)}


def share(found: dict[str, Any], name: str) -> float:
    """The time of a plan, as a share of the full sampler's."""
    return median_ratio(found["times"][name]["seconds"], found["times"]["full"]["seconds"])


def verdict(found: dict[str, Any]) -> Verdict:
    psnr = found["psnr"]
    rivals = [name for name in psnr if name != "layers"]
    if "layers" not in psnr or not rivals:
        return Verdict(UNCLEAR, "No layer-wise plan, or no step-wise one, was found within 0.7 of the time.")
    best = max(rivals, key=lambda name: np.mean(psnr[name]))
    gains = gain(psnr["layers"], psnr[best])
    equal = share(found, "layers") <= share(found, best) + ALIKE
    return Verdict(
        above([gains]) if equal else UNCLEAR,
        f"The layer-wise plan takes {share(found, 'layers'):.2f} of the time, the best step-wise one ({NAMES[best]}) "
        f"{share(found, best):.2f}, and it is {spread(gains, sign=True)} dB closer.",
    )


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    for i, name in enumerate(found["psnr"]):
        axes.plot(share(found, name), np.mean(found["psnr"][name]), "Doos"[i % 4], color=f"C{i}", label=NAMES[name])
    axes.set(xlabel="measured time, as a share of the full sampler's", ylabel="PSNR to the full sampler's image, dB")
    if found["psnr"]:
        axes.legend()
    save(figure, path)


def papers() -> list[str]:
    return ["The paper finds that searching layers one by one has limited impact on SD 1.5, and leaves the rest open."]


def ours(found: dict[str, Any]) -> list[str]:
    rows = [[NAMES[n], spread(values), f"{share(found, n):.2f}"] for n, values in found["psnr"].items()]
    text = "Each plan was searched for the best PSNR within 0.7 of the time, with the fused kernel."
    return [text, "", *table(["what reuses", "PSNR, dB [95 %]", "measured time"], rows)]

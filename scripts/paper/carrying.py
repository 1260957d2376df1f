"""Beyond the paper's numbers: what carrying a plan over by timestep gains, against by share of the calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from minireuse.plan import ReusePlan
from minireuse.policies import fit

from paper.plots import save
from paper.study import GRIDS, STEPS, Study, Way
from paper.verdicts import Verdict, above, gain, spread, table

NEEDS_PLANS = ("phast-",)
TITLE = "Carrying a plan over by timestep"
RUNS = {  # a name, and the run: sampler, steps, grid
    "trailing": ("ddim", STEPS, "trailing"),
    "DPM++": ("dpmpp_2m", STEPS, "leading"),
    "10 steps": ("ddim", 10, "leading"),
    "15 steps": ("ddim", 15, "leading"),
    "DPM-Solver-2": ("dpm_solver_2", 10, "leading"),
    "karras": ("dpmpp_2m", 15, "karras"),
}


def measure(study: Study) -> dict[str, Any]:
    """By run: PSNR of the plan for DDIM-20 on `leading`, carried over in both ways and half of the calls reused."""
    plan, _ = study.phast(spacing=GRIDS[0])
    row = [cell == "#" for cell in plan.grid or ""]
    own = study.pipe(GRIDS[0]).call_timesteps("ddim", STEPS)
    found: dict[str, Any] = {"plan": plan.grid, "rows": {}}
    for name, (sampler, steps, grid) in RUNS.items():
        times = study.pipe(grid).call_timesteps(sampler, steps)
        calls = len(times)
        carried = {"share": fit(row, calls, calls // 2), "timestep": fit(row, calls, calls // 2, own, times)}
        ways = {"full": Way(ReusePlan.nothing(calls), steps, sampler, grid)}
        ways |= {how: Way(ReusePlan.stepwise(r, study.maps), steps, sampler, grid) for how, r in carried.items()}
        judged = study.judge(f"carrying-{name}", ways, study.prompts[: study.scale.beyond])
        found["rows"][name] = {
            how: {"psnr": judged[how]["psnr"], "plan": ways[how].plan.grid} for how in ("share", "timestep")
        }
    return found


def verdict(found: dict[str, Any]) -> Verdict:
    gains = {n: gain(row["timestep"]["psnr"], row["share"]["psnr"]) for n, row in found["rows"].items()}
    differ = {n: values for n, values in gains.items() if len({r["plan"] for r in found["rows"][n].values()}) > 1}
    listed = ", ".join(f"{name} {spread(values, sign=True)} dB" for name, values in differ.items())
    pooled = np.mean(list(differ.values()), axis=0).tolist() if differ else []
    said = f"By timestep against by share: {listed}." if listed else "Both ways gave the same plans."
    return Verdict(above([pooled] if pooled else []), said)


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    places = np.arange(len(found["rows"]))
    for i, how in enumerate(("share", "timestep")):
        means = [np.mean(row[how]["psnr"]) for row in found["rows"].values()]
        axes.bar_label(axes.bar(places + (i - 0.5) * 0.4, means, 0.4, label=f"by {how}"), fmt="%.1f", fontsize="small")
    axes.set_xticks(places, list(found["rows"]), fontsize="small")
    axes.set_ylabel("PSNR to the full sampler's image, dB")
    axes.legend()
    save(figure, path)


def papers() -> list[str]:
    return [
        "The paper's search for DPM++ gave DDIM's plan up to a rounding of timesteps, and it carried the "
        "plan over by them."
    ]


def ours(found: dict[str, Any]) -> list[str]:
    rows = [
        [name, *(cell for how in ("share", "timestep") for cell in (f"`{row[how]['plan']}`", spread(row[how]["psnr"])))]
        for name, row in found["rows"].items()
    ]
    head = ["run", "plan by share", "PSNR, dB [95 %]", "plan by timestep", "PSNR, dB [95 %]"]
    return [f"The plan `{found['plan']}` was searched for DDIM-20 on `leading`.", "", *table(head, rows)]

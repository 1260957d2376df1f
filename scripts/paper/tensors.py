"""Left open by the paper: attention outputs and deep features instead of maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from minireuse.common.timing import median_ratio
from minireuse.policies import hurry, interval, select

from paper.plots import save
from paper.study import REUSED, STEPS, Study, Way
from paper.verdicts import Verdict, gain, judged, spread, table
from paper.verdicts import interval as ends

NEEDS_PLANS = ("phast-",)
TITLE = "Attention outputs and deep features"
KINDS = {"map": "maps", "out": "outputs", "deep": "deep features"}
PLAIN = (10, 11, 12, 13, 15, 17)  # steps of the plain sampler beside them


def measure(study: Study) -> dict[str, Any]:
    """PSNR and times of three policies over each kind of tensor, and of fewer steps."""
    ways = {"full": Way(study.full())}
    for kind in KINDS:
        sites = select(study.pipe().sites, kind=kind)
        ways |= {
            f"HURRY, {kind}": Way(hurry(STEPS, sites, k=REUSED)),
            f"even, {kind}": Way(interval(STEPS, sites, k=REUSED)),
            f"PHAST, {kind}": Way(study.phast(kind=kind)[0]),
        }
    ways |= {f"{n} steps": Way(study.full(n), n) for n in PLAIN}
    found = study.judge("tensors", ways, study.prompts[: study.scale.left_open])
    return {"psnr": {name: found[name]["psnr"] for name in ways if name != "full"}, "times": study.times(ways)}


def share(found: dict[str, Any], name: str, how: str) -> float:
    return median_ratio(found["times"][name][how], found["times"]["full"][how])


def rival(found: dict[str, Any], name: str, how: str) -> str:
    """The plain sampler with the fewest steps that takes as long; the slowest that was run, where none does."""
    plain = [f"{n} steps" for n in PLAIN if f"{n} steps" in found["psnr"]]
    slower = [p for p in plain if share(found, p, how) >= share(found, name, how)]
    return min(slower or plain[-1:], key=lambda p: share(found, p, how))


def best_of(found: dict[str, Any], kind: str) -> str:
    rows = [name for name in found["psnr"] if name.endswith(f", {kind}")]
    return max(rows, key=lambda name: np.mean(found["psnr"][name]))


def verdict(found: dict[str, Any]) -> Verdict:
    said, intervals = [], []
    for kind, text in KINDS.items():
        best = best_of(found, kind)
        other = rival(found, best, "seconds")
        gains = gain(found["psnr"][best], found["psnr"][other])
        intervals.append(ends(gains))
        said.append(
            f"{text} ({best.split(',')[0]}) {spread(found['psnr'][best])} dB in "
            f"{share(found, best, 'seconds'):.2f} of the "
            f"time, {spread(gains, sign=True)} dB over {other}"
        )
    word = judged(any(low > 0 for low, _ in intervals[1:]), all(high < 0 for _, high in intervals[1:]))
    return Verdict(word, f"With the fused kernel: {'; '.join(said)}.")


def draw(found: dict[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axes, (how, title) in zip(
        panels, {"seconds": "fused kernel", "seconds_explicit": "maps written out"}.items(), strict=True
    ):
        plain = [name for name in found["psnr"] if name.endswith(" steps")]
        points = sorted((share(found, name, how), np.mean(found["psnr"][name])) for name in plain)
        axes.plot(*zip(*points, strict=True), "^-", color="0.5", label="fewer steps")
        for i, (kind, text) in enumerate(KINDS.items()):
            for j, policy in enumerate(("HURRY", "even", "PHAST")):
                name = f"{policy}, {kind}"
                axes.plot(share(found, name, how), np.mean(found["psnr"][name]), "sDo"[j], color=f"C{i}",
                          fillstyle="none" if j < 2 else "full", label=f"{policy}, {text}")  # fmt: skip
        axes.set(xlabel="measured time, as a share of the full sampler's", title=title)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("PSNR to the full sampler's image, dB")
    panels[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def papers() -> list[str]:
    return ["The paper reuses maps alone, and leaves other tensors open."]


def ours(found: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            spread(values),
            f"{share(found, name, 'seconds'):.2f}",
            f"{share(found, name, 'seconds_explicit'):.2f}",
            f"{found['times'][name]['cache_mib']:.2f}",
        ]
        for name, values in found["psnr"].items()
    ]
    head = ["way", "PSNR, dB [95 %]", "time, fused", "time, maps written out", "cache, MiB"]
    return [f"Every plan reuses in {REUSED} of {STEPS} steps.", "", *table(head, rows)]

"""Figure 5: PSNR over latency, for PHAST, HURRY and DDIM with fewer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from minireuse.common.timing import median_ratio

from paper.study import GRIDS, REUSED, STEPS, Study, Way
from paper.verdicts import PAPER, Verdict, above, gain, spread, table

NEEDS_PLANS = ("phast-",)
TITLE = "Figure 5: PHAST, HURRY and fewer steps at equal latency"
LATENCIES = {  # how the time of a way is told
    "estimated": "estimated as in the paper",
    "seconds_explicit": "measured, maps written out",
    "seconds": "measured, fused kernel",
}


def measure(study: Study) -> dict[str, Any]:
    """By grid: PSNR of each way to the 20-step image of the same grid, prompt by prompt; and the times of each way.

    Plans are used on the grid they were searched on. Times hardly depend on the grid, so those of `leading` serve both.
    """
    scale, found = study.scale, {"times": {}, "grids": {}}
    for grid in GRIDS:
        chosen = {k: study.phast(k, grid) for k in scale.ks}
        ways = {"full": Way(study.full(), spacing=grid)}
        ways |= {f"PHAST {k}": Way(plan, spacing=grid) for k, (plan, _) in chosen.items()}
        ways |= {f"HURRY {k}": Way(study.hurry(k), spacing=grid) for k in scale.ks}
        ways |= {f"DDIM {n}": Way(study.full(n), n, spacing=grid) for n in scale.fewer}
        judged = study.judge(f"figure-5-{grid}", ways, study.prompts[: scale.figure_5])
        found["grids"][grid] = {
            "psnr": {name: row["psnr"] for name, row in judged.items() if name != "full"},
            "plans": {str(k): plan.grid for k, (plan, _) in chosen.items()},
            "notes": {str(k): note for k, (_, note) in chosen.items() if note},
        }
        if grid == GRIDS[0]:
            found["times"] = study.times(ways)
    return found


def latency(found: dict[str, Any], name: str, how: str) -> float:
    """The time of a way as a share of the full sampler's, such as "PHAST 10" or "DDIM 13"."""
    kind, number = name.split()
    if how == "estimated":
        ms = PAPER["figure_5"]["milliseconds"]
        share = int(number) / STEPS
        return share if kind == "DDIM" else 1 - share + share * ms["reusing"] / ms["call"]
    times = found["times"]
    return median_ratio(times[name][how], times["full"][how])


def of(found: dict[str, Any], grid: str, kind: str) -> dict[int, list[float]]:
    """PSNR by the number of a way, in order."""
    psnr = found["grids"][grid]["psnr"]
    numbers = sorted(int(name.split()[1]) for name in psnr if name.startswith(f"{kind} "))
    return {n: psnr[f"{kind} {n}"] for n in numbers}


def plain_at(found: dict[str, Any], grid: str, share: float, how: str) -> list[float]:
    """PSNR of the plain sampler that takes this share of the time, between two numbers of steps on a line.

    Faster or slower than any that was run, it is the fastest or the slowest of them.
    """
    plain = of(found, grid, "DDIM")
    shares = [latency(found, f"DDIM {n}", how) for n in plain]
    order = np.argsort(shares)
    columns = np.array(list(plain.values()))[order].T  # prompts x numbers of steps
    return [float(np.interp(share, np.array(shares)[order], column)) for column in columns]


def over_plain(found: dict[str, Any], grid: str, name: str, how: str = "estimated") -> list[float]:
    """What a way gains over the plain sampler of equal latency, prompt by prompt."""
    return gain(found["grids"][grid]["psnr"][name], plain_at(found, grid, latency(found, name, how), how))


def share_of_grid(found: dict[str, Any], k: int = REUSED) -> float:
    """The share of PHAST's gain on `leading` that is its rival's grid: what the rival itself gains on `trailing`."""
    at = latency(found, f"PHAST {k}", "estimated")
    rival = {grid: float(np.mean(plain_at(found, grid, at, "estimated"))) for grid in GRIDS}
    whole = float(np.mean(over_plain(found, "leading", f"PHAST {k}")))
    return (rival["trailing"] - rival["leading"]) / whole


def papers_gain(k: int = REUSED) -> float:
    """What the paper's PHAST gains over its plain DDIM at the latency that the paper estimates."""
    numbers = PAPER["figure_5"]
    share = 1 - k / STEPS + k / STEPS * numbers["milliseconds"]["reusing"] / numbers["milliseconds"]["call"]
    steps = sorted(map(int, numbers["ddim"]))
    plain = np.interp(share * STEPS, steps, [numbers["ddim"][str(n)] for n in steps])
    return float(numbers["phast"][str(k)] - plain)


def verdict(found: dict[str, Any]) -> Verdict:
    ks = list(of(found, "leading", "PHAST"))
    gains = [over_plain(found, "leading", f"PHAST {k}") for k in ks]
    gains += [gain(of(found, "leading", "PHAST")[k], of(found, "leading", "HURRY")[k]) for k in ks]
    word = above(gains)
    own, other = (over_plain(found, grid, f"PHAST {REUSED}") for grid in GRIDS)
    share = share_of_grid(found)
    sentence = (
        f"With {REUSED} reuse steps PHAST is {spread(own, sign=True)} dB above plain DDIM of equal estimated "
        "latency on "
        f"the grid `leading` (paper: {papers_gain():+.1f}) and {spread(other, sign=True)} dB on `trailing`."
    )
    if np.mean(own) > 0:
        sentence += f" {100 * share:.0f} % of the gain on `leading` is the grid of the rival."
    return Verdict(word, sentence)


def draw(found: dict[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(len(GRIDS), len(LATENCIES), figsize=(13, 8), sharey=True, squeeze=False)
    for row, grid in zip(panels, GRIDS, strict=True):
        for axes, (how, title) in zip(row, LATENCIES.items(), strict=True):
            for kind, style in (("PHAST", "C1o-"), ("HURRY", "C0s-"), ("DDIM", "C7^-")):
                points = sorted(
                    (latency(found, f"{kind} {n}", how), float(np.mean(values)))
                    for n, values in of(found, grid, kind).items()
                )
                label = "DDIM with fewer steps" if kind == "DDIM" else kind
                axes.plot(*zip(*points, strict=True), style, label=label)
            axes.set_title(f"`{grid}`, {title}".replace("`", ""), fontsize="medium")
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("latency, as a share of 20 steps without reuse")
    for row in panels:
        row[0].set_ylabel("PSNR to the 20-step image, dB")
    _papers_curves(panels[0][0])
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=6)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _papers_curves(axes: Any) -> None:
    """The paper's points, read off its plot, in its own panel."""
    numbers = PAPER["figure_5"]
    reusing = numbers["milliseconds"]["reusing"] / numbers["milliseconds"]["call"]
    for kind, style, label in (("phast", "C1", "the paper's PHAST"), ("hurry", "C0", "the paper's HURRY")):
        shares = [1 - int(k) / STEPS * (1 - reusing) for k in numbers[kind]]
        axes.plot(shares, list(numbers[kind].values()), ":", color=style, label=label)
    axes.plot([int(n) / STEPS for n in numbers["ddim"]], list(numbers["ddim"].values()), ":", color="C7",
              label="the paper's DDIM")  # fmt: skip


def papers() -> list[str]:
    numbers = PAPER["figure_5"]
    ms = numbers["milliseconds"]
    rows = [
        [name, *(f"~{numbers[key][k]}" for k in numbers["phast"])]
        for name, key in (("PHAST", "phast"), ("HURRY", "hurry"))
    ]
    plain = ", ".join(f"{n} steps ~{value}" for n, value in numbers["ddim"].items())
    return [
        f"The paper runs DDIM with {STEPS} steps on SD 1.5 and {numbers['prompts']} labels. It estimates latency as "
        f"{ms['call']} ms for a call and {ms['reusing']} ms for one that reuses.",
        "",
        *table(["reuse steps", *numbers["phast"]], rows),
        f"Plain DDIM has, in dB: {plain}. This line is flat: 18 steps are as far from 20 as 12 are. A grid whose first "
        "timestep moves with the number of steps does that (inferred); diffusers' `leading` is one. The paper does not "
        "tell its grid, so both are tried here, each against its own 20-step image.",
    ]


def ours(found: dict[str, Any]) -> list[str]:
    ks = list(of(found, "leading", "PHAST"))
    lines = [f"Ours has {len(next(iter(of(found, 'leading', 'PHAST').values())))} prompts.", ""]
    for grid in GRIDS:
        psnr = {kind: of(found, grid, kind) for kind in ("PHAST", "HURRY", "DDIM")}
        lines += [f"On the grid `{grid}`, PSNR in dB:", ""]
        rows = [[kind, *(f"{np.mean(psnr[kind][k]):.1f}" for k in ks)] for kind in ("PHAST", "HURRY")]
        for how, title in LATENCIES.items():
            rows.append([f"PHAST over plain DDIM, {title}", *_gains(found, grid, "PHAST", ks, how)])
        rows.append(
            ["HURRY over plain DDIM, estimated as in the paper", *_gains(found, grid, "HURRY", ks, "estimated")]
        )
        lines += table(["reuse steps", *map(str, ks)], rows)
        plain = ", ".join(f"{n} steps {np.mean(values):.1f}" for n, values in psnr["DDIM"].items())
        lines += [f"Plain DDIM: {plain}.", ""]
        if found["grids"][grid]["notes"]:
            carried = ", ".join(found["grids"][grid]["notes"])
            lines += [f"The plans for {carried} reuse steps were not searched on this grid, but carried over.", ""]
    rows = [
        [title, *(f"{latency(found, f'{kind} {n}', how):.2f}" for kind, n in _corners(ks, found))]
        for how, title in LATENCIES.items()
    ]
    lines += ["Latency as a share of 20 plain steps:", ""]
    return lines + table(["", *(f"{kind} {n}" for kind, n in _corners(ks, found))], rows)


def _gains(found: dict[str, Any], grid: str, kind: str, ks: Sequence[int], how: str) -> list[str]:
    return [f"{np.mean(over_plain(found, grid, f'{kind} {k}', how)):+.1f}" for k in ks]


def _corners(ks: Sequence[int], found: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Ways whose latencies are printed: few, many and half reuse steps, and the plain sampler near them."""
    some = sorted({ks[0], REUSED, ks[-1]} & set(ks))
    plain = sorted(int(name.split()[1]) for name in found["times"] if name.startswith("DDIM"))
    return [*(("PHAST", k) for k in some), *(("HURRY", k) for k in some), *(("DDIM", n) for n in plain[::3])]

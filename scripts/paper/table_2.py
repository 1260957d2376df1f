"""Table 2: DDIM and DPM++, the model and its guidance-distilled sibling; time, memory, the precision of the cache."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from minireuse.common.timing import median_ratio

from paper.plots import save
from paper.study import DISTILLED, FEWER, OWN, STEPS, Study, Way
from paper.verdicts import PAPER, Verdict, above, all_of, gain, judged, spread, table

NEEDS_PLANS = ("phast-",)
NEEDS_MODELS = (DISTILLED,)
TITLE = "Table 2: two samplers, a distilled model, time and memory"
SAMPLERS = {"ddim": "DDIM", "dpmpp_2m": "DPM++"}
CACHES = {"PHAST": "float32", "PHAST, float16 cache": "float16", "PHAST, 8-bit cache": "uint8"}
MODELS = {OWN: "the model", DISTILLED: "the distilled model"}
ROWS = (f"{STEPS} steps", f"{FEWER} steps", *CACHES)


def measure(study: Study) -> dict[str, Any]:
    """By model, sampler and row: PSNR, how prompts are followed, the Fréchet distance to the full sampler; and times.

    Plans were searched for DDIM on the model itself and are carried over, as the paper does. Times are of DPM++.
    """
    prompts, plan, found = study.prompts[: study.scale.table_2], study.phast()[0], {}
    models = [model for model in MODELS if study.has(model)]
    timed: dict[str, Way] = {}
    for model in models:
        found[model] = {}
        for sampler in SAMPLERS:
            ways = {
                f"{STEPS} steps": Way(study.full(), sampler=sampler, model=model),
                f"{FEWER} steps": Way(study.full(FEWER), FEWER, sampler, model=model),
                **{name: Way(plan, sampler=sampler, cache=cache, model=model) for name, cache in CACHES.items()},
            }
            stage = f"table-2/{model}-{sampler}"
            judged = study.judge(stage, ways, prompts, f"{STEPS} steps")
            for name in ways:
                judged[name]["fid"] = study.distance(stage, name, len(prompts), f"{STEPS} steps")
            found[model][sampler] = judged
        timed |= {f"{model}/{name}": way for name, way in ways.items()}
    return {"rows": found, "times": study.times(timed)}


def time_of(found: dict[str, Any], model: str, name: str, how: str) -> float:
    """A row's time as a share of the same model's 20 steps with the same kernel."""
    times = found["times"]
    return median_ratio(times[f"{model}/{name}"][how], times[f"{model}/{STEPS} steps"][how])


def verdict(found: dict[str, Any]) -> Verdict:
    gains, losses = {}, []
    for model, samplers in found["rows"].items():
        for sampler, rows in samplers.items():
            psnr = {name: row["psnr"] for name, row in rows.items()}
            gains[f"{MODELS[model]} with {SAMPLERS[sampler]}"] = gain(psnr["PHAST"], psnr[f"{FEWER} steps"])
            losses += [float(np.mean(gain(psnr[name], psnr["PHAST"]))) for name in list(CACHES)[1:]]
    closer, small = above(gains.values()), judged(min(losses) > -0.2, min(losses) < -1)
    listed = ", ".join(f"{name} {spread(values, sign=True)} dB" for name, values in gains.items())
    explicit, fused = (time_of(found, OWN, "PHAST", how) for how in ("seconds_explicit", "seconds"))
    ms = PAPER["table_2"]["model"]
    return Verdict(
        all_of([closer, small]),
        f"PHAST over {FEWER} steps: {listed}. Caches of fewer bits change at most "
        f"{max(map(abs, losses)):.2f} dB. PHAST "
        f"takes {explicit:.2f} of the time where maps are written out and {fused:.2f} with the fused kernel (paper: "
        f"{ms['PHAST']['ms'] / ms['20 steps']['ms']:.2f}).",
    )


def draw(found: dict[str, Any], path: Path) -> None:
    """PSNR over time: one panel for each model, the two samplers and both kernels."""
    models = list(found["rows"])
    figure, panels = plt.subplots(1, len(models), figsize=(6.5 * len(models), 4.5), sharey=True, squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        for i, name in enumerate(ROWS[1:]):
            for sampler, marker in (("ddim", "o"), ("dpmpp_2m", "s")):
                value = float(np.mean(found["rows"][model][sampler][name]["psnr"]))
                for how, filled in (("seconds_explicit", "full"), ("seconds", "none")):
                    label = name if (sampler, how) == ("ddim", "seconds_explicit") else None
                    axes.plot(time_of(found, model, name, how), value, marker, color=f"C{i}", fillstyle=filled,
                              markersize=8, label=label)  # fmt: skip
        axes.set(title=MODELS[model], xlabel=f"time of DPM++, as a share of {STEPS} steps of the same kernel")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"PSNR to the image of {STEPS} steps, dB")
    marks = "round: DDIM, square: DPM++\nfilled: maps written out,\nopen: fused kernel"
    panels[0][-1].legend(title=marks, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def papers() -> list[str]:
    numbers = PAPER["table_2"]
    rows = [
        [
            {"model": "SD 1.5", "distilled": "distilled"}[model],
            name,
            *map(_cell, row["psnr"]),
            _cell(row["ms"], 0),
            _cell(row["MiB"], 0),
        ]
        for model in ("model", "distilled")
        for name, row in numbers[model].items()
    ]
    clip = ", ".join(f"{name} {value:.4f}" for name, value in numbers["clip"].items())
    fid = ", ".join(f"{name} {value:.2f}" for name, value in numbers["fid"].items())
    return [
        "The paper runs DDIM and DPM++ on COCO 2017, on SD 1.5 and on a model with distilled guidance, one "
        "pass instead of "
        "two. Time and memory are measured for one image on an A40, in float32, with DPM++ and the largest batch.",
        "",
        *table(["model", "", "DDIM, dB", "DPM++, dB", "ms", "MiB"], rows),
        f"CLIP score and FID hardly move with DDIM on SD 1.5: CLIP {clip}; FID {fid}.",
    ]


def ours(found: dict[str, Any]) -> list[str]:
    rows = []
    for model, samplers in found["rows"].items():
        for name in ROWS:
            times = found["times"][f"{model}/{name}"]
            both = [samplers[sampler][name] for sampler in SAMPLERS]
            reference = name == f"{STEPS} steps"
            follows = [np.mean(row["follows"]) if None not in row["follows"] else None for row in both]
            rows.append(
                [
                    MODELS[model],
                    name,
                    *("" if reference else spread(row["psnr"]) for row in both),
                    *(_cell(value, 3) for value in follows),
                    *("" if reference else _cell(row["fid"]) for row in both),
                    f"{time_of(found, model, name, 'seconds_explicit'):.2f}",
                    f"{time_of(found, model, name, 'seconds'):.2f}",
                    f"{times['cache_mib']:.1f}" + (f", {times['peak_mib']:.0f}" if "peak_mib" in times else ""),
                ]
            )
    memory = "cache, MiB" + (", peak" if any("peak_mib" in row for row in found["times"].values()) else "")
    head = ["model", "", "DDIM, dB [95 %]", "DPM++, dB [95 %]", "DDIM, prompt followed", "DPM++, prompt followed"]
    head += ["DDIM, Fréchet", "DPM++, Fréchet", "time, maps written out", "time, fused", memory]
    prompts = len(found["rows"][OWN]["ddim"]["PHAST"]["psnr"])
    lines = [
        f"Ours has {prompts} prompts. Each model is compared with its own {STEPS} steps. What the classifier reads in "
        "pictures takes the place of CLIP, and the Fréchet distance is to the full sampler's pictures. Time is of one "
        f"picture with DPM++, as a share of the same model's {STEPS} steps with the same kernel.",
        "",
        *table(head, rows),
    ]
    if DISTILLED not in found["rows"]:
        lines += ["The guidance-distilled model was not at hand; the stage `distil` trains it.", ""]
    return lines


def _cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"

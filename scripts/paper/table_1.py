"""Table 1: one strategy, searched once, carried to other prompts, models and sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from paper.plots import save
from paper.prompts import renders, sets_of
from paper.study import FEWER, SIBLING, Study, Way
from paper.verdicts import PAPER, Verdict, above, gain, spread, table

NEEDS_PLANS = ("phast-",)
NEEDS_MODELS = (SIBLING,)
TITLE = "Table 1: one strategy serves other prompts, models and sizes"
SIZES = (0.75, 1.5)  # of the model's own: 96 and 192 pixels of 128
ROWS = ("full", f"{FEWER} steps", "PHAST")


def measure(study: Study) -> dict[str, Any]:
    """By setting and way: PSNR to the full sampler's image of the setting, prompt by prompt, and the Fréchet distance.

    The distance is to renders of the scenes, as the model was trained on; for a model of another world, to the full
    sampler's pictures.
    """
    plan, note = study.phast()
    count, pipe = study.scale.table_1, study.pipe()
    side = pipe.unet.config.sample_size * pipe.vae.config.factor
    settings: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
        name: (prompts, {}) for name, prompts in (sets_of(study.prompts) or {"prompts": study.prompts}).items()
    }
    settings |= {name: (prompts, {}) for name, prompts in study.sets.items()}
    if study.has(SIBLING):
        settings["another model"] = study.prompts, {"model": SIBLING}
    for factor in SIZES:
        size = round(side * factor / pipe.unit) * pipe.unit
        settings[f"{size} pixels"] = study.prompts, {"size": size}
    found: dict[str, Any] = {"rows": {}, "phast": plan.grid, "note": note, "sibling": study.has(SIBLING)}
    for name, (prompts, more) in settings.items():
        chosen, stage = list(prompts[:count]), f"table-1/{name}"
        ways = {
            "full": Way(study.full(), **more),
            f"{FEWER} steps": Way(study.full(FEWER), FEWER, **more),
            "PHAST": Way(plan, **more),
        }
        judged = study.judge(stage, ways, chosen)
        real = renders(chosen, len(chosen)) if sets_of(study.prompts) else "full"
        found["rows"][name] = {
            way: {"psnr": judged[way]["psnr"], "fid": study.distance(stage, way, len(chosen), real)} for way in ROWS
        }
    return found


def verdict(found: dict[str, Any]) -> Verdict:
    gains = {name: gain(row["PHAST"]["psnr"], row[f"{FEWER} steps"]["psnr"]) for name, row in found["rows"].items()}
    means = {name: float(np.mean(values)) for name, values in gains.items()}
    most, least = max(means, key=lambda n: means[n]), min(means, key=lambda n: means[n])
    papers_gains = [row["PHAST"][0] - row["13 steps"][0] for row in PAPER["table_1"].values()]
    further = [
        row["PHAST"]["fid"] / row["full"]["fid"] for row in found["rows"].values() if row["full"]["fid"] > 1e-6
    ]  # no distance of a set to itself, nor of a single picture
    sentence = (
        f"PHAST is between {means[least]:+.1f} dB ({least}) and {means[most]:+.1f} dB ({most}) above {FEWER} steps "
        f"(paper: {min(papers_gains):+.1f} to {max(papers_gains):+.1f})."
    )
    if further:
        sentence += f" Its Fréchet distance is {min(further):.2f} to {max(further):.2f} of the full sampler's own."
    return Verdict(above(gains.values()), sentence)


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5))
    places = np.arange(len(found["rows"]))
    for i, way in enumerate(ROWS[1:]):
        means = [np.mean(row[way]["psnr"]) for row in found["rows"].values()]
        bars = axes.bar(places + (i - 0.5) * 0.4, means, 0.4, label=way)
        axes.bar_label(bars, fmt="%.1f", fontsize="small")
    axes.set_xticks(places, [name.replace(" or ", "\nor ").replace(" never", "\nnever") for name in found["rows"]])
    axes.tick_params(axis="x", labelsize="small", rotation=20)
    axes.set_ylabel("PSNR to the full sampler's image, dB")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    save(figure, path)


def papers() -> list[str]:
    rows = [
        [name, *(f"{value:.2f}" for way in ("13 steps", "PHAST") for value in row[way])]
        for name, row in PAPER["table_1"].items()
    ]
    return [
        "The paper carries one strategy, searched once, to other prompts and to SDXL, and sets 13 plain "
        "steps beside it.",
        "",
        *table(["", "13 steps: PSNR, dB", "FID", "PHAST: PSNR, dB", "FID"], rows)[:-1],
    ]


def ours(found: dict[str, Any]) -> list[str]:
    def cells(row: dict[str, Any]) -> list[str]:
        values = [cell for way in ROWS[1:] for cell in (spread(row[way]["psnr"]), _number(row[way]["fid"]))]
        return [*values, _number(row["full"]["fid"])]

    head = ["", "13 steps: PSNR, dB [95 %]", "Fréchet", "PHAST: PSNR, dB [95 %]", "Fréchet", "full: Fréchet"]
    prompts = len(next(iter(found["rows"].values()))["PHAST"]["psnr"])
    lines = [
        f"Ours has {prompts} prompts in each row. The Fréchet distance is to renders of the scenes, by the features of "
        "the project's classifier; of so few pictures it serves to compare the cells of a row only.",
        "",
        *table(head, [[name, *cells(row)] for name, row in found["rows"].items()]),
    ]
    if not found["sibling"]:
        lines += ["No other model was given with `--sibling`.", ""]
    return lines


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"

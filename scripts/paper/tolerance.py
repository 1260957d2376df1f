"""Left open by the paper: a U-Net fine-tuned to tolerate reuse, under one fixed plan or under random plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from paper.plots import save
from paper.study import OWN, REUSED, TUNED_FIXED, TUNED_RANDOM, Study, Way
from paper.verdicts import UNCLEAR, Verdict, above, gain, spread, table

NEEDS_MODELS = (TUNED_FIXED, TUNED_RANDOM)
NEEDS_PLANS = ("phast-",)
TITLE = "Fine-tuning the U-Net to tolerate reuse"
MODELS = {OWN: "as it was", TUNED_FIXED: "tuned under the plan", TUNED_RANDOM: "tuned under random plans"}
PLANS = ("PHAST", "HURRY")


def measure(study: Study) -> dict[str, Any]:
    """By model and plan: PSNR to the original full sampler's image and to its own, and how prompts are followed."""
    prompts = study.prompts[: study.scale.left_open]
    plans = {"PHAST": study.phast()[0], "HURRY": study.hurry()}
    found: dict[str, Any] = {"rows": {}}
    models = [model for model in MODELS if study.has(model)]
    ways = {f"{model}, full": Way(study.full(), model=model) for model in models}
    ways |= {f"{model}, {name}": Way(plan, model=model) for model in models for name, plan in plans.items()}
    original = study.judge("tolerance", ways, prompts, f"{OWN}, full")
    for name in ways:
        follows = original[name]["follows"]
        found["rows"][name] = {
            "original": original[name]["psnr"],
            "own": study.between("tolerance", name, f"{name.split(',')[0]}, full", len(prompts)),
            "follows": None if None in follows else float(np.mean(follows)),
        }
    return found


def verdict(found: dict[str, Any]) -> Verdict:
    rows = found["rows"]
    tuned = [model for model in (TUNED_FIXED, TUNED_RANDOM) if f"{model}, full" in rows]
    if not tuned:
        return Verdict(UNCLEAR, "No tuned model was at hand; the stage `tolerate` trains two.")
    gains = {m: gain(rows[f"{m}, PHAST"]["original"], rows[f"{OWN}, PHAST"]["original"]) for m in tuned}
    listed = ", ".join(f"{MODELS[m]} {spread(values, sign=True)} dB" for m, values in gains.items())
    words = [above([values]) for values in gains.values()]
    word = next((w for w in ("holds",) if w in words), words[0])
    return Verdict(
        word,
        f"With PHAST's plan and {REUSED} reuse steps, against the untuned model, both compared with the original full "
        f"sampler: {listed}.",
    )


def draw(found: dict[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    models = [model for model in MODELS if f"{model}, full" in found["rows"]]
    for axes, (measure_, title) in zip(
        panels, {"original": "the original full sampler", "own": "its own full sampler"}.items(), strict=True
    ):
        for i, plan in enumerate(PLANS):
            means = [np.mean(found["rows"][f"{model}, {plan}"][measure_]) for model in models]
            bars = axes.bar(np.arange(len(models)) + (i - 0.5) * 0.4, means, 0.4, label=plan)
            axes.bar_label(bars, fmt="%.1f", fontsize="small")
        axes.set_xticks(range(len(models)), [MODELS[model] for model in models], fontsize="small")
        axes.set_title(f"compared with {title}", fontsize="medium")
    panels[0].set_ylabel("PSNR, dB")
    panels[0].legend(loc="lower right")
    panels[0].margins(y=0.1)
    save(figure, path)


def papers() -> list[str]:
    return [
        "The paper proposes to fine-tune the U-Net, under one fixed plan or under random plans, and does not try it."
    ]


def ours(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in found["rows"].items():
        model, plan = name.split(", ")
        followed = "" if row["follows"] is None else f"{row['follows']:.3f}"
        own = "" if plan == "full" else spread(row["own"])
        original = "" if name == f"{OWN}, full" else spread(row["original"])
        rows.append([MODELS[model], plan, original, own, followed])
    head = ["U-Net", "plan", "PSNR to the original full sampler, dB", "to its own, dB", "prompt followed"]
    return [
        "`scripts/train_unet.py --tolerate` draws a step from the plan, makes the call that it reads from and the call "
        "itself, and pulls what that predicts to the full call of the original model.",
        "",
        *table(head, rows),
    ]

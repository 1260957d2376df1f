"""Figure 4: one picture without reuse and with four strategies that reuse in half of the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from minireuse.policies import early
from minireuse.policies import random as at_random

from paper.plots import save
from paper.study import REUSED, STEPS, Study, Way
from paper.verdicts import PAPER, Verdict, above, gain, spread, table

NEEDS_PLANS = ("phast-",)
TITLE = "Figure 4: random, early and late reuse, and PHAST"
NAMES = ("random", "early", "HURRY", "PHAST")
SHOWN = 4  # prompts in the plot
PICTURES = "figure-4-pictures.png"


def measure(study: Study) -> dict[str, Any]:
    """PSNR of each strategy, prompt by prompt; of random ones for every draw. Its pictures are kept."""
    plan, note = study.phast()
    ways = {
        "full": Way(study.full()),
        **{f"random {i}": Way(at_random(STEPS, study.maps, k=REUSED, seed=i)) for i in range(study.scale.draws)},
        "early": Way(early(STEPS, study.maps, k=REUSED)),
        "HURRY": Way(study.hurry()),
        "PHAST": Way(plan),
    }
    prompts = study.prompts[: study.scale.figure_4]
    found = study.judge("figure-4", ways, prompts)
    shown = min(SHOWN, len(prompts))
    pictures = {
        name: np.concatenate([study.picture("figure-4", name, i) for i in range(shown)], axis=1)
        for name in ("full", "random 0", "early", "HURRY", "PHAST")
    }
    Image.fromarray(np.concatenate(list(pictures.values()))).save(study.out / PICTURES)
    return {
        "psnr": {name: row["psnr"] for name, row in found.items() if name != "full"},
        "phast": plan.grid,
        "note": note,
        "prompts": list(prompts[:shown]),
    }


def by_name(found: dict[str, Any]) -> dict[str, list[float]]:
    """PSNR, prompt by prompt; of random strategies the mean over draws."""
    drawn = [values for name, values in found["psnr"].items() if name.startswith("random")]
    return {"random": np.mean(drawn, axis=0).tolist()} | {name: found["psnr"][name] for name in NAMES[1:]}


def verdict(found: dict[str, Any]) -> Verdict:
    psnr = by_name(found)
    pairs = (("PHAST", "HURRY"), ("HURRY", "random"), ("HURRY", "early"))
    word = above([gain(psnr[a], psnr[b]) for a, b in pairs])
    listed = ", ".join(f"{a} over {b} {spread(gain(psnr[a], psnr[b]), sign=True)} dB" for a, b in pairs)
    return Verdict(word, f"With {REUSED} of {STEPS} steps reused: {listed}.")


def draw(found: dict[str, Any], path: Path) -> None:
    """The pictures that `measure` left beside results.json, a row for each strategy."""
    strip = np.array(Image.open(path.parent / PICTURES))
    names, psnr = ("no reuse", *NAMES), by_name(found)
    height = len(strip) // len(names)
    figure, axes = plt.subplots(figsize=(1.6 * strip.shape[1] / height + 2.2, 1.6 * len(names) + 0.2))
    axes.imshow(strip)
    labels = [
        name if name == "no reuse" else f"{name}\n{(psnr if name != 'random' else found['psnr'])[first][0]:.1f} dB"
        for name, first in zip(names, ("", "random 0", *NAMES[1:]), strict=True)
    ]
    axes.set_yticks([height * (i + 0.5) for i in range(len(names))], labels)
    axes.set_xticks([])
    axes.set_xlabel("PSNR is that of the first column")
    for side in axes.spines.values():
        side.set_visible(False)
    save(figure, path)


def papers() -> list[str]:
    listed = ", ".join(f"{name} {value}" for name, value in PAPER["figure_4"].items())
    return [
        f"The paper shows one prompt, DDIM with {STEPS} steps, of which {REUSED} reuse, and the PSNR to the picture "
        "without reuse.",
        f"It has, in dB: {listed}.",
    ]


def ours(found: dict[str, Any]) -> list[str]:
    psnr = by_name(found)
    rows = [[name, f"{PAPER['figure_4'][name]}", f"{psnr[name][0]:.2f}", spread(psnr[name])] for name in NAMES]
    draws = sum(name.startswith("random") for name in found["psnr"])
    return [
        f"Ours has {len(psnr['PHAST'])} prompts. Random is the mean of {draws} draws; its picture is the "
        "first of them. "
        f"PHAST's strategy is `{found['phast']}`" + (f" ({found['note']})" if found["note"] else "") + ".",
        "",
        *table(["strategy", "the paper's prompt, dB", "our first prompt, dB", "all our prompts, dB [95 %]"], rows),
        "The columns of the plot are: " + "; ".join(found["prompts"]) + ".",
        "",
    ]

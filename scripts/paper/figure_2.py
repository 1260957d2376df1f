"""Figure 2: how much an attention map changes from one step to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor
from tqdm import tqdm

from minireuse.evaluate.command import SEED
from minireuse.plan import Site

from paper.plots import save
from paper.study import STEPS, Study
from paper.verdicts import PAPER, Verdict, judged

TITLE = "Figure 2: attention maps change little from step to step"


class Neighbours:
    """The normalised L1 difference of every map to the one of the call before; a `watch` of attention.

    |A(s) - A(s - 1)| / |A(s - 1)|, summed over both halves of the guided batch, heads, queries and keys.
    """

    def __init__(self) -> None:
        self.before: dict[Site, Tensor] = {}
        self.found: dict[str, dict[int, list[float]]] = {"self": {}, "cross": {}}

    def __call__(self, site: Site, call: int, scores: Tensor) -> None:
        now = scores.float().softmax(dim=-1)
        if site in self.before:
            change = float((now - self.before[site]).abs().sum() / self.before[site].abs().sum())
            self.found["cross" if site.is_cross else "self"].setdefault(call, []).append(change)
        self.before[site] = now


def measure(study: Study) -> dict[str, Any]:
    """By kind of attention, for each prompt and step from the second on, the mean over layers."""
    found: dict[str, list[list[float]]] = {"self": [], "cross": []}
    for i, prompt in enumerate(tqdm(study.prompts[: study.scale.figure_2], desc="figure-2", leave=False)):

        def one(prompt: str = prompt, i: int = i) -> dict[str, list[float]]:
            watcher = Neighbours()
            study.pipe().generate(prompt, seeds=SEED + i, steps=STEPS, watch=watcher)
            return {
                kind: [float(np.mean(calls[call])) for call in range(1, STEPS)] for kind, calls in watcher.found.items()
            }

        for kind, values in study.journal.known(f"prompt {i}", one).items():
            found[kind].append(values)
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    for kind in ("self", "cross"):
        values = np.array(found[kind])
        steps = np.arange(2, values.shape[1] + 2)
        mean, deviation = values.mean(axis=0), values.std(axis=0)
        axes.plot(steps, mean, "o-", label=f"{kind} attention")
        axes.fill_between(steps, mean - deviation, mean + deviation, alpha=0.2)
    axes.axhline(PAPER["figure_2"]["within"], color="0.5", linestyle=":", label="the paper: within about 0.2")
    axes.set(xlabel="step s", ylabel="normalised L1 difference\nof the maps of steps s and s - 1", ylim=(0, None))
    axes.set_xticks(range(2, STEPS + 1, 2))
    axes.legend()
    save(figure, path)


def verdict(found: dict[str, Any]) -> Verdict:
    limit = PAPER["figure_2"]["within"]
    means = {kind: np.mean(found[kind], axis=0) for kind in ("self", "cross")}
    most, middle = ({kind: float(how(row)) for kind, row in means.items()} for how in (np.max, np.median))
    word = judged(max(most.values()) <= 1.25 * limit, max(most.values()) > 2 * limit)
    return Verdict(
        word,
        f"The mean difference is at most {most['self']:.2f} in self attention and {most['cross']:.2f} in cross "
        f"attention, where the paper has about {limit}. Its median over steps is {middle['self']:.2f} and "
        f"{middle['cross']:.2f}.",
    )


def papers() -> list[str]:
    numbers = PAPER["figure_2"]
    return [
        "The paper compares each attention map with the one a step before: the L1 norm of their difference, "
        "normalised, "
        f"over {numbers['prompts']} ImageNet labels, as a mean and one standard deviation.",
        f"It stays within about {numbers['within']}.",
    ]


def ours(found: dict[str, Any]) -> list[str]:
    first, last = (
        {kind: float(np.mean(found[kind], axis=0)[place]) for kind in ("self", "cross")} for place in (0, -1)
    )
    return [
        f"Ours are means over layers, of {len(found['self'])} prompts. From step 1 to 2 the difference is "
        f"{first['self']:.2f} in self and {first['cross']:.2f} in cross attention; into the last step it is "
        f"{last['self']:.2f} and {last['cross']:.2f}.",
        "",
    ]

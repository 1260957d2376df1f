"""Figure 3: what a perturbation of the scores at one step does to the sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import curve_fit
from torch import Tensor
from tqdm import tqdm

from minireuse.common.metrics import interval
from minireuse.evaluate.command import SEED
from minireuse.pipeline import Pipeline
from minireuse.plan import Site

from paper.plots import save
from paper.study import GRIDS, STEPS, Study
from paper.verdicts import PAPER, Verdict, all_of, judged, table

TITLE = "Figure 3: a perturbation distorts less the later it comes"
SIZE = 0.05  # of the perturbation, as a share of the norm of the scores; the paper does not tell its own


class Perturb:
    """Adds noise to the scores of one call, before the softmax, in proportion to their norm; a `watch` of attention.

    |dA| = size |A| for every map of every image, in a direction drawn at random.
    """

    def __init__(self, call: int, size: float, seed: int) -> None:
        self.call, self.size = call, size
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, site: Site, call: int, scores: Tensor) -> Tensor | None:
        if call != self.call:
            return None
        noise = torch.randn(scores.shape, generator=self.generator).to(scores)
        dims = tuple(range(1, scores.ndim))
        norm, length = (x.float().square().sum(dim=dims, keepdim=True).sqrt() for x in (scores, noise))
        return scores + (self.size * norm / length).to(scores.dtype) * noise


def one_prompt(pipe: Pipeline, prompt: str, seed: int) -> dict[str, list[float]]:
    """By step, for one prompt: the L1 distance that a perturbation there leaves, and the exponent of its growth.

    The finite-time Lyapunov exponent is log(|dx_N| / |dx_s|) / (N - s), of the Euclidean norm: dx_s is what the
    perturbation of step s does to that step's own result. The last step has none.
    """
    timesteps = pipe.timesteps(STEPS)
    states: list[Tensor] = []  # x after each step
    nothing = Perturb(-1, SIZE, seed)  # the same kernel computes both trajectories
    whole = pipe.generate(prompt, seeds=seed, steps=STEPS, watch=nothing, on_step=lambda step: states.append(step.x))
    found: dict[str, list[float]] = {"distance": [], "exponent": []}
    for s in range(STEPS):
        moved: list[Tensor] = []
        pipe.generate(
            prompt,
            seeds=seed,
            steps=timesteps[s:],  # DDIM remembers nothing, so the run may begin at this step
            latents=states[s - 1] if s else None,
            watch=Perturb(0, SIZE, seed),
            on_step=lambda step, moved=moved: moved.append(step.x),
        )
        found["distance"].append(float((moved[-1] - whole.latents).abs().mean()))
        if s < STEPS - 1:
            before, after = float((moved[0] - states[s]).norm()), float((moved[-1] - whole.latents).norm())
            found["exponent"].append(math.log(after / before) / (STEPS - 1 - s))
    return found


def measure(study: Study) -> dict[str, Any]:
    """By grid: distances and exponents, a list over steps for each prompt."""
    found: dict[str, Any] = {}
    for grid in GRIDS:
        pipe = study.pipe(grid)
        prompts = tqdm(study.prompts[: study.scale.figure_3], desc=f"figure-3, {grid}", leave=False)
        rows = [
            study.journal.known(f"{grid}/{i}", lambda pipe=pipe, prompt=prompt, i=i: one_prompt(pipe, prompt, SEED + i))
            for i, prompt in enumerate(prompts)
        ]
        found[grid] = {key: [row[key] for row in rows] for key in ("distance", "exponent")}
    return found


class Fit(NamedTuple):
    """The paper's curve k1 exp(-k2 s) through the scaled distances of steps 1 to N - 2, and what comes after them."""

    scaled: np.ndarray  # mean over prompts, from 0 at the smallest step to 1 at the largest
    k1: float
    k2: float
    correlation: float
    jump: float  # of step N - 1 over step N - 2, as a ratio

    def curve(self, steps: np.ndarray) -> np.ndarray:
        return self.k1 * np.exp(-self.k2 * steps)


def fit(distances: Sequence[Sequence[float]]) -> Fit:
    """Fit the paper's curve. Shapes: distances (prompts, steps)."""
    mean = np.mean(distances, axis=0)
    scaled = (mean - mean.min()) / (mean.max() - mean.min())
    steps, values = np.arange(1, len(mean) - 1), scaled[:-2]
    (k1, k2), _ = curve_fit(lambda s, k1, k2: k1 * np.exp(-k2 * s), steps, values, p0=(1.0, 0.1), maxfev=20_000)
    correlation = float(np.corrcoef(k1 * np.exp(-k2 * steps), values)[0, 1])
    return Fit(scaled, float(k1), float(k2), correlation, float(mean[-2] / mean[-3]))


def verdict(found: dict[str, Any]) -> Verdict:
    distances = found["leading"]["distance"]
    curve, jumps = fit(distances), [math.log(row[-2] / row[-3]) for row in distances]
    low, high = interval(jumps)
    decays = judged(curve.k2 > 0 and curve.correlation > 0.9, curve.k2 <= 0 or curve.correlation < 0.5)
    rises = judged(low > 0, high < 0)
    return Verdict(
        all_of([decays, rises]),
        f"On the grid `leading` the distance falls as exp(-{curve.k2:.2f} s) up to step {STEPS - 2}, with correlation "
        f"{curve.correlation:.2f} (paper: {PAPER['figure_3']['correlation']}): the decay {decays}. From step "
        f"{STEPS - 2} "
        f"to {STEPS - 1} it changes by a factor of {curve.jump:.1f} [{math.exp(low):.1f}, {math.exp(high):.1f}]: the "
        f"jump at the last but one step {rises}.",
    )


def draw(found: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    steps = np.arange(1, STEPS + 1)
    for i, grid in enumerate(found):
        curve = fit(found[grid]["distance"])
        left.plot(steps, curve.scaled, "o", color=f"C{i}", label=grid)
        left.plot(
            steps[:-2],
            curve.curve(steps[:-2]),
            color=f"C{i}",
            label=f"{curve.k1:.2f} exp(-{curve.k2:.2f} s), correlation {curve.correlation:.2f}",
        )
        exponents = np.array(found[grid]["exponent"])
        right.errorbar(steps[:-1], exponents.mean(axis=0), exponents.std(axis=0), fmt="o-", color=f"C{i}", label=grid)
    left.set(xlabel="step s that is perturbed", ylabel="L1 distance of the sample, scaled")
    right.set(xlabel="step s that is perturbed", ylabel="finite-time Lyapunov exponent, per step")
    right.axhline(0, color="0.5", linewidth=1)
    for axes in (left, right):
        axes.set_xticks(range(1, STEPS + 1, 2))
        axes.legend(fontsize="small")
    save(figure, path)


def papers() -> list[str]:
    numbers = PAPER["figure_3"]
    return [
        "The paper perturbs the scores before the softmax at one step, in proportion to their norm, and takes the L1 "
        "distance of the final sample, scaled to 0 ... 1.",
        f"It falls from step 1 to {numbers['falls_to_step']} as k1 exp(-k2 s), with correlation "
        f"{numbers['correlation']} (k2 about {numbers['exponent_inferred']}, inferred), jumps up at step "
        f"{numbers['jumps_at_step']} to the height of step 1, and is 0 at step {STEPS}.",
    ]


def ours(found: dict[str, Any]) -> list[str]:
    rows = []
    for grid in found:
        curve, exponents = fit(found[grid]["distance"]), np.mean(found[grid]["exponent"], axis=0)
        rows.append(
            [
                f"`{grid}`",
                f"{curve.k2:.3f}",
                f"{curve.correlation:.2f}",
                *(f"{curve.scaled[s - 1]:.2f}" for s in (1, STEPS - 2, STEPS - 1, STEPS)),
                f"{exponents[0]:+.3f}, {exponents[STEPS // 2 - 1]:+.3f}, {exponents[-1]:+.3f}",
            ]
        )
    head = ["grid", "k2", "correlation", *(f"step {s}" for s in (1, STEPS - 2, STEPS - 1, STEPS))]
    head.append(f"exponent of steps 1, {STEPS // 2}, {STEPS - 1}")
    prompts = len(found["leading"]["distance"])
    return [
        f"Ours is the L1 distance of the final latents, of {prompts} prompts, each with a perturbation of "
        f"{SIZE} of the "
        f"norm. The curve is fitted over steps 1 to {STEPS - 2}. The exponent says by how much a "
        "perturbation grows from "
        "step to step, in the Euclidean norm of the latents.",
        "",
        *table(head, rows),
    ]

"""The experiments behind `reproduce.py`: each answers one claim of the method with figures, on one model.

Every function takes a `Study` and returns plain data for JSON: a verdict ("holds", "does not hold", "unclear"), the
sentence that carries the figures, and what its plot needs.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

import minireuse
from minireuse.maps import Watcher
from minireuse.metrics import fidelity, interval
from minireuse.policies import early, hurry, phast_for, select
from minireuse.policies import interval as evenly
from minireuse.policies import random as at_random
from minireuse.render import Renderer
from minireuse.reuse import ReuseCache, ReusePlan, Site, StepPlan
from minireuse.searched import Searched


@dataclass(frozen=True)
class Study:
    """What all experiments share."""

    pipe: minireuse.Pipeline
    prompts: Sequence[str]  # of which an experiment takes as many as it needs
    plans: Sequence[Searched]
    steps: int = 20

    @property
    def maps(self) -> tuple[Site, ...]:
        return select(self.pipe.sites)

    def renderer(self, count: int, **settings: Any) -> Renderer:
        settings = {"steps": self.steps} | settings
        return Renderer(self.pipe, self.prompts[:count], list(range(count)), **settings)


def verdict(holds: bool, fails: bool) -> str:
    return "holds" if holds else "does not hold" if fails else "unclear"


class Neighbours(Watcher):
    """How much each map differs from the one of the call before, and from the very first."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[Site, Tensor] = {}
        self.first: dict[Site, Tensor] = {}
        self.found: dict[tuple[str, int], tuple[float, float, float]] = {}

    def store(self, site: Site, value: Tensor, step: StepPlan, dtype: torch.dtype) -> None:
        now = value.flatten().float()
        if site in self.before:
            old, first = self.before[site], self.first[site]
            cosine = float(now @ old / (now.norm() * old.norm()))
            change, since = float((now - old).norm() / old.norm()), float((now - first).norm() / first.norm())
            self.found[site.address, self.call] = (change, cosine, since)
        self.first.setdefault(site, now)
        self.before[site] = now


def redundancy(study: Study, count: int = 4) -> dict[str, Any]:
    """Claim 1: maps of neighbouring calls are nearly the same."""
    found: dict[tuple[str, int], list] = defaultdict(list)
    for i, prompt in enumerate(tqdm(study.prompts[:count], desc="redundancy")):
        watcher = Neighbours()
        settings = {"steps": study.steps, "cache": watcher, "wrap": watcher.wrap, "watch": study.maps}
        study.pipe.generate(prompt, seeds=i, **settings)
        for key, value in watcher.found.items():
            found[key].append(value)
    addresses = [site.address for site in study.maps]
    shape = (len(addresses), study.steps - 1)
    change, cosine, since = (
        np.array([np.mean([v[part] for v in found[a, c]]) for a in addresses for c in range(1, study.steps)])
        .reshape(shape)
        .tolist()
        for part in range(3)
    )
    typical, low = float(np.median(cosine)), float(np.percentile(cosine, 5))
    ratio = float(np.median(np.array(change)[:, -1] / np.array(since)[:, -1]))
    text = (
        f"cosine of a map with the one a call before: median {typical:.3f}, 5th percentile {low:.3f}; in the last call "
        f"the change since the call before is {ratio:.2f} of the change since the first call (medians over sites)"
    )
    return {
        "verdict": verdict(typical > 0.9 and ratio < 0.5, typical < 0.5),
        "text": text,
        "addresses": addresses,
        "change": change,
        "cosine": cosine,
    }


def single(study: Study, count: int = 8) -> dict[str, Any]:
    """Claim 2: the later a single call reuses its maps, the less the image changes."""
    render = study.renderer(count)
    reference = render(ReusePlan.nothing(study.steps)).astype(float)
    damage = []
    for call in tqdm(range(1, study.steps), desc="single reuse"):
        plan = ReusePlan.stepwise(np.arange(study.steps) == call, study.maps)
        damage.append(np.square(render(plan) - reference).mean(axis=(1, 2, 3)).tolist())
    means = np.mean(damage, axis=1)
    rho, p = spearmanr(np.arange(1, study.steps), means)
    text = (
        f"Spearman correlation of the call with the squared error: {rho:.2f} (p = {p:.1g}); largest {means.max():.3g} "
    )
    text += f"at call {means.argmax() + 1}, smallest {means.min():.3g} at call {means.argmin() + 1}"
    return {"verdict": verdict(rho < -0.8, rho > 0), "text": text, "damage": damage}


class Perturber(Watcher):
    """Multiplies every map of one call by 1 + noise, its rows still summing to one."""

    def __init__(self, at: int, size: float, seed: int) -> None:
        super().__init__()
        self.at, self.size = at, size
        self.generator = torch.Generator().manual_seed(seed)

    def store(self, site: Site, value: Tensor, step: StepPlan, dtype: torch.dtype) -> None:
        if self.call == self.at:
            noise = torch.randn(value.shape, generator=self.generator).to(value)
            value.mul_(1 + self.size * noise.clamp(-3, 3))  # in place: what is handed to a cache goes on to meet V
            value.div_(value.sum(dim=-1, keepdim=True))


def growth(study: Study, count: int = 4, size: float = 1e-3) -> dict[str, Any]:
    """Claim 3: a small perturbation of the maps grows along the trajectory (a positive finite-time exponent)."""

    def trajectory(prompt: str, seed: int, watcher: Perturber) -> list[Tensor]:
        states: list[Tensor] = []
        settings = {"steps": study.steps, "cache": watcher, "wrap": watcher.wrap, "watch": study.maps}
        study.pipe.generate(prompt, seeds=seed, on_step=lambda step: states.append(step.x.double()), **settings)
        return states

    calls = list(range(0, study.steps - 1, max(1, study.steps // 10)))
    exponents: dict[int, list[float]] = {call: [] for call in calls}
    for i, prompt in enumerate(tqdm(study.prompts[:count], desc="growth")):
        plain = trajectory(prompt, i, Perturber(-1, size, i))
        for call in calls:
            moved = trajectory(prompt, i, Perturber(call, size, i))
            before, after = ((a - b).norm().item() for a, b in ((moved[call], plain[call]), (moved[-1], plain[-1])))
            exponents[call].append(math.log(after / before) / (study.steps - 1 - call))
    ends = {call: interval(values) for call, values in exponents.items()}
    means = {call: float(np.mean(values)) for call, values in exponents.items()}
    positive = sum(low > 0 for low, _ in ends.values())
    text = f"exponent per call, of a relative change of {size} in call i: " + ", ".join(
        f"{means[c]:+.3f} [{ends[c][0]:+.3f}, {ends[c][1]:+.3f}] (i = {c})" for c in calls
    )
    holds = positive == len(calls)
    return {
        "verdict": verdict(holds, not any(high > 0 for _, high in ends.values())),
        "text": text,
        "exponents": exponents,
    }


def heuristic(study: Study, count: int = 4, draws: int = 200) -> dict[str, Any]:
    """Claim 4: HURRY against its mirror image, even spreading, random plans, and all plans of a short run."""
    render, k = study.renderer(count), study.steps // 2
    reference = render(ReusePlan.nothing(study.steps))
    score = lambda plan: float(fidelity(render(plan), reference).mean())  # noqa: E731
    named = {f.__name__: score(f(study.steps, study.maps, k=k)) for f in (hurry, early, evenly)}
    plans = {str(plan): plan for plan in (at_random(study.steps, study.maps, k=k, seed=i) for i in range(draws))}
    others = [score(plan) for plan in tqdm(plans.values(), desc="random plans")]
    share = float(np.mean(np.array(others) < named["hurry"]))
    short, few = 8, 4
    render, place = study.renderer(count, steps=short), {}
    reference = render(ReusePlan.nothing(short))
    for chosen in tqdm(list(itertools.combinations(range(1, short), few)), desc="all plans"):
        plan = ReusePlan.stepwise(np.isin(np.arange(short), chosen), study.maps)
        place[str(plan)] = float(fidelity(render(plan), reference).mean())
    rank = 1 + sum(value > place[str(hurry(short, study.maps, k=few))] for value in place.values())
    best = max(place, key=lambda name: place[name])
    text = (
        f"HURRY {named['hurry']:.1f} dB, early {named['early']:.1f}, evenly spread {named['interval']:.1f}; above "
        f"{100 * share:.0f} % of {len(others)} random plans (best {max(others):.1f}); of all {len(place)} plans with "
        f"{few} of {short} calls number {rank}, the best being {best}"
    )
    holds = share > 0.9 and named["hurry"] > max(named["early"], named["interval"])
    return {"verdict": verdict(holds, share < 0.5), "text": text, "named": named, "random": others, "all": place}


def generalisation(study: Study, count: int = 8) -> dict[str, Any]:
    """Claim 6: a plan searched for DDIM serves other samplers, numbers of steps and guidance scales."""
    settings = {
        "as searched": {},
        "dpmpp_2m": {"sampler": "dpmpp_2m"},
        "euler": {"sampler": "euler"},
        "10 steps": {"steps": 10},
        "30 steps": {"steps": 30},
        "guidance 2": {"guidance_scale": 2.0},
        "guidance 7.5": {"guidance_scale": 7.5},
    }
    gains = {}
    for kind, (name, setting) in itertools.product(("map", "deep"), settings.items()):
        steps, sites = setting.get("steps", study.steps), select(study.pipe.sites, kind=kind)
        render = study.renderer(count, **setting)
        reference = render(ReusePlan.nothing(steps))
        policy = phast_for(study.plans, "ddim", study.pipe.fingerprint)
        ours, simple = (fidelity(render(f(steps, sites, k=steps // 2)), reference) for f in (policy, hurry))
        gains[f"{kind}, {name}"] = (ours - simple).tolist()
    ends = {name: interval(values) for name, values in gains.items()}
    text = "PHAST over HURRY, dB: " + ", ".join(
        f"{name} {np.mean(gains[name]):+.1f} [{low:+.1f}, {high:+.1f}]" for name, (low, high) in ends.items()
    )
    carried = [low > 0 for name, (low, _) in ends.items() if "as searched" not in name]
    return {"verdict": verdict(all(carried), not any(carried)), "text": text, "gains": gains}


def precision(study: Study, count: int = 8) -> dict[str, Any]:
    """Claim 8: a cache of half precision, or of 8 bits, is as good as a full one."""
    plan = hurry(study.steps, study.maps, k=study.steps // 2)
    prompts, seeds = list(study.prompts[:count]), list(range(count))
    made = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8):
        cache = ReuseCache(dtype)
        made[str(dtype).removeprefix("torch.")] = study.pipe.generate(
            prompts, seeds=seeds, steps=study.steps, plan=plan, cache=cache
        )
    exact = made["float32"].images
    rows = {
        name: (float(fidelity(r.images, exact).mean()), r.cache_peak_bytes / count / 2**20) for name, r in made.items()
    }
    text = "PSNR to the image with a float32 cache, and MiB an image: " + ", ".join(
        f"{name} {value:.1f} dB, {size:.2f}" for name, (value, size) in rows.items()
    )
    small = min(rows["float16"][0], rows["uint8"][0])
    return {"verdict": verdict(small > 45, small < 30), "text": text, "rows": rows}

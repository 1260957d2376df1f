"""The experiments behind `reproduce.py`: each answers one claim of the method with figures, on one model.

Every function takes a `Study` and returns plain data for JSON: a verdict ("holds", "does not hold", "unclear"), the
sentence that carries the figures, and what its plot needs.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

import minireuse
from minireuse.cache import ReuseCache
from minireuse.common.journal import Journal
from minireuse.common.metrics import fidelity
from minireuse.evaluate.command import SEED
from minireuse.plan import ReusePlan, Site
from minireuse.policies import Searched, early, hurry, phast, select
from minireuse.policies import interval as evenly
from minireuse.policies import random as at_random
from minireuse.search.render import Renderer

import verdicts


@dataclass(frozen=True)
class Study:
    """What all experiments share.

    prompts: no search has seen them; an experiment takes as many as it needs. families: other prompts, by what sets
    them apart. sibling: a second model that knows the same prompts. journal: what is known already.
    """

    pipe: minireuse.Pipeline
    prompts: Sequence[str]
    plans: Sequence[Searched]
    steps: int = 20
    families: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sibling: minireuse.Pipeline | None = None
    journal: Journal = field(default_factory=Journal)

    @property
    def maps(self) -> tuple[Site, ...]:
        return select(self.pipe.sites)

    def renderer(self, count: int, **settings: Any) -> Renderer:
        """Of the first prompts by this model; settings may name others, and whatever else a `Renderer` takes."""
        settings = {"pipe": self.pipe, "prompts": self.prompts, "steps": self.steps} | settings
        chosen = settings.pop("prompts")[:count]
        return Renderer(settings.pop("pipe"), chosen, [SEED + i for i in range(len(chosen))], **settings)

    def searched(self, kind: str, order: int = 0) -> list[Searched]:
        """The plans that a search found for this very model, DDIM, these steps, and half of the calls reused."""
        return [
            p
            for p in self.plans
            if (p.model, p.sampler) == (self.pipe.fingerprint, "ddim")
            and (p.plan.calls, p.plan.reused, p.plan.order) == (self.steps, self.steps // 2, order)
            and {site.kind for site in p.plan.sites} == {kind}
        ]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of a few values, by Student's t: a bootstrap of eight is too narrow."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


class Neighbours:
    """How much each map differs from the one of the call before, and from the very first; a `watch` of attention."""

    def __init__(self) -> None:
        self.before: dict[Site, Tensor] = {}
        self.first: dict[Site, Tensor] = {}
        self.found: dict[tuple[str, int], tuple[float, float, float]] = {}

    def __call__(self, site: Site, call: int, scores: Tensor) -> None:
        now = scores.softmax(dim=-1).flatten().float()
        if site in self.before:
            old, first = self.before[site], self.first[site]
            cosine = float(now @ old / (now.norm() * old.norm()))
            change, since = float((now - old).norm() / old.norm()), float((now - first).norm() / first.norm())
            self.found[site.address, call] = (change, cosine, since)
        self.first.setdefault(site, now)
        self.before[site] = now


def redundancy(study: Study, count: int = 4) -> dict[str, Any]:
    """Claim 1: maps of neighbouring calls are nearly the same."""
    found: dict[tuple[str, int], list] = defaultdict(list)
    for i, prompt in enumerate(tqdm(study.prompts[:count], desc="redundancy")):
        watcher = Neighbours()
        study.pipe.generate(prompt, seeds=SEED + i, steps=study.steps, watch=watcher)
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
        "verdict": verdicts.redundant(typical, ratio),
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
    rho, p = stats.spearmanr(np.arange(1, study.steps), means)
    text = (
        f"Spearman correlation of the call with the squared error: {rho:.2f} (p = {p:.1g}); largest {means.max():.3g} "
    )
    text += f"at call {means.argmax() + 1}, smallest {means.min():.3g} at call {means.argmin() + 1}"
    return {"verdict": verdicts.falls(rho), "text": text, "damage": damage}


class Perturber:
    """Multiplies every map of one call by 1 + noise, its rows still summing to one; a `watch` of attention."""

    def __init__(self, at: int, size: float, seed: int) -> None:
        self.at, self.size = at, size
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, site: Site, call: int, scores: Tensor) -> Tensor | None:
        if call != self.at:
            return None
        noise = torch.randn(scores.shape, generator=self.generator).to(scores)
        return scores + torch.log1p(self.size * noise.clamp(-3, 3))  # a factor of what the softmax makes of them


def growth(study: Study, count: int = 8, size: float = 1e-3) -> dict[str, Any]:
    """Claim 3: a small perturbation of the maps grows along the trajectory (a positive finite-time exponent).

    Measured in the norm of the latents x; also told for x / alpha, which has no part of the schedule's own scaling.
    """

    def trajectory(prompt: str, seed: int, watcher: Perturber) -> list[Tensor]:
        states: list[Tensor] = []
        settings = {"steps": study.steps, "watch": watcher}
        study.pipe.generate(prompt, seeds=seed, on_step=lambda step: states.append(step.x.double()), **settings)
        return states

    calls = list(range(0, study.steps - 1, max(1, study.steps // 10)))
    # After each call but the last.
    alphas = [study.pipe.schedule.alpha(t) for t in study.pipe.timesteps(study.steps)[1:]]
    exponents: dict[int, list[float]] = {call: [] for call in calls}
    for i, prompt in enumerate(tqdm(study.prompts[:count], desc="growth")):
        plain = trajectory(prompt, SEED + i, Perturber(-1, size, i))
        for call in calls:
            moved = trajectory(prompt, SEED + i, Perturber(call, size, i))
            before, after = ((a - b).norm().item() for a, b in ((moved[call], plain[call]), (moved[-1], plain[-1])))
            exponents[call].append(math.log(after / before) / (study.steps - 1 - call))
    means = {call: float(np.mean(values)) for call, values in exponents.items()}
    ends = {call: spread(values) for call, values in exponents.items()}
    unscaled = {call: means[call] + math.log(alphas[call]) / (study.steps - 1 - call) for call in calls}
    text = f"exponent per call, of a relative change of {size} in call i, in latents: " + ", ".join(
        f"{means[c]:+.3f} [{ends[c][0]:+.3f}, {ends[c][1]:+.3f}] (i = {c})" for c in calls
    )
    text += "; in latents divided by their alpha: " + ", ".join(f"{unscaled[c]:+.3f}" for c in calls)
    return {
        "verdict": verdicts.grows(ends.values()),
        "text": text,
        "exponents": exponents,
    }


def heuristic(study: Study, count: int = 4, draws: int = 200) -> dict[str, Any]:
    """Claim 4: HURRY against its mirror image, even spreading, random plans, and all plans of a short run."""
    k, short, few = study.steps // 2, 8, 4

    def scores(steps: int, plans: Mapping[str, ReusePlan]) -> dict[str, list[float]]:
        """PSNR of each plan, prompt by prompt."""
        render = study.renderer(count, steps=steps)
        reference = render(ReusePlan.nothing(steps))
        return {
            name: study.journal.known(f"heuristic/{plan}", lambda plan=plan: fidelity(render(plan), reference).tolist())
            for name, plan in tqdm(plans.items(), desc=f"plans of {steps} steps")
        }

    named = scores(study.steps, {f.__name__: f(study.steps, study.maps, k=k) for f in (hurry, early, evenly)})
    drawn = [at_random(study.steps, study.maps, k=k, seed=i) for i in range(draws)]
    others = scores(study.steps, {str(plan): plan for plan in drawn})
    below = np.array(list(others.values())) < np.array(named["hurry"])  # plans x prompts
    mean = {name: float(np.mean(values)) for name, values in (named | others).items()}
    share = float(np.mean([mean[name] < mean["hurry"] for name in others]))
    by_prompt = ", ".join(f"{100 * part:.0f}" for part in below.mean(axis=0))
    rows = [np.isin(np.arange(short), chosen) for chosen in itertools.combinations(range(1, short), few)]
    all_plans = {str(plan): plan for plan in (ReusePlan.stepwise(row, study.maps) for row in rows)}
    place = {name: float(np.mean(values)) for name, values in scores(short, all_plans).items()}
    rank = 1 + sum(value > place[str(hurry(short, study.maps, k=few))] for value in place.values())
    text = (
        f"HURRY {mean['hurry']:.1f} dB, early {mean['early']:.1f}, evenly spread {mean['interval']:.1f}; above "
        f"{100 * share:.0f} % of {len(others)} random plans (prompt by prompt {by_prompt} %; the best has "
        f"{max(mean[name] for name in others):.1f}); of all {len(place)} plans with {few} of {short} calls number "
        f"{rank}, the best being {max(place, key=lambda name: place[name])}"
    )
    found = {"named": {name: mean[name] for name in named}, "random": [mean[name] for name in others], "all": place}
    return {"verdict": verdicts.late_is_best(share, mean), "text": text, **found}


def generalisation(study: Study, count: int = 8) -> dict[str, Any]:
    """Claim 6: the plan searched for DDIM serves other samplers, steps, guidance scales, prompts, and a sibling."""
    settings: dict[str, dict[str, Any]] = {
        "as searched": {},
        "dpmpp_2m": {"sampler": "dpmpp_2m"},
        "plms": {"sampler": "plms"},
        "dpm_solver_2": {"sampler": "dpm_solver_2", "steps": study.steps // 2},
        "half the steps": {"steps": study.steps // 2},
        "1.5 times the steps": {"steps": study.steps * 3 // 2},
        "guidance 4": {"guidance_scale": 4.0},
        "guidance 7.5": {"guidance_scale": 7.5},
        **{name: {"prompts": prompts} for name, prompts in study.families.items()},
        **({} if study.sibling is None else {"a sibling of the model": {"pipe": study.sibling}}),
    }
    gains = {}
    for kind, (name, setting) in itertools.product(("map", "deep"), settings.items()):
        sampler, steps = setting.get("sampler", "ddim"), setting.get("steps", study.steps)
        calls, sites = study.pipe.calls(sampler, steps), select(study.pipe.sites, kind=kind)
        # Only the plans for DDIM and these steps: a plan that was searched for the other setting would carry nothing.
        carried = [p for p in study.plans if (p.sampler, p.plan.calls) == ("ddim", study.steps)]
        searched = partial(phast, plans=carried) if carried else hurry  # where nothing was searched, nothing is gained
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the plan was searched for something else is the point
            plans = [f(calls, sites, k=calls // 2) for f in (searched, hurry)]

        def gain(setting: dict = setting, plans: list[ReusePlan] = plans) -> list[float]:
            render = study.renderer(count, **setting)
            reference = render(ReusePlan.nothing(plans[0].calls))
            ours, simple = (fidelity(render(plan), reference) for plan in plans)
            return list((ours - simple).tolist())

        gains[f"{kind}, {name}"] = study.journal.known(f"generalisation/{kind}, {name}", gain)
    ends = {name: spread(values) for name, values in gains.items()}
    text = "PHAST over HURRY, dB: " + ", ".join(
        f"{name} {np.mean(gains[name]):+.1f} [{low:+.1f}, {high:+.1f}]" for name, (low, high) in ends.items()
    )
    others = [found for name, found in ends.items() if "as searched" not in name]
    return {"verdict": verdicts.carries_over(others), "text": text, "gains": gains}


def precision(study: Study, count: int = 8) -> dict[str, Any]:
    """Claim 8: a cache of half precision, or of 8 bits, is as good as a full one."""
    plan = hurry(study.steps, study.maps, k=study.steps // 2)
    prompts, seeds = list(study.prompts[:count]), [SEED + i for i in range(count)]
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
    small = [rows["float16"][0], rows["uint8"][0]]
    return {"verdict": verdicts.small_caches_do(small), "text": text, "rows": rows}

"""What all experiments share: models, prompts, plans, and how ways to sample are compared and timed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import minireuse
from minireuse.cache import ReuseCache
from minireuse.common.journal import Journal
from minireuse.common.metrics import fidelity
from minireuse.evaluate.classifier import Classifier, own_classifier
from minireuse.evaluate.command import SEED, picture, save_pictures, timed_rounds
from minireuse.evaluate.distribution import VAEFeatures, frechet
from minireuse.pipeline import Pipeline
from minireuse.plan import ReusePlan, Site
from minireuse.policies import hurry, phast, select
from minireuse.search.plan_files import plans_of, read_searched
from minireuse.search.render import Renderer

STEPS, REUSED = 20, 10  # the paper's setting: DDIM with 20 steps, of which 10 reuse
FEWER = 13  # the steps of its rival
GRIDS = ("leading", "trailing")  # of timesteps; the paper does not tell its own
BATCH = 8  # prompts rendered together
OWN, SIBLING, DISTILLED, TUNED_FIXED, TUNED_RANDOM = "own", "sibling", "distilled", "tuned-fixed", "tuned-random"


@dataclass(frozen=True)
class Scale:
    """How much of each stage is done. The defaults take about 80 minutes on two cores.

    Numbers of prompts by stage; draws: random plans; ks: numbers of reuse calls; fewer: steps of the plain sampler;
    rounds: of timing.
    """

    figure_2: int = 24
    figure_3: int = 12
    exhaustive: int = 16
    figure_4: int = 16
    figure_5: int = 24
    table_1: int = 32
    table_2: int = 24
    left_open: int = 24
    search_rules: int = 16
    beyond: int = 16
    draws: int = 10
    ks: tuple[int, ...] = tuple(range(4, 13))
    fewer: tuple[int, ...] = tuple(range(12, 19))
    rounds: int = 5

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of prompts, by stage."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)} | {"draws": 0, "rounds": 0}

    @property
    def most(self) -> int:
        """The prompts that the largest stage needs."""
        return max(self.counts.values())

    def with_prompts(self, count: int) -> Scale:
        """The same with as many prompts in every stage."""
        return replace(self, **{name: count for name, value in self.counts.items() if value})


QUICK = Scale(draws=2, ks=(4, 8, 10, 12), fewer=(12, 13, 15, 18), rounds=2).with_prompts(2)


@dataclass(frozen=True)
class Way:
    """One way to sample. model: its name in the study. size: of the pictures in pixels, None is the model's own."""

    plan: ReusePlan
    steps: int = STEPS
    sampler: str = "ddim"
    spacing: str | None = None
    cache: str = "float16"
    model: str = OWN
    size: int | None = None


@lru_cache(maxsize=6)
def loaded(path: Path | None) -> Pipeline:
    """A model, read once."""
    return minireuse.load(path)


@dataclass(frozen=True)
class Study:
    """models: folders by name, None for the shipped one. prompts: no search has seen them.

    plans: the folder of the plans searched for this study. out: results. work: pictures and journals. sets: other
    prompts, by what sets them apart. finished: what other stages found. journal: what is known already of this one.
    """

    models: Mapping[str, Path | None]
    prompts: Sequence[str]
    scale: Scale
    plans: Path
    out: Path
    work: Path
    sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    finished: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)

    def pipe(self, spacing: str | None = None, model: str = OWN) -> Pipeline:
        """A model, on its own grid of timesteps or another."""
        pipe = loaded(self.models[model])
        return pipe if spacing is None else replace(pipe, schedule=replace(pipe.schedule, spacing=spacing))

    def has(self, model: str) -> bool:
        """Whether a model is at hand."""
        path = self.models.get(model, Path("nowhere"))
        return path is None or path.exists()

    @property
    def maps(self) -> tuple[Site, ...]:
        return select(self.pipe().sites)

    @property
    def classifier(self) -> Classifier | None:
        """What tells whether pictures follow their prompts; the shipped model has one."""
        return own_classifier(self.models[OWN])

    def full(self, steps: int = STEPS) -> ReusePlan:
        return ReusePlan.nothing(steps)

    def hurry(self, k: int = REUSED, steps: int = STEPS) -> ReusePlan:
        return hurry(steps, self.maps, k=k)

    def phast(
        self, k: int = REUSED, spacing: str | None = None, sampler: str = "ddim", steps: int = STEPS, kind: str = "map"
    ) -> tuple[ReusePlan, str]:
        """The searched plan for a run, and what there is to say where it was searched for another one."""
        pipe = self.pipe(spacing)
        own = [read_searched(file) for file in sorted(self.plans.glob("phast-*.json"))]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            plan = phast(
                pipe.calls(sampler, steps),
                select(pipe.sites, kind=kind),
                plans=[*own, *plans_of(self.models[OWN])],
                k=k,
                sampler=sampler,
                model=pipe.fingerprint,
                spacing=pipe.schedule.spacing,
                timesteps=pipe.call_timesteps(sampler, steps),
            )
        return plan, "; ".join(str(warning.message) for warning in said)

    # --- pictures ----------------------------------------------------------------------------------------------------

    def judge(
        self,
        stage: str,
        ways: Mapping[str, Way],
        prompts: Sequence[str],
        against: str = "full",
    ) -> dict[str, dict[str, list[Any]]]:
        """PSNR of each way to the one it is held against, and how prompts are followed, prompt by prompt.

        Pictures are kept. Prompt i has seed 1000 + i.
        """
        classifier = self.classifier
        for start in tqdm(range(0, len(prompts), BATCH), desc=stage, leave=False):
            chosen = list(prompts[start : start + BATCH])
            missing = [name for name in ways if f"{stage}/{name}/{start}" not in self.journal.records]
            if not missing:
                continue
            renderers: dict[Any, Renderer] = {}
            reference = self._pictures(ways[against], chosen, start, renderers)
            for name in missing:
                images = reference if name == against else self._pictures(ways[name], chosen, start, renderers)
                save_pictures(self.work / stage, name, start, images)
                follows = None if classifier is None else classifier.follow(list(images), chosen)
                found: dict[str, list[Any]] = {"psnr": fidelity(images, reference).tolist()}
                found["follows"] = [None] * len(chosen) if follows is None else follows
                self.journal.add(f"{stage}/{name}/{start}", found)
        return {
            name: {
                measure: [
                    value
                    for start in range(0, len(prompts), BATCH)
                    for value in self.journal.records[f"{stage}/{name}/{start}"][measure]
                ]
                for measure in ("psnr", "follows")
            }
            for name in ways
        }

    def between(self, stage: str, name: str, other: str, count: int) -> list[float]:
        """PSNR of one way's kept pictures to another's, prompt by prompt."""
        ours, theirs = (np.stack([self.picture(stage, n, i) for i in range(count)]) for n in (name, other))
        return fidelity(ours, theirs).tolist()

    def _pictures(self, way: Way, prompts: Sequence[str], start: int, renderers: dict[Any, Renderer]) -> np.ndarray:
        """Shapes: -> (B, H, W, 3) uint8. renderers: those of this batch, which share the beginnings of trajectories."""
        seeds = [SEED + start + i for i in range(len(prompts))]
        dtype, pipe = getattr(torch, way.cache), self.pipe(way.spacing, way.model)
        if way.size is not None:
            size = {"height": way.size, "width": way.size}
            cache = ReuseCache(dtype)
            settings = {"steps": way.steps, "sampler": way.sampler, "plan": way.plan, "cache": cache}
            return pipe.generate(list(prompts), seeds=seeds, **settings, **size).images
        key = (way.model, way.spacing, way.sampler, way.steps, way.cache)
        if key not in renderers:
            settings = {"sampler": way.sampler, "steps": way.steps, "cache_dtype": dtype}
            renderers[key] = Renderer(pipe, prompts, seeds, **settings)
        return renderers[key](way.plan)

    def picture(self, stage: str, name: str, index: int = 0) -> np.ndarray:
        """A picture that `judge` kept. Shapes: -> (H, W, 3) uint8."""
        return np.array(Image.open(picture(self.work / stage, name, index)))

    def distance(self, stage: str, name: str, count: int, reference: str | Sequence[np.ndarray]) -> float:
        """Fréchet distance of a way's pictures to another way's or to given ones, by the classifier's features.

        Where the model has no classifier the features are its VAE's.
        """

        def batch(image: np.ndarray) -> Tensor:
            return torch.from_numpy(image.copy()).permute(2, 0, 1)[None]

        def work() -> float:
            classifier = self.classifier
            features = VAEFeatures(self.pipe().vae) if classifier is None else classifier.features
            ours = [batch(self.picture(stage, name, i)) for i in range(count)]
            given = (
                [self.picture(stage, reference, i) for i in range(count)] if isinstance(reference, str) else reference
            )
            return frechet(features, map(batch, given), ours)

        return self.journal.known(f"{stage}/distance/{name}", work) if count > 1 else float("nan")

    # --- times -------------------------------------------------------------------------------------------------------

    def times(self, ways: Mapping[str, Way]) -> dict[str, dict[str, Any]]:
        """Seconds of one picture's sampling loop, the ways in turn: with the fused kernel, and with maps written out.

        By way: seconds, seconds_explicit, a list over rounds each; cache_mib; on CUDA peak_mib, of all memory.
        """

        def once(way: Way) -> dict[str, float]:
            pipe, found = self.pipe(way.spacing, way.model), {}
            for kernel, key in (("fused", "seconds"), ("explicit", "seconds_explicit")):
                if pipe.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(pipe.device)
                result = pipe.generate(
                    self.prompts[0],
                    seeds=SEED,
                    steps=way.steps,
                    sampler=way.sampler,
                    plan=way.plan,
                    cache=ReuseCache(getattr(torch, way.cache)),
                    attention=kernel,
                )
                found |= {key: result.seconds, "cache_mib": result.cache_peak_bytes / 2**20}
                if pipe.device.type == "cuda":
                    found["peak_mib"] = torch.cuda.max_memory_allocated(pipe.device) / 2**20
            return found

        rounds = timed_rounds(self.journal, self.scale.rounds, {n: partial(once, way) for n, way in ways.items()})
        return {
            name: {
                key: [found[name][key] for found in rounds] if "seconds" in key else rounds[0][name][key]
                for key in rounds[0][name]
            }
            for name in ways
        }


def setting_of(study: Study) -> dict[str, Any]:
    """What the numbers of a stage were found with, for the page."""
    pipe = study.pipe()
    return {
        "model": pipe.fingerprint,
        "prediction": pipe.schedule.prediction_type,
        "spacing": pipe.schedule.spacing,
        "guidance_scale": pipe.guidance_scale,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }

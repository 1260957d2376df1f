"""What U-Net calls that store or reuse cost, measured on the machine at hand, and from that what a plan costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from minireuse.cache import ReuseCache
from minireuse.common.timing import alternate, median_ratio, seconds_of
from minireuse.pipeline import Pipeline
from minireuse.plan import PLAIN, PREDICTION, ReusePlan, Site, StepPlan


@dataclass(frozen=True)
class Costs:
    """Seconds of a plain guided call, and how many storing or reusing adds, by group of sites; negative is saved.

    What groups add in one call is taken to sum up, and a group of which only some sites store or reuse, since a deep
    feature skips the others, to add its share of sites.
    """

    plain: float
    groups: tuple[tuple[Site, ...], ...]
    store: tuple[float, ...]
    reuse: tuple[float, ...]

    def latency(self, plan: ReusePlan) -> float:
        """An estimate of the plan's time as a fraction of the full sampler's. All calls have to be guided."""
        seconds = plan.calls * self.plain
        for call in range(plan.calls):
            step = plan.step(call)
            for group, store, reuse in zip(self.groups, self.store, self.reuse, strict=True):
                stored, reused = (len(sites.intersection(group)) / len(group) for sites in (step.store, step.reuse))
                seconds += store * stored + reuse * reused
        return seconds / (plan.calls * self.plain)

    def to_json(self) -> dict[str, Any]:
        return {
            "plain": self.plain,
            "groups": [[[s.kind, s.address] for s in group] for group in self.groups],
            "store": list(self.store),
            "reuse": list(self.reuse),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], sites: Sequence[Site]) -> Costs:
        """The inverse of `to_json`, over the model's own sites. Raises: ValueError."""
        own = {(s.kind, s.address): s for s in sites}
        try:
            groups = tuple(tuple(own[kind, address] for kind, address in group) for group in data["groups"])
            return cls(float(data["plain"]), groups, tuple(map(float, data["store"])), tuple(map(float, data["reuse"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the costs do not fit this model ({error}); remove the journal that holds them") from None


@torch.no_grad()
def measure(
    pipeline: Pipeline,
    groups: Sequence[Sequence[Site]],
    *,
    rounds: int = 9,
    size: tuple[int, int] | None = None,
    cache_dtype: torch.dtype = torch.float16,
    order: int = 0,
) -> Costs:
    """Time guided calls for one image: plain, storing and reusing each group, in turn.

    size: of the latents; None is the model's own. order: of the plans; a call reads one value more than that.
    Machines are noisy: the kinds of call alternate, and of what a group adds in each round the median counts.
    """
    config = pipeline.unet.config
    height, width = size or (config.sample_size, config.sample_size)
    x = torch.randn(2, config.in_channels, height, width).to(pipeline.device, pipeline.dtype)
    context, pooled = pipeline.text.condition(["", ""])
    factor = pipeline.vae.config.factor
    text, told = pipeline.unet.text_kv(context), pipeline.unet.added(pooled, factor * height, factor * width)
    cache = ReuseCache(cache_dtype)

    def seconds(step: StepPlan) -> float:
        return seconds_of(lambda: pipeline.unet(x, 500, text, step, cache, added=told), pipeline.synchronize)

    def store(sites: frozenset[Site]) -> float:
        cache.clear()
        for _ in range(order):  # values that are already there when the timed one comes
            seconds(StepPlan(store=sites, keep=frozenset((site, order) for site in sites)))
        return seconds(StepPlan(store=sites, keep=frozenset((site, order) for site in sites)))

    def reuse(sites: frozenset[Site]) -> float:
        weights = frozenset((site, (1.0,) * order) for site in sites) if order else frozenset()
        return seconds(StepPlan(reuse=sites, weights=weights))

    works: dict[tuple[str, int], Callable[[], float]] = {("plain", 0): partial(seconds, PLAIN)}
    for g, group in enumerate(groups):
        if PREDICTION in group:
            continue
        # Storing comes first: it also fills the cache that reusing reads.
        works["store", g] = partial(store, frozenset(group))
        works["reuse", g] = partial(reuse, frozenset(group))
    times = alternate(works, rounds)
    plain = times["plain", 0]

    def added(kind: str) -> tuple[float, ...]:
        """What calls of a kind take beyond the plain call of the same round, by group."""
        # The U-Net does not know of its prediction being kept: storing it costs nothing, and reusing it makes no call.
        prediction = [0.0 if kind == "store" else -statistics.median(plain)]
        found = (
            prediction
            if PREDICTION in group
            else [taken - of_plain for taken, of_plain in zip(times[kind, g], plain, strict=True)]
            for g, group in enumerate(groups)
        )
        return tuple(map(statistics.median, found))

    return Costs(statistics.median(plain), tuple(map(tuple, groups)), added("store"), added("reuse"))


def measured_latency(
    pipeline: Pipeline,
    plan: ReusePlan,
    *,
    sampler: str,
    steps: int | Sequence[float],
    guidance_scale: float | None,
    rounds: int = 5,
) -> float:
    """The plan's time as a fraction of the full sampler's, for one image, in turn: the median of the ratios."""

    def seconds(followed: ReusePlan | None) -> float:  # of the sampling loop alone
        settings = {"steps": steps, "sampler": sampler, "guidance_scale": guidance_scale}
        return pipeline.generate("", plan=followed, **settings).seconds  # type: ignore[arg-type]

    times = alternate({"full": partial(seconds, None), "plan": partial(seconds, plan)}, rounds)
    return median_ratio(times["plan"], times["full"])

"""What the command line does about the memory of the cache: --dry-run, --cache-budget, and advice where it runs out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from minireuse.common.options import mebibytes
from minireuse.pipeline import Pipeline
from minireuse.plan import ReusePlan, Site
from minireuse.sample.forecast import Forecast, forecast
from minireuse.search import cheapest_first, groups_of, measure
from minireuse.unet import UNet


@dataclass(frozen=True)
class CacheShape:
    """What the bytes of a cache depend on, beside the U-Net and the plan.

    Shapes: size (h, w) of the latents. tokens: M of the text encoder.
    """

    batch: int
    size: tuple[int, int]
    tokens: int
    guided: bool
    dtype: torch.dtype

    def forecast(self, unet: UNet, plan: ReusePlan) -> Forecast:
        """The bytes of a plan's cache, known before the run."""
        return forecast(
            unet,
            plan,
            batch=self.batch,
            size=self.size,
            tokens=self.tokens,
            guided=self.guided,
            cache_dtype=self.dtype,
        )

    def report(self, unet: UNet, plan: ReusePlan) -> dict[str, Any]:
        """What `--dry-run` prints: the bytes that a batch will keep, by site and at its fullest moment."""
        found = self.forecast(unet, plan)
        return {
            "sites": {f"{site.kind} of {site.address}": size for site, size in found.sites.items()},
            "cache_peak_bytes": found.peak,
            "cache_dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
            "calls": plan.calls,
            "reused": plan.reused,
            "plan": plan.grid,
            "order": plan.order,
        }


def within_budget(
    budget: int, pipeline: Pipeline, plan: ReusePlan, shape: CacheShape, render: Callable[[ReusePlan], np.ndarray]
) -> ReusePlan:
    """The plan with as many sites as the budget has room for, by what they do to the first image; notes say which.

    Units: budget in bytes.
    """
    plan = plan.on(pipeline.sites)
    peak = lambda p: shape.forecast(pipeline.unet, p).peak  # noqa: E731
    if peak(plan) <= budget:
        return plan
    groups = groups_of(plan.sites, len(pipeline.unet.config.block_out_channels))
    fitting = {name: sites for name, sites in groups.items() if peak(restrict(plan, sites)) <= budget}
    shares = weigh(pipeline, plan, fitting, render, size=shape.size, cache_dtype=shape.dtype)
    chosen, names = choose(plan, shares, peak, budget)
    for name in groups:
        share, does = shares.get(name), "reuses" if name in names else "computes"
        effect = "larger than the budget"
        if share is not None:
            effect = f"squared error {share.damage:.3g}, {1000 * share.saved:.1f} ms saved a call"
        print(f"note: {name} {does} ({effect})", file=sys.stderr)
    return chosen


@dataclass(frozen=True)
class Share:
    """What one group of sites does to a run when it alone follows the plan.

    Units: damage in squared steps of a pixel (0 to 255), on average; saved in seconds of a U-Net call.
    """

    sites: tuple[Site, ...]
    damage: float
    saved: float


def restrict(plan: ReusePlan, sites: Sequence[Site]) -> ReusePlan:
    """The plan for these sites alone; the others compute."""
    chosen = [site in set(sites) for site in plan.sites]
    kept = tuple(site for site, stays in zip(plan.sites, chosen, strict=True) if stays)
    return replace(plan, mask=plan.mask[:, chosen], sites=kept)


def choose(
    plan: ReusePlan, shares: Mapping[str, Share], peak: Callable[[ReusePlan], int], budget: int
) -> tuple[ReusePlan, list[str]]:
    """The groups that reuse: those of least damage for the time they save first, each if the cache still fits.

    peak: bytes of a plan's cache at its fullest. A group that saves no time is left out.
    """

    def part(names: Sequence[str]) -> ReusePlan:
        return restrict(plan, [site for name in names for site in shares[name].sites])

    def price(_: Sequence[str], name: str) -> float:
        share = shares[name]
        return share.damage / share.saved if share.saved > 0 else np.inf

    def allowed(chosen: Sequence[str], name: str) -> bool:
        return peak(part([*chosen, name])) <= budget

    names = cheapest_first([[name] for name in shares], price, allowed=allowed)
    return part(names), list(names)


def weigh(
    pipeline: Pipeline,
    plan: ReusePlan,
    groups: Mapping[str, Sequence[Site]],
    render: Callable[[ReusePlan], np.ndarray],
    *,
    size: tuple[int, int],
    cache_dtype: torch.dtype,
) -> dict[str, Share]:
    """What each group does to an image when it alone follows the plan, and to the time of a call on this machine.

    render: of a plan, the image. Shapes: size (h, w) of its latents.
    """
    full = render(restrict(plan, ())).astype(float)
    some = list(groups.values())
    costs = measure(pipeline, some, rounds=3, size=size, cache_dtype=cache_dtype, order=plan.order)
    return {
        name: Share(tuple(sites), float(np.square(render(restrict(plan, sites)) - full).mean()), -added)
        for (name, sites), added in zip(groups.items(), costs.reuse, strict=True)
    }


@contextmanager
def advice_on_memory(unet: UNet, plan: ReusePlan, shape: CacheShape) -> Iterator[None]:
    """Where memory runs out, say what would help. Raises: ValueError then."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        peak = mebibytes(shape.forecast(unet, plan).peak)
        raise ValueError(
            f"out of memory with a batch of {shape.batch}, of which the cache takes up to {peak}; try --batch-size 1, "
            "--cache-dtype uint8, --cache-budget, --sites cross, or a smaller --height and --width"
        ) from None

"""A plan within an amount of memory: which groups of sites reuse, by what each costs in fidelity and saves in time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from minireuse.pipeline import Pipeline
from minireuse.plan import ReusePlan, Site
from minireuse.search import measure


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

    def price(name: str) -> float:
        return shares[name].damage / shares[name].saved

    names: list[str] = []
    for name in sorted((n for n in shares if shares[n].saved > 0), key=price):
        sites = [site for n in (*names, name) for site in shares[n].sites]
        if peak(restrict(plan, sites)) <= budget:
            names.append(name)
    return restrict(plan, [site for n in names for site in shares[n].sites]), names


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

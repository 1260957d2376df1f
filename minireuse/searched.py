"""Searched plans that lie beside a model, and how one of them is fitted to the run at hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minireuse.files import parse_json, shipped_model
from minireuse.reuse import PlanError, ReusePlan, Site


@dataclass(frozen=True)
class Searched:
    """A step-wise plan that a search found, and what it was searched for."""

    plan: ReusePlan
    model: str  # fingerprint of the U-Net
    sampler: str

    @classmethod
    def read(cls, path: Path) -> Searched:
        """A plan file of `python -m minireuse.search`. Raises: PlanError, OSError."""
        plan, about = read_plan(path)
        if not {"model", "sampler"} <= about.keys():
            raise PlanError(f"{path} does not say what it was searched for; remove it, or search it again")
        if plan.grid is None:
            raise PlanError(f"{path} differs by site; only step-wise plans can lie among the plans of a model")
        return cls(plan, str(about["model"]), str(about["sampler"]))

    @property
    def row(self) -> tuple[bool, ...]:
        """Which calls the plan reuses."""
        return tuple(cell == "#" for cell in self.plan.grid or "")

    def __str__(self) -> str:
        return told(self.sampler, self.plan.calls, self.plan.reused, self.plan.order)


def told(sampler: str, calls: int, reused: int, order: int) -> str:
    """A setting that plans are searched for, in words."""
    return f"{sampler}, {calls} calls, {reused} of them reused" + f" with order {order}" * (order > 0)


def read_plan(path: Path) -> tuple[ReusePlan, dict[str, Any]]:
    """The plan in a file, and what the file says about it. Raises: PlanError, which names the file; OSError."""
    try:
        text = path.read_text(encoding="utf-8")
        plan, about = ReusePlan.from_json(text), parse_json(text).get("about")
    except (PlanError, UnicodeDecodeError) as error:
        raise PlanError(
            f"{path} is not a plan ({error}); give a file that a search or ReusePlan.to_json made"
        ) from None
    return plan, about if isinstance(about, dict) else {}


def plans_of(model: Path | None = None) -> list[Searched]:
    """The plans in the folder `plans` of a model, then those that ship. Raises: PlanError, OSError."""
    folders = dict.fromkeys(p / "plans" for p in (model, shipped_model()) if p is not None)
    return [Searched.read(file) for folder in folders for file in sorted(folder.glob("*.json"))]


def nearest(
    plans: Iterable[Searched], calls: int, sites: Iterable[Site], k: int, sampler: str, model: str, order: int = 0
) -> tuple[Searched, bool] | None:
    """The plan searched for what is most like this run, and whether it was searched for just this run.

    A plan of the same model counts most, then one of the same sampler, order, sites, number of calls, share of reuse.
    None where no plan reuses sites of this kind: what is a good place for a map is a poor one for deep features.
    """
    sites = set(sites)
    kinds = {site.kind for site in sites}

    def distance(p: Searched) -> tuple[float, ...]:
        return (
            p.model != model,
            p.sampler != sampler,
            p.plan.order != order,
            set(p.plan.sites) != sites,
            abs(math.log(p.plan.calls / calls)),
            abs(p.plan.reused / p.plan.calls - k / calls),
        )

    known = [p for p in plans if {site.kind for site in p.plan.sites} == kinds]
    best = min(known, key=distance, default=None)
    return None if best is None else (best, not any(distance(best)))


def fit(row: Sequence[bool], calls: int, k: int) -> np.ndarray:
    """A plan with k reuse calls out of `calls` whose reuse lies where it does in `row`, in proportion.

    Shapes: row (S',) -> (calls,). Equal calls and k give the row itself.
    """
    places = np.flatnonzero(row)
    if not len(places):
        places = np.array([len(row) - 1])
    # Spread the k over the row's reuse calls, each of which stands for its part of the run.
    share = (np.arange(k) + 0.5) / max(k, 1) * len(places)
    wanted = (places[share.astype(int)] + share % 1) / len(row)
    fitted = np.zeros(calls, dtype=bool)
    last = 0
    for j, place in enumerate(np.floor(wanted * calls).astype(int)):
        last = min(max(place, last + 1), calls - k + j)  # in order, never call 0, with room for those to come
        fitted[last] = True
    return fitted

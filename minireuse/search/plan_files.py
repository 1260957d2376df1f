"""Plan files, and the searched plans that lie beside a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from minireuse.files import parse_json, read_text, shipped_model, shown
from minireuse.plan import PlanError, ReusePlan, Site
from minireuse.policies import Searched


def read_plan(path: Path, sites: Iterable[Site] = ()) -> tuple[ReusePlan, dict[str, Any]]:
    """The plan in a file, and what the file says about it. Raises: PlanError, which names the file; OSError.

    sites: of the model; files of version 0.1 do not say how deep sites lie.
    """
    plan, about, _ = _read(path, sites)
    return plan, about


def plan_text(plan: ReusePlan, timesteps: Sequence[float], about: dict[str, Any]) -> str:
    """What a plan file holds. timesteps: of the calls, by which the plan is carried over to other runs."""
    fields = {"timesteps": list(timesteps), "about": about}
    return json.dumps(json.loads(plan.to_json()) | fields, indent=2) + "\n"


def read_searched(path: Path) -> Searched:
    """A plan file of `python -m minireuse.search`. Raises: PlanError, OSError."""
    plan, about, timesteps = _read(path)
    if not {"model", "sampler"} <= about.keys():
        raise PlanError(f"{path} does not say what it was searched for; remove it, or search it again")
    scores = about.get("scores_unseen")
    unseen = scores.get("phast") if isinstance(scores, dict) else None
    spacing = str(about.get("spacing") or "")
    latency, score = _number(about.get("latency")), _number(unseen)
    return Searched(plan, str(about["model"]), str(about["sampler"]), spacing, latency, score, timesteps)


def _read(path: Path, sites: Iterable[Site] = ()) -> tuple[ReusePlan, dict[str, Any], tuple[float, ...]]:
    """As `read_plan`, and the timesteps of the calls; none where the file does not say."""
    try:
        text = read_text(path)
        plan, data = ReusePlan.from_json(text, sites), parse_json(text)
        timesteps = _timesteps(data.get("timesteps"), plan.calls)
    except ValueError as error:  # a PlanError, too
        raise PlanError(
            f"{path} is not a plan ({error}); give a file that a search or ReusePlan.to_json made"
        ) from None
    about = data.get("about")
    return plan, about if isinstance(about, dict) else {}, timesteps


def _timesteps(value: Any, calls: int) -> tuple[float, ...]:
    """Raises: PlanError for what is not one timestep for each call, falling."""
    if value is None:
        return ()
    times = [_number(t) for t in value] if isinstance(value, list) else []
    known = [t for t in times if t is not None and t >= 0]
    if len(known) != len(times) or len(times) != calls or any(a < b for a, b in pairwise(known)):
        raise PlanError(
            f"plan field timesteps is {shown(value)}, expected {calls} numbers that fall, one for each call"
        )
    return tuple(known)


def _number(value: Any) -> float | None:
    """A finite number of a file; None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def plans_of(model: Path | None = None) -> list[Searched]:
    """The plans in the folder `plans` of a model, then those that ship. Raises: PlanError, OSError."""
    folders = dict.fromkeys(p / "plans" for p in (model, shipped_model()) if p is not None)
    return [read_searched(file) for folder in folders for file in sorted(folder.glob("*.json"))]

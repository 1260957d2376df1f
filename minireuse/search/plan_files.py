"""Plan files, and the searched plans that lie beside a model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minireuse.files import parse_json, read_text, shipped_model
from minireuse.plan import PlanError, ReusePlan, Site
from minireuse.policies import Searched


def read_plan(path: Path, sites: Iterable[Site] = ()) -> tuple[ReusePlan, dict[str, Any]]:
    """The plan in a file, and what the file says about it. Raises: PlanError, which names the file; OSError.

    sites: of the model; files of version 0.1 do not say how deep sites lie.
    """
    try:
        text = read_text(path)
        plan, about = ReusePlan.from_json(text, sites), parse_json(text).get("about")
    except ValueError as error:  # a PlanError, too
        raise PlanError(
            f"{path} is not a plan ({error}); give a file that a search or ReusePlan.to_json made"
        ) from None
    return plan, about if isinstance(about, dict) else {}


def read_searched(path: Path) -> Searched:
    """A plan file of `python -m minireuse.search`. Raises: PlanError, OSError."""
    plan, about = read_plan(path)
    if not {"model", "sampler"} <= about.keys():
        raise PlanError(f"{path} does not say what it was searched for; remove it, or search it again")
    scores = about.get("scores_unseen")
    unseen = scores.get("phast") if isinstance(scores, dict) else None
    spacing = str(about.get("spacing") or "")
    return Searched(
        plan, str(about["model"]), str(about["sampler"]), spacing, _number(about.get("latency")), _number(unseen)
    )


def _number(value: Any) -> float | None:
    """A finite number of a file; None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def plans_of(model: Path | None = None) -> list[Searched]:
    """The plans in the folder `plans` of a model, then those that ship. Raises: PlanError, OSError."""
    folders = dict.fromkeys(p / "plans" for p in (model, shipped_model()) if p is not None)
    return [read_searched(file) for folder in folders for file in sorted(folder.glob("*.json"))]

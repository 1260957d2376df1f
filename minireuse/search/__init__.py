"""Finding plans: PHAST's search, what plans cost, plans found before, and the language of `--policy`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minireuse.search.budget import cheapest_first, groups_of, layerwise, starts, step_wise
from minireuse.search.language import build, names_in, policies_for, takes_count, takes_sites
from minireuse.search.phast import Rounds, ScoreMany, SearchResult, improve
from minireuse.search.plan_files import plans_of, read_plan, read_searched
from minireuse.search.scoring import Scoring, search

if TYPE_CHECKING:
    from minireuse.search.costs import Costs, measure, measured_latency
    from minireuse.search.render import Renderer

__all__ = [
    "Costs",
    "Renderer",
    "Rounds",
    "ScoreMany",
    "Scoring",
    "SearchResult",
    "build",
    "cheapest_first",
    "groups_of",
    "improve",
    "layerwise",
    "measure",
    "measured_latency",
    "names_in",
    "plans_of",
    "policies_for",
    "read_plan",
    "read_searched",
    "search",
    "starts",
    "step_wise",
    "takes_count",
    "takes_sites",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: plans and their search cost torch alone, whereas these need the whole model.
    if name in ("Costs", "measure", "measured_latency"):
        from minireuse.search import costs

        return getattr(costs, name)
    if name == "Renderer":
        from minireuse.search.render import Renderer

        return Renderer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The searches behind the figures, each a command of its own whose plan file is kept beside the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minireuse.files import write_whole
from minireuse.pipeline import Pipeline
from minireuse.search import command, read_plan
from minireuse.search.plan_files import plan_text

from paper.study import GRIDS, REUSED, STEPS


@dataclass(frozen=True)
class Search:
    """One search. name: of its plan file; options: of `python -m minireuse.search`, beside those that all share."""

    name: str
    spacing: str
    options: tuple[str, ...]


def searches(ks: Sequence[int], budget: str, layerwise_budget: str) -> list[Search]:
    """All of them: PHAST for each number of reuse calls on both grids, other rules of the search, and layers.

    budget, layerwise_budget: of a search, such as 4min. The exact search is given five times the budget.
    """
    found = [
        Search(f"phast-{grid}-{k}", grid, ("--kind", "map", "--reuse", str(k), "--budget", budget))
        for k in sorted(ks, key=lambda k: k != REUSED)  # what most figures need comes first
        for grid in GRIDS
    ]
    grid = GRIDS[0]
    rule = ("--kind", "map", "--reuse")
    found += [Search(f"first-{grid}-{k}", grid, (*rule, str(k), "--first", "--budget", budget)) for k in ks]
    exact = f"{5 * float(budget.removesuffix('min')):g}" + "min" * budget.endswith("min")
    found.append(Search(f"exact-{grid}-{REUSED}", grid, (*rule, str(REUSED), "--exact", "--budget", exact)))
    within = ("--budget-latency", "0.7", "--budget")
    found += [Search(f"within-{kind}", grid, ("--kind", kind, *within, budget)) for kind in ("map", "out", "deep")]
    return [*found, Search("within-layers", grid, ("--layerwise", *within, layerwise_budget))]


def run(
    search: Search, pipe: Pipeline, model: Path | None, prompts_file: Path | None, count: int, plans: Path, work: Path
) -> str:
    """Run a search, or go on with it, unless its plan is there. Returns what happened.

    pipe: the model, on the grid of the search. count: calibration prompts. plans: the folder that receives the plan
    file. work: that of the journal.
    Raises: KeyboardInterrupt where the search was interrupted; ValueError where it failed.
    """
    target, out = plans / f"{search.name}.json", work / f"{search.name}.json"
    if target.exists():
        if read_plan(target, pipe.sites)[1].get("model") != pipe.fingerprint:
            raise ValueError(f"{target} was searched for another model; remove it, so that it is searched again")
        return "is there"
    argv = ["--steps", str(STEPS), "--spacing", search.spacing, "--prompts", str(count), "--out", str(out), "--quiet"]
    argv += [] if model is None else ["--model", str(model)]
    argv += [] if prompts_file is None else ["--prompts-file", str(prompts_file)]
    status = 0 if out.exists() else command.main([*argv, *search.options])
    if status == 130:
        raise KeyboardInterrupt
    if status and search.name.startswith("within-"):
        return "no plan is that fast"
    if status:
        raise ValueError(f"the search for {search.name} failed; its journal is {out.with_suffix('.journal.jsonl')}")
    plan, about = read_plan(out, pipe.sites)
    timesteps = pipe.call_timesteps("ddim", STEPS)
    write_whole([target], plan_text(plan, timesteps, about).encode())
    return "searched"

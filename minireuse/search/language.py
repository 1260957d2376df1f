"""The small language of `--policy`: names of policies with knobs, plan files, and several of them joined by `|`."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

from minireuse.plan import PlanError, ReusePlan, Site
from minireuse.policies import POLICIES, RELATIVES, STEPWISE, Policy, phast, select
from minireuse.search.plan_files import plans_of, read_plan

# Parameters of policies that are no knobs: they are the run's own.
GIVEN = ("calls", "sites", "plans", "sampler", "model", "spacing", "timesteps")


def policies_for(
    expressions: str,
    folder: Path | None,
    sampler: str,
    fingerprint: Callable[[], str],
    spacing: str = "",
    timesteps: Sequence[float] = (),
) -> Mapping[str, Policy]:
    """All policies, `phast` among them with the plans of the model in `folder` and those that ship.

    timesteps: of the run's calls (`Pipeline.call_timesteps`), by which `phast` carries a plan over.
    Plans are read, and the fingerprint asked for, only where the expressions name `phast`: both take a while.
    """
    if "phast" not in names_in(expressions):
        return POLICIES
    ours = partial(
        phast, plans=plans_of(folder), sampler=sampler, model=fingerprint(), spacing=spacing, timesteps=timesteps
    )
    return POLICIES | {"phast": ours}


def build(
    expression: str,
    calls: int,
    sites: Iterable[Site],
    *,
    k: int | None = None,
    which: str | None = None,
    kind: str | None = None,
    latency: float | None = None,
    policies: Mapping[str, Policy] = POLICIES,
) -> ReusePlan:
    """The plan a text names: a policy, a plan file, or several joined by `|`.

    Knobs follow a policy's name, as in `deepcache:every=3` or `hurry:k=5,kind=out,sites=cross`. All of them have
    `order`, that of the plan; those that reuse the sites they are given have what `select` chooses by: `kind`, `sites`,
    `branch`.

    sites: the model's; k, which, kind: for the policies that reuse the sites they are given, by default maps in all of
    attention; latency: for `phast`, which without any of these chooses the sites, too; policies: by name.
    Raises: PlanError for an unknown name or knob, or what the policy itself refuses; OSError for an unreadable file.
    """
    sites = tuple(sites)
    terms = [term.strip() for term in expression.split("|")]
    if k is not None and not takes_count(expression, policies):
        raise PlanError(f"{expression} has no knob k; see docs/choosing-a-policy.md")
    if latency is not None and "phast" not in names_in(expression):
        raise PlanError(f"latency chooses among searched plans, and {expression} takes none; ask for phast")
    given = {"k": k, "latency": latency}, {"sites": which, "kind": kind}
    return reduce(operator.or_, (_term(term, calls, sites, *given, policies) for term in terms))


def names_in(expression: str) -> list[str]:
    """The policies or plan files that an expression joins, without their knobs."""
    return [term.strip().partition(":")[0] for term in expression.split("|")]


def takes_count(expression: str, policies: Mapping[str, Policy] = POLICIES) -> bool:
    """Whether a policy in the expression lets the number of reuse calls be chosen."""
    chosen = (policies.get(name) for name in names_in(expression))
    return any("k" in inspect.signature(policy).parameters for policy in chosen if policy is not None)


def takes_sites(expression: str) -> bool:
    """Whether a policy in the expression reuses the sites it is given."""
    return not STEPWISE.keys().isdisjoint(names_in(expression))


def _term(
    term: str,
    calls: int,
    sites: tuple[Site, ...],
    numbers: Mapping[str, float | None],
    words: Mapping[str, str | None],
    policies: Mapping[str, Policy],
) -> ReusePlan:
    """The plan of one policy or file. numbers, words: what the command line says of knobs; the term says it better."""
    name, _, settings = term.partition(":")
    if name not in policies:
        if not Path(term).is_file():
            known = ", ".join(policies)
            raise PlanError(f"policy is {term!r}, expected one of {known}, or an existing plan file")
        return read_plan(Path(term), sites)[0]
    policy = policies[name]
    knows: dict[str, Any] = dict(numbers) | dict(words)
    own = [p for p in inspect.signature(policy).parameters if p not in GIVEN]
    choosing = () if name in RELATIVES else ("kind", "sites", "branch")
    knobs = list(dict.fromkeys((*own, "order", *choosing)))
    for setting in filter(None, settings.split(",")):
        knob, _, value = setting.partition("=")
        if knob in words and knob in choosing:
            knows[knob] = value
            continue
        try:
            knows[knob] = float(value) if "." in value else int(value)
        except ValueError:
            raise PlanError(f"policy {term}: {setting!r} is not knob=number") from None
        if knob not in knobs:
            raise PlanError(f"policy {term}: no knob {knob!r}; {name} has {', '.join(knobs)}")
    plan = policy(calls, _chosen(name, sites, knows), **{knob: value for knob, value in knows.items() if knob in own})
    return plan if knows.get("order") is None else replace(plan, order=knows["order"])


def _chosen(name: str, sites: tuple[Site, ...], knows: Mapping[str, Any]) -> tuple[Site, ...]:
    """The sites that a policy is given: all of them, or those that the knobs `kind`, `sites` and `branch` choose."""
    kind, which, branch = (knows.get(knob) for knob in ("kind", "sites", "branch"))
    if name in RELATIVES:
        return sites
    if name == "phast" and which is None and branch is None:
        if knows.get("latency") is not None:
            return sites if kind is None else tuple(site for site in sites if site.kind == kind)  # in every branch
        if all(knows.get(knob) is None for knob in ("kind", "k", "order")):
            return sites
    return select(sites, which or "both", kind or "map", branch or 0)

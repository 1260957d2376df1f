"""Plan builders: which of the sampler's U-Net calls reuse. Every policy is a function of (calls, sites).

HURRY and PHAST are the paper's (arXiv 2401.01008); `early`, `interval` and `random` are controls; the published
relatives are plans over the same sites.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from minireuse.reuse import KINDS, PlanError, ReusePlan, Site
from minireuse.searched import Searched, fit, nearest, plans_of, read_plan, told

Policy = Callable[..., ReusePlan]


def none(calls: int, sites: Iterable[Site]) -> ReusePlan:
    """Reuse nothing: the full sampler."""
    return _stepwise(calls, sites, ())


def hurry(calls: int, sites: Iterable[Site], *, k: int | None = None) -> ReusePlan:
    """HURRY: the last k calls reuse, since late reuse distorts the image least."""
    k = _reuse_count(calls, k)
    return _stepwise(calls, sites, range(calls - k, calls))


def phast(calls: int, sites: Iterable[Site], *, k: int | None = None, order: int = 0) -> ReusePlan:
    """PHAST: a plan found by search around HURRY. Of those that ship, the nearest; a warning says which.

    Knows neither model nor sampler and takes the plans of DDIM first; `phast_for` knows them.
    """
    return phast_for(plans_of())(calls, sites, k=k, order=order)


def phast_for(plans: Iterable[Searched], sampler: str = "ddim", model: str = "") -> Policy:
    """The policy `phast` that chooses among these plans for this sampler and model (`Pipeline.fingerprint`)."""
    plans = list(plans)

    def phast(calls: int, sites: Iterable[Site], *, k: int | None = None, order: int = 0) -> ReusePlan:
        k, sites = _reuse_count(calls, k), tuple(sites)
        found = nearest(plans, calls, sites, k, sampler, model, order)
        advice = "`python -m minireuse.search` searches one for this setting"
        if found is None:
            warnings.warn(f"phast knows no plan for sites like these and takes hurry; {advice}", stacklevel=2)
            return replace(hurry(calls, sites, k=k), order=order)
        plan, exact = found
        if not exact:
            others = ["another model"] * (plan.model != model) + ["other sites"] * (set(plan.plan.sites) != set(sites))
            for_what = f"with {' and '.join(others)} " * bool(others) + f"for {plan}"
            run = told(sampler, calls, k, order)
            warnings.warn(f"phast takes the plan searched {for_what}, fitted to {run}; {advice}", stacklevel=2)
        return ReusePlan.stepwise(fit(plan.row, calls, k), sites, order)

    return phast


def early(calls: int, sites: Iterable[Site], *, k: int | None = None) -> ReusePlan:
    """The mirror image of HURRY, as a control: the k calls after the first reuse."""
    k = _reuse_count(calls, k)
    return _stepwise(calls, sites, range(1, 1 + k))


def interval(calls: int, sites: Iterable[Site], *, k: int | None = None) -> ReusePlan:
    """Evenly spread: the calls - k computing calls are as far apart as they can be; every other call at k = half."""
    k = _reuse_count(calls, k)
    computed = {i * calls // (calls - k) for i in range(calls - k)}
    return _stepwise(calls, sites, set(range(calls)) - computed)


def random(calls: int, sites: Iterable[Site], *, k: int | None = None, seed: int = 0) -> ReusePlan:
    """k calls drawn at random, never the first, as a control."""
    k = _reuse_count(calls, k)
    _require_whole("seed", seed, 0)
    chosen = np.random.default_rng(seed).choice(np.arange(1, calls), size=k, replace=False) if k else ()
    return _stepwise(calls, sites, chosen)


def deepcache(calls: int, sites: Iterable[Site], *, every: int = 2, branch: int = 0) -> ReusePlan:
    """DeepCache (arXiv 2312.00858), uniform: every n-th call runs whole, the others enter the U-Net at `branch`.

    Source: horseee/DeepCache `DeepCache/extension/deepcache.py`.
    """
    _require_whole("every", every, 1)
    return ReusePlan.stepwise(np.arange(calls) % every != 0, select(sites, kind="deep", branch=branch))


def tgate(calls: int, sites: Iterable[Site], *, gate: int | None = None, every: int = 5, warmup: int = 2) -> ReusePlan:
    """T-GATE (arXiv 2404.02747): from call `gate` on, cross attention's output is kept and guidance is dropped.

    Before the gate and after `warmup`, self attention's output is computed at multiples of `every` only. gate: half of
    the calls unless given.
    Source: HaozheLiu-ST/T-GATE `tgate/tgate_utils.py` (`tgate_scheduler`).
    """
    gate = max(1, calls // 2) if gate is None else gate
    _require_whole("gate", gate, 1, calls)
    _require_whole("warmup", warmup, 0)
    _require_whole("every", every, 1)
    call, sites = np.arange(calls), tuple(sites)
    planning = (call > warmup) & (call < gate - 1) & (call % every != 0)
    cross = ReusePlan.stepwise(call >= gate, select(sites, "cross", "out"))
    joined = cross | ReusePlan.stepwise(planning, select(sites, "self", "out"))
    return ReusePlan(joined.mask, joined.sites, tuple(bool(c < gate) for c in call))


def pab(
    calls: int,
    sites: Iterable[Site],
    *,
    self_every: int = 2,
    cross_every: int = 6,
    start: float = 0.2,
    end: float = 0.9,
) -> ReusePlan:
    """Pyramid attention broadcast (arXiv 2408.12588): outputs are reused, self and cross at intervals of their own.

    start, end: the window of the run inside which calls reuse; the defaults are timesteps 800 to 100 of 1000.
    Source: diffusers `hooks/pyramid_attention_broadcast.py`.
    """
    _require_whole("self_every", self_every, 1)
    _require_whole("cross_every", cross_every, 1)
    if not 0 <= start <= end <= 1:
        raise PlanError(f"the window is {start} to {end}, expected 0 <= start <= end <= 1")
    call, sites = np.arange(calls), tuple(sites)
    inside = (call > start * calls) & (call < end * calls)
    own = ReusePlan.stepwise(inside & (call % self_every != 0), select(sites, "self", "out"))
    return own | ReusePlan.stepwise(inside & (call % cross_every != 0), select(sites, "cross", "out"))


STEPWISE: dict[str, Policy] = {f.__name__: f for f in (none, hurry, phast, early, interval, random)}
RELATIVES: dict[str, Policy] = {f.__name__: f for f in (deepcache, tgate, pab)}  # these choose among all sites
POLICIES: dict[str, Policy] = STEPWISE | RELATIVES


def policies_for(
    expressions: str, folder: Path | None, sampler: str, fingerprint: Callable[[], str]
) -> Mapping[str, Policy]:
    """All policies, `phast` among them with the plans of the model in `folder` and those that ship.

    Plans are read, and the fingerprint asked for, only where the expressions name `phast`: both take a while.
    """
    if "phast" not in names_in(expressions):
        return POLICIES
    return POLICIES | {"phast": phast_for(plans_of(folder), sampler, fingerprint())}


def select(sites: Iterable[Site], which: str = "both", kind: str = "map", branch: int = 0) -> tuple[Site, ...]:
    """The sites of one kind, in self attention, cross attention or both; of `deep` the one number `branch`.

    Branch 0 skips most: only the first and the last layer of the U-Net still run (DeepCache, arXiv 2312.00858). Further
    ones run more of the layers, save less, and err less.
    Raises: PlanError where there is no such site.
    """
    wanted = {"self": (False,), "cross": (True,), "both": (False, True)}
    if which not in wanted:
        raise PlanError(f"sites is {which!r}, expected self, cross or both")
    if kind not in KINDS:
        raise PlanError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "deep" and which != "both":
        raise PlanError(f"deep features belong to no attention, but those of {which} attention are asked for")
    if branch and kind != "deep":
        raise PlanError(f"branch numbers the deep features, but kind is {kind!r}; ask for kind deep, or no branch")
    chosen = [s for s in sites if s.kind == kind]
    if kind == "deep":
        branches = sorted(chosen, key=lambda s: s.depth or 0)
        _require_whole("branch", branch, 0, len(branches) - 1)
        return (branches[branch],)
    chosen = [s for s in chosen if s.is_cross in wanted[which]]
    if not chosen:
        raise PlanError(f"none of the sites given is of kind {kind!r} in {which} attention; pass pipe.sites")
    return tuple(chosen)


def build(
    expression: str,
    calls: int,
    sites: Iterable[Site],
    *,
    k: int | None = None,
    which: str = "both",
    kind: str = "map",
    policies: Mapping[str, Policy] = POLICIES,
) -> ReusePlan:
    """The plan a text names: a policy, a plan file, or several joined by `|`.

    Knobs follow a policy's name, as in `deepcache:every=3` or `hurry:k=5,kind=out,sites=cross`. All of them have
    `order`, that of the plan; those that reuse the sites they are given have what `select` chooses by: `kind`, `sites`,
    `branch`.

    sites: the model's; k, which, kind: for the policies that reuse the sites they are given; policies: by name.
    Raises: PlanError for an unknown name or knob, or what the policy itself refuses; OSError for an unreadable file.
    """
    sites = tuple(sites)
    terms = [term.strip() for term in expression.split("|")]
    if k is not None and not takes_count(expression, policies):
        raise PlanError(f"{expression} takes no number of reuse calls; see the knobs of policies in the README")
    return reduce(operator.or_, (_term(term, calls, sites, k, which, kind, policies) for term in terms))


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
    k: int | None,
    which: str,
    kind: str,
    policies: Mapping[str, Policy],
) -> ReusePlan:
    name, _, settings = term.partition(":")
    if name not in policies:
        if not Path(term).is_file():
            known = ", ".join(policies)
            raise PlanError(f"policy is {term!r}, expected one of {known}, or an existing plan file")
        return read_plan(Path(term))[0]
    policy = policies[name]
    numbers: dict[str, Any] = {"order": 0, "branch": 0, "k": k}
    own = [p for p in inspect.signature(policy).parameters if p not in ("calls", "sites")]
    choosing = () if name in RELATIVES else ("kind", "sites", "branch")
    knobs = list(dict.fromkeys((*own, "order", *choosing)))
    words = {"kind": kind, "sites": which}
    for setting in filter(None, settings.split(",")):
        knob, _, value = setting.partition("=")
        if knob in words and knob in choosing:
            words[knob] = value
            continue
        try:
            numbers[knob] = float(value) if "." in value else int(value)
        except ValueError:
            raise PlanError(f"policy {term}: {setting!r} is not knob=number") from None
        if knob not in knobs:
            raise PlanError(f"policy {term}: no knob {knob!r}; {name} has {', '.join(knobs)}")
    chosen = select(sites, words["sites"], words["kind"], numbers["branch"]) if choosing else sites
    plan = policy(calls, chosen, **{knob: value for knob, value in numbers.items() if knob in own})
    return replace(plan, order=numbers["order"])


def _require_whole(name: str, value: float, least: int, most: int | None = None) -> None:
    if not isinstance(value, (int, np.integer)) or value < least or (most is not None and value > most):
        upward = "upwards" if most is None else f"to {most}"
        raise PlanError(f"{name} is {value}, expected a whole number from {least} {upward}")


def _reuse_count(calls: int, k: int | None) -> int:
    k = calls // 2 if k is None else k
    _require_whole("k", k, 0, calls - 1)  # the first call has to compute
    return k


def _stepwise(calls: int, sites: Iterable[Site], reusing: Iterable[int]) -> ReusePlan:
    reuse = np.zeros(calls, dtype=bool)
    reuse[list(reusing)] = True
    return ReusePlan.stepwise(reuse, sites)

"""Plan builders: which of the sampler's U-Net calls reuse. Every policy is a function of (calls, sites).

HURRY and PHAST are the paper's (arXiv 2401.01008); `early`, `interval` and `random` are controls; the published
relatives are plans over the same sites.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minireuse.plan import KINDS, PlanError, ReusePlan, Site


@dataclass(frozen=True)
class Searched:
    """A plan that a search found, and what it was searched for."""

    plan: ReusePlan
    model: str  # fingerprint of the U-Net
    sampler: str
    spacing: str = ""  # of the timesteps; empty where the file does not say
    latency: float | None = None  # the share of the full sampler's time that it took when it was searched
    unseen: float | None = None  # dB to the full sampler, on prompts that the search has not seen
    timesteps: tuple[float, ...] = ()  # of its calls; empty where the file does not say

    @property
    def row(self) -> tuple[bool, ...]:
        """Which calls the plan reuses anything in."""
        return tuple(bool(row.any()) for row in self.plan.mask)

    def is_spaced_otherwise(self, spacing: str) -> bool:
        """Whether it was searched on another grid of timesteps than this one; not where either is unknown."""
        return bool(self.spacing and spacing and self.spacing != spacing)

    def is_for(self, calls: int, sampler: str, model: str, spacing: str) -> bool:
        """Whether it was searched for such a run."""
        same = (self.plan.calls, self.sampler, self.model) == (calls, sampler, model)
        return same and not self.is_spaced_otherwise(spacing)

    def __str__(self) -> str:
        return describe(self.sampler, self.plan.calls, self.plan.reused, self.plan.order)


def describe(sampler: str, calls: int, reused: int, order: int) -> str:
    """A setting that plans are searched for, in words."""
    return f"{sampler}, {calls} calls, {reused} of them reused" + f" with order {order}" * (order > 0)


Policy = Callable[..., ReusePlan]
KIND_NAMES = {"map": "attention maps", "out": "attention outputs", "deep": "deep features", "eps": "predictions"}
LATENCY = 0.6  # what `phast` may take of the full sampler's time where nothing else is asked for
# The plan that the paper's search found for DDIM with 20 steps on Stable Diffusion 1.5 (arXiv 2401.01008 section 5): 1
# computes, 0 reuses. The paper does not tell its timesteps; these are the model's own grid, `leading` with offset 1.
PAPERS_PLAN = "1111111101 0001000000"
PAPERS_TIMESTEPS = tuple(float(t) for t in range(951, 0, -50))
DEEP_CALL = 0.15  # of a full call's time: a call that reuses the deep features of branch 0 (docs/measured.md)


def none(calls: int, sites: Iterable[Site]) -> ReusePlan:
    """Reuse nothing: the full sampler."""
    return _stepwise(calls, sites, ())


def hurry(calls: int, sites: Iterable[Site], *, k: int | None = None) -> ReusePlan:
    """HURRY: the last k calls reuse. Where an error grows over the calls that follow it, late reuse distorts least.

    That holds on the paper's models and not on every model: compare it with `interval` on yours.
    Source: arXiv 2401.01008 eq. 4.
    """
    k = _reuse_count(calls, k)
    return _stepwise(calls, sites, range(calls - k, calls))


def phast(
    calls: int,
    sites: Iterable[Site],
    *,
    plans: Iterable[Searched] | None = None,
    k: int | None = None,
    order: int | None = None,
    latency: float | None = None,
    sampler: str = "ddim",
    model: str = "",
    spacing: str = "",
    timesteps: Sequence[float] = (),
) -> ReusePlan:
    """PHAST: one of the plans that searches have found.

    Of sites of several kinds, the plan chooses which reuse: it is the one closest to the full sampler on unseen prompts
    among those searched for this very run that take at most `latency` of its time (`LATENCY` unless given). Of sites of
    one kind without a latency, as in the paper, it is the one searched for what is most like this run, fitted to it.
    For maps of Stable Diffusion 1.x, 2.x and XL it is the paper's own, unless one was searched for this very model.

    plans: `minireuse.search.plans_of` reads those of a model. k, order: of the plan; None is any where the plan chooses
    the sites, else half of the calls and 0. sampler, model, spacing, timesteps: of this run (`Pipeline.fingerprint`,
    `Schedule.spacing`, `Pipeline.call_timesteps`); a plan is fitted by timestep where its own are known, too.
    A warning says what was chosen where that does not follow from the arguments alone.
    Raises: PlanError without plans.
    """
    sites, plans = tuple(sites), list(plans or ())
    k = None if k is None else _reuse_count(calls, k)
    if latency is not None or len({site.kind for site in sites}) > 1:
        latency = LATENCY if latency is None else latency
        able = [p for p in plans if p.is_for(calls, sampler, model, spacing) and set(p.plan.sites) <= set(sites)]
        able = [p for p in able if k in (None, p.plan.reused) and order in (None, p.plan.order)]
        return _closest_within(latency, able, calls, sites)
    k, order = _reuse_count(calls, k), order or 0
    advice = "`python -m minireuse.search` searches one for this setting"
    papers = papers_plan(sites)
    own = [p for p in plans if p.model == model and p.plan.grid is not None and _kinds(p.plan.sites) == _kinds(sites)]
    if papers is not None and not own:
        warnings.warn(
            f"phast uses the paper's plan, searched for Stable Diffusion 1.5 and {papers}, fitted to this run's "
            f"timesteps; {advice} and this model",
            stacklevel=2,
        )
        return ReusePlan.stepwise(fit(papers.row, calls, k, papers.timesteps, timesteps), sites, order)
    if not plans:
        raise PlanError(
            "phast needs searched plans; search one with `python -m minireuse.search`, "
            "or read them with minireuse.search.plans_of"
        )
    found = nearest(plans, calls, sites, k, sampler, model, order, spacing)
    if found is None:
        warnings.warn(f"no searched plan covers these sites, so phast uses hurry; {advice}", stacklevel=2)
        return replace(hurry(calls, sites, k=k), order=order)
    plan, exact = found
    if not exact:
        others = ["another model"] * (plan.model != model) + ["other sites"] * (set(plan.plan.sites) != set(sites))
        others += [f"spacing {plan.spacing}"] * plan.is_spaced_otherwise(spacing)
        for_what = f"with {' and '.join(others)} " * bool(others) + f"for {plan}"
        note = f"there is no plan for this run ({describe(sampler, calls, k, order)})"
        warnings.warn(f"{note}; phast uses one searched {for_what}, scaled to this run; {advice}", stacklevel=2)
    return ReusePlan.stepwise(fit(plan.row, calls, k, plan.timesteps, timesteps), sites, order)


def _closest_within(latency: float, plans: Iterable[Searched], calls: int, sites: Sequence[Site]) -> ReusePlan:
    """Of the plans that take at most `latency`, the closest on unseen prompts; else an even one of deep features.

    Nothing is timed here: a plan counts with the time that was measured when it was searched.
    """
    if not 0 < latency < 1:
        raise PlanError(f"latency is {latency}, expected a share of the full sampler's time, such as 0.6")
    known = [(p.unseen, p.latency, p) for p in plans if p.unseen is not None and p.latency is not None]
    fast = [(unseen, took, p) for unseen, took, p in known if took <= latency]
    if fast:
        unseen, took, found = max(fast, key=lambda each: each[0])
        used = {s for s, column in zip(found.plan.sites, found.plan.mask.T, strict=True) if column.any()}
        what = " and ".join(sorted({KIND_NAMES[site.kind] for site in used}))
        how = f"{what}{', extrapolated' * (found.plan.order > 0)}, in {found.plan.reused} of {calls} calls"
        note = f"phast reuses {how}: {took:.2f} of the full sampler's time, {unseen:.1f} dB on unseen prompts"
        warnings.warn(note, stacklevel=3)
        return found.plan
    search = f"python -m minireuse.search --kind depth --order 1 --budget-latency {latency:g} --out plan.json"
    none_found = f"no plan searched for this run is known to take at most {latency:g} of the full sampler's time"
    if not any(site.kind == "deep" for site in sites):
        raise PlanError(f"{none_found}; search one with `{search}`, or leave out the kind of site")
    k = min(calls - 1, math.ceil(calls * (1 - latency) / (1 - DEEP_CALL)))
    warnings.warn(
        f"{none_found}, so phast reuses deep features, extrapolated, in {k} of {calls} calls, evenly; "
        f"`{search}` searches a better plan",
        stacklevel=3,
    )
    return replace(interval(calls, select(sites, kind="deep"), k=k), order=1)


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


def cfg_interval(calls: int, sites: Iterable[Site], *, start: float = 0.2, end: float = 0.8) -> ReusePlan:
    """Guidance inside an interval of the run alone (arXiv 2404.07724): the other calls compute no unconditional half.

    start, end: shares of the calls. Nothing is reused; joined with another policy by `|`, its reuse goes on, and the
    first guided call after unguided ones computes everything.
    """
    if not 0 <= start <= end <= 1:
        raise PlanError(f"the interval is {start} to {end}, expected 0 <= start <= end <= 1")
    guided = tuple(start * calls <= call < end * calls for call in range(calls))
    return ReusePlan(np.zeros((calls, 0), dtype=bool), (), guided)


STEPWISE: dict[str, Policy] = {f.__name__: f for f in (none, hurry, phast, early, interval, random)}
# These choose among all sites, or reuse none.
RELATIVES: dict[str, Policy] = {f.__name__: f for f in (deepcache, tgate, pab, cfg_interval)}
POLICIES: dict[str, Policy] = STEPWISE | RELATIVES


def select(sites: Iterable[Site], which: str = "both", kind: str = "map", branch: int = 0) -> tuple[Site, ...]:
    """The sites of one kind, in self attention, cross attention or both; of `deep` the one number `branch`.

    Branch 0 skips most: only the first and the last layer of the U-Net still run (DeepCache, arXiv 2312.00858). Each
    further branch computes more layers, saves less time and comes closer to the full sampler.
    Raises: PlanError where there is no such site.
    """
    wanted = {"self": (False,), "cross": (True,), "both": (False, True)}
    if which not in wanted:
        raise PlanError(f"sites is {which!r}, expected self, cross or both")
    if kind not in KINDS:
        raise PlanError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if kind in ("deep", "eps") and which != "both":
        raise PlanError(f"{KIND_NAMES[kind]} belong to no attention layer; leave out sites={which}")
    if branch and kind != "deep":
        raise PlanError(f"branch numbers the deep features, but kind is {kind!r}; ask for kind deep, or no branch")
    chosen = [s for s in sites if s.kind == kind and (which == "both" or s.is_cross in wanted[which])]
    if kind == "deep" and chosen:
        branches = sorted(chosen, key=lambda s: s.depth)
        _require_whole("branch", branch, 0, len(branches) - 1)
        return (branches[branch],)
    if not chosen:
        raise PlanError(f"none of the sites given is of kind {kind!r} in {which} attention; pass pipe.sites")
    return tuple(chosen)


# --- plans that were searched ----------------------------------------------------------------------------------------


def nearest(
    plans: Iterable[Searched],
    calls: int,
    sites: Iterable[Site],
    k: int,
    sampler: str,
    model: str,
    order: int = 0,
    spacing: str = "",
) -> tuple[Searched, bool] | None:
    """The plan searched for what is most like this run, and whether it was searched for just this run.

    A plan of the same model counts most, then one of the same sampler, order, sites, number of calls, share of reuse.
    None where no step-wise plan reuses sites of this kind: a good place for a map is a poor one for deep features.
    """
    sites = set(sites)

    def distance(p: Searched) -> tuple[float, ...]:
        return (
            p.model != model,
            p.sampler != sampler,
            p.is_spaced_otherwise(spacing),
            p.plan.order != order,
            set(p.plan.sites) != sites,
            abs(math.log(p.plan.calls / calls)),
            abs(p.plan.reused / p.plan.calls - k / calls),
        )

    known = [p for p in plans if _kinds(p.plan.sites) == _kinds(sites) and p.plan.grid is not None]
    best = min(known, key=distance, default=None)
    return None if best is None else (best, not any(distance(best)))


def papers_plan(sites: Iterable[Site]) -> Searched | None:
    """The paper's plan over the maps of a U-Net laid out as Stable Diffusion 1.x, 2.x or XL; None for others."""
    sites = tuple(sites)
    blocks = {site.address.partition(".transformer_blocks.")[0] for site in sites}
    if _kinds(sites) != {"map"} or blocks not in (_transformers((0, 1, 2), (1, 2, 3)), _transformers((1, 2), (0, 1))):
        return None
    reuse = [digit == "0" for digit in PAPERS_PLAN.replace(" ", "")]
    return Searched(ReusePlan.stepwise(reuse, sites), "", "ddim", "leading", timesteps=PAPERS_TIMESTEPS)


def _transformers(down: Iterable[int], up: Iterable[int]) -> set[str]:
    """The places of transformers in a U-Net of Stable Diffusion's, from the levels that have them."""
    places = [*((f"down_blocks.{level}", 2) for level in down), *((f"up_blocks.{level}", 3) for level in up)]
    return {f"{block}.attentions.{i}" for block, count in (*places, ("mid_block", 1)) for i in range(count)}


def _kinds(sites: Iterable[Site]) -> set[str]:
    return {site.kind for site in sites}


def fit(
    row: Sequence[bool], calls: int, k: int, row_timesteps: Sequence[float] = (), timesteps: Sequence[float] = ()
) -> np.ndarray:
    """A plan with k reuse calls out of `calls` whose reuse lies where it does in `row`.

    Where the timesteps of both are known, each call does what `row` does at the nearest one, and where that gives
    another number of reuse calls they are spread over the same calls. Else they lie at the same share of the calls.
    Shapes: row and row_timesteps (S',), timesteps (calls,) -> (calls,). A run that is the same gives the row itself.
    """
    if len(row_timesteps) and len(timesteps):
        row = _by_timestep(row, row_timesteps, timesteps)
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


def _by_timestep(row: Sequence[bool], row_timesteps: Sequence[float], timesteps: Sequence[float]) -> list[bool]:
    """What `row` does at the timesteps nearest to those of another run, whose first call computes."""
    nearest_calls = np.abs(np.subtract.outer(np.array(timesteps), np.array(row_timesteps))).argmin(axis=1)
    return [False, *(row[call] for call in nearest_calls[1:])]


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

"""What can be reused, and when: sites and plans, without a model and without the tensors.

The paper's idea (arXiv 2401.01008) is a binary vector over a sampler's calls of the U-Net: at each call the attention
maps are computed, or the maps computed last are used again. Here a plan is a boolean matrix with such a vector as the
column of each reusable tensor; `ReusePlan.stepwise` repeats one vector for all of them, as the paper does. What follows
for one call is a `StepPlan`: what is reused, what is stored because a later call reads it, and what is read for the
last time. `values_of` and `ReusePlan._steps` derive it. cache.py and attention.py carry it out.

Three things go beyond the paper, each in a place of its own: tensors other than maps (`Site.skips`), guidance that ends
before the run does (`ReusePlan._across_guidance`), and extrapolation (`ReusePlan._extrapolated`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from minireuse.files import parse_json, shown

KINDS = ("map", "out", "deep", "eps")
ORDERS = (0, 1, 2)


class PlanError(ValueError):
    """A plan that makes no sense, or does not fit the run it is used for."""


@dataclass(frozen=True, order=True)
class Site:
    """One reusable tensor of the U-Net: the path of a module, and which of its tensors.

    Kinds: `map` is the probabilities after the softmax, `out` the attention's output before the residual, `deep` the
    feature that enters this layer of the up path: where it is reused, nothing deeper in the U-Net runs. `eps` is the
    guided prediction itself: where it is reused, the U-Net does not run at all.
    """

    address: str
    kind: str
    depth: int = field(default=0, compare=False)  # layers between it and the nearer end of the U-Net

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"site kind is {shown(self.kind)}, expected one of {', '.join(KINDS)}")
        if len(self.address) > 200:
            raise PlanError(f"site address is {shown(self.address)}, expected the path of a module")

    @property
    def is_cross(self) -> bool:
        """Whether it belongs to cross attention (diffusers' `attn2`) rather than self attention (`attn1`)."""
        return self.address.endswith("attn2")

    def skips(self, other: Site) -> bool:
        """Whether reusing this site means that the other one is neither computed nor read."""
        if self.kind == "eps":
            return other != self
        if self.kind == "deep":
            return other.depth > self.depth
        return self.kind == "out" and other.kind == "map" and other.address == self.address


PREDICTION = Site("unet", "eps")


@dataclass(frozen=True)
class StepPlan:
    """What one U-Net call does: the sites it reuses, those it stores, and those it reads for the last time.

    A step here is one call of the U-Net, not a step of a solver, which may make several.
    call: its number. explicit: write every attention map out even where it is not stored (the unfused baseline).

    Where guidance ends: guided is False if only the conditional half is computed; half are the sites it reuses that a
    guided call stored while this one is unguided.
    Extrapolation: keep has (site, n) for each site it stores of which n values before stay beside the new one. weights
    has (site, (w_1, ..., w_n)) for each site that is reused as now + w_1 (v_1 - now) + ... + w_n (v_n - now), where v_1
    is the value before now, and v_2 the one before that.
    """

    reuse: frozenset[Site] = frozenset()
    store: frozenset[Site] = frozenset()
    last: frozenset[Site] = frozenset()
    call: int = 0
    explicit: bool = False
    guided: bool = True
    half: frozenset[Site] = frozenset()
    keep: frozenset[tuple[Site, int]] = frozenset()
    weights: frozenset[tuple[Site, tuple[float, ...]]] = frozenset()

    @property
    def inside(self) -> StepPlan:
        """What of this the U-Net itself does: all but keeping its prediction, which the denoiser around it does."""
        keep = frozenset((site, n) for site, n in self.keep if site != PREDICTION)
        return replace(self, store=self.store - {PREDICTION}, keep=keep)


PLAIN = StepPlan()  # an ordinary U-Net call


class Value(NamedTuple):
    """What a site computed at one call, and the calls that read it."""

    call: int
    readers: tuple[int, ...]


def values_of(read: np.ndarray, computed: np.ndarray) -> list[Value]:
    """Every value that a site computes, with the calls that read it: those until it is computed anew.

        call      0 1 2 3 4 5
        mask      . # # . . #

    The site computes at calls 0, 3 and 4. Value 0 is read by calls 1 and 2, value 3 by no call, value 4 by call 5. So
    call 0 stores, calls 1 and 2 reuse, and 2 is the last to read it; call 3 stores nothing; call 4 stores, and 5 reuses
    and is the last to read it.

    Shapes: read and computed (calls,), boolean, never both.
    """
    made = np.flatnonzero(computed).tolist()
    ends = [*made[1:], len(read)]
    return [Value(a, tuple(r for r in range(a + 1, b) if read[r])) for a, b in zip(made, ends, strict=True)]


class _Draft:
    """A `StepPlan` in the making."""

    def __init__(self) -> None:
        self.reuse, self.store, self.last = set[Site](), set[Site](), set[Site]()
        self.half, self.keep, self.weights = set[Site](), dict[Site, int](), dict[Site, tuple[float, ...]]()

    def finish(self, call: int, guided: bool) -> StepPlan:
        return StepPlan(
            reuse=frozenset(self.reuse),
            store=frozenset(self.store),
            last=frozenset(self.last),
            call=call,
            guided=guided,
            half=frozenset(self.half),
            keep=frozenset(self.keep.items()),
            weights=frozenset(self.weights.items()),
        )


@dataclass(frozen=True, eq=False)
class ReusePlan:
    """Which sites reuse at which calls: a boolean matrix, True = use again what this site last computed.

    order: 0 uses the value as it was; 1 goes on along the line through the last two values (as TaylorSeer does, arXiv
    2503.06923), 2 along the parabola through the last three. Where the site has fewer values, or fewer since guidance
    ended, the curve goes through those: the first one is used as it was.
    positions: of the calls on the axis of these curves, the numbers of the calls unless given.

    Shapes: mask (S, L), read-only; guided (S,), all True unless given; positions (S,).
    Raises: PlanError for a mask of another shape, a reuse in call 0, a repeated site or position, or another order; at
    its first `step`, for a guided call that reuses what an unguided one computed.
    """

    mask: np.ndarray
    sites: tuple[Site, ...]
    guided: tuple[bool, ...] = field(default=())
    order: int = 0
    positions: tuple[float, ...] = field(default=())

    def __post_init__(self) -> None:
        mask = np.array(self.mask, dtype=bool)  # a copy: the plan's matrix must not change under it
        sites = tuple(self.sites)
        if mask.ndim != 2 or mask.shape[0] < 1 or mask.shape[1] != len(sites):
            raise PlanError(f"plan mask has shape {mask.shape}, expected (calls, sites) with {len(sites)} sites")
        if mask[0].any():
            raise PlanError("plan reuses in call 0, where nothing has been computed yet; row 0 must be all False")
        if len(set(sites)) != len(sites):
            raise PlanError("plan names a site twice; each site may have one column")
        if type(self.order) is not int or self.order not in ORDERS:
            known = "0 (use the last value), or 1 or 2 (extrapolate from the last two or three)"
            raise PlanError(f"plan order is {shown(self.order)}, expected {known}")
        guided = tuple(bool(g) for g in self.guided) or (True,) * len(mask)
        if len(guided) != len(mask):
            raise PlanError(f"plan says for {len(guided)} calls whether they are guided, expected {len(mask)}")
        positions = tuple(self.positions) or tuple(range(len(mask)))
        if not all(map(_is_number, positions)) or not len(positions) == len(set(positions)) == len(mask):
            raise PlanError(f"plan positions are {shown(positions)}, expected {len(mask)} different numbers")
        mask.setflags(write=False)
        for name, value in (("mask", mask), ("sites", sites), ("guided", guided), ("positions", positions)):
            object.__setattr__(self, name, value)

    @classmethod
    def stepwise(cls, reuse: Sequence[bool] | np.ndarray, sites: Iterable[Site], order: int = 0) -> ReusePlan:
        """The paper's kind of plan: at each call all sites reuse, or none."""
        sites = tuple(sites)
        return cls(np.repeat(np.array(reuse, dtype=bool)[:, None], len(sites), axis=1), sites, order=order)

    @classmethod
    def nothing(cls, calls: int) -> ReusePlan:
        """The full sampler: no site, no reuse."""
        return cls(np.zeros((calls, 0), dtype=bool), ())

    @property
    def calls(self) -> int:
        """The number of U-Net calls, S."""
        return len(self.mask)

    @property
    def reused(self) -> int:
        """The number of calls in which at least one site reuses."""
        return int(self.mask.any(axis=1).sum())

    @cached_property
    def _uses(self) -> tuple[np.ndarray, np.ndarray]:
        """Per call and site: is the cached tensor read, and is it computed? Neither where another reuse skips it."""
        free = np.ones_like(self.mask)
        for upper, column in zip(self.sites, self.mask.T, strict=True):
            if column.any():
                for i, lower in enumerate(self.sites):
                    if upper.skips(lower):
                        free[:, i] &= ~column
        return self.mask & free, ~self.mask & free

    @cached_property
    def _steps(self) -> tuple[StepPlan, ...]:
        steps = [_Draft() for _ in range(self.calls)]
        for site, read, computed in zip(self.sites, *(uses.T for uses in self._uses), strict=True):
            values = values_of(read, computed)
            for call, readers in values:
                if readers:
                    steps[call].store.add(site)
                    steps[readers[-1]].last.add(site)
                for reader in readers:
                    steps[reader].reuse.add(site)
            self._across_guidance(site, values, steps)
            if self.order:
                self._extrapolated(site, values, steps)
        return tuple(step.finish(call, self.guided[call]) for call, step in enumerate(steps))

    def _across_guidance(self, site: Site, values: Sequence[Value], steps: Sequence[_Draft]) -> None:
        """Where guidance ends, calls that compute the conditional half alone read a value of both halves."""
        for call, readers in values:
            for reader in readers:
                if self.guided[call] and not self.guided[reader]:
                    steps[reader].half.add(site)
                if self.guided[reader] and not self.guided[call]:
                    where = f"{site.kind} of {site.address}"
                    raise PlanError(f"the plan reuses {where} of unguided call {call} in a guided one")

    def _extrapolated(self, site: Site, values: Sequence[Value], steps: Sequence[_Draft]) -> None:
        """Who reads a value also reads up to `order` of those before it, which are stored and stay for that."""
        first = 0  # of the values that may be read together: a curve does not go across the end of guidance
        for i, now in enumerate(values):
            if self.guided[now.call] != self.guided[values[first].call]:
                first = i
            through = values[max(first, i - self.order) : i + 1]  # the curve goes through these
            if not now.readers or len(through) == 1:
                continue
            for n, value in enumerate(through):  # n of them come before it
                draft = steps[value.call]
                draft.store.add(site)
                if n:
                    draft.keep[site] = max(n, draft.keep.get(site, 0))
            for value in through[:-1]:
                for reader in value.readers[-1:]:
                    steps[reader].last.discard(site)
            nodes = [self.positions[value.call] for value in through]
            for reader in now.readers:
                *before, _ = lagrange(self.positions[reader], nodes)
                steps[reader].weights[site] = tuple(reversed(before))

    def step(self, call: int) -> StepPlan:
        """What to do at one call. A site stores only if a later call reads that value."""
        return self._steps[call]

    def on(self, sites: Iterable[Site]) -> ReusePlan:
        """The same plan over a model's own sites. Raises: PlanError where the model lacks a site."""
        own = {site: site for site in sites}
        if unknown := [s for s in self.sites if s not in own]:
            first = f"{unknown[0].kind} of {unknown[0].address} and {len(unknown) - 1} more sites"
            raise PlanError(f"the plan names {first} that this model lacks; build the plan from this model's sites")
        return replace(self, sites=tuple(own[s] for s in self.sites))

    def check_calls(self, calls: int, sampler: str) -> None:
        """Raises: PlanError where the plan was made for another number of calls than the sampler makes."""
        if self.calls != calls:
            advice = "build it for that number of calls; some samplers make more calls than steps"
            raise PlanError(f"the plan is for {self.calls} U-Net calls but sampler {sampler} makes {calls}; {advice}")

    @property
    def grid(self) -> str | None:
        """One '.' (compute) or '#' (reuse) per call where all sites agree, else None."""
        reused = np.any(self.mask, axis=1)
        return _draw(reused) if (reused == self.mask.T).all() else None

    def __str__(self) -> str:
        rows = [f"{_draw(c)} {s.kind:4} {s.address}" for c, s in zip(self.mask.T, self.sites, strict=True)]
        if self.grid is not None and all(self.guided):
            rows = [self.grid]
        elif not all(self.guided):
            rows.append(f"{_draw(np.array(self.guided))} guided")
        if self.order:
            rows.append(
                f"extrapolated from the last {'two' if self.order == 1 else 'three'} values (order {self.order})"
            )
        return "\n".join(rows)

    def _key(self) -> tuple[Any, ...]:
        columns = {s: c.tobytes() for s, c in zip(self.sites, self.mask.T, strict=True) if c.any()}
        curve = (self.order, self.positions) if columns and self.order else ()
        return self.calls, frozenset(columns.items()), self.guided, curve

    def __eq__(self, other: object) -> bool:
        """Equal plans do the same: columns without reuse and the order of sites do not count."""
        return self._key() == other._key() if isinstance(other, ReusePlan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __or__(self, other: ReusePlan) -> ReusePlan:
        """Reuse wherever either plan does; a call is guided only if it is in both, and where guidance begins again it
        reuses nothing. Raises: PlanError."""
        if self.calls != other.calls:
            raise PlanError(f"plans of {self.calls} and {other.calls} calls cannot be combined; make them equally long")
        reusing = [plan for plan in (self, other) if plan.mask.any()]
        orders = sorted({plan.order for plan in reusing})
        if len(orders) > 1:
            raise PlanError("plans of order {} and {} cannot be combined; give both the same order".format(*orders))
        curve = (reusing or [self])[0]
        if any(plan.positions != curve.positions for plan in reusing):
            raise PlanError("plans of other positions cannot be combined; give both the same")
        columns: dict[Site, np.ndarray] = {}
        for plan in (self, other):
            for site, column in zip(plan.sites, plan.mask.T, strict=True):
                columns[site] = columns.get(site, np.zeros(self.calls, dtype=bool)) | column
        guided = tuple(a and b for a, b in zip(self.guided, other.guided, strict=True))
        mask = np.array(list(columns.values()), dtype=bool).reshape(len(columns), self.calls).T
        # What unguided calls computed lacks the unconditional half, so the first guided call after them reuses nothing.
        begins = [call for call in range(1, self.calls) if guided[call] and not guided[call - 1]]
        mask[begins] = False
        return ReusePlan(mask, tuple(columns), guided, curve.order if reusing else 0, curve.positions)

    def to_json(self) -> str:
        """Readable JSON: a string of '.' and '#' per site, under its kind and address, and how deep each site lies."""
        drawn: dict[str, dict[str, str]] = {}
        for site, column in zip(self.sites, self.mask.T, strict=True):
            drawn.setdefault(site.kind, {})[site.address] = _draw(column)
        data: dict[str, Any] = {"format": "minireuse-plan", "calls": self.calls}
        data |= {"order": self.order} if self.order else {}
        data |= {"positions": self.positions} if self.positions != tuple(range(self.calls)) else {}
        depths = {site.address: site.depth for site in self.sites}
        return json.dumps(data | {"guided": _draw(np.array(self.guided)), "sites": drawn, "depths": depths}, indent=2)

    @classmethod
    def from_json(cls, text: str, sites: Iterable[Site] = ()) -> ReusePlan:
        """The inverse of `to_json`. Raises: PlanError naming the field that is wrong.

        sites: of the model, which know how deep they lie: files written before version 0.2 do not say it.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise PlanError(f"plan is not JSON ({error}); expected what ReusePlan.to_json writes") from None
        if not isinstance(data, Mapping) or data.get("format") != "minireuse-plan":
            raise PlanError('plan has no "format": "minireuse-plan"; expected what ReusePlan.to_json writes')
        known = {"format", "calls", "order", "positions", "timesteps", "guided", "sites", "depths", "about"}
        if unknown := set(data) - known:
            raise PlanError(f"plan has the unknown field {shown(min(unknown))}; expected what ReusePlan.to_json writes")
        calls, drawn = data.get("calls"), data.get("sites")
        if not isinstance(calls, int) or isinstance(calls, bool) or not 1 <= calls <= 100_000:
            raise PlanError(f"plan field calls is {shown(calls)}, expected a whole number from 1 to 100000")
        if not isinstance(drawn, Mapping) or not all(isinstance(v, Mapping) for v in drawn.values()):
            raise PlanError("plan field sites must be an object of kinds, each an object of addresses")
        depths = {site.address: site.depth for site in sites} | _parse_depths(data.get("depths", {}))
        columns = {
            Site(address, kind, depths.get(address, 0)): _parse(grid, calls, address)
            for kind, group in drawn.items()
            for address, grid in group.items()
        }
        unknown_depth = [site for site in columns if site.address not in depths]
        if unknown_depth and len(columns) > 1 and any(site.kind == "deep" for site in columns):
            where = shown(unknown_depth[0].address)
            raise PlanError(f"plan field depths does not say how deep {where} lies; read it with the model's sites")
        guided = _parse(data.get("guided", "#" * calls), calls, "guided")
        mask = np.array(list(columns.values()), dtype=bool).reshape(len(columns), calls).T
        positions = data.get("positions", list(range(calls)))
        if not isinstance(positions, list) or not positions:
            raise PlanError(f"plan field positions is {shown(positions)}, expected a list of {calls} different numbers")
        return cls(mask, tuple(columns), tuple(bool(g) for g in guided), data.get("order", 0), tuple(positions))


def lagrange(x: float, nodes: Sequence[float]) -> tuple[float, ...]:
    """What the value at each node counts, at x, in the polynomial through the values at all of them."""
    return tuple(math.prod((x - other) / (node - other) for other in nodes if other != node) for node in nodes)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _draw(row: np.ndarray) -> str:
    return "".join(".#"[int(cell)] for cell in row)


def _parse_depths(depths: Any) -> dict[str, int]:
    if not isinstance(depths, Mapping) or not all(type(d) is int and 0 <= d <= 100_000 for d in depths.values()):
        raise PlanError(f"plan field depths is {shown(depths)}, expected an object of addresses and whole numbers")
    return dict(depths)


def _parse(drawn: Any, calls: int, where: str) -> np.ndarray:
    if not isinstance(drawn, str) or len(drawn) != calls or set(drawn) - {".", "#"}:
        raise PlanError(f"plan entry {shown(where)} is {shown(drawn)}, expected {calls} characters '.' or '#'")
    return np.array([c == "#" for c in drawn])

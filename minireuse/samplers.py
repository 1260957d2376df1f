"""Samplers as generators over any `denoise(x, t, call)`: no model, no global state, torch alone.

    for call, t, x, x_0 in dpmpp_2m(denoise, x_T, schedule, schedule.timesteps(20)):
        ...

All of them rest on one fact. Along a trajectory x = alpha x_0 + sigma eps holds for the model's current estimates of
x_0 and eps, so that alpha' x_0 + sigma' eps is a step that is exact if the two stay constant. That is DDIM. The other
solvers add a correction for how x_0 (DPM-Solver++) or eps (DPM-Solver, PLMS) changes over the step in lambda, which is
log(alpha / sigma). What tells them apart is where they look for that change: at earlier calls, or at nodes in between.

`schedule` is any trajectory (`minireuse.schedule.Trajectory`): the `Schedule` of a variance-preserving model, `Flow`,
`EDM`, or one of your own. No solver assumes alpha^2 + sigma^2 = 1, or fails where alpha or sigma is 0. The caller
scales x_T: unit noise for a `Schedule` and for `Flow`, sigma_max times that for `EDM`.

Coefficients are Python floats in double precision. Tensors keep the dtype and device of `x_T`, and nothing waits for
the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from minireuse.schedule import Point, Schedule, Trajectory


class Prediction(NamedTuple):
    """What a model's answer says of x = alpha x_0 + sigma eps, both parts of it. Shapes: those of x."""

    x_0: Tensor
    eps: Tensor


Answer = Tensor | Prediction
Denoise = Callable[[Tensor, float, int], Answer]  # (x, t, call) -> eps, or both; t may lie between two timesteps
Noise = Callable[[Tensor], Tensor]  # standard normal noise of its argument's shape


class Step(NamedTuple):
    """One solver step, as yielded by every sampler; `timesteps` of length n give n of them."""

    call: int  # the last model call made so far, counted from 0
    t: float  # the timestep just left
    x: Tensor  # the latents after the step
    x_0: Tensor  # the clean latents, as that call estimates them


# (denoise, x_T, schedule, timesteps, *, end=None, noise=None[, eta]): timesteps lead to `end`, which is where the
# trajectory ends unless given; noise None is torch.randn_like.
Sampler = Callable[..., Iterator[Step]]


# --- what models predict ----------------------------------------------------------------------------------------------
# A solver takes a callable that returns eps, or one made here. At alpha = 0 no x_0 follows from eps, so a model that is
# asked there has to be one of these.

Model = Callable[[Tensor, float, int], Tensor]


def from_v(model: Model, schedule: Trajectory) -> Denoise:
    """Of a model that returns v = alpha eps - sigma x_0 (arXiv 2202.00512 appendix D), where alpha^2 + sigma^2 = 1."""

    def denoise(x: Tensor, t: float, call: int) -> Prediction:
        at, v = schedule.at(t), model(x, t, call)
        return Prediction(at.alpha * x - at.sigma * v, at.alpha * v + at.sigma * x)

    return denoise


def from_x0(model: Model, schedule: Trajectory) -> Denoise:
    """Of a model that returns x_0. Where sigma is 0 nothing follows for eps, which no step needs there: it is 0."""

    def denoise(x: Tensor, t: float, call: int) -> Prediction:
        at, x_0 = schedule.at(t), model(x, t, call)
        return Prediction(x_0, (x - at.alpha * x_0) / at.sigma if at.sigma else torch.zeros_like(x))

    return denoise


def from_velocity(model: Model, schedule: Trajectory) -> Denoise:
    """Of a rectified-flow model that returns eps - x_0 along x = (1 - t) x_0 + t eps (arXiv 2209.03003)."""

    def denoise(x: Tensor, t: float, call: int) -> Prediction:
        at, velocity = schedule.at(t), model(x, t, call)
        return Prediction(x - at.sigma * velocity, x + at.alpha * velocity)

    return denoise


def from_sigma_denoiser(model: Callable[[Tensor, Tensor], Tensor], schedule: Trajectory) -> Denoise:
    """Of k-diffusion's models, (x, sigma) -> x_0, in variables where alpha is 1: of x / alpha and sigma / alpha.

    Shapes: the model is given sigma as (B,).
    Source: crowsonkb/k-diffusion `k_diffusion/external.py`.
    """

    def denoise(x: Tensor, t: float, call: int) -> Prediction:
        at = schedule.at(t)
        sigma = x.new_full((len(x),), at.sigma / at.alpha)
        x_0 = model(x / at.alpha, sigma)
        return Prediction(x_0, (x - at.alpha * x_0) / at.sigma if at.sigma else torch.zeros_like(x))

    return denoise


def guided(conditional: Denoise, unconditional: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance of any two callables (arXiv 2207.12598); scale 1 is the conditional one alone."""

    def between(a: Tensor, b: Tensor) -> Tensor:
        return a + scale * (b - a)

    def denoise(x: Tensor, t: float, call: int) -> Answer:
        if scale == 1:
            return conditional(x, t, call)
        free, bound = unconditional(x, t, call), conditional(x, t, call)
        if isinstance(free, Prediction) and isinstance(bound, Prediction):
            return Prediction(between(free.x_0, bound.x_0), between(free.eps, bound.eps))
        if isinstance(free, Prediction) or isinstance(bound, Prediction):
            raise ValueError("one of the two callables returns eps, the other a Prediction; give two of the same kind")
        return between(free, bound)

    return denoise


# --- what all solvers share -------------------------------------------------------------------------------------------


class _Caller:
    """Numbers the calls of one trajectory, and gives each answer as both x_0 and eps."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.call = denoise, -1

    def __call__(self, x: Tensor, at: Point) -> Prediction:
        self.call += 1
        answer = self.denoise(x, at.t, self.call)
        if isinstance(answer, Prediction):
            return answer
        if at.alpha == 0:
            raise ValueError(
                f"alpha is 0 at t = {at.t}, so no x_0 follows from eps; use from_v, from_velocity or from_x0"
            )
        return Prediction((x - at.sigma * answer) / at.alpha, answer)


def _intervals(schedule: Trajectory, timesteps: Sequence[float], end: float | None) -> Iterator[tuple[Point, Point]]:
    """The trajectory as pairs (now, then); the last one leads from timesteps[-1] to the end."""
    whole = [*timesteps, schedule.end if end is None else end]
    falls = all(a > b for a, b in pairwise(whole))
    if len(timesteps) == 0 or not (falls or all(a < b for a, b in pairwise(whole))):
        way = "fall strictly, or rise strictly, to where they end"
        raise ValueError(
            f"timesteps are {list(timesteps)} and end at {whole[-1]}, expected to {way}: leave out the end"
        )
    return pairwise(schedule.at(t) for t in whole)


def _step(p: Prediction, then: Point) -> Tensor:
    """The first-order step: x_0 and eps stay as they are (DDIM, and DPM-Solver-1: arXiv 2206.00927 eq. 3.7)."""
    return then.alpha * p.x_0 + then.sigma * p.eps


def _step_x_0(p: Prediction, now: Point, then: Point, change: Tensor | None) -> Tensor:
    """The step of DPM-Solver++ (arXiv 2211.01095): x_0 + change stays as it is."""
    x = _step(p, then)
    return x if change is None else x - then.alpha * math.expm1(now.lambda_ - then.lambda_) * change


def _step_eps(p: Prediction, now: Point, then: Point, change: Tensor | None) -> Tensor:
    """The step of DPM-Solver and PLMS: eps + change stays as it is. now.alpha is not 0."""
    x = _step(p, then)
    return x if change is None else x + (then.sigma - then.alpha * math.exp(-now.lambda_)) * change


def _add_noise(x: Tensor, scale: float, noise: Noise | None) -> Tensor:
    return x if scale == 0 else x + scale * (noise or torch.randn_like)(x)


# --- first order: one call per step -----------------------------------------------------------------------------------


def ddim(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Trajectory,
    timesteps: Sequence[float],
    *,
    end: float | None = None,
    noise: Noise | None = None,
    eta: float = 0.0,
) -> Iterator[Step]:
    """DDIM: deterministic with eta 0, ancestral sampling as in DDPM with eta 1.

    Along rising timesteps and with eta 0 it is DDIM inversion.
    Source: arXiv 2010.02502 eq. 12 and 16, with the fresh noise written for any trajectory.
    """
    x, model = x_T, _Caller(denoise)
    for now, then in _intervals(schedule, timesteps, end):
        x_0, eps = p = model(x, now)
        fresh = eta * then.sigma * math.sqrt(max(0.0, -math.expm1(2 * (now.lambda_ - then.lambda_)))) if eta else 0.0
        fresh = min(fresh, then.sigma)  # there is no more noise than that to renew, however large eta
        x = then.alpha * x_0 + math.sqrt(then.sigma**2 - fresh**2) * eps if fresh else _step(p, then)
        x = _add_noise(x, fresh, noise)
        yield Step(model.call, now.t, x, x_0)


# Euler's method on d(x / alpha) / d(sigma / alpha) = eps is exactly DDIM's step (arXiv 2206.00364 eq. 1). The ancestral
# one goes down to sigma_down and adds noise of sigma_up: times alpha_then, that is DDIM's eq. 16 with eta 1
# (crowsonkb/k-diffusion `k_diffusion/sampling.py`, get_ancestral_step).
euler: Sampler = ddim
euler_a: Sampler = partial(ddim, eta=1.0)


# --- multistep: one call per step, and the answers of earlier ones ----------------------------------------------------


def plms(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Trajectory,
    timesteps: Sequence[float],
    *,
    end: float | None = None,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """Pseudo linear multistep: Adams-Bashforth weights on eps, in DDIM's step; n timesteps take n + 1 calls.

    The first step has no past, hence a second call at its end (improved Euler), where the trajectory goes on there and
    alpha is not 0. The weights are those of equal steps in sigma / alpha, so on other grids it is of second order only.
    Source: arXiv 2202.09778; CompVis/stable-diffusion `ldm/models/diffusion/plms.py`. It combines eps, as they do;
    diffusers' PNDM combines whatever the model predicts.
    """
    x, model = x_T, _Caller(denoise)
    past: list[Tensor] = []  # newest first
    last = len(timesteps) - 1
    for i, (now, then) in enumerate(_intervals(schedule, timesteps, end)):
        x_0, e = p = model(x, now)
        past = [e, *past[:3]]
        change = None
        match past:
            case [e, e1, e2, e3]:
                change = (31 * e - 59 * e1 + 37 * e2 - 9 * e3) / 24
            case [e, e1, e2]:
                change = (11 * e - 16 * e1 + 5 * e2) / 12
            case [e, e1]:
                change = (e - e1) / 2
            case [e] if i < last and now.alpha:  # not kept: the next step calls at `then` again, from better latents
                x_0, eps_then = model(_step(p, then), then)
                change = (eps_then - e) / 2
        x = _step_eps(p, now, then, change)
        yield Step(model.call, now.t, x, x_0)


# A line through two answers is followed half a step further. Where that step is so many times longer, in lambda, than
# the one the line was learned from, it would be followed far beyond what it knows, and x_0 is held instead.
LONGEST = 2.0


def _change(x_0: Tensor, now: Point, then: Point, past: tuple[Tensor, Point] | None, is_last: bool) -> Tensor | None:
    """How x_0 changes until half-way to then in lambda, on the line through this call and the one before.

    None holds x_0 as it is. The first step does so, since it has no past. So does a step much longer than the one
    before it (`LONGEST`). Grids have such steps: Stable Diffusion's own ends at t = 1, and the step to there spans
    nearly all that is left. So does the last step, which with few steps spans a large part of lambda, and all the rest
    where sigma ends at 0 (crowsonkb/k-diffusion#43, huggingface/diffusers#5541).
    """
    if past is None or is_last:
        return None
    x_0_before, before = past
    step, step_before = then.lambda_ - now.lambda_, now.lambda_ - before.lambda_
    if abs(step) > LONGEST * abs(step_before) or math.isinf(step_before):
        return None
    return (x_0 - x_0_before) * (step / (2 * step_before))


def dpmpp_2m_sde(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Trajectory,
    timesteps: Sequence[float],
    *,
    end: float | None = None,
    noise: Noise | None = None,
    eta: float = 1.0,
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), midpoint form: part of the noise is renewed in each step; with eta 0 it is `dpmpp_2m`.

    Source: arXiv 2211.01095 (eta 1); crowsonkb/k-diffusion `k_diffusion/sampling.py`, sample_dpmpp_2m_sde.
    """
    x, model, past = x_T, _Caller(denoise), None
    last = len(timesteps) - 1
    for i, (now, then) in enumerate(_intervals(schedule, timesteps, end)):
        x_0, eps = model(x, now)
        decay = math.exp(now.lambda_ - then.lambda_)  # e^-h, 0 where sigma ends at 0 or alpha begins at 0
        x = then.alpha * x_0 + then.sigma * decay**eta * eps
        change = _change(x_0, now, then, past, i == last)
        if change is not None:
            x = x + then.alpha * (1 - decay ** (1 + eta)) * change
        x = _add_noise(x, then.sigma * math.sqrt(1 - decay ** (2 * eta)), noise)
        past = x_0, now
        yield Step(model.call, now.t, x, x_0)


def dpmpp_2m(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Trajectory,
    timesteps: Sequence[float],
    *,
    end: float | None = None,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(2M), second order; its first step, its last one and very long ones are of first order.

    Source: arXiv 2211.01095 algorithm 2.
    """
    x, model, past = x_T, _Caller(denoise), None
    last = len(timesteps) - 1
    for i, (now, then) in enumerate(_intervals(schedule, timesteps, end)):
        p = model(x, now)
        x = _step_x_0(p, now, then, _change(p.x_0, now, then, past, i == last))
        past = p.x_0, now
        yield Step(model.call, now.t, x, p.x_0)


# --- singlestep: several calls per step, at nodes spread over it in lambda --------------------------------------------
# A step of no or of infinite length in lambda has no such nodes. Only one at either end of a trajectory can be such
# (from timestep 0 to alphas_cumprod[0]; to sigma 0; from alpha 0): it is a first-order step of one call.


def _has_nodes(now: Point, then: Point) -> bool:
    return now.lambda_ != then.lambda_ and math.isfinite(now.lambda_) and math.isfinite(then.lambda_)


def _node(schedule: Trajectory, now: Point, then: Point, r: float) -> Point:
    """The point at the fraction r of the way from now to then, in lambda."""
    return schedule.at(schedule.t_of_lambda(now.lambda_ + r * (then.lambda_ - now.lambda_)))


def dpm_solver_2(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Trajectory,
    timesteps: Sequence[float],
    *,
    end: float | None = None,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """DPM-Solver-2, singlestep, two calls per step: holds the eps found half-way.

    Source: arXiv 2206.00927 algorithm 1 (r_1 = 1/2).
    """
    x, model = x_T, _Caller(denoise)
    for now, then in _intervals(schedule, timesteps, end):
        x_0, eps = p = model(x, now)
        change = None
        if _has_nodes(now, then):
            middle = _node(schedule, now, then, 1 / 2)
            x_0, eps_1 = model(_step(p, middle), middle)
            change = eps_1 - eps
        x = _step_eps(p, now, then, change)
        yield Step(model.call, now.t, x, x_0)


def dpm_solver_3(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Trajectory,
    timesteps: Sequence[float],
    *,
    end: float | None = None,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """DPM-Solver-3, singlestep, three calls per step.

    Source: arXiv 2206.00927 algorithm 2 (r_1 = 1/3, r_2 = 2/3), in its notation below.
    """
    x, model, r1, r2 = x_T, _Caller(denoise), 1 / 3, 2 / 3
    for now, then in _intervals(schedule, timesteps, end):
        x_0, eps = p = model(x, now)
        x = _step(p, then)
        if _has_nodes(now, then):
            h = then.lambda_ - now.lambda_
            s1, s2 = _node(schedule, now, then, r1), _node(schedule, now, then, r2)
            _, eps_1 = model(_step(p, s1), s1)
            slope = r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1)
            x_0, eps_2 = model(_step(p, s2) - s2.sigma * slope * (eps_1 - eps), s2)
            x = x - then.sigma / r2 * (math.expm1(h) / h - 1) * (eps_2 - eps)
        yield Step(model.call, now.t, x, x_0)


def dpmpp_2s(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Trajectory,
    timesteps: Sequence[float],
    *,
    end: float | None = None,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(2S), singlestep, two calls per step: holds the x_0 found half-way.

    Source: arXiv 2211.01095 algorithm 1 (r = 1/2).
    """
    x, model = x_T, _Caller(denoise)
    for now, then in _intervals(schedule, timesteps, end):
        x_0, _ = p = model(x, now)
        change = None
        if _has_nodes(now, then):
            middle = _node(schedule, now, then, 1 / 2)
            x_0, _ = model(_step(p, middle), middle)
            change = x_0 - p.x_0
        x = _step_x_0(p, now, then, change)
        yield Step(model.call, now.t, x, x_0)


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "plms": plms,
    "dpm_solver_2": dpm_solver_2,
    "dpm_solver_3": dpm_solver_3,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "euler": euler,
    "euler_a": euler_a,
}


def _on_one_number(
    sampler: Sampler,
    schedule: Trajectory,
    timesteps: Sequence[float],
    end: float | None = None,
    denoise: Denoise = lambda x, t, call: Prediction(x, x),
) -> Iterator[Step]:
    return sampler(denoise, torch.zeros(1), schedule, timesteps, end=end, noise=torch.zeros_like)


def count_calls(sampler: Sampler, schedule: Trajectory, timesteps: Sequence[float], end: float | None = None) -> int:
    """How many model calls `sampler` makes over `timesteps`, found by running it on one number."""
    *_, last = _on_one_number(sampler, schedule, timesteps, end)
    return last.call + 1


def call_timesteps(
    sampler: Sampler, schedule: Trajectory, timesteps: Sequence[float], end: float | None = None
) -> list[float]:
    """The timestep of each model call that `sampler` makes over `timesteps`, found by running it on one number."""
    asked: list[float] = []

    def denoise(x: Tensor, t: float, call: int) -> Prediction:
        asked.append(t)
        return Prediction(x, x)

    for _ in _on_one_number(sampler, schedule, timesteps, end, denoise):
        pass
    return asked


def timesteps_for(sampler: Sampler, schedule: Schedule, calls: int, spacing: str | None = None) -> list[float]:
    """Timesteps over which `sampler` makes this many calls, so that solvers can be compared at equal cost.

    A solver of k calls per step takes every k-th timestep of the grid for `calls`, so that it begins where solvers of
    one call per step do. A leading grid of calls / k timesteps would begin lower: for 4 calls, two per step, at t = 501
    and not at 751. What is decided above that is lost, however exact the solver. Such a grid would also spend its last
    calls next to the data, where hardly anything is left to do.
    Raises: ValueError where this sampler never makes exactly that many calls, or as `Schedule.timesteps`.
    Source: diffusers `schedulers/scheduling_dpmsolver_singlestep.py`, whose steps are so.
    """
    first, inner, _ = _on_one_number(sampler, schedule, schedule.timesteps(3, "trailing"))
    for n in range(calls, max(0, calls - 2), -1):  # plms makes one call more than it has timesteps
        timesteps = schedule.timesteps(n, spacing)[:: inner.call - first.call]
        if count_calls(sampler, schedule, timesteps) == calls:
            return timesteps
    raise ValueError(f"this sampler cannot make {calls} calls on this grid: choose another number")

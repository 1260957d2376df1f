"""Samplers as generators over any `denoise(x, t, call) -> eps`: no model, no global state, torch alone.

The ODE solvers rest on one fact: x_t = alpha_t x_0 + sigma_t eps holds along the trajectory for the model's
current estimates of x_0 and eps, so that a step is exact if either of the two stays constant. `_hold_eps` and
`_hold_x_0` are these two steps; what tells the solvers apart is which estimate they hold, and where they take it.

Coefficients are Python floats in double precision; tensors keep the dtype and device of `x_T`, and nothing waits
for the device. Samplers work in variance-preserving (VP) variables throughout: `x_T` has unit variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from minireuse.schedule import END, Point, Schedule

Denoise = Callable[[Tensor, float, int], Tensor]  # (x, t, call) -> eps of x's shape; t is fractional at inner nodes
Noise = Callable[[Tensor], Tensor]  # standard normal noise of its argument's shape


class Step(NamedTuple):
    """One solver step, as yielded by every sampler; `timesteps` of length n give n of them."""

    call: int  # the last model call made so far, counted from 0
    t: float  # the timestep just left
    x: Tensor  # the latents after the step
    x_0: Tensor  # the clean latents, as that call estimates them


Sampler = Callable[..., Iterator[Step]]  # (denoise, x_T, schedule, timesteps, *, noise=None[, eta]); None: randn_like


class _Model:
    """Numbers the calls of one trajectory, and gives each answer both as eps and as x_0."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.call = denoise, -1

    def __call__(self, x: Tensor, at: Point) -> tuple[Tensor, Tensor]:
        self.call += 1
        eps = self.denoise(x, at.t, self.call)
        return eps, (x - at.sigma * eps) / at.alpha


def _intervals(schedule: Schedule, timesteps: Sequence[float]) -> Iterator[tuple[Point, Point]]:
    """The trajectory as pairs (now, then); the last one leads from timesteps[-1] to END."""
    if len(timesteps) == 0 or timesteps[-1] < 0 or any(a <= b for a, b in pairwise(timesteps)):
        raise ValueError(f"timesteps are {timesteps}, expected to fall strictly down to 0 or more: leave out END")
    return pairwise(schedule.at(t) for t in [*timesteps, END])


def _hold_eps(x: Tensor, eps: Tensor, now: Point, then: Point) -> Tensor:
    """From now to then with eps constant: DDIM's step, and DPM-Solver-1 (arXiv 2206.00927 eq. 3.7).

    The paper's sigma_t (e^h - 1) is written without e^h, which is infinite where sigma_t is 0.
    """
    ratio = then.alpha / now.alpha
    return ratio * x + (then.sigma - ratio * now.sigma) * eps


def _hold_x_0(x: Tensor, x_0: Tensor, now: Point, then: Point) -> Tensor:
    """From now to then with x_0 constant: the step of DPM-Solver++ (arXiv 2211.01095)."""
    ratio = then.sigma / now.sigma
    return ratio * x + (then.alpha - ratio * now.alpha) * x_0


def _add_noise(x: Tensor, scale: float, noise: Noise | None) -> Tensor:
    return x if scale == 0 else x + scale * (noise or torch.randn_like)(x)


# --- first order: one call per step ---------------------------------------------------------------------------------


def ddim(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Schedule,
    timesteps: Sequence[float],
    *,
    noise: Noise | None = None,
    eta: float = 0.0,
) -> Iterator[Step]:
    """DDIM: deterministic with eta 0, ancestral sampling as in DDPM with eta 1.

    Source: arXiv 2010.02502 eq. 12 and 16.
    """
    x, model = x_T, _Model(denoise)
    for now, then in _intervals(schedule, timesteps):
        eps, x_0 = model(x, now)
        fresh = eta * then.sigma / now.sigma * math.sqrt(1 - (now.alpha / then.alpha) ** 2)
        fresh = min(fresh, then.sigma)  # there is no more noise than that to renew, however large eta
        x = then.alpha * x_0 + math.sqrt(then.sigma**2 - fresh**2) * eps
        x = _add_noise(x, fresh, noise)
        yield Step(model.call, now.t, x, x_0)


# Euler's method on d(x / alpha) / d(sigma / alpha) = eps is exactly DDIM's step (arXiv 2206.00364 eq. 1). The ancestral
# one goes down to sigma_down and adds noise of sigma_up: times alpha_then, that is DDIM's eq. 16 with eta 1
# (crowsonkb/k-diffusion `k_diffusion/sampling.py`, get_ancestral_step).
euler: Sampler = ddim
euler_a: Sampler = partial(ddim, eta=1.0)


# --- multistep: one call per step, and the answers of earlier ones ---------------------------------------------------


def plms(
    denoise: Denoise, x_T: Tensor, schedule: Schedule, timesteps: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """Pseudo linear multistep: Adams-Bashforth weights on eps, in DDIM's step; n timesteps take n + 1 calls.

    The first step has no past, hence a second call at its end (improved Euler); a single timestep has neither.
    The weights are those of equal steps in sigma / alpha, so on other grids it is of second order only.
    Source: arXiv 2202.09778; CompVis/stable-diffusion `ldm/models/diffusion/plms.py`.
    """
    x, model = x_T, _Model(denoise)
    past: list[Tensor] = []  # newest first
    for now, then in _intervals(schedule, timesteps):
        eps, x_0 = model(x, now)
        past = [eps, *past[:3]]
        match past:
            case [e, e1, e2, e3]:
                eps = (55 * e - 59 * e1 + 37 * e2 - 9 * e3) / 24
            case [e, e1, e2]:
                eps = (23 * e - 16 * e1 + 5 * e2) / 12
            case [e, e1]:
                eps = (3 * e - e1) / 2
            case [e] if then.t != END:  # not kept: the next step calls at `then` again, from better latents
                eps_then, x_0 = model(_hold_eps(x, e, now, then), then)
                eps = (e + eps_then) / 2
        x = _hold_eps(x, eps, now, then)
        yield Step(model.call, now.t, x, x_0)


def _extrapolate(x_0: Tensor, now: Point, then: Point, past: tuple[Tensor, Point] | None) -> Tensor:
    """x_0 half-way to then in lambda, on the line through this call and the last one.

    The first step has no past, and the last one holds x_0 as it is: with few steps it spans a large part of lambda
    (all the rest where sigma ends at 0), and extrapolating so far spoils the image (crowsonkb/k-diffusion#43,
    huggingface/diffusers#5541). diffusers does so where sigma ends at 0, but otherwise only below 15 steps.
    """
    if past is None or then.t == END:
        return x_0
    x_0_before, before = past
    r = (now.lambda_ - before.lambda_) / (then.lambda_ - now.lambda_)
    return x_0 + (x_0 - x_0_before) / (2 * r)


def dpmpp_2m(
    denoise: Denoise, x_T: Tensor, schedule: Schedule, timesteps: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M), second order; its first and last step are of first order.

    Source: arXiv 2211.01095 algorithm 2.
    """
    x, model, past = x_T, _Model(denoise), None
    for now, then in _intervals(schedule, timesteps):
        _, x_0 = model(x, now)
        x = _hold_x_0(x, _extrapolate(x_0, now, then, past), now, then)
        past = x_0, now
        yield Step(model.call, now.t, x, x_0)


def dpmpp_2m_sde(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Schedule,
    timesteps: Sequence[float],
    *,
    noise: Noise | None = None,
    eta: float = 1.0,
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), midpoint form: `dpmpp_2m` with part of the noise renewed in each step, none with eta 0.

    Source: arXiv 2211.01095 (eta 1); crowsonkb/k-diffusion `k_diffusion/sampling.py`, sample_dpmpp_2m_sde.
    """
    x, model, past = x_T, _Model(denoise), None
    for now, then in _intervals(schedule, timesteps):
        _, x_0 = model(x, now)
        decay = math.exp(now.lambda_ - then.lambda_)  # e^-h, 0 where sigma ends at 0
        mean = _extrapolate(x_0, now, then, past)
        x = then.sigma / now.sigma * decay**eta * x + then.alpha * (1 - decay ** (1 + eta)) * mean
        x = _add_noise(x, then.sigma * math.sqrt(1 - decay ** (2 * eta)), noise)
        past = x_0, now
        yield Step(model.call, now.t, x, x_0)


# --- singlestep: several calls per step, at nodes spread over it in lambda -------------------------------------------
# A step of no or of infinite length in lambda has no such nodes. Only the last one can be either (from timestep 0 to
# alphas_cumprod[0]; to sigma 0): it is a first-order step of one call.


def _has_nodes(now: Point, then: Point) -> bool:
    return now.lambda_ < then.lambda_ < math.inf


def _node(schedule: Schedule, now: Point, then: Point, r: float) -> Point:
    """The point at the fraction r of the way from now to then, in lambda."""
    return schedule.at(schedule.t_of_lambda(now.lambda_ + r * (then.lambda_ - now.lambda_)))


def dpm_solver_2(
    denoise: Denoise, x_T: Tensor, schedule: Schedule, timesteps: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver-2, singlestep, two calls per step: holds the eps found half-way.

    Source: arXiv 2206.00927 algorithm 1 (r_1 = 1/2).
    """
    x, model = x_T, _Model(denoise)
    for now, then in _intervals(schedule, timesteps):
        eps, x_0 = model(x, now)
        if _has_nodes(now, then):
            middle = _node(schedule, now, then, 1 / 2)
            eps, x_0 = model(_hold_eps(x, eps, now, middle), middle)
        x = _hold_eps(x, eps, now, then)
        yield Step(model.call, now.t, x, x_0)


def dpm_solver_3(
    denoise: Denoise, x_T: Tensor, schedule: Schedule, timesteps: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver-3, singlestep, three calls per step.

    Source: arXiv 2206.00927 algorithm 2 (r_1 = 1/3, r_2 = 2/3), in its notation below.
    """
    x, model, r1, r2 = x_T, _Model(denoise), 1 / 3, 2 / 3
    for now, then in _intervals(schedule, timesteps):
        eps, x_0 = model(x, now)
        x_s, x = x, _hold_eps(x, eps, now, then)
        if _has_nodes(now, then):
            h = then.lambda_ - now.lambda_
            s1, s2 = _node(schedule, now, then, r1), _node(schedule, now, then, r2)
            eps_1, _ = model(_hold_eps(x_s, eps, now, s1), s1)
            slope = r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1)
            eps_2, x_0 = model(_hold_eps(x_s, eps, now, s2) - s2.sigma * slope * (eps_1 - eps), s2)
            x = x - then.sigma / r2 * (math.expm1(h) / h - 1) * (eps_2 - eps)
        yield Step(model.call, now.t, x, x_0)


def dpmpp_2s(
    denoise: Denoise, x_T: Tensor, schedule: Schedule, timesteps: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2S), singlestep, two calls per step: holds the x_0 found half-way.

    Source: arXiv 2211.01095 algorithm 1 (r = 1/2).
    """
    x, model = x_T, _Model(denoise)
    for now, then in _intervals(schedule, timesteps):
        _, x_0 = model(x, now)
        if _has_nodes(now, then):
            middle = _node(schedule, now, then, 1 / 2)
            _, x_0 = model(_hold_x_0(x, x_0, now, middle), middle)
        x = _hold_x_0(x, x_0, now, then)
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


def count_calls(sampler: Sampler, schedule: Schedule, timesteps: Sequence[float]) -> int:
    """How many model calls `sampler` makes over `timesteps`, found by running it on one number."""
    x = torch.zeros(1)
    *_, last = sampler(lambda x, t, call: x, x, schedule, timesteps, noise=torch.zeros_like)
    return last.call + 1

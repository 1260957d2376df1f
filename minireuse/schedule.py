"""Trajectories from noise to data, x_t = alpha_t x_0 + sigma_t eps, and the timesteps at which to call a model.

A trajectory is anything that knows its alpha and sigma at every t (`Trajectory`). `Schedule` is that of Stable
Diffusion and its relatives, a table of alpha-bar that a model was trained on. `Flow` is the straight line of rectified
flow, and `EDM` that of models whose t is the noise itself. All are immutable values.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear")
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential", "ays")
RHO = 7.0  # arXiv 2206.00364, appendix D.1


class Point(NamedTuple):
    """What a sampler needs to know of one timestep, in double precision."""

    t: float
    alpha: float
    sigma: float
    lambda_: float  # log(alpha / sigma): -inf where alpha is 0, +inf where sigma is 0


class Trajectory(Protocol):
    """What samplers need to know of a trajectory: ten lines make one of your own."""

    @property
    def end(self) -> float:
        """The t at which it ends, next to the data."""

    def at(self, t: float) -> Point:
        """The point at t."""

    def t_of_lambda(self, lambda_: float) -> float:
        """The t at which log(alpha / sigma) is lambda."""


def point(t: float, alpha: float, sigma: float) -> Point:
    """The point of these alpha and sigma, of which at most one is 0."""
    lambda_ = math.inf if sigma == 0 else -math.inf if alpha == 0 else math.log(alpha) - math.log(sigma)
    return Point(t, alpha, sigma, lambda_)


# --- models trained on a table of alpha-bar ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule a model was trained on, and how its timesteps are chosen at sampling time.

    Source: diffusers `schedulers/scheduling_ddim.py` for the names; arXiv 2305.08891 table 2 for the spacings.
    """

    train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # "scaled_linear": linear in sqrt(beta), Stable Diffusion's
    prediction_type: str = "epsilon"
    spacing: str = "leading"
    offset: int = 1  # added to "leading" timesteps
    last_alpha_one: bool = False  # alpha-bar after the last step: 1, or (False, as in SD) alphas_cumprod[0]
    zero_snr: bool = False  # betas rescaled so that the last timestep is noise alone (arXiv 2305.08891 algorithm 1)
    alphas_cumprod: tuple[float, ...] | None = None  # the table itself, where no formula of the betas gives it
    family: str = "sd"  # of the model, "sdxl" for Stable Diffusion XL: each has an Align Your Steps list


SD_SCHEDULE = ScheduleConfig()  # Stable Diffusion 1.x's

END = -1  # of a `Schedule`: the timestep after its last one, where `last_alpha_cumprod` holds

# Align Your Steps (arXiv 2404.14507): the lists of ten timesteps that the authors published.
AYS = {
    "sd": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}


@dataclass(frozen=True, eq=False)  # eq: tensors have no single truth value
class Schedule:
    """The table of alpha-bar that a model was trained on, with the conventions for sampling from it.

    A timestep `t` may lie between two entries, where lambda is linear in t; any t < 0 means END.
    Source: crowsonkb/k-diffusion `k_diffusion/external.py` for the interpolation (log sigma linear in t).
    """

    alphas_cumprod: Tensor  # (T,) float64, CPU, strictly decreasing, the last one may be 0; never to be modified
    last_alpha_cumprod: float  # at END: 1, or alphas_cumprod[0] (diffusers: `set_alpha_to_one`)
    prediction_type: str = "epsilon"
    spacing: str = "leading"
    offset: int = 1
    family: str = "sd"  # whose Align Your Steps list it takes

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.dtype != torch.float64 or table.device.type != "cpu" or table.ndim != 1:
            given = f"{table.dtype} of shape {tuple(table.shape)} on {table.device}"
            raise ValueError(f"alphas_cumprod is {given}, expected a float64 vector on the CPU: convert it first")
        if not (table[-1] >= 0 and table[0] < 1 and bool((table.diff() < 0).all())):
            raise ValueError("alphas_cumprod leaves [0, 1) or does not fall strictly: give cumprod(1 - betas)")
        if self.last_alpha_cumprod not in (1.0, table[0].item()):
            allowed = f"1 or alphas_cumprod[0] = {table[0].item()}"
            raise ValueError(f"last_alpha_cumprod is {self.last_alpha_cumprod}, expected {allowed}: choose one")
        _require("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _require("spacing", self.spacing, SPACINGS)
        _require("family", self.family, tuple(AYS))

    @classmethod
    def from_config(cls, config: ScheduleConfig = SD_SCHEDULE) -> Schedule:
        """The schedule of `config`; without one, Stable Diffusion's."""
        table = (
            _formula(config)
            if config.alphas_cumprod is None
            else torch.tensor(config.alphas_cumprod, dtype=torch.float64)
        )
        if config.zero_snr:
            root = table.sqrt()
            table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
        last = 1.0 if config.last_alpha_one else table[0].item()
        return cls(table, last, config.prediction_type, config.spacing, config.offset, config.family)

    @property
    def end(self) -> float:
        return END

    @cached_property
    def _lambdas(self) -> list[float]:
        return [_half_logit(a) for a in self.alphas_cumprod.tolist()]

    def _alpha_cumprod(self, t: float) -> float:
        if t < 0:
            return self.last_alpha_cumprod
        if t == int(t) < len(self.alphas_cumprod):
            return self.alphas_cumprod[int(t)].item()  # exact, where the way through lambda would round
        return 1 / (1 + math.exp(-2 * self.lambda_(t)))

    def alpha(self, t: float) -> float:
        """The signal's share, sqrt(alpha-bar)."""
        return math.sqrt(self._alpha_cumprod(t))

    def sigma(self, t: float) -> float:
        """The noise's share, sqrt(1 - alpha-bar)."""
        return math.sqrt(1 - self._alpha_cumprod(t))

    def lambda_(self, t: float) -> float:
        """Half the log signal-to-noise ratio, log(alpha / sigma); +inf where sigma is 0, -inf where alpha is.

        Raises: ValueError where t lies beyond the table.
        """
        if t < 0:
            return _half_logit(self.last_alpha_cumprod)
        if t > len(self._lambdas) - 1:
            raise ValueError(f"t is {t}, expected at most {len(self._lambdas) - 1}: the model knows no noisier latents")
        low, high = self._lambdas[math.floor(t)], self._lambdas[math.ceil(t)]
        if math.isinf(high) and t != math.ceil(t):  # on the way to alpha 0 it is alpha that falls linearly
            return _half_logit((self.alpha(math.floor(t)) * (math.ceil(t) - t)) ** 2)
        return low + (t - math.floor(t)) * (high - low) if low != high else low

    def t_of_lambda(self, lambda_: float) -> float:
        """The inverse of `lambda_` on [0, T - 1]; a lambda beyond either end of the table gives that end."""
        table = self._lambdas
        after = bisect_left(table, -lambda_, key=operator.neg)  # the table falls, bisect wants it to rise
        if after == 0 or after == len(table):
            return float(min(after, len(table) - 1))
        low, high = table[after - 1], table[after]
        if math.isinf(high):
            return after - math.sqrt(1 / (1 + math.exp(-2 * lambda_))) / self.alpha(after - 1)
        return after - 1 + (lambda_ - low) / (high - low)

    def at(self, t: float) -> Point:
        return Point(t, self.alpha(t), self.sigma(t), self.lambda_(t))

    def timesteps(self, n: int, spacing: str | None = None) -> list[float]:
        """The n timesteps to call the model at, descending; `spacing` None takes the schedule's own.

        - leading: multiples of T // n, plus `offset`; starts well below T - 1. Stable Diffusion's. The offset shrinks
          where it would leave the table, as with n = T (diffusers then asks for the entry T, which does not exist).
        - trailing: T - 1 downwards in steps of T / n, rounded. (diffusers appends a -1 for some n, such as 61.)
        - linspace: both ends of the table included. A single timestep is 0.
        - karras: both ends included, equal steps in (sigma / alpha)^(1/7) (arXiv 2206.00364 eq. 5).
        - exponential: both ends included, equal steps in lambda (k-diffusion's get_sigmas_exponential).
        - ays: Align Your Steps (arXiv 2404.14507), interpolated in lambda where n is not 10.

        The first three are whole numbers, the others fractions. leading and linspace begin at another timestep for
        another n or end there; for very few steps take trailing, which begins at T - 1 and ends T / n above the data.
        Raises: ValueError for n outside 1 ... T, an unknown spacing, or one that the table has no room for.
        Source: arXiv 2305.08891 table 2; diffusers `schedulers/scheduling_ddim.py` for rounding and offset.
        """
        total, spacing = len(self.alphas_cumprod), spacing or self.spacing
        if not isinstance(n, int) or not 1 <= n <= total:
            raise ValueError(f"the number of steps is {n}, expected a whole number from 1 to {total}: choose another")
        _require("spacing", spacing, SPACINGS)
        if spacing == "trailing":
            step = (total - total / n) - total  # rounded as in numpy.arange, on which diffusers' choice at ties depends
            return [round(total + i * step) - 1 for i in range(n)]
        if spacing == "linspace":
            return [round(i * ((total - 1) / max(n - 1, 1))) for i in reversed(range(n))]
        if spacing == "leading":
            ratio = total // n
            offset = min(self.offset, total - 1 - (n - 1) * ratio)
            return [i * ratio + offset for i in reversed(range(n))]
        return [self._tidy(t) for t in self._in_lambda(n, spacing)]

    def _in_lambda(self, n: int, spacing: str) -> list[float]:
        """The grids that are made in lambda, or in sigma / alpha = e^-lambda."""
        if spacing == "ays":
            if len(self.alphas_cumprod) != 1000:
                raise ValueError(
                    f"ays is known for 1000 timesteps, not {len(self.alphas_cumprod)}: choose another spacing"
                )
            nodes = [self.lambda_(t) for t in (*AYS[self.family], 0)]
            places = [i * (len(nodes) - 1) / n for i in range(n)]
            return [self.t_of_lambda(_between(nodes, place)) for place in places]
        least, most = self._lambdas[-1], self._lambdas[0]
        if math.isinf(least):
            raise ValueError(
                f"{spacing} needs a largest sigma / alpha, and this schedule begins at alpha 0: take trailing"
            )
        if spacing == "karras":
            return [self.t_of_lambda(-math.log(s)) for s in karras(n, math.exp(-most), math.exp(-least))]
        return [self.t_of_lambda(least + i * (most - least) / max(n - 1, 1)) for i in range(n)]

    def _tidy(self, t: float) -> float:
        """A whole number where it is one but for rounding, so that the table is read there."""
        return round(t) if abs(t - round(t)) < 1e-6 else t


def _formula(config: ScheduleConfig) -> Tensor:
    """Alpha-bar as the betas give it."""
    _require("beta_schedule", config.beta_schedule, BETA_SCHEDULES)
    power = 2 if config.beta_schedule == "scaled_linear" else 1
    start, end = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
    betas = torch.linspace(start, end, config.train_timesteps, dtype=torch.float64) ** power
    return torch.cumprod(1 - betas, dim=0)


# --- trajectories that are formulas -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """Rectified flow: x = (1 - t) x_0 + t eps, t from 1 to 0 (arXiv 2209.03003; SD 3, Flux).

    shift: of the timesteps towards noise, more for larger images (arXiv 2403.03206 section 5.3.2).
    """

    shift: float = 1.0

    @property
    def end(self) -> float:
        return 0.0

    def at(self, t: float) -> Point:
        return point(t, 1 - t, t)

    def t_of_lambda(self, lambda_: float) -> float:
        return 1 / (1 + math.exp(lambda_))

    def timesteps(self, n: int) -> list[float]:
        """n timesteps from 1 downwards, equally far apart before the shift. (Those of diffusers end near 1 / 1000.)"""
        even = [1 - i / n for i in range(n)]
        return [self.shift * t / (1 + (self.shift - 1) * t) for t in even]


@dataclass(frozen=True)
class EDM:
    """Models of x_0 + sigma eps, for which t is sigma (arXiv 2206.00364)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = RHO

    @property
    def end(self) -> float:
        return 0.0

    def at(self, t: float) -> Point:
        return point(t, 1.0, t)

    def t_of_lambda(self, lambda_: float) -> float:
        return math.exp(-lambda_)

    def timesteps(self, n: int) -> list[float]:
        """n values of sigma from sigma_max to sigma_min (eq. 5); the step to 0 follows."""
        return karras(n, self.sigma_min, self.sigma_max, self.rho)


def karras(n: int, sigma_min: float, sigma_max: float, rho: float = RHO) -> list[float]:
    """n values from sigma_max to sigma_min in equal steps of their rho-th root. Source: arXiv 2206.00364 eq. 5."""
    most, least = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    inner = [(most + i / (n - 1) * (least - most)) ** rho for i in range(1, n - 1)]
    return [sigma_max, *inner, sigma_min][:n]


def _between(nodes: list[float], place: float) -> float:
    """The value at a place between nodes numbered from 0, on straight lines."""
    low = min(math.floor(place), len(nodes) - 2)
    return nodes[low] + (place - low) * (nodes[low + 1] - nodes[low])


def _half_logit(alpha_cumprod: float) -> float:
    if alpha_cumprod in (0, 1):
        return math.inf if alpha_cumprod else -math.inf
    return (math.log(alpha_cumprod) - math.log1p(-alpha_cumprod)) / 2


def _require(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}: choose one of them")

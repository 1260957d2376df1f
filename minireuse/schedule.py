"""The noise schedule of a variance-preserving model, x_t = alpha_t x_0 + sigma_t eps, as one immutable value."""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear")
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


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


SD_SCHEDULE = ScheduleConfig()  # Stable Diffusion 1.x's


END = -1  # the timestep after a trajectory's last one, where `last_alpha_cumprod` holds


class Point(NamedTuple):
    """What a sampler needs to know of one timestep, in double precision."""

    t: float
    alpha: float
    sigma: float
    lambda_: float


@dataclass(frozen=True, eq=False)  # eq: tensors have no single truth value
class Schedule:
    """The table of alpha-bar that a model was trained on, with the conventions for sampling from it.

    A timestep `t` may lie between two entries, where lambda is linear in t; any t < 0 means END.
    Source: crowsonkb/k-diffusion `k_diffusion/external.py` for the interpolation (log sigma linear in t).
    """

    alphas_cumprod: Tensor  # (T,) float64, CPU, strictly decreasing; shared, so never to be modified
    last_alpha_cumprod: float  # at END: 1, or alphas_cumprod[0] (diffusers: `set_alpha_to_one`)
    prediction_type: str = "epsilon"
    spacing: str = "leading"
    offset: int = 1

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.dtype != torch.float64 or table.device.type != "cpu" or table.ndim != 1:
            given = f"{table.dtype} of shape {tuple(table.shape)} on {table.device}"
            raise ValueError(f"alphas_cumprod is {given}, expected a float64 vector on the CPU: convert it first")
        if not (table[-1] > 0 and table[0] < 1 and bool((table.diff() < 0).all())):
            raise ValueError("alphas_cumprod leaves (0, 1) or does not fall strictly: give cumprod(1 - betas)")
        if self.last_alpha_cumprod not in (1.0, table[0].item()):
            allowed = f"1 or alphas_cumprod[0] = {table[0].item()}"
            raise ValueError(f"last_alpha_cumprod is {self.last_alpha_cumprod}, expected {allowed}: choose one")
        _require("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _require("spacing", self.spacing, SPACINGS)

    @classmethod
    def from_config(cls, config: ScheduleConfig = SD_SCHEDULE) -> Schedule:
        """The schedule of `config`; without one, Stable Diffusion's."""
        _require("beta_schedule", config.beta_schedule, BETA_SCHEDULES)
        power = 2 if config.beta_schedule == "scaled_linear" else 1
        start, end = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
        betas = torch.linspace(start, end, config.train_timesteps, dtype=torch.float64) ** power
        table = torch.cumprod(1 - betas, dim=0)
        last = 1.0 if config.last_alpha_one else table[0].item()
        return cls(table, last, config.prediction_type, config.spacing, config.offset)

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
        """Half the log signal-to-noise ratio, log(alpha / sigma); +inf where sigma is 0.

        Raises: ValueError where t lies beyond the table.
        """
        if t < 0:
            return _half_logit(self.last_alpha_cumprod)
        if t > len(self._lambdas) - 1:
            raise ValueError(f"t is {t}, expected at most {len(self._lambdas) - 1}: the model knows no noisier latents")
        low, high = self._lambdas[math.floor(t)], self._lambdas[math.ceil(t)]
        return low + (t - math.floor(t)) * (high - low)

    def t_of_lambda(self, lambda_: float) -> float:
        """The inverse of `lambda_` on [0, T - 1]; a lambda beyond either end of the table gives that end."""
        table = self._lambdas
        after = bisect_left(table, -lambda_, key=operator.neg)  # the table falls, bisect wants it to rise
        if after == 0 or after == len(table):
            return float(min(after, len(table) - 1))
        low, high = table[after - 1], table[after]
        return after - 1 + (lambda_ - low) / (high - low)

    def at(self, t: float) -> Point:
        """The point of the schedule at timestep t."""
        return Point(t, self.alpha(t), self.sigma(t), self.lambda_(t))

    def timesteps(self, n: int, spacing: str | None = None) -> list[int]:
        """The n timesteps to call the model at, descending; `spacing` None takes the schedule's own.

        - leading: multiples of T // n, plus `offset`; starts well below T - 1. Stable Diffusion's. The offset shrinks
          where it would leave the table, as with n = T (diffusers then asks for the entry T, which does not exist).
        - trailing: T - 1 downwards in steps of T / n, rounded. (diffusers appends a -1 for some n, such as 61.)
        - linspace: both ends of the table included. A single timestep is 0.

        Only trailing begins at T - 1 whatever n: the one to take for very few steps.
        Raises: ValueError for n outside 1 ... T or an unknown spacing.
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
        ratio = total // n
        offset = min(self.offset, total - 1 - (n - 1) * ratio)
        return [i * ratio + offset for i in reversed(range(n))]


def _half_logit(alpha_cumprod: float) -> float:
    return math.inf if alpha_cumprod == 1 else (math.log(alpha_cumprod) - math.log1p(-alpha_cumprod)) / 2


def _require(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}: choose one of them")

"""Losses that fine-tune a finished U-Net: to do without guidance, or to tolerate reuse of its attention maps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minireuse.cache import ReuseCache
from minireuse.plan import ReusePlan
from minireuse.policies import random as random_plan
from minireuse.policies import select
from minireuse.schedule import Schedule
from minireuse.unet import UNet

STEPS = 20  # of DDIM, whose calls are drawn to tolerate reuse
MOST_WEIGHT = 25.0

# (student, teacher, x_0, context, schedule, rng) -> loss. Shapes: x_0 (B, 4, h, w); context (2B, M, D), unconditional
# half first.
Tuning = Callable[[UNet, UNet, Tensor, Tensor, Schedule, np.random.Generator], Tensor]


def guided(prediction: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance. Shapes: (2B, ...), unconditional half first -> (B, ...)."""
    unconditional, conditional = prediction.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def noise_like(x: Tensor, rng: np.random.Generator) -> Tensor:
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return torch.randn(x.shape, generator=generator).to(x)


def distillation(
    student: UNet,
    teacher: UNet,
    x_0: Tensor,
    context: Tensor,
    schedule: Schedule,
    rng: np.random.Generator,
    *,
    scale: float,
) -> Tensor:
    """How far one pass of the student is from the teacher's guided prediction, at timesteps of the whole schedule.

    Of eps, weighted by max(1, sigma^2 / alpha^2) up to a cap: the error of x_0 weighted by max(SNR, 1).
    Source: Meng et al., arXiv 2210.03142, stage one, with the guidance scale fixed.
    """
    batch = len(x_0)
    parts = (np.arange(batch) + rng.random(batch)) / batch  # one timestep from each of `batch` equal parts
    t = torch.from_numpy((parts * len(schedule.alphas_cumprod)).astype(np.int64))
    bar = schedule.alphas_cumprod[t].to(x_0)[:, None, None, None]  # alpha^2
    x, t = bar.sqrt() * x_0 + (1 - bar).sqrt() * noise_like(x_0, rng), t.to(x_0.device)
    with torch.no_grad():
        wanted = guided(teacher(torch.cat([x, x]), torch.cat([t, t]), context), scale)
    error = (student(x, t, context.chunk(2)[1]) - wanted).square()
    return (error * ((1 - bar) / bar).clamp(1, MOST_WEIGHT)).mean()


def tolerance(
    student: UNet,
    teacher: UNet,
    x_0: Tensor,
    context: Tensor,
    schedule: Schedule,
    rng: np.random.Generator,
    *,
    plan: ReusePlan | None,
    scale: float,
) -> Tensor:
    """How far one call of a trajectory that follows a plan is from the teacher's full call there.

    The call is drawn from the plan. Where it reuses, the call that it reads from comes first: that one keeps its maps,
    without gradients, and one DDIM step leads from it to where the reader stands, so that maps are as stale as the plan
    makes them. A call that computes is pulled in the same way, for nothing else would hold its predictions.

    plan: step-wise, of DDIM; None draws another one for every step, of any number of reuse calls.
    """
    if plan is None:
        seed, k = int(rng.integers(2**31)), int(rng.integers(1, STEPS))
        plan = random_plan(STEPS, select(student.sites), k=k, seed=seed)
    reuses = [bool(row.any()) for row in plan.mask]
    timesteps = schedule.timesteps(plan.calls)
    reader = int(rng.integers(1, plan.calls))
    writer = max(call for call in range(reader + 1) if not reuses[call])  # the reader itself, where it computes
    now = schedule.at(timesteps[writer])
    x, cache = now.alpha * x_0 + now.sigma * noise_like(x_0, rng), ReuseCache(torch.float32)
    if reuses[reader]:
        then = schedule.at(timesteps[reader])
        with torch.no_grad():
            kept = student(torch.cat([x, x]), timesteps[writer], context, plan.step(writer), cache)
        eps = guided(kept, scale)
        x = then.alpha * (x - now.sigma * eps) / now.alpha + then.sigma * eps
    both = torch.cat([x, x])
    with torch.no_grad():
        wanted = teacher(both, timesteps[reader], context)
    found = student(both, timesteps[reader], context, plan.step(reader) if reuses[reader] else None, cache)
    # Guidance enlarges the difference of the halves, so its error is what the picture sees; each half is held, too.
    return (guided(found, scale) - guided(wanted, scale)).square().mean() + (found - wanted).square().mean()

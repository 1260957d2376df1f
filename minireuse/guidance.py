"""From the U-Net to the `denoise` callable a sampler is given: guidance, prediction type and the plan look-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from minireuse.attention import TextKV, Watch
from minireuse.cache import ReuseCache
from minireuse.plan import ReusePlan, StepPlan
from minireuse.schedule import Schedule


class ConditionalUNet(Protocol):
    """What is asked of a U-Net: `minireuse.unet.UNet`, or anything that is called like one."""

    def text_kv(self, context: Tensor) -> TextKV:
        """As `UNet.text_kv`."""

    def __call__(
        self, x: Tensor, t: float, context: TextKV, step: StepPlan, cache: ReuseCache, watch: Watch | None
    ) -> Tensor:
        """As `UNet.forward`."""


def unguided(plan: ReusePlan) -> ReusePlan:
    """The plan as a run without guidance follows it."""
    return replace(plan, guided=(False,) * plan.calls)


def guided_denoise(
    unet: ConditionalUNet,
    context: Tensor,
    schedule: Schedule,
    plan: ReusePlan,
    cache: ReuseCache,
    *,
    guidance_scale: float = 7.5,
    attention: str = "fused",
    watch: Watch | None = None,
) -> Callable[[Tensor, float, int], Tensor]:
    """`denoise(x, t, call) -> eps` with classifier-free guidance, following `plan`.

    watch: sees, and may change, the scores of every attention that is computed (`minireuse.attention.Watch`).
    The unconditional half comes first in the batch: the order is part of what a cached tensor means.

    Shapes: context (2B, M, D), unconditional first, or (B, M, D) at guidance scale 1 (off); x (B, 4, h, w).
    Source: Ho & Salimans, arXiv 2207.12598 equation 6, in the parametrisation where 1 is no guidance.
    """
    if guidance_scale == 1:
        plan = unguided(plan)
    steps = [replace(plan.step(call), explicit=attention == "explicit") for call in range(plan.calls)]
    # The prompt does not change between calls, so its keys and values are computed here, once per batch layout.
    prompt = context if guidance_scale == 1 else context.chunk(2)[1]
    layouts = {step.guided for step in steps}
    text = {guided: unet.text_kv(context if guided else prompt) for guided in layouts}

    def denoise(x: Tensor, t: float, call: int) -> Tensor:
        step = steps[call]
        # The solver's state stays in float32 whatever precision the model computes in.
        latents = x.to(context.dtype)
        if step.guided:
            both = unet(torch.cat([latents, latents]), t, text[True], step, cache, watch).to(x.dtype)
            unconditional, conditional = both.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        else:
            output = unet(latents, t, text[False], step, cache, watch).to(x.dtype)
        if schedule.prediction_type == "epsilon":
            return output
        # v = alpha eps - sigma x_0 and x = alpha x_0 + sigma eps give eps (arXiv 2202.00512, appendix D).
        return schedule.alpha(t) * output + schedule.sigma(t) * x

    return denoise

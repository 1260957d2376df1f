"""From the U-Net to the `denoise` callable a sampler is given: guidance, prediction type and the plan look-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from minireuse.attention import TextKV, Watch
from minireuse.cache import ReuseCache
from minireuse.plan import PREDICTION, ReusePlan, StepPlan
from minireuse.samplers import Answer, Denoise, Prediction, from_v
from minireuse.schedule import Schedule


class ConditionalUNet(Protocol):
    """What is asked of a U-Net: `minireuse.unet.UNet`, or anything that is called like one."""

    def text_kv(self, context: Tensor) -> TextKV:
        """As `UNet.text_kv`."""

    def __call__(
        self,
        x: Tensor,
        t: float,
        context: TextKV,
        step: StepPlan,
        cache: ReuseCache,
        watch: Watch | None,
        added: Tensor | None,
    ) -> Tensor:
        """As `UNet.forward`."""


def unguided(plan: ReusePlan) -> ReusePlan:
    """The plan as a run without guidance follows it."""
    return replace(plan, guided=(False,) * plan.calls)


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """The guided output brought back, by this share of the way, to the conditional one's standard deviation.

    Shapes: (B, ...). Source: arXiv 2305.08891 section 3.4, on the network's own output.
    """
    dims = tuple(range(1, guided.ndim))
    factor = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (share * factor + (1 - share))


def guided_denoise(
    unet: ConditionalUNet,
    context: Tensor,
    schedule: Schedule,
    plan: ReusePlan,
    cache: ReuseCache,
    *,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.0,
    attention: str = "fused",
    watch: Watch | None = None,
    added: Tensor | None = None,
) -> Denoise:
    """`denoise(x, t, call)`, of which samplers learn x_0 and eps, with classifier-free guidance, following `plan`.

    guidance_rescale: how much of the guided output's excess in contrast is taken back, 0 to 1 (`rescaled`).
    watch: sees, and may change, the scores of every attention that is computed (`minireuse.attention.Watch`).
    added: what an SDXL U-Net is told beside the context (`UNet.added`), in the layout of the context.
    The unconditional half comes first in the batch: the order is part of what a cached tensor means.

    Shapes: context (2B, M, D), unconditional first, or (B, M, D) at guidance scale 1 (off); x (B, 4, h, w).
    Source: Ho & Salimans, arXiv 2207.12598 equation 6, in the parametrisation where 1 is no guidance.
    """
    if guidance_scale == 1:
        plan = unguided(plan)
    steps = [replace(plan.step(call), explicit=attention == "explicit") for call in range(plan.calls)]
    inside = [step.inside for step in steps]
    # The prompt does not change between calls, so its keys and values are computed here, once per batch layout.
    half = lambda both: both if guidance_scale == 1 or both is None else both.chunk(2)[1]  # noqa: E731
    layouts = {step.guided for step in steps}
    text = {guided: unet.text_kv(context if guided else half(context)) for guided in layouts}
    extra = {guided: added if guided else half(added) for guided in layouts}

    def predict(x: Tensor, t: float, call: int) -> Tensor:
        step = inside[call]
        # The solver's state stays in float32 whatever precision the model computes in.
        latents = x.to(context.dtype)
        if step.guided:
            both = unet(torch.cat([latents, latents]), t, text[True], step, cache, watch, extra[True]).to(x.dtype)
            unconditional, conditional = both.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
            return rescaled(output, conditional, guidance_rescale) if guidance_rescale else output
        return unet(latents, t, text[False], step, cache, watch, extra[False]).to(x.dtype)

    return _keeping(predict if schedule.prediction_type == "epsilon" else from_v(predict, schedule), steps, cache)


def _keeping(denoise: Denoise, steps: Sequence[StepPlan], cache: ReuseCache) -> Denoise:
    """The same, with reuse of the guided prediction: as eps, whatever the model predicts, in the solver's precision.

    Under DDIM a held eps is DDIM on fewer of the same timesteps.
    """

    def remember(x: Tensor, t: float, call: int) -> Answer:
        step = steps[call]
        if PREDICTION in step.reuse:
            return cache.load(PREDICTION, x.shape, step, like=x).read(x)
        answer = denoise(x, t, call)
        if PREDICTION in step.store:
            cache.store(PREDICTION, answer.eps if isinstance(answer, Prediction) else answer, step, dtype=x.dtype)
        return answer

    return remember if any(PREDICTION in step.store for step in steps) else denoise

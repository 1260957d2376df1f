"""Guidance rescale against its formula, and models whose last timestep is noise alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import minireuse
from minireuse.attention import TextKV
from minireuse.cache import ReuseCache
from minireuse.guidance import guided_denoise, rescaled
from minireuse.plan import ReusePlan
from minireuse.samplers import Prediction
from minireuse.schedule import Schedule, ScheduleConfig


def test_rescaled_guidance_has_the_contrast_of_the_conditional_output() -> None:
    conditional = torch.randn(3, 4, 8, 8)
    guided = 5 * torch.randn(3, 4, 8, 8) + 1
    whole = rescaled(guided, conditional, 1.0)
    for image, other in zip(whole, conditional, strict=True):
        assert image.std().item() == pytest.approx(other.std().item(), rel=1e-5)
    torch.testing.assert_close(rescaled(guided, conditional, 0.25), 0.75 * guided + 0.25 * whole)


class Constant:
    """A U-Net whose two halves answer 1 and 2, but for a pattern that gives them contrast."""

    def text_kv(self, context: Tensor) -> TextKV:
        return TextKV({})

    def __call__(self, x: Tensor, t: float, context: TextKV, *_: object) -> Tensor:
        pattern = torch.linspace(-1, 1, x[0].numel()).reshape(x.shape[1:])
        halves = torch.tensor([1.0, 2.0]).repeat_interleave(len(x) // 2)
        return halves[:, None, None, None] * pattern


def test_v_at_the_last_timestep_of_zero_snr_is_minus_the_image() -> None:
    """There alpha is 0: x is noise alone, and v = -x_0, from which the image follows and not from eps."""
    schedule = Schedule.from_config(ScheduleConfig(zero_snr=True, prediction_type="v_prediction", spacing="trailing"))
    denoise = guided_denoise(
        Constant(), torch.zeros(2, 1, 1), schedule, ReusePlan.nothing(1), ReuseCache(), guidance_scale=3.0
    )
    x = torch.randn(1, 4, 4, 4)
    answer = denoise(x, 999, 0)
    assert isinstance(answer, Prediction)
    pattern = torch.linspace(-1, 1, 64).reshape(4, 4, 4)
    torch.testing.assert_close(answer.x_0[0], -(1 + 3.0 * (2 - 1)) * pattern)
    torch.testing.assert_close(answer.eps, x)


def test_zero_snr_paints(pipeline: minireuse.Pipeline) -> None:
    config = ScheduleConfig(zero_snr=True, prediction_type="v_prediction", spacing="trailing")
    zero = replace(pipeline, schedule=Schedule.from_config(config))
    assert torch.isfinite(zero.generate("a red house", steps=4, guidance_rescale=0.7).latents).all()
    plain = zero.generate("a red house", steps=4)
    assert not torch.equal(plain.latents, zero.generate("a red house", steps=4, guidance_rescale=0.7).latents)
    with pytest.raises(ValueError, match="guidance_rescale is 2"):
        zero.generate("a red house", guidance_rescale=2.0)

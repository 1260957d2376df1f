"""Losses that fine-tune the U-Net: what they compare, where gradients flow, and that they fall."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch

from minireuse.cache import ReuseCache
from minireuse.guidance import guided_denoise
from minireuse.plan import ReusePlan
from minireuse.policies import select
from minireuse.samplers import ddim
from minireuse.schedule import Schedule
from minireuse.unet import UNet

from conftest import SMALLEST_UNET, randomise
from fine_tuning import distillation, tolerance
from train_unet import main as train_unet_main

SCHEDULE = Schedule.from_config()


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    made = UNet(SMALLEST_UNET)
    randomise(made)
    return made


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 and the context of two images, unconditional half first."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(4, 5, 32, generator=generator)


def test_a_student_is_compared_with_the_guided_teacher(unet: UNet, given: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Without guidance teacher and student are the same; with it they differ by the guidance."""
    x_0, context = given
    loss = partial(distillation, unet, unet, x_0, context, SCHEDULE)
    assert loss(np.random.default_rng(0), scale=1.0).item() == pytest.approx(0, abs=1e-10)
    one, two = (loss(np.random.default_rng(0), scale=scale).item() for scale in (2.0, 3.0))
    assert two == pytest.approx(4 * one, rel=1e-3)  # of the difference of the halves, once and twice


def test_a_call_that_computes_costs_nothing_to_an_unchanged_student(
    unet: UNet, given: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x_0, context = given
    loss = tolerance(
        unet, unet, x_0, context, SCHEDULE, np.random.default_rng(0), plan=ReusePlan.nothing(20), scale=7.5
    )
    assert loss.item() == pytest.approx(0, abs=1e-10)


def test_the_reader_sees_what_a_run_of_the_sampler_sees(unet: UNet, given: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A plan of two calls: the second reuses. The error is that of `guided_denoise` on the same trajectory."""
    x_0, context = given
    plan = ReusePlan.stepwise([False, True], select(unet.sites))
    rng = np.random.default_rng(5)
    loss = tolerance(unet, unet, x_0, context, SCHEDULE, rng, plan=plan, scale=3.0).item()
    rng = np.random.default_rng(5)
    assert rng.integers(1, 2) == 1  # the call drawn
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    timesteps = SCHEDULE.timesteps(2)
    x_T = SCHEDULE.alpha(timesteps[0]) * x_0 + SCHEDULE.sigma(timesteps[0]) * torch.randn(
        x_0.shape, generator=generator
    )
    answers = {}
    for name, followed in (("reused", plan), ("full", ReusePlan.nothing(2))):
        denoise = guided_denoise(unet, context, SCHEDULE, followed, ReuseCache(torch.float32), guidance_scale=3.0)
        seen: list[torch.Tensor] = []
        keep = lambda x, t, call, denoise=denoise, seen=seen: seen.append(denoise(x, t, call)) or seen[-1]  # noqa: E731
        with torch.no_grad():
            list(ddim(keep, x_T, SCHEDULE, timesteps))
        answers[name] = seen[1]
    guided_error = (answers["reused"] - answers["full"]).square().mean().item()
    assert 0 < guided_error < loss  # each half counts, too


@pytest.mark.parametrize("kind", ["distil", "fixed", "random"])
def test_training_lowers_the_loss_and_leaves_the_teacher(
    kind: str, unet: UNet, given: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x_0, context = given
    teacher = copy.deepcopy(unet).requires_grad_(False)
    plan = ReusePlan.stepwise(np.arange(20) % 2 == 1, select(unet.sites))
    tuning = (
        partial(distillation, scale=3.0)
        if kind == "distil"
        else partial(tolerance, plan=plan if kind == "fixed" else None, scale=3.0)
    )

    def mean_loss() -> float:
        with torch.no_grad():
            found = [tuning(unet, teacher, x_0, context, SCHEDULE, np.random.default_rng(i)).item() for i in range(8)]
        return float(np.mean(found))

    before, fixed = mean_loss(), [p.clone() for p in teacher.parameters()]
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-4)
    for step in range(16):
        loss = tuning(unet, teacher, x_0, context, SCHEDULE, np.random.default_rng(step % 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mean_loss() < before
    assert all(torch.equal(a, b) for a, b in zip(fixed, teacher.parameters(), strict=True))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--distil", "7.5"], "name its folder with --start"),
        (["--distil", "7.5", "--tolerate", "random", "--start", "weights"], "give one of them"),
        (["--tolerate", "nowhere.json", "--start", "weights"], "nowhere.json"),
    ],
)
def test_trainings_that_make_no_sense_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        train_unet_main(argv)

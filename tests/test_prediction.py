"""Reuse of the guided prediction itself: calls at which the U-Net does not run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import minireuse
from minireuse.cache import ReuseCache
from minireuse.plan import PREDICTION, PlanError, ReusePlan
from minireuse.policies import interval, select
from minireuse.sample.forecast import forecast
from minireuse.search import Renderer, build

from conftest import relative_error

PROMPTS = ["a red house", "an oak"]


class Counting:
    """A U-Net that counts its calls."""

    def __init__(self, unet: minireuse.unet.UNet) -> None:
        self.unet, self.calls, self.text_kv = unet, 0, unet.text_kv

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        return self.unet(*args)


def held(grid: str, order: int = 0) -> ReusePlan:
    return ReusePlan.stepwise([cell == "#" for cell in grid], [PREDICTION], order)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("folder", ["model_folder", "v_model_folder"])
def test_a_held_prediction_under_ddim_is_ddim_on_fewer_of_the_same_timesteps(
    folder: str, guidance_scale: float, request: pytest.FixtureRequest
) -> None:
    pipe = minireuse.load(request.getfixturevalue(folder), device="cpu")
    pipe.compiled = counting = Counting(pipe.unet)
    plan, timesteps = held("..#.##.#"), pipe.timesteps(8)
    fewer = [t for t, reuses in zip(timesteps, plan.mask[:, 0], strict=True) if not reuses]
    made = pipe.generate(PROMPTS, steps=8, plan=plan, guidance_scale=guidance_scale, cache=ReuseCache(torch.uint8))
    assert counting.calls == 4
    expected = pipe.generate(PROMPTS, steps=fewer, guidance_scale=guidance_scale)
    assert relative_error(made.latents, expected.latents) < 1e-4
    assert made.cache_peak_bytes == 4 * made.latents.numel()  # float32 whatever the cache's dtype


def test_order_1_goes_on_along_the_line_through_two_predictions(pipeline: minireuse.Pipeline) -> None:
    seen: list[Tensor] = []

    def keep(denoise):
        def remember(x, t, call):
            seen.append(denoise(x, t, call))
            return seen[-1]

        return remember

    pipeline.generate("an oak", steps=5, plan=held("..#.#", order=1), wrap=keep)
    torch.testing.assert_close(seen[2], 2 * seen[1] - seen[0])
    torch.testing.assert_close(seen[4], seen[3] + (seen[3] - seen[1]) / 2)
    seen.clear()
    pipeline.generate("an oak", steps=6, plan=held("...#.#", order=2), wrap=keep)
    torch.testing.assert_close(seen[3], 3 * seen[2] - 3 * seen[1] + seen[0])
    torch.testing.assert_close(seen[5], 2 * seen[4] - 2 * seen[2] + seen[1])  # through calls 1, 2 and 4, at 5


def test_nothing_else_is_read_where_the_prediction_is(pipeline: minireuse.Pipeline) -> None:
    maps = select(pipeline.sites)
    plan = held(".#.#") | ReusePlan.stepwise([False, True, False, False], maps)
    assert plan.step(0).store == {PREDICTION}
    assert plan.step(1).reuse == {PREDICTION}


@pytest.mark.parametrize(
    "expression", ["interval:kind=eps", "interval:kind=eps|deepcache:every=3", "hurry|interval:kind=eps,k=2"]
)
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_forecast_and_shared_beginnings_know_it(
    pipeline: minireuse.Pipeline, expression: str, guidance_scale: float
) -> None:
    plan = build(expression, 6, pipeline.sites)
    made = pipeline.generate(PROMPTS, seeds=[0, 1], steps=6, plan=plan, guidance_scale=guidance_scale)
    known = forecast(pipeline.unet, plan, batch=2, size=(8, 8), guided=guidance_scale != 1)
    assert known.peak == made.cache_peak_bytes
    assert known.sites[PREDICTION] == 4 * made.latents.numel()
    render = Renderer(pipeline, PROMPTS, [0, 1], steps=6, guidance_scale=guidance_scale)
    for other in (ReusePlan.nothing(6), interval(6, [PREDICTION], k=2), plan):
        images = render(other)
    assert np.array_equal(images, made.images)


def test_where_guidance_ends_a_held_prediction_stays_as_it_is(pipeline: minireuse.Pipeline) -> None:
    plan = replace(held("..##.#"), guided=(True, True, True, False, False, False))
    assert torch.isfinite(pipeline.generate("an oak", steps=6, plan=plan).latents).all()
    begins_again = replace(held("..#."), guided=(True, False, True, True))
    with pytest.raises(PlanError, match="reuses eps of unet of unguided call 1 in a guided one"):
        begins_again.step(0)


def test_a_plan_file_tells_it(pipeline: minireuse.Pipeline, tmp_path: Path) -> None:
    plan = held(".#.#", order=1) | replace(interval(4, select(pipeline.sites, kind="deep")), order=1)
    assert ReusePlan.from_json(plan.to_json(), pipeline.sites) == plan
    with pytest.raises(PlanError, match="predictions belong to no attention layer"):
        select(pipeline.sites, "self", "eps")

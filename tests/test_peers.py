"""The published relatives' own packages, through diffusers on the same weights, against our plans (extra `peers`)."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

import minireuse
from minireuse.policies import deepcache, tgate
from minireuse.reuse import ReuseCache

from conftest import relative_error

PROMPT, STEPS = "a large red circle on a blue background", 10


@pytest.fixture
def reference(model_folder: Path) -> diffusers.StableDiffusionPipeline:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(pipeline: minireuse.Pipeline, plan: minireuse.reuse.ReusePlan, latents: torch.Tensor) -> torch.Tensor:
    cache = ReuseCache(torch.float32)
    return pipeline.generate(PROMPT, steps=STEPS, plan=plan, latents=latents, cache=cache).latents


@pytest.mark.parametrize(("every", "branch"), [(2, 0), (3, 0), (2, 1), (5, 2), (2, 3), (3, 6)])
def test_deepcache_agrees_with_its_package(
    pipeline: minireuse.Pipeline, reference: diffusers.StableDiffusionPipeline, every: int, branch: int
) -> None:
    package = pytest.importorskip("DeepCache", reason="extra `peers` is not installed")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = reference(PROMPT, num_inference_steps=STEPS, latents=latents, output_type="latent").images
    helper = package.DeepCacheSDHelper(pipe=reference)
    helper.set_params(cache_interval=every, cache_branch_id=branch)
    helper.enable()
    expected = reference(PROMPT, num_inference_steps=STEPS, latents=latents, output_type="latent").images
    helper.disable()
    given = ours(pipeline, deepcache(STEPS, pipeline.sites, every=every, branch=branch), latents)
    assert relative_error(given, expected) < 1e-3
    assert relative_error(given, plain) > 1e-2  # the plan did change something


@pytest.mark.parametrize(("gate", "every", "warmup"), [(5, 5, 2), (8, 3, 1), (3, 2, 2)])
def test_tgate_agrees_with_its_package(
    pipeline: minireuse.Pipeline, reference: diffusers.StableDiffusionPipeline, gate: int, every: int, warmup: int
) -> None:
    package = pytest.importorskip("tgate", reason="extra `peers` is not installed")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = reference(PROMPT, num_inference_steps=STEPS, latents=latents, output_type="latent").images
    gated = package.TgateSDLoader(reference)
    expected = gated.tgate(
        PROMPT,
        num_inference_steps=STEPS,
        latents=latents,
        gate_step=gate,
        sp_interval=every,
        fi_interval=1,
        warm_up=warmup,
        output_type="latent",
    ).images
    given = ours(pipeline, tgate(STEPS, pipeline.sites, gate=gate, every=every, warmup=warmup), latents)
    assert relative_error(given, expected) < 1e-3
    assert relative_error(given, plain) > 1e-2

"""The whole pipeline: against diffusers' from the same initial latents, and against itself in other company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import minireuse
from minireuse.cache import ReuseCache
from minireuse.plan import PlanError, ReusePlan
from minireuse.policies import POLICIES, hurry, select
from minireuse.samplers import SAMPLERS, Denoise

from conftest import relative_error

PROMPTS = ["green hills with a lake at noon", "red dunes with a pine at night"]


def reference_latents(folder: Path, sampler: str, guidance_scale: float, latents: torch.Tensor) -> torch.Tensor:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    config = dict(pipe.scheduler.config)
    one = config.pop("set_alpha_to_one")
    if sampler == "plms":
        pipe.scheduler = diffusers.PNDMScheduler.from_config(config, skip_prk_steps=True, set_alpha_to_one=one)
    if sampler == "dpmpp_2m":
        # Its "leading" timesteps are those of one step more, unlike all other schedulers'; "trailing" ones are alike.
        config |= {"timestep_spacing": "trailing", "final_sigmas_type": "zero" if one else "sigma_min"}
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, lower_order_final=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS,
        negative_prompt=["a cross", "a cross"],
        num_inference_steps=10,
        guidance_scale=guidance_scale,
        latents=latents,
        output_type="latent",
    ).images


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpmpp_2m"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_pipeline_equals_diffusers(
    model_folder: Path, v_model_folder: Path, prediction_type: str, sampler: str, guidance_scale: float
) -> None:
    if (prediction_type, sampler) == ("v_prediction", "plms"):
        pytest.skip("diffusers' PNDM extrapolates v where PLMS is defined on eps")
    folder = model_folder if prediction_type == "epsilon" else v_model_folder
    pipe = minireuse.load(folder, device="cpu")
    if sampler == "dpmpp_2m":
        pipe.schedule = replace(pipe.schedule, spacing="trailing")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    result = pipe.generate(
        PROMPTS, negative_prompts="a cross", steps=10, sampler=sampler, guidance_scale=guidance_scale, latents=latents
    )
    assert relative_error(result.latents, reference_latents(folder, sampler, guidance_scale, latents)) < 1e-4


@pytest.mark.parametrize("tokens", [77, 154, 5])
def test_embeddings_from_outside_are_used_as_in_diffusers(
    pipeline: minireuse.Pipeline, model_folder: Path, tokens: int
) -> None:
    """Any number of tokens, as libraries that weight prompts give."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    embeds = {f"{name}prompt_embeds": torch.randn(2, tokens, 32, generator=generator) for name in ("", "negative_")}
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(num_inference_steps=3, guidance_scale=5.0, latents=latents, output_type="latent", **embeds).images
    given = pipeline.generate(steps=3, guidance_scale=5.0, latents=latents, **embeds).latents
    assert relative_error(given, expected) < 1e-4


def test_the_embeddings_of_a_text_paint_what_the_text_paints(pipeline: minireuse.Pipeline) -> None:
    embeds = pipeline.text.encode(["a lake", "an oak", "a lake"])
    expected = pipeline.generate(["an oak", "a lake"], negative_prompts="a lake", seeds=[3, 4], steps=2).latents
    for texts in (
        {"prompt_embeds": embeds[1:], "negative_prompts": "a lake"},
        {"prompts": ["an oak", "a lake"], "negative_prompt_embeds": embeds[:1]},
        {"prompt_embeds": embeds[1:], "negative_prompt_embeds": embeds[:1].double()},
    ):
        given = pipeline.generate(seeds=[3, 4], steps=2, **texts).latents
        assert relative_error(given, expected) < 1e-5
    alone = pipeline.generate(prompt_embeds=embeds[1:], seeds=[3, 4], steps=2).latents
    assert relative_error(alone, pipeline.generate(["an oak", "a lake"], seeds=[3, 4], steps=2).latents) < 1e-5


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "prompts and prompt_embeds: neither of them is given"),
        ({"prompts": "a", "prompt_embeds": torch.zeros(1, 77, 32)}, "prompts and prompt_embeds: both are given"),
        (
            {"prompts": "a", "negative_prompts": "", "negative_prompt_embeds": torch.zeros(1, 77, 32)},
            "negative_prompts and negative_prompt_embeds: both are given",
        ),
        ({"prompt_embeds": torch.zeros(77, 32)}, r"prompt_embeds have shape \(77, 32\), expected \(B, tokens, 32\)"),
        ({"prompt_embeds": torch.zeros(1, 77, 33)}, r"prompt_embeds have shape .*, expected \(B, tokens, 32\)"),
        ({"prompt_embeds": torch.zeros(0, 77, 32)}, r"prompt_embeds have shape .*, expected \(B, tokens, 32\)"),
        ({"prompt_embeds": torch.full((1, 77, 32), torch.inf)}, "prompt_embeds hold NaN or inf"),
        ({"prompt_embeds": torch.zeros(1, 9, 32)}, "prompts are 77 and 9 tokens long, expected the same length"),
        ({"prompt_embeds": torch.zeros(2, 77, 32), "seeds": [1, 2, 3]}, "prompts has 2 entries for a batch of 3"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    pipeline: minireuse.Pipeline, texts: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.generate(steps=2, **texts)


def test_images_are_the_decoded_latents(pipeline: minireuse.Pipeline, model_folder: Path) -> None:
    result = pipeline.generate(PROMPTS, steps=3)
    vae = diffusers.AutoencoderKL.from_pretrained(model_folder, subfolder="vae")
    with torch.no_grad():
        pixels = vae.decode(result.latents / vae.config.scaling_factor).sample
    expected = pixels.clamp(-1, 1).add(1).mul(127.5).permute(0, 2, 3, 1)
    assert result.images.shape == (2, 16, 16, 3)
    torch.testing.assert_close(torch.from_numpy(result.images).float(), expected, atol=0.51, rtol=0)


def test_all_false_plan_is_bit_identical_to_no_plan(pipeline: minireuse.Pipeline) -> None:
    plain = pipeline.generate(PROMPTS, steps=4)
    nothing = pipeline.generate(PROMPTS, steps=4, plan=ReusePlan.stepwise([False] * 4, pipeline.sites))
    assert torch.equal(plain.latents, nothing.latents)
    assert nothing.cache_peak_bytes == 0


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_an_image_depends_on_its_own_seed_alone(pipeline: minireuse.Pipeline, sampler: str) -> None:
    settings = {"steps": 4, "sampler": sampler, "guidance_scale": 1.0}
    plan = hurry(pipeline.calls(sampler, 4), select(pipeline.sites))
    batch = pipeline.generate([*PROMPTS, PROMPTS[0]], seeds=[0, 7, 8], plan=plan, **settings)
    alone = pipeline.generate(PROMPTS[1], seeds=7, plan=plan, **settings)
    # Matrix products may sum in another order for another batch size, hence not always to the last bit.
    assert relative_error(alone.latents[0], batch.latents[1]) < 1e-5
    assert not torch.allclose(batch.latents[0], batch.latents[2], atol=1e-2)


def test_generations_do_not_see_each_other(pipeline: minireuse.Pipeline) -> None:
    plan = hurry(6, select(pipeline.sites), k=3)
    first = pipeline.generate(PROMPTS, steps=6, plan=plan)
    pipeline.generate(PROMPTS[::-1], seeds=5, steps=6, plan=plan)
    assert torch.equal(first.latents, pipeline.generate(PROMPTS, steps=6, plan=plan).latents)


def test_explicit_attention_gives_the_same_image(pipeline: minireuse.Pipeline) -> None:
    fused, explicit = (pipeline.generate(PROMPTS, steps=4, attention=a).latents for a in ("fused", "explicit"))
    torch.testing.assert_close(fused, explicit, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 6), ("plms", 7), ("dpm_solver_3", 18), ("dpmpp_2s", 12)])
def test_plans_are_counted_in_calls_not_steps(pipeline: minireuse.Pipeline, sampler: str, calls: int) -> None:
    assert pipeline.calls(sampler, 6) == calls
    result = pipeline.generate(PROMPTS[0], steps=6, sampler=sampler, plan=hurry(calls, select(pipeline.sites)))
    assert result.calls == calls
    with pytest.raises(PlanError, match=f"5 U-Net calls but sampler {sampler} makes {calls}"):
        pipeline.generate(PROMPTS[0], steps=6, sampler=sampler, plan=hurry(5, select(pipeline.sites)))


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("policy", ["deepcache", "tgate", "pab"])
def test_relatives_run_and_leave_nothing_behind(
    pipeline: minireuse.Pipeline, policy: str, guidance_scale: float
) -> None:
    cache = ReuseCache()
    plan = POLICIES[policy](8, pipeline.sites) | hurry(8, select(pipeline.sites), k=3)
    full = pipeline.generate(PROMPTS, steps=8, guidance_scale=guidance_scale)
    result = pipeline.generate(PROMPTS, steps=8, guidance_scale=guidance_scale, plan=plan, cache=cache)
    assert len(cache) == 0
    assert result.cache_peak_bytes > 0
    assert not torch.equal(full.latents, result.latents)


def test_calls_without_guidance_compute_the_conditional_half_alone(pipeline: minireuse.Pipeline) -> None:
    """A plan that only drops guidance, against a sampler given the same two kinds of eps by hand."""
    guided = (True, True, False, False)
    plan = ReusePlan(ReusePlan.nothing(4).mask, (), guided)
    given = pipeline.generate(PROMPTS[:1], steps=4, plan=plan, guidance_scale=5.0).latents
    context = pipeline.text.encode(["", PROMPTS[0]])

    def denoise(x: torch.Tensor, t: float, call: int) -> torch.Tensor:
        with torch.no_grad():
            conditional = pipeline.unet(x, t, context[1:])
            if not guided[call]:
                return conditional
            unconditional = pipeline.unet(x, t, context[:1])
        return unconditional + 5.0 * (conditional - unconditional)

    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))[None]
    *_, last = SAMPLERS["ddim"](denoise, noise, pipeline.schedule, pipeline.schedule.timesteps(4))
    assert relative_error(given, last.x) < 1e-5


def test_image_to_image_starts_from_the_noised_image(pipeline: minireuse.Pipeline) -> None:
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    near = pipeline.generate(PROMPTS[0], steps=10, init_images=image, strength=0.1, guidance_scale=1)
    assert near.calls == 1
    clean = pipeline.vae.encode(image)
    t = pipeline.schedule.timesteps(10)[-1]
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    start = pipeline.schedule.alpha(t) * clean + pipeline.schedule.sigma(t) * noise
    with torch.no_grad():
        eps = pipeline.unet(start, t, pipeline.text.encode(PROMPTS[:1]))
    x_0 = (start - pipeline.schedule.sigma(t) * eps) / pipeline.schedule.alpha(t)
    expected = pipeline.schedule.alpha(-1) * x_0 + pipeline.schedule.sigma(-1) * eps
    torch.testing.assert_close(near.latents, expected, atol=1e-4, rtol=1e-4)
    assert pipeline.generate(PROMPTS[0], steps=10, init_images=image, strength=1.0).calls == 10


def test_seeds_may_be_numpy_integers(pipeline: minireuse.Pipeline) -> None:
    plain = pipeline.generate(PROMPTS[0], steps=2, seeds=3).latents
    assert torch.equal(plain, pipeline.generate(PROMPTS[0], steps=2, seeds=np.int64(3)).latents)
    assert torch.equal(plain, pipeline.generate(PROMPTS[0], steps=2, seeds=np.array([3])).latents)


def test_eta_adds_noise_to_ddim_only(pipeline: minireuse.Pipeline) -> None:
    quiet, noisy = (pipeline.generate(PROMPTS[0], steps=4, eta=eta).latents for eta in (0.0, 1.0))
    assert not torch.allclose(quiet, noisy, atol=1e-2)
    again = pipeline.generate(PROMPTS[0], steps=4, eta=1.0).latents
    assert torch.equal(noisy, again)


def test_steps_are_reported_as_they_happen(pipeline: minireuse.Pipeline) -> None:
    seen = []
    result = pipeline.generate(PROMPTS[0], steps=4, on_step=seen.append)
    assert [s.call for s in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1].x, result.latents)


def test_half_precision_keeps_latents_in_float32(model_folder: Path) -> None:
    pipe = minireuse.load(model_folder, device="cpu", dtype="bfloat16")
    result = pipe.generate(PROMPTS[0], steps=3, plan=hurry(3, select(pipe.sites)))
    assert pipe.dtype == torch.bfloat16
    assert result.latents.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "ddpm"}, "sampler is 'ddpm', expected one of ddim"),
        ({"steps": 0}, "steps is 0"),
        ({"height": 20}, "height is 20, expected a multiple of 8 such as 16 or 24"),
        ({"width": 4}, "width is 4, expected a multiple of 8 such as 8 or 16"),
        ({"attention": "flash"}, "attention is 'flash'"),
        ({"seeds": [0, 1, 2]}, "prompts has 2 entries for a batch of 3"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents have shape"),
        ({"init_images": torch.zeros(2, 3, 16, 16), "strength": 0.0}, "strength is 0.0"),
        ({"prompts": []}, "prompts has 0 entries"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        (
            {"init_images": torch.zeros(1, 3, 16, 16)},
            r"shape \(1, 3, 16, 16\), expected \(2, 3, H, W\)",
        ),
        ({"init_images": torch.zeros(3, 16, 16)}, "init_images have shape"),
        ({"init_images": torch.full((2, 3, 16, 16), 200.0)}, "init_images have values outside -1 to 1"),
        ({"init_images": torch.zeros(2, 3, 16, 16), "height": 24}, "which is not the size asked for"),
    ],
)
def test_bad_arguments_get_one_sentence(
    pipeline: minireuse.Pipeline, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.generate(**({"prompts": PROMPTS, "steps": 2} | arguments))  # type: ignore[arg-type]


def test_plan_of_another_model_and_used_cache_are_refused(pipeline: minireuse.Pipeline) -> None:
    foreign = ReusePlan.from_json('{"format": "minireuse-plan", "calls": 2, "sites": {"map": {"x.attn1": ".#"}}}')
    with pytest.raises(PlanError, match=r"x\.attn1"):
        pipeline.generate(PROMPTS, steps=2, plan=foreign)
    cache = ReuseCache()
    step = hurry(2, select(pipeline.sites)).step(0)
    pipeline.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, 32), step, cache)
    with pytest.raises(ValueError, match="clear"):
        pipeline.generate(PROMPTS, steps=2, cache=cache)


def test_broken_numbers_are_named_not_painted(model_folder: Path) -> None:
    pipe = minireuse.load(model_folder, device="cpu")
    pipe.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or inf at step 1 of 2 \(t = 501\), computed in torch\.float32"):
        pipe.generate(PROMPTS[0], steps=2)
    pipe.unet.conv_out.bias[0] = 0.0

    def break_late(denoise: Denoise) -> Denoise:
        return lambda x, t, call: denoise(x, t, call) / (call < 2)

    with pytest.raises(ValueError, match=r"at step 3 of 4"):
        pipe.generate(PROMPTS[0], steps=4, wrap=break_late)
    pipe.vae.decoder.conv_out.bias[0] = torch.inf
    with pytest.raises(ValueError, match="VAE gave NaN or inf"):
        pipe.generate(PROMPTS[0], steps=2)


def test_a_vae_that_overflows_in_half_precision_decodes_in_full(model_folder: Path) -> None:
    pipe = minireuse.load(model_folder, device="cpu", dtype="float16")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.vae.decoder.conv_in.weight.mul_(3e4)  # within float16, but not what comes out of it
    pipe.vae.decoder.conv_in.bias.mul_(3e4)
    with pytest.warns(UserWarning, match=r"overflowed in torch\.float16, so the images are decoded in float32"):
        images = pipe.to_images(latents)
    assert images.std() > 1
    assert pipe.vae.decoder.conv_in.weight.dtype == torch.float16


def test_a_vae_that_overflows_in_half_precision_encodes_in_full(model_folder: Path) -> None:
    half, full = (minireuse.load(model_folder, device="cpu", dtype=dtype) for dtype in ("float16", "float32"))
    weights = [pipe.vae.encoder.conv_in.weight for pipe in (half, full)]
    largest = 6e4 / weights[1].abs().max()
    for weight in weights:
        weight.mul_(largest)  # within float16, but not what comes out of it
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    with pytest.warns(UserWarning, match=r"overflowed in torch\.float16, so the images are encoded in float32"):
        start = half._start(generators, (None, None), torch.zeros(2, 4, 8, 8), image, 1)
    expected = half.schedule.alpha(1) * full.vae.encode(image)
    torch.testing.assert_close(start, expected, rtol=1e-2, atol=1e-2)
    assert half.vae.encoder.conv_in.weight.dtype == torch.float16
    half.vae.encoder.conv_out.bias[0] = torch.nan
    with pytest.warns(UserWarning, match="encoded"), pytest.raises(ValueError, match="VAE gave NaN or inf"):
        half.generate(PROMPTS, steps=2, init_images=image)


def test_guidance_zero_runs_as_one_and_says_so(pipeline: minireuse.Pipeline) -> None:
    off = pipeline.generate(PROMPTS[0], steps=2, guidance_scale=1)
    with pytest.warns(UserWarning, match="guidance_scale 0 would ignore the prompt; it runs as 1"):
        zero = pipeline.generate(PROMPTS[0], steps=2, guidance_scale=0)
    assert torch.equal(zero.latents, off.latents)


def test_strength_one_keeps_what_the_schedule_leaves_of_the_image(pipeline: minireuse.Pipeline) -> None:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first = pipeline.timesteps(4, strength=1.0)[0]
    start = pipeline._start([torch.Generator()], (None, None), torch.zeros(1, 4, 8, 8), image, first)
    torch.testing.assert_close(start, pipeline.schedule.alpha(first) * pipeline.vae.encode(image))
    assert start.abs().max() > 0


def test_load_refuses_unknown_devices_and_dtypes(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        minireuse.load(model_folder, dtype="int8")
    with pytest.raises(ValueError, match="device 'abacus'"):
        minireuse.load(model_folder, device="abacus")
    with pytest.raises(ValueError, match="prediction_type is 'x'"):
        minireuse.load(model_folder, prediction_type="x")
    assert minireuse.load(model_folder, prediction_type="v_prediction").schedule.prediction_type == "v_prediction"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_image_as_cpu(model_folder: Path, pipeline: minireuse.Pipeline) -> None:
    plan = hurry(4, select(pipeline.sites))
    on_gpu = minireuse.load(model_folder, device="cuda", dtype="float32").generate(PROMPTS, steps=4, plan=plan)
    torch.testing.assert_close(
        on_gpu.latents.cpu(), pipeline.generate(PROMPTS, steps=4, plan=plan).latents, atol=1e-2, rtol=1e-2
    )

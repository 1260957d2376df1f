"""The model that ships: it shows its prompts, loads everywhere, and survives reuse."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

import minireuse
from minireuse.cache import ReuseCache
from minireuse.files import shipped_model
from minireuse.policies import deepcache, hurry, phast, select
from minireuse.search.language import build, policies_for
from minireuse.search.plan_files import plans_of

import compare_peers
from conftest import relative_error
from data import scene_at
from train_vae import psnr
from verify import score
from world import COLOURS, FILLS, RELATIONS, SHAPES, SIZES, caption, render

UNSEEN = [scene_at(7, i) for i in range(6)]
PROMPT = "a large red circle above a small blue star on a yellow background"


@pytest.fixture(scope="module")
def pipe() -> minireuse.Pipeline:
    return minireuse.load(device="cpu")


@pytest.fixture(scope="module")
def full(pipe: minireuse.Pipeline) -> np.ndarray:
    return pipe.generate([caption(s) for s in UNSEEN], seeds=list(range(6))).images


def image_psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_folder_is_small_and_complete() -> None:
    files = [p for p in shipped_model().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40e6
    assert {p.suffix for p in files} <= {".json", ".txt", ".safetensors", ".md"}


def test_pictures_show_their_prompts(full: np.ndarray) -> None:
    assert score(list(full), UNSEEN)["attributes"] >= 0.85


def test_reuse_keeps_the_picture(pipe: minireuse.Pipeline, full: np.ndarray) -> None:
    plan = hurry(20, select(pipe.sites), k=10)
    reused = pipe.generate([caption(s) for s in UNSEEN[:4]], seeds=list(range(4)), plan=plan)
    assert reused.cache_peak_bytes > 0
    assert np.mean([image_psnr(a, b) for a, b in zip(reused.images, full[:4], strict=True)]) > 25
    assert score(list(reused.images), UNSEEN[:4])["attributes"] >= 0.85


def test_searched_plans_ship(pipe: minireuse.Pipeline) -> None:
    """In these settings `phast` is a plan that was searched for them, not a neighbour's."""
    every = [(kind, k) for kind in ("map", "out", "deep") for k in (5, 10, 15)]
    expected = {("ddim", 20, *pair, 0) for pair in every}
    expected |= {(sampler, 20, kind, 10, 0) for sampler in ("dpmpp_2m", "plms") for kind in ("map", "deep")}
    expected |= {("ddim", 10, "map", 5, 0), ("dpmpp_2m", 10, "map", 5, 0), ("ddim", 50, "map", 25, 0)}
    expected |= {("ddim", 20, "map", 10, 1), ("ddim", 20, "out", 10, 1)}
    expected |= {("ddim", 20, "deep", k, 1) for k in (3, 6, 8, 10, 12, 13, 15)}
    plans = plans_of()
    policy = {
        sampler: partial(phast, plans=plans, sampler=sampler, model=pipe.fingerprint)
        for sampler in ("ddim", "dpmpp_2m", "plms")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says so where it takes the nearest
        for sampler, steps, kind, k, order in expected:
            plan = policy[sampler](pipe.calls(sampler, steps), select(pipe.sites, kind=kind), k=k, order=order)
            assert (plan.reused, plan.order, plan.on(pipe.sites)) == (k, order, plan)


def test_rows_of_the_comparison_have_plans_of_their_own(pipe: minireuse.Pipeline) -> None:
    policies = policies_for("phast", None, "ddim", lambda: pipe.fingerprint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in compare_peers.OURS:
            if name.startswith("phast"):
                build(name, 20, pipe.sites, policies=policies)


def test_going_on_along_a_line_is_closer_than_holding(pipe: minireuse.Pipeline, full: np.ndarray) -> None:
    held = deepcache(20, pipe.sites)
    prompts, seeds = [caption(s) for s in UNSEEN[:2]], [0, 1]
    close = [
        np.mean([image_psnr(a, b) for a, b in zip(images, full[:2], strict=True)])
        for images in (pipe.generate(prompts, seeds=seeds, plan=replace(held, order=order)).images for order in (0, 1))
    ]
    assert close[1] > close[0] + 3


def test_vae_reconstructs_unseen_scenes(pipe: minireuse.Pipeline) -> None:
    assert psnr(pipe.vae, np.stack([render(s) for s in UNSEEN])) >= 30


def test_diffusers_loads_it_unchanged_and_agrees(pipe: minireuse.Pipeline) -> None:
    reference = diffusers.StableDiffusionPipeline.from_pretrained(shipped_model(), torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 5, "guidance_scale": pipe.guidance_scale, "output_type": "latent"}
    expected = reference(PROMPT, latents=latents, **settings).images
    assert relative_error(pipe.generate(PROMPT, steps=5, latents=latents).latents, expected) < 1e-4


def test_the_same_seed_gives_the_same_image_alone_or_in_a_batch(pipe: minireuse.Pipeline) -> None:
    settings = {"steps": 4, "plan": hurry(4, select(pipe.sites)), "cache": ReuseCache(torch.float32)}
    batch = pipe.generate([PROMPT, "a star", "a pink ring"], seeds=[3, 4, 5], **settings).latents
    alone = pipe.generate("a star", seeds=4, **settings).latents
    assert relative_error(alone[0], batch[1]) < 1e-5


def test_every_word_of_the_vocabulary_is_one_token() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(Path(shipped_model()) / "tokenizer")
    for word in " ".join([*COLOURS, *SHAPES, *SIZES, *FILLS, *RELATIONS, "background"]).split():
        assert len(tokenizer(word)["input_ids"]) == 3, word
    assert tokenizer.model_max_length == 77

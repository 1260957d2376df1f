"""The model that ships: it shows its prompts, loads everywhere, and survives reuse."""

from __future__ import annotations

import itertools
import json
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
from minireuse.checkpoints.configs import read_schedule_config
from minireuse.evaluate.classifier import NONE, own_classifier
from minireuse.files import read_lines, shipped_model
from minireuse.plan import PREDICTION
from minireuse.policies import deepcache, hurry, phast, select
from minireuse.schedule import SD_SCHEDULE
from minireuse.search.plan_files import plans_of

from conftest import relative_error
from data import scene_at
from train_vae import psnr
from world import QUESTIONS, render

UNSEEN = read_lines(shipped_model() / "prompts" / "evaluation.txt")[-8:]
PROMPT = "snowy hills with two pines, a red house and mountains at sunset"


@pytest.fixture(scope="module")
def pipe() -> minireuse.Pipeline:
    return minireuse.load(device="cpu")


@pytest.fixture(scope="module")
def full(pipe: minireuse.Pipeline) -> np.ndarray:
    return pipe.generate(UNSEEN, seeds=list(range(len(UNSEEN)))).images


def image_psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_folder_is_small_and_complete() -> None:
    files = [p for p in shipped_model().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40e6
    assert {p.suffix for p in files} <= {".json", ".txt", ".safetensors", ".md"}


def followed(images: np.ndarray) -> float:
    """The share of the prompts' answers that the classifier finds."""
    classifier = own_classifier(None)
    assert classifier is not None
    return float(np.mean([share for share in classifier.follow(list(images), UNSEEN) if share is not None]))


def test_pictures_show_their_prompts(full: np.ndarray) -> None:
    assert followed(full) >= 0.85


def test_it_is_sampled_as_stable_diffusion_is(pipe: minireuse.Pipeline) -> None:
    config = json.loads((shipped_model() / "scheduler" / "scheduler_config.json").read_text())
    assert read_schedule_config(config) == SD_SCHEDULE
    assert pipe.guidance_scale == 7.5


def test_reuse_keeps_the_picture(pipe: minireuse.Pipeline, full: np.ndarray) -> None:
    plan = hurry(20, select(pipe.sites), k=10)
    reused = pipe.generate(UNSEEN, seeds=list(range(len(UNSEEN))), plan=plan)
    assert reused.cache_peak_bytes > 0
    assert np.mean([image_psnr(a, b) for a, b in zip(reused.images, full, strict=True)]) > 25
    assert followed(reused.images) >= 0.85


def test_searched_plans_ship(pipe: minireuse.Pipeline) -> None:
    """In these settings `phast` is a plan that was searched for them, not a neighbour's."""
    expected = [("map", k, 0) for k in (4, 7, 10)] + [("deep", 10, 0), ("deep", 10, 1)]
    policy = partial(phast, plans=plans_of(), sampler="ddim", model=pipe.fingerprint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says so where it takes the nearest
        for kind, k, order in expected:
            plan = policy(pipe.calls("ddim", 20), select(pipe.sites, kind=kind), k=k, order=order)
            assert (plan.reused, plan.order, plan.on(pipe.sites)) == (k, order, plan)


def test_phast_by_itself_is_close_in_little_time(pipe: minireuse.Pipeline, full: np.ndarray) -> None:
    """A third of the full sampler's calls are not made at all, and hardly anything is to be seen of it."""
    with pytest.warns(UserWarning, match=r"deep features and predictions, extrapolated, in .* 0\.[56]\d of"):
        plan = phast(20, pipe.sites, plans=plans_of(), model=pipe.fingerprint, spacing=pipe.schedule.spacing)
    assert plan.on([PREDICTION, *pipe.sites]).mask[:, plan.sites.index(PREDICTION)].sum() >= 6
    close = pipe.generate(UNSEEN[:2], seeds=[0, 1], plan=plan).images
    assert np.mean([image_psnr(a, b) for a, b in zip(close, full[:2], strict=True)]) > 35


def test_going_on_along_a_line_is_closer_than_holding(pipe: minireuse.Pipeline, full: np.ndarray) -> None:
    held = deepcache(20, pipe.sites)
    prompts, seeds = UNSEEN[:2], [0, 1]
    close = [
        np.mean([image_psnr(a, b) for a, b in zip(images, full[:2], strict=True)])
        for images in (pipe.generate(prompts, seeds=seeds, plan=replace(held, order=order)).images for order in (0, 1))
    ]
    assert close[1] > close[0] + 3


def test_vae_reconstructs_unseen_scenes(pipe: minireuse.Pipeline) -> None:
    scenes = [scene_at(1, i) for i in range(8)]
    assert psnr(pipe.vae, np.stack([render(s, np.random.default_rng(i)) for i, s in enumerate(scenes)])) >= 33


def test_diffusers_loads_it_unchanged_and_agrees(pipe: minireuse.Pipeline) -> None:
    reference = diffusers.StableDiffusionPipeline.from_pretrained(shipped_model(), torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 5, "guidance_scale": pipe.guidance_scale, "output_type": "latent"}
    expected = reference(PROMPT, latents=latents, **settings).images
    assert relative_error(pipe.generate(PROMPT, steps=5, latents=latents).latents, expected) < 1e-4


def test_the_same_seed_gives_the_same_image_alone_or_in_a_batch(pipe: minireuse.Pipeline) -> None:
    settings = {"steps": 4, "plan": hurry(4, select(pipe.sites)), "cache": ReuseCache(torch.float32)}
    batch = pipe.generate([PROMPT, "a lake", "two oaks"], seeds=[3, 4, 5], **settings).latents
    alone = pipe.generate("a lake", seeds=4, **settings).latents
    assert relative_error(alone[0], batch[1]) < 1e-5


def test_every_word_of_the_vocabulary_is_one_token() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(Path(shipped_model()) / "tokenizer")
    phrases = " ".join(itertools.chain(*QUESTIONS.values()))
    for word in {*phrases.split(), "with"} - {NONE}:
        assert len(tokenizer(word)["input_ids"]) == 3, word
    assert tokenizer.model_max_length == 77

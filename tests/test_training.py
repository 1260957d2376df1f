"""The trainer: interrupted runs equal unbroken ones, and the whole chain from scenes to a loadable folder runs."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minireuse
from minireuse.evaluate.classifier import own_classifier
from minireuse.text import TextEncoder
from minireuse.vae import VAE

import export
import train_classifier
import train_text
import train_unet
import train_vae
from data import pictures, scene_at
from trainer import EMA, learning_rate, train
from world import QUESTIONS


def fit(folder: Path, stop_at: int | None = None) -> nn.Module:
    """Fit a line to noisy data; `stop_at` raises in the middle of a run, as a kill would."""
    torch.manual_seed(0)
    module = nn.Linear(3, 1)

    def loss(step: int) -> dict[str, Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, generator=generator)
        return {"loss": (module(x) - x.sum(1, keepdim=True)).square().mean()}

    train("line", folder, module, loss, steps=40, peak_lr=0.1, ema_decay=0.9, save_every=10)
    return module


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    unbroken = fit(tmp_path / "a")
    for stop in (3, 17, 30, 38):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "b", stop_at=stop)
    resumed = fit(tmp_path / "b")
    assert torch.equal(unbroken.weight, resumed.weight)
    assert torch.equal(unbroken.bias, resumed.bias)
    assert not list(tmp_path.rglob("*.part"))


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[99] == 1.0
    assert rates[549] == pytest.approx(0.51, abs=0.01)
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_average_follows_the_parameters() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(module, 0.5)
    with torch.no_grad():
        module.weight.fill_(4.0)
        ema.values["weight"].fill_(0.0)
    ema.update(module, step=1000)
    assert ema.values["weight"].item() == 2.0


def test_standardised_latents_have_mean_0_and_variance_1_and_decode_alike() -> None:
    torch.manual_seed(0)
    vae = VAE(train_vae.CONFIG).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before, (_, spread) = vae.encode(images), vae.moments(images)
        decoded = vae.decode(before)
        mean, std = before.mean(dim=(0, 2, 3)), before.std(dim=(0, 2, 3))
        train_unet.standardise(vae, mean, std)
        after, (_, spread_after) = vae.encode(images), vae.moments(images)
        torch.testing.assert_close(after.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(after.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
        torch.testing.assert_close(vae.decode(after), decoded, atol=1e-4, rtol=1e-4)
        expected = torch.exp(0.5 * spread) / std[:, None, None]
        torch.testing.assert_close(torch.exp(0.5 * spread_after), expected, atol=1e-4, rtol=1e-4)


def test_crops_are_parts_of_the_images() -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(20, 128, 128, 3), dtype=np.uint8)
    early, late = train_vae.crops(images, 0, 100), train_vae.crops(images, 90, 100)
    assert early.shape == (16, 3, 64, 64)
    assert late.shape == (4, 3, 128, 128)
    whole = {train_vae.to_tensor(i[None]).numpy().tobytes() for i in images}
    assert all(x[None].contiguous().numpy().tobytes() in whole for x in late)


def test_a_text_encoder_learns_from_captions_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_unet.run_tokenizer(tmp_path / "tokenizer")
    text = TextEncoder(train_unet.text_config(tokenizer), tokenizer)
    before = text.encode(["a red house"])
    scenes = [scene_at(0, i) for i in range(4)]
    reader = train_text.Reader(text.model.config.hidden_size)
    train_text.train_text(text, reader, tmp_path, scenes, steps=60, batch=4, lr=1e-3, device="cpu")
    assert not torch.equal(text.encode(["a red house"]), before)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_latents_are_made_of_whole_scenes_and_of_scenes_at_half_their_size() -> None:
    vae = VAE(train_vae.CONFIG).eval()
    images = np.full((3, 128, 128, 3), 200, dtype=np.uint8)
    images[:, ::2] = 100  # each 2x2 averages to 150
    half = train_unet.encode_all(vae, images, 2, "cpu")
    assert half.shape == (3, 4, 16, 16)
    with torch.no_grad():
        expected = vae.encode(torch.full((3, 3, 64, 64), 150 / 127.5 - 1))
    torch.testing.assert_close(half, expected, atol=1e-4, rtol=1e-4)
    assert train_unet.encode_all(vae, images, 1, "cpu").shape == (3, 4, 32, 32)


def test_small_things_are_counted_where_they_stand() -> None:
    marks = np.zeros((1, 128, 128), dtype=np.uint8)
    marks[0, :4, :2], marks[0, 8:12, 8:12], marks[0, 60:, 60:] = 1, 5, 7  # half a tree, a balloon, mountains
    small = train_unet.small_things(marks, 1)
    assert small.shape == (1, 1, 32, 32)
    assert small[0, 0, 0, 0] == 0.5
    assert small[0, 0, 2, 2] == 1
    assert small.sum() == 1.5


def test_latents_of_another_vae_are_not_mistaken_for_ones_own(tmp_path: Path) -> None:
    train_vae.main(["--out", str(tmp_path), "--steps", "1", "--images", "16", "--samples", "0"])
    own, _, _ = train_unet.prepare(tmp_path, 8, "cpu")
    assert own.x_0.shape == (8, 4, 32, 32)
    torch.manual_seed(1)
    (tmp_path / "other").mkdir()
    save_file(VAE(train_vae.CONFIG).state_dict(), tmp_path / "other" / "diffusion_pytorch_model.safetensors")
    other, half, vae = train_unet.prepare(tmp_path, 8, "cpu", tmp_path / "other")
    assert half.x_0.shape == (8, 4, 16, 16)
    assert not torch.allclose(own.x_0, other.x_0, atol=1e-2)
    expected = train_unet.encode_all(vae, pictures(tmp_path, 8)[0], 1, "cpu")
    torch.testing.assert_close(other.x_0, expected, atol=1e-4, rtol=1e-4)


def test_the_chain_from_scenes_to_a_folder_that_loads(tmp_path: Path) -> None:
    run = ["--out", str(tmp_path / "run")]
    train_classifier.main([*run, "--steps", "1", "--images", "32", "--held-out", "8", "--batch", "8"])
    train_vae.main([*run, "--steps", "1", "--images", "32", "--samples", "0"])
    stages = ["--text-steps", "1", "--half-steps", "1", "--steps", "2"]
    train_unet.main([*run, *stages, "--scenes", "32", "--samples", "0", "--batch", "4", "--device", "cpu"])
    folder = tmp_path / "model"
    export.main(["--run", str(tmp_path / "run"), "--out", str(folder)])
    with pytest.raises(SystemExit, match="exists; name a new folder"):
        export.main(["--run", str(tmp_path / "run"), "--out", str(folder)])
    assert not list(tmp_path.rglob("*.part"))
    again = ["--out", str(tmp_path / "again"), "--start", str(folder), "--scenes", "32", "--batch", "4"]
    train_unet.main([*again, "--steps", "1", "--lr", "0", "--seed", "1", "--samples", "0", "--device", "cpu"])
    export.main(["--run", str(tmp_path / "again"), "--out", str(tmp_path / "same")])
    for part in ("unet", "vae", "text_encoder"):  # it went on from there, and learned nothing at this rate
        (first, second) = (load_file(next((f / part).glob("*.safetensors"))) for f in (folder, tmp_path / "same"))
        assert all(torch.equal(first[name], second[name]) for name in first), part
    result = minireuse.load(folder, device="cpu").generate("a red house", steps=2)
    assert result.images.shape == (1, 128, 128, 3)
    assert diffusers.StableDiffusionPipeline.from_pretrained(folder).unet.config.sample_size == 32
    classifier = own_classifier(folder)
    assert classifier is not None
    assert classifier.read(list(result.images))[0].keys() == QUESTIONS.keys()
    assert len((folder / "prompts" / "evaluation.txt").read_text().splitlines()) == 400

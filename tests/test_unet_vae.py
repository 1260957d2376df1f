"""The networks against diffusers, with the same random weights."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

from minireuse.checkpoints.configs import write_unet_config, write_vae_config
from minireuse.config import UNetConfig
from minireuse.layers import timestep_embedding
from minireuse.unet import UNet
from minireuse.vae import VAE

from conftest import TINY_UNET, TINY_VAE, randomise, relative_error

SD2_LIKE = UNetConfig(
    block_out_channels=(32, 64, 64),
    attention=(True, True, False),
    layers_per_block=1,
    heads=(1, 2, 4),
    cross_attention_dim=48,
    linear_projection=True,
    norm_groups=16,
)


@pytest.mark.parametrize("config", [TINY_UNET, SD2_LIKE], ids=["sd1-like", "sd2-like"])
def test_unet_equals_diffusers(config: UNetConfig) -> None:
    reference = randomise(diffusers.UNet2DConditionModel.from_config(write_unet_config(config)))
    unet = UNet(config).eval()
    unet.load_state_dict(reference.state_dict())
    x, context = torch.randn(2, 4, 8, 12), torch.randn(2, 77, config.cross_attention_dim)
    for t in (torch.tensor([0, 999]), 501):
        with torch.no_grad():
            expected = reference(x, t, context).sample
            assert relative_error(unet(x, t, context), expected) < 1e-5


def test_unet_takes_fractional_timesteps() -> None:
    """Solvers with inner nodes call the model between two training timesteps."""
    torch.testing.assert_close(timestep_embedding(torch.tensor([0.5]), 4)[0, 0], torch.tensor(0.5).cos())
    reference = randomise(diffusers.UNet2DConditionModel.from_config(write_unet_config(TINY_UNET)))
    unet = UNet(TINY_UNET).eval()
    unet.load_state_dict(reference.state_dict())
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    with torch.no_grad():
        assert relative_error(unet(x, 120.25, context), reference(x, torch.tensor(120.25), context).sample) < 1e-5


def test_vae_equals_diffusers_both_ways() -> None:
    reference = randomise(diffusers.AutoencoderKL.from_config(write_vae_config(TINY_VAE)))
    vae = VAE(TINY_VAE).eval()
    vae.load_state_dict(reference.state_dict())
    images, latents, noise = torch.randn(2, 3, 16, 24), torch.randn(2, 4, 8, 12), torch.randn(2, 4, 8, 12)
    factor = TINY_VAE.scaling_factor
    with torch.no_grad():
        posterior = reference.encode(images).latent_dist
        assert relative_error(vae.encode(images), factor * posterior.mean) < 1e-5
        assert relative_error(vae.encode(images, noise), factor * (posterior.mean + posterior.std * noise)) < 1e-5
        assert relative_error(vae.decode(latents), reference.decode(latents / factor).sample) < 1e-5


def test_gradients_reach_every_parameter() -> None:
    unet, vae = randomise(UNet(TINY_UNET)), randomise(VAE(TINY_VAE))
    unet(torch.randn(1, 4, 8, 8), 10, torch.randn(1, 5, 32)).square().mean().backward()
    vae.decode(vae.encode(torch.randn(1, 3, 16, 16), torch.randn(1, 4, 8, 8))).square().mean().backward()
    for module in (unet, vae):
        unreached = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        # A shift of all keys alike leaves the softmax unchanged, so the key bias of the VAE's attention has no effect.
        assert [n for n in unreached if not n.endswith("to_k.bias")] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(dtype: torch.dtype) -> None:
    unet: nn.Module = randomise(UNet(TINY_UNET))
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = unet(x, 10, context)
        half = unet.to(dtype)(x.to(dtype), 10, context.to(dtype))
    assert half.dtype == dtype
    assert relative_error(half.float(), expected) < (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_unet_on_cuda_equals_cpu() -> None:
    unet = randomise(UNet(TINY_UNET))
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = unet(x, 10, context)
        assert relative_error(unet.cuda()(x.cuda(), 10, context.cuda()).cpu(), expected) < 1e-3

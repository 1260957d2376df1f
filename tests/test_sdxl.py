"""Stable Diffusion XL against diffusers and transformers: networks, files, texts and whole pictures."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from minireuse.checkpoints import ldm
from minireuse.checkpoints.configs import write_unet_config, write_vae_config
from minireuse.config import SDXL_UNET, SDXL_VAE
from minireuse.text import TextEncoder
from minireuse.unet import UNet
from minireuse.vae import VAE

from conftest import TINY_XL_UNET, randomise, relative_error
from ldm_layout import XL, Sizes, layout, unused

# --- networks ------------------------------------------------------------------------------------------------------


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Without the prefix that transformers 4 gives to the parameters of one text model, and transformers 5 does not."""
    return {key.removeprefix("text_model."): tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def test_unet_equals_diffusers() -> None:
    reference = randomise(diffusers.UNet2DConditionModel.from_config(write_unet_config(TINY_XL_UNET)))
    unet = UNet(TINY_XL_UNET).eval()
    unet.load_state_dict(reference.state_dict())
    x, context, pooled = torch.randn(2, 4, 8, 12), torch.randn(2, 77, 56), torch.randn(2, 20)
    sizes = torch.tensor([64.0, 96, 0, 0, 64, 96]).expand(2, -1)
    for t in (torch.tensor([0, 999]), 501):
        with torch.no_grad():
            more = {"text_embeds": pooled, "time_ids": sizes}
            expected = reference(x, t, context, added_cond_kwargs=more).sample
            added = unet.added(pooled, height=64, width=96)
            assert added is not None and added.shape == (2, 20 + 6 * 8)
            assert relative_error(unet(x, t, context, added=added), expected) < 1e-5
            other = unet(x, t, context, added=unet.added(pooled, height=96, width=64))
            assert relative_error(other, expected) > 1e-4  # height and width are not alike


def test_unet_says_what_it_is_not_told(smallest_unet: UNet) -> None:
    x, context = torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 56)
    with pytest.raises(ValueError, match="this U-Net also reads the pooled text and sizes; pass what"):
        UNet(TINY_XL_UNET)(x, 1, context)
    with pytest.raises(ValueError, match="this U-Net reads no pooled text and sizes; leave out added"):
        smallest_unet(x, 1, torch.zeros(1, 5, 32), added=torch.zeros(1, 68))


def test_networks_have_the_parameters_of_the_published_model() -> None:
    second = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        projection_dim=1280,
    )
    with torch.device("meta"):
        pairs = (
            (UNet(SDXL_UNET), diffusers.UNet2DConditionModel.from_config(write_unet_config(SDXL_UNET)), 2_567_463_684),
            (VAE(SDXL_VAE), diffusers.AutoencoderKL.from_config(write_vae_config(SDXL_VAE)), 83_653_863),
            (
                TextEncoder(CLIPTextConfig(**ldm.SDXL_TEXT_2), projects=True).model,
                CLIPTextModelWithProjection(second),
                694_659_840,
            ),
        )
    for ours, theirs, parameters in pairs:
        assert shapes_of(ours) == shapes_of(theirs)
        assert sum(p.numel() for p in ours.parameters()) == parameters


# --- the original layout -------------------------------------------------------------------------------------------


def convert(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """An original file through diffusers' converters: its four parts, under unet., vae., text. and text_2."""
    config = {"layers_per_block": 2, "addition_embed_type": "text_time"}
    levels = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    first = {key: tensor for key, tensor in file.items() if "embedders.0" in key}
    parts = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(dict(file), config),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(file), levels),
        "text": single_file_utils.convert_ldm_clip_checkpoint(first, remove_prefix=""),
        "text_2": single_file_utils.convert_open_clip_checkpoint(None, dict(file), "conditioner.embedders.1.model."),
    }
    return {
        f"{part}.{key.removeprefix('text_model.')}": tensor for part, state in parts.items() for key, tensor in state.items()
    }


def test_original_names_and_shapes_are_those_of_the_full_model() -> None:
    with torch.device("meta"):
        modules = {
            "unet": UNet(SDXL_UNET),
            "vae": VAE(SDXL_VAE),
            "text": TextEncoder(CLIPTextConfig(**ldm.SD1_TEXT)).model,
            "text_2": TextEncoder(CLIPTextConfig(**ldm.SDXL_TEXT_2), projects=True).model,
        }
        file = {key: torch.empty(shape) for key, shape in layout(XL).items()}
        expected = {key: tuple(tensor.shape) for key, tensor in convert(file).items()}
    ours = {f"{part}.{key}": shape for part, module in modules.items() for key, shape in shapes_of(module).items()}
    pointwise = {key: shape[:2] if shape[2:] == (1, 1) and ".attentions." in key else shape for key, shape in expected.items()}
    assert pointwise == ours
    placed = set()
    for key in file:
        part, targets = ldm.translate(key)
        assert not ldm.ignored(key), key
        placed |= {f"{part}.{name.removeprefix('text_model.')}" for name, _ in targets}
    assert placed == set(ours)
    assert all(ldm.ignored(key) or not ldm.translate(key)[1] for key in unused(XL))

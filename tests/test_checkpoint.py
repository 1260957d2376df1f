"""Loading against diffusers and transformers: their modules, their files, and their converters of original files."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import huggingface_hub.constants
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import minireuse
from minireuse.checkpoints import ldm, tokenizer
from minireuse.checkpoints import parts as checkpoint
from minireuse.checkpoints.configs import write_unet_config, write_vae_config
from minireuse.checkpoints.fields import ConfigError
from minireuse.checkpoints.parts import CheckpointError, Parts, load_parts
from minireuse.config import SD1_UNET, SD2_UNET, SD_VAE, VAEConfig
from minireuse.schedule import SD_SCHEDULE, Schedule
from minireuse.text import TextEncoder
from minireuse.unet import UNet
from minireuse.vae import VAE

from conftest import edit_json, randomise, relative_error
from ldm_layout import FULL, Sizes, alphas_cumprod, layout, random_tensors, unused

FAMILIES = [1, 2]
UNETS = {1: SD1_UNET, 2: SD2_UNET}
TEXTS = {1: ldm.SD1_TEXT, 2: ldm.SD2_TEXT}


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def bare(state: dict[str, Any]) -> dict[str, Any]:
    """Without the prefix that transformers 4 gives to text parameters, and transformers 5 does not."""
    return {key.removeprefix("text_model."): value for key, value in state.items()}


def assert_same_tensors(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(given) == set(expected)
    for key, tensor in given.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")


# --- full sizes, on the meta device --------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "parameters"), [(1, 859_520_964), (2, 865_910_724)])
def test_unet_has_the_parameters_of_diffusers(family: int, parameters: int) -> None:
    with torch.device("meta"):
        ours = UNet(UNETS[family])
        theirs = diffusers.UNet2DConditionModel.from_config(write_unet_config(UNETS[family]))
    assert shapes_of(ours) == shapes_of(theirs)
    assert sum(p.numel() for p in ours.parameters()) == parameters  # of the published model


def test_vae_has_the_parameters_of_diffusers() -> None:
    with torch.device("meta"):
        ours = VAE(SD_VAE)
        theirs = diffusers.AutoencoderKL.from_config(write_vae_config(SD_VAE))
    assert shapes_of(ours) == shapes_of(theirs)
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863  # of the published model


@pytest.mark.parametrize(("family", "parameters"), [(1, 123_060_480), (2, 340_387_840)])
def test_text_encoder_has_the_parameters_of_transformers(family: int, parameters: int) -> None:
    published = {1: (768, 3072, 12, 12, "quick_gelu"), 2: (1024, 4096, 23, 16, "gelu")}[family]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    config = CLIPTextConfig(vocab_size=49408, **dict(zip(names, published, strict=True)))
    with torch.device("meta"):
        ours, theirs = TextEncoder(CLIPTextConfig(**TEXTS[family])).model, CLIPTextModel(config)
    assert shapes_of(ours) == shapes_of(theirs)
    assert sum(p.numel() for p in ours.parameters()) == parameters  # of the published model
    assert ours.config.hidden_act == config.hidden_act
    assert ours.config.num_attention_heads == config.num_attention_heads


# --- the original layout's names -----------------------------------------------------------------------------------


def placed_by_diffusers(sizes: Sizes) -> dict[str, tuple[str, int]]:
    """Where diffusers' own converter puts each tensor: new name -> (original name, which part of a fused one).

    Every tensor is a stand-in of few values that tell its number, with as many dimensions as the real one has.
    """
    keys = list(layout(sizes))
    file = {}
    for number, (key, shape) in enumerate(layout(sizes).items()):
        fused = "in_proj" in key
        value = 10.0 * number + torch.arange(3.0 if fused else 1.0)
        file[key] = value.reshape([-1] + [1] * (len(shape) - 1))
    converted = convert(sizes, file, text_width=1)
    numbers = {key: int(tensor.item()) for key, tensor in converted.items()}
    return {key: (keys[number // 10], number % 10) for key, number in numbers.items()}


def convert(sizes: Sizes, file: dict[str, Tensor], text_width: int) -> dict[str, Tensor]:
    """An original file through diffusers' converters: all three parts, under unet., vae. and text."""
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(file), {"layers_per_block": 2})
    vae_config = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(file), vae_config)
    if sizes.second:
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=text_width))
        text = single_file_utils.convert_open_clip_checkpoint(model, dict(file))
        text.pop("text_projection.weight", None)
    else:
        text = single_file_utils.convert_ldm_clip_checkpoint(dict(file))
        text.pop("text_model.embeddings.position_ids", None)
    parts = {"unet": unet, "vae": vae, "text": bare(text)}
    return {f"{part}.{key}": tensor for part, state in parts.items() for key, tensor in state.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_original_names_go_where_diffusers_puts_them(family: int) -> None:
    sizes = FULL[family]
    placed: dict[str, tuple[str, int]] = {}
    for key in layout(sizes):
        part, targets = ldm.translate(key)
        assert len(targets) == (3 if "in_proj" in key else 1), key
        for name, rows in targets:
            whole = f"{part}.{name.removeprefix('text_model.') if part == 'text' else name}"
            assert whole not in placed, whole
            placed[whole] = (key, 0 if rows is None else rows[0])
    assert placed == placed_by_diffusers(sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_original_shapes_are_those_of_the_full_models(family: int) -> None:
    sizes = FULL[family]
    with torch.device("meta"):
        parts = {
            "unet": UNet(UNETS[family]),
            "vae": VAE(SD_VAE),
            "text": TextEncoder(CLIPTextConfig(**TEXTS[family])).model,
        }
    wanted = {part: bare(shapes_of(module)) for part, module in parts.items()}
    for key, shape in layout(sizes).items():
        part, targets = ldm.translate(key)
        for name, rows in targets:
            own = wanted[part].pop(name.removeprefix("text_model."))
            split = shape if rows is None else (shape[0] // rows[1], *shape[1:])
            if part == "vae" and ".attentions." in name and len(shape) == 4:
                split = split[:2]  # a 1x1 convolution there, a linear layer here
            assert own == split, key
    assert not any(wanted.values())


def test_proj_in_is_a_convolution_in_the_first_family_and_linear_in_the_second() -> None:
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    assert layout(FULL[1])[key] == (1280, 1280, 1, 1)
    assert layout(FULL[2])[key] == (1280, 1280)


@pytest.mark.parametrize("family", FAMILIES)
def test_unused_tensors_are_ignored_and_used_ones_are_not(family: int) -> None:
    sizes = FULL[family]
    assert all(ldm.ignored(key) or not ldm.translate(key)[1] for key in unused(sizes))
    assert not any(ldm.ignored(key) for key in layout(sizes))
    assert not any(ldm.translate(key)[0] == "" for key in layout(sizes))


# --- original files, read ------------------------------------------------------------------------------------------

TINY_UNETS = {
    # Widths repeat where the full ones do, so that the same blocks have shortcuts.
    1: replace(SD1_UNET, block_out_channels=(8, 16, 32, 32), heads=(2, 2, 2, 2), norm_groups=8),
    2: replace(SD2_UNET, block_out_channels=(8, 16, 32, 32), heads=(2, 2, 4, 4), norm_groups=8),
}
TINY = {
    family: replace(full, unet=(8, 16, 32, 32), vae=(8, 16, 32, 32), text=32, layers=2, vocabulary=1024)
    for family, full in FULL.items()
}


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may depend on what is cached here, nor on a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two families at a width that a test can afford; contexts stay 768 and 1024 wide, which tells them apart."""
    monkeypatch.setattr(checkpoint, "SD1_UNET", TINY_UNETS[1])
    monkeypatch.setattr(checkpoint, "SD2_UNET", TINY_UNETS[2])
    monkeypatch.setattr(checkpoint, "SD_VAE", VAEConfig(block_out_channels=(8, 16, 32, 32), norm_groups=8))
    narrow = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    narrow |= {"vocab_size": 1024, "bos_token_id": 1022, "eos_token_id": 1023}
    monkeypatch.setattr(ldm, "SD1_TEXT", ldm.SD1_TEXT | narrow)
    monkeypatch.setattr(ldm, "SD2_TEXT", ldm.SD2_TEXT | narrow)


@pytest.fixture(scope="module")
def contents() -> dict[int, dict[str, Tensor]]:
    """Tiny original files of both families, as tensors."""
    return {family: random_tensors(layout(TINY[family]) | unused(TINY[family]), seed=family) for family in FAMILIES}


@pytest.fixture
def original(
    tiny: None, contents: dict[int, dict[str, Tensor]], tmp_path: Path, tokenizer_folder: Path
) -> Callable[..., Parts]:
    """Write an original file with some tensors changed or (None) left out, and load it."""

    def load(family: int, changes: dict[str, Tensor | None] | None = None, **options: Any) -> Parts:
        path = tmp_path / f"sd{family}.safetensors"
        tensors = contents[family] | (changes or {})
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)
        return load_parts(path, options.pop("dtype", torch.float32), tokenizer=tokenizer_folder, **options)

    return load


def states(parts: Parts) -> dict[str, Tensor]:
    modules = {"unet": parts.unet, "vae": parts.vae, "text": parts.text.model}
    return {f"{part}.{key}": t for part, module in modules.items() for key, t in bare(module.state_dict()).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_original_file_loads_as_diffusers_converts_it(
    family: int, original: Callable[..., Parts], contents: dict[int, dict[str, Tensor]]
) -> None:
    parts = original(family)
    assert_same_tensors(states(parts), convert(TINY[family], contents[family], text_width=32))
    assert parts.unet.config.linear_projection is (family == 2)
    assert not any(p.is_meta for module in (parts.unet, parts.vae, parts.text) for p in module.parameters())


def test_original_file_gives_the_images_of_diffusers(
    original: Callable[..., Parts], contents: dict[int, dict[str, Tensor]]
) -> None:
    # Wild weights would only blur the comparison.
    small = {key: tensor if key == "alphas_cumprod" else 0.2 * tensor for key, tensor in contents[2].items()}
    parts = original(2, small)
    converted = convert(TINY[2], small, text_width=32)
    unet = diffusers.UNet2DConditionModel.from_config(write_unet_config(TINY_UNETS[2])).eval()
    unet.load_state_dict({k.removeprefix("unet."): t for k, t in converted.items() if k.startswith("unet.")})
    x, t, context = torch.randn(2, 4, 16, 8), torch.tensor([7, 801]), torch.randn(2, 5, 1024)
    with torch.no_grad():
        assert relative_error(parts.unet(x, t, context), unet(x, t, context).sample) <= 1e-4


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float16), (torch.float64, torch.float32)],
)
def test_any_stored_precision_becomes_the_one_asked_for(
    stored: torch.dtype, wanted: torch.dtype, original: Callable[..., Parts], contents: dict[int, dict[str, Tensor]]
) -> None:
    stored_tensors = {key: tensor.to(stored) for key, tensor in contents[2].items()}
    parts = original(2, stored_tensors, dtype=wanted)
    expected = convert(TINY[2], stored_tensors, text_width=32)
    assert_same_tensors(states(parts), {key: tensor.to(wanted) for key, tensor in expected.items()})


@pytest.mark.parametrize(
    ("family", "spread", "expected", "size"),
    [(1, 0.5, "epsilon", 64), (2, 0.08, "epsilon", 64), (2, 0.10, "v_prediction", 96)],
)
def test_prediction_type_and_size_are_told_from_the_spread_of_a_bias(
    family: int, spread: float, expected: str, size: int, original: Callable[..., Parts]
) -> None:
    bias = 0.3 + spread * torch.tensor([1.0, -1.0] * 4)  # its standard deviation is `spread` exactly
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    parts = original(family, {key: bias})
    assert parts.schedule.prediction_type == expected
    assert parts.unet.config.sample_size == size


@pytest.mark.parametrize(("family", "prediction"), [(1, "v_prediction"), (2, "epsilon")])
def test_prediction_type_given_overrides_the_guess(
    family: int, prediction: str, original: Callable[..., Parts]
) -> None:
    assert original(family, prediction_type=prediction).schedule.prediction_type == prediction


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_that_of_each_family_and_leaves_words_alone(
    family: int, original: Callable[..., Parts], tokenizer_folder: Path
) -> None:
    vocabulary = json.loads((tokenizer_folder / "vocab.json").read_text())
    end, exclamation = vocabulary["<|endoftext|>"], vocabulary["!</w>"]
    ids = original(family).text.tokenize(["a red! circle !"])[0].tolist()
    length = ids.index(end) + 1
    assert ids[:length].count(exclamation) == 2  # not the bare "!" that pads, whose id is 0
    assert ids[length:] == [0 if family == 2 else end] * (77 - length)


UNKNOWN = [
    "model.diffusion_model.what",
    "model.diffusion_model.what.weight",
    "model.diffusion_model.input_blocks.1.0.what",
    "model.diffusion_model.input_blocks.1.0.in_layers.7.weight",
    "model.diffusion_model.input_blocks.0.1.proj_in.weight",
    "model.diffusion_model.input_blocks.10.1.proj_in.weight",
    "model.diffusion_model.label_emb.0.0.weight",
    "first_stage_model.encoder.mid.attn_1.what",
    "first_stage_model.encoder.mid.attn_1.what.weight",
    "first_stage_model.encoder.down.0.what.weight",
    "first_stage_model.decoder.up.0.block.2.nin_shortcut.what",
    "cond_stage_model.transformer.text_model.what.weight",
    "cond_stage_model.model.transformer.resblocks.0.what.weight",
    "control_model.input_blocks.0.0.weight",
]


def test_unknown_keys_are_translated_to_no_name_of_the_models() -> None:
    for sizes in FULL.values():
        known = {target for key in layout(sizes) for target, _ in ldm.translate(key)[1]}
        for key in UNKNOWN:
            assert not ldm.ignored(key), key
            assert known.isdisjoint(name for name, _ in ldm.translate(key)[1]), key


@pytest.mark.parametrize(("family", "key"), [(2, UNKNOWN[0]), (1, UNKNOWN[4]), (2, UNKNOWN[9]), (1, UNKNOWN[11])])
def test_unknown_key_is_named_with_its_file(family: int, key: str, original: Callable[..., Parts]) -> None:
    with pytest.raises(CheckpointError, match=rf"sd{family}\.safetensors") as error:
        original(family, {key: torch.zeros(4)})
    assert key in str(error.value)


MISSING = [
    {
        "model.diffusion_model.out.2.weight": "conv_out.weight",
        ldm.PREDICTION_KEY: "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
    },
    {"first_stage_model.quant_conv.bias": "quant_conv.bias"},
    {"cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias": "layers.1.self_attn.k_proj.bias"},
]


@pytest.mark.parametrize("missing", MISSING)
def test_missing_keys_are_named_with_their_file(missing: dict[str, str], original: Callable[..., Parts]) -> None:
    with pytest.raises(CheckpointError, match=r"sd2\.safetensors lacks") as error:
        original(2, dict.fromkeys(missing))
    for name in missing.values():
        assert name in str(error.value)


def test_file_without_a_vae_is_named(original: Callable[..., Parts]) -> None:
    keys = [key for key in layout(TINY[1]) if key.startswith("first_stage_model.")]
    with pytest.raises(CheckpointError, match=r"sd1\.safetensors lacks decoder.* and \d+ more"):
        original(1, dict.fromkeys(keys))


MIS_SHAPED: list[dict[str, tuple[int, ...]]] = [
    {
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (8, 9, 3, 3),
        "model.diffusion_model.time_embed.0.weight": (32,),
    },
    {"first_stage_model.encoder.mid.attn_1.q.weight": (32, 32, 3, 3)},
    {"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (97, 32)},
    {"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": (2,)},
    {"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": ()},
]


@pytest.mark.parametrize("shapes", MIS_SHAPED)
def test_mis_shaped_keys_are_named_with_their_file(
    shapes: dict[str, tuple[int, ...]], original: Callable[..., Parts]
) -> None:
    with pytest.raises(CheckpointError, match=r"sd2\.safetensors has mis-shaped") as error:
        original(2, {key: torch.zeros(shape) for key, shape in shapes.items()})
    for key in shapes:
        assert key in str(error.value)


def test_two_tensors_for_one_place_are_refused_unless_they_are_equal(
    original: Callable[..., Parts], contents: dict[int, dict[str, Tensor]]
) -> None:
    first = "model.diffusion_model.output_blocks.3.1.norm.weight"
    second = first.replace(".3.1.", ".3.2.")
    original(1, {second: contents[1][first].clone()})
    with pytest.raises(CheckpointError, match="two names of the same tensor, with different values") as error:
        original(1, {second: torch.zeros(32)})
    assert first in str(error.value)
    assert second in str(error.value)


def test_quantized_weights_are_refused(original: Callable[..., Parts]) -> None:
    key = "model.diffusion_model.time_embed.0.weight"
    with pytest.raises(CheckpointError, match=rf"sd1\.safetensors.*{key} is torch\.int8"):
        original(1, {key: torch.zeros(32, 8, dtype=torch.int8)})


# Other names of the same tensors: where a file of the original layout has the first, it may have the second.
RENAMED: list[tuple[int, str, str]] = [
    (
        1,
        r"(first_stage_model.*\.attn_1)\.(q|k|v)\.",
        r"\1.to_\2.",
    ),  # as newer diffusers, converted back
    (1, r"(first_stage_model.*\.attn_1)\.proj_out\.", r"\1.to_out.0."),
    (2, r"(first_stage_model.*\.attn_1)\.q\.", r"\1.query."),
    (2, r"(first_stage_model.*)\.mid\.attn_1\.norm\.", r"\1.mid_block.attentions.0.group_norm."),
    (1, r"^cond_stage_model\.transformer\.text_model\.", "cond_stage_model.transformer."),
    (1, r"^cond_stage_model\.", "conditioner.embedders.0."),
    (2, r"^cond_stage_model\.model\.", "conditioner.embedders.0.model."),  # SD 2.1 Turbo
    (1, r"^model\.diffusion_model\.", "model.diffusion_model._orig_mod."),
    (2, r"^", "_orig_mod."),
    (2, r"^cond_stage_model\.", "cond_stage_model._orig_mod."),
    (1, r"^model\.diffusion_model\.input_blocks\.0\.0\.", "model.diffusion_model.conv_in."),
]


@pytest.mark.parametrize(("family", "old", "new"), RENAMED, ids=lambda value: str(value)[-40:])
def test_other_names_of_the_same_tensors_are_read(
    family: int, old: str, new: str, original: Callable[..., Parts], contents: dict[int, dict[str, Tensor]]
) -> None:
    renamed = {key: re.sub(old, new, key) for key in contents[family] if re.search(old, key)}
    changes: dict[str, Tensor | None] = dict.fromkeys(renamed)
    given = original(family, changes | {renamed[key]: contents[family][key] for key in renamed})
    assert renamed
    assert_same_tensors(states(given), convert(TINY[family], contents[family], text_width=32))


@pytest.mark.parametrize("kernel", [True, False])
def test_matrices_and_pointwise_convolutions_are_the_same(
    kernel: bool, original: Callable[..., Parts], contents: dict[int, dict[str, Tensor]]
) -> None:
    """Family 1 has convolutions before and after its transformers, family 2 matrices; the VAE's may be either."""
    family = 2 if kernel else 1
    changes = {
        key: tensor[:, :, None, None] if kernel else tensor[:, :, 0, 0]
        for key, tensor in contents[family].items()
        if re.search(r"proj_(in|out)\.weight|attn_1\.(q|k|v)\.weight|quant_conv\.weight", key)
        and tensor.ndim == (2 if kernel else 4)
    }
    assert len(changes) > 20
    assert_same_tensors(states(original(family, changes)), states(original(family)))


LEFT_OVER = {
    "embedding_manager.initial_embeddings.*.weight": (1, 768),
    "embedding_manager.string_to_param_dict.*": (1, 768),
    "global_step": (),
    "first_stage_model.loss.discriminator.main.0.weight": (4, 3, 4, 4),
    "first_stage_model.model_ema.decay": (),
    "first_stage_model.model_ema.encoderconv_inweight": (8, 3, 3, 3),
    "cond_stage_model.transformer.text_projection.weight": (32, 32),
    "cond_stage_model.logit_scale": (),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_training_and_other_tools_leave_in_a_file_is_not_read(family: int, original: Callable[..., Parts]) -> None:
    left: dict[str, Tensor | None] = {key: torch.zeros(shape) for key, shape in LEFT_OVER.items()}
    assert_same_tensors(states(original(family, left)), states(original(family)))


@pytest.mark.parametrize("channels", [9, 5, 8])
def test_single_files_of_other_tasks_are_refused_as_folders_are(channels: int, original: Callable[..., Parts]) -> None:
    """Inpainting, depth, and instructions: the first convolution has more channels."""
    message = (
        rf"sd1\.safetensors: the U-Net reads {channels} channels and writes 4, the VAE's .* they must agree: inpai"
    )
    with pytest.raises(CheckpointError, match=message):
        original(1, {ldm.FIRST_KEY: torch.zeros(8, channels, 3, 3)})


@pytest.mark.parametrize("key", ["model.diffusion_model.label_emb.0.0.weight", "control_model.input_blocks.0.0.weight"])
def test_no_message_advises_to_remove_what_another_model_needs(key: str, original: Callable[..., Parts]) -> None:
    with pytest.raises(CheckpointError, match=rf"has unknown .*{key}; it holds another model than") as error:
        original(1, {key: torch.zeros(4)})
    assert "remove" not in str(error.value)


def zero_snr(table: Tensor) -> Tensor:
    """arXiv 2305.08891, algorithm 1."""
    root = table.double().sqrt()
    return (((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2).float()


def as_sigmas(table: Tensor) -> Tensor:
    return ((1 - table.double()) / table.double()).sqrt().float()


SHIFTED = alphas_cumprod().double().pow(1.3).float()  # of no known formula


@pytest.mark.parametrize(
    ("tensors", "expected", "atol"),
    [
        ({"alphas_cumprod": zero_snr(alphas_cumprod())}, zero_snr(alphas_cumprod()), 1e-6),
        ({"alphas_cumprod": zero_snr(alphas_cumprod()).half()}, zero_snr(alphas_cumprod()), 1e-6),
        ({"alphas_cumprod": zero_snr(alphas_cumprod()).bfloat16()}, zero_snr(alphas_cumprod()), 1e-6),
        ({"alphas_cumprod": alphas_cumprod(power=1)}, alphas_cumprod(power=1), 1e-6),
        ({"alphas_cumprod": SHIFTED}, SHIFTED, 0),
        ({"alphas_cumprod": SHIFTED[:500].clone()}, SHIFTED[:500], 0),
        ({"alphas_cumprod": None, "denoiser.sigmas": as_sigmas(SHIFTED)}, SHIFTED, 1e-6),
    ],
)
def test_a_file_with_a_schedule_of_its_own_is_sampled_with_it(
    tensors: dict[str, Tensor | None], expected: Tensor, atol: float, original: Callable[..., Parts]
) -> None:
    with pytest.warns(UserWarning, match=r"sd1\.safetensors has a noise schedule of its own .*, which is used"):
        parts = original(1, tensors)
    table = Schedule.from_config(parts.schedule).alphas_cumprod
    torch.testing.assert_close(table, expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", ["alphas_cumprod", "denoiser.sigmas"])
def test_rounding_makes_no_schedule_of_its_own(key: str, dtype: torch.dtype, original: Callable[..., Parts]) -> None:
    rounded = {"alphas_cumprod": alphas_cumprod(), "denoiser.sigmas": as_sigmas(alphas_cumprod())}[key].to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for tensor in (rounded, rounded.float()):  # a file may have been saved in half precision, and then in full
            assert original(1, {"alphas_cumprod": None, key: tensor}).schedule == SD_SCHEDULE


@pytest.mark.parametrize(
    "table",
    [
        torch.zeros(1000),
        torch.linspace(0.1, 0.9, 1000),
        torch.full((1000,), torch.nan),
        torch.linspace(1.5, 0, 1000),
        torch.zeros(0),
        torch.zeros(3, 3),
        torch.tensor(0.5),
        torch.arange(1000),
    ],
)
def test_a_table_that_is_no_schedule_is_refused(table: Tensor, original: Callable[..., Parts]) -> None:
    with pytest.raises(CheckpointError, match=r"sd1\.safetensors: alphas_cumprod is no noise schedule .*; convert the"):
        original(1, {"alphas_cumprod": table})


@pytest.mark.parametrize("shape", [(32, 2048), (32,), ()])
def test_other_models_in_the_original_layout_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({ldm.CONTEXT_KEY: torch.zeros(shape)}, tmp_path / "xl.safetensors")
    with pytest.raises(CheckpointError, match=r"xl\.safetensors is not a Stable Diffusion 1\.x or 2\.x"):
        load_parts(tmp_path / "xl.safetensors", torch.float32)


# --- diffusers folders ---------------------------------------------------------------------------------------------

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small model to spoil."""
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def theirs(model_folder: Path) -> dict[str, nn.Module]:
    """The small model as diffusers and transformers read it."""
    return {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(model_folder / "unet").eval(),
        "vae": diffusers.AutoencoderKL.from_pretrained(model_folder / "vae").eval(),
        "text_encoder": CLIPTextModel.from_pretrained(model_folder / "text_encoder").eval(),
    }


def expected_states(theirs: dict[str, nn.Module], cast: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Their tensors as our parts name them, rounded to `cast`."""
    parts = {"unet": theirs["unet"], "vae": theirs["vae"], "text": theirs["text_encoder"]}
    tensors = {f"{part}.{key}": t for part, module in parts.items() for key, t in bare(module.state_dict()).items()}
    return {key: tensor.to(cast).to(torch.float32) for key, tensor in tensors.items()}


def rewrite(path: Path, name: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    """Rename or reshape the tensors of a file."""
    tensors = load_file(path)
    path.unlink()
    save_file(dict(name(key, tensor.clone()) for key, tensor in tensors.items()), path, metadata={"format": "pt"})


@torch.no_grad()
def test_outputs_equal_those_of_diffusers(model_folder: Path, theirs: dict[str, Any]) -> None:
    parts = load_parts(model_folder, torch.float32)
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 4, 8, 12, generator=generator), torch.randn(2, 77, 32, generator=generator)
    t = torch.tensor([1, 700])
    assert relative_error(parts.unet(x, t, context), theirs["unet"](x, t, context).sample) <= 1e-4
    scale = theirs["vae"].config.scaling_factor
    images = torch.randn(2, 3, 16, 24, generator=generator)
    latents = theirs["vae"].encode(images).latent_dist.mean * scale
    assert relative_error(parts.vae.encode(images), latents) <= 1e-4
    assert relative_error(parts.vae.decode(latents), theirs["vae"].decode(latents / scale).sample) <= 1e-4
    ids = torch.randint(0, 500, (2, 77), generator=generator)
    torch.testing.assert_close(parts.text(ids), theirs["text_encoder"](ids).last_hidden_state, rtol=0, atol=0)


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_way_diffusers_saves_is_read(
    variant: str | None, sharded: bool, folder: Path, theirs: dict[str, Any]
) -> None:
    stored = torch.float16 if variant == "fp16" else torch.float32
    for part, file in WEIGHTS.items():
        (folder / part / file).unlink()
        options = {"max_shard_size": "30KB"} if sharded else {}
        copy.deepcopy(theirs[part]).to(stored).save_pretrained(folder / part, variant=variant, **options)
        files = list((folder / part).glob("*.safetensors"))
        assert (len(files) > 1) is sharded
        assert variant is None or all(variant in path.name for path in files)
    assert_same_tensors(states(load_parts(folder, torch.float32)), expected_states(theirs, stored))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parameters_have_the_dtype_asked_for(dtype: torch.dtype, model_folder: Path, theirs: dict[str, Any]) -> None:
    given = states(load_parts(model_folder, dtype))
    assert {tensor.dtype for tensor in given.values()} == {dtype}
    assert_same_tensors({k: t.float() for k, t in given.items()}, expected_states(theirs, dtype))


def test_plain_weights_are_preferred_to_a_variant(folder: Path, theirs: dict[str, Any]) -> None:
    plain = folder / "unet" / WEIGHTS["unet"]
    shutil.copy(plain, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    rewrite(plain.with_name("diffusion_pytorch_model.fp16.safetensors"), lambda key, tensor: (key, tensor.half()))
    assert_same_tensors(states(load_parts(folder, torch.float32)), expected_states(theirs))


@pytest.mark.parametrize("convolution", [False, True])
def test_older_names_of_the_vae_attention_are_read(convolution: bool, folder: Path, theirs: dict[str, Any]) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = []

    def older(key: str, tensor: Tensor) -> tuple[str, Tensor]:
        for new, name in old.items():
            if f"mid_block.attentions.0.{new}." in key:
                renamed.append(key)
                key = key.replace(f".{new}.", f".{name}.")
                tensor = tensor[:, :, None, None] if convolution and tensor.ndim == 2 else tensor
        return key, tensor

    rewrite(folder / "vae" / WEIGHTS["vae"], older)
    assert len(renamed) == 16  # four projections with a bias each, in encoder and decoder
    assert_same_tensors(states(load_parts(folder, torch.float32)), expected_states(theirs))


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("position_ids", [False, True])
def test_text_weights_are_read_with_and_without_prefix(
    prefix: str, position_ids: bool, folder: Path, theirs: dict[str, Any]
) -> None:
    tensors = {
        prefix + key: tensor
        for key, tensor in bare(load_file(folder / "text_encoder" / WEIGHTS["text_encoder"])).items()
    }
    if position_ids:
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    (folder / "text_encoder" / WEIGHTS["text_encoder"]).unlink()
    save_file(tensors, folder / "text_encoder" / WEIGHTS["text_encoder"])
    parts = load_parts(folder, torch.float32)
    assert_same_tensors(states(parts), expected_states(theirs))
    ids = torch.arange(77)[None]
    with torch.no_grad():
        torch.testing.assert_close(parts.text(ids), theirs["text_encoder"](ids).last_hidden_state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", lambda key: f"_orig_mod.{key}"),
        ("text_encoder", lambda key: f"_orig_mod.{key}"),
        ("vae", lambda key: f"module.{key}"),
        ("vae", lambda key: re.sub(r"mid_block\.attentions\.0\.to_(q|k|v)\.", r"mid.attn_1.\1.", key)),
        ("vae", lambda key: re.sub(r"mid_block\.resnets\.0\.", "mid.block_1.", key)),
    ],
)
def test_other_names_in_folders_are_read(
    part: str, name: Callable[[str], str], folder: Path, theirs: dict[str, Any]
) -> None:
    rewrite(folder / part / WEIGHTS[part], lambda key, tensor: (name(key), tensor))
    assert_same_tensors(states(load_parts(folder, torch.float32)), expected_states(theirs))


def test_a_text_encoder_in_the_names_of_open_clip_is_read_in_a_folder(folder: Path, theirs: dict[str, Any]) -> None:
    path = folder / "text_encoder" / WEIGHTS["text_encoder"]
    state = bare(load_file(path))
    place = {name: key for key in layout(TINY[2]) for name, rows in ldm.translate(key)[1] if rows is None}
    renamed = {place[key].removeprefix("cond_stage_model.model."): state[key] for key in state.keys() & place.keys()}
    for i in range(2):
        for kind in ("weight", "bias"):
            attention = [state.pop(f"encoder.layers.{i}.self_attn.{letter}_proj.{kind}") for letter in "qkv"]
            renamed[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(attention)
    path.unlink()
    save_file({key: tensor.clone() for key, tensor in renamed.items()}, path)
    assert_same_tensors(states(load_parts(folder, torch.float32)), expected_states(theirs))


def test_what_a_folder_holds_beside_what_is_needed_is_not_read(folder: Path, theirs: dict[str, Any]) -> None:
    """Averages over training in the U-Net's configuration, a text encoder with its projection, or with all of CLIP."""
    average = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 5000, "power": 0.6667}
    edit_json(folder / "unet" / "config.json", **average, update_after_step=0, use_ema_warmup=False)
    path = folder / "text_encoder" / WEIGHTS["text_encoder"]
    beside = {"text_projection.weight": (32, 32), "logit_scale": (), "vision_model.post_layernorm.weight": (8,)}
    tensors = load_file(path) | {key: torch.zeros(shape) for key, shape in beside.items()}
    path.unlink()
    save_file(tensors, path)
    text = folder / "text_encoder" / "config.json"
    text.write_text(
        json.dumps({"model_type": "clip", "text_config": json.loads(text.read_text()), "vision_config": {}})
    )
    assert_same_tensors(states(load_parts(folder, torch.float32)), expected_states(theirs))


def test_schedule_comes_from_the_folder_and_prediction_type_overrides_it(v_model_folder: Path) -> None:
    schedule = load_parts(v_model_folder, torch.float32).schedule
    assert (schedule.prediction_type, schedule.spacing, schedule.last_alpha_one) == ("v_prediction", "trailing", True)
    overridden = load_parts(v_model_folder, torch.float32, "epsilon").schedule
    assert overridden == replace(schedule, prediction_type="epsilon")


# --- folders that cannot be read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", WEIGHTS)
def test_only_pickles_tells_how_to_convert(part: str, folder: Path) -> None:
    (folder / part / WEIGHTS[part]).unlink()
    (folder / part / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=rf"{part} holds only pickled .*pytorch_model\.bin.*save_pretrained"):
        load_parts(folder, torch.float32)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_pickle_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} is a pickle by its name.*\.safetensors"):
        load_parts(tmp_path / name, torch.float32)


@pytest.mark.parametrize("zipped", [True, False])
def test_renamed_pickle_is_refused_by_its_content(zipped: bool, folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "unet" / WEIGHTS["unet"], _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"unet.*model\.safetensors is a pickle by its content.*safe_serialization"
    ):
        load_parts(folder, torch.float32)


@pytest.mark.parametrize("start", [b"PK", b"\x80\x02", b"\x80\x05"])
def test_header_length_that_looks_like_a_pickle_is_no_pickle(
    start: bytes, folder: Path, theirs: dict[str, Any]
) -> None:
    """The first eight bytes are the header's length, little endian; headers are padded with spaces."""
    path = folder / "vae" / WEIGHTS["vae"]
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    wanted = int.from_bytes(start, "little")
    while wanted < size:
        wanted += 1 << 16
    path.write_bytes(wanted.to_bytes(8, "little") + content[8 : 8 + size].ljust(wanted) + content[8 + size :])
    assert path.read_bytes().startswith(start)
    assert_same_tensors(states(load_parts(folder, torch.float32)), expected_states(theirs))


def test_a_header_that_is_quoted_in_the_error_is_cut(folder: Path) -> None:
    header = b'"' + 5000 * b"a" + b'"'
    (folder / "unet" / WEIGHTS["unet"]).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="is not a valid safetensors file") as raised:
        load_parts(folder, torch.float32)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("keep", [0, 4, 100, -64])
def test_truncated_file_is_named(keep: int, folder: Path) -> None:
    path = folder / "unet" / WEIGHTS["unet"]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"unet.*\.safetensors is not a valid safetensors file .*download it again"
    ):
        load_parts(folder, torch.float32)


@pytest.fixture
def sharded(folder: Path, theirs: dict[str, Any]) -> Path:
    """A folder whose U-Net is in shards; its index."""
    (folder / "unet" / WEIGHTS["unet"]).unlink()
    theirs["unet"].save_pretrained(folder / "unet", max_shard_size="500KB")
    return folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = max(sharded.parent.glob("*-of-*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} does not exist"):
        load_parts(sharded.parents[1], torch.float32)


def test_tensor_that_no_shard_holds_is_named(sharded: Path) -> None:
    weight_map = json.loads(sharded.read_text())["weight_map"]
    edit_json(sharded, weight_map=weight_map | {"what.weight": weight_map["conv_in.weight"]})
    with pytest.raises(CheckpointError, match=r"index\.json lists tensors that no shard holds: what\.weight"):
        load_parts(sharded.parents[1], torch.float32)


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", ".."])
def test_shard_outside_the_folder_is_refused(name: str, sharded: Path) -> None:
    weight_map = json.loads(sharded.read_text())["weight_map"]
    edit_json(sharded, weight_map=dict.fromkeys(weight_map, name))
    expected = "does not exist" if name == ".." else r"expected a file beside the index"
    with pytest.raises(CheckpointError, match=expected):
        load_parts(sharded.parents[1], torch.float32)


@pytest.mark.parametrize("weight_map", [None, [], "x"])
def test_index_without_a_weight_map_is_refused(weight_map: object, sharded: Path) -> None:
    edit_json(sharded, weight_map=weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
        load_parts(sharded.parents[1], torch.float32)


CONFIGS = [
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[]", "holds list, expected a JSON object")],
)
def test_broken_json_is_named(config: str, content: bytes, expected: str, folder: Path) -> None:
    (folder / config).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{config} {expected}"):
        load_parts(folder, torch.float32)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "addition_embed_type", "image"),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "down_block_types", ["AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]),
        ("unet", "up_block_types", ["UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D"]),
        ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("unet", "mid_block_type", None),
        ("unet", "cross_attention_dim", [32, 32, 64]),
        ("unet", "only_cross_attention", True),
        ("unet", "time_cond_proj_dim", 256),
        ("unet", "encoder_hid_dim", 64),
        ("vae", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("vae", "latent_channels", "four"),
        ("vae", "shift_factor", 0.1),
    ],
)
def test_other_networks_are_refused_by_the_key_that_tells(part: str, key: str, value: object, folder: Path) -> None:
    edit_json(folder / part / "config.json", **{key: value})
    with pytest.raises(ConfigError, match=rf"{part}/config\.json: {key} is "):
        load_parts(folder, torch.float32)


@pytest.mark.parametrize("prediction", ["sample", "flow_prediction"])
def test_other_schedules_are_refused(prediction: str, folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type=prediction)
    with pytest.raises(ConfigError, match=r"scheduler_config\.json: prediction_type is"):
        load_parts(folder, torch.float32)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "t5"}, r"text_encoder/config\.json: model_type is 't5', expected one of clip_text_model"),
        ({"num_attention_heads": 5}, r"config\.json: num_attention_heads is 5, expected a divisor of hidden_size"),
        ({"hidden_act": "what"}, r"config\.json: hidden_act is 'what', expected one of quick_gelu, gelu"),
        ({"hidden_size": "wide"}, r"config\.json: hidden_size is 'wide', expected a whole number from 1 to 65536"),
        ({"num_hidden_layers": 10**9}, r"config\.json: num_hidden_layers is 1000000000, expected a whole number"),
        ({"hidden_size": 64}, "the text encoder is 64 wide, the U-Net's cross attention 32"),
    ],
)
def test_other_text_encoders_are_refused(changes: dict[str, object], expected: str, folder: Path) -> None:
    edit_json(folder / "text_encoder" / "config.json", **changes)
    with pytest.raises((CheckpointError, ConfigError), match=expected):
        load_parts(folder, torch.float32)


def test_a_model_tells_its_own_guidance_scale(folder: Path, model_folder: Path) -> None:
    """diffusers skips the key; without it, it is Stable Diffusion's."""
    assert minireuse.load(model_folder, device="cpu").guidance_scale == 7.5
    edit_json(folder / "model_index.json", _guidance_scale=3.0)
    pipe = minireuse.load(folder, device="cpu")
    own, given = (pipe.generate("a lake", steps=2, **s).latents for s in ({}, {"guidance_scale": 3.0}))
    assert torch.equal(own, given)
    assert not torch.equal(own, pipe.generate("a lake", steps=2, guidance_scale=7.5).latents)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    expected = reference("a lake", latents=latents, **settings).images
    assert relative_error(pipe.generate("a lake", steps=2, latents=latents).latents, expected) < 1e-4
    edit_json(folder / "model_index.json", _guidance_scale="strong")
    with pytest.raises(ConfigError, match=r"model_index\.json: _guidance_scale is 'strong', expected a"):
        load_parts(folder, torch.float32)


@pytest.mark.parametrize(("key", "value"), [("in_channels", 9), ("out_channels", 8)])
def test_unet_of_other_channels_than_the_vae_is_refused(key: str, value: int, folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=r"they must agree: inpainting"):
        load_parts(folder, torch.float32)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_folder_that_lacks_a_part_says_which(part: str, folder: Path) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=rf"{folder / part}"):
        load_parts(folder, torch.float32)


@pytest.mark.parametrize("part", WEIGHTS)
def test_part_without_weights_says_which(part: str, folder: Path) -> None:
    (folder / part / WEIGHTS[part]).unlink()
    with pytest.raises(CheckpointError, match=rf"{folder / part} holds no {WEIGHTS[part]}"):
        load_parts(folder, torch.float32)


@pytest.mark.parametrize("part", WEIGHTS)
def test_wrong_tensors_of_a_folder_are_named(part: str, folder: Path) -> None:
    path = folder / part / WEIGHTS[part]
    with safe_open(path, framework="pt") as file:
        key = min(file.keys())
    original = path.read_bytes()
    for change, expected in (
        (lambda k, t: ("what.weight" if k == key else k, t), rf"{path} lacks {key.removeprefix('text_model.')}"),
        (lambda k, t: (k, t[:1] if k == key else t), rf"{path} has mis-shaped {key} "),
    ):
        path.write_bytes(original)
        rewrite(path, change)
        with pytest.raises(CheckpointError, match=expected):
            load_parts(folder, torch.float32)
    path.unlink()
    path.write_bytes(original)
    save_file(load_file(path) | {"what.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=rf"{path} has unknown what\.weight"):
        load_parts(folder, torch.float32)


def test_path_that_does_not_exist_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model at .*nowhere; give a diffusers folder or"):
        load_parts(tmp_path / "nowhere", torch.float32)


# --- tokenizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [[], ["tokenizer_config.json"], ["vocab.json"], ["merges.txt"]])
def test_incomplete_tokenizer_folder_is_refused(kept: list[str], folder: Path) -> None:
    for path in (folder / "tokenizer").iterdir():
        if path.name not in kept:
            path.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer .*pass --tokenizer with a folder that holds vocab\.json"):
        load_parts(folder, torch.float32)


def test_tokenizer_that_looks_for_its_padding_for_ever_is_refused(tokenizer_folder: Path, folder: Path) -> None:
    """Where transformers does not find a token it looks for the unknown one, which it does not find."""
    spoilt = shutil.copytree(tokenizer_folder, folder / "spoilt")
    edit_json(spoilt / "special_tokens_map.json", unk_token={}, pad_token={})
    with pytest.raises(CheckpointError, match=r"tokenizer .*spoilt .*pass --tokenizer"):
        load_parts(folder, torch.float32, tokenizer=spoilt)


def test_tokenizer_larger_than_the_text_encoder_is_refused(folder: Path, tokenizer_folder: Path) -> None:
    edit_json(folder / "text_encoder" / "config.json", vocab_size=300)
    with pytest.raises(CheckpointError, match=r"tokenizer .* has \d+ tokens, expected 256 .* to 300"):
        load_parts(folder, torch.float32, tokenizer=tokenizer_folder)


def test_folder_never_asks_the_hub_for_its_tokenizer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model/tokenizer` could be someone's repository."""
    asked: list[str] = []
    monkeypatch.setattr(tokenizer, "snapshot_download", lambda name, **_: asked.append(name))
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match=r"model/tokenizer \(no such folder\)"):
        load_parts(Path("model"), torch.float32)
    assert not asked


def test_a_name_on_a_hub_that_cannot_be_reached_says_to_pass_a_tokenizer(
    tiny: None, contents: dict[int, dict[str, Tensor]], tmp_path: Path
) -> None:
    save_file(contents[1], tmp_path / "sd1.safetensors")
    said = "no CLIP tokenizer could be read from someone/tokenizer .*pass --tokenizer"
    with pytest.raises(CheckpointError, match=said):
        load_parts(tmp_path / "sd1.safetensors", torch.float32, tokenizer="someone/tokenizer")


def test_hub_is_asked_once_and_the_tokenizer_read_from_what_it_gave(
    tiny: None,
    contents: dict[int, dict[str, Tensor]],
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        return str(tokenizer_folder)

    monkeypatch.setattr(tokenizer, "snapshot_download", download)
    save_file(contents[1], tmp_path / "sd1.safetensors")
    text = load_parts(tmp_path / "sd1.safetensors", torch.float32, tokenizer="someone/tokenizer").text
    assert asked == ["someone/tokenizer"]
    torch.testing.assert_close(text.tokenize(["a red house"]), tokens(tokenizer_folder, ["a red house"]))


# --- text ----------------------------------------------------------------------------------------------------------

PROMPTS = [
    "",
    "a red house",
    "A RED circle, left of a blue square!",
    "naïve café — 圆",
    "🙂 red 🙂🙂",
    " red\n\tcircle  ",
]


@pytest.fixture(scope="module")
def reference(tokenizer_folder: Path) -> CLIPTextModel:
    """transformers' text encoder, three layers deep."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = CLIPTextModel(config)
    randomise(model)
    return model


def encoder(reference: CLIPTextModel, tokenizer_folder: Path, layer: int = -1) -> TextEncoder:
    text = TextEncoder(reference.config, CLIPTokenizer.from_pretrained(tokenizer_folder), layer).eval()
    text.model.load_state_dict(reference.state_dict())
    return text


def tokens(tokenizer_folder: Path, prompts: list[str]) -> Tensor:
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    return tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def test_encode_equals_transformers_exactly(reference: CLIPTextModel, tokenizer_folder: Path) -> None:
    given = encoder(reference, tokenizer_folder).encode(PROMPTS)
    expected = reference(tokens(tokenizer_folder, PROMPTS)).last_hidden_state
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


WORDS = ["red", "blue", "house", "lake"]


@torch.no_grad()
@pytest.mark.parametrize("excess", [0, 1, 7])
def test_long_prompts_keep_the_end_token_and_warn_with_what_is_dropped(
    excess: int, reference: CLIPTextModel, tokenizer_folder: Path
) -> None:
    text = encoder(reference, tokenizer_folder)
    assert text.tokenizer is not None
    assert [len(ids) for ids in text.tokenizer(WORDS)["input_ids"]] == [3] * 4  # start, one token each, end
    words = [WORDS[i % 4] for i in range(75 + excess)]
    prompts = ["a red house", " ".join(words)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = text.encode(prompts)
    ids = tokens(tokenizer_folder, prompts)
    torch.testing.assert_close(text.tokenize(prompts[:1]), ids[:1])
    assert ids[1, -1] == text.tokenizer.eos_token_id
    torch.testing.assert_close(given, reference(ids).last_hidden_state, rtol=0, atol=0)
    messages = [str(w.message) for w in caught if "dropped" in str(w.message)]
    assert len(messages) == (excess > 0)
    if excess:
        assert f"prompt has {77 + excess} tokens, at most 77 are used" in messages[0]
        assert messages[0].split("dropped: ")[1].strip("'").split() == words[75:]


@torch.no_grad()
def test_penultimate_layer_equals_a_model_with_one_layer_fewer(
    reference: CLIPTextModel, tokenizer_folder: Path
) -> None:
    given = encoder(reference, tokenizer_folder, layer=-2).encode(PROMPTS)
    ids = tokens(tokenizer_folder, PROMPTS)

    config = CLIPTextConfig(**reference.config.to_dict() | {"num_hidden_layers": 2})
    shorter = CLIPTextModel(config).eval()
    state = {key: t for key, t in reference.state_dict().items() if ".layers.2." not in key and "layers.2." not in key}
    shorter.load_state_dict(state)
    torch.testing.assert_close(given, shorter(ids).last_hidden_state, rtol=0, atol=0)

    norm = next(module for name, module in reference.named_modules() if name.endswith("final_layer_norm"))
    hidden = reference(ids, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(given, norm(hidden), rtol=0, atol=0)
    assert not torch.allclose(given, reference(ids).last_hidden_state, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_clip_skip_one_is_the_last_layer(clip_skip: int, reference: CLIPTextModel, tokenizer_folder: Path) -> None:
    text, ids = encoder(reference, tokenizer_folder), tokens(tokenizer_folder, PROMPTS)
    norm = next(module for name, module in reference.named_modules() if name.endswith("final_layer_norm"))
    hidden = reference(ids, output_hidden_states=True).hidden_states[-clip_skip]
    torch.testing.assert_close(text.encode(PROMPTS, clip_skip), norm(hidden), rtol=0, atol=0)
    torch.testing.assert_close(text.encode(PROMPTS), text.encode(PROMPTS, 1), rtol=0, atol=0)


@pytest.mark.parametrize("clip_skip", [0, 4])
def test_a_layer_that_there_is_not_is_refused(clip_skip: int, reference: CLIPTextModel, tokenizer_folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"clip_skip is {clip_skip}, expected 1 \(the last layer\) to 3"):
        encoder(reference, tokenizer_folder).encode(PROMPTS, clip_skip)


def test_encoder_without_a_tokenizer_says_to_pass_one(reference: CLIPTextModel) -> None:
    with pytest.raises(ValueError, match="came without a tokenizer; pass tokenizer="):
        TextEncoder(reference.config).encode(["a red house"])

"""Stable Diffusion XL against diffusers and transformers: networks, files, texts and whole pictures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import DeepCache
import diffusers
import numpy as np
import pytest
import tgate as tgate_package
import torch
from diffusers.loaders import single_file_utils
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import minireuse
from minireuse.cache import ReuseCache
from minireuse.checkpoints import ldm
from minireuse.checkpoints import parts as checkpoint
from minireuse.checkpoints.configs import write_unet_config, write_vae_config
from minireuse.checkpoints.tensors import CheckpointError
from minireuse.compilation import CompiledUNet
from minireuse.config import SDXL_UNET, SDXL_VAE
from minireuse.plan import ReusePlan
from minireuse.policies import Searched, deepcache, phast, select, tgate
from minireuse.sample import command as sample
from minireuse.sample.forecast import forecast
from minireuse.search import measure
from minireuse.text import TextEncoder
from minireuse.unet import UNet
from minireuse.vae import VAE

from conftest import TINY_XL_TEXTS, TINY_XL_UNET, edit_json, randomise, relative_error, xl_modules
from ldm_layout import XL, layout, random_tensors, unused

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


def test_compiled_unet_is_told_the_same() -> None:
    config = replace(TINY_XL_UNET, block_out_channels=(16,), attention=(True,), heads=(2,), depths=())
    unet = UNet(config).eval()
    x, context, pooled = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 56), torch.randn(2, 20)
    with torch.inference_mode():
        quick, added = CompiledUNet(unet, backend="eager"), unet.added(pooled, 8, 8)
        for more in (added, 2 * added):  # the second one by the same graph
            expected = unet(x, 9.0, context, added=more)
            torch.testing.assert_close(quick(x, 9.0, unet.text_kv(context), added=more), expected)
    assert len(quick.graphs) == 1


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
        f"{part}.{key.removeprefix('text_model.')}": tensor
        for part, state in parts.items()
        for key, tensor in state.items()
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
    pointwise = {
        key: shape[:2] if shape[2:] == (1, 1) and ".attentions." in key else shape for key, shape in expected.items()
    }
    assert pointwise == ours
    placed = set()
    for key in file:
        part, targets = ldm.translate(key)
        assert not ldm.ignored(key), key
        placed |= {f"{part}.{name.removeprefix('text_model.')}" for name, _ in targets}
    assert placed == set(ours)
    assert all(ldm.ignored(key) or not ldm.translate(key)[1] for key in unused(XL))


# --- texts ---------------------------------------------------------------------------------------------------------

PROMPTS = ["green hills with a lake at noon", "red dunes with a pine at night"]


@pytest.fixture(scope="module")
def reference(xl_folder: Path) -> diffusers.StableDiffusionXLPipeline:
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(xl_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_texts_are_read_as_in_diffusers(
    xl: minireuse.Pipeline, reference: diffusers.StableDiffusionXLPipeline, clip_skip: int | None
) -> None:
    expected = reference.encode_prompt(PROMPTS, negative_prompt=["", "a cross"], clip_skip=clip_skip, device="cpu")
    ours = None if clip_skip is None else clip_skip + 2
    given = [*xl.text.condition(PROMPTS, ours), *xl.text.condition(["", "a cross"])]
    if clip_skip is None:  # diffusers skips layers of the prompt alone
        torch.testing.assert_close(given[2:], [expected[1], expected[3]])
    torch.testing.assert_close(given[:2], [expected[0], expected[2]])
    torch.testing.assert_close(xl.text.encode(PROMPTS, ours), given[0], rtol=0, atol=0)


def test_no_prompt_is_zeros_where_the_model_says_so(xl: minireuse.Pipeline, xl_folder: Path, tmp_path: Path) -> None:
    absent, empty = xl.text.condition([None, "a lake"]), xl.text.condition(["", "a lake"])
    assert absent.pooled is not None and empty.pooled is not None
    for given, encoded in zip(absent, empty, strict=True):
        assert not given[0].any() and encoded[0].all()
        assert torch.equal(given[1], encoded[1])
    folder = shutil.copytree(xl_folder, tmp_path / "model")
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    told = minireuse.load(folder, device="cpu").text.condition([None, "a lake"])
    assert torch.equal(told.context, empty.context) and torch.equal(told.pooled, empty.pooled)


class EndsAtLakes:
    """A tokenizer that takes another token for the end than the one of the highest id."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.eos_token_id = tokenizer, tokenizer.convert_tokens_to_ids("lake</w>")

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self.tokenizer(*args, **settings)


def test_the_end_is_the_first_end_token_of_the_tokenizer(xl: minireuse.Pipeline) -> None:
    """Not the token of the highest id, which an embedding that was added would be."""
    second = xl.text.encoders[1]
    ids = second.tokenize(["a lake with a lake"])
    assert (ids[:, -1] == 0).all()  # padding
    tokenizer: Any = EndsAtLakes(second.tokenizer)
    odd = TextEncoder(second.model.config, tokenizer, layer=-2, padding=0, norm=False, projects=True)
    odd.load_state_dict(second.state_dict())
    with torch.no_grad():
        given, place = odd.condition(["a lake with a lake"]).pooled, ids[0].tolist().index(tokenizer.eos_token_id)
        state = second.model(input_ids=ids).last_hidden_state[0, place]
        assert given is not None
        torch.testing.assert_close(given[0], second.model.text_projection(state))


# --- whole pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("negative", "guidance_scale", "size"),
    [(None, None, (16, 16)), ("", 5.0, (16, 16)), ("a cross", 7.0, (16, 24)), (None, 1.0, (24, 16))],
)
def test_pipeline_equals_diffusers(
    xl: minireuse.Pipeline,
    reference: diffusers.StableDiffusionXLPipeline,
    negative: str | None,
    guidance_scale: float | None,
    size: tuple[int, int],
) -> None:
    height, width = size
    latents = torch.randn(2, 4, height // 2, width // 2, generator=torch.Generator().manual_seed(0))
    expected = reference(
        PROMPTS,
        negative_prompt=None if negative is None else [negative] * 2,
        guidance_scale=guidance_scale or 5.0,
        num_inference_steps=6,
        height=height,
        width=width,
        latents=latents,
        output_type="latent",
    ).images
    settings = {"steps": 6, "height": height, "width": width, "latents": latents, "guidance_scale": guidance_scale}
    given = xl.generate(PROMPTS, negative_prompts=negative, **settings)
    assert relative_error(given.latents, expected) < 1e-4
    with torch.no_grad():
        decoded = reference.vae.decode(expected / 0.13025).sample.clamp(-1, 1)
    pixels = (decoded.permute(0, 2, 3, 1).numpy() + 1) * 127.5
    assert abs(given.images - pixels).max() < 1


def test_embeddings_from_outside_are_used_as_in_diffusers(
    xl: minireuse.Pipeline, reference: diffusers.StableDiffusionXLPipeline
) -> None:
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 9, 56), (2, 9, 56), (2, 20), (2, 20)]
    embeds = {n: torch.randn(s, generator=generator) for n, s in zip(names, shapes, strict=True)}
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    expected = reference(
        **embeds, num_inference_steps=3, height=16, width=16, latents=latents, output_type="latent"
    ).images
    assert relative_error(xl.generate(**embeds, steps=3, latents=latents).latents, expected) < 1e-4
    texts = xl.text.condition(PROMPTS)
    of_texts = xl.generate(PROMPTS, steps=2, seeds=[3, 4]).latents
    alone = xl.generate(
        prompt_embeds=texts.context, pooled_prompt_embeds=texts.pooled, steps=2, seeds=[3, 4], guidance_scale=None
    )
    assert relative_error(alone.latents, of_texts) < 1e-4


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"prompt_embeds": torch.zeros(1, 77, 56)}, "prompt_embeds are given without pooled_prompt_embeds, which this"),
        (
            {"prompts": "a", "pooled_prompt_embeds": torch.zeros(1, 20)},
            "but there are no prompt_embeds; leave them out",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 77, 56), "pooled_prompt_embeds": torch.zeros(2, 20)},
            r"pooled_prompt_embeds have shape \(2, 20\), expected \(1, 20\)",
        ),
        (
            {"prompts": "a", "negative_pooled_prompt_embeds": torch.zeros(1, 20)},
            "negative_pooled_prompt_embeds are given, but there are no negative_prompt_embeds",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 77, 56), "pooled_prompt_embeds": torch.full((1, 20), torch.nan)},
            "pooled_prompt_embeds hold NaN or inf",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    xl: minireuse.Pipeline, given: dict[str, object], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        xl.generate(**given)


def test_other_models_take_no_pooled_embeddings(pipeline: minireuse.Pipeline) -> None:
    with pytest.raises(ValueError, match="pooled_prompt_embeds are given, but this model reads only prompt_embeds"):
        pipeline.generate(prompt_embeds=torch.zeros(1, 77, 32), pooled_prompt_embeds=torch.zeros(1, 20))


def test_the_vae_runs_in_float32_where_the_rest_runs_in_float16(xl: minireuse.Pipeline, xl_folder: Path) -> None:
    half = minireuse.load(xl_folder, device="cpu", dtype="float16")
    assert half.dtype == half.text.encoders[1].model.dtype == torch.float16
    latents = torch.randn(1, 4, 8, 8)
    np.testing.assert_array_equal(half.to_images(latents), xl.to_images(latents))
    image = torch.rand(1, 3, 16, 16)
    encode = type(xl.vae).encode
    torch.testing.assert_close(
        half._through_vae(encode, image, "encoded"), xl._through_vae(encode, image, "encoded"), rtol=0, atol=0
    )
    wide = minireuse.load(xl_folder, device="cpu", dtype="bfloat16")
    assert wide.vae.quant_conv.weight.dtype == torch.bfloat16  # whose range is that of float32


def test_other_vaes_stay_in_float16(model_folder: Path, tmp_path: Path) -> None:
    """diffusers, too, asks for float32 only of SDXL's: its configurations of others may say what was never meant."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    edit_json(folder / "vae" / "config.json", force_upcast=True)
    assert minireuse.load(folder, device="cpu", dtype="float16").vae.quant_conv.weight.dtype == torch.float16


def test_guidance_and_timesteps_are_those_of_the_family(
    xl: minireuse.Pipeline, xl_folder: Path, tmp_path: Path
) -> None:
    assert xl.guidance_scale == 5.0
    ays = minireuse.load(xl_folder, device="meta", spacing="ays")
    assert ays.timesteps(10) == [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]  # the list of SDXL
    folder = shutil.copytree(xl_folder, tmp_path / "model")
    edit_json(folder / "model_index.json", _guidance_scale=3)
    assert minireuse.load(folder, device="meta").guidance_scale == 3.0


# --- folders -------------------------------------------------------------------------------------------------------


def test_the_published_configurations_load_unchanged(tmp_path: Path) -> None:
    files = json.loads((Path(__file__).parent / "published_configs.json").read_text())["stable-diffusion-xl-base-1.0"]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    pipe = minireuse.load(tmp_path, device="meta")
    assert (pipe.unet.config, pipe.vae.config) == (SDXL_UNET, SDXL_VAE)
    assert (pipe.guidance_scale, pipe.schedule.spacing, pipe.schedule.offset) == (5.0, "leading", 1)
    assert pipe.latent_size() == (128, 128)
    assert [encoder.model.config.num_hidden_layers for encoder in pipe.text.encoders] == [12, 32]


@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        (
            "text_encoder_2",
            {"hidden_size": 48},
            "the text encoders are together 80 wide, the U-Net's cross attention 56",
        ),
        ("text_encoder_2", {"projection_dim": 21}, "the pooled text of text_encoder_2 is 21 wide, the U-Net reads one"),
        (
            "unet",
            {"addition_embed_type": "image_text"},
            "addition_embed_type is 'image_text', expected one of text_time",
        ),
        ("unet", {"projection_class_embeddings_input_dim": 48}, "input_dim is 48, expected more than six times"),
        ("unet", {"projection_class_embeddings_input_dim": 2560}, "this is the refiner of Stable Diffusion XL, which"),
        ("unet", {"time_cond_proj_dim": 256}, "this is a latent consistency model, whose U-Net is told the guidance"),
        ("unet", {"addition_time_embed_dim": 7}, "addition_time_embed_dim is 7, expected an even number"),
    ],
)
def test_other_networks_are_refused(
    part: str, change: dict[str, object], expected: str, xl_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(xl_folder, tmp_path / "model")
    edit_json(folder / part / "config.json", **change)
    with pytest.raises(ValueError, match=expected):
        minireuse.load(folder, device="cpu")


# --- single files --------------------------------------------------------------------------------------------------

TINY_XL = replace(
    XL,
    unet=(8, 16, 16),
    context=56,
    vae=(8, 8, 16, 16),
    text=32,
    layers=3,
    vocabulary=1024,
    depths=(0, 1, 2),
    text_2=24,
    layers_2=4,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width that a test can afford; the pooled text and the sizes stay 2816 wide, which tells SDXL from others."""
    unet = replace(SDXL_UNET, block_out_channels=TINY_XL.unet, heads=(1, 2, 4), depths=(1, 1, 2), norm_groups=8)
    vae = replace(SDXL_VAE, block_out_channels=TINY_XL.vae, norm_groups=8)
    monkeypatch.setattr(checkpoint, "SDXL_UNET", replace(unet, cross_attention_dim=TINY_XL.context))
    monkeypatch.setattr(checkpoint, "SDXL_VAE", vae)
    common = {"vocab_size": 1024, "intermediate_size": 128}
    monkeypatch.setattr(ldm, "SD1_TEXT", ldm.SD1_TEXT | TINY_XL_TEXTS[1] | common)
    monkeypatch.setattr(ldm, "SDXL_TEXT_2", ldm.SDXL_TEXT_2 | TINY_XL_TEXTS[2] | common | {"intermediate_size": 96})


@pytest.fixture(scope="module")
def contents() -> dict[str, Tensor]:
    tensors = random_tensors(layout(TINY_XL) | unused(TINY_XL))
    # Wild weights would only blur comparisons.
    return {key: tensor if key == "denoiser.sigmas" else 0.2 * tensor for key, tensor in tensors.items()}


@pytest.fixture
def original(
    tiny: None, contents: dict[str, Tensor], tokenizer_folder: Path, tmp_path: Path
) -> Callable[..., minireuse.Pipeline]:
    """Load an original file, with some tensors changed or (None) left out."""

    def load(changes: dict[str, Tensor | None] | None = None, **options: Any) -> minireuse.Pipeline:
        tensors = {key: value for key, value in (contents | (changes or {})).items() if value is not None}
        save_file(tensors, tmp_path / "xl.safetensors")
        return minireuse.load(tmp_path / "xl.safetensors", device="cpu", tokenizer=tokenizer_folder, **options)

    return load


def test_an_original_file_gives_the_pictures_of_diffusers(
    original: Callable[..., minireuse.Pipeline], contents: dict[str, Tensor], tokenizer_folder: Path
) -> None:
    ours, converted = original(), convert(contents)
    assert (ours.guidance_scale, ours.schedule.prediction_type, ours.schedule.family) == (5.0, "epsilon", "sdxl")
    modules = xl_modules(tokenizer_folder, ours.unet.config)
    configs = [
        CLIPTextConfig(**e.model.config.to_dict() | {"eos_token_id": 2}) for e in ours.text.encoders
    ]  # as published
    modules |= {"text_encoder": CLIPTextModel(configs[0]), "text_encoder_2": CLIPTextModelWithProjection(configs[1])}
    modules["vae"] = diffusers.AutoencoderKL.from_config(write_vae_config(ours.vae.config))
    for part, name in {"unet": "unet", "vae": "vae", "text": "text_encoder", "text_2": "text_encoder_2"}.items():
        own = {key.removeprefix("text_model."): key for key in modules[name].state_dict()}
        state = {
            own[k.removeprefix(f"{part}.")]: v
            for k, v in converted.items()
            if k.startswith(f"{part}.") and "position_ids" not in k
        }
        modules[name].load_state_dict({k: v.reshape(modules[name].state_dict()[k].shape) for k, v in state.items()})
        modules[name].eval()
    pipe = diffusers.StableDiffusionXLPipeline(**modules)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    settings = {"height": 64, "width": 96, "latents": latents}
    for negative in (None, "a cross"):
        theirs = None if negative is None else [negative] * 2
        expected = pipe(PROMPTS, negative_prompt=theirs, num_inference_steps=3, output_type="latent", **settings).images
        given = ours.generate(PROMPTS, negative_prompts=negative, steps=3, **settings).latents
        assert relative_error(given, expected) < 1e-4
        assert relative_error(given, ours.generate(PROMPTS, negative_prompts="", steps=3, **settings).latents) > 1e-4


def test_padding_of_an_original_file(original: Callable[..., minireuse.Pipeline]) -> None:
    first, second = original().text.encoders
    end = first.tokenizer.eos_token_id
    assert first.tokenize(["a lake"])[0].tolist().count(end) == 77 - 3
    assert second.tokenize(["a lake"])[0].tolist()[4:] == [0] * 73


def test_what_fine_tunes_say_of_their_prediction(original: Callable[..., minireuse.Pipeline]) -> None:
    said, too = torch.zeros(1), torch.zeros(1)
    schedule = original({"v_pred": said}).schedule
    assert (schedule.prediction_type, schedule.spacing) == ("v_prediction", "leading")
    schedule = original({"v_pred": said, "ztsnr": too}).schedule
    assert (schedule.prediction_type, schedule.spacing) == ("v_prediction", "trailing")
    assert schedule.alphas_cumprod[-1] == 0 and schedule.timesteps(4) == [999, 749, 499, 249]
    assert original({"v_pred": said}, prediction_type="epsilon").schedule.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({ldm.ADDED_KEY: torch.zeros(32, 2560)}, "xl.safetensors is the refiner of Stable Diffusion XL, which is not"),
        ({ldm.GUIDED_KEY: torch.zeros(8, 256)}, "xl.safetensors is a latent consistency model, which is told the"),
        (
            {ldm.ADDED_KEY: torch.zeros(32, 1024)},
            "nor one of XL .model.diffusion_model.label_emb.0.0.weight of width 2816",
        ),
        ({"conditioner.embedders.1.model.text_projection": None}, r"lacks text_projection\.weight; it is incomplete"),
        (
            {"conditioner.embedders.1.model.transformer.resblocks.23.ln_1.bias": torch.zeros(24)},
            r"unknown conditioner\.embedders\.1\.model\.transformer\.resblocks\.23\.ln_1\.bias",  # SD 2 ignores it
        ),
        ({"conditioner.embedders.2.model.what": torch.zeros(1)}, r"unknown conditioner\.embedders\.2\.model\.what"),
        ({"edm_mean": torch.zeros(4)}, "unknown edm_mean"),
    ],
)
def test_other_original_files_are_refused(
    changes: dict[str, Tensor | None], expected: str, original: Callable[..., minireuse.Pipeline]
) -> None:
    with pytest.raises(CheckpointError, match=expected):
        original(changes)


# --- reuse ---------------------------------------------------------------------------------------------------------

STEPS = 8


def start() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def painted(pipe: minireuse.Pipeline, plan: ReusePlan | None = None) -> Tensor:
    cache = ReuseCache(torch.float32)
    return pipe.generate(PROMPTS[0], steps=STEPS, plan=plan, latents=start(), cache=cache).latents


def by_diffusers(pipe: Any, **more: object) -> Tensor:
    settings = {"num_inference_steps": STEPS, "height": 16, "width": 16, "latents": start(), "output_type": "latent"}
    return pipe(PROMPTS[0], **settings | more).images


@pytest.mark.parametrize(("every", "branch"), [(2, 0), (3, 2)])
def test_deepcache_agrees_with_its_package(
    xl: minireuse.Pipeline, reference: diffusers.StableDiffusionXLPipeline, every: int, branch: int
) -> None:
    helper = DeepCache.DeepCacheSDHelper(pipe=reference)
    helper.set_params(cache_interval=every, cache_branch_id=branch)
    helper.enable()
    expected = by_diffusers(reference)
    helper.disable()
    given = painted(xl, deepcache(STEPS, xl.sites, every=every, branch=branch))
    assert relative_error(given, expected) < 1e-3
    assert relative_error(given, painted(xl)) > 1e-2  # the plan did change something


def test_tgate_agrees_with_its_package(xl: minireuse.Pipeline, xl_folder: Path) -> None:
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(xl_folder)
    pipe.set_progress_bar_config(disable=True)
    gated = tgate_package.TgateSDXLLoader(pipe)
    settings = {"num_inference_steps": STEPS, "height": 16, "width": 16, "latents": start(), "output_type": "latent"}
    expected = gated.tgate(PROMPTS[0], gate_step=5, sp_interval=3, fi_interval=1, warm_up=1, **settings).images
    given = painted(xl, tgate(STEPS, xl.sites, gate=5, every=3, warmup=1))
    assert relative_error(given, expected) < 1e-3
    assert relative_error(given, painted(xl)) > 1e-2


class Recorder:
    """Attention of diffusers that writes its maps out, and at reusing calls takes those of the call before."""

    def __init__(self, reuses: list[bool]) -> None:
        self.reuses, self.call, self.maps = reuses, 0, dict[int, Tensor]()

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = attn.head_to_batch_dim
        if not self.reuses[self.call]:
            q, k = split(attn.to_q(hidden_states)), split(attn.to_k(source))
            self.maps[id(attn)] = attn.get_attention_scores(q, k)
        y = attn.batch_to_head_dim(self.maps[id(attn)] @ split(attn.to_v(source)))
        return attn.to_out[0](y)


def test_a_searched_plan_of_maps_is_followed_as_an_attention_processor_does(
    xl: minireuse.Pipeline, xl_folder: Path
) -> None:
    reuses = [False, False, True, False, True, True, False, True]
    recorder = Recorder(reuses)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(xl_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.set_attn_processor(recorder)

    def count(*_: Any) -> dict[str, Any]:
        recorder.call += 1
        return {}

    expected = by_diffusers(pipe, callback_on_step_end=count)
    sites = select(xl.sites)
    assert len(sites) == 2 * (2 * 2 + 2 * 3 + 3 + 3 * 3 + 3 * 2)  # self and cross, down, in the middle and up
    searched = Searched(ReusePlan.stepwise(reuses, sites), xl.fingerprint, "ddim")
    plan = phast(STEPS, sites, plans=[searched], k=4, model=xl.fingerprint)
    cache = ReuseCache(torch.float32)
    result = xl.generate(PROMPTS[0], steps=STEPS, plan=plan, latents=start(), cache=cache)
    told = forecast(xl.unet, plan, batch=1, size=(8, 8), cache_dtype=torch.float32)
    assert result.cache_peak_bytes == told.peak
    given = result.latents
    assert plan.grid == "..#.##.#"
    assert relative_error(given, expected) < 1e-4
    assert relative_error(given, painted(xl)) > 5e-3


def test_the_costs_of_calls_are_measured(xl: minireuse.Pipeline) -> None:
    costs = measure(xl, [select(xl.sites, kind="deep")], rounds=1)
    assert (len(costs.store), len(costs.reuse)) == (1, 1)


def test_a_dry_run_at_1024_pixels_tells_the_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = json.loads((Path(__file__).parent / "published_configs.json").read_text())["stable-diffusion-xl-base-1.0"]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    found: dict[str, int] = {"attn1": 0, "attn2": 0, "peak": 0}
    options = ["--policy", "hurry", "--steps", "2", "--reuse", "1", "--dry-run", "--json"]
    for more in (["--kind", "map"], ["--kind", "out", "--sites", "self"]):
        assert sample.main(["--model", str(tmp_path), "--prompt", "a lake", *options, *more]) == 0
        told = json.loads(capsys.readouterr().out)
        found["peak"] = told["cache_peak_bytes"]
        if more[1] == "map":
            for site, size in told["sites"].items():
                found[site.rsplit(".", 1)[1]] += size
            assert found["peak"] == sum(told["sites"].values())
    # Two halves of float16: at 64 x 64 tokens 10 blocks of 10 heads, at 32 x 32 tokens 60 blocks of 20 heads.
    rows = 2 * 2 * 10 * 10 * 64**2, 2 * 2 * 60 * 20 * 32**2
    assert found["attn1"] == rows[0] * 64**2 + rows[1] * 32**2 == 11_200 * 2**20
    assert found["attn2"] == sum(rows) * 77
    assert round(found["attn2"] / 2**20) == 481
    assert found["peak"] == sum(rows) * 64 == 400 * 2**20  # the outputs


# --- LoRA ----------------------------------------------------------------------------------------------------------

# Layers in the layout of Stability-AI/generative-models, as Kohya's scripts name them, counted by hand.
ORIGINAL = {
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": "input_blocks_4_1_transformer_blocks_1_attn1_to_q",
    "down_blocks.2.attentions.1.transformer_blocks.2.attn2.to_k": "input_blocks_8_1_transformer_blocks_2_attn2_to_k",
    "mid_block.attentions.0.transformer_blocks.2.ff.net.0.proj": "middle_block_1_transformer_blocks_2_ff_net_0_proj",
    "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_v": "output_blocks_2_1_transformer_blocks_0_attn2_to_v",
    "up_blocks.1.attentions.0.proj_in": "output_blocks_3_1_proj_in",
}
FIRST = {f"encoder.layers.0.self_attn.{name}_proj" for name in ("q", "out")} | {"encoder.layers.2.mlp.fc1"}
SECOND = {"encoder.layers.1.self_attn.out_proj", "encoder.layers.3.mlp.fc2"}


def lora_tensors(xl: minireuse.Pipeline, spelling: str) -> dict[str, Tensor]:
    """Down, up and, with Kohya, alpha for some layers of each module, each of a rank of its own."""
    generator = torch.Generator().manual_seed(0)
    first, second = (encoder.model for encoder in xl.text.encoders)
    tensors = {}
    for rank, (part, module, name) in enumerate(
        [
            *(("unet", xl.unet, name) for name in ORIGINAL),
            *(("text_encoder", first, name) for name in sorted(FIRST)),
            *(("text_encoder_2", second, name) for name in sorted(SECOND)),
        ],
        2,
    ):
        outputs, inputs = shapes_of(module)[f"{name}.weight"]
        down, up = torch.randn(rank, inputs, generator=generator) / 3, torch.randn(outputs, rank, generator=generator)
        dotted = name if part == "unet" else f"text_model.{name}"
        if spelling == "peft":
            tensors |= {f"{part}.{dotted}.lora_A.weight": down, f"{part}.{dotted}.lora_B.weight": up}
            continue
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
        stem = prefix + (ORIGINAL[name] if part == "unet" and spelling == "original" else dotted.replace(".", "_"))
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(3.0)}
    return tensors


def as_their_modules_are_named(
    tensors: dict[str, Tensor], pipe: diffusers.StableDiffusionXLPipeline
) -> dict[str, Tensor]:
    """diffusers' loader does not know yet that the first text encoder of transformers 5 has no `text_model`."""
    if hasattr(pipe.text_encoder, "text_model"):
        return tensors
    first = ("lora_te1_", "text_encoder.")
    return {re.sub(r"text_model[._]", "", k) if k.startswith(first) else k: v for k, v in tensors.items()}


@pytest.mark.parametrize("spelling", ["original", "diffusers", "peft"])
def test_loras_change_what_diffusers_changes(
    spelling: str, xl: minireuse.Pipeline, xl_folder: Path, tmp_path: Path
) -> None:
    tensors = lora_tensors(xl, spelling)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(xl_folder)
    save_file(tensors, tmp_path / "lora.safetensors")
    theirs.load_lora_weights(as_their_modules_are_named(tensors, theirs))
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora_weights()
    ours = minireuse.load(xl_folder, device="cpu", loras=[f"{tmp_path / 'lora.safetensors'}:0.7"])
    changed = 0
    for mine, its, before in (
        (ours.unet, theirs.unet, xl.unet),
        (ours.text.encoders[0].model, theirs.text_encoder, xl.text.encoders[0].model),
        (ours.text.encoders[1].model, theirs.text_encoder_2, xl.text.encoders[1].model),
    ):
        expected = {k.removeprefix("text_model.").replace(".base_layer", ""): v for k, v in its.state_dict().items()}
        for (key, value), old in zip(mine.state_dict().items(), before.state_dict().values(), strict=True):
            assert relative_error(value, expected[key.removeprefix("text_model.")]) < 1e-4, key
            changed += not torch.equal(value, old)
    assert changed == len(ORIGINAL) + len(FIRST) + len(SECOND)
    assert ours.fingerprint == xl.fingerprint
    others = {name for name, digest in ours.digests.items() if digest != xl.digests[name]}
    assert others == {"text encoder", "second text encoder"}


# --- Turbo and Lightning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "timesteps"), [(1, [999]), (4, [999, 749, 499, 249])])
def test_turbo_paints_as_diffusers_does(steps: int, timesteps: list[int], xl_folder: Path) -> None:
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(xl_folder)
    pipe.set_progress_bar_config(disable=True)
    trailing = {**pipe.scheduler.config, "timestep_spacing": "trailing"}
    ours = minireuse.load(xl_folder, device="cpu", spacing="trailing")
    settings: dict[str, Any] = {"steps": steps, "guidance_scale": 1}
    assert ours.timesteps(steps) == timesteps

    pipe.scheduler = diffusers.DDIMScheduler.from_config(trailing)
    expected = by_diffusers(pipe, num_inference_steps=steps, guidance_scale=0.0)
    assert pipe.scheduler.timesteps.tolist() == timesteps
    assert relative_error(ours.generate(PROMPTS[0], latents=start(), **settings).latents, expected) < 1e-4

    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(trailing)
    expected = by_diffusers(pipe, num_inference_steps=steps, guidance_scale=0.0)
    assert pipe.scheduler.timesteps.tolist() == timesteps
    ours.schedule = replace(ours.schedule, last_alpha_cumprod=1.0)  # where that scheduler ends
    # It takes sigma times the noise for what the noise is at t = 999, where a little of x_0 is left.
    given = ours.generate(PROMPTS[0], latents=ours.schedule.sigma(999) * start(), sampler="euler", **settings).latents
    assert relative_error(given, expected) < 1e-4


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_folder_of_turbo_says_its_spacing(name: str, xl_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(xl_folder, tmp_path / "turbo")
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name=name, timestep_spacing="trailing")
    assert minireuse.load(folder, device="meta").timesteps(4) == [999, 749, 499, 249]


def test_turbo_from_the_command_line(original: Callable[..., Any], tokenizer_folder: Path, tmp_path: Path) -> None:
    original()
    argv = ["--model", str(tmp_path / "xl.safetensors"), "--tokenizer", str(tokenizer_folder), "--prompt", "a lake"]
    argv += ["--height", "64", "--width", "64", "--steps", "1", "--spacing", "trailing", "--guidance-scale", "1"]
    assert sample.main([*argv, "--quiet", "--out", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert "negative_prompt" not in image.text  # type: ignore[attr-defined]
        assert (image.size, image.text["spacing"]) == ((64, 64), "trailing")  # type: ignore[attr-defined]
    again = ["--from-png", str(tmp_path / "a.png"), "--tokenizer", str(tokenizer_folder)]
    assert sample.main([*again, "--out", str(tmp_path / "b.png")]) == 0
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")]
    assert np.array_equal(*pictures)
    # An empty negative prompt is another thing than none, with guidance.
    guided = [*argv[:-2], "--quiet"]
    assert sample.main([*guided, "--out", str(tmp_path / "none.png")]) == 0
    assert sample.main([*guided, "--negative-prompt", "", "--out", str(tmp_path / "empty.png")]) == 0
    none, empty = (np.asarray(Image.open(tmp_path / name)) for name in ("none.png", "empty.png"))
    assert not np.array_equal(none, empty)
    for name in ("none", "empty"):
        again = ["--from-png", str(tmp_path / f"{name}.png"), "--tokenizer", str(tokenizer_folder), "--quiet"]
        assert sample.main([*again, "--out", str(tmp_path / f"{name}-again.png")]) == 0
        pictures = [np.asarray(Image.open(tmp_path / f"{name}{end}.png")) for end in ("", "-again")]
        assert np.array_equal(*pictures)

"""Read published checkpoints, strictly: diffusers folders, and single files in the original (LDM) layout.

Only safetensors are read. Every tensor of a file is used exactly once or stands on a short ignore list; anything else
is an error that names it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig

from minireuse.checkpoints import ldm
from minireuse.checkpoints.configs import (
    guidance_scale,
    read_schedule_config,
    read_unet_config,
    read_vae_config,
    text_settings,
    zeros_for_no_prompt,
)
from minireuse.checkpoints.tensors import (
    CONVERT,
    PICKLES,
    CheckpointError,
    Source,
    complain,
    fill,
    open_file,
    read_json,
)
from minireuse.checkpoints.tokenizer import read_tokenizer
from minireuse.config import (
    GUIDANCE_SCALE,
    SD1_UNET,
    SD2_UNET,
    SD_VAE,
    SDXL_GUIDANCE_SCALE,
    SDXL_UNET,
    SDXL_VAE,
    UNetConfig,
    VAEConfig,
)
from minireuse.files import shown
from minireuse.schedule import SD_SCHEDULE, Schedule, ScheduleConfig
from minireuse.text import TextEncoder, TextEncoders
from minireuse.unet import UNet
from minireuse.vae import VAE

# What folders call the text encoders and their tokenizers, and `ldm` the tensors of each.
TEXT_ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
TEXT_PARTS = ("text", "text_2")


@dataclass
class Parts:
    """What a checkpoint holds, as modules and values."""

    unet: UNet
    vae: VAE
    text: TextEncoder | TextEncoders
    schedule: ScheduleConfig
    guidance_scale: float


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its parts, before any weight is read.

    text_2: of SDXL's second text encoder. zeros: whether no negative prompt means zeros there.
    """

    unet: UNetConfig
    vae: VAEConfig
    schedule: ScheduleConfig
    text: CLIPTextConfig
    guidance_scale: float = GUIDANCE_SCALE
    text_2: CLIPTextConfig | None = None
    zeros: bool = True

    def text_encoder(self) -> TextEncoder | TextEncoders:
        if self.text_2 is None:
            return TextEncoder(self.text)
        first = TextEncoder(self.text, layer=-2, norm=False)
        return TextEncoders(first, TextEncoder(self.text_2, layer=-2, norm=False, projects=True), zeros=self.zeros)


def describe(path: Path, prediction_type: str | None = None) -> Description:
    """The configurations of a diffusers folder or an LDM single file. Raises: CheckpointError, ConfigError."""
    if path.is_dir():
        described = _describe_folder(path)
    elif path.is_file():
        described = _describe_single_file(path, open_file(path))
    else:
        raise CheckpointError(f"no model at {path}; give a diffusers folder or an original .safetensors file")
    if prediction_type is None:
        return described
    return replace(described, schedule=replace(described.schedule, prediction_type=prediction_type))


def empty_parts(path: Path, prediction_type: str | None = None) -> Parts:
    """A checkpoint's modules without numbers or a tokenizer, on the meta device. Raises: as `describe`."""
    described = describe(path, prediction_type)
    with torch.device("meta"):
        unet, vae, text = UNet(described.unet), VAE(described.vae), described.text_encoder()
    return Parts(unet, vae, text, described.schedule, described.guidance_scale)


def load_parts(
    path: Path, dtype: torch.dtype, prediction_type: str | None = None, tokenizer: str | Path | None = None
) -> Parts:
    """The modules of a diffusers folder or an LDM single file, on the CPU.

    A VAE whose numbers leave the range of float16 is in float32 then.
    Raises: CheckpointError, ConfigError.
    """
    parts = empty_parts(path, prediction_type)
    (_fill_from_folder if path.is_dir() else _fill_from_single_file)(parts, path, dtype, tokenizer)
    # The one thing of any of the modules that no file holds: the numbers of the positions.
    for encoder in parts.text.encoders:
        embeddings = next(m for m in encoder.modules() if hasattr(m, "position_ids"))
        embeddings.register_buffer("position_ids", torch.arange(encoder.length)[None], persistent=False)
    return parts


def _vae_dtype(vae: VAE, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if vae.config.force_upcast and dtype == torch.float16 else dtype


# --- diffusers folders ---------------------------------------------------------------------------------------------


def _describe_folder(folder: Path) -> Description:
    unet = read_unet_config(read_json(folder / "unet" / "config.json"))
    vae = read_vae_config(read_json(folder / "vae" / "config.json"))
    schedule = read_schedule_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    is_xl = unet.pooled_width is not None
    names = TEXT_ENCODERS[: 1 + is_xl]
    texts = [_text_config(folder / name / "config.json") for name in names]
    _check_channels(folder, unet, vae)
    width = sum(text.hidden_size for text in texts)
    if width != unet.cross_attention_dim:
        what = "text encoders are together" if is_xl else "text encoder is"
        raise CheckpointError(
            f"{folder}: the {what} {width} wide, the U-Net's cross attention "
            f"{unet.cross_attention_dim}; they must agree, so these parts do not belong together"
        )
    if is_xl and texts[1].projection_dim != unet.pooled_width:
        raise CheckpointError(
            f"{folder}: the pooled text of text_encoder_2 is {texts[1].projection_dim} wide, the U-Net reads one of "
            f"{unet.pooled_width}; they must agree, so these parts do not belong together"
        )
    index, source = folder / "model_index.json", str(folder / "model_index.json")
    told = read_json(index) if index.exists() else {}
    if not is_xl:  # as diffusers does, which asks only SDXL's VAE whether it has to run in float32
        return Description(unet, replace(vae, force_upcast=False), schedule, texts[0], guidance_scale(told, source))
    scale, zeros = guidance_scale(told, source, SDXL_GUIDANCE_SCALE), zeros_for_no_prompt(told, source)
    return Description(unet, vae, replace(schedule, family="sdxl"), texts[0], scale, texts[1], zeros)


def _text_config(path: Path) -> CLIPTextConfig:
    return CLIPTextConfig(**text_settings(read_json(path), str(path)))


def _check_channels(path: Path, unet: UNetConfig, vae: VAEConfig) -> None:
    """Raises: CheckpointError for models that are given more than text and noise."""
    latents = (unet.in_channels, unet.out_channels, vae.latent_channels)
    if len(set(latents)) > 1:
        raise CheckpointError(
            f"{path}: the U-Net reads {latents[0]} channels and writes {latents[1]}, the VAE's latents have "
            f"{latents[2]}; they must agree: inpainting, upscaling and depth models are not supported"
        )


def _fill_from_folder(parts: Parts, folder: Path, dtype: torch.dtype, tokenizer: str | Path | None) -> None:
    found: list[tuple[str, nn.Module, str, str, torch.dtype]] = [
        ("unet", parts.unet, "unet", "diffusion_pytorch_model", dtype),
        ("vae", parts.vae, "vae", "diffusion_pytorch_model", _vae_dtype(parts.vae, dtype)),
    ]
    encoders = parts.text.encoders
    for encoder, part, name, words in zip(encoders, TEXT_PARTS, TEXT_ENCODERS, TOKENIZERS, strict=False):
        size = encoder.model.config.vocab_size
        encoder.tokenizer, encoder.padding = read_tokenizer(tokenizer or folder / words, size)
        if tokenizer is not None and part == "text_2":
            encoder.padding = 0  # OpenCLIP's, whose place the one tokenizer takes
        found.append((part, encoder.model, name, "model", dtype))
    for part, module, name, stem, precision in found:
        fill(module, _tensors(folder / name, stem).items(), folder / name, precision, names=partial(ldm.names, part))


def _tensors(folder: Path, stem: str) -> dict[str, Source]:
    """The tensors of one model of a folder: plain file, else sharded, else a variant such as fp16."""
    plain, shards = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    variants = sorted(folder.glob(f"{stem}.*.safetensors")) if folder.is_dir() else []
    variants = [v for v in variants if not re.search(r"-\d{5}-of-\d{5}", v.name)]
    shard_variants = sorted(folder.glob(f"{stem}.safetensors.index.*.json")) if folder.is_dir() else []
    if plain.is_file():
        return open_file(plain)
    if shards.is_file():
        return _open_shards(shards)
    if variants:
        return open_file(variants[0])
    if shard_variants:
        return _open_shards(shard_variants[0])
    found = [p.name for p in sorted(folder.glob("*")) if p.suffix in PICKLES] if folder.is_dir() else []
    if found:
        raise CheckpointError(f"{folder} holds only pickled weights ({found[0]}); {CONVERT}")
    raise CheckpointError(f"{folder} holds no {stem}.safetensors; is this a complete diffusers folder?")


def _open_shards(index: Path) -> dict[str, Source]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise CheckpointError(f"{index} has no weight_map; expected a safetensors index as diffusers writes it")
    found: dict[str, Source] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or len(name.encode()) > 255:
            raise CheckpointError(f"{index} names the shard {shown(name)}; expected a file beside the index")
        found |= open_file(index.parent / name)
    complain(f"{index} lists tensors that no shard holds:", set(weight_map) - set(found), "download the shards again")
    return found


# --- original single files -----------------------------------------------------------------------------------------


def _describe_single_file(path: Path, tensors: Mapping[str, Source]) -> Description:
    described = _family(path, tensors)
    unet, second = described.unet, described.unet is SD2_UNET
    first, last = _find(tensors, ldm.FIRST_KEY), _find(tensors, ldm.LAST_KEY)
    if first is not None and last is not None and len(first.shape) == len(last.shape) == 4:
        unet = replace(unet, in_channels=first.shape[1], out_channels=last.shape[0])
    _check_channels(path, unet, described.vae)
    bias = _find(tensors, ldm.PREDICTION_KEY)
    predicts_v = second and bias is not None and ldm.predicts_v(bias.read())
    predicts_v = predicts_v or _find(tensors, ldm.V_KEY) is not None
    if second and not predicts_v:
        unet = replace(unet, sample_size=64)  # SD 2's base models predict noise, at 512 pixels
    schedule = replace(_schedule(path, tensors), prediction_type="v_prediction" if predicts_v else "epsilon")
    if _find(tensors, ldm.ZERO_SNR_KEY) is not None:  # then pictures have to begin at the last timestep
        schedule = replace(schedule, zero_snr=True, spacing="trailing")
    return replace(described, unet=unet, schedule=replace(schedule, family=described.schedule.family))


def _family(path: Path, tensors: Mapping[str, Source]) -> Description:
    """The published model that a file is one of. Raises: CheckpointError where it is none, with its name if known."""
    added, width = _find(tensors, ldm.ADDED_KEY), _find(tensors, ldm.CONTEXT_KEY)
    for is_it, model in (
        (added is not None and added.shape[1:] == (ldm.REFINER_WIDTH,), "the refiner of Stable Diffusion XL"),
        (_find(tensors, ldm.GUIDED_KEY) is not None, "a latent consistency model, which is told the guidance scale"),
    ):
        if is_it:
            raise CheckpointError(f"{path} is {model}, which is not supported; give a base model, or one of Turbo")
    if added is not None and added.shape[1:] == (ldm.ADDED_WIDTH,):
        schedule, texts = replace(SD_SCHEDULE, family="sdxl"), (ldm.SD1_TEXT, ldm.SDXL_TEXT_2)
        first, second = (CLIPTextConfig(**text) for text in texts)
        return Description(SDXL_UNET, SDXL_VAE, schedule, first, SDXL_GUIDANCE_SCALE, second)
    families: dict[tuple[int, ...], tuple[UNetConfig, dict[str, Any]]]
    families = {(768,): (SD1_UNET, ldm.SD1_TEXT), (1024,): (SD2_UNET, ldm.SD2_TEXT)}
    if width is None or width.shape[-1:] not in families:
        raise CheckpointError(
            f"{path} is not a Stable Diffusion 1.x or 2.x checkpoint in the original layout "
            f"(expected {ldm.CONTEXT_KEY} of width 768 or 1024), nor one of XL "
            f"({ldm.ADDED_KEY} of width {ldm.ADDED_WIDTH}); for other layouts give a diffusers folder"
        )
    unet, text = families[width.shape[-1:]]
    return Description(unet, SD_VAE, SD_SCHEDULE, CLIPTextConfig(**text))


def _find(tensors: Mapping[str, Source], key: str) -> Source | None:
    """The tensor that goes where this one of the original layout goes, whatever the file calls it."""
    place = ldm.translate(key)
    return next((source for name, source in tensors.items() if ldm.translate(name) == place), None)


def _schedule(path: Path, tensors: Mapping[str, Source]) -> ScheduleConfig:
    """Stable Diffusion's schedule; or the file's own where it is another, of which a warning tells.

    Raises: CheckpointError for a table that is no schedule.
    """
    alphas, sigmas = _find(tensors, ldm.SCHEDULE_KEY), _find(tensors, ldm.SIGMAS_KEY)
    source = alphas or sigmas
    if source is None:
        return SD_SCHEDULE
    stored, key = source.read(), source.key
    table = stored.double() if source is alphas else 1 / (1 + stored.double() ** 2)
    # A schedule that is known is taken as it was meant, without the rounding of the file.
    zero, linear = replace(SD_SCHEDULE, zero_snr=True), replace(SD_SCHEDULE, beta_schedule="linear")
    found = next((known for known in (SD_SCHEDULE, zero, linear) if _holds(stored, table, known)), None)
    if found is None:
        falls = table.ndim == 1 and 1 <= len(table) <= 100_000 and bool((table.diff() < 0).all())
        if not falls or not 0 <= table[-1] <= table[0] < 1:
            raise CheckpointError(
                f"{path}: {key} is no noise schedule (expected alpha-bar, falling from below 1 to 0 or above); "
                "convert the file to a diffusers folder, whose scheduler says which schedule is meant"
            )
        found = replace(SD_SCHEDULE, train_timesteps=len(table), alphas_cumprod=tuple(table.tolist()))
    if found != SD_SCHEDULE:
        ends = f"alpha-bar falls from {table[0]:.5g} to {table[-1]:.5g}"
        warnings.warn(f"{path} has a noise schedule of its own ({key}: {ends}), which is used", stacklevel=2)
    return found


def _holds(stored: Tensor, table: Tensor, known: ScheduleConfig) -> bool:
    """Whether a table is that of a known schedule, but for rounding to the coarsest precision that could hold it."""
    formula = Schedule.from_config(known).alphas_cumprod
    if table.shape != formula.shape or not stored.is_floating_point() or not torch.isfinite(stored).all():
        return False
    dtypes = (torch.bfloat16, torch.float16, stored.dtype)
    eps = next(torch.finfo(dtype).eps for dtype in dtypes if torch.equal(stored.to(dtype).to(stored.dtype), stored))
    return torch.allclose(table, formula, rtol=1e-4 + 4 * eps, atol=1e-6)


def _fill_from_single_file(parts: Parts, path: Path, dtype: torch.dtype, tokenizer: str | Path | None) -> None:
    modules: dict[str, nn.Module] = {"unet": parts.unet, "vae": parts.vae}
    for part, encoder in zip(TEXT_PARTS, parts.text.encoders, strict=False):
        modules[part] = encoder.model
        encoder.tokenizer, _ = read_tokenizer(tokenizer, encoder.model.config.vocab_size)
        # OpenCLIP pads with id 0, CLIP with the end token, whatever the tokenizer's own settings are.
        is_open = part == "text_2" or parts.unet.config.cross_attention_dim == SD2_UNET.cross_attention_dim
        encoder.padding = 0 if is_open else encoder.tokenizer.eos_token_id
    groups: dict[str, list[tuple[str, Source]]] = {part: [] for part in ("", *modules)}
    for key, source in open_file(path).items():
        part, name = ldm.split(key)
        if not ldm.ignored(key):
            groups[part if part in groups else ""].append((name, source))
    why = "it holds another model than Stable Diffusion 1.x, 2.x or XL, text to image"
    complain(f"{path} has unknown", [source.key for _, source in groups[""]], why)
    for part, module in modules.items():
        precision = _vae_dtype(parts.vae, dtype) if part == "vae" else dtype
        fill(module, groups[part], path, precision, names=partial(ldm.names, part), why=why)

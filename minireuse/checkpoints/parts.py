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

import torch
from torch import Tensor
from transformers import CLIPTextConfig

from minireuse.checkpoints import ldm
from minireuse.checkpoints.configs import (
    guidance_scale,
    read_schedule_config,
    read_unet_config,
    read_vae_config,
    text_settings,
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
from minireuse.config import GUIDANCE_SCALE, SD1_UNET, SD2_UNET, SD_VAE, UNetConfig, VAEConfig
from minireuse.files import shown
from minireuse.schedule import SD_SCHEDULE, Schedule, ScheduleConfig
from minireuse.text import TextEncoder
from minireuse.unet import UNet
from minireuse.vae import VAE


@dataclass
class Parts:
    """What a checkpoint holds, as modules and values."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    schedule: ScheduleConfig
    guidance_scale: float


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its parts, before any weight is read."""

    unet: UNetConfig
    vae: VAEConfig
    schedule: ScheduleConfig
    text: CLIPTextConfig
    guidance_scale: float = GUIDANCE_SCALE


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
        unet, vae, text = UNet(described.unet), VAE(described.vae), TextEncoder(described.text)
    return Parts(unet, vae, text, described.schedule, described.guidance_scale)


def load_parts(
    path: Path, dtype: torch.dtype, prediction_type: str | None = None, tokenizer: str | Path | None = None
) -> Parts:
    """The modules of a diffusers folder or an LDM single file, on the CPU.

    Raises: CheckpointError, ConfigError.
    """
    parts = empty_parts(path, prediction_type)
    (_fill_from_folder if path.is_dir() else _fill_from_single_file)(parts, path, dtype, tokenizer)
    # The one thing of any of the modules that no file holds: the numbers of the positions.
    embeddings = next(m for m in parts.text.modules() if hasattr(m, "position_ids"))
    embeddings.register_buffer("position_ids", torch.arange(parts.text.length)[None], persistent=False)
    return parts


# --- diffusers folders ---------------------------------------------------------------------------------------------


def _describe_folder(folder: Path) -> Description:
    unet = read_unet_config(read_json(folder / "unet" / "config.json"))
    vae = read_vae_config(read_json(folder / "vae" / "config.json"))
    schedule = read_schedule_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    text = folder / "text_encoder" / "config.json"
    text_config = CLIPTextConfig(**text_settings(read_json(text), str(text)))
    _check_channels(folder, unet, vae)
    if text_config.hidden_size != unet.cross_attention_dim:
        raise CheckpointError(
            f"{folder}: the text encoder is {text_config.hidden_size} wide, the U-Net's cross attention "
            f"{unet.cross_attention_dim}; they must agree, so these parts do not belong together"
        )
    index = folder / "model_index.json"
    scale = guidance_scale(read_json(index), str(index)) if index.exists() else GUIDANCE_SCALE
    return Description(unet, vae, schedule, text_config, scale)


def _check_channels(path: Path, unet: UNetConfig, vae: VAEConfig) -> None:
    """Raises: CheckpointError for models that are given more than text and noise."""
    latents = (unet.in_channels, unet.out_channels, vae.latent_channels)
    if len(set(latents)) > 1:
        raise CheckpointError(
            f"{path}: the U-Net reads {latents[0]} channels and writes {latents[1]}, the VAE's latents have "
            f"{latents[2]}; they must agree: inpainting, upscaling and depth models are not supported"
        )


def _fill_from_folder(parts: Parts, folder: Path, dtype: torch.dtype, tokenizer: str | Path | None) -> None:
    text = parts.text
    text.tokenizer, text.padding = read_tokenizer(tokenizer or folder / "tokenizer", text.model.config.vocab_size)
    for part, module, name, stem in (
        ("unet", parts.unet, "unet", "diffusion_pytorch_model"),
        ("vae", parts.vae, "vae", "diffusion_pytorch_model"),
        ("text", text.model, "text_encoder", "model"),
    ):
        fill(module, _tensors(folder / name, stem).items(), folder / name, dtype, names=partial(ldm.names, part))


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
    width = _find(tensors, ldm.CONTEXT_KEY)
    configs: dict[tuple[int, ...], UNetConfig] = {(768,): SD1_UNET, (1024,): SD2_UNET}
    if width is None or width.shape[-1:] not in configs:
        raise CheckpointError(
            f"{path} is not a Stable Diffusion 1.x or 2.x checkpoint in the original layout "
            f"(expected {ldm.CONTEXT_KEY} of width 768 or 1024); for other layouts give a diffusers folder"
        )
    unet = configs[width.shape[-1:]]
    second = unet is SD2_UNET
    first, last = _find(tensors, ldm.FIRST_KEY), _find(tensors, ldm.LAST_KEY)
    if first is not None and last is not None and len(first.shape) == len(last.shape) == 4:
        unet = replace(unet, in_channels=first.shape[1], out_channels=last.shape[0])
    _check_channels(path, unet, SD_VAE)
    bias = _find(tensors, ldm.PREDICTION_KEY)
    predicts_v = second and bias is not None and ldm.predicts_v(bias.read())
    if second and not predicts_v:
        unet = replace(unet, sample_size=64)  # SD 2's base models predict noise, at 512 pixels
    schedule = replace(_schedule(path, tensors), prediction_type="v_prediction" if predicts_v else "epsilon")
    return Description(unet, SD_VAE, schedule, CLIPTextConfig(**(ldm.SD2_TEXT if second else ldm.SD1_TEXT)))


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
    second = parts.unet.config.cross_attention_dim == SD2_UNET.cross_attention_dim
    parts.text.tokenizer, _ = read_tokenizer(tokenizer, parts.text.model.config.vocab_size)
    # OpenCLIP pads with id 0, CLIP with the end token, whatever the tokenizer's own settings are.
    parts.text.padding = 0 if second else parts.text.tokenizer.eos_token_id
    groups: dict[str, list[tuple[str, Source]]] = {"": [], "unet": [], "vae": [], "text": []}
    for key, source in open_file(path).items():
        part, name = ldm.split(key)
        if not ldm.ignored(key):
            groups[part].append((name, source))
    why = "it holds another model than Stable Diffusion 1.x or 2.x, text to image"
    complain(f"{path} has unknown", [key for key, _ in groups[""]], why)
    for part, module in (("unet", parts.unet), ("vae", parts.vae), ("text", parts.text.model)):
        fill(module, groups[part], path, dtype, names=partial(ldm.names, part), why=why)

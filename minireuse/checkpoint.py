"""Read published checkpoints, strictly: diffusers folders, and single files in the original (LDM) layout.

Only safetensors are read. Every tensor of a file is used exactly once or stands on a short ignore list; anything else
is an error that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer

from minireuse import ldm
from minireuse.config import SD1_UNET, SD2_UNET, SD_SCHEDULE, SD_VAE, ScheduleConfig, UNetConfig, VAEConfig
from minireuse.text import TextEncoder
from minireuse.unet import UNet
from minireuse.vae import VAE

HUB_TOKENIZER = "openai/clip-vit-large-patch14"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# Buffers that some versions of transformers saved, and the number of pooled features, which generation never uses.
IGNORED = re.compile(r"(.*\.)?embeddings\.position_ids")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: the message says which file, what is wrong with it, and what to do."""


@dataclass
class Parts:
    """What a checkpoint holds, as modules and values."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    schedule: ScheduleConfig


def load_parts(
    path: Path, dtype: torch.dtype, prediction_type: str | None = None, tokenizer: str | Path | None = None
) -> Parts:
    """The modules of a diffusers folder or an LDM single file, on the CPU.

    Raises: CheckpointError, ConfigError.
    """
    if path.is_dir():
        parts = _load_folder(path, dtype, tokenizer)
    elif path.is_file():
        parts = _load_single_file(path, dtype, tokenizer)
    else:
        raise CheckpointError(f"no model at {path}; give a diffusers folder or an original .safetensors file")
    if prediction_type is not None:
        parts.schedule = replace(parts.schedule, prediction_type=prediction_type)
    return parts


# --- diffusers folders ---------------------------------------------------------------------------------------------


def _load_folder(folder: Path, dtype: torch.dtype, tokenizer: str | Path | None) -> Parts:
    unet_config = UNetConfig.from_diffusers(_read_json(folder / "unet" / "config.json"))
    vae_config = VAEConfig.from_diffusers(_read_json(folder / "vae" / "config.json"))
    schedule = ScheduleConfig.from_diffusers(_read_json(folder / "scheduler" / "scheduler_config.json"))
    text_config = CLIPTextConfig.from_dict(_read_json(folder / "text_encoder" / "config.json"))
    if text_config.hidden_size != unet_config.cross_attention_dim:
        raise CheckpointError(
            f"{folder}: the text encoder is {text_config.hidden_size} wide, the U-Net's cross attention "
            f"{unet_config.cross_attention_dim}; they must agree, so these parts do not belong together"
        )
    read_tokenizer = _read_tokenizer(tokenizer or folder / "tokenizer")
    with torch.device("meta"):
        unet, vae = UNet(unet_config), VAE(vae_config)
    text = TextEncoder(text_config, read_tokenizer)
    _fill(unet, _tensors(folder / "unet", "diffusion_pytorch_model"), dtype)
    _fill(vae, _tensors(folder / "vae", "diffusion_pytorch_model"), dtype, name=_modern_vae_name)
    _fill(text.model, _tensors(folder / "text_encoder", "model"), dtype, name=_bare_text_name)
    return Parts(unet, vae, text, schedule)


def _tensors(folder: Path, stem: str) -> dict[str, _Source]:
    """The tensors of one model of a folder: plain file, else sharded, else a variant such as fp16."""
    plain, shards = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    variants = sorted(folder.glob(f"{stem}.*.safetensors")) if folder.is_dir() else []
    variants = [v for v in variants if not re.search(r"-\d{5}-of-\d{5}", v.name)]
    shard_variants = sorted(folder.glob(f"{stem}.safetensors.index.*.json")) if folder.is_dir() else []
    if plain.is_file():
        return _open(plain)
    if shards.is_file():
        return _open_shards(shards)
    if variants:
        return _open(variants[0])
    if shard_variants:
        return _open_shards(shard_variants[0])
    found = [p.name for p in sorted(folder.glob("*")) if p.suffix in PICKLES] if folder.is_dir() else []
    if found:
        raise CheckpointError(f"{folder} holds only pickled weights ({found[0]}); {_CONVERT}")
    raise CheckpointError(f"{folder} holds no {stem}.safetensors; is this a complete diffusers folder?")


def _open_shards(index: Path) -> dict[str, _Source]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise CheckpointError(f"{index} has no weight_map; expected a safetensors index as diffusers writes it")
    found: dict[str, _Source] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names the shard {name!r}; expected a file beside the index")
        found |= _open(index.parent / name)
    for key in set(weight_map) - set(found):
        raise CheckpointError(f"{index} lists {key}, which no shard holds; the download may be incomplete")
    return found


def _bare_text_name(key: str) -> str:
    # Published files and transformers 4 say text_model.encoder..., transformers 5 says encoder...
    return key.removeprefix("text_model.")


def _modern_vae_name(key: str) -> str:
    """Names of the VAE's attention before diffusers 0.17."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        key = re.sub(rf"(mid_block\.attentions\.0)\.{old}\.", rf"\1.{new}.", key)
    return key


# --- original single files -----------------------------------------------------------------------------------------


def _load_single_file(path: Path, dtype: torch.dtype, tokenizer: str | Path | None) -> Parts:
    tensors = _open(path)
    width = tensors.get(ldm.CONTEXT_KEY)
    widths = {768: SD1_UNET, 1024: SD2_UNET}
    if width is None or width.shape[-1] not in widths:
        raise CheckpointError(
            f"{path} is not a Stable Diffusion 1.x or 2.x checkpoint in the original layout "
            f"(expected {ldm.CONTEXT_KEY} of width 768 or 1024); for other layouts give a diffusers folder"
        )
    unet_config = widths[width.shape[-1]]
    second = unet_config is SD2_UNET
    read_tokenizer = _read_tokenizer(tokenizer or HUB_TOKENIZER)
    if second:
        read_tokenizer.pad_token = "!"  # token 0, with which OpenCLIP pads
    text = TextEncoder(CLIPTextConfig(**(ldm.SD2_TEXT if second else ldm.SD1_TEXT)), read_tokenizer)
    with torch.device("meta"):
        unet, vae = UNet(unet_config), VAE(SD_VAE)
    groups: dict[str, dict[str, _Source]] = {"unet": {}, "vae": {}, "text": {}}
    for key, source in tensors.items():
        part, found = ldm.translate(key, second)
        for name, rows in found:
            groups[part][name] = source if rows is None else replace(source, rows=rows)
        if not found and not ldm.ignored(key, second):
            raise CheckpointError(
                f"{path} holds {key}, which is no part of Stable Diffusion; remove it or convert the file"
            )
    _fill(unet, groups["unet"], dtype)
    _fill(vae, groups["vae"], dtype)
    _fill(text.model, groups["text"], dtype, name=_bare_text_name)
    predicts_v = second and ldm.predicts_v(tensors[ldm.PREDICTION_KEY].read())
    return Parts(unet, vae, text, replace(SD_SCHEDULE, prediction_type="v_prediction" if predicts_v else "epsilon"))


# --- files ---------------------------------------------------------------------------------------------------------

_CONVERT = (
    "pickles can run code and are not read: load it with a trusted tool and save it as .safetensors "
    "(diffusers: pipeline.save_pretrained(folder, safe_serialization=True))"
)


@dataclass(frozen=True)
class _Source:
    """One tensor of a file, not yet read."""

    path: Path
    key: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None  # a third of a fused projection: these rows of so many equal parts

    def read(self) -> Tensor:
        with safe_open(str(self.path), framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.key)
        return tensor if self.rows is None else tensor.chunk(self.rows[1])[self.rows[0]]


def _open(path: Path) -> dict[str, _Source]:
    """The tensors of a safetensors file; only its header is read. Raises: CheckpointError."""
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path} is a pickle by its name; {_CONVERT}")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; the download may be incomplete")
    with path.open("rb") as raw:
        start = raw.read(2)
    if start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise CheckpointError(f"{path} is a pickle by its content; {_CONVERT}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: _Source(path, key, tuple(file.get_slice(key).get_shape())) for key in file}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file ({error}); download it again") from None


def _fill(
    module: nn.Module, sources: Mapping[str, _Source], dtype: torch.dtype, name: Callable[[str], str] = lambda key: key
) -> None:
    """Give every parameter of `module` its tensor. Raises: CheckpointError for missing, extra or mis-shaped ones."""
    wanted = {name(key): (key, tensor) for key, tensor in module.state_dict().items()}
    given = {name(key): source for key, source in sources.items() if not IGNORED.fullmatch(key)}
    where = next(iter(sources.values())).path if sources else "the file"
    _complain(f"{where} lacks", set(wanted) - set(given), "it is incomplete, or of another model than its config says")
    _complain(f"{where} has unknown", set(given) - set(wanted), "it is of another model than its config says")
    state: dict[str, Tensor] = {}
    mis_shaped = []
    for key, (own_key, parameter) in wanted.items():
        tensor = given[key].read()
        if tensor.ndim == 4 and parameter.ndim == 2 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]  # a 1x1 convolution in older layouts, a linear layer here
        if tensor.shape != parameter.shape:
            mis_shaped.append(f"{key} {tuple(tensor.shape)} instead of {tuple(parameter.shape)}")
        state[own_key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    _complain(f"{where} has mis-shaped", mis_shaped, "it is of another model than its config says")
    module.load_state_dict(state, assign=True)


def _complain(what: str, keys: Iterable[str], why: str) -> None:
    if names := sorted(keys):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(f"{what} {', '.join(names[:3])}{more}; {why}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{path} is missing or unreadable; is this a complete diffusers folder?") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, expected a JSON object; download it again")
    return data


def _read_tokenizer(source: str | Path) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(str(source))
    except Exception as error:  # transformers and the hub raise many kinds, network errors among them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"no CLIP tokenizer could be read from {source} ({reason}); "
            "pass --tokenizer with a folder that holds vocab.json and merges.txt, or the name of one on the hub"
        ) from None

"""LoRA files: their layers are found in a table of names made from a model's modules, and merged into its weights.

For a layer of the model a file holds `down` (rank, inputs), `up` (outputs, rank) and often a number `alpha`. The weight
W becomes W + strength (alpha / rank) up down; without alpha the scale is the strength alone (Hu et al., arXiv
2106.09685). Of a convolution, `down` has its kernel and `up` one of 1x1.

Source of the names: kohya-ss/sd-scripts `networks/lora.py`, `library/sdxl_model_util.py`; huggingface/diffusers
`loaders/lora_conversion_utils.py`, `utils/state_dict_utils.py`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from minireuse.checkpoints.tensors import CheckpointError, Source, complain, open_file
from minireuse.files import digest_of, parse_json, shown
from minireuse.unet import UNet

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"  # diffusers' names of what a LoRA may change
KOHYA = {UNET: ("lora_unet",), TEXT: ("lora_te", "lora_te1"), TEXT_2: ("lora_te2",)}

# How a tensor's name ends, and what it then is.
ROLES = {
    ".lora_down.weight": "down",  # Kohya
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",  # PEFT
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",  # diffusers before PEFT
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",  # its text encoders
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",  # its first version: processor.to_q_lora
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}

FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32")  # which an alpha may be

# What else is published as "LoRA", by a piece of the names of its tensors.
REFUSED = {
    ".hada_w": "LoHa",
    ".lokr_w": "LoKr",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_mid.": "LoRA with a third matrix (lora_mid)",
    ".diff": "full differences of weights (.diff)",
}

WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}  # of the context
XL = re.compile(r"lora_te2_|text_encoder_2\.|.*(label_emb|add_embedding)")
TRANSFORMER = re.compile(r"(lora_)?transformer[._]|lora_te3_|.*(double_blocks|single_blocks|joint_blocks)")
CROSS = re.compile(r".*attn2[._](?:processor\.)?to_[kv][._]lora.*(?:down|A)\.weight")  # `down` of what reads the text
DEPTHS = (12, 24, 32)  # of the published text encoders; one whose last layer is never read is built without it


@dataclass(frozen=True)
class LoRA:
    """A file to merge. digest: of its bytes (`minireuse.files.digest_of`)."""

    path: Path
    strength: float
    digest: str


class Place(NamedTuple):
    """A layer of the model: of which part, and its name there."""

    part: str
    name: str


@dataclass(frozen=True)
class Delta:
    """What one file adds to the weight of one layer."""

    down: Source
    up: Source
    scale: float

    def read(self) -> Tensor:
        """Shapes: -> (outputs, inputs times kernel), float32."""
        return self.scale * (self.up.read().float().flatten(1) @ self.down.read().float().flatten(1))


Table = dict[str, tuple[Place | None, str]]  # name of a tensor in a file -> layer and role; None: not built here


def find_lora(text: str | Path) -> LoRA:
    """The file that FILE or FILE:STRENGTH names; a text that names a file as a whole is that file, at strength 1.

    Raises: CheckpointError where there is no such file, or the strength is no number; OSError.
    """
    path, strength = Path(text), 1.0
    if not path.is_file():
        name, colon, number = str(text).rpartition(":")
        path = Path(name if colon else number)
        try:
            strength = float(number) if colon else 1.0
        except ValueError:
            strength = math.nan
        if not path.is_file() or not math.isfinite(strength):
            raise CheckpointError(f"no LoRA at {text}; expected FILE or FILE:STRENGTH, such as style.safetensors:0.8")
    return LoRA(path, strength, digest_of(path))


def merge_loras(parts: Mapping[str, nn.Module], loras: Sequence[LoRA]) -> None:
    """Add the changes of all files to the weights, in float32, with one rounding to their own precision at the end.

    parts: the modules by diffusers' names: unet, text_encoder, and text_encoder_2 where there is one.
    Raises: CheckpointError for a tensor that is none of these modules', does not fit, or is no plain LoRA's.
    """
    table = name_table(parts)
    deltas = defaultdict[Place, list[Delta]](list)
    for lora in loras:
        for place, delta in _match(lora, parts, table).items():
            deltas[place].append(delta)
    for place, found in deltas.items():
        layer = parts[place.part].get_submodule(place.name)
        weight = cast(Tensor, layer.weight).data
        change = torch.stack([delta.read() for delta in found]).sum(dim=0)
        merged = (weight.float() + change.view(weight.shape)).to(weight.dtype)
        if not torch.isfinite(merged).all():
            files = " and ".join(sorted({str(delta.down.path) for delta in found}))
            raise CheckpointError(
                f"{files} gives NaN, inf, or numbers beyond {weight.dtype} in {place.part}.{place.name}; "
                "lower its strength, or leave it out"
            )
        cast(Tensor, layer.weight).data = merged  # not in place: the old one may be the memory of a mapped file


# --- names ---------------------------------------------------------------------------------------------------------


def name_table(parts: Mapping[str, nn.Module]) -> Table:
    """Every name under which a file may hold something of these modules."""
    table: Table = {}
    for part, module in parts.items():
        layers = [name for name, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        written: list[tuple[Place | None, str]] = [
            (Place(part, name), s) for name in layers for s in _spellings(part, name, module)
        ]
        written += [(None, s) for name in _unbuilt(layers) for s in _spellings(part, name, module)]
        table |= {spelling + ending: (place, role) for place, spelling in written for ending, role in ROLES.items()}
    return table


def _spellings(part: str, name: str, module: nn.Module) -> Iterator[str]:
    """What files call a layer: diffusers' names, new and old, and Kohya's, where underscores stand for dots."""
    dotted = [name]
    if part != UNET:  # transformers 4 keeps the transformer under `text_model`, transformers 5 does not
        bare = name.removeprefix("text_model.")
        dotted = [f"text_model.{bare}", bare]
    for spelling in dotted:
        yield f"{part}.{spelling}"
        yield f"{part}.{_older(spelling)}"
    original = _original(name, module) if isinstance(module, UNet) else None
    for prefix in KOHYA[part]:
        yield from (f"{prefix}_{n.replace('.', '_')}" for n in (*dotted, original) if n is not None)
    if part == UNET:  # what diffusers saves of a U-Net alone
        yield name
        yield _older(name)


def _older(name: str) -> str:
    """diffusers' first names of attention layers, before `_lora`."""
    name = re.sub(r"\.(attn[12])\.(to_[qkv]|to_out)(\.0)?$", r".\1.processor.\2", name)
    return re.sub(r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1", name)


def _unbuilt(layers: Sequence[str]) -> list[str]:
    """The layers of a text encoder's last block where it is left out, such as block 23 of SD 2's."""
    blocks = [int(found[1]) for name in layers if (found := re.search(r"\bencoder\.layers\.(\d+)\.", name))]
    last = max(blocks, default=-1)
    if last + 2 not in DEPTHS:
        return []
    here, missing = f"encoder.layers.{last}.", f"encoder.layers.{last + 1}."
    return [name.replace(here, missing) for name in layers if here in name]


_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def _original(name: str, unet: UNet) -> str | None:
    """A layer's name in the original layout, Kohya's for SDXL, where blocks are counted through all levels.

    Source: Stability-AI/generative-models `sgm/modules/diffusionmodules/openaimodel.py`.
    """
    if name in _ENDS:
        return _ENDS[name]
    found = re.fullmatch(r"(?:(down|mid|up)_block)s?(?:\.(\d+))?\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", name)
    if found is None:
        return None
    side, level, kind, layer, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    rest = _RESNET[rest] if kind == "resnets" else rest
    place = int(kind != "resnets")  # in its block: first the residual block, then the transformer
    if side == "mid":
        return f"middle_block.{1 if place else 2 * layer}.{rest}"
    stride = unet.config.layers_per_block + 1
    if kind == "downsamplers":
        return f"input_blocks.{stride * (level + 1)}.0.op"
    if kind == "upsamplers":  # the last thing in the level's last block
        return f"output_blocks.{stride * level + stride - 1}.{1 + bool(unet.up_blocks[level].attentions)}.conv"
    block = (
        f"input_blocks.{stride * level + 1 + layer}" if side == "down" else f"output_blocks.{stride * level + layer}"
    )
    return f"{block}.{place}.{rest}"


# --- one file ------------------------------------------------------------------------------------------------------


def _match(lora: LoRA, parts: Mapping[str, nn.Module], table: Table) -> dict[Place, Delta]:
    """What a file changes; only its header and its alphas are read. Raises: CheckpointError."""
    path, sources = lora.path, open_file(lora.path)
    given = defaultdict[Place, dict[str, Source]](dict)
    unknown = []
    for key, source in sources.items():
        for piece, kind in REFUSED.items():
            if piece in key:
                raise CheckpointError(f"{path} holds {key[:200]}, so it is {kind}; only plain LoRA is supported")
        if key not in table:
            unknown.append(key)
            continue
        place, role = table[key]
        if place is not None:
            dtype = source.file.get_slice(key).get_dtype()
            if dtype not in FLOATS and not (role == "alpha" and dtype in INTEGERS):
                raise CheckpointError(f"{path}: {key} is {dtype}; quantized LoRAs are not supported")
            other = given[place].setdefault(role, source)
            if other is not source:
                names = f"{other.key} and {source.key}, two names of the same tensor"
                raise CheckpointError(f"{path} holds {names}; remove one")
    pairs = {
        place: found for place, found in given.items() if _fits(found, parts[place.part].get_submodule(place.name))
    }
    misfits = [f"{s.key} {s.shape}" for place in given.keys() - pairs.keys() for s in given[place].values()]
    if unknown or misfits:
        _refuse_other_family(path, sources, parts[UNET])
    complain(f"{path} has unknown", unknown, "it is no LoRA of this model")
    halves = [s.key for found in given.values() if not {"down", "up"} <= found.keys() for s in found.values()]
    complain(f"{path} has only a part of", halves, "each layer needs its down and its up")
    complain(f"{path} has mis-shaped", misfits, "it was made for another model")
    if not sources:
        raise CheckpointError(f"{path} is empty; give a LoRA file")
    told = _Metadata(path, next(iter(sources.values())).file.metadata())
    return {
        place: Delta(found["down"], found["up"], lora.strength * _scale(found, told.alpha(place)))
        for place, found in pairs.items()
    }


def _fits(found: Mapping[str, Source], layer: nn.Module) -> bool:
    """Whether down, up and alpha have the shapes that this layer needs, for any rank."""
    if not {"down", "up"} <= found.keys():
        return False
    down, up, weight = found["down"].shape, found["up"].shape, tuple(cast(Tensor, layer.weight).shape)
    if "alpha" in found and math.prod(found["alpha"].shape) != 1:
        return False
    return down[:1] > (0,) and _flat(down)[1:] == _flat(weight)[1:] and _flat(up) == weight[:1] + down[:1]


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer is a convolution of 1x1: files have the one for the other."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _scale(found: Mapping[str, Source], told: float | None) -> float:
    """alpha / rank. told: the alpha of the metadata, where the file has no tensor of it."""
    rank = found["down"].shape[0]
    alpha = found["alpha"].read().flatten()[0].item() if "alpha" in found else told
    return 1.0 if alpha is None else alpha / rank


class _Metadata:
    """PEFT's settings, which diffusers writes into the header of a file as JSON."""

    def __init__(self, path: Path, metadata: Mapping[str, str] | None) -> None:
        try:
            self.settings = parse_json((metadata or {}).get("lora_adapter_metadata") or "{}")
        except ValueError as error:
            raise CheckpointError(f"{path}: its lora_adapter_metadata is not JSON ({error})") from None
        self.path = path
        if not isinstance(self.settings, dict):
            raise CheckpointError(f"{path}: its lora_adapter_metadata is {shown(self.settings)}, expected an object")
        for key, value in self.settings.items():
            if value and key.endswith(("use_dora", "use_rslora", "lora_bias")):
                raise CheckpointError(f"{path} says {key[-80:]}, which changes how it is added; it is not supported")

    def alpha(self, place: Place) -> float | None:
        """Of one layer, or of all; None where nothing is said. Raises: CheckpointError for what is no number."""
        patterns = self._get(place.part, "alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{self.path}: its alpha_pattern is {shown(patterns)}, expected an object")
        alpha = self._get(place.part, "lora_alpha")
        for pattern, value in patterns.items():
            # PEFT takes it for a regular expression at the end of the name; what diffusers writes is the name itself.
            name = pattern.removeprefix("^").removeprefix("text_model.")
            if not re.fullmatch(r"[\w.]+", name):
                raise CheckpointError(f"{self.path}: alpha_pattern has {shown(pattern)}, expected the name of a layer")
            if f".{place.name}".endswith(f".{name}"):
                alpha = value
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and abs(alpha) < 1e9
        if alpha is not None and not number:
            raise CheckpointError(f"{self.path}: its metadata says lora_alpha {shown(alpha)}, expected a number")
        return None if alpha is None else float(alpha)

    def _get(self, part: str, key: str) -> Any:
        return self.settings.get(f"{part}.{key}", self.settings.get(key) if part == UNET else None)


def _refuse_other_family(path: Path, sources: Mapping[str, Source], unet: nn.Module) -> None:
    """Raises: CheckpointError where the names, or the width of the text that cross attention reads, tell the family."""
    assert isinstance(unet, UNet)
    name = lambda width: WIDTHS.get(width, f"a model that reads text of width {width}")  # noqa: E731
    own, family = name(unet.config.cross_attention_dim), None
    widths = [s.shape[1] for key, s in sources.items() if CROSS.match(key) and len(s.shape) > 1]
    if any(map(TRANSFORMER.match, sources)):
        family = "a transformer, such as Stable Diffusion 3 or FLUX"
    elif widths:
        family = name(widths[0])
    elif any(map(XL.match, sources)):
        family = WIDTHS[2048]
    if family not in (None, own):
        raise CheckpointError(f"{path} is a LoRA for {family}, and this model is {own}; give one for this model")

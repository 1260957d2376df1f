"""Models by their names on the hub: the files of a diffusers folder that are needed, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from minireuse.checkpoints.tensors import PICKLES, CheckpointError, reason

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)

CONFIGS = ("model_index.json", "scheduler/*.json", "tokenizer*/*.json", "tokenizer*/merges.txt")
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
# Of one set of weights: a whole file, or shards and their index.
PLAIN = ("{}.safetensors", "{}-?????-of-?????.safetensors", "{}.safetensors.index.json")
HALF = (
    "{}.fp16.safetensors",
    "{}.fp16-?????-of-?????.safetensors",
    "{}-?????-of-?????.fp16.safetensors",
    "{}.safetensors.index.fp16.json",
)


def locate(path: Path, *, half: bool, weights: bool = True) -> Path:
    """The path itself; or, where nothing is there and it is written like a name on the hub, a folder with that model.

    half: take float16 weights where there are some, and others where not. Without it, it is the other way round.
    weights: False fetches configurations and tokenizers alone.

    Raises: CheckpointError where the hub has no such model, or cannot be reached and the model is not in its cache.
    """
    name = path.as_posix()
    if path.exists() or not NAME.fullmatch(name) or path.suffix in (".safetensors", *PICKLES):
        return path
    first, second = (HALF, PLAIN) if half else (PLAIN, HALF)
    configs = [*CONFIGS, *(f"{part}/config.json" for part in STEMS)]
    try:
        if not weights:
            return Path(snapshot_download(name, allow_patterns=configs))
        wanted = [pattern for part in STEMS for pattern in _patterns(part, first)]
        folder = Path(snapshot_download(name, allow_patterns=[*configs, *wanted]))
        lacking = [part for part in STEMS if (folder / part).is_dir() and not _holds(folder, _patterns(part, first))]
        if lacking:
            wanted = [pattern for part in lacking for pattern in _patterns(part, second)]
            snapshot_download(name, allow_patterns=wanted)
    except Exception as error:  # the hub raises many kinds, network errors among them
        raise CheckpointError(
            f"no model at {name}, and none of that name from the hub ({reason(error)}); "
            "give a diffusers folder, an original .safetensors file, or a name on the hub"
        ) from None
    return folder


def _patterns(part: str, weights: tuple[str, ...]) -> list[str]:
    return [f"{part}/{name.format(STEMS[part])}" for name in weights]


def _holds(folder: Path, patterns: list[str]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)

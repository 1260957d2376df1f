"""Reading files: diffusers folders, single files in the original layout, LoRAs, their JSON, tokenizers, the hub."""

from minireuse.checkpoints.fields import ConfigError
from minireuse.checkpoints.hub import locate
from minireuse.checkpoints.lora import LoRA, find_lora, merge_loras
from minireuse.checkpoints.parts import Parts, describe, empty_parts, load_parts
from minireuse.checkpoints.tensors import CheckpointError, reason

__all__ = [
    "CheckpointError",
    "ConfigError",
    "LoRA",
    "Parts",
    "describe",
    "empty_parts",
    "find_lora",
    "load_parts",
    "locate",
    "merge_loras",
    "reason",
]

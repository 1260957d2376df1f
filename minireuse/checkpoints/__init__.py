"""Reading files: diffusers folders, single files in the original layout, their JSON, and tokenizers."""

from minireuse.checkpoints.fields import ConfigError
from minireuse.checkpoints.parts import Parts, describe, empty_parts, load_parts
from minireuse.checkpoints.tensors import CheckpointError, reason

__all__ = ["CheckpointError", "ConfigError", "Parts", "describe", "empty_parts", "load_parts", "reason"]

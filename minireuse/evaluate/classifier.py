"""Does a picture show its prompt? A small classifier that answers questions about pictures of a captioned world.

It comes with the shipped model, in the folder `classifier`: its questions, the phrases that answer each of them, and
its weights. A prompt is asked the same questions: an answer holds where its phrase stands in the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minireuse.checkpoints.tensors import CheckpointError, fill, open_file, read_json
from minireuse.files import shipped_model

NONE = "none"  # the answer where a prompt says nothing


@dataclass(frozen=True)
class ClassifierConfig:
    """questions: by question the phrases that answer it; the first may be "none", for prompts that say nothing."""

    questions: Mapping[str, Sequence[str]]
    widths: tuple[int, ...] = (16, 32, 64, 128)
    norm_groups: int = 8


class Block(nn.Module):
    """A residual block that halves the sides. Shapes: (B, C, H, W) -> (B, width, H/2, W/2)."""

    def __init__(self, channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width)
        self.shortcut = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(h)) + self.shortcut(F.avg_pool2d(x, 2)))


class Features(nn.Module):
    """What a picture is judged by, averaged over its places. Shapes: (B, 3, H, W) uint8 -> (B, num_features)."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        first, *_, self.num_features = config.widths  # torchmetrics reads this name
        self.stem = nn.Conv2d(3, first, 3, stride=2, padding=1)
        pairs = zip(config.widths, config.widths[1:], strict=False)
        self.blocks = nn.Sequential(*(Block(one, two, config.norm_groups) for one, two in pairs))

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.stem.weight.dtype).div(127.5).sub(1)
        h: Tensor = self.blocks(F.silu(self.stem(x)))
        return h.mean(dim=(2, 3))


class Classifier(nn.Module):
    """For each question the logits of its answers. Shapes: (B, 3, H, W) uint8 -> by question (B, answers)."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.features = Features(config)
        width = self.features.num_features
        self.answers = nn.ModuleDict({name: nn.Linear(width, len(told)) for name, told in config.questions.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(images)
        return {name: answer(features) for name, answer in self.answers.items()}

    @torch.no_grad()
    def read(self, images: Sequence[np.ndarray]) -> list[dict[str, str]]:
        """The answer of each question for each picture. Shapes: images (H, W, 3) uint8."""
        logits = [
            self(rearrange(torch.from_numpy(np.stack(images[i : i + 32])), "b h w c -> b c h w"))
            for i in range(0, len(images), 32)
        ]
        return [
            {name: self.config.questions[name][int(given[i].argmax())] for name, given in batch.items()}
            for batch in logits
            for i in range(len(next(iter(batch.values()))))
        ]

    def follow(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float | None]:
        """The share of the questions that picture and prompt answer alike; None for prompts that leave one open."""
        told = [asked(prompt, self.config.questions) for prompt in prompts]
        return [
            None if said is None else float(np.mean([seen[name] == said[name] for name in said]))
            for seen, said in zip(self.read(images), told, strict=True)
        ]


def asked(prompt: str, questions: Mapping[str, Sequence[str]]) -> dict[str, str] | None:
    """What a prompt answers to each question; None where one that has to be answered is not, or is in two ways."""
    found = {}
    for name, phrases in questions.items():
        told = [p for p in phrases if p != NONE and re.search(rf"\b{re.escape(p)}\b", prompt)]
        told = told or [NONE] * (NONE in phrases)
        if len(told) != 1:
            return None
        found[name] = told[0]
    return found


def read_classifier(folder: Path) -> Classifier:
    """The classifier in a folder that holds config.json and model.safetensors, in float32. Raises: CheckpointError."""
    path = folder / "config.json"
    config: dict[str, Any] = read_json(path)
    try:
        questions = {str(name): tuple(map(str, phrases)) for name, phrases in config["questions"].items()}
        classifier = Classifier(ClassifierConfig(questions, tuple(map(int, config["widths"])), config["norm_groups"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} describes no classifier ({error!r}); download the model again") from None
    tensors = open_file(folder / "model.safetensors")
    fill(classifier, tensors.items(), folder, torch.float32)
    return classifier.eval()


def own_classifier(model: Path | None) -> Classifier | None:
    """The classifier that lies in a model's folder, if one does. model: None for the shipped one."""
    folder = (model or shipped_model()) / "classifier"
    return read_classifier(folder) if folder.is_dir() else None

"""Teach the text encoder to tell which words belong to which object, before a U-Net has to learn that from pictures.

Stable Diffusion's text encoder comes trained, by CLIP. Trained from nothing along with the U-Net, one learns last which
colour belongs to which shape: the pictures showed two objects in the right places with their colours and shapes mixed.
So it first answers questions about captions. A reader asks for each place of a scene what stands there, by a single
layer of cross-attention over the token states: just as the U-Net will ask. It goes on asking while the U-Net is trained
(train_unet.py): what the U-Net does not use yet would be forgotten, which object stands left and which right first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minireuse.text import TextEncoder

from trainer import train
from world import COLOURS, FILLS, RELATIONS, SHAPES, SIZES, Scene, vary_caption

PLACES = ("alone", *RELATIONS)
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "there": ("empty", "taken"),
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "fill": FILLS,
    "background": tuple(COLOURS),
}
IGNORED = -100  # cross_entropy's own mark


class Reader(nn.Module):
    """What stands at each place, read from token states by one layer of cross-attention."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(len(PLACES), width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.answers = nn.ModuleDict({name: nn.Linear(width, len(QUESTIONS[name])) for name in QUESTIONS})

    def forward(self, context: Tensor) -> dict[str, Tensor]:
        """Shapes: (B, M, D) -> for each question (B, places, answers)."""
        asked = self.places.expand(len(context), -1, -1)
        heard, _ = self.attention(asked, context, context, need_weights=False)
        return {name: layer(heard) for name, layer in self.answers.items()}


class Reading(nn.Module):
    """What is trained together."""

    def __init__(self, text: TextEncoder, reader: Reader) -> None:
        super().__init__()
        self.text, self.reader = text, reader


def right_answers(scene: Scene) -> dict[str, list[int]]:
    """The answer's index for each question and place; IGNORED where there is nothing to tell."""
    taken = {"alone": scene.objects[0]} if scene.relation is None else {scene.relation: scene.objects[0]}
    if scene.relation is not None:
        taken[OPPOSITE[scene.relation]] = scene.objects[1]
    found: dict[str, list[int]] = {
        "there": [int(place in taken) for place in PLACES],
        "background": [QUESTIONS["background"].index(scene.background)] * len(PLACES),
    }
    for name in ("shape", "colour", "size", "fill"):
        found[name] = [
            QUESTIONS[name].index(getattr(taken[place], name)) if place in taken else IGNORED for place in PLACES
        ]
    return found


def reading_losses(reader: Reader, context: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
    """How wrong the reader is, question by question; 0 of no scenes. Shapes: context (B, M, D), of captions of them."""
    answers = [right_answers(scene) for scene in scenes]
    losses = {}
    for name, given in reader(context).items():
        right = torch.tensor([a[name] for a in answers], dtype=torch.long, device=context.device).flatten()
        total = F.cross_entropy(given.flatten(0, 1), right, ignore_index=IGNORED, reduction="sum")
        losses[name] = total / max(1, int((right != IGNORED).sum()))
    return losses


def train_text(
    text: TextEncoder,
    reader: Reader,
    folder: Path,
    scenes: list[Scene],
    steps: int,
    batch: int,
    lr: float,
    device: str,
) -> None:
    """Train the encoder and its reader in place; resumes like any stage of the training."""
    both = Reading(text, reader).to(device)

    def loss_at(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([3, step])
        shown = [scenes[i] for i in rng.choice(len(scenes), min(batch, len(scenes)), replace=False)]
        context = text(text.tokenize([vary_caption(scene, rng) for scene in shown]).to(device))
        losses = reading_losses(reader, context, shown)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    train("text", folder, both, loss_at, steps=steps, peak_lr=lr, ema_decay=0.99)

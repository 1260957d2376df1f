"""Teach the text encoder what captions tell, before a U-Net has to learn that from pictures.

Stable Diffusion's text encoder comes trained, by CLIP. Trained from nothing along with the U-Net, one learns last which
colour belongs to which thing. So it first answers questions about captions: a reader asks for each question of the
world (`world.QUESTIONS`) what the caption tells, by a single layer of cross-attention over the token states, just as
the U-Net will ask. It goes on asking while the U-Net is trained (train_unet.py), so that what the U-Net does not use
yet is not forgotten.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minireuse.text import TextEncoder

from trainer import part_of, train
from world import QUESTIONS, Scene, answers, vary_caption


class Reader(nn.Module):
    """What a caption tells, read from token states by one layer of cross-attention."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.asked = nn.Parameter(torch.randn(len(QUESTIONS), width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.answers = nn.ModuleDict({name: nn.Linear(width, len(possible)) for name, possible in QUESTIONS.items()})

    def forward(self, context: Tensor) -> dict[str, Tensor]:
        """Shapes: (B, M, D) -> for each question (B, answers)."""
        heard, _ = self.attention(self.asked.expand(len(context), -1, -1), context, context, need_weights=False)
        return {name: self.answers[name](heard[:, i]) for i, name in enumerate(QUESTIONS)}


class Reading(nn.Module):
    """What is trained together."""

    def __init__(self, text: TextEncoder, reader: Reader) -> None:
        super().__init__()
        self.text, self.reader = text, reader


def question_losses(given: dict[str, Tensor], scenes: list[Scene]) -> dict[str, Tensor]:
    """The cross entropy of each question's answers; 0 of no scenes. Shapes: given, by question, (B, answers)."""
    right = [answers(scene) for scene in scenes]
    losses = {}
    for name, logits in given.items():
        numbers = torch.tensor([told[name] for told in right], dtype=torch.long, device=logits.device)
        losses[name] = F.cross_entropy(logits, numbers, reduction="sum") / max(1, len(scenes))
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
        shown = part_of(shown)
        context = text(text.tokenize([vary_caption(scene, rng) for scene in shown]).to(device))
        losses = question_losses(reader(context), shown)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    train("text", folder, both, loss_at, steps=steps, peak_lr=lr, ema_decay=0.99)

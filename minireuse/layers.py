"""The convolutional building blocks shared by the U-Net and the VAE, named as in diffusers' checkpoints.

Source: diffusers `models/resnet.py`, `models/downsampling.py`, `models/upsampling.py`, `models/embeddings.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of timesteps, cosines first (Vaswani et al. 2017, section 3.5).

    Shapes: t (B,) -> (B, width), float32; width is even.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """A two-layer perceptron over the sinusoidal embedding."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, out_width)
        self.linear_2 = nn.Linear(out_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a residual; the timestep enters between them where `time_width` is given."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_width: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_width is None else nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Shapes: x (B, C, H, W), time (B, time_width) -> (B, C', H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve height and width. The U-Net pads all four sides, the VAE's encoder only right and bottom."""

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=int(symmetric))
        self.symmetric = symmetric

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

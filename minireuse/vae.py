"""The KL autoencoder between pixels and latents, named as in diffusers' checkpoints.

Source: diffusers `models/autoencoders/autoencoder_kl.py` and `vae.py` (Kingma & Welling, arXiv 1312.6114).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minireuse.attention import fused_attention
from minireuse.config import VAEConfig
from minireuse.layers import Downsample, ResnetBlock, Upsample

EPS = 1e-6  # of every group norm in the VAE; the U-Net's is 1e-5


class SpatialAttention(nn.Module):
    """Self-attention over all positions with a single head, inside the residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = (f(tokens).unsqueeze(1) for f in (self.to_q, self.to_k, self.to_v))  # (B, 1, N, C)
        y = self.to_out[0](fused_attention(q, k, v).squeeze(1))
        return x + y.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups, eps=EPS) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, *, layers: int, groups: int, down: bool) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups=groups, eps=EPS) for a, b in itertools.pairwise(widths))
        self.downsamplers = nn.ModuleList([Downsample(channels, symmetric=False)] if down else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, *, layers: int, groups: int, up: bool) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups=groups, eps=EPS) for a, b in itertools.pairwise(widths))
        self.upsamplers = nn.ModuleList([Upsample(channels)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Pixels to the moments of the latents. Shapes: (B, 3, H, W) -> (B, 2 * latent_channels, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                widths[max(i - 1, 0)], width, layers=config.layers_per_block, groups=groups, down=i < len(widths) - 1
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to pixels. Shapes: (B, latent_channels, h, w) -> (B, 3, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                widths[max(i - 1, 0)], width, layers=config.layers_per_block + 1, groups=groups, up=i < len(widths) - 1
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class VAE(nn.Module):
    """Encode images to latents of about unit variance, and decode them; the scaling factor is applied inside.

    Units: pixels in -1 ... 1.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, unscaled, as the training loss needs them.

        Shapes: (B, 3, H, W) -> two of (B, latent_channels, h, w).
        """
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents: the posterior's mean, or with standard normal `noise` of its shape a sample.

        Shapes: (B, 3, H, W) -> (B, latent_channels, h, w).
        """
        mean, log_variance = self.moments(images)
        latents = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        return latents * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images of scaled latents. Shapes: (B, latent_channels, h, w) -> (B, 3, H, W)."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))

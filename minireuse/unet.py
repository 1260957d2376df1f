"""The conditional U-Net of Stable Diffusion, with modules named as in diffusers' checkpoints.

Source: Rombach et al., arXiv 2112.10752; diffusers `models/unets/unet_2d_condition.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minireuse.attention import Attention, SpatialTransformer, Text, TextKV, TransformerBlock, Watch
from minireuse.cache import ReuseCache
from minireuse.config import UNetConfig
from minireuse.layers import Downsample, ResnetBlock, TimestepEmbedding, Upsample, timestep_embedding
from minireuse.plan import PLAIN, PREDICTION, Site, StepPlan

EPS = 1e-5  # of the group norms outside the transformers


@dataclass(frozen=True)
class Layer:
    """One stop of the walk through the U-Net. Going down, each leaves a skip connection; going up, each takes one."""

    module: nn.Module
    attention: SpatialTransformer | None = None
    upsample: Upsample | None = None

    def __call__(
        self, x: Tensor, time: Tensor, context: Text, step: StepPlan, cache: ReuseCache | None, watch: Watch | None
    ) -> Tensor:
        x = self.module(x, time) if isinstance(self.module, ResnetBlock) else self.module(x)
        if self.attention is not None:
            x = self.attention(x, context, step, cache, watch)
        return x if self.upsample is None else self.upsample(x)


class Block(nn.Module):
    """One level of the U-Net: residual blocks, each followed by a transformer if the level has attention.

    It only holds modules under the checkpoint's names. The U-Net walks over them, since skip connections cross levels.
    """

    def __init__(self, widths: Iterable[tuple[int, int]], config: UNetConfig, level: int) -> None:
        super().__init__()
        widths = list(widths)
        self.resnets = nn.ModuleList(_resnet(a, b, config) for a, b in widths)
        self.attentions = nn.ModuleList(_transformer(level, config) for _ in widths if config.attention[level])

    def pairs(self) -> Iterator[tuple[nn.Module, SpatialTransformer | None]]:
        """Each residual block with the transformer after it."""
        yield from zip(self.resnets, self.attentions or [None] * len(self.resnets), strict=True)


class DownBlock(Block):
    def __init__(self, in_channels: int, config: UNetConfig, level: int) -> None:
        channels = config.block_out_channels[level]
        super().__init__(pairwise([in_channels] + [channels] * config.layers_per_block), config, level)
        down = level < len(config.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([Downsample(channels, symmetric=True)] if down else [])


class UpBlock(Block):
    def __init__(self, in_channels: int, skips: list[int], config: UNetConfig, level: int) -> None:
        channels = config.block_out_channels[level]
        widths = [in_channels] + [channels] * (len(skips) - 1)
        super().__init__(((a + skip, channels) for a, skip in zip(widths, skips, strict=True)), config, level)
        self.upsamplers = nn.ModuleList([Upsample(channels)] if level > 0 else [])


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(channels, channels, config) for _ in range(2))
        self.attentions = nn.ModuleList([_transformer(-1, config)])

    def forward(
        self, x: Tensor, time: Tensor, context: Text, step: StepPlan, cache: ReuseCache | None, watch: Watch | None
    ) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context, step, cache, watch)
        return self.resnets[1](x, time)


class UNet(nn.Module):
    """Predicts the noise (or v) in latents, given timesteps and a text context."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        added = config.added_width
        self.add_embedding = None if added is None else TimestepEmbedding(added, 4 * widths[0])
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(level - 1, 0)], config, level) for level in range(len(widths))
        )
        self.mid_block = MidBlock(config)
        skips = [widths[0]]  # the widths of what the down path leaves for the up path, in order
        for i, width in enumerate(widths):
            skips += [width] * (config.layers_per_block + (i < last))
        self.up_blocks = nn.ModuleList()
        width = widths[-1]
        for i in reversed(range(len(widths))):
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(width, taken, config, i))
            width = widths[i]
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.deep_sites = self._deep_sites()
        self._place_attention()

    def _down_layers(self) -> list[Layer]:
        layers = [Layer(self.conv_in)]
        for block in cast(Iterable[DownBlock], self.down_blocks):
            layers += [Layer(*pair) for pair in block.pairs()] + [Layer(d) for d in block.downsamplers]
        return layers

    def _up_layers(self) -> list[Layer]:
        layers = []
        for block in cast(Iterable[UpBlock], self.up_blocks):
            *pairs, last = block.pairs()
            layers += [Layer(*pair) for pair in pairs] + [Layer(*last, *block.upsamplers)]
        return layers

    def _deep_sites(self) -> tuple[Site, ...]:
        """Of each layer of the up path, the feature that enters it. What lies deeper mirrors what lies above."""
        addresses = [
            f"up_blocks.{b}" + (f".resnets.{i}" if i else "")
            for b, block in enumerate(cast(Iterable[UpBlock], self.up_blocks))
            for i in range(len(block.resnets))
        ]
        return tuple(
            Site(a, "deep", depth) for a, depth in zip(addresses, reversed(range(len(addresses))), strict=True)
        )

    def _place_attention(self) -> None:
        """Tell every attention its address and how many layers lie between it and the U-Net's nearer end."""
        down, up = self._down_layers(), self._up_layers()
        walk: list[tuple[int, nn.Module | None]] = [(depth, layer.attention) for depth, layer in enumerate(down)]
        walk += [(len(down), self.mid_block.attentions[0])]
        walk += [(depth, layer.attention) for depth, layer in zip(reversed(range(len(down))), up, strict=True)]
        address = {module: name for name, module in self.named_modules()}
        self.attention_layers: list[Attention] = []  # in the order of the walk; a plain list registers no module twice
        for depth, transformer in walk:
            for module in transformer.modules() if transformer else ():
                if isinstance(module, Attention):
                    module.place(address[module], depth)
                    self.attention_layers.append(module)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every reusable tensor: maps, outputs and deep features, in the order of the walk, and the prediction."""
        maps = [layer.map_site for layer in self.attention_layers]
        outputs = [layer.out_site for layer in self.attention_layers]
        return (*maps, *outputs, *self.deep_sites, PREDICTION)

    def text_kv(self, context: Tensor) -> TextKV:
        """What cross attention makes of the prompt: computed once, it can be given to every call as `context`.

        Shapes: context (B, M, D).
        """
        layers = (m for m in self.modules() if isinstance(m, TransformerBlock))
        return TextKV({m.attn2.address: m.attn2.project(context) for m in layers})

    def added(self, pooled: Tensor | None, height: int, width: int) -> Tensor | None:
        """What SDXL is told of a picture beside the context: the pooled text, and sizes; None where nothing is told.

        The sizes are those of the original, of the corner it was cropped at, and of the picture: height first.
        Shapes: pooled (B, P) -> (B, P + 6 S). Units: pixels. Source: arXiv 2307.01952 section 2.2.
        """
        if pooled is None:
            return None
        sizes = torch.tensor([height, width, 0, 0, height, width], device=pooled.device)
        told = timestep_embedding(sizes, self.config.size_width).flatten().to(pooled.dtype)  # (6 S,)
        return torch.cat([pooled, told.expand(len(pooled), -1)], dim=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Text,
        step: StepPlan | None = None,
        cache: ReuseCache | None = None,
        watch: Watch | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """The model's prediction; `step` and `cache` None make it an ordinary U-Net, `watch` looks at its attention.

        added: what SDXL is told beside the context (`added`).
        Shapes: x (B, 4, h, w), t scalar or (B,), context (B, M, D) or `text_kv` of it, added (B, P + 6 S)
        -> (B, 4, h, w).
        """
        if step is not None and (step.reuse or step.store) and cache is None:
            raise ValueError("this step reuses or stores but there is no cache; pass a ReuseCache")
        if (added is None) != (self.add_embedding is None):
            raise ValueError(
                "this U-Net also reads the pooled text and sizes; pass what its added() gives"
                if added is None
                else "this U-Net reads no pooled text and sizes; leave out added"
            )
        step = PLAIN if step is None else step
        # A number is filled in on the device: copying it there would make the host wait for the device at every call.
        if not isinstance(t, Tensor):
            t = torch.full((1,), float(t), device=x.device)
        t = t.to(x.device).expand(x.shape[0])  # (B,)
        time = self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).to(x.dtype))  # (B, 4 C)
        if self.add_embedding is not None:
            time = time + self.add_embedding(added)

        down, up = self._down_layers(), self._up_layers()
        # At most one deep feature is reused, since it skips the deeper ones: the walk then turns round where it enters.
        turn = next((j for j, site in enumerate(self.deep_sites) if site in step.reuse), None)
        skips = []
        for layer in down if turn is None else down[: len(down) - turn]:
            x = layer(x, time, context, step, cache, watch)  # (B, C_i, h_i, w_i), halved from level to level
            skips.append(x)
        if cache is None or turn is None:
            x = self.mid_block(x, time, context, step, cache, watch)  # (B, C_last, h_last, w_last)
        else:
            x = cache.load(self.deep_sites[turn], _entering(up[turn], skips[-1]), step, like=x).read(x)
        for layer, site in list(zip(up, self.deep_sites, strict=True))[turn or 0 :]:
            if cache is not None and site in step.store:
                cache.store(site, x, step, dtype=x.dtype)
            x = layer(torch.cat([x, skips.pop()], dim=1), time, context, step, cache, watch)  # doubled on the way up
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 4, h, w)


def _entering(layer: Layer, skip: Tensor) -> tuple[int, ...]:
    """The shape of what enters a layer of the up path together with `skip`."""
    assert isinstance(layer.module, ResnetBlock)
    return (skip.shape[0], layer.module.norm1.num_channels - skip.shape[1], *skip.shape[2:])


def _resnet(in_channels: int, out_channels: int, config: UNetConfig) -> ResnetBlock:
    time_width = 4 * config.block_out_channels[0]
    return ResnetBlock(in_channels, out_channels, groups=config.norm_groups, eps=EPS, time_width=time_width)


def _transformer(level: int, config: UNetConfig) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[level],
        config.cross_attention_dim,
        config.heads[level],
        depth=config.depths[level] if config.depths else 1,
        groups=config.norm_groups,
        linear=config.linear_projection,
    )

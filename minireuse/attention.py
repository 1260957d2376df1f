"""Attention that can keep its map or use a kept one, and the transformer blocks around it.

Modules are named as in diffusers' checkpoints (`models/attention.py`, `models/transformers/transformer_2d.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minireuse.cache import Kept, ReuseCache
from minireuse.plan import PLAIN, Site, StepPlan


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in one kernel: no map is ever written out.

    Shapes: q (B, K, N, d), k and v (B, K, M, d) -> (B, K, N, d).
    """
    return F.scaled_dot_product_attention(q, k, v)


def attention_probs(q: Tensor, k: Tensor, out: Tensor | None = None) -> Tensor:
    """The attention map softmax(q k^T / sqrt(d)), whose softmax is computed in float32 whatever the inputs are.

    out: where to leave the map, in q's dtype, rounded once at the end; no gradients. Without it the map is float32.
    Shapes: q (B, K, N, d), k (B, K, M, d), out (B, K, N, M) -> (B, K, N, M).
    Source: Vaswani et al. 2017 equation 1.
    """
    q, k = q * q.shape[-1] ** -0.5, k.transpose(-1, -2)  # scaling the scores instead might leave half precision's range
    if out is None:
        return (q @ k).softmax(dim=-1, dtype=torch.float32)
    return torch.softmax(torch.matmul(q, k, out=out), dim=-1, out=out)  # its kernels use float32 for halves, too


def storing_attention(q: Tensor, k: Tensor, v: Tensor, kept: Kept) -> Tensor:
    """The same as `fused_attention`, leaving the map in `kept`.

    Block by block: what has been computed is kept and multiplied by v before it leaves the processor's cache. A map
    kept in the dtype of the computation is computed right where it is kept; any other in the same memory again and
    again, since fresh pages cost more than the softmax.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):  # gradients need the whole map at once
        probs = attention_probs(q, k).to(q.dtype)
        kept.fill(probs)
        return probs @ v
    y = torch.empty_like(q)
    blocks = list(kept.blocks(q.device))
    scratch = None if kept.holds(q) else q.new_empty(*q[blocks[0]].shape[:3], k.shape[2])
    for block in blocks:
        heads, (images, depth, height, _) = block[:2], q[block].shape
        room = kept.values[block] if scratch is None else scratch[:images, :depth, :height]
        probs = attention_probs(q[block], k[heads], out=room)
        if scratch is not None:
            kept[block] = probs
        y[block] = probs @ v[heads]
    return y


KV = tuple[Tensor, Tensor]  # keys and values, each (B, K, M, d)


@dataclass(frozen=True)
class TextKV:
    """The keys and values of every cross attention, by address: they depend on the prompt alone, not on the call."""

    kv: Mapping[str, KV]


Text = Tensor | TextKV  # what the U-Net is told: a context (B, M, D'), or what its layers have made of one


class Attention(nn.Module):
    """Multi-head attention over `context`, or over its own input where there is none."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.heads = heads
        self.address = ""  # the module's own path, given by the U-Net that it is part of

    def project(self, context: Tensor) -> KV:
        """Keys and values of a context. Shapes: (B, M, D') -> two of (B, K, M, d)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(
        self,
        x: Tensor,
        context: Tensor | KV | None = None,
        step: StepPlan = PLAIN,
        cache: ReuseCache | None = None,
    ) -> Tensor:
        """Shapes: x (B, N, D), context (B, M, D') or what `project` made of it -> (B, N, D)."""
        source = x if context is None else context
        site = Site(self.address, "map")
        v = self._split(self.to_v(source)) if isinstance(source, Tensor) else source[1]
        if cache is not None and site in step.reuse:
            shape = (x.shape[0], self.heads, x.shape[1], v.shape[2])
            y = cache.look_up(site, shape, step, like=v) @ v
        else:
            q = self._split(self.to_q(x))
            k = self._split(self.to_k(source)) if isinstance(source, Tensor) else source[0]
            if cache is not None and site in step.store:
                y = storing_attention(q, k, v, cache.hold(site, (*q.shape[:3], k.shape[2]), step, like=v))
            elif step.explicit:
                y = attention_probs(q, k).to(v.dtype) @ v
            else:
                y = fused_attention(q, k, v)
        return self.to_out[0](rearrange(y, "b k n d -> b n (k d)"))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (k d) -> b k n d", k=self.heads)


class GEGLU(nn.Module):
    """A gated linear unit with GELU as its gate (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # Index 1 is the dropout of diffusers' list: it has no weights, but the last layer is number 2 in every file.
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, each normalised before and added after."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Text, step: StepPlan, cache: ReuseCache | None) -> Tensor:
        """Shapes: x (B, N, D), context (B, M, D') -> (B, N, D)."""
        text = context.kv[self.attn2.address] if isinstance(context, TextKV) else context
        x = x + _attend(self.attn1, self.norm1, x, None, step, cache)
        x = x + _attend(self.attn2, self.norm2, x, text, step, cache)
        return x + self.ff(self.norm3(x))


def _attend(
    attention: Attention,
    norm: nn.LayerNorm,
    x: Tensor,
    context: Tensor | KV | None,
    step: StepPlan,
    cache: ReuseCache | None,
) -> Tensor:
    """The attention's output, or (kind `out`) the kept one: then nothing of the layer runs, its norm included."""
    site = Site(attention.address, "out")
    if cache is not None and site in step.reuse:
        return cache.load(site, x.shape, step, like=x)
    y: Tensor = attention(norm(x), context, step, cache)
    if cache is not None and site in step.store:
        cache.store(site, y, step, dtype=x.dtype)
    return y


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map, inside a residual."""

    def __init__(self, channels: int, context_width: int, heads: int, *, groups: int, linear: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, unlike the U-Net's other norms
        # SD 1.x projects with 1x1 convolutions, SD 2.x with linear layers: same values, weights of another shape.
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_width, heads)])
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.linear = linear

    def forward(self, x: Tensor, context: Text, step: StepPlan, cache: ReuseCache | None) -> Tensor:
        """Shapes: x (B, C, H, W), context (B, M, D') -> (B, C, H, W)."""
        height = x.shape[2]
        y = self.norm(x)
        if self.linear:
            y = self.proj_in(rearrange(y, "b c h w -> b (h w) c"))
        else:
            y = rearrange(self.proj_in(y), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            y = block(y, context, step, cache)
        if self.linear:
            y = rearrange(self.proj_out(y), "b (h w) c -> b c h w", h=height)
        else:
            y = self.proj_out(rearrange(y, "b (h w) c -> b c h w", h=height))
        return x + y

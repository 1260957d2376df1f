"""Attention that can keep its map or use a kept one, and the transformer blocks around it.

`Attention.forward` is where the method happens. A site that is reused takes its map from the cache, and computes no
queries, no keys and no softmax. A site that is stored writes its map out. Any other site runs the fused kernel, which
never makes a map. (Where attention is watched, or maps are asked for as a baseline, they are written out as well.)

Modules are named as in diffusers' checkpoints (`models/attention.py`, `models/transformers/transformer_2d.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minireuse.cache import CacheTensor, FloatTensor, ReuseCache, blocks
from minireuse.plan import PLAIN, Site, StepPlan

Watch = Callable[[Site, int, Tensor], Tensor | None]
"""`watch(site, call, scores) -> scores | None`: sees the scores (2B, K, N, M) of a call before the softmax.

What it returns takes their place; None leaves them as they are. A map that is reused has no scores to see.
"""


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in one kernel: no map is ever written out.

    Shapes: q (B, K, N, d), k and v (B, K, M, d) -> (B, K, N, d).
    """
    return F.scaled_dot_product_attention(q, k, v)


def attention_scores(q: Tensor, k: Tensor, out: Tensor | None = None) -> Tensor:
    """q k^T / sqrt(d), what the softmax is taken of.

    out: where to leave them. Shapes: q (B, K, N, d), k (B, K, M, d), out (B, K, N, M) -> (B, K, N, M).
    """
    q = q * q.shape[-1] ** -0.5  # scaling the scores instead might leave half precision's range
    return torch.matmul(q, k.transpose(-1, -2), out=out)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `fused_attention`, with the map written out: the output, and the map in float32.

    Shapes: q (B, K, N, d), k and v (B, K, M, d) -> (B, K, N, d), (B, K, N, M).
    Source: Vaswani et al. 2017 equation 1; the softmax is computed in float32 whatever the inputs are.
    """
    probs = attention_scores(q, k).softmax(dim=-1, dtype=torch.float32)
    return probs.to(v.dtype) @ v, probs


def storing_attention(q: Tensor, k: Tensor, v: Tensor, kept: CacheTensor) -> Tensor:
    """The same as `fused_attention`, leaving the map in `kept`.

    Block by block: what has been computed is kept and multiplied by v before it leaves the processor's cache. If the
    cache keeps the computation's own dtype, each block is computed in place. If not, all blocks share one scratch
    buffer, because fresh pages of memory cost more than the softmax.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):  # gradients need the whole map at once
        y, probs = explicit_attention(q, k, v)
        kept.fill(probs.to(q.dtype))
        return y
    y = torch.empty_like(q)
    parts = list(blocks(kept.shape, q.device))
    in_place = kept.values if isinstance(kept, FloatTensor) and kept.holds(q) else None
    scratch = None if in_place is not None else q.new_empty(*q[parts[0]].shape[:3], k.shape[2])
    for block in parts:
        images_and_heads, (b, heads, n, _) = block[:2], q[block].shape
        room = in_place[block] if scratch is None else scratch[:b, :heads, :n]  # type: ignore[index]
        scores = attention_scores(q[block], k[images_and_heads], out=room)
        probs = torch.softmax(scores, dim=-1, out=room)  # in float32 inside
        if scratch is not None:
            kept.write(block, probs)
        y[block] = probs @ v[images_and_heads]
    return y


KV = tuple[Tensor, Tensor]  # keys and values, each (B, K, M, d)


@dataclass(frozen=True)
class TextKV:
    """The keys and values of every cross attention, by address: they depend on the prompt alone, not on the call."""

    kv: Mapping[str, KV]


Text = Tensor | TextKV  # what the U-Net is given: a context (B, M, D'), or the keys and values of one


class Attention(nn.Module):
    """Multi-head attention over `context`, or over its own input where there is none."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.heads = heads
        self.place("", 0)

    def place(self, address: str, depth: int) -> None:
        """Tell the module where in the U-Net it is: the names of what it computes, its map and its output."""
        self.address = address
        self.map_site, self.out_site = Site(address, "map", depth), Site(address, "out", depth)

    def project(self, context: Tensor) -> KV:
        """Keys and values of a context. Shapes: (B, M, D') -> two of (B, K, M, d)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(
        self,
        x: Tensor,
        context: Tensor | KV | None = None,
        step: StepPlan = PLAIN,
        cache: ReuseCache | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Shapes: x (B, N, D), context (B, M, D') or what `project` made of it -> (B, N, D)."""
        source = x if context is None else context
        site = self.map_site
        v = self._split(self.to_v(source)) if isinstance(source, Tensor) else source[1]  # (B, K, M, d)
        if cache is not None and site in step.reuse:
            shape = (x.shape[0], self.heads, x.shape[1], v.shape[2])
            y = cache.load(site, shape, step, like=v).apply(v)
        else:
            q = self._split(self.to_q(x))  # (B, K, N, d)
            k = self._split(self.to_k(source)) if isinstance(source, Tensor) else source[0]  # (B, K, M, d)
            y = self._attend(q, k, v, step, cache, watch)
        return self.to_out[0](rearrange(y, "b k n d -> b n (k d)"))  # (B, N, D)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, step: StepPlan, cache: ReuseCache | None, watch: Watch | None
    ) -> Tensor:
        """Attention that computes its map. Shapes: q (B, K, N, d), k and v (B, K, M, d) -> (B, K, N, d)."""
        site = self.map_site
        keeper = cache if site in step.store else None
        if watch is not None:
            scores = attention_scores(q, k)  # (B, K, N, M)
            changed = watch(site, step.call, scores)
            probs = (scores if changed is None else changed).softmax(dim=-1, dtype=torch.float32).to(v.dtype)
            if keeper is not None:
                keeper.store(site, probs, step, v.dtype)
            return probs @ v
        if keeper is not None:
            return storing_attention(q, k, v, keeper.reserve(site, (*q.shape[:3], k.shape[2]), step, like=v))
        return explicit_attention(q, k, v)[0] if step.explicit else fused_attention(q, k, v)

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

    def forward(
        self, x: Tensor, context: Text, step: StepPlan, cache: ReuseCache | None, watch: Watch | None
    ) -> Tensor:
        """Shapes: x (B, N, D), context (B, M, D') -> (B, N, D)."""
        text = context.kv[self.attn2.address] if isinstance(context, TextKV) else context
        x = x + _output_or_kept(self.attn1, self.norm1, x, None, step, cache, watch)
        x = x + _output_or_kept(self.attn2, self.norm2, x, text, step, cache, watch)
        return x + self.ff(self.norm3(x))


def _output_or_kept(
    attention: Attention,
    norm: nn.LayerNorm,
    x: Tensor,
    context: Tensor | KV | None,
    step: StepPlan,
    cache: ReuseCache | None,
    watch: Watch | None,
) -> Tensor:
    """Reuse of outputs; maps are reused in `Attention.forward`. Where one is kept, nothing of the layer runs."""
    site = attention.out_site
    if cache is not None and site in step.reuse:
        return cache.load(site, x.shape, step, like=x).read(x)
    y: Tensor = attention(norm(x), context, step, cache, watch)
    if cache is not None and site in step.store:
        cache.store(site, y, step, dtype=x.dtype)
    return y


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, inside a residual."""

    def __init__(
        self, channels: int, context_width: int, heads: int, *, depth: int = 1, groups: int, linear: bool
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, unlike the U-Net's other norms
        # SD 1.x projects with 1x1 convolutions, others with linear layers: same values, weights of another shape.
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context_width, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.linear = linear

    def forward(
        self, x: Tensor, context: Text, step: StepPlan, cache: ReuseCache | None, watch: Watch | None
    ) -> Tensor:
        """Shapes: x (B, C, H, W), context (B, M, D') -> (B, C, H, W)."""
        height = x.shape[2]
        y = self.norm(x)
        if self.linear:
            y = self.proj_in(rearrange(y, "b c h w -> b (h w) c"))
        else:
            y = rearrange(self.proj_in(y), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            y = block(y, context, step, cache, watch)
        if self.linear:
            y = rearrange(self.proj_out(y), "b (h w) c -> b c h w", h=height)
        else:
            y = self.proj_out(rearrange(y, "b (h w) c -> b c h w", h=height))
        return x + y

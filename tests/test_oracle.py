"""Reuse against an oracle that shares no code with it: diffusers' own U-Net, with maps kept in a dictionary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minireuse.cache import ReuseCache
from minireuse.checkpoints.configs import write_unet_config
from minireuse.config import UNetConfig
from minireuse.plan import ReusePlan, Site
from minireuse.policies import select
from minireuse.unet import UNet

from conftest import randomise


@dataclass
class KeepingProcessor:
    """An attention processor of diffusers that keeps what it computes, and reuses it where `reuse` says so.

    kept: of each module's maps or outputs, what was computed with the number of the call.
    """

    kind: str
    order: int
    reuse: dict[int, bool] = field(default_factory=dict)  # by id of the module, at this call
    kept: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)
    call: int = 0

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        probs = None
        if self.reuse[id(attn)]:
            value = self.latest(self.kept[id(attn)])
            if self.kind == "out":
                return value
            probs = value
        elif self.kind == "out" or self.kind == "map":
            q, k = attn.head_to_batch_dim(attn.to_q(hidden_states)), attn.head_to_batch_dim(attn.to_k(context))
            probs = (attn.scale * q @ k.transpose(-1, -2)).softmax(dim=-1)
            if self.kind == "map":
                self.kept.setdefault(id(attn), []).append((self.call, probs))
        out = attn.batch_to_head_dim(probs @ attn.head_to_batch_dim(attn.to_v(context)))
        out = attn.to_out[0](out)
        if self.kind == "out":
            self.kept.setdefault(id(attn), []).append((self.call, out))
        return out

    def latest(self, kept: list[tuple[int, Tensor]]) -> Tensor:
        """At this call, what numpy says of the polynomial through the last values, one more than the order."""
        calls, values = zip(*kept[-1 - self.order :], strict=True)
        curve = np.polyfit(calls, np.stack([value.flatten() for value in values]), len(calls) - 1)
        found = sum(curve[::-1][i] * self.call**i for i in range(len(calls)))
        return torch.as_tensor(found, dtype=values[0].dtype).view_as(values[0])


@st.composite
def configs(draw: st.DrawFn) -> UNetConfig:
    levels = draw(st.integers(1, 3))
    return UNetConfig(
        block_out_channels=tuple(draw(st.sampled_from((16, 32))) for _ in range(levels)),
        attention=tuple(draw(st.booleans()) for _ in range(levels)),
        layers_per_block=draw(st.integers(1, 2)),
        heads=tuple(draw(st.sampled_from((1, 2, 4))) for _ in range(levels)),
        cross_attention_dim=16,
        linear_projection=draw(st.booleans()),
        norm_groups=8,
        sample_size=8,
    )


@settings(max_examples=25, deadline=None)
@given(
    config=configs(),
    kind=st.sampled_from(("map", "out")),
    order=st.integers(0, 2),
    seed=st.integers(0, 2**16),
    calls=st.integers(1, 6),
)
def test_any_plan_on_any_small_unet_equals_maps_in_a_dictionary(
    config: UNetConfig, kind: str, order: int, seed: int, calls: int
) -> None:
    rng = np.random.default_rng(seed)
    reference = randomise(diffusers.UNet2DConditionModel.from_config(write_unet_config(config)), seed)
    unet = UNet(config).eval()
    unet.load_state_dict(reference.state_dict())
    sites: tuple[Site, ...] = select(unet.sites, kind=kind)
    mask = rng.random((calls, len(sites))) < 0.5
    mask[0] = False
    plan, cache = ReusePlan(mask, sites, order=order), ReuseCache(torch.float32)

    processor = KeepingProcessor(kind, order)
    reference.set_attn_processor(processor)
    modules = dict(reference.named_modules())
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 7, config.cross_attention_dim, generator=generator)
    for call in range(calls):
        x = torch.randn(2, 4, 8, 8, generator=generator)
        t = 900 - 100 * call
        processor.call = call
        processor.reuse = {id(modules[s.address]): bool(m) for s, m in zip(sites, mask[call], strict=True)}
        with torch.no_grad():
            expected = reference(x, t, text).sample
            ours = unet(x, t, text, plan.step(call), cache)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert len(cache) == 0

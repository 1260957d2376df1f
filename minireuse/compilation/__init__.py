"""The U-Net as compiled graphs, one for each kind of call that a plan makes.

A plan is known before sampling starts, so a run has few kinds of calls: plain, storing, reusing. Each is traced once
with its step as a constant, what it reads of the cache as inputs, and what it stores as outputs. torch.export, not
strict, runs the U-Net's own Python while it traces: no graph breaks, and nothing of the step is left to look up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from minireuse.attention import KV, TextKV, Watch
from minireuse.cache import CacheTensor, CodedMap, CodedTensor, Entry, FloatTensor, ReuseCache
from minireuse.checkpoints import reason
from minireuse.plan import PLAIN, Site, StepPlan
from minireuse.unet import UNet

Parts = tuple[Tensor, Tensor | None]  # of a `CacheTensor`: values or codes, and the scale of codes
Read = Sequence[Sequence[Parts]]  # of each entry: the value, and those before it that are kept
Inputs = tuple[Tensor, Tensor, Mapping[str, KV], Read, Sequence[Sequence[Tensor]], Tensor | None]
Graph = Callable[..., tuple[Tensor, list[Parts]]]  # of `Inputs`


class Call(nn.Module):
    """One kind of U-Net call as a function of tensors alone.

    read: what the cache holds of the sites that the step reuses, with other tensors in the same places.
    """

    def __init__(self, unet: UNet, step: StepPlan, read: Mapping[Site, Entry], cache: ReuseCache) -> None:
        super().__init__()
        self.unet, self.step, self.read = unet, step, dict(read)
        self.options = cache.dtype, cache.device

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Mapping[str, KV],
        read: Read,
        weights: Sequence[Sequence[Tensor]],
        added: Tensor | None,
    ) -> tuple[Tensor, list[Parts]]:
        """Shapes: as in `UNet.forward`; what is read and what is stored in the order of the sites.

        weights: of the sites that are extrapolated: no constants, or each place had its graph.
        """
        cache = ReuseCache(*self.options)
        for (site, entry), parts in zip(self.read.items(), read, strict=True):
            kept, *before = (_kept(site, *part) for part in parts)
            cache.put(site, replace(entry, tensor=kept, before=tuple(before)))
        given = cast(Sequence[tuple[float, ...]], map(tuple, weights))
        curves = zip(sorted(site for site, _ in self.step.weights), given, strict=True)
        y = self.unet(x, t, TextKV(text), replace(self.step, weights=frozenset(curves)), cache, added=added)
        return y, [_parts(cache.entry(site).tensor) for site in sorted(self.step.store)]


class CompiledUNet:
    """A `UNet` whose weights no longer change, called like one with the context's `text_kv`.

    A graph is compiled when its kind of call is first made and kept as long as this object. So is, on CUDA, memory for
    what calls store, since CUDA graphs read fixed addresses: one run at a time may use it. What a call has read for the
    last time is dropped after it has stored, so a cache may be fuller for a moment than a plain U-Net makes it.
    """

    def __init__(self, unet: UNet, backend: str = "inductor") -> None:
        self.unet, self.backend = unet, backend
        self.graphs: dict[object, Graph] = {}  # by all that is constant in them
        self._rooms: dict[object, Tensor] = {}

    def text_kv(self, context: Tensor) -> TextKV:
        """As `UNet.text_kv`."""
        return self.unet.text_kv(context)

    def __call__(
        self,
        x: Tensor,
        t: float,
        context: TextKV,
        step: StepPlan = PLAIN,
        cache: ReuseCache | None = None,
        watch: Watch | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """Shapes: as in `UNet.forward`.

        Raises: ValueError where nothing can be compiled, and for a `watch`: within a graph no Python runs.
        """
        cache = ReuseCache() if cache is None else cache
        if watch is not None:
            raise ValueError("a compiled U-Net does not show its attention; use the U-Net as it is to watch it")
        read = {site: cache.entry(site) for site in sorted(step.reuse)}
        parts = [list(map(_parts, entry.values)) for entry in read.values()]
        time = torch.full((1,), float(t), device=x.device)
        curves = sorted(step.weights)
        weights = [[torch.full((), weight, device=x.device) for weight in given] for _, given in curves]
        # What is forgotten or stays makes no other graph, nor does how far ahead a value is read.
        alike = frozenset((site, (0.0,) * len(given)) for site, given in curves)
        same = replace(step, call=0, last=frozenset(), keep=frozenset(), weights=alike)
        stored = tuple(
            (entry.dtype, entry.guided, _layout(*itertools.chain(*held)))
            for entry, held in zip(read.values(), parts, strict=True)
        )
        key = (same, stored, _layout(x, added, *next(iter(context.kv.values()))), cache.dtype, cache.device)
        inputs: Inputs = (x, time, context.kv, parts, weights, added)
        try:
            if key not in self.graphs:
                self.graphs[key] = self._trace(Call(self.unet, same, read, cache), inputs)
            y, made = self.graphs[key](*inputs)  # compiles at the first time
        except _compile_errors() as error:
            why = reason(getattr(error, "inner_exception", error))
            raise ValueError(f"the U-Net cannot be compiled here ({why}); leave out --compile") from None
        for site, new in zip(sorted(step.store), made, strict=True):
            values = [new, *map(_parts, cache.take_before(site, step))]
            # The oldest first: each moves out of its room before that is filled anew.
            settled = [self._settle(site, age, *values[age]) for age in reversed(range(len(values)))]
            *before, now = settled
            cache.put(site, Entry(now, x.dtype, step.guided, tuple(reversed(before))))
        cache.drop(step.last)
        return y.clone() if y.is_cuda else y  # the next replay of a CUDA graph writes over what this one returned

    def _trace(self, call: Call, inputs: Inputs) -> Graph:
        graph = torch.export.export(call, inputs, strict=False).module()
        mode = "reduce-overhead" if inputs[0].is_cuda else None  # CUDA graphs: one launch for a whole call
        return torch.compile(graph, fullgraph=True, dynamic=False, backend=self.backend, mode=mode)

    def _settle(self, site: Site, age: int, values: Tensor, scale: Tensor | None) -> CacheTensor:
        """What a call has stored, where CUDA graphs may read it: always at the same address."""
        settled = None if scale is None else self._place((site, age, "scale"), scale)
        return _kept(site, self._place((site, age, "values"), values), settled)

    def _place(self, name: object, value: Tensor) -> Tensor:
        if not value.is_cuda:
            return value
        key = (name, _layout(value))
        if key not in self._rooms:
            with torch.inference_mode(False):  # or later runs outside that mode could not write to it
                self._rooms[key] = torch.empty_like(value)
            torch._dynamo.mark_static_address(self._rooms[key])
        return self._rooms[key].copy_(value)


def _parts(kept: CacheTensor) -> Parts:
    if isinstance(kept, FloatTensor):
        return kept.values, None
    assert isinstance(kept, (CodedMap, CodedTensor))
    return kept.codes, kept.scale


def _kept(site: Site, values: Tensor, scale: Tensor | None) -> CacheTensor:
    """The inverse of `_parts`."""
    if scale is None:
        return FloatTensor(values)
    return CodedMap(values, scale) if site.kind == "map" else CodedTensor(values, scale)


def _layout(*tensors: Tensor | None) -> object:
    return tuple(t if t is None else (t.shape, t.dtype, t.device) for t in tensors)


def _compile_errors() -> tuple[type[Exception], ...]:
    """torch's own errors of compiling, and no others: a run out of memory must be told as that.

    The names are private and not the same in all versions of torch, so they are looked up when an error is there.
    """
    from torch._dynamo import exc

    names = ("TorchDynamoException", "FailOnRecompileLimitHit")
    return tuple(getattr(exc, name) for name in names if hasattr(exc, name))

"""Where reused tensors are kept between calls: the cache that the caller owns, and how it keeps each tensor.

Tensors are kept in a floating-point type, or in 8 bits with a scale per row. Attention maps are large: they are written
and read in blocks that stay in the processor's cache, and no copy of a whole map in another type is ever made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from minireuse.plan import Site, StepPlan

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.uint8)
BLOCK_BYTES = {"cpu": 2**23, "cuda": 2**28}  # of float32 values in one block: what stays in a cache, in few launches

Block = tuple[slice, slice, slice]  # images, heads, rows


@dataclass(frozen=True)
class Kept:
    """A tensor of the cache. With a scale its values are 8-bit codes.

    A map's codes are roots of its probabilities, since most of those are small, and its scales make each row sum to
    one again. Outputs and features have signed codes, scaled by the largest of the row: of a token, of a channel.

    Shapes: of maps, values (B, K, N, M) and scale (B, K, N, 1); of others values (B, R, ...) and scale (B, R, 1, ...).
    """

    values: Tensor
    scale: Tensor | None = None

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Kept:
        """Room for a map. Shapes: (B, K, N, M)."""
        scale = torch.empty(*shape[:3], 1, dtype=torch.float16, device=device) if dtype == torch.uint8 else None
        return cls(torch.empty(*shape, dtype=dtype, device=device), scale)

    @classmethod
    def of_map(cls, probs: Tensor, dtype: torch.dtype, device: torch.device | str) -> Kept:
        """A copy of a whole map. Shapes: (B, K, N, M)."""
        kept = cls.empty(probs.shape, dtype, device)
        kept.fill(probs)
        return kept

    @classmethod
    def of(cls, value: Tensor, dtype: torch.dtype, device: torch.device | str) -> Kept:
        """A copy of an output or a feature. Shapes: (B, R, ...)."""
        if dtype != torch.uint8:
            # A copy even where dtype and device agree: the caller may go on to change its tensor in place.
            return cls(value.detach().to(device=device, dtype=dtype, copy=True))
        value = value.detach().float()
        scale = (value.abs().amax(dim=tuple(range(2, value.ndim)), keepdim=True) / 127).clamp(min=1e-7).half()
        codes = (value / scale).round().clamp(-127, 127)
        return cls(codes.to(device=device, dtype=torch.int8), scale.to(device))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.values, self.scale) if t is not None)

    def holds(self, like: Tensor) -> bool:
        """Whether numbers of `like`'s dtype and device are kept as they are: read and written with no copy."""
        return self.scale is None and self.values.dtype == like.dtype and self.values.device == like.device

    def blocks(self, device: torch.device) -> Iterator[Block]:
        """The parts in which a map is written and read by computations on `device`: none larger than the first.

        Each is contiguous, so that a map can be computed right into it.
        """
        b, heads, rows, columns = self.values.shape
        least = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"]) // 4 // columns  # rows of a block
        height = max(1, min(rows, least))
        depth = max(1, min(heads, least // rows))
        images = max(1, min(b, least // rows // heads))
        for i, k, n in product(range(0, b, images), range(0, heads, depth), range(0, rows, height)):
            yield slice(i, i + images), slice(k, k + depth), slice(n, n + height)

    def fill(self, probs: Tensor) -> None:
        """Keep a whole map. Shapes: probs (B, K, N, M)."""
        for block in self.blocks(probs.device):
            self[block] = probs[block]

    def __setitem__(self, block: Block, probs: Tensor) -> None:
        """Keep a part of a map. Shapes: probs (b, k, n, M)."""
        # The cache is no part of a graph of gradients. By way of float32: as in `__matmul__`.
        probs = probs.detach().float()
        if self.scale is None:
            self.values[block] = probs
            return
        codes = (probs / probs.amax(dim=-1, keepdim=True)).sqrt_().mul_(255).round_()
        self.values[block] = codes
        self.scale[block] = codes.div_(255).square_().sum(dim=-1, keepdim=True).reciprocal_()

    def __matmul__(self, v: Tensor) -> Tensor:
        """The map times v, in v's dtype. Shapes: (B, K, N, M) @ (B, K, M, d) -> (B, K, N, d)."""
        if self.holds(v):
            return self.values @ v
        y = v.new_empty(*self.values.shape[:3], v.shape[-1])
        for block in self.blocks(v.device):
            # By way of float32: exact, and on a CPU twice as fast as straight from float16 to bfloat16.
            probs = self.values[block].to(v.device).float()  # crosses devices as small as it is kept
            if self.scale is not None:
                probs = probs.div_(255).square_().mul_(self.scale[block].to(probs))
            y[block] = probs.to(v) @ v[block[:2]]
        return y

    def read(self, like: Tensor) -> Tensor:
        """An output or a feature, or a map that is not too large, as a tensor of `like`'s dtype and device."""
        values = self.values.to(like)
        if self.scale is None:
            return values
        return (values if self.values.dtype == torch.int8 else (values / 255).square()) * self.scale.to(like)

    def mean_of_halves(self) -> Kept:
        """The mean of the unconditional and the conditional half of a guided batch, kept in the same way."""
        own = self.values if self.scale is None else self.scale
        unconditional, conditional = self.read(own).chunk(2)
        dtype = self.values.dtype if self.scale is None else torch.uint8
        return Kept.of((unconditional + conditional) / 2, dtype, own.device)

    def conditional(self) -> Kept:
        """The second half of a guided batch."""
        return Kept(self.values.chunk(2)[1], None if self.scale is None else self.scale.chunk(2)[1])


@dataclass(frozen=True)
class Line:
    """Two kept values, read as the point beyond the later one on the line through both: linear extrapolation.

    ahead: how far beyond, in distances between the two.
    """

    now: Kept
    before: Kept
    ahead: float

    def __matmul__(self, v: Tensor) -> Tensor:
        """As `Kept.__matmul__`: the product is linear in the map, so no third map is made."""
        return self._beyond(self.now @ v, self.before @ v)

    def read(self, like: Tensor) -> Tensor:
        """As `Kept.read`."""
        return self._beyond(self.now.read(like), self.before.read(like))

    def _beyond(self, now: Tensor, before: Tensor) -> Tensor:
        return now + self.ahead * (now - before)


@dataclass(frozen=True)
class Entry:
    """A kept tensor and the computation that wrote it: its dtype, and whether it was guided, so with both halves.

    before: the value of the same site that was kept before it, where both are needed.
    """

    kept: Kept
    dtype: torch.dtype
    guided: bool
    before: Kept | None = None

    @property
    def nbytes(self) -> int:
        return self.kept.nbytes + (0 if self.before is None else self.before.nbytes)


class CacheError(RuntimeError):
    """A cached tensor is missing, or was written for another run than the one that reads it."""


class ReuseCache:
    """The tensors kept between calls: owned by the caller, one per generation, empty again at its end.

    dtype: what tensors are kept in; uint8 is a quarter of float32. device: where; None = where they are computed.
    """

    def __init__(self, dtype: torch.dtype = torch.float16, device: torch.device | str | None = None) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"cache dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
        self.dtype, self.device = dtype, device
        self.peak_nbytes = 0
        self._entries: dict[Site, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(entry.nbytes for entry in self._entries.values())

    def clear(self) -> None:
        """Forget everything; the peak stays."""
        self._entries.clear()

    def hold(self, site: Site, shape: Sequence[int], step: StepPlan, like: Tensor) -> Kept:
        """Room for a map (2B, K, N, M), as in `store`, to be filled block by block by a run of `like`'s dtype."""
        before = self.set_aside(site, step)
        kept = Kept.empty(shape, self.dtype, self.device or like.device)
        self.put(site, Entry(kept, like.dtype, step.guided, before))
        return kept

    def store(self, site: Site, value: Tensor, step: StepPlan, dtype: torch.dtype) -> None:
        """Keep a whole `value`, computed within a run of `dtype`, for later calls.

        Shapes: (2B, ...) in a guided call, unconditional half first; (B, ...) in others.
        """
        before = self.set_aside(site, step)
        keep = Kept.of_map if site.kind == "map" else Kept.of
        self.put(site, Entry(keep(value, self.dtype, self.device or value.device), dtype, step.guided, before))

    def set_aside(self, site: Site, step: StepPlan) -> Kept | None:
        """Take out what is kept of a site that this step stores anew; it is returned where it stays beside that."""
        entry = self._entries.pop(site, None)
        return entry.kept if entry is not None and site in step.keep else None

    def put(self, site: Site, entry: Entry) -> None:
        """Keep something as it is."""
        self._entries[site] = entry
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def entry(self, site: Site) -> Entry:
        """What is kept of a site, which stays. Raises: CacheError where nothing is."""
        if site not in self._entries:
            raise CacheError(f"nothing is cached for {site.kind} of {site.address}; was this cache used for call 0?")
        return self._entries[site]

    def drop(self, sites: Iterable[Site]) -> None:
        """Forget these sites."""
        for site in sites:
            del self._entries[site]

    def load(self, site: Site, shape: Sequence[int], step: StepPlan, like: Tensor) -> Tensor:
        """As `look_up`, as a tensor of the dtype and on the device of `like`."""
        return self.look_up(site, shape, step, like).read(like)

    def look_up(self, site: Site, shape: Sequence[int], step: StepPlan, like: Tensor) -> Kept | Line:
        """What was stored, as it is kept; dropped from the cache if this is its last read.

        Raises: CacheError where nothing is stored, or it was stored at another shape, dtype or guidance layout.
        """
        entry = self.entry(site)
        kept, guided, ahead = [entry.kept], entry.guided, dict(step.ahead).get(site)
        if ahead is not None:
            if entry.before is None:
                raise CacheError(
                    f"only one value is cached for {site.kind} of {site.address}, but two make a line; "
                    "was this cache used for all calls of the plan?"
                )
            kept.append(entry.before)
        if site in step.half and guided:
            # Where guidance has ended T-GATE goes on with the mean of both halves' cross attention (arXiv 2404.02747).
            averaged = site.kind == "out" and site.is_cross
            kept, guided = [k.mean_of_halves() if averaged else k.conditional() for k in kept], False
        for what, stored, wanted in (
            *(("shape", tuple(k.values.shape), tuple(shape)) for k in kept),
            ("dtype", entry.dtype, like.dtype),
            ("guidance", guided, step.guided),
        ):
            if stored != wanted:
                raise CacheError(
                    f"the cached {site.kind} of {site.address} was written for {what} {stored} but read for {wanted}; "
                    "use a new ReuseCache for each generation"
                )
        if site in step.last:
            self.drop([site])
        return kept[0] if ahead is None else Line(kept[0], kept[1], ahead)

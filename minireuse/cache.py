"""Where reused tensors are kept between calls.

`ReuseCache` is a dictionary from sites to tensors that the caller owns. It checks that what is read was written for the
same run, and it forgets a tensor at its last read. How a tensor is kept is a `CacheTensor`, which is written, read, and
applied to the values of an attention:

- `FloatTensor` keeps it in a floating-point type. This is all that the paper's method needs.
- `CodedMap` and `CodedTensor` keep it in 8 bits with a scale per row.
- `Extrapolated` is no storage of its own: several kept values, read as a point on the curve through all of them.

Attention maps are large. They are written and applied in blocks that stay in the processor's cache. A copy of a whole
map in another type is made only where attention is watched or gradients are asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from minireuse.plan import Site, StepPlan

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.uint8)
# Bytes of float32 values in one block. On a CPU a block stays in the processor's cache; elsewhere launches are few.
BLOCK_BYTES = {"cpu": 2**23, "cuda": 2**28}

Block = tuple[slice, slice, slice]  # images, heads, rows


class CacheError(RuntimeError):
    """A cached tensor is missing, or was written for another run than the one that reads it."""


# --- one tensor -----------------------------------------------------------------------------------------------------


class CacheTensor(ABC):
    """A tensor as the cache keeps it. Shapes: a map (B, K, N, M); an output or a feature (B, R, ...)."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that is kept."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    @abstractmethod
    def write(self, block: Block, probs: Tensor) -> None:
        """Keep a part of a map. Shapes: probs (b, k, n, M)."""

    @abstractmethod
    def probs(self, block: Block, device: torch.device) -> Tensor:
        """A part of a map, in float32. Shapes: -> (b, k, n, M)."""

    @abstractmethod
    def read(self, like: Tensor) -> Tensor:
        """An output or a feature, or a map that is not too large, as a tensor of `like`'s dtype and device."""

    @abstractmethod
    def half(self, *, mean: bool) -> CacheTensor:
        """Of a guided batch the conditional half, or the mean of both halves, kept in the same way."""

    def holds(self, like: Tensor) -> bool:
        """Whether numbers of `like`'s dtype and device are kept as they are, so that no copy is needed."""
        return False

    def apply(self, v: Tensor) -> Tensor:
        """The map times the values v, in v's dtype, block by block. Shapes: v (B, K, M, d) -> (B, K, N, d)."""
        y = v.new_empty(*self.shape[:3], v.shape[-1])
        for block in blocks(self.shape, v.device):
            y[block] = self.probs(block, v.device).to(v) @ v[block[:2]]
        return y

    def fill(self, probs: Tensor) -> None:
        """Keep a whole map. Shapes: probs (B, K, N, M)."""
        for block in blocks(self.shape, probs.device):
            self.write(block, probs[block])


def blocks(shape: Sequence[int], device: torch.device) -> Iterator[Block]:
    """The parts in which a map is written and applied by computations on `device`: none larger than the first.

    Each is contiguous, so that a map can be computed right into it. Shapes: shape (B, K, N, M).
    """
    b, heads, rows, columns = shape
    most = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"]) // 4 // columns  # rows that a block may hold
    height = max(1, min(rows, most))
    depth = max(1, min(heads, most // rows))
    images = max(1, min(b, most // rows // heads))
    for i, k, n in product(range(0, b, images), range(0, heads, depth), range(0, rows, height)):
        yield slice(i, i + images), slice(k, k + depth), slice(n, n + height)


@dataclass(frozen=True)
class FloatTensor(CacheTensor):
    """Kept in a floating-point type."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def nbytes(self) -> int:
        return _nbytes(self.values)

    def holds(self, like: Tensor) -> bool:
        return self.values.dtype == like.dtype and self.values.device == like.device

    def write(self, block: Block, probs: Tensor) -> None:
        # The cache is no part of a graph of gradients. By way of float32, as in `probs`.
        self.values[block] = probs.detach().float()

    def probs(self, block: Block, device: torch.device) -> Tensor:
        # By way of float32: exact, and on a CPU twice as fast as straight from float16 to bfloat16.
        return self.values[block].to(device).float()  # crosses devices as small as it is kept

    def apply(self, v: Tensor) -> Tensor:
        return self.values @ v if self.holds(v) else super().apply(v)

    def read(self, like: Tensor) -> Tensor:
        return self.values.to(like)

    def half(self, *, mean: bool) -> FloatTensor:
        unconditional, conditional = self.values.chunk(2)
        return FloatTensor((unconditional + conditional) / 2 if mean else conditional)


def new_map(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> CacheTensor:
    """Room for a map. Shapes: shape (B, K, N, M)."""
    values = torch.empty(*shape, dtype=dtype, device=device)
    if dtype != torch.uint8:
        return FloatTensor(values)
    return CodedMap(values, torch.empty(*shape[:3], 1, dtype=torch.float16, device=device))


def copy_of(value: Tensor, dtype: torch.dtype, device: torch.device | str) -> CacheTensor:
    """An output or a feature, kept. Shapes: value (B, R, ...)."""
    if dtype == torch.uint8:
        return CodedTensor.of(value, device)
    # A copy even where dtype and device agree: the caller may go on to change its tensor in place.
    return FloatTensor(value.detach().to(device=device, dtype=dtype, copy=True))


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# --- addition: 8 bits -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodedMap(CacheTensor):
    """A map in 8 bits: roots of its probabilities, since most of those are small, scaled so that each row sums to one.

    Shapes: codes (B, K, N, M) uint8, scale (B, K, N, 1) float16.
    """

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        return _nbytes(self.codes, self.scale)

    def write(self, block: Block, probs: Tensor) -> None:
        probs = probs.detach().float()
        codes = (probs / probs.amax(dim=-1, keepdim=True)).sqrt_().mul_(255).round_()
        self.codes[block] = codes
        self.scale[block] = codes.div_(255).square_().sum(dim=-1, keepdim=True).reciprocal_()

    def probs(self, block: Block, device: torch.device) -> Tensor:
        codes = self.codes[block].to(device).float()
        return codes.div_(255).square_().mul_(self.scale[block].to(codes))

    def read(self, like: Tensor) -> Tensor:
        return (self.codes.to(like) / 255).square() * self.scale.to(like)

    def half(self, *, mean: bool) -> CodedMap:
        if mean:
            raise ValueError("maps are not averaged over the halves of a guided batch; only outputs are")
        return CodedMap(self.codes.chunk(2)[1], self.scale.chunk(2)[1])


@dataclass(frozen=True)
class CodedTensor(CacheTensor):
    """An output or a feature in 8 bits: signed codes, scaled by the largest of the row, of a token or of a channel.

    Shapes: codes (B, R, ...) int8, scale (B, R, 1, ...) float16.
    """

    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, value: Tensor, device: torch.device | str) -> CodedTensor:
        """Shapes: value (B, R, ...)."""
        value = value.detach().float()
        scale = (value.abs().amax(dim=tuple(range(2, value.ndim)), keepdim=True) / 127).clamp(min=1e-7).half()
        codes = (value / scale).round().clamp(-127, 127)
        return cls(codes.to(device=device, dtype=torch.int8), scale.to(device))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        return _nbytes(self.codes, self.scale)

    def write(self, block: Block, probs: Tensor) -> None:
        raise TypeError("signed codes are for outputs and features, which are kept whole; a map has codes of its own")

    def probs(self, block: Block, device: torch.device) -> Tensor:
        raise TypeError("signed codes are for outputs and features, which are read whole; a map has codes of its own")

    def read(self, like: Tensor) -> Tensor:
        return self.codes.to(like) * self.scale.to(like)

    def half(self, *, mean: bool) -> CodedTensor:
        if mean:
            unconditional, conditional = self.read(self.scale).chunk(2)
            return CodedTensor.of((unconditional + conditional) / 2, self.codes.device)
        return CodedTensor(self.codes.chunk(2)[1], self.scale.chunk(2)[1])


# --- addition: extrapolation ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extrapolated:
    """Kept values, the last one first, applied and read as a point on the curve through all of them.

    weights: of the values before the last, in the polynomial through all; what is left to one is the last one's. By
    differences, which are small, less is lost in half precision.
    Source: TaylorSeer, arXiv 2503.06923, whose finite differences are these polynomials where calls are evenly apart.
    """

    now: CacheTensor
    before: tuple[CacheTensor, ...]
    weights: tuple[float, ...]

    def apply(self, v: Tensor) -> Tensor:
        """As `CacheTensor.apply`, a product for each: they are linear in the map, so no further map is made."""
        return self._beyond(self.now.apply(v), (kept.apply(v) for kept in self.before))

    def read(self, like: Tensor) -> Tensor:
        """As `CacheTensor.read`."""
        return self._beyond(self.now.read(like), (kept.read(like) for kept in self.before))

    def _beyond(self, now: Tensor, before: Iterable[Tensor]) -> Tensor:
        beyond = now
        for weight, value in zip(self.weights, before, strict=True):
            beyond = beyond + weight * (value - now)
        return beyond


# --- all tensors of a run -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A kept tensor and the computation that wrote it: its dtype, and whether it was guided, so with both halves.

    before: the values of the same site that were kept before it, the last one first, where a curve goes through all.
    """

    tensor: CacheTensor
    dtype: torch.dtype
    guided: bool
    before: tuple[CacheTensor, ...] = ()

    @property
    def values(self) -> tuple[CacheTensor, ...]:
        """All that is kept, the last one first."""
        return self.tensor, *self.before

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self.values)


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

    def store(self, site: Site, value: Tensor, step: StepPlan, dtype: torch.dtype) -> None:
        """Keep a whole `value`, computed within a run of `dtype`, for later calls.

        Shapes: (2B, ...) in a guided call, unconditional half first; (B, ...) in others.
        """
        before = self.take_before(site, step)
        if site.kind == "map":
            kept = new_map(value.shape, self.dtype, self.device or value.device)
            kept.fill(value)
        else:  # the prediction is small, and what is lost of it no later layer could even out
            kept_as = value.dtype if site.kind == "eps" else self.dtype
            kept = copy_of(value, kept_as, self.device or value.device)
        self.put(site, Entry(kept, dtype, step.guided, before))

    def reserve(self, site: Site, shape: Sequence[int], step: StepPlan, like: Tensor) -> CacheTensor:
        """Room for a map (2B, K, N, M), as in `store`, to be written block by block by a run of `like`'s dtype."""
        before = self.take_before(site, step)
        kept = new_map(shape, self.dtype, self.device or like.device)
        self.put(site, Entry(kept, like.dtype, step.guided, before))
        return kept

    def load(self, site: Site, shape: Sequence[int], step: StepPlan, like: Tensor) -> CacheTensor | Extrapolated:
        """What was stored, to be applied or read; forgotten by the cache if this is its last read.

        Raises: CacheError where nothing is stored, where fewer values are than the plan goes by, or where they were
        stored at another shape, dtype or guidance layout.
        """
        entry = self.entry(site)
        weights = dict(step.weights).get(site, ())
        if len(entry.before) < len(weights):
            raise CacheError(
                f"{site.kind} of {site.address} is extrapolated from {len(weights) + 1} values, but only "
                f"{len(entry.values)} cached; was this cache used for all calls of the plan?"
            )
        if site in step.half and entry.guided:
            entry = _conditional(site, entry)
        for what, stored, wanted in (
            *(("shape", kept.shape, tuple(shape)) for kept in entry.values),
            ("dtype", entry.dtype, like.dtype),
            ("guidance", entry.guided, step.guided),
        ):
            if stored != wanted:
                raise CacheError(
                    f"the cached {site.kind} of {site.address} was written for {what} {stored} but read for {wanted}; "
                    "use a new ReuseCache for each generation"
                )
        if site in step.last:
            self.drop([site])
        return Extrapolated(entry.tensor, entry.before, weights) if weights else entry.tensor

    def entry(self, site: Site) -> Entry:
        """What is kept of a site, which stays. Raises: CacheError where nothing is."""
        if site not in self._entries:
            name = f"{site.kind} of {site.address}"
            raise CacheError(f"nothing is cached for {name}; was this cache used for all earlier calls of the plan?")
        return self._entries[site]

    def put(self, site: Site, entry: Entry) -> None:
        """Keep something as it is."""
        self._entries[site] = entry
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def take_before(self, site: Site, step: StepPlan) -> tuple[CacheTensor, ...]:
        """Take out what is kept of a site that this step stores anew; returned is what stays beside that."""
        entry = self._entries.pop(site, None)
        return () if entry is None else entry.values[: dict(step.keep).get(site, 0)]

    def drop(self, sites: Iterable[Site]) -> None:
        """Forget these sites."""
        for site in sites:
            del self._entries[site]


def _conditional(site: Site, entry: Entry) -> Entry:
    """What a guided call stored, for a call without guidance.

    Where guidance has ended T-GATE goes on with the mean of both halves' cross attention (arXiv 2404.02747). In the
    prediction both halves are one already.
    """
    if site.kind == "eps":
        return replace(entry, guided=False)
    mean = site.kind == "out" and site.is_cross
    now, *before = (kept.half(mean=mean) for kept in entry.values)
    return replace(entry, tensor=now, before=tuple(before), guided=False)

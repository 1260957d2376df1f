"""The whole reuse mechanism, without a model: what can be reused, when, and where it is kept meanwhile.

A `ReusePlan` is known before sampling starts. For each U-Net call it gives a `StepPlan`, which travels down the
U-Net's `forward` together with a `ReuseCache` that the caller owns. Modules look their own `Site` up in the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from minireuse.kept import DTYPES, Entry, Kept, Line
from minireuse.plan import KINDS, ORDERS, PLAIN, PlanError, ReusePlan, Site, StepPlan

__all__ = ["KINDS", "ORDERS", "PLAIN", "CacheError", "PlanError", "ReuseCache", "ReusePlan", "Site", "StepPlan"]


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

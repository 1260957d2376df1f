"""How many bytes a plan's cache will hold, known before the run: the U-Net follows the plan without numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minireuse.cache import Entry, ReuseCache
from minireuse.guidance import unguided
from minireuse.plan import PREDICTION, ReusePlan, Site
from minireuse.unet import UNet


@dataclass(frozen=True)
class Forecast:
    """Bytes of the cache: of each site that is ever stored, and at the fullest moment of the run."""

    sites: dict[Site, int]
    peak: int


class _Ledger(ReuseCache):
    """Notes what it is given to keep, on the device where tensors have shapes and no numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.sites: dict[Site, int] = {}

    def put(self, site: Site, entry: Entry) -> None:
        self.sites[site] = max(entry.nbytes, self.sites.get(site, 0))
        super().put(site, entry)


def forecast(
    unet: UNet,
    plan: ReusePlan,
    *,
    batch: int,
    size: Sequence[int],
    tokens: int = 77,
    guided: bool = True,
    cache_dtype: torch.dtype = torch.float16,
) -> Forecast:
    """What `ReuseCache.peak_nbytes` will be, to the byte, for one batch of `Pipeline.generate`.

    unet: of which only the configuration counts. guided: whether there is guidance (guidance_scale is not 1).
    tokens: M of the text encoder.
    Shapes: size (h, w) of the latents. Units: bytes.
    """
    config = unet.config
    with torch.device("meta"):
        unet = UNet(config)
    plan = plan.on(unet.sites) if guided else unguided(plan.on(unet.sites))
    ledger = _Ledger(cache_dtype)

    def meta(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    for call in range(plan.calls):
        step = plan.step(call)
        if not step.store:
            ledger.drop(step.last)  # a call that keeps nothing new need not be walked through
        else:
            images = batch * (2 if step.guided else 1)
            context = meta(images, tokens, config.cross_attention_dim)
            added = None if config.added_width is None else meta(images, config.added_width)
            unet(meta(images, config.in_channels, *size), meta(1), context, step.inside, ledger, added=added)
        if PREDICTION in step.store:
            ledger.store(PREDICTION, meta(batch, config.out_channels, *size), step, torch.float32)
    return Forecast(ledger.sites, ledger.peak_nbytes)

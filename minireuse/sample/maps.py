"""Looking at attention: every map of a run averaged over its heads, written to disk as pictures while it samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from minireuse.cache import Block, Kept, ReuseCache
from minireuse.plan import ReusePlan, Site, StepPlan
from minireuse.samplers import Denoise

END = "</w>"  # of a token that ends a word (CLIP's byte-pair encoding)


@dataclass(frozen=True, kw_only=True)
class Handed(Kept):
    """A map that is handed on whole, before it meets the values, instead of being kept."""

    then: Callable[[Tensor], object]

    def holds(self, like: Tensor) -> bool:
        return False  # or the map would be written over `values`, which are another tensor's

    def blocks(self, device: torch.device) -> Iterator[Block]:
        yield slice(None), slice(None), slice(None)

    def __setitem__(self, block: Block, probs: Tensor) -> None:
        self.then(probs)


class Watcher(ReuseCache):
    """A cache that knows which call it is used in: give `Pipeline.generate` its `wrap` as `wrap`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.call = 0

    def hold(self, site: Site, shape: Sequence[int], step: StepPlan, like: Tensor) -> Kept:
        """Takes the map in one piece and gives it to `store`, which may look at it or change it."""
        return Handed(like, then=lambda probs: self.store(site, probs, step, like.dtype))

    def wrap(self, denoise: Denoise) -> Denoise:
        """The same `denoise`, while this learns which call it is."""

        def watched(x: Tensor, t: float, call: int) -> Tensor:
            self.call = call
            return denoise(x, t, call)

        return watched


class MapRecorder(Watcher):
    """A cache that is also handed the maps no plan reuses, and writes all of them down.

    Give `Pipeline.generate` this as `cache`, its `wrap` as `wrap`, the sites to look at as `watch`. Of each image the
    conditional half counts. Maps (N, N) of self attention are written at once; of cross attention's a small heat map
    (h, w) per word is kept until `finish`. A reused map is not written again.
    """

    def __init__(
        self,
        folder: Path,
        plan: ReusePlan,
        words: Sequence[Sequence[tuple[str, Sequence[int]]]],
        first: int = 0,
        **options: Any,
    ) -> None:
        """words: of each image of the batch, each with the places of its tokens. first: the first image's number."""
        super().__init__(**options)
        self.folder, self.plan, self.words, self.first = folder, plan, words, first
        self._heat: dict[tuple[int, str, int], Tensor] = {}  # by image, address and call: (words, N)

    def store(self, site: Site, value: Tensor, step: StepPlan, dtype: torch.dtype) -> None:
        if site in self.plan.step(self.call).store:
            super().store(site, value, step, dtype)
        if site.kind != "map":
            return
        conditional = value.chunk(2)[1] if step.guided else value
        for i, probs in enumerate(conditional):
            mean = probs.float().mean(dim=0).cpu()
            if site.is_cross:
                spans = [mean[:, list(places)].sum(dim=1) for _, places in self.words[i]]
                if spans:
                    self._heat[i, site.address, self.call] = torch.stack(spans)
            else:
                path = self._folder(i) / "self" / site.address / f"call-{self.call:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(_gray(mean)).save(path)

    def finish(self, images: np.ndarray, shape: tuple[int, int]) -> None:
        """Write cross attention over the pictures: a strip per site and call, and `words.png`, the mean of all.

        Shapes: images (B, H, W, 3) uint8; shape (h, w) of the latents, of which maps have the proportions.
        """
        for i, image in enumerate(images):
            folder = self._folder(i)
            names = [name for name, _ in self.words[i]]
            total: dict[int, list[Tensor]] = defaultdict(list)
            for (number, address, call), heat in self._heat.items():
                if number == i:
                    path = folder / "cross" / address / f"call-{call:02d}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    _strip(image, names, _spread(heat, shape)).save(path)
                    total[heat.shape[1]].append(heat)
            if total:
                rows = [
                    _strip(image, names, _spread(torch.stack(h).mean(dim=0), shape)) for _, h in sorted(total.items())
                ]
                Image.fromarray(np.concatenate([np.array(row) for row in rows])).save(folder / "words.png")

    def _folder(self, i: int) -> Path:
        return self.folder / f"{self.first + i:05d}"


def words_of(tokens: Sequence[str]) -> list[tuple[str, list[int]]]:
    """The words of a tokenised prompt with the places of their tokens, after the token that begins the text."""
    words: list[tuple[str, list[int]]] = []
    begun: list[tuple[int, str]] = []
    for place, token in enumerate(tokens, start=1):
        begun.append((place, token.removesuffix(END)))
        if token.endswith(END):
            words.append(("".join(t for _, t in begun), [p for p, _ in begun]))
            begun = []
    return words


def _spread(heat: Tensor, shape: tuple[int, int]) -> Tensor:
    """Maps over the positions of one resolution as pictures. Shapes: (words, N) -> (words, h', w')."""
    scale = isqrt(shape[0] * shape[1] // heat.shape[1])  # how much coarser than the latents
    return heat.reshape(-1, shape[0] // scale, shape[1] // scale)


def _strip(image: np.ndarray, names: Sequence[str], heat: Tensor) -> Image.Image:
    """The picture once per word, lit where the word is attended to. Shapes: image (H, W, 3), heat (words, h, w)."""
    height, width = image.shape[:2]
    large = F.interpolate(heat[None], size=(height, width), mode="bilinear")[0]
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    light = ((large - low) / (high - low).clamp(min=1e-12)).numpy()[..., None]
    tiles = (image * (0.15 + 0.85 * light)).astype(np.uint8)
    strip = Image.fromarray(np.concatenate(list(tiles), axis=1))
    draw = ImageDraw.Draw(strip)
    for i, name in enumerate(names):
        draw.text((i * width + 2, 1), name, fill="white", stroke_width=1, stroke_fill="black")
    return strip


def _gray(values: Tensor) -> np.ndarray:
    """Shapes: (N, M) -> (N, M) uint8, white at the largest value."""
    return (255 * values / values.max().clamp(min=1e-12)).round().to(torch.uint8).numpy()

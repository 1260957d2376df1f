"""Looking at attention: every map of a run averaged over its heads, written to disk as pictures while it samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import isqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from minireuse.plan import Site

END = "</w>"  # of a token that ends a word (CLIP's byte-pair encoding)


class MapRecorder:
    """Writes down every map that is computed: give it to `Pipeline.generate` as `watch`, and call `finish` at the end.

    Of each image the conditional half counts. Maps (N, N) of self attention are written at once; of cross attention's a
    small heat map (h, w) per word is kept until `finish`. A map that is reused is not written again.
    """

    def __init__(
        self,
        folder: Path,
        sites: Iterable[Site],
        words: Sequence[Sequence[tuple[str, Sequence[int]]]],
        first: int = 0,
    ) -> None:
        """sites: whose maps to write. words: of each image of the batch, each with the places of its tokens.

        first: the first image's number.
        """
        self.folder, self.sites, self.words, self.first = folder, frozenset(sites), words, first
        self._heat: dict[tuple[int, str, int], Tensor] = {}  # by image, address and call: (words, N)

    def __call__(self, site: Site, call: int, scores: Tensor) -> None:
        """A `minireuse.attention.Watch`. Shapes: scores (2B, K, N, M) in guided calls, (B, K, N, M) in others."""
        if site not in self.sites:
            return
        conditional = scores[-len(self.words) :].softmax(dim=-1, dtype=torch.float32)
        for i, probs in enumerate(conditional):
            mean = probs.mean(dim=0).cpu()  # (N, M)
            if site.is_cross:
                spans = [mean[:, list(places)].sum(dim=1) for _, places in self.words[i]]
                if spans:
                    self._heat[i, site.address, call] = torch.stack(spans)
            else:
                path = self._folder(i) / "self" / site.address / f"call-{call:02d}.png"
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

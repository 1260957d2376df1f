"""What `--compare` makes of two pictures of the same prompt and seed: the full sampler's, and the policy's."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from minireuse.common.metrics import fidelity, ssim
from minireuse.files import write_whole
from minireuse.pipeline import Result

GAIN = 8  # what the difference is multiplied with, so that it can be seen
LEAST = 256  # pixels: panels that are narrower are enlarged, so that their labels can be read
STRIP = 24  # pixels: the height of the labels


@dataclass
class Comparison:
    """What was found of the pictures so far. Units: PSNR in dB, at most 100; seconds of the sampling loops alone."""

    policy: str
    seconds: float = 0.0  # of the policy
    full_seconds: float = 0.0
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)

    def add(self, pictures: Mapping[int, Path], result: Result, full: Result, *, overwrite: bool) -> None:
        """Compare a batch with the full sampler's, and write both pictures and their difference beside the files.

        pictures: the file of each, by its place in the batch. Raises: OSError.
        """
        self.seconds += result.seconds
        self.full_seconds += full.seconds
        places = list(pictures)
        self.psnr += fidelity(result.images[places], full.images[places]).tolist()
        self.ssim += ssim(result.images[places], full.images[places]).tolist()
        for place, picture in pictures.items():
            png = side_by_side(full.images[place], result.images[place], self.policy)
            self.images.append(write_whole(targets(picture), png, overwrite=overwrite))

    def report(self) -> dict[str, Any]:
        """What `--json` says under `compare`; the lists are in the order of the pictures."""
        return {
            "images": [str(path) for path in self.images],
            "psnr": self.psnr,
            "ssim": self.ssim,
            "seconds": self.full_seconds,
            "ratio": self.seconds / self.full_seconds,
        }


def summary(report: Mapping[str, Any]) -> str:
    """What `--json` says of the comparison, in lines to read."""
    found = report["compare"]
    lines = [
        f"{name}: {psnr:.1f} dB to the full sampler, SSIM {similar:.4f}; {path} shows both"
        for name, psnr, similar, path in zip(
            report["images"], found["psnr"], found["ssim"], found["images"], strict=True
        )
    ]
    took = f"{found['ratio']:.2f} of the full sampler's time, {report['seconds']:.2f} s of {found['seconds']:.2f} s"
    return "\n".join([*lines, took])


def targets(picture: Path) -> Iterator[Path]:
    """The names to try for what is written beside a picture, in order."""
    first = picture.with_stem(f"{picture.stem}-compare")
    return itertools.chain([first], (first.with_stem(f"{first.stem}-{i}") for i in itertools.count(1)))


def side_by_side(full: np.ndarray, image: np.ndarray, policy: str) -> bytes:
    """A PNG of the full sampler's picture, the policy's, and `GAIN` times their difference, with labels above.

    Shapes: two of (H, W, 3) uint8.
    """
    difference = np.minimum(np.abs(image.astype(np.int16) - full) * GAIN, 255).astype(np.uint8)
    panels = {"full sampler": full, policy: image, f"difference x {GAIN}": difference}
    factor = -(-LEAST // full.shape[1])
    columns = [
        np.concatenate([_label(text, factor * full.shape[1]), panel.repeat(factor, axis=0).repeat(factor, axis=1)])
        for text, panel in panels.items()
    ]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(columns, axis=1)).save(file, format="PNG")
    return file.getvalue()


def _label(text: str, width: int) -> np.ndarray:
    """A text, as much of it as there is room for, black on white. Shapes: -> (STRIP, width, 3) uint8."""
    strip = Image.new("RGB", (width, STRIP), "white")
    ImageDraw.Draw(strip).text((6, 3), text, font=ImageFont.load_default(15), fill="black")
    return np.array(strip)

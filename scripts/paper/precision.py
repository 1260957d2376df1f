"""The precision of the cache, by itself: the images of one plan with caches of fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from paper.plots import save
from paper.study import Study, Way
from paper.verdicts import Verdict, judged, spread, table

TITLE = "The precision of the cache"
BITS = {"float16": 16, "bfloat16": 16, "uint8": 8}


def measure(study: Study) -> dict[str, Any]:
    """PSNR of HURRY's images with caches of fewer bits, to those with a float32 cache."""
    ways = {cache: Way(study.hurry(), cache=cache) for cache in ("float32", *BITS)}
    found = study.judge("precision", ways, study.prompts[: study.scale.beyond], "float32")
    return {"psnr": {cache: found[cache]["psnr"] for cache in BITS}}


def verdict(found: dict[str, Any]) -> Verdict:
    means = {cache: float(np.mean(values)) for cache, values in found["psnr"].items()}
    word = judged(min(means["float16"], means["uint8"]) > 45, min(means["float16"], means["uint8"]) < 30)
    listed = ", ".join(f"{cache} {value:.1f} dB" for cache, value in means.items())
    return Verdict(word, f"To the image with a float32 cache: {listed}.")


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.5))
    axes.boxplot(list(found["psnr"].values()))
    axes.set_xticklabels(list(found["psnr"]))
    axes.set_ylabel("PSNR to the image\nwith a float32 cache, dB")
    save(figure, path)


def papers() -> list[str]:
    return ["The paper's float16 and 8-bit caches leave PSNR to the full sampler as it is (Table 2)."]


def ours(found: dict[str, Any]) -> list[str]:
    rows = [[cache, spread(values)] for cache, values in found["psnr"].items()]
    return table(["cache", "PSNR to the image with a float32 cache, dB [95 %]"], rows)

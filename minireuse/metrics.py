"""How close two images are: the yardsticks of fidelity to the full sampler's image."""

from __future__ import annotations

import numpy as np

PEAK = 255.0


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image to its reference.

    Shapes: two of (B, H, W, 3) uint8 -> (B,).
    Units: dB; infinite for equal images.
    Raises: ValueError where the shapes differ.
    """
    if images.shape != references.shape:
        raise ValueError(f"images have shape {images.shape}, their references {references.shape}; they must agree")
    error = np.square(images.astype(np.float64) - references.astype(np.float64)).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / error)

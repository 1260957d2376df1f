"""How close images are: fidelity to the full sampler's image, and what can be said of a mean over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

PEAK = 255.0
WINDOW = 11  # pixels: the side of SSIM's windows
CEILING = 100.0  # dB counted in means for an image equal to its reference, whose PSNR is infinite


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image to its reference.

    Shapes: two of (B, H, W, 3) uint8 -> (B,).
    Units: dB; infinite for equal images.
    Raises: ValueError where the shapes differ.
    """
    _require_alike(images, references)
    error = np.square(images.astype(np.float64) - references.astype(np.float64)).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / error)


def fidelity(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """PSNR of each image, at most `CEILING`, so that a mean over images is a number. Shapes: as `psnr`."""
    return np.minimum(psnr(images, references), CEILING)


def ssim(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Structural similarity of each image to its reference, a mean over channels and the places a window fits.

    Gaussian windows of 11x11 pixels and standard deviation 1.5, which images have to hold.
    Shapes: two of (B, H, W, 3) uint8 -> (B,), at most 1.
    Raises: ValueError where the shapes differ, or the images are smaller than a window.
    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", section III.
    """
    _require_alike(images, references)
    if min(images.shape[1:3]) < WINDOW:
        raise ValueError(f"images are {images.shape[2]}x{images.shape[1]}, SSIM needs {WINDOW}x{WINDOW} pixels or more")
    x, y = (torch.from_numpy(a).permute(0, 3, 1, 2).double() for a in (images, references))
    taps = torch.exp(-0.5 * ((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) / 1.5) ** 2)
    taps /= taps.sum()

    def blur(a: torch.Tensor) -> torch.Tensor:
        channels = a.shape[1]
        a = F.conv2d(a, taps[None, None, None, :].expand(channels, -1, -1, -1), groups=channels)
        return F.conv2d(a, taps[None, None, :, None].expand(channels, -1, -1, -1), groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2  # keep flat, dark places from dividing by nothing
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return similarity.mean(dim=(1, 2, 3)).numpy()


def interval(values: Sequence[float] | np.ndarray, draws: int = 4000, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean: percentiles of means of samples drawn with replacement.

    Shapes: values (n,). Source: Efron & Tibshirani, "An Introduction to the Bootstrap", section 13.3.
    """
    values = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def _require_alike(images: np.ndarray, references: np.ndarray) -> None:
    if images.shape != references.shape:
        raise ValueError(f"images have shape {images.shape}, their references {references.shape}; they must agree")

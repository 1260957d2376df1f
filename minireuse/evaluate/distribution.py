"""Scores without a reference image: prompt-following; of whole sets, Fréchet distance and CLIP score (torchmetrics)."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minireuse.evaluate.classifier import Classifier
from minireuse.vae import VAE

EXTRACTORS = ("classifier", "vae", "inception")
Follow = Callable[[Sequence[np.ndarray], Sequence[str]], list[float | None]]  # images, prompts -> shares of 1


class VAEFeatures(nn.Module):
    """The VAE's latents averaged over a grid of 4x4 places: features that need no download."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae
        self.num_features = 16 * vae.config.latent_channels

    def forward(self, images: Tensor) -> Tensor:
        """Shapes: (B, 3, H, W) uint8 -> (B, num_features)."""
        weight = self.vae.quant_conv.weight
        latents = self.vae.encode(images.to(weight).div(127.5).sub(1))
        return F.adaptive_avg_pool2d(latents, 4).flatten(1).float()


def extractor(name: str | None, vae: VAE, classifier: Classifier | None) -> nn.Module | int | None:
    """What computes the features of a Fréchet distance, as torchmetrics takes it. Raises: ValueError."""
    if name == "classifier":
        if classifier is None:
            raise ValueError("--fid classifier needs the classifier of the shipped model; use --fid vae")
        return classifier.features
    return {"vae": VAEFeatures(vae), "inception": 2048, None: None}[name]


def frechet(features: nn.Module | int, reference: Iterable[Tensor], images: Iterable[Tensor]) -> float:
    """Fréchet distance between two sets of pictures, each given in batches. Shapes: (B, 3, H, W) uint8.

    features: a module (B, 3, H, W) uint8 -> (B, num_features), or 2048 for Inception's.
    Raises: ImportError without torchmetrics; whatever fails where Inception's weights cannot be had.
    Source: Heusel et al., arXiv 1706.08500, equation 6.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = copy.deepcopy(features)  # the metric turns what it is given to double precision
    metric = FrechetInceptionDistance(feature=features).set_dtype(torch.float64)
    if isinstance(features, nn.Module):
        metric.to(next(features.parameters()).device)
    for batches, real in ((reference, True), (images, False)):
        for batch in batches:
            metric.update(batch.to(metric.device), real=real)
    return float(metric.compute())


def clip_score(folder: Path, prompts: Sequence[str], model: str) -> float:
    """Mean CLIP score of images and their prompts, 0 to 100. model: a name on the hub, or a folder.

    Source: Hessel et al., arXiv 2104.08718.
    """
    from torchmetrics.multimodal.clip_score import CLIPScore

    metric = CLIPScore(model_name_or_path=model)
    for i, prompt in enumerate(prompts):
        metric.update(_read(folder, i), [prompt])
    return float(metric.compute())


def score_all(
    folders: dict[str, Path], prompts: Sequence[str], fid: nn.Module | int | None, clip: str | None
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """The scores asked for of each row, and for each that could not be had a sentence that says why.

    folders: of each row's pictures, the full sampler's first. fid: features as `frechet` takes them.
    """

    def read(folder: Path) -> Iterator[Tensor]:
        return (_read(folder, i) for i in range(len(prompts)))

    full = next(iter(folders.values()))
    wanted: dict[str, Callable[[Path], float]] = {}
    if fid is not None:
        wanted["fid"] = lambda folder: frechet(fid, read(full), read(folder))
    if clip is not None:
        wanted["clip"] = lambda folder: clip_score(folder, prompts, clip)
    scores: dict[str, dict[str, float]] = {name: {} for name in folders}
    notes = []
    for metric, compute in wanted.items():
        values, note = _attempt(compute, folders)
        notes += [f"{metric} could not be computed: {note}"] if note else []
        for name, value in values.items():
            scores[name][metric] = value
    return scores, notes


def prompt_check(path: Path) -> Follow:
    """`follow` of a Python file. Raises: ValueError where it has none."""
    spec = importlib.util.spec_from_file_location("minireuse_prompt_check", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"--check {path} is not a Python file; name one with a function follow(images, prompts)")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.path.insert(0, str(path.parent))  # for what lies beside it
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    follow: Follow | None = getattr(module, "follow", None)
    if follow is None:
        raise ValueError(f"--check {path} has no function follow(images, prompts)")
    return follow


def _attempt(compute: Callable[[Path], float], folders: dict[str, Path]) -> tuple[dict[str, float], str | None]:
    """All values, or none and why: a library has reasons of its own, and other figures do not depend on them."""
    try:
        return {name: compute(folder) for name, folder in folders.items()}, None
    except Exception as error:
        return {}, (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read(folder: Path, index: int) -> Tensor:
    """Shapes: -> (1, 3, H, W) uint8."""
    return torch.from_numpy(np.array(Image.open(folder / f"{index:05d}.png"))).permute(2, 0, 1)[None]

"""Rendered scenes and their latents, kept on disk so that no epoch pays for them twice."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from world import SIDE, Scene, render, sample_scene


def scene_at(seed: int, index: int) -> Scene:
    """Scene number `index` of data set `seed`; training uses seed 0, everything that measures another one."""
    return sample_scene(np.random.default_rng([seed, index]))


def _picture(seed: int, index: int) -> np.ndarray:
    return render(scene_at(seed, index))


def pictures(folder: Path, count: int, seed: int = 0) -> np.ndarray:
    """The first `count` scenes of a data set, rendered. Shapes: -> (count, SIDE, SIDE, 3) uint8, memory-mapped."""
    path = folder / f"pictures-{seed}-{count}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        out = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(count, SIDE, SIDE, 3))
        with ProcessPoolExecutor() as pool:
            work = pool.map(partial(_picture, seed), range(count), chunksize=64)
            for i, picture in enumerate(tqdm(work, total=count, desc="render")):
                out[i] = picture
        out.flush()
        os.replace(part, path)
    return np.load(path, mmap_mode="r")

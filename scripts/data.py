"""Rendered scenes, kept on disk so that no epoch pays for them twice."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from world import SIDE, Scene, render_marked, sample_scene

SCENES = 12_000  # to train on


def scene_at(seed: int, index: int) -> Scene:
    """Scene number `index` of data set `seed`; training uses seed 0, everything that measures another one."""
    return sample_scene(np.random.default_rng([seed, index]))


def picture_at(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture of that scene and its marks, as `render_marked` gives them."""
    return render_marked(scene_at(seed, index), np.random.default_rng([seed, index, 1]))


def pictures(folder: Path, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` scenes of a data set, rendered, with their marks.

    Shapes: -> (count, SIDE, SIDE, 3) uint8 and (count, SIDE, SIDE) uint8, memory-mapped.
    """
    paths = [folder / f"{name}-{seed}-{count}.npy" for name in ("pictures", "marks")]
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        parts = [path.with_suffix(".part.npy") for path in paths]
        shapes = ((count, SIDE, SIDE, 3), (count, SIDE, SIDE))
        out = [
            np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
            for part, shape in zip(parts, shapes, strict=True)
        ]
        with ProcessPoolExecutor() as pool:
            work = pool.map(partial(picture_at, seed), range(count), chunksize=64)
            for i, made in enumerate(tqdm(work, total=count, desc="render")):
                for kept, picture in zip(out, made, strict=True):
                    kept[i] = picture
        for kept, part, path in zip(out, parts, paths, strict=True):
            kept.flush()
            os.replace(part, path)
    loaded = [np.load(path, mmap_mode="r") for path in paths]
    return loaded[0], loaded[1]

"""Sets of prompts of the shipped model's world, which differ in how much they tell and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data import scene_at
from world import Scene, caption, parse_caption, render, things, vary_caption

PLAIN, FREE, MANY, UNSEEN = "told plainly", "free wording", "three things or more", "a combination never trained on"


def sets_of(prompts: Sequence[str]) -> dict[str, list[str]]:
    """Four sets, as Table 1 has four data sets; no set where the prompts are not of this world.

    A combination never trained on: trees of both kinds, where every training scene has one kind at most.
    """
    scenes = [scene for scene in map(parse_caption, prompts) if scene is not None]
    if not scenes:
        return {}
    rng = np.random.default_rng(0)
    return {
        PLAIN: [caption(scene) for scene in scenes if len(things(scene)) <= 2],
        FREE: [vary_caption(scene, rng) for scene in scenes],
        MANY: [caption(scene) for scene in scenes if len(things(scene)) >= 3],
        UNSEEN: [both_trees(scene) for scene in scenes if scene.trees is not None],
    }


def both_trees(scene: Scene) -> str:
    """The caption of a scene to which a tree of the other kind was added."""
    assert scene.trees is not None
    kind, number = scene.trees
    added = "an oak" if kind == "pine" else "a pine"
    own = things(replace(scene, trees=(kind, number)))[0]
    return caption(scene).replace(own, f"{own}, {added}" if len(things(scene)) > 1 else f"{own} and {added}", 1)


def renders(prompts: Sequence[str], count: int) -> list[np.ndarray]:
    """Pictures as the model was trained on: of the prompts' scenes, and of others where a text is no plain caption.

    Shapes: -> count of (SIDE, SIDE, 3) uint8.
    """
    scenes = [parse_caption(prompt) for prompt in prompts]
    return [render(scene or scene_at(6, i), np.random.default_rng([6, i])) for i, scene in enumerate(scenes[:count])]

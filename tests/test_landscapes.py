"""The world of the next model (scripts/landscapes): told in words, painted from seeds, and all that is told is seen."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PATH = Path(__file__).parents[1] / "scripts" / "landscapes" / "world.py"


@pytest.fixture(scope="module")
def world() -> ModuleType:
    """Under a name of its own: scripts/world.py is the shapes'."""
    import sys

    spec = importlib.util.spec_from_file_location("landscapes_world", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_captions_are_read_back(world: ModuleType) -> None:
    for i in range(300):
        scene = world.sample_scene(np.random.default_rng(i))
        assert world.parse_caption(world.caption(scene)) == scene
    for text in ("", "green hills", "green hills with a cow at noon", "green hills with an oaks at noon"):
        assert world.parse_caption(text) is None
    assert world.parse_caption("golden hills with an oak, a lake and clouds at noon") == world.Scene(
        "at noon", "golden hills", ("oak", 1), lake=True, clouds=True
    )


def test_free_wording_tells_the_same_things(world: ModuleType) -> None:
    rng = np.random.default_rng(0)
    scene = world.Scene("at night", "red dunes", ("pine", 2), "blue", True, True, False, "red")
    wordings = {world.vary_caption(scene, rng) for _ in range(200)}
    assert len(wordings) > 50
    for text in wordings:
        assert all(phrase in text for phrase in [*world.things(scene), "at night", "red dunes"])
        assert text.startswith(("at night red dunes", "red dunes"))


def test_answers_are_those_of_the_caption(world: ModuleType) -> None:
    scene = world.Scene("at dawn", "snowy hills", ("oak", 3), "yellow", clouds=True)
    told = {name: world.QUESTIONS[name][number] for name, number in world.answers(scene).items()}
    assert told == {
        "time": "at dawn",
        "ground": "snowy hills",
        "trees": "3 oak",
        "house": "yellow",
        "lake": "none",
        "mountains": "none",
        "clouds": "clouds",
        "balloon": "none",
    }


def test_a_picture_is_a_function_of_its_seed(world: ModuleType) -> None:
    scene = world.sample_scene(np.random.default_rng(7))
    paint: Callable[[int], np.ndarray] = lambda seed: world.render(scene, np.random.default_rng(seed))  # noqa: E731
    assert np.array_equal(paint(1), paint(1))
    assert not np.array_equal(paint(1), paint(2))
    assert paint(1).shape == (world.SIDE, world.SIDE, 3)


def test_all_that_is_told_is_seen(world: ModuleType) -> None:
    """Each thing has its least area of unhidden pixels, and leaving it out of the scene changes the picture there."""
    full = world.Scene("at sunset", "golden hills", ("pine", 3), "white", True, True, True, "yellow")
    _, marks = world.render_marked(full, np.random.default_rng(3))
    seen = np.bincount(marks.ravel(), minlength=10)
    least = world.LEAST_SEEN
    assert (seen[1:4] >= least["tree"]).all()
    assert [seen[n] >= least[name] for n, name in ((4, "house"), (5, "balloon"), (6, "lake"))] == [True] * 3
    assert [seen[n] >= least[name] for n, name in ((7, "mountains"), (8, "clouds"))] == [True] * 2
    bare = replace(full, trees=None, house=None, lake=False, mountains=False, clouds=False, balloon=None)
    _, marks = world.render_marked(bare, np.random.default_rng(3))
    assert not marks.any()

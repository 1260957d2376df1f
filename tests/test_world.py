"""The captioned world: told in words, painted from seeds, and all that is told is seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import make_prompts
import world
from data import SCENES, scene_at


def test_captions_are_read_back() -> None:
    for i in range(300):
        scene = world.sample_scene(np.random.default_rng(i))
        assert world.parse_caption(world.caption(scene)) == scene
    for text in ("", "green hills", "green hills with a cow at noon", "green hills with an oaks at noon"):
        assert world.parse_caption(text) is None
    assert world.parse_caption("golden hills with an oak, a lake and clouds at noon") == world.Scene(
        "at noon", "golden hills", ("oak", 1), lake=True, clouds=True
    )


def test_free_wording_tells_the_same_things() -> None:
    rng = np.random.default_rng(0)
    scene = world.Scene("at night", "red dunes", ("pine", 2), "blue", True, True, False, "red")
    wordings = {world.vary_caption(scene, rng) for _ in range(200)}
    assert len(wordings) > 50
    for text in wordings:
        assert all(phrase in text for phrase in [*world.things(scene), "at night", "red dunes"])
        assert text.startswith(("at night red dunes", "red dunes"))


def test_answers_are_those_of_the_caption() -> None:
    scene = world.Scene("at dawn", "snowy hills", ("oak", 3), "yellow", clouds=True)
    told = {name: world.QUESTIONS[name][number] for name, number in world.answers(scene).items()}
    assert told == {
        "time": "at dawn",
        "ground": "snowy hills",
        "trees": "three oaks",
        "house": "a yellow house",
        "lake": "none",
        "mountains": "none",
        "clouds": "clouds",
        "balloon": "none",
    }


def test_a_picture_is_a_function_of_its_seed() -> None:
    scene = world.sample_scene(np.random.default_rng(7))

    def paint(seed: int) -> np.ndarray:
        return world.render(scene, np.random.default_rng(seed))

    assert np.array_equal(paint(1), paint(1))
    assert not np.array_equal(paint(1), paint(2))
    assert paint(1).shape == (world.SIDE, world.SIDE, 3)


def test_all_that_is_told_is_seen() -> None:
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


def test_no_shipped_prompt_is_the_caption_of_a_training_scene() -> None:
    made = make_prompts.prompts()
    trained = {world.caption(scene_at(0, i)) for i in range(SCENES)}
    assert {name: len(lines) for name, lines in made.items()} == {"calibration": 64, "evaluation": 400}
    every = [line for lines in made.values() for line in lines]
    assert len(set(every)) == len(every)
    assert trained.isdisjoint(every)
    assert all(world.parse_caption(line) for line in every)

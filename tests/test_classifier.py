"""The classifier that reads pictures: what prompts ask, what pictures show, and files that hold no classifier."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minireuse.checkpoints import CheckpointError
from minireuse.evaluate.classifier import Classifier, ClassifierConfig, asked, own_classifier, read_classifier

import train_classifier
from data import scene_at
from train_classifier import accuracy, worn, write
from world import QUESTIONS, answers, caption, render, vary_caption

TINY = ClassifierConfig({"time": ("at noon", "at night"), "tree": ("none", "a pine", "two pines")}, widths=(8, 8))


@pytest.fixture
def tiny() -> Classifier:
    torch.manual_seed(0)
    return Classifier(TINY).eval()


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, size=(count, 16, 16, 3), dtype=np.uint8))


def test_captions_answer_every_question_in_any_wording() -> None:
    for i in range(100):
        scene = scene_at(5, i)
        right = {name: QUESTIONS[name][number] for name, number in answers(scene).items()}
        assert asked(caption(scene), QUESTIONS) == right
        assert asked(vary_caption(scene, np.random.default_rng(i)), QUESTIONS) == right


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a lighthouse at dusk",
        "green hills",
        "green hills at noon at night",
        "green hills with an oak, a pine at noon",
    ],
)
def test_prompts_that_leave_a_question_open_are_not_judged(prompt: str) -> None:
    assert asked(prompt, QUESTIONS) is None


def test_phrases_count_as_whole_words() -> None:
    assert asked("a pineapple at noon", TINY.questions) == {"time": "at noon", "tree": "none"}
    assert asked("two pines at noon", TINY.questions) == {"time": "at noon", "tree": "two pines"}


def test_the_answer_with_the_largest_logit_is_read(tiny: Classifier) -> None:
    images = pictures(35)  # more than a batch
    logits = tiny(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    for i, seen in enumerate(tiny.read(images)):
        assert seen == {name: TINY.questions[name][int(given[i].argmax())] for name, given in logits.items()}


def test_shares_of_prompts_followed(tiny: Classifier) -> None:
    image = pictures(1)[0]
    seen = tiny.read([image])[0]
    (other,) = {"at noon", "at night"} - {seen["time"]}
    things = "" if seen["tree"] == "none" else f"{seen['tree']} "
    prompts = [f"{things}{seen['time']}", f"{things}{other}", "a lighthouse"]
    assert tiny.follow([image] * 3, prompts) == [1.0, 0.5, None]


def test_a_written_classifier_is_read_again(tiny: Classifier, tmp_path: Path) -> None:
    write(tiny, tmp_path / "classifier")
    again = own_classifier(tmp_path)
    assert again is not None
    assert again.config == TINY
    image = torch.from_numpy(np.stack(pictures(2))).permute(0, 3, 1, 2)
    for name, given in tiny(image).items():
        torch.testing.assert_close(again(image)[name], given, atol=1e-2, rtol=1e-2)  # float16
    assert own_classifier(tmp_path / "classifier") is None  # a model without one


@pytest.mark.parametrize(
    "change",
    [
        {"questions": []},
        {"questions": {"time": 3}},
        {"widths": "wide"},
        {"widths": [8]},
        {"norm_groups": 3},
        {"widths": None},
    ],
)
def test_a_broken_configuration_is_named(tiny: Classifier, tmp_path: Path, change: dict) -> None:
    write(tiny, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"config\.json describes no classifier .*; download the model again"):
        read_classifier(tmp_path)


def test_tensors_of_another_classifier_are_refused(tiny: Classifier, tmp_path: Path) -> None:
    write(tiny, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "answers.time.bias"}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks answers\.time\.bias"):
        read_classifier(tmp_path)


def test_worn_pictures_show_the_same_scenes() -> None:
    rng = np.random.default_rng(0)
    flat = np.full((4, 128, 128, 3), (10, 120, 240), dtype=np.uint8)
    x = worn(flat, rng)
    assert (x.shape, x.dtype) == ((4, 3, 128, 128), torch.uint8)
    assert (x.float().mean(dim=(2, 3)) - torch.tensor([10.0, 120, 240])).abs().max() < 1
    assert x.float().std() > 0
    assert x.float().std(dim=(2, 3)).max() < 9  # noise of at most 8


def test_the_shipped_classifier_reads_renders() -> None:
    """Of scenes that it was not trained on; and it tells a picture from the caption of another one."""
    classifier = own_classifier(None)
    assert classifier is not None
    assert {name: tuple(told) for name, told in classifier.config.questions.items()} == QUESTIONS
    scenes = [scene_at(train_classifier.HELD_OUT, i) for i in range(80)]
    images = [render(scene, np.random.default_rng([9, i])) for i, scene in enumerate(scenes)]
    shares = accuracy(classifier, np.stack(images), [answers(scene) for scene in scenes])
    assert min(shares.values()) >= 0.95
    assert np.mean(list(shares.values())) >= 0.98
    captions = [caption(scene) for scene in scenes]
    mixed = classifier.follow(images, captions[1:] + captions[:1])
    assert np.mean([share for share in mixed if share is not None]) < 0.7

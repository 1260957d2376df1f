"""`--compare`: the full sampler's picture beside the policy's, from the same command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minireuse
from minireuse.common.metrics import ssim
from minireuse.sample import command as sample
from minireuse.sample.compare import STRIP, side_by_side

Run = tuple[int, str, str]


@pytest.fixture
def run(smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> Run:
        given = [] if "--from-png" in argv else ["--prompt", "a lake", "--steps", "4"]
        status = sample.main([*given, "--model", str(smallest_folder), "--device", "cpu", *argv])
        return status, *capsys.readouterr()

    return run


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_both_pictures_are_those_of_two_runs_and_their_figures_follow_from_them(run, tmp_path: Path) -> None:
    some = ("--num-images", "2", "--batch-size", "1", "--json", "--seed", "3")
    status, out, err = run(*some, "--policy", "hurry", "--compare", "--out", "both")
    assert status == 0
    report = json.loads(out)
    assert report["images"] == ["both/00000.png", "both/00001.png"]
    assert json.loads(run(*some, "--policy", "hurry", "--out", "policy")[1]).keys() == report.keys() - {"compare"}
    run(*some, "--policy", "none", "--out", "full")
    found = report["compare"]
    assert found["images"] == ["both/00000-compare.png", "both/00001-compare.png"]
    assert found["ratio"] == pytest.approx(report["seconds"] / found["seconds"])
    for i, (psnr, similar) in enumerate(zip(found["psnr"], found["ssim"], strict=True)):
        policy, full = pixels(f"policy/{i:05d}.png"), pixels(f"full/{i:05d}.png")
        assert np.array_equal(pixels(f"both/{i:05d}.png"), policy)
        assert psnr == pytest.approx(20 * np.log10(255 / np.sqrt(np.square(policy.astype(float) - full).mean())))
        assert similar == pytest.approx(ssim(policy[None], full[None])[0])
        assert f"both/{i:05d}.png: {psnr:.1f} dB to the full sampler, SSIM {similar:.4f}" in err
        shown = pixels(f"both/{i:05d}-compare.png")[STRIP:]
        small = shown[::16, ::16]  # 16 pixels are shown as 256
        difference = np.abs(policy.astype(int) - full) * 8
        assert np.array_equal(small, np.concatenate([full, policy, np.minimum(difference, 255)], axis=1))
        assert np.array_equal(shown, small.repeat(16, axis=0).repeat(16, axis=1))
    assert f"{found['ratio']:.2f} of the full sampler's time" in err
    assert run("--policy", "hurry", "--compare", "--quiet") == (0, "", "")


def test_both_are_warmed_up_before_they_are_timed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = minireuse.Pipeline.generate

    def generate(self: minireuse.Pipeline, prompts: list[str], **given: object) -> minireuse.pipeline.Result:
        made.append(given["plan"].reused)  # type: ignore[attr-defined]
        return original(self, prompts, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(minireuse.Pipeline, "generate", generate)
    assert run("--policy", "hurry", "--compare", "--num-images", "2", "--batch-size", "1")[0] == 0
    assert made == [2, 0, 2, 0, 2, 0]


def test_nothing_is_overwritten_unless_asked(run, tmp_path: Path) -> None:
    (tmp_path / "a-compare.png").write_bytes(b"mine")
    for options in ((), (), ("--overwrite",)):
        assert run("--policy", "hurry", "--compare", "--out", "a.png", "--quiet", *options)[0] == 0
        assert ((tmp_path / "a-compare.png").read_bytes() == b"mine") == (not options)
    names = ["a-1-compare.png", "a-1.png", "a-compare-1.png", "a-compare.png", "a.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_picture_that_is_made_again_can_be_compared(run, tmp_path: Path) -> None:
    assert run("--policy", "hurry", "--out", "a.png")[0] == 0
    status, out, _ = run("--from-png", "a.png", "--compare", "--json", "--out", "b.png")
    assert (status, json.loads(out)["compare"]["images"]) == (0, ["b-compare.png"])
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    status, _, err = run("--from-png", "b-compare.png")
    assert (status, "does not contain the settings" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--policy none", "this is the full sampler; name a --policy"),
        ("--policy hurry --reuse 0", "this is the full sampler; name a --policy"),
        ("--policy hurry --height 8", "images of 11x11 pixels or more"),
        ("--policy hurry --dry-run", "and --dry-run makes it another"),
        ("--policy hurry --save-maps maps", "and --save-maps makes it another"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_painted(
    run, tmp_path: Path, options: str, message: str
) -> None:
    status, out, err = run("--compare", *options.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_small_difference_is_seen_and_a_large_one_is_white() -> None:
    full = np.full((300, 300, 3), 100, dtype=np.uint8)
    image = full.copy()
    image[0, 0], image[0, 1], image[0, 2] = 103, 97, 200
    shown = np.array(Image.open(io.BytesIO(side_by_side(full, image, "a-very-long-plan-name" * 50))))
    assert shown.shape == (300 + STRIP, 900, 3)  # as large as they are
    assert shown[STRIP, 600:604, 0].tolist() == [24, 24, 255, 0]

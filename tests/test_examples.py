"""The examples of docs/samplers.md run, and find what they say they find."""

from __future__ import annotations

import contextlib
import io
import runpy
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))


def printed(name: str) -> str:
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        runpy.run_path(str(DOCS / "examples" / f"{name}.py"))
    return out.getvalue()


@pytest.mark.parametrize("name", ["k_diffusion_denoiser", "rectified_flow", "own_trajectory"])
def test_noise_becomes_data_of_the_right_size(name: str) -> None:
    assert float(printed(name)) == pytest.approx(0.5, rel=0.05)


def test_a_unet_of_diffusers() -> None:
    lines = printed("diffusers_unet").splitlines()
    assert [line.split()[0] for line in lines] == [str(i) for i in range(10)]
    assert lines[0].split()[1] == "999"


def test_an_early_stop_makes_fewer_calls() -> None:
    made, _, total, _ = printed("progress_and_stop").split()
    assert 2 <= int(made) < int(total) == 50


def test_inversion_comes_back_to_the_picture() -> None:
    first, second = printed("inversion_and_interpolation").splitlines()
    assert float(first.split()[0]) < 0.25  # of latents whose standard deviation is 1
    assert second == "(1, 128, 128, 3)"


def test_the_page_shows_every_example_as_it_is() -> None:
    page = (DOCS / "samplers.md").read_text(encoding="utf-8")
    assert {path.name for path in EXAMPLES if path.read_text(encoding="utf-8").strip() not in page} == set()

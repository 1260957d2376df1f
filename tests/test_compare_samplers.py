"""Solvers at equal calls: the cells are what they say, an interrupted run goes on, tables are read off the figures."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import minireuse
from minireuse.common.metrics import fidelity
from minireuse.schedule import Schedule

import compare_samplers
from compare_samplers import OURS, THEIRS

SD = Schedule.from_config()


@pytest.fixture
def given(smallest_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("a red house\na lake\nan oak\n")
    few = ["--prompts-file", str(tmp_path / "prompts.txt"), "--prompts", "2", "--calls", "4", "5", "--out"]
    return ["--model", str(smallest_folder), *few, str(tmp_path / "out")]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_samplers, "REFERENCE_STEPS", 12)


def test_cells_are_the_pictures_of_that_solver_against_those_of_many_ddim_steps(
    given: list[str], tmp_path: Path, smallest_folder: Path
) -> None:
    compare_samplers.main([*given, "--spacings", "karras"])
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]["karras"]
    pipe = minireuse.load(smallest_folder, device="cpu")

    def images(steps: int, sampler: str) -> np.ndarray:
        timesteps, seeds = pipe.schedule.timesteps(steps, "karras"), [1000, 1001]
        return pipe.generate(["a red house", "a lake"], seeds=seeds, steps=timesteps, sampler=sampler).images

    expected = images(12, "ddim")
    for sampler, calls, steps in (("ddim", 4, 4), ("dpmpp_2m", 5, 5), ("plms", 5, 4), ("dpm_solver_3", 4, 2)):
        psnr = fidelity(images(steps, sampler), expected)
        assert cells[sampler][str(calls)] == pytest.approx(psnr, abs=0.5), sampler  # pixels are rounded
    assert cells[THEIRS].keys() == {"4", "5"}
    assert cells["dpm_solver_3"].keys() == {"4"}


@pytest.mark.parametrize("spacing", compare_samplers.THEIR_GRIDS)
def test_diffusers_solver_is_followed_as_its_own_user_would(spacing: str) -> None:
    """By the scheduler of Stable Diffusion's own configuration, in single precision."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        final_sigmas_type="sigma_min",
        **compare_samplers.THEIR_GRIDS[spacing],
    )
    scheduler.set_timesteps(6)
    x = start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x * (1 + t / 1000)), t, x).prev_sample
    seen: list[tuple[float, int]] = []

    def denoise(x: torch.Tensor, t: float, call: int) -> torch.Tensor:
        seen.append((t, call))
        return torch.tanh(x * (1 + t / 1000))

    ours = compare_samplers.their_run(SD, 6, spacing)(denoise, start)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    assert seen == [(t.item(), call) for call, t in enumerate(scheduler.timesteps)]


def test_a_run_goes_on_where_it_was(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_samplers.main([*given, "--spacings", "leading"])
    first = (tmp_path / "out" / "results.json").read_text()
    monkeypatch.setattr(compare_samplers, "our_run", lambda *_: None)
    monkeypatch.setattr(compare_samplers, "their_run", lambda *_: None)
    monkeypatch.setattr(compare_samplers, "ddim", None)
    compare_samplers.main([*given, "--spacings", "leading"])
    assert (tmp_path / "out" / "results.json").read_text() == first
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        compare_samplers.main([*given, "--spacings", "leading", "--prompts", "1"])


def test_tables_and_plot_are_made_again_from_the_results_alone(given: list[str], tmp_path: Path) -> None:
    compare_samplers.main([*given, "--spacings", "leading", "ays"])
    out = tmp_path / "out"
    made = {name: (out / name).read_bytes() for name in ("table.md", "summary.md", "psnr.png")}
    for name in made:
        (out / name).unlink()
    compare_samplers.main(["--plot-only", "--out", str(out)])
    assert {name: (out / name).read_bytes() for name in made} == made
    assert len(made["psnr.png"]) > 5000


def test_a_model_without_prompts_asks_for_them(smallest_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no evaluation prompts of its own; give --prompts-file"):
        compare_samplers.main(["--model", str(smallest_folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


FOUND: compare_samplers.Found = {
    "leading": {
        "ddim": {4: [20.0, 22.0], 6: [24.0, 24.0], 10: [26.0, 26.0]},
        "dpmpp_2m": {4: [20.0, 21.1], 6: [20.0, 20.0], 10: [30.0, 32.0]},
        "dpmpp_2s": {4: [9.0, 9.0], 10: [25.0, 25.0]},
        THEIRS: {4: [22.0, 23.0], 6: [25.0, 26.0]},
    },
    "ays": {"ddim": {4: [21.0, 21.0]}, "dpmpp_2m": {4: [20.4, 20.6]}},
}


def test_the_summary_says_from_how_many_calls_a_solver_keeps_up() -> None:
    """Up to 0.5 dB below, and so for every larger number that was measured."""
    first, second = compare_samplers.summary(FOUND).split("\n\n")
    assert first.splitlines() == [
        "| at most 0.5 dB below `ddim` from | `leading` | `ays` |",
        "| --- | --- | --- |",
        "| `dpmpp_2m` | 10 | 4 |",
        "| `dpmpp_2s` | never |  |",
        "| `diffusers' 2M` | 4 |  |",
    ]
    assert second.splitlines()[2:] == [
        "| 4 | `ddim` on `leading` | 21.0 | `diffusers' 2M` on `leading` | 22.5 | -1.5 |",
        "| 6 | `ddim` on `leading` | 24.0 | `diffusers' 2M` on `leading` | 25.5 | -1.5 |",
    ]


def test_a_table_for_each_spacing_leaves_impossible_cells_empty() -> None:
    leading, _ = compare_samplers.table(FOUND).split("\n### ays")
    assert leading.splitlines()[2:] == [
        "| calls | `ddim` | `dpmpp_2m` | `dpmpp_2s` | `diffusers' 2M` |",
        "| --- | --- | --- | --- | --- |",
        "| 4 | 21.0 | 20.6 | 9.0 | 22.5 |",
        "| 6 | 24.0 | 20.0 |  | 25.5 |",
        "| 10 | 26.0 | 31.0 | 25.0 |  |",
    ]


def test_every_run_makes_the_calls_that_its_cell_names() -> None:
    made: set[str] = set()
    for spacing in ("leading", "karras"):
        for name, n, run in compare_samplers.cells(SD, spacing, [4, 6, 15]):
            seen: list[int] = []
            run(lambda x, t, call, seen=seen: seen.append(call) or x, torch.zeros(1, 1, 1, 1))
            assert seen == list(range(n))
            made.add(name)
    assert made == {*OURS, THEIRS}

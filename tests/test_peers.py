"""The published relatives' own packages, through diffusers on the same weights, against our plans (extra `peers`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import DeepCache
import diffusers
import numpy as np
import pytest
import tgate as tgate_package
import torch

import minireuse
from minireuse.cache import ReuseCache
from minireuse.common.journal import Journal
from minireuse.policies import deepcache, tgate

import compare_peers
from conftest import relative_error

PROMPT, STEPS = "green hills with a lake at noon", 10


@pytest.fixture
def reference(model_folder: Path) -> diffusers.StableDiffusionPipeline:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(pipeline: minireuse.Pipeline, plan: minireuse.plan.ReusePlan, latents: torch.Tensor) -> torch.Tensor:
    cache = ReuseCache(torch.float32)
    return pipeline.generate(PROMPT, steps=STEPS, plan=plan, latents=latents, cache=cache).latents


@pytest.mark.parametrize(("every", "branch"), [(2, 0), (3, 0), (2, 1), (5, 2), (2, 3), (3, 6)])
def test_deepcache_agrees_with_its_package(
    pipeline: minireuse.Pipeline, reference: diffusers.StableDiffusionPipeline, every: int, branch: int
) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = reference(PROMPT, num_inference_steps=STEPS, latents=latents, output_type="latent").images
    helper = DeepCache.DeepCacheSDHelper(pipe=reference)
    helper.set_params(cache_interval=every, cache_branch_id=branch)
    helper.enable()
    expected = reference(PROMPT, num_inference_steps=STEPS, latents=latents, output_type="latent").images
    helper.disable()
    given = ours(pipeline, deepcache(STEPS, pipeline.sites, every=every, branch=branch), latents)
    assert relative_error(given, expected) < 1e-3
    assert relative_error(given, plain) > 1e-2  # the plan did change something


@pytest.mark.parametrize(("gate", "every", "warmup"), [(5, 5, 2), (8, 3, 1), (3, 2, 2)])
def test_tgate_agrees_with_its_package(
    pipeline: minireuse.Pipeline, reference: diffusers.StableDiffusionPipeline, gate: int, every: int, warmup: int
) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = reference(PROMPT, num_inference_steps=STEPS, latents=latents, output_type="latent").images
    gated = tgate_package.TgateSDLoader(reference)
    expected = gated.tgate(
        PROMPT,
        num_inference_steps=STEPS,
        latents=latents,
        gate_step=gate,
        sp_interval=every,
        fi_interval=1,
        warm_up=warmup,
        output_type="latent",
    ).images
    given = ours(pipeline, tgate(STEPS, pipeline.sites, gate=gate, every=every, warmup=warmup), latents)
    assert relative_error(given, expected) < 1e-3
    assert relative_error(given, plain) > 1e-2


@pytest.fixture
def given(model_folder: Path, tmp_path: Path) -> list[str]:
    for package in ("DeepCache", "tgate", "tomesd"):
        pytest.importorskip(package, reason="extra `peers` is not installed")
    (tmp_path / "prompts.txt").write_text("a red house\na lake\n")
    (tmp_path / "others.txt").write_text("an oak\n")
    files = ["--prompts-file", str(tmp_path / "prompts.txt"), "--calibration-file", str(tmp_path / "others.txt")]
    few = ["--prompts", "2", "--calibration", "1", "--steps", "4", "--rounds", "1", "--rungs", "0.75", "0.5"]
    return ["--model", str(model_folder), *files, *few, "--spacings", "trailing", "--out", str(tmp_path / "out")]


def test_one_table_for_the_packages_and_ours(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = ["deepcache", "deepcache:branch=2", "tgate", "steps:2", "dpmpp_2m:2"]
    compare_peers.main([*given, "--others", *others])
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    rows = results["rows"]["trailing"]
    assert min(rows["diffusers"]["psnr"]) > 50  # the same full sampler but for rounding
    assert all(len(row["psnr"]) == 2 and len(row["seconds"]) == 1 for row in rows.values())
    pairs = {"deepcache": "DeepCache, interval 2", "tgate": "T-GATE, gate 2"}
    pairs["deepcache:branch=2"] = "DeepCache, interval 2, branch 2"
    for own, package in pairs.items():
        # The same plans: as far from the full one.
        assert rows[own]["psnr"] == pytest.approx(rows[package]["psnr"], abs=1)
    joined = [name for name in rows if ", with " in name]
    assert len(joined) == 7
    assert all(np.isfinite(rows[name]["psnr"]).all() for name in joined)
    assert {name for name in rows if name.startswith("phast")} == {"phast:latency=0.75", "phast:latency=0.5"}
    text = capsys.readouterr().out
    assert text.startswith("### trailing\n\n| within | ours |")
    assert (out / "gaps.md").read_text() + "\n" == text
    made = {name: (out / name).read_bytes() for name in ("gaps.md", "gaps.png")}
    assert "ToMe, ratio 0.5" in (out / "trailing" / "table.md").read_text()

    for name in made:
        (out / name).unlink()
    compare_peers.main(["--plot-only", "--out", str(out)])
    assert {name: (out / name).read_bytes() for name in made} == made
    with pytest.raises(ValueError, match="holds results already"):
        compare_peers.main(given)

    first = (out / "results.json").read_text()
    (out / "results.json").unlink()
    packages = [name for name in rows if rows[name]["full"] == "diffusers"]
    again = lambda *_: pytest.fail("what is in the journal was done again")  # noqa: E731
    done = compare_peers.Runner(again, calls=4, full="diffusers")
    monkeypatch.setattr(compare_peers, "peers", lambda *_: dict.fromkeys(packages, done))
    for work in ("render", "best_timesteps"):
        monkeypatch.setattr(compare_peers, work, again)
    compare_peers.main([*given, "--others", *others])
    assert json.loads((out / "results.json").read_text()) == json.loads(first)


def row(psnr: list[float], time: float, full: str = "none") -> dict[str, Any]:
    return {"psnr": psnr, "seconds": [2 * time, 4 * time], "full": full}


ROWS = {
    "none": row([100.0, 100.0], 1.0),
    "phast:latency=0.8": row([40.0, 42.0], 0.75),
    "phast:latency=0.5": row([30.0, 34.0], 0.56),  # slower than it was when it was searched
    "phast:latency=0.3": row([20.0, 20.0], 0.30),
    "steps:14": row([33.0, 33.0], 0.7),
    "dpmpp_2m:11": row([33.5, 34.5], 0.565),
    "timesteps:11": row([31.0, 31.0], 0.55),
    "diffusers": row([100.0, 100.0], 2.0, "diffusers"),  # twice as slow, which is not held against the packages
    "DeepCache, interval 2": row([29.5, 29.5], 1.1, "diffusers"),
    "DeepCache, interval 2, with ToMe, ratio 0.5": row([29.0, 29.0], 1.0, "diffusers"),
    "T-GATE, gate 10": row([41.5, 42.5], 1.6, "diffusers"),
    "ToMe, ratio 0.5": row([99.0, 99.0], 1.7, "diffusers"),  # too slow for all
}
CHOSEN = {0.8: "phast:latency=0.8", 0.5: "phast:latency=0.5", 0.3: "phast:latency=0.3"}


def test_the_gap_at_each_rung_is_to_the_best_of_the_others() -> None:
    first, second, third = compare_peers.climb(ROWS, CHOSEN)
    assert (first["ours"], first["other"], first["gap"]) == ("phast:latency=0.8", "T-GATE, gate 10", -1.0)
    assert first["gap_interval"] == (-1.5, -0.5)  # of the differences prompt by prompt, -1.5 and -0.5
    # Others may be as slow as our plan is, and a little slower.
    assert (second["other"], second["time"], second["gap"]) == ("dpmpp_2m:11", pytest.approx(0.56), -2.0)
    assert second["other_time"] == pytest.approx(0.565)
    assert "other" not in third
    assert second["families"] == {
        "DeepCache": 29.5,
        "T-GATE": None,
        "ToMe": None,
        "fewer steps, ddim": None,
        "fewer steps, dpmpp_2m": 34.0,
        "best of the same timesteps": 31.0,
    }
    assert first["families"]["T-GATE"] == 42.0
    assert first["families"]["fewer steps, ddim"] == 33.0


def test_the_table_and_the_plot_of_the_gaps(tmp_path: Path) -> None:
    rungs = {"leading": compare_peers.climb(ROWS, CHOSEN)}
    assert compare_peers.gaps(rungs).splitlines() == [
        "### leading",
        "",
        "| within | ours | time | dB | best other | time | dB | gap, dB [95 %] |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 0.8 of the time | `phast:latency=0.8` | 0.75 | 41.0 | `T-GATE, gate 10` | 0.80 | 42.0 | -1.0 [-1.5, -0.5] |",
        "| 0.5 of the time | `phast:latency=0.5` | 0.56 | 32.0 | `dpmpp_2m:11` | 0.56 | 34.0 | -2.0 [-3.5, -0.5] |",
        "| 0.3 of the time | `phast:latency=0.3` | 0.30 | 20.0 | none is as fast |  |  |  |",
    ]
    compare_peers.plot(rungs, tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").stat().st_size > 5000


def test_one_exchange_with_a_neighbour() -> None:
    row = [cell == "#" for cell in ".#..#"]
    assert ["".join(".#"[c] for c in moved) for moved in compare_peers.neighbours(row)] == ["..#.#", ".#.#."]
    # The score knows which call costs least to skip: 2. The even choice skips 2 and 4, at a cost of 10.
    cost = [0, 5, 1, 2, 9]
    score = lambda plan: -float(plan.mask[:, 0] @ cost)  # noqa: E731
    assert compare_peers.best_timesteps(5, 2, score).grid == "..##."
    assert compare_peers.best_timesteps(5, 0, score).grid == "....."


def test_a_choice_of_timesteps_is_ddim_on_them(pipeline: minireuse.Pipeline) -> None:
    made = compare_peers.sub_grids(pipeline, 6, [0.7, 0.5], ["an oak"], Journal())
    assert list(made) == ["timesteps:4", "timesteps:3"]
    latents = compare_peers.noise(pipeline, [7])
    for name, runner in made.items():
        assert runner.plan is not None
        kept = [t for t, skips in zip(pipeline.timesteps(6), runner.plan.mask[:, 0], strict=True) if not skips]
        assert name == f"timesteps:{len(kept)}"
        expected = pipeline.generate("a lake", steps=kept, seeds=7).images
        assert abs(runner.sample(["a lake"], latents).astype(int) - expected).max() <= 1


def test_both_samplers_with_fewer_steps(pipeline: minireuse.Pipeline) -> None:
    assert compare_peers.fewer_steps(6, [0.9, 0.5]) == [
        *("steps:5", "steps:4", "steps:3", "steps:2"),
        *("dpmpp_2m:5", "dpmpp_2m:4", "dpmpp_2m:3", "dpmpp_2m:2"),
    ]
    latents = compare_peers.noise(pipeline, [7])
    for name, sampler in (("steps:3", "ddim"), ("dpmpp_2m:3", "dpmpp_2m")):
        runner = compare_peers.ours(pipeline, name, 6, None)
        assert runner.calls == 3
        expected = pipeline.generate("a lake", steps=3, sampler=sampler, seeds=7).images
        assert np.array_equal(runner.sample(["a lake"], latents), expected)
    assert [compare_peers.fitting(20, rung) for rung in compare_peers.RUNGS] == [18, 16, 14, 12, 10, 8, 6]


@pytest.mark.parametrize("layers", [1, 2])
def test_branches_are_counted_as_the_package_counts_them(layers: int) -> None:
    """It numbers by block and layer, three to a block; ours number what is there, from the outside."""
    places = [(block, layer) for block in range(3) for layer in range(layers + 1)]
    assert [compare_peers.package_branch(i, layers) for i in range(len(places))] == [3 * b + n for b, n in places]

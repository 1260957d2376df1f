"""The published relatives' own packages, through diffusers on the same weights, against our plans (extra `peers`)."""

from __future__ import annotations

import json
from pathlib import Path

import DeepCache
import diffusers
import pytest
import tgate as tgate_package
import torch

import minireuse
from minireuse.cache import ReuseCache
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


def test_one_table_for_the_packages_and_ours(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for package in ("DeepCache", "tgate", "tomesd"):
        pytest.importorskip(package, reason="extra `peers` is not installed")
    (tmp_path / "prompts.txt").write_text("a red house\na lake\n")
    argv = [
        "--model",
        str(model_folder),
        "--prompts-file",
        str(tmp_path / "prompts.txt"),
        "--steps",
        "6",
        "--rounds",
        "1",
    ]
    compare_peers.main(
        [*argv, "--ours", "deepcache", "deepcache:branch=2", "tgate", "steps:3+hurry", "--out", str(tmp_path / "out")]
    )
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert min(rows["diffusers"]["psnr"]) > 60  # the same full sampler
    assert all(len(row["psnr"]) == 2 and len(row["seconds"]) == 1 for row in rows.values())
    pairs = {"deepcache": "DeepCache, interval 2", "tgate": "T-GATE, gate 3"}
    pairs["deepcache:branch=2"] = "DeepCache, interval 2, branch 2"
    for own, package in pairs.items():
        assert rows[own]["psnr"] == pytest.approx(
            rows[package]["psnr"], abs=1
        )  # the same plans: as far from the full one
    assert "ToMe, ratio 0.5" in capsys.readouterr().out


def test_the_gap_at_each_latency_is_to_the_best_of_the_others() -> None:
    def row(psnr: list[float], time: float, full: str = "none") -> dict[str, object]:
        return {"psnr": psnr, "seconds": [2 * time, 4 * time], "full": full}

    rows = {
        "none": row([100.0, 100.0], 1.0),
        "phast": row([40.0, 42.0], 0.75),
        "phast:k=15": row([30.0, 34.0], 0.45),
        "deepcache": row([29.0, 29.0], 0.5),  # theirs, whoever runs it
        "steps:14": row([33.0, 33.0], 0.7),
        "diffusers": row([100.0, 100.0], 2.0, "diffusers"),  # twice as slow, which is not held against DeepCache
        "DeepCache, interval 2": row([29.5, 29.5], 1.1, "diffusers"),
        "hurry": row([99.0, 99.0], 0.95),  # too slow for all
    }
    lines = compare_peers.gaps(rows, ["phast", "phast:k=15", "hurry"]).splitlines()[2:]
    assert len(lines) == len(compare_peers.LATENCIES)
    assert lines[1].startswith("| 0.8 of the time | `phast` | 41.0 | `steps:14` | 33.0 | +8.0 [")
    assert lines[3].startswith("| 0.6 of the time | `phast:k=15` | 32.0 | `DeepCache, interval 2` | 29.5 | +2.5 [")
    assert lines[4].startswith("| 0.5 of the time | `phast:k=15` | 32.0 | `deepcache` | 29.0 | +3.0 [")
    assert lines[5] == "| 0.4 of the time | none is as fast |  | none is as fast |  |  |"


@pytest.mark.parametrize("layers", [1, 2])
def test_branches_are_counted_as_the_package_counts_them(layers: int) -> None:
    """It numbers by block and layer, three to a block; ours number what is there, from the outside."""
    places = [(block, layer) for block in range(3) for layer in range(layers + 1)]
    assert [compare_peers.package_branch(i, layers) for i in range(len(places))] == [3 * b + n for b, n in places]


def test_which_rows_are_ours() -> None:
    assert all(map(compare_peers.is_own, ("hurry", "phast:kind=deep", "plans/a.json", "steps:15+phast:kind=deep")))
    assert not any(map(compare_peers.is_own, ("phast|tgate", "deepcache:every=3", "steps:15", "none")))

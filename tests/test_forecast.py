"""The memory forecast before a run is the memory of the run, to the byte."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import minireuse
from minireuse.cache import DTYPES, ReuseCache
from minireuse.config import SD1_UNET
from minireuse.policies import hurry, select
from minireuse.sample import command as sample
from minireuse.sample.forecast import forecast
from minireuse.search.language import build
from minireuse.unet import UNet

PLANS = ["hurry", "interval", "hurry:kind=out,sites=self", "deepcache", "tgate", "pab", "hurry:k=2|deepcache:every=3"]
PLANS += ["interval:order=1", "deepcache:order=1", "tgate:order=1,gate=4"]
PLANS += ["interval:order=2,k=2", "deepcache:order=2,every=3", "interval:kind=eps,order=2,k=2", "hurry:order=2,k=2"]
CASES = dict.fromkeys([*zip(PLANS, itertools.cycle(DTYPES), strict=False), *(("hurry", dtype) for dtype in DTYPES)])


@pytest.mark.parametrize(("expression", "dtype"), CASES)
def test_forecast_is_what_a_run_takes(
    pipeline: minireuse.Pipeline, model_folder: Path, expression: str, dtype: torch.dtype
) -> None:
    empty = minireuse.load(model_folder, device="meta")
    plan = build(expression, 6, pipeline.sites)
    for guidance_scale, prompts, height in ((7.5, ["a red house"], 16), (1.0, ["a lake", "an oak"], 32)):
        cache = ReuseCache(dtype)
        settings = {"steps": 6, "guidance_scale": guidance_scale, "height": height}
        pipeline.generate(prompts, plan=plan, cache=cache, **settings)
        expected = forecast(
            empty.unet,
            plan,
            batch=len(prompts),
            size=empty.latent_size(height),
            tokens=empty.text.length,
            guided=guidance_scale != 1,
            cache_dtype=dtype,
        )
        assert expected.peak == cache.peak_nbytes > 0
        assert max(expected.sites.values()) <= expected.peak <= sum(expected.sites.values())


def test_stable_diffusion_at_512_pixels() -> None:
    """B = 2 with guidance, half precision: heads x tokens x keys of the sixteen layers, counted by hand."""
    with torch.device("meta"):
        unet = UNet(SD1_UNET)
    # (layers, tokens, width) per resolution, 8 heads everywhere; the middle has one layer more.
    levels = ((5, 4096, 320), (5, 1024, 640), (5, 256, 1280), (1, 64, 1280))
    for which, kind, expected in (
        ("self", "map", sum(n * 2 * 8 * tokens * tokens * 2 for n, tokens, _ in levels)),
        ("cross", "map", sum(n * 2 * 8 * tokens * 77 * 2 for n, tokens, _ in levels)),
        ("self", "out", sum(n * 2 * tokens * width * 2 for n, tokens, width in levels)),
    ):
        plan = hurry(3, select(unet.sites, which, kind), k=1)
        assert forecast(unet, plan, batch=1, size=(64, 64)).peak == expected


def test_dry_run_reads_no_weights(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "model"
    for config in (
        "unet/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
    ):
        (copy / config).parent.mkdir(parents=True, exist_ok=True)
        (copy / config).write_text((model_folder / config).read_text())
    run = ["--prompt", "a lake", "an oak", "--steps", "6", "--policy", "hurry", "--dry-run"]
    assert sample.main([*run, "--model", str(copy), "--json"]) == 0
    forecast_report = json.loads(capsys.readouterr().out)
    out = tmp_path / "out"
    assert sample.main([*run[:-1], "--model", str(model_folder), "--json", "--out", str(out)]) == 0
    done = json.loads(capsys.readouterr().out)
    assert forecast_report["cache_peak_bytes"] == done["cache_peak_bytes"] == sum(forecast_report["sites"].values())
    assert (forecast_report["plan"], forecast_report["batch"]) == ("...###", 2)
    assert sample.main([*run, "--model", str(copy), "--cache-dtype", "uint8"]) == 0
    *sites, total = capsys.readouterr().out.splitlines()
    assert len(sites) == len(forecast_report["sites"])
    assert total.endswith("at the fullest moment, for a batch of 2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]

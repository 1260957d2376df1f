"""The benchmark's own claims: its limits compute what they say, and its report stands on what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minireuse.attention import Attention
from minireuse.cache import ReuseCache
from minireuse.plan import StepPlan
from minireuse.policies import select
from minireuse.unet import UNet

import bench
from conftest import TINY_UNET, randomise, relative_error

SCALE = bench.Scale("tiny", TINY_UNET, 8, "cpu", torch.float32)


@pytest.fixture(scope="module")
def unet() -> UNet:
    unet = UNet(TINY_UNET)
    randomise(unet)
    return unet.requires_grad_(False)


def test_the_limit_of_maps_is_a_reusing_call_without_looking_anything_up(unet: UNet) -> None:
    x, y, context = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    sites, cache = frozenset(select(unet.sites)), ReuseCache(torch.float32)
    text = unet.text_kv(context)
    unet(x, 500, text, StepPlan(store=sites), cache)
    maps = {site.address: cache.entry(site).tensor.values for site in sites}
    with bench.without_maps(maps):
        limit = unet(y, 500, text)
    torch.testing.assert_close(limit, unet(y, 500, text, StepPlan(reuse=sites), cache))
    assert relative_error(limit, unet(y, 500, text)) > 1e-3


def test_the_limit_of_outputs_has_no_attention(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    with bench.without_attention(), monkeypatch.context() as patch:
        patch.setattr(Attention, "forward", None)  # calling it would fail
        limit = unet(x, 500, context)
    zeros = UNet(TINY_UNET)
    zeros.load_state_dict(unet.state_dict())
    for module in zeros.modules():
        if isinstance(module, Attention):
            torch.nn.init.zeros_(module.to_out[0].weight)
            torch.nn.init.zeros_(module.to_out[0].bias)
    torch.testing.assert_close(limit, zeros(x, 500, context))


def test_diffusers_runs_the_same_weights(unet: UNet) -> None:
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    other = bench.diffusers_unet(unet)
    assert relative_error(other(x, 500, encoder_hidden_states=context).sample, unet(x, 500, context)) < 1e-4


def expected_median(times: dict[str, list[float]], name: str, other: str, digits: int = 2) -> str:
    in_turn = sorted(a / b for a, b in zip(times[name], times[other], strict=True))
    return f"{in_turn[len(in_turn) // 2]:.{digits}f}"  # of one round, or three


def test_the_report(unet: UNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(bench, "scales", lambda device, quick: [SCALE])
    monkeypatch.setattr(bench, "shipped_model", lambda: tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    bench.main(["--rounds", "1", "--device", "cpu", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "bench.json").read_text())
    found = results["scales"][SCALE.label]
    for dtype, memory in found["memory"].items():
        assert memory["forecast"] == memory["counted"] > 0, dtype
    times = found["calls"]
    for name, other, rows in (
        ("reuse map, float32", "limit map, float32", times),
        ("full", "diffusers", found["runs"]),
    ):
        assert f"| {name} / {other} | {expected_median(rows, name, other, digits=3)} (" in printed
    lines = (tmp_path / "out" / "summary.md").read_text().splitlines()
    cells = dict(line.strip("| ").split(" | ") for line in lines[2:])
    assert cells["full call / diffusers'"] == expected_median(times, "full", "diffusers")
    assert cells["reusing outputs / the same without attention layers"] == expected_median(
        times, "reuse out, float32", "limit out, float32"
    )
    assert cells["20 calls, HURRY with 10: maps / outputs / deep features"] == " / ".join(
        expected_median(found["runs"], f"HURRY {kind}", "full") for kind in ("map", "out", "deep")
    )
    results["scales"][SCALE.label]["runs"] = {}
    assert bench.summary(results).splitlines()[-1].endswith("deep features |  |")
    assert set(results["curves"]) == {"latents' side", "batch", "reuse calls of 20"}
    assert (tmp_path / "out" / "bench.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="name a new folder"):
        bench.main(["--rounds", "1", "--device", "cpu", "--out", str(tmp_path / "out")])


def test_ratios_are_medians_of_rounds() -> None:
    assert bench.ratio({"a": [1.0, 2.0, 9.0], "b": [2.0, 2.0, 3.0]}, "a", "b") == "1.000 (0.50-3.00)"

"""Compiled calls: the same numbers as eager ones, one graph for each kind of call, and nothing recompiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo import exc
from torch._dynamo.utils import counters

from minireuse.cache import CacheError, ReuseCache
from minireuse.compilation import CompiledUNet
from minireuse.plan import ReusePlan, StepPlan
from minireuse.policies import hurry, interval, select, tgate
from minireuse.unet import UNet

from conftest import SMALLEST_UNET, randomise

CALLS = 6


@pytest.fixture(scope="module")
def unet() -> UNet:
    unet = UNet(SMALLEST_UNET)
    randomise(unet)
    return unet.requires_grad_(False)


@torch.inference_mode()
def outputs(unet: UNet, by: UNet | CompiledUNet, plan: ReusePlan, cache: ReuseCache, batch: int = 2) -> list[Tensor]:
    width = unet.config.cross_attention_dim
    device = unet.conv_in.weight.device
    context = torch.randn(batch, 7, width, generator=torch.Generator().manual_seed(99)).to(device)
    text = {True: unet.text_kv(context), False: unet.text_kv(context.chunk(2)[1])}
    found = []
    for call in range(plan.calls):
        step = plan.step(call)
        x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(call)).to(device)
        x = x if step.guided else x.chunk(2)[1]
        found.append(by(x, 900.0 - 100 * call, text[step.guided], step, cache))
    return found


@pytest.fixture
def quick(unet: UNet) -> CompiledUNet:
    """Traced and captured like the real thing, but run by torch's own kernels: no minutes of C++."""
    torch._dynamo.reset()
    counters.clear()
    return CompiledUNet(unet, backend="eager")


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("kind", "dtype"), [("map", torch.uint8), ("out", torch.float16), ("deep", torch.float32)])
def test_compiled_calls_equal_eager_ones(
    unet: UNet, quick: CompiledUNet, kind: str, dtype: torch.dtype, order: int
) -> None:
    # A storing and a reusing call in turn; the first that reuses has one value, the next has two where order is not 0.
    plan = replace(interval(CALLS, select(unet.sites, kind=kind)[-2:], k=3), order=order)
    eager, own = ReuseCache(dtype), ReuseCache(dtype)
    expected = outputs(unet, unet, plan, eager)
    for given, wanted in zip(outputs(unet, quick, plan, own), expected, strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.equal(expected[1], outputs(unet, unet, ReusePlan.nothing(CALLS), ReuseCache())[1])
    assert len(own) == 0
    assert own.peak_nbytes == eager.peak_nbytes
    # One graph for each kind of call, whole, and none made again.
    assert len(quick.graphs) == counters["stats"]["unique_graphs"] == 2 + order
    assert not counters["graph_break"]


def test_graphs_know_all_that_is_constant_in_them(unet: UNet, quick: CompiledUNet) -> None:
    store = StepPlan(store=frozenset(select(unet.sites)[:1]))
    for side, tokens, step, dtype in (
        (8, 7, store, torch.float16),
        (8, 7, store, torch.uint8),
        (8, 7, StepPlan(explicit=True), torch.float16),
        (8, 9, StepPlan(explicit=True), torch.float16),
        (4, 9, StepPlan(explicit=True), torch.float16),
        (8, 7, store, torch.float16),
    ):
        x, text = torch.randn(2, 4, side, side), unet.text_kv(torch.randn(2, tokens, 32))
        own, eager = ReuseCache(dtype), ReuseCache(dtype)
        torch.testing.assert_close(quick(x, 5.0, text, step, own), unet(x, 5.0, text, step, eager))
        assert own.nbytes == eager.nbytes
    assert len(quick.graphs) == 5


def test_how_far_a_line_goes_on_makes_no_other_graph(unet: UNet, quick: CompiledUNet) -> None:
    """A single computing call between runs of reuse: six distances, and guidance that ends."""
    row = np.array([c == "#" for c in "..###.###.##"])
    plan = ReusePlan.stepwise(row, select(unet.sites, kind="out")[:2], order=1)
    plan = replace(plan, guided=(True,) * 10 + (False,) * 2)
    assert len({step.weights for step in map(plan.step, range(plan.calls)) if step.weights}) == 6
    for given, wanted in zip(
        outputs(unet, quick, plan, ReuseCache()), outputs(unet, unet, plan, ReuseCache()), strict=True
    ):
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)
    assert len(quick.graphs) == counters["stats"]["unique_graphs"] == 3  # storing, reusing, reusing unguided


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("order", [0, 1, 2])
def test_cuda_graphs_read_and_write_fixed_addresses(unet: UNet, order: int) -> None:
    own = UNet(SMALLEST_UNET)
    own.load_state_dict(unet.state_dict())
    own = own.cuda().requires_grad_(False)
    compiled, plan = CompiledUNet(own), replace(interval(CALLS, select(own.sites), k=3), order=order)
    addresses = set()
    for _ in range(3):
        given = outputs(own, compiled, plan, ReuseCache())
        for a, b in zip(given, outputs(own, own, plan, ReuseCache()), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        addresses |= {room.data_ptr() for room in compiled._rooms.values()}
    assert len(addresses) == (1 + order) * len(select(own.sites))


def test_calls_without_guidance_read_what_guided_ones_stored(unet: UNet, quick: CompiledUNet) -> None:
    plan = tgate(CALLS, unet.sites, gate=3)
    assert not all(plan.guided)
    for given, wanted in zip(
        outputs(unet, quick, plan, ReuseCache()), outputs(unet, unet, plan, ReuseCache()), strict=True
    ):
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)


def test_a_reusing_call_needs_its_cache(unet: UNet, quick: CompiledUNet) -> None:
    step = hurry(2, select(unet.sites), k=1).step(1)
    with pytest.raises(CacheError, match="nothing is cached for map of"):
        quick(torch.zeros(2, 4, 8, 8), 500.0, unet.text_kv(torch.zeros(2, 7, 32)), step, ReuseCache())


def test_a_watch_is_refused(unet: UNet, quick: CompiledUNet) -> None:
    with pytest.raises(ValueError, match="does not show its attention"):
        quick(torch.zeros(2, 4, 8, 8), 500.0, unet.text_kv(torch.zeros(2, 7, 32)), watch=lambda *seen: None)


def test_inductor_computes_the_same(unet: UNet) -> None:
    """On a call that reads one layer's map and stores another's: one graph has to be built, which takes a while."""
    torch._dynamo.reset()
    first, second = select(unet.sites)[:2]
    x, text = torch.randn(2, 4, 8, 8), unet.text_kv(torch.randn(2, 7, 32))
    found = []
    for by in (unet, CompiledUNet(unet)):
        cache = ReuseCache(torch.uint8)
        unet(x, 900.0, text, StepPlan(store=frozenset({first})), cache)
        found += [by(2 * x, 800.0, text, StepPlan(reuse=frozenset({first}), store=frozenset({second})), cache)]
        found += [cache.entry(second).tensor.apply(torch.eye(7).expand(2, 2, 7, 7))]  # its map, as numbers
    torch.testing.assert_close(found[:2], found[2:], atol=1e-3, rtol=1e-3)  # a code may be rounded the other way


def test_without_a_compiler_one_sentence_says_so(unet: UNet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    with pytest.raises(ValueError, match=r"cannot be compiled here .*; leave out --compile"):
        outputs(unet, CompiledUNet(unet), ReusePlan.nothing(1), ReuseCache())


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("FailOnRecompileLimitHit", ValueError),
        ("InternalTorchDynamoError", ValueError),
        ("OutOfMemoryError", torch.OutOfMemoryError),  # the command line has advice for it
    ],
)
def test_only_what_cannot_be_compiled_is_told_as_that(
    unet: UNet, monkeypatch: pytest.MonkeyPatch, raised: str, expected: type[Exception]
) -> None:
    compiled = CompiledUNet(unet)
    error = getattr(exc, raised, None) or getattr(torch, raised, None)
    if error is None:
        pytest.skip(f"this torch has no {raised}")

    def fail(*args: object) -> None:
        raise error("no room")

    monkeypatch.setattr(compiled, "_trace", fail)
    with pytest.raises(expected, match="no room"):
        outputs(unet, compiled, ReusePlan.nothing(1), ReuseCache())

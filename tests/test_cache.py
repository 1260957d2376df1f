"""Tensors in the cache: blocks, half precision and eight bits, against the same numbers in full."""

from __future__ import annotations

import pytest
import torch

from minireuse import cache
from minireuse.cache import CacheTensor, blocks, copy_of, new_map

CPU = torch.device("cpu")
FLOATS = [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]


def a_map(*shape: int, sharpness: float = 3.0) -> torch.Tensor:
    """Probabilities as attention gives them: a few large ones among many small."""
    return (sharpness * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).softmax(-1)


def filled(probs: torch.Tensor, dtype: torch.dtype) -> CacheTensor:
    held = new_map(probs.shape, dtype, "cpu")
    held.fill(probs)
    return held


@pytest.mark.parametrize(
    "shape", [(2, 8, 64, 64), (1, 1, 1, 1), (3, 5, 7, 300_000), (2, 2, 1024, 1024), (2, 3, 100, 77), (5, 2, 1024, 512)]
)
def test_blocks_cover_every_row_once(shape: tuple[int, ...]) -> None:
    held = torch.empty(shape, device="meta")
    times = torch.zeros(shape[:3], dtype=torch.int)
    for block in blocks(shape, CPU):
        assert held[block].is_contiguous()
        times[block] += 1
    assert (times == 1).all()


def test_blocks_on_the_processor_are_at_most_eight_mebibytes() -> None:
    held = torch.empty(2, 8, 4096, 77)
    sizes = [held[block].numel() * 4 for block in blocks(held.shape, CPU)]
    assert max(sizes) <= 2**23
    assert len(sizes) <= 4  # and not needlessly small


def test_small_maps_of_several_images_are_one_block() -> None:
    assert len(list(blocks((4, 8, 64, 77), CPU))) == 1


@pytest.mark.parametrize(("dtype", "error"), FLOATS)
def test_a_kept_map_multiplies_like_the_map(dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cache.BLOCK_BYTES, "cpu", 3000)  # many blocks
    probs, v = a_map(2, 3, 20, 77), torch.randn(2, 3, 77, 8)
    held = filled(probs, dtype)
    torch.testing.assert_close(held.apply(v), torch.einsum("bknm,bkmd->bknd", probs, v), atol=4 * error, rtol=0)
    torch.testing.assert_close(held.read(v), probs, atol=error, rtol=0)
    assert held.nbytes == probs.numel() * dtype.itemsize


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0, 10.0])
def test_eight_bits_keep_a_map(sharpness: float) -> None:
    probs, v = a_map(2, 3, 20, 77, sharpness=sharpness), torch.randn(2, 3, 77, 8)
    held = filled(probs, torch.uint8)
    read = held.read(v)
    torch.testing.assert_close(read.sum(-1), torch.ones(2, 3, 20), atol=1e-3, rtol=0)
    # A root in steps of 1/255 of the row's largest: half a step off, the square is off by its slope times that.
    largest = probs.amax(-1, keepdim=True)
    bound = (probs * largest).sqrt() / 255 + largest / 255**2
    assert ((read - probs).abs() <= 1.1 * bound + 2e-3 * probs).all()
    torch.testing.assert_close(held.apply(v), read @ v, atol=1e-4, rtol=1e-3)
    assert held.nbytes <= 0.26 * 4 * probs.numel()


@pytest.mark.parametrize("shape", [(2, 16, 32), (2, 8, 4, 4)])
def test_eight_bits_keep_an_output_or_a_feature(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape) * torch.logspace(-3, 3, shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    value[0, 0] = 0
    held = copy_of(value, torch.uint8, "cpu")
    largest = value.abs().flatten(2).amax(-1).reshape(*shape[:2], *[1] * (len(shape) - 2))
    assert ((held.read(value) - value).abs() <= 0.51 * largest / 127 + 1e-3 * largest).all()
    assert held.nbytes == value.numel() + 2 * shape[0] * shape[1]


@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_halves(dtype: torch.dtype) -> None:
    value = torch.randn(4, 6, 8)
    held = copy_of(value, dtype, "cpu")
    torch.testing.assert_close(held.half(mean=False).read(value), held.read(value)[2:], atol=0, rtol=0)
    mean = (value[:2] + value[2:]) / 2
    torch.testing.assert_close(held.half(mean=True).read(value), mean, atol=0.05, rtol=0)
    assert held.half(mean=True).nbytes == held.nbytes / 2


def test_eight_bits_do_not_overflow_in_half_precision() -> None:
    """Even rows: each of many keys counts little, and their codes are all the largest."""
    probs, v = torch.full((1, 1, 4, 9216), 1 / 9216), torch.full((1, 1, 9216, 2), 20.0, dtype=torch.float16)
    given = filled(probs, torch.uint8).apply(v)
    torch.testing.assert_close(given, torch.full((1, 1, 4, 2), 20.0, dtype=torch.float16), atol=0.2, rtol=0)


def test_a_kept_map_is_no_part_of_a_graph() -> None:
    probs = a_map(1, 2, 3, 4).requires_grad_()
    for dtype in cache.DTYPES:
        held = filled(probs, dtype)
        assert not held.read(torch.empty(0)).requires_grad
        v = torch.randn(1, 2, 4, 5, requires_grad=True)
        (held.apply(v)).sum().backward()
        assert v.grad is not None


def test_what_is_not_a_number_stays_so() -> None:
    """A broken map must not come back as numbers: the run would paint a wrong picture instead of stopping."""
    probs, v = a_map(1, 1, 4, 8), torch.randn(1, 1, 8, 2)
    probs[0, 0, 1] = torch.nan
    assert torch.isnan(filled(probs, torch.uint8).apply(v))[0, 0, 1].all()
    value = torch.randn(1, 3, 8)
    value[0, 1, 2] = torch.inf
    assert not torch.isfinite(copy_of(value, torch.uint8, "cpu").read(value)[0, 1]).any()


@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_half_of_a_map(dtype: torch.dtype) -> None:
    held = filled(a_map(4, 2, 5, 7), dtype)
    like = torch.empty(0)
    torch.testing.assert_close(held.half(mean=False).read(like), held.read(like)[2:], atol=0, rtol=0)

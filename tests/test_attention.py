"""Attention's three branches, and what a U-Net does and does not compute under a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from minireuse import cache as kept
from minireuse.attention import Attention, explicit_attention, fused_attention, storing_attention
from minireuse.cache import DTYPES, CacheError, ReuseCache, new_map
from minireuse.plan import PLAIN, ReusePlan, StepPlan
from minireuse.policies import hurry, interval, select
from minireuse.unet import UNet

from conftest import TINY_UNET, randomise

CALLS = 6


@pytest.fixture(scope="module")
def unet() -> UNet:
    unet = UNet(TINY_UNET)
    randomise(unet)
    return unet.requires_grad_(False)


def inputs(call: int, batch: int = 2) -> tuple[Tensor, float, Tensor]:
    generator = torch.Generator().manual_seed(call)
    context = torch.randn(batch, 7, 32, generator=torch.Generator().manual_seed(99))
    return torch.randn(batch, 4, 8, 8, generator=generator), 900.0 - 100 * call, context


def run(unet: UNet, plan: ReusePlan, cache: ReuseCache) -> list[Tensor]:
    return [unet(*inputs(call), plan.step(call), cache) for call in range(plan.calls)]


def test_probs_are_a_float32_softmax_of_scaled_scores() -> None:
    q, k = torch.randn(2, 3, 5, 4, dtype=torch.float16), torch.randn(2, 3, 7, 4, dtype=torch.float16)
    _, probs = explicit_attention(q, k, torch.randn(*k.shape))
    assert probs.dtype == torch.float32
    expected = torch.einsum("bknd,bkmd->bknm", q.double(), k.double()).div(2).softmax(-1)
    torch.testing.assert_close(probs.double(), expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3, 5))


def test_fused_explicit_and_stored_branches_agree(unet: UNet) -> None:
    args = inputs(0)
    plain = unet(*args)
    explicit = unet(*args, StepPlan(explicit=True), None)
    storing = unet(*args, StepPlan(store=frozenset(unet.sites)), ReuseCache())
    torch.testing.assert_close(explicit, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(storing, explicit, atol=1e-5, rtol=1e-5)  # block by block: sums in another order


def test_plan_without_reuse_is_bit_identical_to_no_plan_and_stores_nothing(unet: UNet) -> None:
    cache = ReuseCache()
    all_false = ReusePlan.stepwise([False] * CALLS, unet.sites)
    for call, given in enumerate(run(unet, all_false, cache)):
        assert torch.equal(given, unet(*inputs(call)))
    assert cache.peak_nbytes == 0


def reference_attention(recorded: dict[str, Tensor], module: Attention, record: bool) -> Callable[..., Tensor]:
    """Attention written out with einsum, keeping or applying maps in a dictionary: the mechanism at its plainest."""

    def forward(x: Tensor, context: Tensor | None = None, *_: object) -> Tensor:
        context = x if context is None else context
        heads, d = module.heads, x.shape[-1] // module.heads
        q, k, v = (
            f(y).reshape(*y.shape[:2], heads, d)
            for f, y in ((module.to_q, x), (module.to_k, context), (module.to_v, context))
        )
        if record:
            recorded[module.address] = (torch.einsum("bnkd,bmkd->bknm", q, k) * d**-0.5).softmax(-1)
        return module.to_out[0](torch.einsum("bknm,bmkd->bnkd", recorded[module.address], v).flatten(2))

    return forward


@pytest.mark.parametrize("order", [0, 1])
def test_map_reuse_equals_attention_with_recorded_maps(unet: UNet, monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    plan = replace(interval(CALLS, select(unet.sites), k=3), order=order)
    assert plan.grid == ".#.#.#"
    given = run(unet, plan, ReuseCache(torch.float32))
    recorded: list[dict[str, Tensor]] = []
    for call in range(CALLS):
        record = call % 2 == 0
        if record:
            recorded.append({})
        maps = recorded[-1]
        if order and not record and len(recorded) > 1:  # half of the way from one to the next further on
            maps = {address: maps[address] * 1.5 - recorded[-2][address] / 2 for address in maps}
        with monkeypatch.context() as patch:
            for module in unet.modules():
                if isinstance(module, Attention):
                    patch.setattr(module, "forward", reference_attention(maps, module, record))
            torch.testing.assert_close(given[call], unet(*inputs(call)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(given[-1], unet(*inputs(CALLS - 1)), atol=1e-3)  # reuse did change something


def test_output_reuse_equals_attention_with_recorded_outputs(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = hurry(CALLS, select(unet.sites, kind="out"), k=2)
    given = run(unet, plan, ReuseCache(torch.float32))
    recorded: dict[str, Tensor] = {}
    layers = [m for m in unet.modules() if isinstance(m, Attention)]
    hooks = [m.register_forward_hook(lambda m, _, y: recorded.update({m.address: y})) for m in layers]
    unet(*inputs(CALLS - 3))
    for hook in hooks:
        hook.remove()
    for module in layers:
        monkeypatch.setattr(module, "forward", lambda *_, address=module.address: recorded[address])
    torch.testing.assert_close(given[-1], unet(*inputs(CALLS - 1)), atol=1e-5, rtol=1e-5)


def count_runs(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each linear layer of each attention runs."""
    runs: Counter[str] = Counter()
    for name, module in unet.named_modules():
        if (".attn" in name and isinstance(module, nn.Linear)) or name.endswith(("norm1", "norm2")):
            original = module.forward

            def counted(x: Tensor, name: str = name, original: Callable[[Tensor], Tensor] = original) -> Tensor:
                runs[name] += 1
                return original(x)

            monkeypatch.setattr(module, "forward", counted)
    return runs


def test_reused_map_skips_query_key_and_softmax(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_runs(unet, monkeypatch)
    plan, cache = hurry(CALLS, select(unet.sites, "self"), k=2), ReuseCache()
    for call in range(CALLS):
        runs.clear()
        unet(*inputs(call), plan.step(call), cache)
        for name, times in {
            n: runs[n] for n, _ in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v"))
        }.items():
            skipped = call >= CALLS - 2 and "attn1" in name and not name.endswith("to_v")
            assert times == (0 if skipped else 1), (call, name)


def test_reused_output_skips_the_whole_layer_and_its_norm(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_runs(unet, monkeypatch)
    plan, cache = hurry(CALLS, select(unet.sites, kind="out"), k=1), ReuseCache()
    for call in range(CALLS):
        runs.clear()
        unet(*inputs(call), plan.step(call), cache)
    transformer_runs = {n: c for n, c in runs.items() if "transformer_blocks" in n and c}
    assert transformer_runs == {}


def test_cache_bytes_equal_the_formula_and_entries_die(unet: UNet) -> None:
    sites = select(unet.sites)
    plan, cache = hurry(CALLS, sites, k=2), ReuseCache(torch.float16)
    heads_of_level = TINY_UNET.heads
    expected = 0
    for site in sites:
        level = {"down_blocks.0": 0, "down_blocks.1": 1, "mid_block": 2, "up_blocks.1": 1, "up_blocks.2": 0}[
            site.address.split(".attentions")[0]
        ]
        tokens = (8 // 2**level) ** 2
        expected += 2 * heads_of_level[level] * tokens * (7 if site.is_cross else tokens) * 2  # 2B K N M, two bytes
    for call in range(CALLS):
        unet(*inputs(call), plan.step(call), cache)
        assert cache.nbytes == (expected if call in (CALLS - 3, CALLS - 2) else 0)
    assert cache.peak_nbytes == expected


def test_text_keys_and_values_computed_once_are_bit_identical(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, context = inputs(0)
    projected = unet.text_kv(context)
    assert set(projected.kv) == {s.address for s in unet.sites if s.is_cross}
    plan = interval(CALLS, select(unet.sites), k=3)
    caches = ReuseCache(), ReuseCache()
    for call in range(CALLS):
        x, t, context = inputs(call)
        given = unet(x, t, projected, plan.step(call), caches[0])
        assert torch.equal(given, unet(x, t, context, plan.step(call), caches[1]))
    runs = count_runs(unet, monkeypatch)
    unet(x, t, projected)
    assert {n.rsplit(".", 1)[1] for n, c in runs.items() if c and "attn2.to" in n} == {"to_q", "0"}  # 0: to_out.0


def test_two_caches_do_not_see_each_other(unet: UNet) -> None:
    plan = interval(CALLS, select(unet.sites), k=3)
    alone = run(unet, plan, ReuseCache())
    first, second = ReuseCache(), ReuseCache()
    together = []
    for call in range(CALLS):
        together.append(unet(*inputs(call), plan.step(call), first))
        unet(*(inputs(call + 50)), plan.step(call), second)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_misuse_is_an_error_not_a_wrong_image(unet: UNet) -> None:
    plan = hurry(CALLS, select(unet.sites), k=3)
    with pytest.raises(ValueError, match="no cache"):
        unet(*inputs(2), plan.step(2), None)
    with pytest.raises(CacheError, match="nothing is cached"):
        unet(*inputs(3), plan.step(3), ReuseCache())
    cache = ReuseCache()
    unet(*inputs(2), plan.step(2), cache)
    with pytest.raises(CacheError, match="shape"):
        unet(*inputs(3, batch=1), plan.step(3), cache)
    assert StepPlan() == PLAIN


def test_sites_are_modules_of_the_state_dict_with_their_depth(unet: UNet) -> None:
    names = {n.removesuffix(".to_q.weight") for n in unet.state_dict() if n.endswith(".to_q.weight")}
    for kind in ("map", "out"):
        assert {s.address for s in unet.sites if s.kind == kind} == names
    assert len(unet.sites) == len(set(unet.sites))
    # Three levels of two layers: going down conv_in is 0, then 1 2, a downsampler 3, 4 5 and 6, 7 8; then the middle.
    depth = {(s.address.split(".transformer")[0], s.kind): s.depth for s in unet.sites}
    assert depth["down_blocks.0.attentions.0", "map"] == 1
    assert depth["down_blocks.1.attentions.1", "out"] == 5
    assert depth["mid_block.attentions.0", "map"] == 9
    assert depth["up_blocks.2.attentions.2", "map"] == 0
    assert depth["up_blocks.1.attentions.0", "map"] == 5
    deep = {s.address: s.depth for s in unet.sites if s.kind == "deep"}
    assert list(deep) == [f"up_blocks.{b}" + (f".resnets.{i}" if i else "") for b in range(3) for i in range(3)]
    assert list(deep.values()) == [8, 7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("branch", [0, 1, 4, 8])
def test_deep_reuse_equals_a_unet_whose_inside_is_frozen(
    unet: UNet, monkeypatch: pytest.MonkeyPatch, branch: int, order: int
) -> None:
    """Freeze the output of all that lies deeper than the branch, and let the U-Net run in full."""
    (site,) = select(unet.sites, kind="deep", branch=branch)
    last = 1 + order  # the call that reuses
    plan = replace(hurry(last + 1, (site,), k=1), order=order)
    cache = ReuseCache(torch.float32)
    given = [unet(*inputs(call), plan.step(call), cache) for call in range(last + 1)][last]
    block, _, layer = site.address.removeprefix("up_blocks.").partition(".resnets.")
    entered = unet.up_blocks[int(block)].resnets[int(layer or 0)]
    frozen: list[Tensor] = []
    hook = entered.register_forward_pre_hook(lambda m, args: frozen.append(args[0]))
    for call in range(last):
        unet(*inputs(call))
    hook.remove()
    counts = ([1], [-1, 2], [1, -3, 3])[order]
    beyond = sum(count * tensor for count, tensor in zip(counts, frozen, strict=True))
    assert isinstance(beyond, Tensor)
    width = entered.norm1.num_channels
    original = entered.forward

    def forward(x: Tensor, time: Tensor) -> Tensor:
        inside = width - skip_width
        return original(torch.cat([beyond[:, :inside], x[:, inside:]], dim=1), time)

    skips = [32, 32, 32, 32, 64, 64, 64, 64, 64]  # what the down path leaves, by depth
    skip_width = skips[site.depth]
    monkeypatch.setattr(entered, "forward", forward)
    torch.testing.assert_close(given, unet(*inputs(last)), atol=1e-5, rtol=1e-5)
    assert cache.peak_nbytes == last * beyond[:, : width - skip_width].numel() * 4
    assert len(cache) == 0


def test_deep_reuse_runs_nothing_deeper(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_runs(unet, monkeypatch)
    plan, cache = hurry(2, (*select(unet.sites), *select(unet.sites, kind="deep", branch=2)), k=1), ReuseCache()
    unet(*inputs(0), plan.step(0), cache)
    # The maps that are deeper than the entry are never read, so they are not stored either.
    shallow = {s for s in select(unet.sites) if s.depth <= 2}
    assert {s for s in plan.step(0).store if s.kind == "map"} == shallow
    runs.clear()
    unet(*inputs(1), plan.step(1), cache)
    ran = {n.split(".transformer")[0] for n, c in runs.items() if c and "transformer" in n}
    assert ran == {s.address.split(".transformer")[0] for s in shallow}


def test_fused_attention_is_attention() -> None:
    q, k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 4)
    torch.testing.assert_close(fused_attention(q, k, v), explicit_attention(q, k, v)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept_in", DTYPES)
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_a_stored_map_is_a_float32_softmax_rounded_once_and_is_what_multiplies(
    kept_in: torch.dtype, computed_in: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kept.BLOCK_BYTES, "cpu", 4 * 33 * 12)  # several blocks to an image, the last one smaller
    q, k, v = (torch.randn(2, 3, n, 8).to(computed_in) for n in (40, 33, 33))
    held = new_map((2, 3, 40, 33), kept_in, "cpu")
    with torch.no_grad():
        y = storing_attention(q, k, v, held)
    probs = ((q * 8**-0.5) @ k.transpose(-1, -2)).softmax(-1, dtype=torch.float32).to(computed_in)
    # Blocks may be summed in another order: one last digit, of the map and of its products.
    digit = torch.finfo(computed_in).eps
    torch.testing.assert_close(y, probs @ v, atol=4 * digit, rtol=digit)
    expected = new_map(probs.shape, kept_in, "cpu")
    expected.fill(probs)
    tolerance = 0.02 if kept_in == torch.uint8 else digit
    torch.testing.assert_close(held.read(probs), expected.read(probs), atol=0, rtol=tolerance)


def test_gradients_pass_through_a_storing_call_and_not_into_the_cache() -> None:
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (40, 33, 33))
    held = new_map((2, 3, 40, 33), torch.float32, "cpu")
    wanted = torch.autograd.grad(fused_attention(q, k, v).square().sum(), (q, k, v))
    given = torch.autograd.grad(storing_attention(q, k, v, held).square().sum(), (q, k, v))
    torch.testing.assert_close(given, wanted)
    kept_map = held.read(v.detach())
    torch.testing.assert_close(kept_map, explicit_attention(q, k, v)[1].detach())
    assert not kept_map.requires_grad

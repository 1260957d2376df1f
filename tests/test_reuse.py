"""Plans, step plans and the cache, without a model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from minireuse.cache import CacheError, ReuseCache
from minireuse.plan import PLAIN, PlanError, ReusePlan, Site, StepPlan

A, B = Site("down.attn1", "map"), Site("down.attn2", "map")
A_OUT, B_OUT = Site("down.attn1", "out"), Site("down.attn2", "out")


def plan(*rows: str, sites: tuple[Site, ...] = (A,)) -> ReusePlan:
    """A plan drawn with one row per site."""
    return ReusePlan(np.array([[c == "#" for c in row] for row in rows]).T, sites)


def test_store_and_last_follow_from_the_mask() -> None:
    p = plan("..##.#..", "........", sites=(A, B))
    assert [A in p.step(i).reuse for i in range(8)] == [c == "#" for c in "..##.#.."]
    assert [A in p.step(i).store for i in range(8)] == [c == "#" for c in ".#..#..."]
    assert [A in p.step(i).last for i in range(8)] == [c == "#" for c in "...#.#.."]
    assert not any(B in p.step(i).reuse | p.step(i).store for i in range(8))


def test_output_reuse_shadows_the_map_of_the_same_attention() -> None:
    #                 call  0123456
    p = plan(*("..##.#.", ".##..##"), sites=(A, A_OUT))
    # Call 1: the layer does not run, so its map is not computed. Call 2: its map is not read although marked.
    # Call 3: the map of call 0 is read, the last that was computed. Call 4 computes a map that nobody reads.
    assert [A in p.step(i).store for i in range(7)] == [True, False, False, False, False, False, False]
    assert [A in p.step(i).reuse for i in range(7)] == [False, False, False, True, False, False, False]
    assert [A in p.step(i).last for i in range(7)] == [False, False, False, True, False, False, False]
    assert [A_OUT in p.step(i).store for i in range(7)] == [True, False, False, False, True, False, False]


def test_deep_reuse_shadows_what_lies_deeper() -> None:
    shallow, inner = Site("up.1.attn1", "map", depth=1), Site("mid.attn1", "map", depth=5)
    entry, lower = Site("up.1", "deep", depth=2), Site("up.0", "deep", depth=4)
    p = plan("..##", "..##", ".#.#", "...#", sites=(shallow, inner, entry, lower))
    assert [shallow in p.step(i).reuse for i in range(4)] == [False, False, True, True]
    # The entry skips the inner ones at calls 1 and 3, so the map read at call 2 is the one of call 0.
    assert [inner in p.step(i).reuse for i in range(4)] == [False, False, True, False]
    assert [inner in p.step(i).store for i in range(4)] == [True, False, False, False]
    assert [inner in p.step(i).last for i in range(4)] == [False, False, True, False]
    assert not any(lower in p.step(i).reuse | p.step(i).store for i in range(4))
    assert [entry in p.step(i).store for i in range(4)] == [True, False, True, False]


def test_order_1_keeps_the_last_two_values_as_long_as_a_line_needs_them() -> None:
    #        0 1 2 3 4 5 6 7   computed at 0, 1, 3, 6; the reader at 2 is the first that has two values to go by
    p = replace(plan("..#.##.#"), order=1)
    assert [A in p.step(i).store for i in range(8)] == [c == "#" for c in "##.#..#."]
    assert [dict(p.step(i).keep).get(A, 0) for i in range(8)] == [0, 1, 0, 1, 0, 0, 1, 0]
    assert [A in p.step(i).last for i in range(8)] == [c == "#" for c in ".......#"]
    weights = {i: dict(p.step(i).weights)[A] for i in range(8) if p.step(i).weights}
    assert weights == {2: (-1.0,), 4: (-0.5,), 5: (-1.0,), 7: (-1 / 3,)}  # of the value before

    # Call 1 reads all there is; what call 2 computes nobody reads with call 0's, so call 0's is dropped at call 1.
    p = replace(plan(".#..#"), order=1)
    assert [A in p.step(i).store for i in range(5)] == [c == "#" for c in "#.##."]
    assert [dict(p.step(i).keep).get(A, 0) for i in range(5)] == [0, 0, 0, 1, 0]
    assert [A in p.step(i).last for i in range(5)] == [c == "#" for c in ".#..#"]
    assert [dict(p.step(i).weights) for i in (1, 4)] == [{}, {A: (-1.0,)}]


def test_order_2_keeps_the_last_three_values_as_long_as_a_parabola_needs_them() -> None:
    #        0 1 2 3 4 5 6 7   computed at 0, 1, 3, 6; the first reader has two values to go by, the others three
    p = replace(plan("..#.##.#"), order=2)
    assert [A in p.step(i).store for i in range(8)] == [c == "#" for c in "##.#..#."]
    assert [dict(p.step(i).keep).get(A, 0) for i in range(8)] == [0, 1, 0, 2, 0, 0, 2, 0]
    assert [A in p.step(i).last for i in range(8)] == [c == "#" for c in ".......#"]
    assert dict(p.step(2).weights) == {A: (-1.0,)}
    # Newest first: (4 - 0)(4 - 3) / (1 - 0)(1 - 3) and (4 - 1)(4 - 3) / (0 - 1)(0 - 3).
    assert dict(p.step(4).weights)[A] == pytest.approx((-2, 1))
    assert dict(p.step(7).weights)[A] == pytest.approx((6 * 1 / (2 * -3), 4 * 1 / (-2 * -5)))

    # Only what call 5 will read is stored: not call 0's value, nor what call 1 read beside it.
    p = replace(plan(".....#"), order=2)
    assert [A in p.step(i).store for i in range(6)] == [c == "#" for c in "..###."]
    assert [dict(p.step(i).keep).get(A, 0) for i in range(6)] == [0, 0, 0, 1, 2, 0]
    # The value of call 0 is no part of the parabola, so it is dropped at call 1.
    p = replace(plan(".#....#"), order=2)
    assert [A in p.step(i).last for i in range(7)] == [c == "#" for c in ".#....#"]
    assert [dict(p.step(i).keep).get(A, 0) for i in range(7)] == [0, 0, 0, 0, 1, 2, 0]


@pytest.mark.parametrize("row", ["..#.##.#", "...#..#...#", "..#####.##..#", ".#.#.#.#.#"])
@pytest.mark.parametrize("site", [A, A_OUT])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("far", [False, True])
def test_a_polynomial_of_its_order_is_reused_without_error(row: str, site: Site, order: int, far: bool) -> None:
    """A value that is a polynomial of the call, or of its position, once as many were computed as determine it."""
    places = [1000.0 / (call + 1) ** 0.5 / 300 for call in range(len(row))] if far else list(range(len(row)))
    p = replace(plan(row, sites=(site,)), order=order, positions=tuple(places))
    coefficients, v = torch.rand(3, 2, 3, 5, 7), torch.rand(2, 3, 7, 4)
    cache, computed, most = ReuseCache(torch.float32), 0, 0
    nbytes = coefficients[0].numel() * 4
    for call in range(p.calls):
        step, x = p.step(call), places[call]
        value = sum(coefficients[i] * x**i for i in range(order + 1))
        assert isinstance(value, torch.Tensor)
        if site in step.reuse:
            kept = cache.load(site, value.shape, step, like=v)
            if computed > order:
                torch.testing.assert_close(kept.read(v), value, rtol=1e-4, atol=1e-4)
                if site.kind == "map":
                    product = torch.einsum("bknm,bkmd->bknd", value, v)
                    torch.testing.assert_close(kept.apply(v), product, rtol=1e-4, atol=1e-4)
        else:
            computed += 1
        if site in step.store:
            cache.store(site, value, step, torch.float32)
        most = max(most, cache.nbytes)
    assert most == cache.peak_nbytes == (order + 1) * nbytes
    assert (len(cache), cache.nbytes) == (0, 0)


def test_until_there_are_three_values_a_parabola_is_a_line_and_before_that_a_value() -> None:
    p = replace(plan(".#.#.#"), order=2)
    assert [len(dict(p.step(i).weights).get(A, ())) for i in (1, 3, 5)] == [0, 1, 2]


def test_a_line_is_not_drawn_across_the_end_of_guidance() -> None:
    guided = (True, True, True, True, False, False, False, False, False)
    p = ReusePlan(plan("..#.#.#.#").mask, (A,), guided, order=1)
    # Call 4, unguided, goes on along the conditional halves of calls 1 and 3; call 6 knows one unguided value only.
    assert [sorted(dict(p.step(i).weights).values()) for i in (2, 4, 6, 8)] == [[(-1.0,)], [(-0.5,)], [], [(-0.5,)]]
    assert [A in p.step(i).half for i in (2, 4, 6, 8)] == [False, True, False, False]
    cache, values = ReuseCache(torch.float32), {i: torch.full((4, 1, 1, 1), float(i * i)) for i in (0, 1, 3)}
    for call, value in values.items():
        value[2:] *= 10  # the conditional half
        cache.store(A, value, p.step(call), torch.float32)
    torch.testing.assert_close(
        cache.load(A, (2, 1, 1, 1), p.step(4), like=value).read(value), torch.full((2, 1, 1, 1), 130.0)
    )


def test_a_line_needs_two_values() -> None:
    p, value = replace(plan("..#"), order=1), torch.rand(2, 1, 3, 3)
    cache = ReuseCache()
    cache.store(A, value, p.step(1), torch.float32)
    with pytest.raises(CacheError, match=r"map of down\.attn1 is extrapolated from 2 values, but only 1 cached"):
        cache.load(A, value.shape, p.step(2), like=value)
    cache = ReuseCache()
    cache.store(A, value[:1], p.step(0), torch.float32)
    cache.store(A, value, p.step(1), torch.float32)
    with pytest.raises(CacheError, match=r"shape \(1, 1, 3, 3\) but read for \(2, 1, 3, 3\)"):
        cache.load(A, value.shape, p.step(2), like=value)


def test_a_plan_file_says_how_deep_sites_lie_and_an_old_one_learns_it_from_the_model() -> None:
    own = (Site("a", "deep", depth=3), Site("b", "map", depth=4))
    text = plan(".#", "..", sites=own).to_json()
    assert [s.depth for s in ReusePlan.from_json(text).sites] == [3, 4]
    old = {key: value for key, value in json.loads(text).items() if key != "depths"}
    assert [s.depth for s in ReusePlan.from_json(json.dumps(old), own).sites] == [3, 4]
    with pytest.raises(PlanError, match="does not say how deep 'a' lies; read it with the model's sites"):
        ReusePlan.from_json(json.dumps(old))
    for depths in ([3], {"a": -1}, {"a": "3"}, {"a": True}):
        with pytest.raises(PlanError, match="field depths is"):
            ReusePlan.from_json(json.dumps(old | {"depths": depths}))
    with pytest.raises(PlanError, match="map of b and 0 more"):
        ReusePlan.from_json(text).on(own[:1])


def test_what_a_column_of_the_matrix_means_call_by_call() -> None:
    """The example in `values_of`, against sets drawn by hand."""
    p = plan(".##..#")
    assert "".join("s" if A in p.step(i).store else "." for i in range(6)) == "s...s."
    assert "".join("r" if A in p.step(i).reuse else "." for i in range(6)) == ".rr..r"
    assert "".join("l" if A in p.step(i).last else "." for i in range(6)) == "..l..l"
    assert [p.step(i).call for i in range(6)] == [0, 1, 2, 3, 4, 5]


def test_plan_is_immutable_and_copies_its_mask() -> None:
    mask = np.zeros((3, 1), dtype=bool)
    p = ReusePlan(mask, (A,))
    mask[1] = True
    assert p.grid == "..."
    with pytest.raises(ValueError, match="read-only"):
        p.mask[1, 0] = True
    with pytest.raises(AttributeError):
        p.sites = ()  # type: ignore[misc]


def test_grid_and_str() -> None:
    assert str(plan("..##", "..##", sites=(A, B))) == "..##"
    p = plan("..##", "...#", sites=(A, B))
    assert p.grid is None
    assert str(p) == "..## map  down.attn1\n...# map  down.attn2"
    assert str(ReusePlan.nothing(5)) == "....."
    dropped = ReusePlan(plan("..##").mask, (A,), (True, True, True, False))
    assert str(dropped) == "..## map  down.attn1\n###. guided"
    assert p.calls == 4
    assert p.reused == 2
    assert str(replace(plan("..##"), order=1)) == "..##\nextrapolated from the last two values (order 1)"
    assert str(replace(plan("..##"), order=2)) == "..##\nextrapolated from the last three values (order 2)"


def test_union_takes_both_and_all_sites() -> None:
    joined = plan(".#..") | plan("..##", sites=(B,))
    assert joined == plan(".#..", "..##", sites=(A, B))
    assert joined != plan(".#..")
    assert plan(".#..") | ReusePlan.nothing(4) == plan(".#..")
    unguided = ReusePlan(np.zeros((4, 0), dtype=bool), (), (True, True, False, False))
    assert (plan(".#..") | unguided).guided == (True, True, False, False)
    lines = replace(plan(".#.."), order=1)
    assert (lines | lines).order == 1
    assert (lines | ReusePlan.nothing(4)) == lines == (ReusePlan.nothing(4) | lines)
    with pytest.raises(PlanError, match="order 0 and 1"):
        lines | plan(".#..")
    with pytest.raises(PlanError, match="4 and 3 calls"):
        plan(".#..") | plan(".#.")


def test_equality_ignores_order_and_idle_sites() -> None:
    assert plan(".#.", "..#", sites=(A, B)) == plan("..#", ".#.", sites=(B, A))
    assert plan(".#.", "...", sites=(A, B)) == plan(".#.")
    assert hash(plan(".#.", "...", sites=(A, B))) == hash(plan(".#."))
    assert plan(".#.") != ".#."
    assert plan(".#.") != replace(plan(".#."), order=1)
    assert plan("...") == replace(plan("..."), order=1)


def test_json_round_trip() -> None:
    p = plan("..##", ".#..", sites=(A, A_OUT))
    p = ReusePlan(p.mask, p.sites, (True, True, True, False))
    again = ReusePlan.from_json(p.to_json())
    assert again == p
    assert again.sites == p.sites
    assert '"down.attn1": "..##"' in p.to_json()
    lines = replace(p, order=1)
    assert ReusePlan.from_json(lines.to_json()) == lines != again
    assert '"order"' not in p.to_json()  # written only where it says something
    assert '"positions"' not in p.to_json()


def test_positions_change_the_curve_and_nothing_else() -> None:
    p = replace(plan("..#.#"), order=1)
    t = replace(p, positions=(900, 700, 600, 200.5, 0))
    assert dict(p.step(2).weights)[A] == pytest.approx((-1,))
    assert dict(t.step(2).weights)[A] == pytest.approx((-0.5,))
    assert all(replace(t.step(i), weights=frozenset()) == replace(p.step(i), weights=frozenset()) for i in range(5))
    assert t != p
    assert replace(t, order=0) == replace(p, order=0)
    assert ReusePlan.from_json(t.to_json()) == t
    assert (t | t | ReusePlan.nothing(5)).positions == t.positions
    with pytest.raises(PlanError, match="other positions cannot be combined"):
        t | p
    for wrong in ((0, 1, 2, 3), (0, 1, 2, 3, 3), (0, 1, 2, 3, float("nan"))):
        with pytest.raises(PlanError, match="expected 5 different numbers"):
            replace(p, positions=wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "minireuse-plan"),
        ('{"format": "minireuse-plan", "calls": "4", "sites": {}}', "calls"),
        ('{"format": "minireuse-plan", "calls": 4, "sites": []}', "sites"),
        ('{"format": "minireuse-plan", "calls": 4, "sites": {}, "site": {}}', "unknown field 'site'"),
        ('{"format": "minireuse-plan", "calls": 2, "sites": {"map": {"' + 500 * "a" + '": ".#"}}}', "path of a module"),
        ("[" * 100000, "nested too deeply"),
        ('{"format": "minireuse-plan", "calls": 4, "order": 3, "sites": {}}', "plan order is 3, expected 0"),
        ('{"format": "minireuse-plan", "calls": 2, "positions": [], "sites": {}}', "expected a list of 2 different"),
        ('{"format": "minireuse-plan", "calls": 2, "positions": {}, "sites": {}}', "expected a list of 2 different"),
        ('{"format": "minireuse-plan", "calls": 2, "positions": [[], 1], "sites": {}}', "expected 2 different numbers"),
        (
            '{"format": "minireuse-plan", "calls": 2, "positions": [1e999, 1], "sites": {}}',
            "expected 2 different numbers",
        ),
        ('{"format": "minireuse-plan", "calls": 4, "order": true, "sites": {}}', "plan order is True, expected 0"),
        ('{"format": "minireuse-plan", "calls": 4, "order": 1.0, "sites": {}}', r"plan order is 1\.0, expected 0"),
        ('{"format": "minireuse-plan", "calls": 4, "order": [], "sites": {}}', r"plan order is \[\], expected 0"),
        ('{"format": "minireuse-plan", "calls": 4, "sites": {"map": {"a": "..#"}}}', "4 characters"),
        ('{"format": "minireuse-plan", "calls": 4, "sites": {"map": {"a": "..x#"}}}', "4 characters"),
        ('{"format": "minireuse-plan", "calls": 4, "sites": {"maps": {"a": "...#"}}}', "kind"),
        ('{"format": "minireuse-plan", "calls": 2, "sites": {"map": {"a": "##"}}}', "call 0"),
    ],
)
def test_broken_plan_files_are_named(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ReusePlan.from_json(text)


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(PlanError, match="call 0"):
        plan("#..")
    with pytest.raises(PlanError, match="twice"):
        plan("..#", "..#", sites=(A, A))
    with pytest.raises(PlanError, match="shape"):
        ReusePlan(np.zeros((3, 2), dtype=bool), (A,))
    with pytest.raises(PlanError, match="guided"):
        ReusePlan(np.zeros((3, 1), dtype=bool), (A,), (True,))
    with pytest.raises(PlanError, match="25 U-Net calls but sampler plms makes 26"):
        ReusePlan.nothing(25).check_calls(26, "plms")


def stored(dtype: torch.dtype = torch.float16) -> tuple[ReuseCache, torch.Tensor]:
    cache, value = ReuseCache(dtype), torch.rand(2, 4, 8, 8)
    cache.store(A, value, PLAIN, torch.float32)
    return cache, value


def test_cache_counts_bytes_and_forgets_after_the_last_read() -> None:
    cache, value = stored()
    assert cache.nbytes == cache.peak_nbytes == 2 * 4 * 8 * 8 * 2
    cache.store(B, value, PLAIN, torch.float32)
    assert cache.nbytes == 2 * 2 * 4 * 8 * 8 * 2
    middle = cache.load(A, value.shape, StepPlan(reuse=frozenset({A})), like=value).read(value)
    torch.testing.assert_close(middle, value, atol=1e-3, rtol=0)
    assert middle.dtype == torch.float32
    cache.load(A, value.shape, StepPlan(reuse=frozenset({A}), last=frozenset({A})), like=value)
    assert len(cache) == 1
    assert cache.peak_nbytes == 2 * cache.nbytes
    cache.clear()
    assert (cache.nbytes, len(cache)) == (0, 0)


def test_where_guidance_ends_the_cache_gives_the_conditional_half_or_the_mean() -> None:
    p = plan("..####", "....##", sites=(A, A_OUT))
    p = ReusePlan(p.mask, p.sites, (True, True, True, True, False, False))
    assert not any(A in p.step(i).half for i in range(6))  # shadowed where the output is reused
    p = ReusePlan(plan("..####").mask, (A,), p.guided)
    assert [A in p.step(i).half for i in range(6)] == [False] * 4 + [True] * 2
    cache, value = ReuseCache(torch.float32), torch.rand(4, 2, 3, 3)
    cache.store(A, value, p.step(1), torch.float32)
    torch.testing.assert_close(cache.load(A, (4, 2, 3, 3), p.step(3), like=value).read(value), value)
    torch.testing.assert_close(cache.load(A, (2, 2, 3, 3), p.step(4), like=value).read(value), value[2:])

    for site, expected in ((A_OUT, value[2:]), (B_OUT, (value[:2] + value[2:]) / 2)):  # the mean for cross attention
        p = ReusePlan(plan(".##", sites=(site,)).mask, (site,), (True, False, False))
        cache.store(site, value, p.step(0), torch.float32)
        torch.testing.assert_close(cache.load(site, (2, 2, 3, 3), p.step(1), like=value).read(value), expected)

    backwards = ReusePlan(plan(".#").mask, (A,), (False, True))
    with pytest.raises(PlanError, match="unguided call 0"):
        backwards.step(0)


def test_cache_keeps_its_own_copy() -> None:
    cache, value = stored(torch.float32)
    kept = value.clone()
    value.zero_()
    torch.testing.assert_close(cache.load(A, kept.shape, PLAIN, like=kept).read(kept), kept)


@pytest.mark.parametrize(
    ("shape", "step", "like", "message"),
    [
        ((1, 4, 8, 8), PLAIN, torch.float32, "shape"),
        ((2, 4, 8, 9), PLAIN, torch.float32, "shape"),
        ((2, 4, 8, 8), StepPlan(guided=False), torch.float32, "guidance"),
        ((2, 4, 8, 8), PLAIN, torch.float16, "dtype"),
    ],
)
def test_cache_refuses_another_runs_tensors(
    shape: tuple[int, ...], step: StepPlan, like: torch.dtype, message: str
) -> None:
    cache, _ = stored()
    with pytest.raises(CacheError, match=message):
        cache.load(A, shape, step, like=torch.zeros(1, dtype=like))
    with pytest.raises(CacheError, match="nothing is cached"):
        cache.load(B, shape, step, like=torch.zeros(1, dtype=like))


def test_cache_dtype_must_be_floating() -> None:
    with pytest.raises(ValueError, match="cache dtype"):
        ReuseCache(torch.int64)

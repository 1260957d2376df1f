"""The search on made-up landscapes, and the renderer's shared beginnings against rendering from noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import minireuse
from minireuse.common.journal import Journal
from minireuse.common.metrics import psnr
from minireuse.plan import PlanError, ReusePlan, Site
from minireuse.policies import early, hurry, interval, select, tgate
from minireuse.search import Renderer, Rounds, improve, search
from minireuse.search.render import refill

A = Site("x.attn1", "map")
WEIGHTS = np.array([0, 5, 1, 4, 2, 9, 3, 8])


def total(plan: ReusePlan) -> float:
    """A landscape without local optima: the best plan of k calls takes the k largest weights."""
    return float((plan.mask[:, 0] * WEIGHTS).sum())


@pytest.mark.parametrize("steepest", [False, True])
@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_search_finds_the_optimum_of_a_smooth_landscape(k: int, steepest: bool) -> None:
    best = max(sum(WEIGHTS[list(chosen)]) for chosen in itertools.combinations(range(1, 8), k))
    result = search(lambda plan: plan, hurry(8, [A], k=k), [A], k=k, score=total, how=Rounds(first=not steepest))
    assert result.score == best == total(result.plan)
    assert result.finished
    assert result.plan.reused == k
    assert result.start_score == total(hurry(8, [A], k=k))
    assert len({grid for grid, _ in result.tried}) == len(result.tried)


def test_a_heat_on_few_prompts_chooses_what_is_scored_on_all() -> None:
    """Prompt 0 alone likes late calls; all prompts together like the weights."""
    asked: list[tuple[int, Sequence[int] | None]] = []

    def score_many(plans: Sequence[ReusePlan], prompts: Sequence[int] | None) -> Iterator[float]:
        asked.append((len(plans), prompts))
        for plan in plans:
            yield total(plan) if prompts is None else float(plan.mask[:, 0] @ np.arange(8))

    how = Rounds(heat=(0,), finalists=2)
    result = improve(score_many, hurry(8, [A], k=1), [A], k=1, how=how)
    assert asked[:3] == [(1, None), (6, (0,)), (2, None)]
    # Of the moves away from call 7 the heat lets those to 6 and 5 through, and the weights prefer 5.
    assert (str(result.plan), result.score, result.finished) == (".....#..", 9.0, True)
    assert {grid for grid, _ in result.tried} == {".......#", "......#.", ".....#.."}


def test_a_heat_that_the_budget_cuts_short_is_no_end() -> None:
    def score_many(plans: Sequence[ReusePlan], prompts: Sequence[int] | None) -> Iterator[float]:
        yield from itertools.islice(map(total, plans), 3 if prompts else None)

    result = improve(score_many, hurry(8, [A], k=2), [A], k=2, how=Rounds(heat=(0,), finalists=1))
    assert not result.finished


def test_a_move_has_to_gain_more_than_epsilon() -> None:
    start = ReusePlan.stepwise([call in (3, 7) for call in range(8)], [A])  # 4 + 8; the best is 9 + 8
    for epsilon, best in ((0.0, 17.0), (4.9, 17.0), (5.0, 12.0)):
        result = search(lambda plan: plan, start, [A], k=2, score=total, how=Rounds(epsilon=epsilon))
        assert result.score == best


def test_search_stops_at_a_local_optimum_of_single_swaps() -> None:
    """Two calls that are only good together cannot be reached by moving one."""
    trap = {"..##": 1.0, ".##.": 2.0}
    result = search(lambda plan: plan.grid, hurry(4, [A], k=2), [A], k=2, score=lambda g: trap.get(g, 0.0))
    assert (str(result.plan), result.score) == (".##.", 2.0)
    deceptive = {"...###": 1.0, ".##..#": 9.0}
    result = search(lambda plan: plan.grid, hurry(6, [A], k=3), [A], k=3, score=lambda g: deceptive.get(g, 0.0))
    assert (str(result.plan), result.rounds) == ("...###", 1)


def test_search_keeps_the_best_when_the_budget_ends() -> None:
    left = iter([True] * 4)
    result = search(lambda plan: plan, hurry(8, [A], k=3), [A], k=3, score=total, more=lambda: next(left, False))
    assert not result.finished
    assert len(result.tried) == 4
    assert result.score == max(value for _, value in result.tried)
    with pytest.raises(PlanError, match="budget"):
        search(lambda plan: plan, hurry(8, [A], k=3), [A], k=3, score=total, more=lambda: False)


def test_search_refuses_a_start_that_does_not_fit() -> None:
    with pytest.raises(PlanError, match="3 reuse calls, expected k = 4"):
        search(lambda plan: plan, hurry(8, [A], k=3), [A], k=4, score=total)
    by_site = hurry(4, [A], k=1) | hurry(4, [Site("y", "map")], k=2)
    with pytest.raises(PlanError, match="step-wise"):
        search(lambda plan: plan, by_site, [A], k=2, score=total)
    with pytest.raises(PlanError, match="agree within each group"):
        search(lambda plan: plan, by_site, [A], k=None, score=total, groups=[[A]])
    with pytest.raises(PlanError, match="scored nan"):
        search(lambda plan: plan, hurry(8, [A], k=3), [A], k=3, score=lambda _: math.nan)


def test_search_begins_at_the_best_of_several_plans() -> None:
    deceptive = {"...###": 1.0, ".##..#": 9.0, ".##.#.": 3.0}
    plans = [ReusePlan.stepwise([cell == "#" for cell in grid], [A]) for grid in deceptive]
    score = lambda grid: deceptive.get(grid, 0.0)  # noqa: E731
    result = search(lambda plan: plan.grid, plans[0], [A], k=3, score=score, others=plans[1:])
    assert (str(result.plan), result.start_score) == (".##..#", 9.0)
    assert [grid for grid, _ in result.tried][:3] == list(deceptive)
    left = iter([True])
    cut = search(
        lambda plan: plan.grid,
        plans[0],
        [A],
        k=3,
        score=score,
        others=plans[1:],
        allowed=lambda plan: False,
        more=lambda: next(left, False),
    )
    assert (cut.plan, cut.finished) == (plans[0], False)
    twice = search(lambda plan: plan.grid, plans[0], [A], k=3, score=score, others=[plans[0], plans[2], plans[1]])
    assert (str(twice.plan), [grid for grid, _ in twice.tried][:3]) == (".##..#", ["...###", ".##.#.", ".##..#"])
    with pytest.raises(PlanError, match="differ in order or guidance"):
        search(lambda plan: plan.grid, plans[0], [A], k=3, score=score, others=[replace(plans[1], order=1)])
    with pytest.raises(PlanError, match="2 reuse calls, expected k = 3"):
        search(lambda plan: plan.grid, plans[0], [A], k=3, score=score, others=[hurry(6, [A], k=2)])


def test_search_tries_only_what_is_allowed() -> None:
    result = search(
        lambda plan: plan, hurry(8, [A], k=3), [A], k=3, score=total, allowed=lambda plan: not plan.mask[1].any()
    )
    assert str(result.plan) == "...#.#.#"  # the largest weights but that of call 1: 4, 9, 8
    assert all(grid[1] == "." for grid, _ in result.tried)


def test_the_algorithm_asks_one_callable_and_no_more_than_it_needs() -> None:
    """Scores may come lazily, and may end early; of prompts the algorithm wants all."""
    asked: list[str] = []

    def score_many(plans: Sequence[ReusePlan], prompts: Sequence[int] | None) -> Iterator[float]:
        assert prompts is None
        for plan in plans:
            if len(asked) == 5:
                return  # the budget is spent
            asked.append(str(plan))
            yield total(plan)

    first = improve(score_many, hurry(8, [A], k=1), [A], k=1, how=Rounds(first=True))
    # The start at call 7 has weight 8; call 6 has 3; call 5 has 9, which improves, so no other move is scored then.
    assert asked == [".......#", "......#.", ".....#..", "......#.", "....#..."]
    assert (str(first.plan), first.score, first.start_score, first.finished) == (".....#..", 9.0, 8.0, False)
    assert first.tried == ((".......#", 8.0), ("......#.", 3.0), (".....#..", 9.0), ("....#...", 2.0))


class Killed(Exception):
    pass


def test_a_journal_cut_off_at_its_very_beginning_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, {"steps": 3}).add("a", 1)
    whole = path.read_bytes()
    for length in range(1, whole.index(b"\n") + 1):
        path.write_bytes(whole[:length])
        Journal(path, {"steps": 3}).add("a", 1)
        assert path.read_bytes() == whole
    path.write_bytes(b"notes of mine")
    with pytest.raises(ValueError, match="not a journal"):
        Journal(path, {"steps": 3})
    assert path.read_bytes() == b"notes of mine"


def test_a_killed_search_resumes_to_the_same_answer(tmp_path: Path) -> None:
    def run(path: Path, die_after: int | None) -> tuple[str, float, int]:
        renders = 0

        def render(plan: ReusePlan) -> ReusePlan:
            nonlocal renders
            renders += 1
            if renders == die_after:
                raise Killed
            return plan

        journal = Journal(path, {"k": 3})
        result = search(render, hurry(8, [A], k=3), [A], k=3, score=total, journal=journal)
        return str(result.plan), result.score, renders

    plan, score, renders = run(tmp_path / "whole.jsonl", None)
    path = tmp_path / "killed.jsonl"
    spent = 0
    for die_after in (1, 2, 4, 3):
        with pytest.raises(Killed):
            run(path, die_after)
        spent += die_after - 1
        with path.open("a") as file:
            file.write('{"key": ".##')  # what a kill in the middle of a write leaves
    assert run(path, None) == (plan, score, renders - spent)


def test_journal_refuses_another_search_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path, {"k": 3}).add("..#", 1.5)
    assert Journal(path, {"k": 3}).records == {"..#": 1.5}
    with pytest.raises(ValueError, match="a run with other settings"):
        Journal(path, {"k": 4})
    path.write_text('{"settings": {"k": 3}}\n{"key": 7}\n')
    with pytest.raises(ValueError, match="line 2"):
        Journal(path, {"k": 3})
    plan_file = tmp_path / "plan.json"
    for text in ("not json\n", hurry(3, [A], k=1).to_json() + "\n"):
        plan_file.write_text(text)
        with pytest.raises(ValueError, match="not a journal"):
            Journal(plan_file, {"k": 3})
        assert plan_file.read_text() == text  # what was not ours is left as it was


def test_refill_names_the_calls_that_stored_what_is_still_read() -> None:
    def plan(row: str) -> ReusePlan:
        return ReusePlan.stepwise([c == "#" for c in row], [A])

    assert refill(plan("..####"), 4) == {1}
    assert refill(plan("..##.#"), 4) == set()
    assert refill(plan("..##.#"), 5) == {4}
    assert refill(plan("......"), 3) == set()
    # Site B is stored at call 3, where it was computed from what A had kept since call 1.
    b = Site("y.attn1", "map")
    both = plan("..####") | ReusePlan.stepwise([c == "#" for c in "....##"], [b])
    assert refill(both, 5) == {1, 3}
    # Of order 1: the last two values that were computed, not all those that were kept one beside the other.
    assert refill(replace(plan(".#.#.#.#"), order=1), 7) == {4, 6}
    assert refill(replace(plan(".#.#.#.#"), order=1), 3) == {0, 2}
    assert refill(replace(plan("..##.#"), order=1), 4) == {1}  # beside what call 4 will compute
    assert refill(replace(plan(".#.#.#.#"), order=2), 7) == {2, 4, 6}
    assert refill(replace(plan("..##.#"), order=2), 4) == {0, 1}


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [
        ("ddim", "map"),
        ("ddim", "out"),
        ("plms", "deep"),
        ("dpmpp_2m", "map"),
        ("dpm_solver_3", "out"),
        ("euler_a", "deep"),
    ],
)
def test_shared_beginnings_change_no_bit(pipeline: minireuse.Pipeline, sampler: str, kind: str) -> None:
    prompts, seeds = ["a red house", "a lake"], [0, 1]
    render = Renderer(pipeline, prompts, seeds, sampler=sampler, steps=6)
    calls = pipeline.calls(sampler, 6)
    sites = select(pipeline.sites, kind=kind)
    first = hurry(calls, sites, k=3)
    swapped = list(first.mask[:, 0])
    swapped[-1], swapped[2] = False, True
    plans = [ReusePlan.nothing(calls), first, ReusePlan.stepwise(swapped, sites), interval(calls, sites, k=2)]
    plans += [first | early(calls, select(pipeline.sites, "cross", "out"), k=1), first | tgate(calls, pipeline.sites)]
    # Guidance that comes back: the same sites reused and stored, from another half.
    outs = select(pipeline.sites, "cross", "out")
    guided = (True, False, *[True] * (calls - 2))
    plans += [ReusePlan.stepwise([i in at for i in range(calls)], outs) for at in ((1,), (1, 2))]
    plans[-2:] = [replace(plan, guided=guided) for plan in plans[-2:]]
    plans += [
        replace(plan, order=order)
        for order in (1, 2)
        for plan in (interval(calls, sites, k=calls // 2), plans[2], first, plans[-1])
    ]
    plans += [first]
    for plan in plans:
        made = render.calls
        naive = pipeline.generate(prompts, seeds=seeds, steps=6, sampler=sampler, plan=plan)
        assert np.array_equal(render(plan), naive.images)
    assert render.calls == made  # the last plan was known from end to end
    assert render.naive_calls == len(plans) * calls
    assert render.calls < 0.9 * render.naive_calls


def test_some_of_the_prompts_are_rendered_as_if_there_were_no_others(pipeline: minireuse.Pipeline) -> None:
    prompts, seeds, plan = ["a red house", "a lake", "an oak"], [3, 4, 5], hurry(4, select(pipeline.sites), k=2)
    render = Renderer(pipeline, prompts, seeds, steps=4)
    whole = render(plan)
    part = render(plan, [2, 0])
    assert np.array_equal(part, pipeline.generate(["an oak", "a red house"], seeds=[5, 3], steps=4, plan=plan).images)
    assert render.calls == 8  # whole batches and parts of them share nothing, so that each stays exact
    assert np.array_equal(render(plan, [2, 0]), part)
    assert np.array_equal(render(plan), whole)
    assert render.calls == 8


def test_psnr_against_the_definition() -> None:
    black, gray = np.zeros((2, 4, 4, 3), dtype=np.uint8), np.full((2, 4, 4, 3), 51, dtype=np.uint8)
    np.testing.assert_allclose(psnr(black, gray), [20 * np.log10(5)] * 2)
    assert np.isinf(psnr(gray, gray)).all()
    with pytest.raises(ValueError, match="must agree"):
        psnr(black, gray[:1])


def test_little_memory_changes_no_bit_either(pipeline: minireuse.Pipeline) -> None:
    plans = [hurry(4, select(pipeline.sites), k=k) for k in (2, 1, 3, 2, 0, 2)]
    large, small = (Renderer(pipeline, ["a lake"], [0], steps=4, memory=m) for m in (2**29, 0))
    for plan in plans:
        np.testing.assert_array_equal(small(plan), large(plan))
    assert large.calls < small.calls < small.naive_calls

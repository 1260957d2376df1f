"""Scores of plans: each is rendered once, by one process or by several in turn, and remembered."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minireuse.common.journal import Journal
from minireuse.plan import PlanError, ReusePlan, Site
from minireuse.policies import hurry
from minireuse.search import Scoring

A, B = Site("x.attn1", "map"), Site("y.attn1", "out")
PLANS = [hurry(5, [A], k=k) for k in (1, 2, 3, 4)]


def reused(plan: ReusePlan, prompts: Sequence[int] | None = None) -> float:
    """A score that can be told from the plan, and from the prompts that count."""
    return plan.reused + 0.1 * len(prompts or ())


def test_each_plan_is_rendered_once_and_only_when_its_score_is_asked_for() -> None:
    rendered: list[ReusePlan] = []
    tried: list[tuple[str, float]] = []
    scores = Scoring(
        lambda plan: rendered.append(plan) or plan,
        reused,
        [[A]],
        on_try=lambda plan, value, whole: tried.append((str(plan), value)),
    )
    asked = scores([PLANS[0], PLANS[1], PLANS[0], PLANS[2]])
    assert rendered == []
    assert (next(asked), next(asked), next(asked)) == (1, 2, 1)
    assert rendered == PLANS[:2]
    assert list(scores(PLANS)) == [1, 2, 3, 4]
    assert rendered == PLANS
    assert tried[:4] == [("....#", 1), ("...##", 2), ("....#", 1), ("....#", 1)]


def test_the_journal_names_a_plan_by_a_row_for_each_group(tmp_path: Path) -> None:
    """These names stand in journals of the first release, which go on being read."""
    plan = hurry(4, [A], k=1) | hurry(4, [B], k=2)
    journal = Journal(tmp_path / "journal.jsonl", {})
    scores = Scoring(lambda plan, prompts=None: plan, reused, [[B], [A]], journal=journal)
    assert list(scores([plan, hurry(4, [A], k=3)])) == [2, 3]
    assert list(scores([plan], [0, 2])) == [2.2]
    assert journal.records == {"..##/...#": 2, "..../.###": 3, "..##/...# on 0,2": 2.2}
    assert list(scores([plan], None)) == [2]  # scores on some prompts and on all are not mixed up

    def render(plan: ReusePlan) -> None:
        raise AssertionError("it is known")

    again = Scoring(render, reused, [[B], [A]], journal=Journal(tmp_path / "journal.jsonl", {}))
    assert list(again([plan])) == [2]


def test_scores_end_with_the_budget_but_known_ones_cost_nothing() -> None:
    left = iter([True, True])
    scores = Scoring(lambda plan: plan, reused, [[A]], more=lambda: next(left, False))
    assert list(scores(PLANS)) == [1, 2]
    assert list(scores([PLANS[1], PLANS[0], PLANS[3], PLANS[1]])) == [2, 1]


def test_what_cannot_be_scored_is_named() -> None:
    with pytest.raises(PlanError, match=r"plan \.\.\.## scored nan"):
        list(Scoring(lambda plan: plan, lambda plan: math.nan, [[A]])([PLANS[1]]))
    with pytest.raises(PlanError, match="agree within each group"):
        list(Scoring(lambda plan: plan, reused, [[A, B]])([PLANS[1]]))


class Threads:
    """Two ranks in one process: a barrier is what makes them wait for each other."""

    values: list[Any] = [None, None]  # noqa: RUF012
    barrier = threading.Barrier(2, timeout=10)
    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


def test_two_ranks_share_the_work_and_know_the_same(tmp_path: Path) -> None:
    rendered: list[list[ReusePlan]] = [[], []]
    found: list[list[float]] = [[], []]
    journals = [Journal(tmp_path / "journal.jsonl", {}), Journal()]
    journals[0].add("...##", 2)  # the first rank's journal counts for both

    def work(rank: int) -> None:
        scores = Scoring(
            lambda plan: rendered[rank].append(plan) or plan,
            reused,
            [[A]],
            journal=journals[rank],
            more=lambda: len(rendered[1]) < 1,  # the second rank has time for one plan
            ranks=Threads(rank),  # type: ignore[arg-type]
        )
        found[rank] += scores([*PLANS, hurry(5, [A], k=0)])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rendered == [[PLANS[0]], [PLANS[2]]]
    assert found == [[1, 2, 3], [1, 2, 3]]  # the budget of one is the budget of both
    assert journals[0].records == journals[1].records | {"...##": 2} == {"....#": 1, "...##": 2, "..###": 3}

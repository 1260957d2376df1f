"""Works that are timed alternate, and are compared round by round."""

from __future__ import annotations

import time

import pytest

from minireuse.common.timing import alternate, median_ratio, ratios, seconds_of


def test_works_alternate_and_the_first_round_only_warms_up() -> None:
    done: list[str] = []
    works = {name: lambda name=name: done.append(name) or len(done) for name in ("full", "plan")}
    assert alternate(works, rounds=2) == {"full": [3, 5], "plan": [4, 6]}
    assert done == ["full", "plan"] * 3
    assert alternate(works, rounds=1, warmup=0) == {"full": [7], "plan": [8]}
    assert alternate(works, rounds=0, warmup=0) == {"full": [], "plan": []}
    assert alternate({}, rounds=3) == {}


def test_seconds_are_those_between_two_synchronizations() -> None:
    order: list[str] = []
    taken = seconds_of(lambda: (order.append("work"), time.sleep(0.02)), lambda: order.append("wait"))
    assert order == ["wait", "work", "wait"]
    assert taken >= 0.02


def test_a_machine_that_slows_down_for_both_changes_no_ratio() -> None:
    assert ratios([1.0, 10.0, 3.0], [2.0, 20.0, 3.0]) == [0.5, 0.5, 1.0]
    assert median_ratio([1.0, 10.0, 3.0], [2.0, 20.0, 3.0]) == 0.5
    assert median_ratio([1.0, 3.0], [1.0, 1.0]) == 2.0
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])

"""The thresholds of the reproduction on made data: each claim can come out either way, or unclear."""

from __future__ import annotations

from typing import Any

import pytest

import verdicts

UP, DOWN, BOTH = (0.5, 1.5), (-1.5, -0.5), (-0.5, 0.5)  # intervals of a gain
PSNR = {"hurry": 30.0, "early": 20.0, "interval": 25.0}


@pytest.mark.parametrize(
    ("judge", "holds", "fails", "unclear"),
    [
        (verdicts.redundant, (0.95, 0.2), (0.4, 0.2), (0.95, 0.7)),
        (verdicts.falls, (-0.9,), (0.1,), (-0.5,)),
        (verdicts.grows, ([UP, UP],), ([DOWN, DOWN],), ([UP, DOWN],)),
        (verdicts.late_is_best, (0.95, PSNR), (0.3, PSNR), (0.95, PSNR | {"interval": 31.0})),
        (verdicts.carries_over, ([UP, UP],), ([DOWN, BOTH],), ([UP, BOTH],)),
        (verdicts.small_caches_do, ([60.0, 50.0],), ([60.0, 20.0],), ([60.0, 40.0],)),
        (verdicts.above, ([UP, UP],), ([UP, DOWN],), ([UP, BOTH],)),
        (verdicts.keeps_to_prompts, ([(-0.01, 0.02)],), ([(0.04, 0.06)],), ([(-0.01, 0.05)],)),
    ],
)
def test_each_claim_can_hold_fail_and_stay_unclear(
    judge: Any, holds: tuple[Any, ...], fails: tuple[Any, ...], unclear: tuple[Any, ...]
) -> None:
    assert [judge(*given) for given in (holds, fails, unclear)] == ["holds", "does not hold", "unclear"]


def test_nothing_is_above_what_it_cannot_be_compared_with() -> None:
    assert verdicts.above([UP], comparable=False) == "unclear"
    assert verdicts.above([]) == "unclear"
    assert verdicts.keeps_to_prompts([]) == "unclear"

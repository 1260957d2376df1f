"""Times on a machine that is not quiet: works alternate, and what is compared are ratios within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

K = TypeVar("K")
T = TypeVar("T")


def alternate(works: Mapping[K, Callable[[], T]], rounds: int, warmup: int = 1) -> dict[K, list[T]]:
    """What each work measures, in every round one after the other, so that a disturbance meets neighbours alike.

    works: each returns what it has measured, such as its seconds by `seconds_of`. warmup: rounds before the first that
    counts.
    """
    found: dict[K, list[T]] = {name: [] for name in works}
    for i in range(warmup + rounds):
        for name, work in works.items():
            value = work()
            if i >= warmup:
                found[name].append(value)
    return found


def seconds_of(work: Callable[[], object], synchronize: Callable[[], object] = lambda: None) -> float:
    """The seconds a work takes. synchronize: waits until the device has done what it was given."""
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """The ratio of two times in each round."""
    return [a / b for a, b in zip(times, others, strict=True)]


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios: one bad round does not count, nor does a machine that slows down for both."""
    return statistics.median(ratios(times, others))

"""The processes that share a work: those that torchrun started together, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minireuse.common.status import exit_status


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size`. All of them must call `gather` alike, or they wait for each other forever."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def device(self, name: str) -> str:
        """A GPU of its own for each process of a machine, where the device is left to choose."""
        if self.size > 1 and name == "auto" and torch.cuda.is_available():
            return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"
        return name


ALONE = Ranks()


@contextmanager
def started() -> Iterator[Ranks]:
    """Join the processes that torchrun started; alone, do nothing. What they exchange are scores: gloo will do."""
    if "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=timedelta(days=7))  # one candidate of a large model takes its time
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def shared_status(work: Callable[[Ranks], object]) -> int:
    """The exit status of a work with a journal, which the processes share."""

    def joined() -> None:
        with started() as ranks:
            work(ranks)

    return exit_status(joined, "interrupted; the same command goes on from the journal")

"""PHAST: a local search for a better plan, around HURRY, with the number of reuse calls unchanged.

The search knows neither a model nor a sampler. It asks a `render` callable for what a plan produces and a `score`
callable how good that is; which work two plans share is the renderer's affair.

Source: arXiv 2401.01008 for the method; the neighbourhood, order and stopping rule are this project's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minireuse.reuse import PlanError, ReusePlan, Site


@dataclass(frozen=True)
class SearchResult:
    """The best plan found, its score, the start's score, and every plan that was tried, in order."""

    plan: ReusePlan
    score: float
    start_score: float
    rounds: int
    finished: bool  # False where the budget ended the search before a local optimum was reached
    tried: tuple[tuple[str, float], ...] = field(repr=False)


def search(
    render: Callable[[ReusePlan], Any],
    plan: ReusePlan,
    sites: Iterable[Site],
    *,
    k: int,
    score: Callable[[Any], float],
    journal: Journal | None = None,
    steepest: bool = True,
    more: Callable[[], bool] = lambda: True,
    on_try: Callable[[ReusePlan, float, float], object] = lambda plan, value, best: None,
) -> SearchResult:
    """Improve a step-wise plan by moving one reuse call at a time, until no move improves the score.

    plan: where to start, with k reuse calls; HURRY is the method's choice. sites: what reuses at those calls.
    score: of what `render` gave; larger is better.
    steepest: try every move and take the best, as the method says; False takes the first that improves.
    more: asked before each try; False ends the search.
    on_try: told each plan, its score and the best score so far.
    journal: scores of plans tried before, so that an interrupted search goes on where it was.

    Raises: PlanError where the start is not step-wise or does not have k reuse calls.
    """
    sites = tuple(sites)
    row = _row(plan, k)
    journal = Journal() if journal is None else journal
    tried: dict[str, float] = {}

    def made(row: tuple[bool, ...]) -> ReusePlan:
        return ReusePlan(ReusePlan.stepwise(row, sites).mask, sites, plan.guided)

    def value(row: tuple[bool, ...]) -> float | None:
        candidate = made(row)
        grid = candidate.grid
        assert grid is not None
        if grid not in tried:
            known = journal.get(grid)
            if known is None:
                if not more():
                    return None
                known = score(render(candidate))
                journal.add(grid, known)
            tried[grid] = known
            on_try(candidate, known, max(tried.values()))
        return tried[grid]

    best = start = value(row)
    if start is None or best is None:
        raise PlanError("the search budget does not even cover the start; give a larger one")
    rounds, finished = 0, False
    while not finished:
        rounds += 1
        winner, finished = row, True
        for candidate in _moves(row):
            given = value(candidate)
            if given is None:
                return SearchResult(made(winner), best, start, rounds, False, tuple(tried.items()))
            if given > best:
                winner, best, finished = candidate, given, False
                if not steepest:
                    break
        row = winner
    return SearchResult(made(row), best, start, rounds, True, tuple(tried.items()))


def _row(plan: ReusePlan, k: int) -> tuple[bool, ...]:
    if plan.grid is None:
        raise PlanError("the search starts from a step-wise plan; this one differs by site")
    row = tuple(cell == "#" for cell in plan.grid)
    if sum(row) != k:
        raise PlanError(f"the plan to start from has {sum(row)} reuse calls, expected k = {k}")
    return row


def _moves(row: tuple[bool, ...]) -> Iterator[tuple[bool, ...]]:
    """Every exchange of a reuse call with a computing one, never call 0; short moves first, late ones before early.

    Late calls share the longest prefix with what was rendered before, so they are the cheapest to try.
    """
    reusing = [i for i, cell in enumerate(row) if cell]
    computing = [i for i, cell in enumerate(row) if not cell and i > 0]
    pairs = [(abs(a - b), -min(a, b), a, b) for a in reusing for b in computing]
    for _, _, a, b in sorted(pairs):
        yield tuple((cell or i == b) and i != a for i, cell in enumerate(row))


class Journal:
    """Scores by plan, appended to a file as they come: JSON lines, the first of which names what was searched.

    A line that a kill left unfinished is dropped, at the cost of one try.
    """

    def __init__(self, path: Path | None = None, settings: dict[str, Any] | None = None) -> None:
        self._scores: dict[str, float] = {}
        self._path = path
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self._read(path, settings)
        else:
            self._append({"settings": settings})

    def _read(self, path: Path, settings: dict[str, Any] | None) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        unfinished = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        records = [_record(line) for line in lines]
        if not records or "settings" not in records[0]:
            raise PlanError(f"{path} is not a journal; remove it, or name another output")
        if records[0]["settings"] != json.loads(json.dumps(settings)):
            raise PlanError(f"{path} is the journal of another search; remove it, or name another output")
        for number, record in enumerate(records[1:], start=2):
            plan, score = record.get("plan"), record.get("score")
            if not isinstance(plan, str) or not isinstance(score, (int, float)):
                raise PlanError(f"{path} line {number} holds no plan and score; remove that line, or the file")
            self._scores[plan] = float(score)
        if unfinished:
            os.truncate(path, path.stat().st_size - len(unfinished))

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, grid: str) -> float | None:
        return self._scores.get(grid)

    def add(self, grid: str, score: float) -> None:
        """Remember a score, on disk before this returns."""
        if math.isnan(score):
            raise PlanError(f"plan {grid} scored nan; the renderer gave an image that cannot be compared")
        self._scores[grid] = score
        if self._path is not None:
            self._append({"plan": grid, "score": score})

    def _append(self, record: dict[str, Any]) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}

"""What the tests of faults have tried, counted by kind and outcome, for the table in docs/reliability.md.

`FAULTS=docs/faults.md pytest` writes it, `python scripts/update_readme.py` puts it there.
"""

from __future__ import annotations

from collections import Counter

TRIED: dict[str, Counter[str]] = {}


def note(kind: str, outcome: str, times: int = 1) -> None:
    TRIED.setdefault(kind, Counter())[outcome] += times


def table() -> str:
    lines = ["| fault | cases | outcome |", "|---|---|---|"]
    for kind, found in sorted(TRIED.items()):
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in found.most_common())
        lines.append(f"| {kind} | {found.total()} | {outcomes} |")
    return "\n".join(lines)

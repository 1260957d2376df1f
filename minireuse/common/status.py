"""What the command lines share: how they tell of bad input, of interruptions and of what they had to choose."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


def command_line(module: str, argv: list[str] | None) -> str:
    """What was typed, for the record; argv as `main` was given it."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])


def exit_status(work: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Do the work of a command. Returns 0, 2 for bad input (one sentence on stderr), 130 when interrupted.

    Warnings given to this package's own code become notes on stderr, each once.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, *place: Any, **more: Any) -> None:
            if Path(filename).is_relative_to(PACKAGE):
                print(f"note: {message}", file=sys.stderr)
            else:
                others(message, category, filename, *place, **more)

        warnings.showwarning = show
        try:
            work()
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            return 130
    return 0

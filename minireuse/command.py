"""What the command lines share: how they tell of bad input, of interruptions and of what they had to choose."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable


def exit_status(work: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Do the work of a command. Returns 0, 2 for bad input (one sentence on stderr), 130 when interrupted.

    Warnings of this package become notes on stderr.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *rest, **more: print(f"note: {message}", file=sys.stderr)
        try:
            work()
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            return 130
    return 0

"""How the figures of the page are written."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure, and let go of it."""
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)

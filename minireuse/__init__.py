"""minireuse: Stable Diffusion in plain PyTorch that keeps tensors of the U-Net and reuses them in later steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minireuse.pipeline import Pipeline, load

__all__ = ["Pipeline", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `from minireuse.samplers import ddim` costs torch alone.
    if name in __all__:
        from minireuse import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

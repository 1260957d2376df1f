"""Which device and which precision to compute in."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """The device of this name; auto takes cuda, then mps, then cpu. Raises: ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not is_available(name):
        raise ValueError(f"device {name!r} is not available here; use auto, cpu, cuda or mps")
    return torch.device(name)


def is_available(device: str) -> bool:
    """Whether tensors can be made on a device of this name."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch built without CUDA asserts
        return False
    return True


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The precision of this name; auto is float16 on cuda, else float32. Raises: ValueError."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype is {name!r}, expected auto, float32, float16 or bfloat16")
    return dtype

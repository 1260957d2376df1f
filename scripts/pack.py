"""A trained U-Net and text encoder in a quarter of the space, to go on training from elsewhere.

`python scripts/pack.py --run runs/shapes --out unet.safetensors`, then `python scripts/train_unet.py --start
unet.safetensors`. Eight bits a weight, scaled by row: good enough to start from, not to paint with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SCALE = ".scale"  # added to the names of the scales


def pack(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels as int8 with a scale per row (output channel), vectors in half precision."""
    packed = {}
    for name, value in values.items():
        if value.ndim < 2:
            packed[name] = value.half()
            continue
        scale = value.flatten(1).abs().amax(dim=1).clamp(min=1e-12) / 127
        packed[name] = (value / scale.view(-1, *[1] * (value.ndim - 1))).round().to(torch.int8).contiguous()
        packed[name + SCALE] = scale.float()
    return packed


def unpack(path: Path) -> dict[str, Tensor]:
    """The inverse of `pack`, from a file, as far as eight bits tell."""
    packed = load_file(path)
    values = {}
    for name, value in packed.items():
        if name.endswith(SCALE):
            continue
        scale = packed.get(name + SCALE)
        values[name] = value.float() if scale is None else value * scale.view(-1, *[1] * (value.ndim - 1))
    return values


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    state = torch.load(args.run / "full.pt", weights_only=True, map_location="cpu")
    save_file(pack(state["ema"]), args.out, metadata={"step": str(state["step"])})
    print(f"{args.out}: step {state['step']}, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

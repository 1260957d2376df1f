"""Train the shipped model from nothing: `python scripts/train.py --out runs/shapes`.

Renders the scenes, trains the VAE, then the U-Net with its text encoder, and writes `OUT/model`, a diffusers folder.
Interrupted at any point, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import export
import train_unet
import train_vae


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--bf16", action="store_true", help="train the U-Net in bfloat16 autocast")
    args = parser.parse_args(argv)
    train_vae.main(["--out", str(args.out)])
    train_unet.main(["--out", str(args.out), *(["--bf16"] if args.bf16 else [])])
    if not (args.out / "model").exists():
        export.main(["--run", str(args.out), "--out", str(args.out / "model")])


if __name__ == "__main__":
    main()

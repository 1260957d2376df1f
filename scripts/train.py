"""Train the model from nothing: `python scripts/train.py`.

Renders the scenes, trains the classifier that reads pictures, the VAE, then the U-Net with its text encoder, and writes
`OUT/model`, a diffusers folder with the classifier and prompts beside it. Interrupted at any point, the same command
goes on where it was. On two cores `OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 scripts/train.py` is faster than one
process with two threads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import export
import train_classifier
import train_unet
import train_vae
from trainer import in_turn, join_processes, leave_processes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/landscapes"))
    parser.add_argument("--vae", type=Path, metavar="FOLDER", help="a finished VAE to use instead of training one")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    args = parser.parse_args(argv)
    join_processes()
    common = ["--out", str(args.out), *(["--bf16"] if args.bf16 else [])]
    train_classifier.main(common)
    if args.vae is None:
        train_vae.main(common)
    train_unet.main([*common, *(["--vae", str(args.vae)] if args.vae else [])])

    def write() -> None:
        if not (args.out / "model").exists():
            export.main(["--run", str(args.out), "--out", str(args.out / "model")])

    in_turn(write)
    leave_processes()


if __name__ == "__main__":
    main()

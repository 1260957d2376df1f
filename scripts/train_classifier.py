"""Train the classifier that reads pictures: `python scripts/train_classifier.py`.

It learns the world's questions (`world.QUESTIONS`) from rendered scenes, mirrored, moved, blurred and made noisy, so
that it looks for things and not for the exact pixels of the renderer. `OUT/classifier` is written at the end, and how
often each question is answered right on renders it was not trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from minireuse.evaluate.classifier import Classifier, ClassifierConfig

from data import SCENES, pictures, scene_at
from trainer import in_turn, join_processes, leave_processes, part_of, rank, train
from world import QUESTIONS, answers

CONFIG = ClassifierConfig(QUESTIONS)
HELD_OUT = 9  # the data set that accuracy is measured on
MOST_SHIFT = 6  # pixels


def worn(images: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The same scenes in other pictures: mirrored, moved, blurred, noisy.

    Shapes: (B, H, W, 3) uint8 -> (B, 3, H, W) uint8.
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = torch.stack([one.flip(-1) if rng.random() < 0.5 else one for one in x])
    side = x.shape[-1]
    padded = F.pad(x, [MOST_SHIFT] * 4, mode="replicate")
    corners = rng.integers(0, 2 * MOST_SHIFT + 1, size=(len(x), 2))
    x = torch.stack([one[:, i : i + side, j : j + side] for one, (i, j) in zip(padded, corners, strict=True)])
    blurred = F.avg_pool2d(F.pad(x, [1] * 4, mode="replicate"), 3, stride=1)
    share = torch.from_numpy(rng.uniform(0, 1, size=(len(x), 1, 1, 1))).float()
    noise = torch.from_numpy(rng.uniform(0, 8, size=(len(x), 1, 1, 1)) * rng.standard_normal(x.shape)).float()
    return (x + share * (blurred - x) + noise).round().clamp(0, 255).byte()


def accuracy(classifier: Classifier, images: np.ndarray, right: list[Mapping[str, int]]) -> dict[str, float]:
    """The share of right answers by question. Shapes: images (B, H, W, 3) uint8."""
    seen = classifier.read(list(images))
    return {
        name: float(np.mean([one[name] == phrases[told[name]] for one, told in zip(seen, right, strict=True)]))
        for name, phrases in classifier.config.questions.items()
    }


def write(classifier: Classifier, folder: Path) -> None:
    """Write the folder that `read_classifier` reads, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = classifier.config
    told = {"questions": config.questions, "widths": config.widths, "norm_groups": config.norm_groups}
    (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")
    tensors = {name: tensor.half().contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/landscapes"))
    parser.add_argument("--images", type=int, default=SCENES, help="rendered scenes to train on")
    parser.add_argument("--held-out", type=int, default=1000, help="rendered scenes to measure on")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, for processors with such units")
    args = parser.parse_args(argv)

    join_processes()
    images, _ = in_turn(lambda: pictures(args.out, args.images))
    unseen, _ = in_turn(lambda: pictures(args.out, args.held_out, seed=HELD_OUT))
    right = [answers(scene_at(0, i)) for i in range(args.images)]
    right_unseen = [answers(scene_at(HELD_OUT, i)) for i in range(args.held_out)]
    torch.manual_seed(0)
    classifier = Classifier(CONFIG).to(memory_format=torch.channels_last)

    def loss(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([4, step])
        chosen = part_of(rng.choice(len(images), min(args.batch, len(images)), replace=False))
        x = worn(images[np.sort(chosen)], np.random.default_rng([5, step, rank()]))
        told = [right[i] for i in np.sort(chosen)]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = classifier(x.contiguous(memory_format=torch.channels_last))
        losses = {
            name: F.cross_entropy(given.float(), torch.tensor([one[name] for one in told]))
            for name, given in logits.items()
        }
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    every = {"report": lambda step: accuracy(classifier, unseen[:200], right_unseen[:200]), "report_every": 250}
    train("classifier", args.out, classifier, loss, steps=args.steps, peak_lr=args.lr, ema_decay=0.99, **every)
    if rank() == 0:
        write(classifier.eval(), args.out / "classifier")
        for name, share in accuracy(classifier, unseen, right_unseen).items():
            print(f"{name:<12}{100 * share:7.2f} %")


if __name__ == "__main__":
    main()
    leave_processes()

"""The prompts that ship with the model: `python scripts/make_prompts.py --out DIR`.

Calibration prompts are what searches score plans on, evaluation prompts what everything is measured on. None of them
is the caption of a training scene, and no prompt is in both files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data import SCENES, scene_at
from world import caption

COUNTS = {"calibration": (4, 64), "evaluation": (5, 400)}  # the seed of the scenes, and how many


def prompts() -> dict[str, list[str]]:
    """Captions by name of the file, none of them twice and none of a training scene."""
    taken = {caption(scene_at(0, i)) for i in range(SCENES)}
    made: dict[str, list[str]] = {}
    for name, (seed, count) in COUNTS.items():
        made[name], index = [], 0
        while len(made[name]) < count:
            told = caption(scene_at(seed, index))
            index += 1
            if told not in taken:
                taken.add(told)
                made[name].append(told)
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, lines in prompts().items():
        (args.out / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""How well does the model paint what it is told? `python scripts/verify.py`.

It paints the evaluation prompts, none of which is the caption of a training scene, with the full sampler. Then it
prints:

- how often the classifier is right on renders that it was not trained on, question by question;
- how often the classifier finds in the pictures what the prompts say: question by question, over all questions, over
  the things that the prompts name, and over whole prompts;
- the Fréchet distance between the pictures and renders of the same prompts, in the classifier's features, and beside
  it that between two sets of renders of these prompts, which differ in what is left to chance;
- how well the VAE gives unseen renders back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import minireuse
from minireuse.common.metrics import psnr
from minireuse.evaluate.classifier import NONE, Classifier, asked, own_classifier
from minireuse.evaluate.distribution import frechet
from minireuse.files import read_lines, shipped_model
from minireuse.pipeline import Pipeline
from minireuse.search import build, policies_for

from data import picture_at, scene_at
from train_classifier import HELD_OUT, accuracy
from world import answers, parse_caption, render

UNSEEN = 1  # the data set of the renders that the VAE gives back
VAE_SCENES = 64


def paint(pipe: Pipeline, prompts: Sequence[str], model: Path, steps: int, policy: str) -> np.ndarray:
    """A picture for each prompt, seeded by its number. Shapes: -> (len(prompts), H, W, 3) uint8."""
    policies = policies_for(policy, model, "ddim", lambda: pipe.fingerprint)
    plan = build(policy, pipe.calls("ddim", steps), pipe.sites, policies=policies)
    seeds = list(range(len(prompts)))
    parts = [slice(i, i + 8) for i in range(0, len(prompts), 8)]
    made = (pipe.generate(prompts[part], seeds=seeds[part], steps=steps, plan=plan).images for part in parts)
    return np.concatenate(list(tqdm(made, desc="paint", total=len(parts))))


def obedience(classifier: Classifier, images: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, float]:
    """The share of right answers: of each question, of all, of those that a prompt names, and of whole prompts."""
    told = [asked(prompt, classifier.config.questions) for prompt in prompts]
    if None in told:
        raise ValueError(f"{prompts[told.index(None)]!r} is not a caption of the classifier's world")
    seen = classifier.read(images)
    right = {
        name: np.array([one[name] == said[name] for one, said in zip(seen, told, strict=True)])
        for name in classifier.config.questions
    }
    whole = np.stack(list(right.values()), axis=1)  # (prompts, questions)
    named = np.array([[said[name] != NONE for name in right] for said in told])
    shares = {name: float(values.mean()) for name, values in right.items()}
    return shares | {
        "all questions": float(whole.mean()),
        "what is named": float(whole[named].mean()),
        "whole prompts": float(whole.all(axis=1).mean()),
    }


def renders(prompts: Sequence[str], seed: int) -> list[np.ndarray]:
    """The scenes of plain captions, painted by the renderer. Shapes: -> (SIDE, SIDE, 3) uint8 each."""
    scenes = [parse_caption(prompt) for prompt in prompts]
    return [render(scene, np.random.default_rng([seed, i, 2])) for i, scene in enumerate(scenes) if scene]


def batches(images: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """Shapes: (H, W, 3) each -> (B, 3, H, W)."""
    for i in range(0, len(images), 50):
        yield torch.from_numpy(np.stack(images[i : i + 50])).permute(0, 3, 1, 2)


def given_back(pipe: Pipeline, images: Sequence[np.ndarray]) -> float:
    """The mean PSNR, in dB, of renders that the VAE encodes and decodes."""
    with torch.no_grad():
        decoded = [pipe.vae.decode(pipe.vae.encode(x.float() / 127.5 - 1)) for x in batches(images)]
    back = ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return float(psnr(back, np.stack(images)).mean())


def table(found: dict[str, dict[str, float]]) -> str:
    """What was found, as a table: a row for each question, then what is one number of the whole."""
    right, shown = found["classifier on renders"], found["pictures"]
    lines = ["| right, % | classifier on renders | the model's pictures |", "|---|---|---|"]
    for name, share in shown.items():
        known = f"{100 * right[name]:.1f}" if name in right else ""
        lines += [f"| {name} | {known} | {100 * share:.1f} |"]
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| Fréchet distance of {name} | {value:.2f} |" for name, value in found["Fréchet distance"].items()]
    lines += [f"| PSNR of unseen renders through the VAE, dB | {found['VAE']['PSNR, dB']:.1f} |"]
    return "\n".join(lines) + "\n"


def sheet(images: Sequence[np.ndarray], columns: int = 4) -> np.ndarray:
    """Pictures in rows, from the left to the right; what does not fill a row is left out."""
    whole = np.stack(images[: len(images) // columns * columns])
    return rearrange(whole, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=shipped_model(), help="a folder with its classifier and prompts")
    parser.add_argument("--prompts", type=int, default=400, metavar="N")
    parser.add_argument("--held-out", type=int, default=1000, metavar="N", help="renders to try the classifier on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--policy", default="none", help="which U-Net calls reuse: none, hurry, interval, ...")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="where to write renders of 32 prompts beside the pictures"
    )
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="where to write what is printed")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to write the figures")
    args = parser.parse_args(argv)

    classifier = own_classifier(args.model)
    if classifier is None:
        parser.error(f"{args.model} has no folder `classifier`; scripts/train_classifier.py makes one")
    prompts = read_lines(args.model / "prompts" / "evaluation.txt")[: args.prompts]
    pipe = minireuse.load(args.model, device="cpu")
    scenes = [scene_at(HELD_OUT, i) for i in range(args.held_out)]
    held_out = [picture_at(HELD_OUT, i)[0] for i in tqdm(range(args.held_out), desc="render")]
    images = paint(pipe, prompts, args.model, args.steps, args.policy)
    one, other = renders(prompts, 0), renders(prompts, 1)
    unseen = [picture_at(UNSEEN, i)[0] for i in range(VAE_SCENES)]
    found = {
        "classifier on renders": accuracy(classifier, np.stack(held_out), [answers(scene) for scene in scenes]),
        "pictures": obedience(classifier, list(images), prompts),
        "Fréchet distance": {
            "the pictures to renders": frechet(classifier.features, batches(one), batches(list(images))),
            "renders to other renders": frechet(classifier.features, batches(one), batches(other)),
        },
        "VAE": {"PSNR, dB": given_back(pipe, unseen)},
    }
    print(report := table(found))
    if args.report:
        args.report.write_text(report)
    if args.sheet:
        left, right = sheet(one[:32]), sheet(list(images[:32]))
        gap = np.full((len(left), 16, 3), 255, dtype=np.uint8)
        Image.fromarray(np.concatenate([left, gap, right], axis=1)).save(args.sheet)
    if args.out:
        args.out.write_text(json.dumps({"prompts": len(prompts), "steps": args.steps, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

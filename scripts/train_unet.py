"""Train the small U-Net and text encoder on latents of scenes: `python scripts/train_unet.py`.

First the text encoder on captions alone (train_text.py); then both on scenes at half their size, where a step costs a
quarter and skies, grounds, outlines and places are learned; then on whole scenes. It is trained as Stable Diffusion 1.5
is: the network predicts noise, on the same schedule, with a tenth of the prompts empty for classifier-free guidance.
Three things make that bind skies and grounds in a small model. The noise has an offset of its own per image and
channel, so that the mean of a channel, which plain noise leaves visible at the last timestep, has to be learned. The
loss is weighted by min(1 / alpha^2, 25), which is the loss of v up to a cap. And where small things stand (trees, house
and balloon) errors count more: they cover little of the picture and are much of the caption.

On two cores `torchrun --nproc-per-node 2` with OMP_NUM_THREADS=1 is faster than one process with two threads.

`--start FOLDER` goes on from a finished model instead, on whole scenes alone. `--distil G` then teaches its U-Net to
say in one pass what it says with guidance of scale G, and `--tolerate PLAN` to come closer to itself where it reuses
maps (fine_tuning.py).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTokenizer

from minireuse.cache import ReuseCache
from minireuse.checkpoints import load_parts
from minireuse.common.status import exit_status
from minireuse.config import UNetConfig
from minireuse.guidance import guided_denoise
from minireuse.plan import ReusePlan
from minireuse.samplers import ddim
from minireuse.schedule import SD_SCHEDULE, Schedule
from minireuse.search import read_plan
from minireuse.text import TextEncoder
from minireuse.unet import UNet
from minireuse.vae import VAE

from data import SCENES, pictures, scene_at
from fine_tuning import Tuning, distillation, tolerance
from make_tokenizer import make_tokenizer
from train_text import Reader, question_losses, train_text
from train_vae import CONFIG as VAE_CONFIG
from train_vae import save_grid, to_tensor
from trainer import EMA, in_turn, join_processes, leave_processes, part_of, train
from world import SMALL_THINGS, Scene, caption, vary_caption

UNET_CONFIG = UNetConfig(
    block_out_channels=(64, 128, 192, 192),
    layers_per_block=1,
    heads=(2, 4, 6, 6),
    cross_attention_dim=128,
    norm_groups=8,
    sample_size=32,
)
SCHEDULE_CONFIG = SD_SCHEDULE  # noise prediction, scaled-linear betas, leading grid with offset 1, last alpha not one
GUIDANCE_SCALE = 7.5
OFFSET_NOISE = 0.1
MOST_WEIGHT = 25.0
SMALL_WEIGHT = 2.0  # how much more an error counts where a small thing is seen
READING = 0.03  # the weight of the reader's questions
DROP_TEXT = 0.1  # of the prompts are empty, for classifier-free guidance


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=UNET_CONFIG.cross_attention_dim,
        intermediate_size=4 * UNET_CONFIG.cross_attention_dim,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=UNET_CONFIG.cross_attention_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Model(nn.Module):
    """What is trained together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = UNet(UNET_CONFIG).to(memory_format=torch.channels_last)
        self.text = TextEncoder(text_config(tokenizer), tokenizer)
        self.reader = Reader(UNET_CONFIG.cross_attention_dim)


@dataclass(frozen=True)
class Latents:
    """Training scenes at one size. Shapes: x_0 (count, 4, h, w); small (count, 1, h, w), the share of small things."""

    x_0: Tensor
    small: Tensor


def trained_vae(folder: Path) -> VAE:
    vae = VAE(VAE_CONFIG).eval()
    state = torch.load(folder / "vae.pt", weights_only=True)
    vae.load_state_dict(state["module"])
    ema = EMA(vae, 0.0)
    ema.values = state["ema"]
    ema.copy_to(vae)
    return vae


def exported_vae(folder: Path) -> VAE:
    vae = VAE(VAE_CONFIG).eval()
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return vae


@torch.no_grad()
def encode_all(vae: VAE, images: np.ndarray, shrink: int, device: str) -> Tensor:
    """Latents of images at 1/shrink of their size. Shapes: (count, H, W, 3) -> (count, 4, H/4/shrink, W/4/shrink)."""
    vae = vae.to(device)
    batches = [
        vae.encode(F.avg_pool2d(to_tensor(np.array(images[i : i + 50])).to(device), shrink)).cpu()
        for i in tqdm(range(0, len(images), 50), desc="encode")
    ]
    vae.to("cpu")
    return torch.cat(batches)


def small_things(marks: np.ndarray, shrink: int) -> Tensor:
    """The share of each latent pixel that shows a small thing. Shapes: (count, H, W) -> (count, 1, H/4/shrink, ...)."""
    chunks = [
        F.avg_pool2d(torch.from_numpy(np.isin(marks[i : i + 500], SMALL_THINGS)).float()[:, None], 4 * shrink)
        for i in range(0, len(marks), 500)
    ]
    return torch.cat(chunks)


@torch.no_grad()
def standardise(vae: VAE, mean: Tensor, std: Tensor) -> None:
    """Fold a shift and scale per channel into the VAE, so that its latents have mean 0 and variance 1.

    Shapes: mean, std (latent_channels,), of the latents before.
    """
    c = len(mean)
    vae.quant_conv.weight[:c] /= std[:, None, None, None]
    vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - mean) / std
    vae.quant_conv.bias[c:] -= 2 * std.log()  # the other half is the log-variance
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]


def prepare(folder: Path, count: int, device: str, finished: Path | None = None) -> tuple[Latents, Latents, VAE]:
    """Latents of the first `count` training scenes, whole and at half their size, and the VAE that gives such latents.

    The latents of whole scenes have mean 0 and variance 1. finished: the folder of an exported VAE to use instead.
    Shapes: (count, 4, 32, 32), (count, 4, 16, 16).
    """
    vae = trained_vae(folder) if finished is None else exported_vae(finished)
    # Named after the VAE: latents of another one in the same folder would be silently wrong.
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in vae.parameters())).hexdigest()[:8]
    images, marks = pictures(folder, count)
    made = []
    for name, shrink in (("whole", 1), ("half", 2)):
        path = folder / f"latents-{name}-{count}-{digest}.pt"
        if not path.exists():
            both = encode_all(vae, images, shrink, device), small_things(marks, shrink)
            torch.save(both, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
        made.append(torch.load(path, weights_only=True))
    mean, std = made[0][0].mean(dim=(0, 2, 3)), made[0][0].std(dim=(0, 2, 3))
    if finished is not None:  # standardised when it was made, and to stay the same to the last bit
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    standardise(vae, mean, std)
    save_file(vae.state_dict(), folder / "vae-standard.safetensors")  # what the U-Net is trained with, for the export
    whole, half = (Latents((x_0 - mean[:, None, None]) / std[:, None, None], small) for x_0, small in made)
    return whole, half, vae


def run_tokenizer(folder: Path, start: Path | None = None) -> CLIPTokenizer:
    """The run's tokenizer, made once: another version of a library must not renumber the words of a trained model.

    start: a model folder to take it from.
    """
    if start is not None and not folder.exists():
        shutil.copytree(start / "tokenizer", folder)
    if (folder / "tokenizer_config.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    return make_tokenizer(folder)


def noise_loss(
    model: Model,
    x_0: Tensor,
    small: Tensor,
    prompts: list[str],
    alphas_cumprod: Tensor,
    rng: np.random.Generator,
    *,
    device: str,
    bf16: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted error of the predicted noise, and the text encoder's states, of this process's part of the batch.

    Shapes: x_0 (B, 4, h, w), small (B, 1, h, w), prompts B texts -> scalar, (B, M, D) of that part.
    """
    batch = len(x_0)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    # One timestep from each of `batch` equal parts of the schedule: the same mean with less variance.
    parts = (np.arange(batch) + rng.random(batch)) / batch
    t = torch.from_numpy((parts * len(alphas_cumprod)).astype(np.int64))
    bar = alphas_cumprod[t].float()[:, None, None, None]  # alpha^2
    noise = torch.randn(x_0.shape, generator=generator)
    noise = noise + OFFSET_NOISE * torch.randn(batch, x_0.shape[1], 1, 1, generator=generator)
    x = bar.sqrt() * x_0 + (1 - bar).sqrt() * noise
    x, noise, t, bar, small, prompts = (part_of(whole) for whole in (x, noise, t, bar, small, prompts))
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        context = model.text(model.text.tokenize(prompts).to(device))
        eps = model.unet(x.to(device).contiguous(memory_format=torch.channels_last), t.to(device), context)
    weight = (1 / bar).clamp(max=MOST_WEIGHT) * (1 + SMALL_WEIGHT * small)
    return (weight.to(device) * (eps.float() - noise.to(device)).square()).mean(), context.float()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/landscapes"))
    parser.add_argument("--scenes", type=int, default=SCENES)
    default = "steps {}; default: {}, or 0 with --start"
    parser.add_argument("--text-steps", type=int, help=default.format("on captions alone, of the text encoder", 600))
    parser.add_argument("--half-steps", type=int, help=default.format("on scenes of half the size", 1700))
    parser.add_argument("--steps", type=int, default=3300, help="further steps, on whole scenes")
    parser.add_argument("--batch", type=int, default=16, help="of whole scenes; of smaller ones twice as many")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--samples", type=int, default=16, help="pictures to look at now and then; 0 is none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--vae", type=Path, metavar="FOLDER", help="use this VAE, weights/vae for one, not the run's own"
    )
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="begin with this model, VAE and all: weights, say")
    parser.add_argument("--seed", type=int, default=0, help="of what begins random, and of what each step draws")
    distil_help = "fine-tune to do without guidance, as with this scale; needs --start"
    parser.add_argument("--distil", type=float, metavar="SCALE", help=distil_help)
    tolerate_help = "fine-tune to tolerate reuse by this plan file for DDIM, or by random plans; needs --start"
    parser.add_argument("--tolerate", metavar="PLAN|random", help=tolerate_help)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, for processors with such units")
    args = parser.parse_args(argv)
    tuning = tuning_of(args)

    join_processes()
    tokenizer = in_turn(lambda: run_tokenizer(args.out / "tokenizer", args.start))
    given_vae = args.vae or (args.start and args.start / "vae")
    whole, half, vae = in_turn(lambda: prepare(args.out, args.scenes, args.device, given_vae))
    scenes = [scene_at(0, i) for i in range(args.scenes)]
    schedule = Schedule.from_config(SCHEDULE_CONFIG)
    torch.manual_seed(args.seed)
    model = Model(tokenizer)
    text_steps, half_steps = 600, 1700
    if args.start is not None:
        parts = load_parts(args.start, torch.float32)
        model.unet.load_state_dict(parts.unet.state_dict())
        model.text.load_state_dict(parts.text.state_dict())
        text_steps = half_steps = 0
    text_steps = text_steps if args.text_steps is None else args.text_steps
    half_steps = half_steps if args.half_steps is None else args.half_steps
    train_text(model.text, model.reader, args.out, scenes, text_steps, 8 * args.batch, args.lr, args.device)
    model.to(args.device)
    teacher = copy.deepcopy(model.unet).eval().requires_grad_(False)

    def loss_at(step: int, latents: Latents, batch: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([2, latents.x_0.shape[-1], step, args.seed])
        chosen = rng.choice(len(scenes), batch, replace=len(scenes) < batch)
        shown: list[Scene] = [scenes[i] for i in chosen]
        prompts = ["" if rng.random() < DROP_TEXT else vary_caption(scene, rng) for scene in shown]
        x_0, small = latents.x_0[chosen], latents.small[chosen]
        if tuning is not None:
            with torch.no_grad():
                told = model.text.encode(["", *part_of(prompts)])  # the text encoder stays as it is
            context = torch.cat([told[:1].expand(len(told) - 1, -1, -1), told[1:]])  # unconditional half first
            return {"loss": tuning(model.unet, teacher, part_of(x_0).to(args.device), context, schedule, rng)}
        denoising, context = noise_loss(
            model, x_0, small, prompts, schedule.alphas_cumprod, rng, device=args.device, bf16=args.bf16
        )
        shown, prompts = part_of(shown), part_of(prompts)
        captioned = [i for i, prompt in enumerate(prompts) if prompt]
        losses = question_losses(model.reader(context[captioned]), [shown[i] for i in captioned])
        reading = torch.stack(list(losses.values())).sum()
        return {"loss": denoising + READING * reading, "denoising": denoising, "reading": reading}

    def report(name: str, step: int, side: int) -> dict[str, float]:
        if args.samples:
            prompts = [caption(scene_at(3, i)) for i in range(args.samples)]
            latents = paint(model, prompts, side, schedule, args.device)
            images = torch.cat([vae.decode(row.cpu()) for row in latents.split(4)]).clamp(-1, 1)
            save_grid(images, args.out / f"{name}-{step:05d}.png")
        return {}

    for name, latents, batch, steps, peak_lr, floor in (
        ("half", half, 2 * args.batch, half_steps, args.lr, 0.5),  # it ends at the rate at which the next one begins
        ("full", whole, args.batch, args.steps, args.lr / 2, 0.02),
    ):
        train(
            name,
            args.out,
            model,
            lambda step, latents=latents, batch=batch: loss_at(step, latents, batch),
            steps=steps,
            peak_lr=peak_lr,
            ema_decay=0.998,
            floor=floor,
            report=lambda step, name=name, side=latents.x_0.shape[-1]: report(name, step, side),
            report_every=500,
        )


def tuning_of(args: argparse.Namespace) -> Tuning | None:
    """What fine-tunes the U-Net instead of plain training, where it is asked for. Raises: ValueError, OSError."""
    if args.distil is None and args.tolerate is None:
        return None
    if args.distil is not None and args.tolerate is not None:
        raise ValueError("--distil and --tolerate are two trainings; give one of them")
    if args.start is None:
        raise ValueError("--distil and --tolerate begin with a finished model; name its folder with --start")
    if args.distil is not None:
        return partial(distillation, scale=args.distil)
    plan = None if args.tolerate == "random" else read_plan(Path(args.tolerate))[0]
    if plan is not None and (plan.grid is None or plan.order or not plan.reused):
        raise ValueError(
            f"--tolerate {args.tolerate} has to be a step-wise plan of order 0 that reuses; give another one"
        )
    return partial(tolerance, plan=plan, scale=GUIDANCE_SCALE)


def paint(model: Model, prompts: list[str], side: int, schedule: Schedule, device: str, steps: int = 20) -> Tensor:
    """Guided DDIM samples, for looking at while training. Shapes: -> (len(prompts), 4, side, side)."""
    x = torch.randn(len(prompts), 4, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    context = torch.cat([model.text.encode([""] * len(prompts)), model.text.encode(prompts)])
    plan, cache = ReusePlan.nothing(steps), ReuseCache()
    denoise = guided_denoise(model.unet, context, schedule, plan, cache, guidance_scale=GUIDANCE_SCALE)
    *_, last = ddim(denoise, x, schedule, schedule.timesteps(steps))
    return last.x


if __name__ == "__main__":
    status = exit_status(main, "interrupted; the same command goes on")
    leave_processes()
    sys.exit(status)

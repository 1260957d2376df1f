"""Train the small U-Net and text encoder on latents of scenes: `python scripts/train_unet.py --out runs/shapes`.

First the text encoder on captions alone (train_text.py). Then both on scenes at half their size, where a step costs a
quarter and colours, places and rough shapes are learned; then in turn on windows around single objects, just as cheap,
on half scenes that hold two, where it shows which shape goes where, and on whole scenes. v-prediction (arXiv
2202.00512) on a schedule that ends in almost pure noise, without loss weights: with noise prediction on SD's own
schedule this small model paints the right shapes on the wrong backgrounds. All the while the text encoder is asked what
the captions say.

`--start weights` goes on from a finished model instead, in a new run, on the views of --cycle alone: a fine-tuned one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from dataclasses import replace
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
from minireuse.config import UNetConfig
from minireuse.guidance import guided_denoise
from minireuse.plan import ReusePlan
from minireuse.samplers import ddim
from minireuse.schedule import Schedule, ScheduleConfig
from minireuse.text import TextEncoder
from minireuse.unet import UNet
from minireuse.vae import VAE

from data import pictures, scene_at
from make_tokenizer import make_tokenizer
from train_text import Reader, reading_losses, train_text
from train_vae import CONFIG as VAE_CONFIG
from train_vae import save_grid, to_tensor
from trainer import EMA, train
from world import SIDE, Scene, caption, vary_caption

UNET_CONFIG = UNetConfig(
    block_out_channels=(64, 128, 192, 192),
    layers_per_block=1,
    heads=(2, 4, 6, 6),
    cross_attention_dim=128,
    norm_groups=8,
    sample_size=32,
)
SCHEDULE_CONFIG = ScheduleConfig(
    beta_start=1e-4,
    beta_end=0.02,
    beta_schedule="linear",
    prediction_type="v_prediction",
    spacing="trailing",
    offset=0,
    last_alpha_one=True,
)
# The distribution of training timesteps, as quantiles. Most are from the middle of the schedule, where shapes are
# decided; below it is nothing but texture. Scenes at half their size are for what is decided above it: what is where.
TIMESTEPS = ((0.0, 0.075, 0.9, 1.0), (0, 150, 700, 1000))
HALF_TIMESTEPS = ((0.0, 0.05, 0.25, 1.0), (0, 300, 600, 1000))
READING = 0.03  # the weight of the reader's questions
VIEWS = ("half", "close", "whole", "row", "column")
CYCLE = ("close", "row", "whole", "close", "column", "whole")  # of the last stage
BANDS = {"row": ("left of", "right of"), "column": ("above", "below")}  # which relations of two objects they show
SCENES = 12_000  # to train on
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


def prepare(folder: Path, count: int, device: str, finished: Path | None = None) -> tuple[Tensor, Tensor, VAE]:
    """Latents of the first `count` training scenes, whole and at half their size, and the VAE that gives such latents.

    The latents of whole scenes have mean 0 and variance 1. finished: the folder of an exported VAE to use instead.
    Shapes: (count, 4, 32, 32), (count, 4, 16, 16).
    """
    vae = trained_vae(folder) if finished is None else exported_vae(finished)
    # Named after the VAE: latents of another one in the same folder would be silently wrong.
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in vae.parameters())).hexdigest()[:8]
    made = []
    for name, shrink in (("whole", 1), ("half", 2)):
        path = folder / f"latents-{name}-{count}-{digest}.pt"
        if not path.exists():
            torch.save(encode_all(vae, pictures(folder, count), shrink, device), path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
        made.append(torch.load(path, weights_only=True))
    mean, std = made[0].mean(dim=(0, 2, 3)), made[0].std(dim=(0, 2, 3))
    if finished is not None:  # standardised when it was made, and to stay the same to the last bit
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    standardise(vae, mean, std)
    save_file(vae.state_dict(), folder / "vae-standard.safetensors")  # what the U-Net is trained with, for the export
    whole, half = ((latents - mean[:, None, None]) / std[:, None, None] for latents in made)
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


def close_up(latents: Tensor, scenes: list[Scene], rng: np.random.Generator) -> tuple[Tensor, list[Scene]]:
    """A window of half the side around one object of each scene, and that object as if it stood alone.

    Shapes and fills are learned from it at a quarter of the cost. Shapes: (B, 4, 32, 32) -> (B, 4, 16, 16).
    """
    side = latents.shape[-1] // 2
    cell = SIDE / latents.shape[-1]
    windows, alone = [], []
    for latent, scene in zip(latents, scenes, strict=True):
        o = scene.objects[rng.integers(len(scene.objects))]
        corner = np.array([o.x, o.y]) / cell - side / 2 + rng.uniform(-1.5, 1.5, 2)
        x, y = np.clip(np.round(corner), 0, side).astype(int)
        windows.append(latent[:, y : y + side, x : x + side])
        alone.append(replace(scene, objects=(o,), relation=None))
    return torch.stack(windows), alone


def band(latents: Tensor, scenes: list[Scene], across: bool, rng: np.random.Generator) -> Tensor:
    """The half of each scene with both its objects (their rims may be cut): rows if they are side by side, or columns.

    Single objects never show which has which shape; here two do, at half the cost of the scene.
    Shapes: (B, 4, 32, 32) -> (B, 4, 16, 32), or (B, 4, 32, 16) where `across` is false.
    """
    side = latents.shape[-1] // 2
    cell = SIDE / latents.shape[-1]
    bands = []
    for latent, scene in zip(latents, scenes, strict=True):
        middle = np.mean([o.y if across else o.x for o in scene.objects]) / cell
        first = int(np.clip(np.round(middle - side / 2 + rng.uniform(-1.5, 1.5)), 0, side))
        bands.append(latent.narrow(1 if across else 2, first, side))
    return torch.stack(bands)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--scenes", type=int, default=SCENES)
    steps_help = "steps {}; default: {}, or 0 with --start"
    parser.add_argument("--text-steps", type=int, help=steps_help.format("on captions alone, of the text encoder", 600))
    parser.add_argument("--half-steps", type=int, help=steps_help.format("on scenes of half the size", 2000))
    parser.add_argument("--steps", type=int, default=4700, help="further steps, on the views of --cycle")
    parser.add_argument(
        "--cycle", nargs="+", choices=VIEWS, default=CYCLE, help="views of the further steps, one a step, in turn"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=16, help="pictures to look at now and then; 0 is none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--vae", type=Path, metavar="FOLDER", help="use this VAE, weights/vae for one, not the run's own"
    )
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="begin with this model, VAE and all: weights, say")
    parser.add_argument("--seed", type=int, default=0, help="of what begins random, and of what each step draws")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, for processors with such units")
    args = parser.parse_args(argv)

    tokenizer = run_tokenizer(args.out / "tokenizer", args.start)
    given_vae = args.vae or (args.start and args.start / "vae")
    whole, half, vae = prepare(args.out, args.scenes, args.device, given_vae)
    scenes = [scene_at(0, i) for i in range(args.scenes)]
    shown_in = {v: [i for i, s in enumerate(scenes) if s.relation in BANDS.get(v, (s.relation,))] for v in VIEWS}
    schedule = Schedule.from_config(SCHEDULE_CONFIG)
    alphas_cumprod = schedule.alphas_cumprod
    torch.manual_seed(args.seed)
    model = Model(tokenizer)
    text_steps, half_steps = 600, 2000
    if args.start is not None:
        parts = load_parts(args.start, torch.float32)
        model.unet.load_state_dict(parts.unet.state_dict())
        model.text.load_state_dict(parts.text.state_dict())
        text_steps = half_steps = 0
    text_steps = text_steps if args.text_steps is None else args.text_steps
    half_steps = half_steps if args.half_steps is None else args.half_steps
    train_text(model.text, model.reader, args.out, scenes, text_steps, 4 * args.batch, args.lr, args.device)
    model.to(args.device)

    def loss_at(step: int, view: str) -> dict[str, Tensor]:
        rng = np.random.default_rng([2, VIEWS.index(view), step, args.seed])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        batch = args.batch // 2 if view == "whole" else args.batch
        chosen = rng.choice(shown_in[view], batch, replace=len(shown_in[view]) < batch)
        x_0, shown = (half if view == "half" else whole)[chosen], [scenes[i] for i in chosen]
        if view == "close":
            x_0, shown = close_up(x_0, shown, rng)
        elif view in BANDS:
            x_0 = band(x_0, shown, view == "row", rng)
        prompts = ["" if rng.random() < DROP_TEXT else vary_caption(scene, rng) for scene in shown]
        # One timestep from each of `batch` equal parts of the distribution: the same mean with less variance.
        parts = (np.arange(batch) + rng.random(batch)) / batch
        t = torch.from_numpy(np.interp(parts, *(HALF_TIMESTEPS if view == "half" else TIMESTEPS)).astype(np.int64))
        alpha = alphas_cumprod[t].sqrt().float()[:, None, None, None]
        sigma = (1 - alphas_cumprod[t]).sqrt().float()[:, None, None, None]
        noise = torch.randn(x_0.shape, generator=generator)
        x, target = alpha * x_0 + sigma * noise, alpha * noise - sigma * x_0
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            context = model.text(model.text.tokenize(prompts).to(args.device))
            v = model.unet(x.to(args.device).contiguous(memory_format=torch.channels_last), t.to(args.device), context)
        denoising = F.mse_loss(v.float(), target.to(args.device))
        prompted = [i for i, prompt in enumerate(prompts) if prompt]
        losses = reading_losses(model.reader, context[prompted].float(), [shown[i] for i in prompted])
        reading = torch.stack(list(losses.values())).sum()
        return {"loss": denoising + READING * reading, "denoising": denoising, "reading": reading}

    def report(name: str, step: int, side: int) -> dict[str, float]:
        if not args.samples:
            return {}
        prompts = [caption(scene_at(3, i)) for i in range(args.samples)]
        x = paint(model, prompts, side, schedule, args.device)
        images = torch.cat([vae.decode(row.cpu()) for row in x.split(4)]).clamp(-1, 1)
        save_grid(images, args.out / f"{name}-{step:05d}.png")
        return {}

    train(
        "half",
        args.out,
        model,
        lambda step: loss_at(step, "half"),
        steps=half_steps,
        peak_lr=args.lr,
        ema_decay=0.998,
        floor=0.5,  # where the next stage begins
        report=lambda step: report("half", step, 16),
        report_every=500,
    )
    train(
        "full",
        args.out,
        model,
        lambda step: loss_at(step, args.cycle[step % len(args.cycle)]),
        steps=args.steps,
        peak_lr=args.lr / 2,
        ema_decay=0.995,
        report=lambda step: report("full", step, 32),
        report_every=500,
    )


def paint(model: Model, prompts: list[str], side: int, schedule: Schedule, device: str, steps: int = 20) -> Tensor:
    """Guided DDIM samples, for looking at while training. Shapes: -> (len(prompts), 4, side, side)."""
    x = torch.randn(len(prompts), 4, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    context = torch.cat([model.text.encode([""] * len(prompts)), model.text.encode(prompts)])
    plan, cache = ReusePlan.nothing(steps), ReuseCache()
    denoise = guided_denoise(model.unet, context, schedule, plan, cache, guidance_scale=4.0)
    *_, last = ddim(denoise, x, schedule, schedule.timesteps(steps))
    return last.x


if __name__ == "__main__":
    main()

"""Train the small VAE on rendered scenes: `python scripts/train_vae.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from minireuse.config import VAEConfig
from minireuse.vae import VAE

from data import SCENES, pictures
from trainer import in_turn, join_processes, leave_processes, part_of, rank, train

# Norm groups of 4 and 8 channels: with SD's 32 groups they would hold a single channel here, and normalising each
# channel alone erases the very colours that are to be kept.
CONFIG = VAEConfig(
    block_out_channels=(32, 64, 64), layers_per_block=1, norm_groups=8, scaling_factor=1.0, sample_size=128
)
KL_WEIGHT = 1e-4


def to_tensor(batch: np.ndarray) -> Tensor:
    """Shapes: (B, H, W, 3) uint8 -> (B, 3, H, W) float32 in -1 ... 1."""
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def crops(images: np.ndarray, step: int, steps: int) -> Tensor:
    """A quarter of each of 16 images, four times cheaper than the whole; towards the end 4 whole images.

    Group norms average over the image, so what was learned on crops must settle on whole ones.
    """
    rng = np.random.default_rng([1, step])
    whole = step >= 0.8 * steps
    chosen = images[np.sort(rng.choice(len(images), 4 if whole else 16, replace=False))]
    if whole:
        return to_tensor(chosen)
    half = chosen.shape[1] // 2
    corners = rng.integers(0, half + 1, size=(len(chosen), 2))
    return to_tensor(
        np.stack([image[y : y + half, x : x + half] for image, (y, x) in zip(chosen, corners, strict=True)])
    )


def save_grid(images: Tensor, path: Path) -> None:
    """Write images in rows of eight. Shapes: (B, 3, H, W) in -1 ... 1, B a multiple of 8."""
    grid = rearrange(images, "(rows eight) c h w -> (rows h) (eight w) c", eight=8)
    Image.fromarray(((grid + 1) * 127.5).round().byte().numpy()).save(path)


def psnr(vae: VAE, images: np.ndarray) -> float:
    """Mean reconstruction PSNR in dB, from the posterior's mean, over whole images."""
    values = []
    for image in images:
        x = to_tensor(np.array(image)[None])
        y = vae.decode(vae.encode(x)).clamp(-1, 1)
        values.append(10 * torch.log10(4 / (x - y).square().mean()).item())
    return float(np.mean(values))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/landscapes"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--images", type=int, default=SCENES, help="rendered scenes to train on")
    parser.add_argument("--samples", type=int, default=8, help="reconstructions to look at now and then; 0 is none")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="begin with this VAE, weights/vae for one")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, for processors with such units")
    args = parser.parse_args(argv)

    join_processes()
    images, _ = in_turn(lambda: pictures(args.out, args.images))
    unseen, _ = in_turn(lambda: pictures(args.out, 64, seed=1))
    torch.manual_seed(0)
    vae = VAE(CONFIG).to(memory_format=torch.channels_last)
    if args.start is not None:
        vae.load_state_dict(load_file(args.start / "diffusion_pytorch_model.safetensors"))

    def loss(step: int) -> dict[str, Tensor]:
        x = part_of(crops(images, step, args.steps)).contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(2**20 * rank() + step)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            mean, log_variance = (m.float() for m in vae.moments(x))
            noise = torch.randn(mean.shape, generator=generator)
            error = vae.decode(mean + torch.exp(0.5 * log_variance) * noise).float() - x
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        mse, mae = error.square().mean(), error.abs().mean()
        return {"loss": mse + 0.5 * mae + KL_WEIGHT * kl, "mse": mse, "mae": mae, "kl": kl}

    def report(step: int) -> dict[str, float]:
        if not args.samples:
            return {}
        x = to_tensor(np.array(unseen[: args.samples]))
        save_grid(torch.cat([x, vae.decode(vae.encode(x))]).clamp(-1, 1), args.out / f"vae-{step:05d}.png")
        return {"psnr_unseen": psnr(vae, unseen[:32])}

    every = {"report": report, "report_every": 250}
    train("vae", args.out, vae, loss, steps=args.steps, peak_lr=args.lr, ema_decay=0.995, **every)
    print(f"VAE: {psnr(vae, unseen):.2f} dB on {len(unseen)} unseen scenes")


if __name__ == "__main__":
    main()
    leave_processes()

"""Write a trained model as a float16 diffusers folder: `python scripts/export.py --run RUN --out DIR`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minireuse.checkpoints.configs import write_schedule_config, write_unet_config, write_vae_config
from minireuse.vae import VAE

import make_prompts
from train_unet import GUIDANCE_SCALE, SCHEDULE_CONFIG, UNET_CONFIG, Model, run_tokenizer
from train_vae import CONFIG as VAE_CONFIG
from trainer import EMA

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "_guidance_scale": GUIDANCE_SCALE,  # read by minireuse, as `--guidance-scale` has it
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def half(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + key: value.half().contiguous() for key, value in module.state_dict().items()}


def write(folder: Path, config: dict, name: str, tensors: dict[str, Tensor] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(config, indent=2) + "\n")
    if tensors is not None:
        stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def export(run: Path, out: Path, guidance: float = GUIDANCE_SCALE) -> None:
    """Write the run's model to a folder that appears under its name only once it is whole.

    guidance: the scale that the model is sampled at.
    """
    final, out = out, out.with_name(out.name + ".part")
    shutil.rmtree(out, ignore_errors=True)
    tokenizer = run_tokenizer(run / "tokenizer")
    vae = VAE(VAE_CONFIG)
    vae.load_state_dict(load_file(run / "vae-standard.safetensors"))
    model = Model(tokenizer)
    state = torch.load(run / "full.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(state["module"])
    ema = EMA(model, 0.0)
    ema.values = state["ema"]
    ema.copy_to(model)

    write(out, INDEX | {"_guidance_scale": guidance}, "model_index.json")
    write(out / "unet", write_unet_config(UNET_CONFIG), "config.json", half(model.unet))
    write(out / "vae", write_vae_config(VAE_CONFIG), "config.json", half(vae))
    write(out / "scheduler", write_schedule_config(SCHEDULE_CONFIG), "scheduler_config.json")
    text = model.text.model
    # Published checkpoints hold the transformer under this prefix, as transformers did before version 5.
    prefix = "" if next(iter(text.state_dict())).startswith("text_model.") else "text_model."
    text_config = text.config.to_diff_dict() | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    text_config.pop("transformers_version", None)
    text_config.pop("dtype", None)
    write(out / "text_encoder", text_config, "config.json", half(text, prefix))
    shutil.copytree(run / "tokenizer", out / "tokenizer")
    if (run / "classifier").is_dir():
        shutil.copytree(run / "classifier", out / "classifier")
    make_prompts.main(["--out", str(out / "prompts")])
    os.replace(out, final)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/landscapes"))
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    guidance_help = "that the model is sampled at; 1 for a model that was distilled"
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE, metavar="G", help=guidance_help)
    args = parser.parse_args(argv)
    if args.out.exists():
        raise SystemExit(f"error: {args.out} exists; name a new folder, or remove it first")
    export(args.run, args.out, args.guidance_scale)
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

"""Reuse of attention maps, all of it: `python docs/reuse_in_100_lines.py`.

Stable Diffusion's sampler with one more `if`: at the steps that a plan marks, attention takes the map that it computed
last (arXiv 2401.01008). The package keeps maps only where a later step reads them, and runs a fused kernel elsewhere.
"""

import sys

import torch
import torch.nn.functional as F
from PIL import Image

import minireuse
from minireuse.layers import timestep_embedding

PROMPT, SEED, STEPS, GUIDANCE = "snowy hills with two pines, a red house and mountains at sunset", 0, 20, 7.5
PLANS = {  # one character for each step: "." computes the maps, "#" reuses them
    "full": "....................",
    "hurry": "..........##########",  # the paper's rule: as late as possible
    "even": ".#.#.#.#.#.#.#.#.#.#",
    "paper": "........#.###.######",  # what the paper's search found for Stable Diffusion 1.5
}


def attention(layer, x, context, maps, reuse):
    """softmax(q k^T / sqrt(d)) v. Shapes: x (B, N, D), context (B, M, D') -> (B, N, D)."""

    def heads(y):  # (B, N, D) -> (B, heads, N, d)
        return y.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    if not reuse:
        q, k = heads(layer.to_q(x)), heads(layer.to_k(context))
        maps[layer] = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # (B, heads, N, M)
    y = maps[layer] @ heads(layer.to_v(context))
    return layer.to_out[0](y.transpose(1, 2).flatten(2))


def transformer(module, x, text, maps, reuse):
    """Self-attention, cross-attention and a feed-forward layer over the places of x (B, C, H, W)."""
    y = module.proj_in(module.norm(x)).flatten(2).transpose(1, 2)  # (B, H W, C)
    for block in module.transformer_blocks:
        y = y + attention(block.attn1, z := block.norm1(y), z, maps, reuse)
        y = y + attention(block.attn2, block.norm2(y), text, maps, reuse)
        y = y + block.ff(block.norm3(y))
    return x + module.proj_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


def layer(resnet, attend, x, time, text, maps, reuse):
    x = resnet(x, time)
    return x if attend is None else transformer(attend, x, text, maps, reuse)


def predict_noise(unet, x, t, text, maps, reuse):
    """The U-Net, from its own modules. Shapes: x (B, 4, h, w), text (B, M, D) -> (B, 4, h, w)."""
    t = torch.full((len(x),), float(t))
    time = unet.time_embedding(timestep_embedding(t, unet.config.block_out_channels[0]))
    skips = [x := unet.conv_in(x)]
    for block in unet.down_blocks:
        for resnet, attend in block.pairs():
            skips += [x := layer(resnet, attend, x, time, text, maps, reuse)]
        for down in block.downsamplers:
            skips += [x := down(x)]
    first, second = unet.mid_block.resnets
    x = second(layer(first, unet.mid_block.attentions[0], x, time, text, maps, reuse), time)
    for block in unet.up_blocks:
        for resnet, attend in block.pairs():
            x = layer(resnet, attend, torch.cat([x, skips.pop()], dim=1), time, text, maps, reuse)
        for up in block.upsamplers:
            x = up(x)
    return unet.conv_out(F.silu(unet.conv_norm_out(x)))


@torch.inference_mode()
def sample(pipe, plan):
    """DDIM with classifier-free guidance, on Stable Diffusion's grid and schedule. Returns (1, 4, h, w)."""
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)
    text, stride, maps = pipe.text.encode(["", PROMPT]), 1000 // STEPS, {}
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(SEED))
    for i, mark in enumerate(plan):
        t = stride * (STEPS - 1 - i) + 1  # 951, 901 ... 1
        unconditional, conditional = predict_noise(pipe.unet, x.repeat(2, 1, 1, 1), t, text, maps, mark == "#")
        eps = unconditional + GUIDANCE * (conditional - unconditional)
        now, then = alpha_bar[t], alpha_bar[max(t - stride, 0)]
        x_0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = then.sqrt() * x_0 + (1 - then).sqrt() * eps
    return x


@torch.inference_mode()
def main(folder):
    pipe, images = minireuse.load(device="cpu"), {}
    for name, plan in PLANS.items():
        images[name] = ((pipe.vae.decode(sample(pipe, plan))[0].clamp(-1, 1) + 1) * 127.5).round()
        Image.fromarray(images[name].permute(1, 2, 0).byte().numpy()).save(f"{folder}/{name}.png")
        error = (images[name] - images["full"]).square().mean()
        print(f"{name:6} {plan} {10 * torch.log10(255**2 / error):.1f} dB")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".")

"""DDIM inversion: from a picture to the noise that paints it; and a picture between two seeds."""

import torch

import minireuse
from minireuse.cache import ReuseCache
from minireuse.guidance import guided_denoise
from minireuse.plan import ReusePlan
from minireuse.samplers import ddim

pipe = minireuse.load()
schedule, steps = pipe.schedule, 50
prompt = "green hills with a lake at noon"


def denoiser():  # guidance 1, so that one pass of the U-Net is a call
    context = pipe.text.encode([prompt])
    plan = ReusePlan.nothing(steps)
    return guided_denoise(pipe.unet, context, schedule, plan, ReuseCache(), guidance_scale=1)


def slerp(a, b, share):
    """Between two noises, by the angle between them, so that the length stays that of noise."""
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


picture = pipe.generate(prompt, seeds=1, steps=steps, guidance_scale=1).latents
falling = schedule.timesteps(steps)
rising = [0, *reversed(falling[1:])]
with torch.inference_mode():
    *_, noisy = ddim(denoiser(), picture, schedule, rising, end=falling[0])
again = pipe.generate(prompt, latents=noisy.x, steps=steps, guidance_scale=1)
print((again.latents - picture).abs().mean().item(), "away from the picture")

one, two = (torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
between = pipe.generate(prompt, latents=slerp(one, two, 0.5), steps=steps)
print(between.images.shape)

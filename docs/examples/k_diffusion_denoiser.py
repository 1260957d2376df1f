"""A denoiser in the style of k-diffusion, (x, sigma) -> x_0, on the trajectory it was trained for."""

import torch

from minireuse.samplers import dpmpp_2m_sde, from_sigma_denoiser
from minireuse.schedule import EDM


def denoiser(x, sigma):  # exact for data of standard deviation 0.5
    return x * 0.25 / (0.25 + sigma.view(-1, 1, 1, 1) ** 2)


path = EDM(sigma_min=0.02, sigma_max=80.0)
x = path.sigma_max * torch.randn(64, 3, 8, 8)  # the caller scales the noise
for step in dpmpp_2m_sde(from_sigma_denoiser(denoiser, path), x, path, path.timesteps(50)):
    x = step.x
print(x.std().item())  # 0.5

"""A U-Net of diffusers, sampled by DPM-Solver++(2M)."""

import torch
from diffusers import UNet2DConditionModel

from minireuse.samplers import dpmpp_2m
from minireuse.schedule import Schedule

# In place of `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")` and of a text encoder's states:
unet = UNet2DConditionModel(block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
                            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip
text = torch.randn(1, 77, 16)

schedule = Schedule.from_config()  # Stable Diffusion's
noise = torch.randn(1, 4, 16, 16)
timesteps = schedule.timesteps(10, "karras")
with torch.no_grad():
    for step in dpmpp_2m(lambda x, t, call: unet(x, t, text).sample, noise, schedule, timesteps):
        print(step.call, step.t, step.x_0.std().item())

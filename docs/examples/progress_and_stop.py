"""A progress bar, and an early stop: a sampler is a generator, so the loop is yours."""

import torch
from tqdm import tqdm

from minireuse.samplers import ddim
from minireuse.schedule import Schedule

schedule = Schedule.from_config()
timesteps = schedule.timesteps(50)
previous = torch.zeros(1, 4, 16, 16)
steps = ddim(lambda x, t, call: schedule.sigma(t) * x, torch.randn(1, 4, 16, 16), schedule, timesteps)
for step in tqdm(steps, total=len(timesteps)):
    if (step.x_0 - previous).abs().mean() < 0.01 * step.x_0.abs().mean():
        break  # the estimate has settled
    previous = step.x_0
print(step.call + 1, "of", len(timesteps), "calls")

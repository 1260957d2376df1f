"""A trajectory of one's own: the cosine schedule, as a formula."""

import math

import torch

from minireuse.samplers import dpm_solver_3
from minireuse.schedule import point


class Cosine:
    end = 0.0

    def at(self, t):
        return point(t, math.cos(t * math.pi / 2), math.sin(t * math.pi / 2))

    def t_of_lambda(self, lambda_):
        return math.atan(math.exp(-lambda_)) * 2 / math.pi


path = Cosine()


def eps(x, t, call):  # exact for data of standard deviation 0.5
    at = path.at(t)
    return at.sigma * x / (at.alpha**2 * 0.25 + at.sigma**2)


x = torch.randn(64, 4, 8, 8)
for step in dpm_solver_3(eps, x, path, [0.99 - 0.05 * i for i in range(19)]):
    x = step.x
print(x.std().item())  # 0.5

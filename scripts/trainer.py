"""The training loop shared by the VAE and the U-Net: one file per run that can be killed at any moment.

Every random draw of a step is made from (seed, step), so a run that was interrupted and resumed sees the same data
and noise as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


class EMA:
    """An exponential moving average of a module's parameters, slow to start so that it forgets the initial ones."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in module.named_parameters():
            self.values[name].lerp_(p, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            p.copy_(self.values[name])


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, floor: float = 0.02) -> float:
    """Linear warm-up, then half a cosine down to `floor` of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    name: str,
    folder: Path,
    module: nn.Module,
    loss: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    peak_lr: float,
    ema_decay: float,
    weight_decay: float = 0.01,
    floor: float = 0.02,
    save_every: int = 250,
    report: Callable[[int], dict[str, float]] | None = None,
    report_every: int = 1000,
) -> None:
    """Minimise `loss(step)["loss"]` and leave the averaged weights in `module`; resumes from `folder/name.pt`.

    The learning rate falls from `peak_lr` to `floor` of it. `report` is called with the averaged weights in place and
    may write samples; what it returns is logged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    ema = EMA(module, ema_decay)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema.values = {k: v.to(ema.values[k].device) for k, v in state["ema"].items()}
        first = state["step"]
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name)
    running: dict[str, float] = {}
    started = time.time()
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr, floor=floor)
        terms = loss(step)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        ema.update(module, step)
        for key, value in {**terms, "grad": norm}.items():
            now = value.item()
            running[key] = 0.98 * running.get(key, now) + 0.02 * now
        bar.set_postfix({k: f"{v:.4f}" for k, v in running.items()})
        done = step + 1
        record = {"step": done, "seconds": round(time.time() - started, 1), **running}
        if report is not None and (done % report_every == 0 or done == steps):
            record |= with_average(module, ema, lambda done=done: report(done))
        if done % 50 == 0 or done == steps:
            with log.open("a") as f:
                f.write(json.dumps(record) + "\n")
        if done % save_every == 0 or done == steps:
            state = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.values,
                "step": done,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
    ema.copy_to(module)


def with_average(module: nn.Module, ema: EMA, action: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Run `action` with the averaged weights in place of the trained ones."""
    trained = {name: p.detach().clone() for name, p in module.named_parameters()}
    ema.copy_to(module)
    module.eval()
    try:
        with torch.no_grad():
            return action()
    finally:
        module.train()
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(trained[name])

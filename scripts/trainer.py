"""The training loop shared by the VAE and the U-Net: one file per run that can be killed at any moment.

Every random draw of a step is made from (seed, step), so a run that was interrupted and resumed sees the same data
and noise as one that was not.

Under `torchrun --nproc-per-node N` each of N processes takes its part of every batch (`part_of`) and their gradients
are averaged. On a processor two processes of one thread each are faster than one of two threads.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm


def join_processes() -> None:
    """Meet the other processes of a `torchrun`; alone, nothing."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")


def leave_processes() -> None:
    """Part from the other processes; alone, nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 of one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def in_turn(action: Callable[[], Any]) -> Any:
    """Run an action in one process after another, so that the others find what the first has written."""
    if not dist.is_initialized():
        return action()
    for turn in range(dist.get_world_size()):
        if turn == dist.get_rank():
            done = action()
        dist.barrier()
    return done


def part_of(batch: Sequence[Any]) -> Any:
    """This process's part of a batch: every N-th element. Raises: ValueError where the parts would differ in size."""
    if not dist.is_initialized():
        return batch
    if len(batch) % dist.get_world_size():
        raise ValueError(f"a batch of {len(batch)} does not divide among {dist.get_world_size()} processes")
    return batch[dist.get_rank() :: dist.get_world_size()]


def average_gradients(module: nn.Module) -> None:
    """Make every process's gradients the mean of all."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))


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
    leads = rank() == 0
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
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, disable=not leads)
    running: dict[str, float] = {}
    started = time.time()
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr, floor=floor)
        terms = loss(step)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        average_gradients(module)
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        ema.update(module, step)
        for key, value in {**terms, "grad": norm}.items():
            now = value.item()
            running[key] = 0.98 * running.get(key, now) + 0.02 * now
        bar.set_postfix({k: f"{v:.4f}" for k, v in running.items()})
        done = step + 1
        if not leads:
            continue
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
    if dist.is_initialized():
        dist.barrier()  # the next stage may read what the first process has just written


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

"""Render the same prompts and seeds under many plans, without computing twice what two plans share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from minireuse.cache import ReuseCache
from minireuse.pipeline import Pipeline
from minireuse.plan import ReusePlan, Site, StepPlan
from minireuse.samplers import Answer, Denoise, Prediction


def did(step: StepPlan) -> StepPlan:
    """What tells the results of two calls apart: not what is kept or dropped, but for maps, whose kernel differs."""
    maps = frozenset(site for site in step.store if site.kind == "map")
    return replace(step, store=maps, last=frozenset(), keep=frozenset())


def refill(plan: ReusePlan, first: int) -> set[int]:
    """The calls before `first` that must run again so that the cache holds what calls from `first` on read.

    A call that stores may itself read what an earlier one stored, so this goes backwards.
    """
    wanted: dict[
        Site, int
    ] = {}  # how many of the site's last values are still to be read: several where they make a curve
    again = set()
    for call in reversed(range(plan.calls)):
        step = plan.step(call)
        if call < first:
            if not any(wanted.get(site) for site in step.store):
                continue
            again.add(call)
        for site in step.store:
            wanted[site] = max(0, wanted.get(site, 0) - 1)
        weights = dict(step.weights)
        for site in step.reuse:
            wanted[site] = max(wanted.get(site, 0), 1 + len(weights.get(site, ())))
    return again


@dataclass
class Node:
    """One call of a trajectory, and what followed it: trajectories that begin alike share their nodes."""

    answer: Answer | None = None
    after: dict[StepPlan, Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the answer."""
        tensors = () if self.answer is None else self.answer if isinstance(self.answer, Prediction) else (self.answer,)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Renderer:
    """Images of a fixed set of prompts and seeds under any plan, with every shared beginning computed once.

    What the U-Net answered is kept along a tree of step plans. A new plan replays the kept answers through the sampler
    up to the first call that differs from all plans before it, refills the cache by running again the few calls whose
    tensors are still to be read, and goes on from there. Same operations on same inputs: the images are those of
    `Pipeline.generate`, to the last bit.

    memory: bytes of answers to keep; those not used for longest are dropped and computed again if needed.
    calls: U-Net calls made so far. naive_calls: what rendering each plan from noise would have made.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        sampler: str = "ddim",
        steps: int | Sequence[float] = 20,
        guidance_scale: float | None = None,
        cache_dtype: torch.dtype = torch.float16,
        memory: int = 2**29,
    ) -> None:
        self.pipeline, self.prompts, self.seeds = pipeline, list(prompts), list(seeds)
        self.sampler, self.steps, self.guidance_scale = sampler, steps, guidance_scale
        self.cache_dtype = cache_dtype
        self.memory = memory
        self.calls = 0
        self.naive_calls = 0
        self._roots: dict[tuple[int, ...], Node] = {}  # by the numbers of the prompts that are rendered
        self._used: dict[int, Node] = {}  # nodes with an answer, in the order of their last use

    def __call__(self, plan: ReusePlan, prompts: Sequence[int] | None = None) -> np.ndarray:
        """prompts: the numbers of those to render; None is all of them. Shapes: -> (B, H, W, 3) uint8."""
        plan = plan.on(self.pipeline.sites)
        chosen = tuple(range(len(self.prompts)) if prompts is None else prompts)
        path, first = self._follow(plan, chosen)
        again = refill(plan, first)

        def memory(denoise: Denoise) -> Denoise:
            def remember(x: Tensor, t: float, call: int) -> Answer:
                kept = path[call].answer
                if kept is not None and call < first and call not in again:
                    return kept
                self.calls += 1
                path[call].answer = answer = denoise(x, t, call)
                return answer

            return remember

        result = self.pipeline.generate(
            [self.prompts[i] for i in chosen],
            seeds=[self.seeds[i] for i in chosen],
            steps=self.steps,
            sampler=self.sampler,
            guidance_scale=self.guidance_scale,
            plan=plan,
            cache=ReuseCache(self.cache_dtype),
            wrap=memory,
        )
        self.naive_calls += plan.calls
        self._forget(path)
        return result.images

    def _forget(self, path: list[Node]) -> None:
        """Drop the answers that were not used for longest, beyond the memory allowed; never those of this path."""
        for node in path:
            self._used.pop(id(node), None)
            self._used[id(node)] = node
        held = sum(node.nbytes for node in self._used.values())
        for key, node in list(self._used.items())[: -len(path)]:
            if held <= self.memory:
                break
            held -= node.nbytes
            self._used.pop(key).answer = None

    def _follow(self, plan: ReusePlan, prompts: tuple[int, ...]) -> tuple[list[Node], int]:
        """The plan's nodes, and the first call that no plan before has made in the same way."""
        node, path, first = self._roots.setdefault(prompts, Node()), [], 0
        for call in range(plan.calls):
            node = node.after.setdefault(did(plan.step(call)), Node())
            path.append(node)
            if node.answer is not None and first == call:
                first = call + 1
        return path, first

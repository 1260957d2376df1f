"""The published packages next to our plans, on one model: `python scripts/compare_peers.py --out runs/peers`.

DeepCache, T-GATE and ToMe run through diffusers on the very same weights, prompts, seeds and initial latents, in one
process, in turn with ours. Needs `pip install -e ".[peers,eval]"`. Images are compared with our full sampler's, which
diffusers' plain pipeline has to match (its row shows how well). In the table of gaps a package's time is a fraction of
plain diffusers' time and ours of our own full sampler's, so that neither gains by the other's overhead.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import minireuse
from minireuse.cache import ReuseCache
from minireuse.common.journal import Journal
from minireuse.common.metrics import fidelity, interval, ssim
from minireuse.common.status import exit_status
from minireuse.common.timing import seconds_of
from minireuse.evaluate.command import SEED, picture, save_pictures, timed_rounds
from minireuse.evaluate.report import fraction, summarise, write_report
from minireuse.files import read_lines, shipped_model, write_whole
from minireuse.plan import ReusePlan
from minireuse.policies import RELATIVES
from minireuse.search.language import build, names_in, policies_for

OURS = (
    "hurry",
    *(f"phast:kind={kind},k={k}" for kind in ("map", "out", "deep") for k in (5, 10, 15)),
    *(f"phast:kind=deep,order=1,k={k}" for k in (3, 6, 8, 10, 12, 13, 15)),
    *(f"phast:kind=deep,branch={branch},order=1,k={k}" for branch, k in ((2, 10), (4, 10), (4, 11))),
    "interval:kind=deep,order=1",
    *(f"interval:kind=deep,branch={branch},order=1" for branch in (2, 3, 4)),
    "deepcache",
    "deepcache:branch=2",
    "deepcache:branch=4",
    "deepcache:every=3",
    "tgate",
    *(f"steps:{n}" for n in range(18, 7, -1)),
    "steps:16+phast:kind=deep",
    "steps:14+phast:kind=deep",
    "steps:18+phast:kind=deep,order=1",
    "steps:16+phast:kind=deep,order=1",
)
LATENCIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the full sampler's time


@dataclass(frozen=True)
class Runner:
    """One way to sample: prompts and initial latents (B, 4, h, w) to images (B, H, W, 3)."""

    sample: Callable[[Sequence[str], Tensor], np.ndarray]
    plan: ReusePlan | None = None  # None for the packages, which have no plan to show
    calls: int = 0
    full: str = "none"  # the full sampler that its time is a fraction of
    note: str = ""


def ours(pipe: minireuse.Pipeline, text: str, steps: int, model: Path | None) -> Runner:
    """A policy, `steps:N` for the plain sampler with N steps, or `steps:N+POLICY` for both."""
    fewer, _, policy = text.partition("+") if text.startswith("steps:") else ("", "", text)
    steps, policy = int(fewer.removeprefix("steps:") or steps), policy or "none"
    policies = policies_for(policy, model, "ddim", lambda: pipe.fingerprint)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plan = build(policy, pipe.calls("ddim", steps), pipe.sites, policies=policies).on(pipe.sites)

    def sample(prompts: Sequence[str], latents: Tensor) -> np.ndarray:
        return pipe.generate(prompts, steps=steps, plan=plan, latents=latents, cache=ReuseCache()).images

    return Runner(sample, plan, plan.calls, note="; ".join(str(w.message) for w in said))


def peers(ours: minireuse.Pipeline, folder: Path, steps: int) -> dict[str, Runner]:
    """The packages, each on a pipeline of its own, since they change what they are given; the images by our VAE."""
    import tomesd
    from DeepCache import DeepCacheSDHelper
    from tgate import TgateSDLoader

    def fresh() -> diffusers.StableDiffusionPipeline:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(ours.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def runner(call: Callable[..., Any], **settings: Any) -> Runner:
        def sample(prompts: Sequence[str], latents: Tensor) -> np.ndarray:
            options = {"num_inference_steps": steps, "latents": latents.to(ours.device), "output_type": "latent"}
            options["guidance_scale"] = ours.guidance_scale
            return ours.to_images(call(list(prompts), **options, **settings).images)

        return Runner(sample, calls=steps, full="diffusers")

    def deepcached(pipe: diffusers.StableDiffusionPipeline, every: int, branch: int = 0) -> Runner:
        helper = DeepCacheSDHelper(pipe=pipe)
        number = package_branch(branch, ours.unet.config.layers_per_block)
        helper.set_params(cache_interval=every, cache_branch_id=number)
        helper.enable()
        return runner(pipe)

    made = {"diffusers": runner(fresh())}
    for every, branch in ((2, 0), (3, 0), (5, 0), (2, 2), (2, 4)):
        name = f"DeepCache, interval {every}" + f", branch {branch}" * (branch > 0)
        made[name] = deepcached(fresh(), every, branch)
    gated = TgateSDLoader(fresh())
    settings = {"sp_interval": 5, "fi_interval": 1, "warm_up": 2}
    made[f"T-GATE, gate {steps // 2}"] = runner(gated.tgate, gate_step=steps // 2, **settings)
    for ratio in (0.25, 0.5):
        pipe = fresh()
        tomesd.apply_patch(pipe, ratio=ratio)
        made[f"ToMe, ratio {ratio}"] = runner(pipe)
    both = fresh()
    tomesd.apply_patch(both, ratio=0.5)
    return made | {"DeepCache, interval 2, with ToMe, ratio 0.5": deepcached(both, 2)}


def package_branch(branch: int, layers: int) -> int:
    """The number that the package DeepCache gives to our branch: it counts three to each block, whatever it has."""
    return 3 * (branch // (layers + 1)) + branch % (layers + 1)


def is_own(name: str) -> bool:
    """Whether a row of `--ours` is a plan of this project's: no published relative, no plain sampler."""
    policy = name.partition("+")[2] if name.startswith("steps:") else name
    return not any(term in (*RELATIVES, "none", "") for term in names_in(policy))


def gaps(rows: dict[str, dict[str, Any]], own: Sequence[str]) -> str:
    """At each latency the best of our plans that is as fast, and the best of all others: packages, and fewer steps."""
    times = {name: fraction(row, rows[row["full"]]) for name, row in rows.items()}
    lines = ["| within | ours | dB | best other | dB | gap, dB [95 %] |", "|---|---|---|---|---|---|"]
    for latency in LATENCIES:
        fast = [name for name, time in times.items() if time <= latency]
        sides = [[n for n in fast if n in own], [n for n in fast if n not in own]]
        best = [max(side, key=lambda n: float(np.mean(rows[n]["psnr"])), default=None) for side in sides]
        cells = ["none is as fast | " if n is None else f"`{n}` | {np.mean(rows[n]['psnr']):.1f}" for n in best]
        gap = ""
        if best[0] is not None and best[1] is not None:
            gain = np.subtract(rows[best[0]]["psnr"], rows[best[1]]["psnr"])
            low, high = interval(gain)
            gap = f"{gain.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
        lines.append(f"| {latency} of the time | {cells[0]} | {cells[1]} | {gap} |")
    return "\n".join(lines) + "\n"


def noise(pipe: minireuse.Pipeline, seeds: Sequence[int]) -> Tensor:
    """The initial latents of these seeds, as `Pipeline.generate` draws them."""
    config = pipe.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def render(
    out: Path, runners: dict[str, Runner], prompts: Sequence[str], start: int, size: int, pipe: minireuse.Pipeline
) -> dict[str, dict[str, list[float]]]:
    """Pictures of a few prompts by every runner, and how close they are to the first one's: ours without reuse."""
    batch, found, reference = prompts[start : start + size], {}, None
    latents = noise(pipe, range(SEED + start, SEED + start + len(batch)))
    for name, runner in runners.items():
        images = runner.sample(batch, latents)
        reference = images if reference is None else reference
        found[name] = {"psnr": fidelity(images, reference).tolist(), "ssim": ssim(images, reference).tolist()}
        save_pictures(out, name, start, images)
    return found


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a diffusers folder; default: the shipped model")
    parser.add_argument("--prompts-file", type=Path, help="default: the shipped evaluation prompts")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ours", nargs="+", default=list(OURS), metavar="POLICY")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args(argv)
    if (args.out / "results.json").exists():
        raise ValueError(f"{args.out} holds results already; name a new folder, or remove it first")

    pipe = minireuse.load(args.model, dtype="float32")
    prompts = read_lines(args.prompts_file or shipped_model() / "prompts" / "evaluation.txt")[: args.prompts]
    runners = {name: ours(pipe, name, args.steps, args.model) for name in dict.fromkeys(["none", *args.ours])}
    runners |= peers(pipe, args.model or shipped_model(), args.steps)

    settings = {"model": pipe.fingerprint, "steps": args.steps, "prompts": prompts, "batch_size": args.batch_size}
    settings["plans"] = {n: [r.calls, None if r.plan is None else r.plan.to_json()] for n, r in runners.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.out / "journal.jsonl", settings)
    rows: dict[str, dict[str, Any]] = {}
    for name, runner in runners.items():
        grid = None if runner.plan is None else runner.plan.grid
        reused = "" if runner.plan is None else runner.plan.reused
        about = {"plan": grid, "calls": runner.calls, "reused": reused, "full": runner.full, "note": runner.note}
        rows[name] = about | {"psnr": [], "ssim": [], "follows": [None], "seconds": []}
    for start in tqdm(range(0, len(prompts), args.batch_size), desc="render"):
        work = partial(render, args.out, runners, prompts, start, args.batch_size, pipe)
        for name, found in journal.known(f"render {start}", work).items():
            rows[name]["psnr"] += found["psnr"]
            rows[name]["ssim"] += found["ssim"]
    latents = noise(pipe, [SEED])
    # Seconds of one image from its prompt to its pixels.
    works = {name: partial(seconds_of, partial(r.sample, prompts[:1], latents)) for name, r in runners.items()}
    for found in timed_rounds(journal, args.rounds, works):
        for name, seconds in found.items():
            rows[name]["seconds"].append(seconds)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    results = {"steps": args.steps, "prompts": prompts, "versions": versions, "rows": rows, "equal_latency": {}}
    pictures = {name: picture(args.out, name, 0).parent for name in runners}
    compared = gaps(rows, list(filter(is_own, args.ours)))
    print(write_report(args.out, summarise(results, "none"), pictures, prompts) + "\n" + compared)
    write_whole([args.out / "gaps.md"], compared.encode())
    write_whole([args.out / "results.json"], json.dumps(results, indent=1).encode())


if __name__ == "__main__":
    sys.exit(exit_status(main, "interrupted; the same command goes on from the journal"))

"""What `--policy phast` chooses against all others at equal time: `python scripts/compare_peers.py --out peers`.

At each rung, a share of the full sampler's time, the plan that `phast` chooses for it stands against the best of all
others that are as fast: the packages DeepCache, T-GATE and ToMe and what of them can be joined, fewer steps of two
samplers, and the best DDIM on some of the same timesteps. All are compared with the full sampler's image on the same
grid of timesteps, of which there are two.

The packages run through diffusers on the very same weights, prompts, seeds and initial latents, in one process, in turn
with ours. diffusers' plain pipeline has to match our full sampler (its row shows how well). A package's time is a
fraction of plain diffusers' time and ours of our own full sampler's, so that neither gains by the other's overhead.
Needs `pip install -e ".[peers,eval]"`. Results go into journals: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
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
from minireuse.evaluate.report import FULL, fraction, markdown, summarise, write_report
from minireuse.files import parse_json, read_prompts, shipped_model, write_whole
from minireuse.plan import PREDICTION, ReusePlan
from minireuse.policies import interval as even
from minireuse.samplers import SAMPLERS
from minireuse.search import Renderer, build, policies_for

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNGS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the full sampler's time
SPACINGS = ("leading", "trailing")
MARGIN = 0.01  # of the full sampler's time, by which others may be slower than the rung: times are not exact
# The families of the plot, and how the names of their rows begin: joined packages are in that of the first they name.
FAMILIES = {
    "DeepCache": "DeepCache",
    "T-GATE": "T-GATE",
    "ToMe": "ToMe",
    "fewer steps, ddim": "steps:",
    "fewer steps, dpmpp_2m": "dpmpp_2m:",
    "best of the same timesteps": "timesteps:",
}
Rows = dict[str, dict[str, Any]]  # what was measured, by name


@dataclass(frozen=True)
class Runner:
    """One way to sample: prompts and initial latents (B, 4, h, w) to images (B, H, W, 3)."""

    sample: Callable[[Sequence[str], Tensor], np.ndarray]
    plan: ReusePlan | None = None  # None for the packages, which have no plan to show
    calls: int = 0
    full: str = FULL  # the full sampler that its time is a fraction of
    note: str = ""


def following(pipe: minireuse.Pipeline, plan: ReusePlan, steps: int, sampler: str = "ddim", note: str = "") -> Runner:
    """A plan of ours."""

    def sample(prompts: Sequence[str], latents: Tensor) -> np.ndarray:
        run = {"steps": steps, "sampler": sampler, "plan": plan, "latents": latents, "cache": ReuseCache()}
        return pipe.generate(prompts, **run).images  # type: ignore[arg-type]

    return Runner(sample, plan, plan.calls, note=note)


def ours(pipe: minireuse.Pipeline, text: str, steps: int, model: Path | None) -> Runner:
    """A policy; or the plain sampler with fewer steps: `steps:N` of ddim, or `dpmpp_2m:N`."""
    sampler, _, count = text.replace("steps:", "ddim:").partition(":")
    if sampler in SAMPLERS:
        return following(pipe, ReusePlan.nothing(pipe.calls(sampler, int(count))), int(count), sampler)
    policies = policies_for(text, model, "ddim", lambda: pipe.fingerprint, pipe.schedule.spacing)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plan = build(text, pipe.calls("ddim", steps), pipe.sites, policies=policies).on(pipe.sites)
    return following(pipe, plan, steps, note="; ".join(str(w.message) for w in said))


def peers(ours: minireuse.Pipeline, folder: Path, steps: int) -> dict[str, Runner]:
    """The packages, each with a U-Net of its own, since they change what they are given; the images by our VAE."""
    import tomesd
    from DeepCache import DeepCacheSDHelper
    from tgate import TgateSDDeepCacheLoader, TgateSDLoader

    read = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(ours.device)
    spacing = {"timestep_spacing": ours.schedule.spacing}
    scheduler = diffusers.DDIMScheduler.from_config(read.scheduler.config, **spacing)

    def fresh(merged: float = 0) -> diffusers.StableDiffusionPipeline:
        own = {"unet": deepcopy(read.unet), "scheduler": deepcopy(scheduler)}
        pipe = diffusers.StableDiffusionPipeline(**(read.components | own), requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return tomesd.apply_patch(pipe, ratio=merged) if merged else pipe

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

    def gated(pipe: diffusers.StableDiffusionPipeline, gate: int) -> Runner:
        return runner(pipe.tgate, gate_step=gate, sp_interval=5, fi_interval=1, warm_up=2)

    made = {"diffusers": runner(fresh())}
    for every, branch in ((2, 0), (3, 0), (5, 0), (2, 2), (3, 2), (2, 4)):
        name = f"DeepCache, interval {every}" + f", branch {branch}" * (branch > 0)
        made[name] = deepcached(fresh(), every, branch)
    for gate in dict.fromkeys(max(1, steps * quarters // 4) for quarters in (1, 2, 3)):
        made[f"T-GATE, gate {gate}"] = gated(TgateSDLoader(fresh()), gate)
    for ratio in (0.25, 0.5):
        made[f"ToMe, ratio {ratio}"] = runner(fresh(ratio))
    gate = steps // 2
    for every in (2, 3, 5):
        made[f"DeepCache, interval {every}, with ToMe, ratio 0.5"] = deepcached(fresh(0.5), every)
        joined = TgateSDDeepCacheLoader(fresh(), cache_interval=every, cache_branch_id=0)
        made[f"T-GATE, gate {gate}, with DeepCache, interval {every}"] = gated(joined, gate)
    made[f"T-GATE, gate {gate}, with ToMe, ratio 0.5"] = gated(TgateSDLoader(fresh(0.5)), gate)
    return made


def package_branch(branch: int, layers: int) -> int:
    """The number that the package DeepCache gives to our branch: it counts three to each block, whatever it has."""
    return 3 * (branch // (layers + 1)) + branch % (layers + 1)


# --- DDIM on some of the same timesteps -------------------------------------------------------------------------------


def neighbours(row: Sequence[bool]) -> list[tuple[bool, ...]]:
    """Every row in which one reuse call has changed places with a computing one beside it, never call 0."""
    places = (i for i in range(1, len(row) - 1) if row[i] != row[i + 1])
    return [(*row[:i], row[i + 1], row[i], *row[i + 2 :]) for i in places]


def best_timesteps(calls: int, k: int, score: Callable[[ReusePlan], float]) -> ReusePlan:
    """The best DDIM on all but k of the same timesteps: of the even choice and what one exchange makes of it.

    A prediction that is held skips its call, and under DDIM two steps with one prediction are one step over both.
    score: of a plan, on prompts that nothing is compared on; larger is better.
    """
    row = [bool(cell) for cell in even(calls, [PREDICTION], k=k).mask[:, 0]]
    return max((ReusePlan.stepwise(moved, [PREDICTION]) for moved in (row, *neighbours(row))), key=score)


def sub_grids(
    pipe: minireuse.Pipeline, steps: int, rungs: Sequence[float], prompts: Sequence[str], journal: Journal
) -> dict[str, Runner]:
    """The best choice of as many timesteps as each rung has time for. prompts: to choose by."""
    calls = pipe.calls("ddim", steps)
    render = Renderer(pipe, prompts, range(len(prompts)), steps=steps)
    reference = cache(partial(render, ReusePlan.nothing(calls)))
    score = lambda plan: float(fidelity(render(plan), reference()).mean())  # noqa: E731
    made = {}
    for count in tqdm(dict.fromkeys(fitting(calls, rung) for rung in rungs), desc="timesteps"):
        work = partial(lambda k: best_timesteps(calls, k, score).grid, calls - count)
        grid = journal.known(f"timesteps {count}", work)
        plan = ReusePlan.stepwise([cell == "#" for cell in grid], [PREDICTION])
        made[f"timesteps:{count}"] = following(pipe, plan, steps)
    return made


def fitting(calls: int, rung: float) -> int:
    """How many of these calls take at most this share of their time."""
    return max(1, int(calls * rung + 1e-9))


# --- measuring --------------------------------------------------------------------------------------------------------


def noise(pipe: minireuse.Pipeline, seeds: Sequence[int]) -> Tensor:
    """The initial latents of these seeds, as `Pipeline.generate` draws them."""
    config = pipe.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def render(
    out: Path, runners: Mapping[str, Runner], prompts: Sequence[str], start: int, size: int, pipe: minireuse.Pipeline
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


def measure(
    args: argparse.Namespace, out: Path, pipe: minireuse.Pipeline, prompts: Sequence[str], calibration: Sequence[str]
) -> tuple[Rows, dict[float, str]]:
    """Everything on the grid of this pipeline, and the name of our row for each rung. Pictures go to `out`."""
    runners = {FULL: ours(pipe, FULL, args.steps, args.model)}
    chosen: dict[float, str] = {}
    for rung in args.rungs:
        runner = ours(pipe, f"phast:latency={rung}", args.steps, args.model)
        # One plan may be the best for several rungs.
        chosen[rung] = next((n for n, r in runners.items() if r.plan == runner.plan), f"phast:latency={rung}")
        runners.setdefault(chosen[rung], runner)
    others = fewer_steps(args.steps, args.rungs) if args.others is None else args.others
    runners |= {name: ours(pipe, name, args.steps, args.model) for name in others}
    settings = {"model": pipe.fingerprint, "steps": args.steps, "prompts": prompts, "batch_size": args.batch_size}
    settings |= {"calibration": calibration, "spacing": pipe.schedule.spacing}
    settings["plans"] = {n: [r.calls, None if r.plan is None else r.plan.to_json()] for n, r in runners.items()}
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "journal.jsonl", settings)
    runners |= sub_grids(pipe, args.steps, args.rungs, calibration, journal)
    runners |= peers(pipe, args.model or shipped_model(), args.steps)

    rows: Rows = {}
    for name, runner in runners.items():
        grid = None if runner.plan is None else runner.plan.grid
        reused = "" if runner.plan is None else runner.plan.reused
        about = {"plan": grid, "calls": runner.calls, "reused": reused, "full": runner.full, "note": runner.note}
        rows[name] = about | {"psnr": [], "ssim": [], "follows": [None], "seconds": []}
    for start in tqdm(range(0, len(prompts), args.batch_size), desc=f"{pipe.schedule.spacing}, render"):
        work = partial(render, out, runners, prompts, start, args.batch_size, pipe)
        for name, found in journal.known(f"render {start}", work).items():
            rows[name]["psnr"] += found["psnr"]
            rows[name]["ssim"] += found["ssim"]
    latents = noise(pipe, [SEED])
    # Seconds of one image from its prompt to its pixels.
    works = {name: partial(seconds_of, partial(r.sample, prompts[:1], latents)) for name, r in runners.items()}
    for found in timed_rounds(journal, args.rounds, works):
        for name, seconds in found.items():
            rows[name]["seconds"].append(seconds)
    pictures = {name: picture(out, name, 0).parent for name in runners}
    write_report(out, summarise({"rows": rows, "equal_latency": {}}, FULL), pictures, prompts)
    return rows, chosen


def fewer_steps(steps: int, rungs: Sequence[float]) -> list[str]:
    """Two samplers with every smaller number of steps that a rung may have time for."""
    fewest = max(1, fitting(steps, min(rungs)) - 1)
    return [f"{name}:{n}" for name in ("steps", "dpmpp_2m") for n in range(steps - 1, fewest - 1, -1)]


# --- what was found ---------------------------------------------------------------------------------------------------


def family(name: str) -> str | None:
    """What a row of the others belongs to; None for plans of ours and for full samplers."""
    return next((family for family, begins in FAMILIES.items() if name.startswith(begins)), None)


def climb(rows: Rows, chosen: Mapping[float, str]) -> list[dict[str, Any]]:
    """At each rung our plan, the best of the others that take no more time, and the paired difference over prompts.

    chosen: the name of our row for each rung. Where our plan is slower than the rung, others may be as slow.
    """
    times = {name: fraction(row, rows[row["full"]]) for name, row in rows.items()}
    found = []
    for rung, own in chosen.items():
        limit = max(rung, times[own]) + MARGIN
        fast = [n for n in rows if n not in (*chosen.values(), rows[n]["full"]) and times[n] <= limit]
        mean = {name: float(np.mean(rows[name]["psnr"])) for name in (own, *fast)}
        at: dict[str, Any] = {"rung": rung, "ours": own, "time": times[own], "psnr": mean[own]}
        at["families"] = {f: max((mean[n] for n in fast if family(n) == f), default=None) for f in FAMILIES}
        if fast:
            other = max(fast, key=mean.__getitem__)
            gain = np.subtract(rows[own]["psnr"], rows[other]["psnr"])
            at |= {"other": other, "other_time": times[other], "other_psnr": mean[other]}
            at |= {"gap": float(gain.mean()), "gap_interval": interval(gain)}
        found.append(at)
    return found


def gaps(rungs: Mapping[str, list[dict[str, Any]]]) -> str:
    """A table for each grid: what `climb` found."""
    head = ["within", "ours", "time", "dB", "best other", "time", "dB", "gap, dB [95 %]"]
    parts = []
    for spacing, found in rungs.items():
        body = []
        for at in found:
            cells = [f"{at['rung']} of the time", f"`{at['ours']}`", f"{at['time']:.2f}", f"{at['psnr']:.1f}"]
            if "other" in at:
                low, high = at["gap_interval"]
                cells += [f"`{at['other']}`", f"{at['other_time']:.2f}", f"{at['other_psnr']:.1f}"]
                cells += [f"{at['gap']:+.1f} [{low:+.1f}, {high:+.1f}]"]
            else:
                cells += ["none is as fast", "", "", ""]
            body.append(cells)
        parts.append(f"### {spacing}\n\n" + markdown(head, body))
    return "\n".join(parts)


def plot(rungs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """At each rung the best of every family that is as fast: a panel for each grid."""
    figure, axes = plt.subplots(1, len(rungs), figsize=(5 * len(rungs), 4.2), sharey=True, squeeze=False)  # inches
    for axis, (spacing, found) in zip(axes.flat, rungs.items(), strict=True):
        places = [at["rung"] for at in found]
        for i, name in enumerate(FAMILIES):
            values = [np.nan if at["families"][name] is None else at["families"][name] for at in found]
            axis.plot(places, values, marker="os^vDP"[i], markersize=4, color=f"C{i}", label=name)
        axis.plot(places, [at["psnr"] for at in found], "k*-", label="`--policy phast`")
        axis.set(title=spacing)
        axis.grid(alpha=0.3)
    figure.supxlabel("time, as a fraction of the full sampler's", fontsize="medium")
    figure.supylabel("PSNR to the full sampler's image, dB", fontsize="medium")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def report(out: Path, results: Mapping[str, Any]) -> None:
    """Write gaps.md and gaps.png from what `results.json` holds."""
    text = gaps(results["rungs"])
    write_whole([out / "gaps.md"], text.encode(), overwrite=True)
    plot(results["rungs"], out / "gaps.png")
    print(text)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a diffusers folder; default: the shipped model")
    parser.add_argument("--prompts-file", type=Path, help="default: the shipped evaluation prompts")
    parser.add_argument("--prompts", type=int, default=40)
    calibration_help = (
        "prompts by which the best of the same timesteps are chosen; default: the shipped calibration prompts"
    )
    parser.add_argument("--calibration-file", type=Path, help=calibration_help)
    parser.add_argument("--calibration", type=int, default=4, metavar="N", help="number of those prompts")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rungs", type=float, nargs="+", default=list(RUNGS), metavar="R")
    parser.add_argument("--spacings", nargs="+", choices=SPACINGS, default=list(SPACINGS))
    others_help = (
        "what else stands against phast; default: steps:N and dpmpp_2m:N, with each N that a rung has time for"
    )
    parser.add_argument("--others", nargs="+", metavar="POLICY", help=others_help)
    parser.add_argument("--plot-only", action="store_true", help="tables and plot again, from results.json in --out")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args(argv)
    path = args.out / "results.json"
    if args.plot_only:
        return report(args.out, parse_json(path.read_text(encoding="utf-8")))
    if path.exists():
        raise ValueError(f"{args.out} holds results already; name a new folder, or remove it first")
    prompts = read_prompts(args.prompts_file, args.model, "evaluation", args.prompts, "--prompts")
    calibration = read_prompts(args.calibration_file, args.model, "calibration", args.calibration, "--calibration")
    pipe = minireuse.load(args.model, dtype="float32")
    rows: dict[str, Rows] = {}
    rungs: dict[str, list[dict[str, Any]]] = {}
    for spacing in args.spacings:
        on_grid = replace(pipe, schedule=replace(pipe.schedule, spacing=spacing))
        rows[spacing], chosen = measure(args, args.out / spacing, on_grid, prompts, calibration)
        rungs[spacing] = climb(rows[spacing], chosen)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    results = {"steps": args.steps, "prompts": prompts, "versions": versions, "rungs": rungs, "rows": rows}
    report(args.out, results)
    write_whole([path], json.dumps(results, indent=1).encode())


if __name__ == "__main__":
    sys.exit(exit_status(main, "interrupted; the same command goes on from the journal"))

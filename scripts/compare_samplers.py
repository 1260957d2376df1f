"""Solvers at equal calls on every grid: `python scripts/compare_samplers.py --out runs/samplers`.

Each cell is the mean PSNR of a few prompts to 200 DDIM steps of the same spacing, from the same noise. Beside our
deterministic solvers stands diffusers' DPM-Solver++(2M), asked for the same number of calls on grids of its own. Needs
`pip install -e ".[peers,eval]"`. Results go into a journal: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import minireuse
from minireuse.cache import ReuseCache
from minireuse.common.journal import Journal
from minireuse.common.metrics import fidelity
from minireuse.common.status import exit_status
from minireuse.evaluate.command import SEED, picture, save_pictures
from minireuse.evaluate.report import markdown
from minireuse.files import parse_json, read_prompts, shipped_model, write_whole
from minireuse.guidance import guided_denoise
from minireuse.plan import ReusePlan
from minireuse.samplers import SAMPLERS, Denoise, Prediction, ddim, timesteps_for
from minireuse.schedule import SPACINGS, Schedule

from compare_peers import noise

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REFERENCE_STEPS = 200
CALLS = (4, 5, 6, 8, 10, 15, 20, 50)
OURS = ("ddim", "dpmpp_2m", "dpmpp_2s", "plms", "dpm_solver_2", "dpm_solver_3")
THEIRS = "diffusers' 2M"
THEIR_GRIDS: dict[str, dict[str, Any]] = {
    **{spacing: {"timestep_spacing": spacing} for spacing in ("leading", "trailing", "linspace")},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}
CLOSE = 0.5  # dB below ddim that count as no worse

Found = dict[str, dict[str, dict[int, list[float]]]]  # spacing -> solver -> calls -> PSNR of each prompt
Run = Callable[[Denoise, Tensor], Tensor]  # from noise to latents, (B, 4, h, w) both


def our_run(name: str, schedule: Schedule, timesteps: list[float]) -> Run:
    def run(denoise: Denoise, x: Tensor) -> Tensor:
        *_, last = SAMPLERS[name](denoise, x, schedule, timesteps)
        return last.x

    return run


def their_run(schedule: Schedule, calls: int, spacing: str) -> Run:
    """DPMSolverMultistepScheduler with our table of alpha-bar, ending where ours ends."""
    table = schedule.alphas_cumprod
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=len(table),
        trained_betas=(1 - table / torch.cat([torch.ones(1), table[:-1]])).tolist(),
        steps_offset=schedule.offset,
        final_sigmas_type="zero" if schedule.last_alpha_cumprod == 1 else "sigma_min",
        **THEIR_GRIDS[spacing],
    )

    def run(denoise: Denoise, x: Tensor) -> Tensor:
        scheduler.set_timesteps(calls)
        for call, t in enumerate(scheduler.timesteps):
            answer = denoise(x, t.item(), call)
            x = scheduler.step(answer.eps if isinstance(answer, Prediction) else answer, t, x).prev_sample
        return x

    return run


def cells(schedule: Schedule, spacing: str, calls: list[int]) -> Iterator[tuple[str, int, Run]]:
    """Every solver at every number of calls that it can make: its name, the calls, the run."""
    for n in calls:
        for name in OURS:
            try:
                timesteps = timesteps_for(SAMPLERS[name], schedule, n, spacing)
            except ValueError:
                continue  # such as an odd number of calls, two to a step
            yield name, n, our_run(name, schedule, timesteps)
        if spacing in THEIR_GRIDS:
            yield THEIRS, n, their_run(schedule, n, spacing)


def reference(
    out: Path, spacing: str, journal: Journal, pipe: minireuse.Pipeline, denoise: Denoise, x: Tensor
) -> np.ndarray:
    """The images of many DDIM steps on this grid, kept as pictures. Shapes: -> (B, H, W, 3) uint8."""

    def work() -> bool:
        timesteps = pipe.schedule.timesteps(REFERENCE_STEPS, spacing)
        *_, last = ddim(denoise, x, pipe.schedule, timesteps)
        save_pictures(out, spacing, 0, pipe.to_images(last.x))
        return True

    journal.known(f"{spacing}/reference", work)
    return np.stack([np.array(Image.open(picture(out, spacing, i))) for i in range(len(x))])


def measure(args: argparse.Namespace, pipe: minireuse.Pipeline, prompts: list[str]) -> Found:
    settings = {"model": pipe.fingerprint, "guidance_scale": pipe.guidance_scale, "prompts": prompts}
    journal = Journal(args.out / "journal.jsonl", settings)
    guided = pipe.guidance_scale != 1
    context = pipe.text.encode([*[""] * (len(prompts) * guided), *prompts])
    plan = ReusePlan.nothing(max(REFERENCE_STEPS, *args.calls))
    denoise = guided_denoise(pipe.unet, context, pipe.schedule, plan, ReuseCache(), guidance_scale=pipe.guidance_scale)
    x = noise(pipe, range(SEED, SEED + len(prompts))).to(pipe.device)
    found: Found = {}
    for spacing in args.spacings:
        expected = reference(args.out, spacing, journal, pipe, denoise, x)

        def closeness(run: Run, expected: np.ndarray = expected) -> list[float]:
            return fidelity(pipe.to_images(run(denoise, x)), expected).tolist()

        for name, n, run in tqdm(list(cells(pipe.schedule, spacing, args.calls)), desc=spacing):
            values = journal.known(f"{spacing}/{name}/{n}", partial(closeness, run))
            found.setdefault(spacing, {}).setdefault(name, {})[n] = values
    return found


# --- tables and the plot ----------------------------------------------------------------------------------------------


def table(found: Found) -> str:
    """One table for each spacing: mean PSNR in dB, a row for each number of calls."""
    parts = []
    for spacing, solvers in found.items():
        calls = sorted({n for values in solvers.values() for n in values})
        names = [name for name in (*OURS, THEIRS) if name in solvers]
        body = [[str(n), *(f"{np.mean(solvers[s][n]):.1f}" if n in solvers[s] else "" for s in names)] for n in calls]
        parts.append(f"### {spacing}\n\n" + markdown(["calls", *(f"`{name}`" for name in names)], body))
    return "\n".join(parts)


def close_from(values: dict[int, list[float]], plain: dict[int, list[float]]) -> str:
    """The number of calls from which on, as far as was measured, these values are at most `CLOSE` below ddim's."""
    both = sorted(values.keys() & plain.keys(), reverse=True)
    first = "never" if both else ""
    for n in both:
        if np.mean(values[n]) < np.mean(plain[n]) - CLOSE:
            break
        first = str(n)
    return first


def best(found: Found, n: int, names: set[str]) -> tuple[float, str]:
    """The highest mean PSNR at n calls among these solvers, and whose it is; -inf where there is none."""
    values = [
        (float(np.mean(solvers[name][n])), f"`{name}` on `{spacing}`")
        for spacing, solvers in found.items()
        for name in names & solvers.keys()
        if n in solvers[name]
    ]
    return max(values, default=(-np.inf, ""))


def summary(found: Found) -> str:
    """Two tables: from how many calls on each solver keeps up with ddim, and our best against diffusers'."""
    names = [name for name in (*OURS[1:], THEIRS) if any(name in solvers for solvers in found.values())]
    kept = [
        [f"`{name}`", *(close_from(solvers.get(name, {}), solvers["ddim"]) for solvers in found.values())]
        for name in names
    ]
    text = markdown([f"at most {CLOSE} dB below `ddim` from", *(f"`{s}`" for s in found)], kept)
    lines = []
    for n in sorted({n for solvers in found.values() for values in solvers.values() for n in values}):
        (ours, our_name), (theirs, their_name) = best(found, n, set(OURS)), best(found, n, {THEIRS})
        if np.isfinite(ours) and np.isfinite(theirs):
            lines.append([str(n), our_name, f"{ours:.1f}", their_name, f"{theirs:.1f}", f"{ours - theirs:+.1f}"])
    return text + "\n" + markdown(["calls", "best of ours", "dB", "best of diffusers' 2M", "dB", "difference"], lines)


def plot(found: Found, path: Path) -> None:
    """PSNR over calls: a panel for each spacing, a line for each solver."""
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    size = (4.2 * columns, 3.6 * lines + 0.6)  # inches
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    calls = sorted({n for solvers in found.values() for values in solvers.values() for n in values})
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, (spacing, solvers) in zip(axes.flat, found.items(), strict=False):
        for i, name in enumerate((*OURS, THEIRS)):
            values = sorted(solvers.get(name, {}).items())
            style = {"color": "black", "linestyle": ":"} if name == THEIRS else {"color": f"C{i}"}
            points = [n for n, _ in values], [np.mean(psnr) for _, psnr in values]
            axis.plot(*points, marker="os^vDPX"[i], markersize=4, label=name, **style)
        axis.set(title=spacing, xscale="log")
        axis.set_xticks(calls, [str(n) for n in calls])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.supxlabel("model calls", fontsize="medium")
    figure.supylabel(f"PSNR to {REFERENCE_STEPS} DDIM steps of the same spacing, dB", fontsize="medium")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def report(out: Path, found: Found) -> None:
    """Write table.md, summary.md and psnr.png."""
    for name, text in {"table.md": table(found), "summary.md": summary(found)}.items():
        write_whole([out / name], text.encode(), overwrite=True)
    plot(found, out / "psnr.png")
    print(summary(found))


def read(path: Path) -> Found:
    """What `results.json` holds. Raises: OSError, ValueError."""
    cells = parse_json(path.read_text(encoding="utf-8"))["cells"]
    return {s: {name: {int(n): v for n, v in values.items()} for name, values in c.items()} for s, c in cells.items()}


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a diffusers folder; default: the shipped model")
    parser.add_argument("--prompts-file", type=Path, help="default: the model's own prompts/evaluation.txt")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS))
    parser.add_argument("--spacings", nargs="+", choices=SPACINGS, default=list(SPACINGS))
    parser.add_argument("--plot-only", action="store_true", help="tables and plot again, from results.json in --out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.plot_only:
        return report(args.out, read(args.out / "results.json"))

    own = (args.model or shipped_model()) / "prompts" / "evaluation.txt"
    path = args.prompts_file or (own if own.exists() else None)
    prompts = read_prompts(path, args.model, "evaluation", args.prompts, "--prompts")[: args.prompts]
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = minireuse.load(args.model, dtype="float32")
    found = measure(args, pipe, prompts)
    about = {"model": pipe.fingerprint, "guidance_scale": pipe.guidance_scale, "reference_steps": REFERENCE_STEPS}
    about["versions"] = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    results = json.dumps(about | {"prompts": prompts, "cells": found}, indent=1)
    write_whole([args.out / "results.json"], results.encode(), overwrite=True)
    report(args.out, found)


if __name__ == "__main__":
    sys.exit(exit_status(main, "interrupted; the same command goes on from the journal"))

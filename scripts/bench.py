"""What reuse costs and saves, call by call and run by run, next to diffusers: `python scripts/bench.py --quick`.

Every number is a ratio of times measured in turn in one process. The limit of a call that reuses maps is the same
U-Net with to_q, to_k, scores and softmax removed and the maps at hand; of one that reuses outputs, the U-Net without
its attention layers. Weights are random but for the shipped model's, which changes no time. Needs `.[test,eval]`;
DeepCache is compared where it is installed (`.[peers]`).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import matplotlib
import torch
from torch import Tensor
from tqdm import tqdm

import minireuse
from minireuse import attention
from minireuse.cache import ReuseCache
from minireuse.checkpoints.configs import write_schedule_config, write_unet_config
from minireuse.common.status import exit_status
from minireuse.common.timing import alternate, median_ratio, ratios, seconds_of
from minireuse.compilation import CompiledUNet
from minireuse.config import SD1_UNET, SD2_UNET, UNetConfig
from minireuse.files import shipped_model, write_whole
from minireuse.guidance import guided_denoise
from minireuse.plan import PLAIN, ReusePlan, StepPlan
from minireuse.policies import hurry, select
from minireuse.sample.forecast import forecast
from minireuse.samplers import ddim
from minireuse.schedule import Schedule, ScheduleConfig
from minireuse.unet import UNet

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS, REUSED = 20, 10
COMPILED = ("full", "HURRY map", "HURRY out", "HURRY deep")  # what is measured compiled, too
TOKENS = 77
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Scale:
    """One U-Net at one size on one device."""

    name: str
    config: UNetConfig
    latents: int  # height and width
    device: str
    dtype: torch.dtype
    batch: int = 1
    shipped: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}, {self.device}"


def scales(device: str, quick: bool) -> list[Scale]:
    """What can be measured here: the shipped model and SD 1.5 at 256 pixels on a CPU, the real sizes on a GPU."""
    if device != "cpu":
        half = torch.float16
        return [
            Scale("SD 1.5 at 512x512", SD1_UNET, 64, device, half),
            Scale("SD 2.1 at 768x768", SD2_UNET, 96, device, half),
        ]
    own = minireuse.load(device="meta").unet.config
    shipped = Scale("shipped model", own, own.sample_size, device, torch.float32, shipped=True)
    large = Scale("SD 1.5 at 256x256", SD1_UNET, 32, device, torch.float32)
    more = [] if quick else [replace(large, dtype=torch.bfloat16)]
    return [shipped, replace(shipped, dtype=torch.bfloat16), large, *more]


def build_unet(scale: Scale) -> UNet:
    if scale.shipped:
        return minireuse.load(device=scale.device, dtype=scale.dtype).unet
    torch.manual_seed(0)
    with torch.device(scale.device):
        unet = UNet(scale.config).to(scale.dtype)
    return unet.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def diffusers_unet(unet: UNet) -> diffusers.UNet2DConditionModel:
    """The same weights in diffusers, laid out as it would load them."""
    with torch.device("meta"):
        other = diffusers.UNet2DConditionModel.from_config(write_unet_config(unet.config))
    other.load_state_dict({name: value.contiguous() for name, value in unet.state_dict().items()}, assign=True)
    return other.eval()


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def in_turn(runs: dict[str, Callable[[], object]], rounds: int, device: str, warm: bool = True) -> Times:
    """Seconds of each, one after the other in every round."""
    works = {name: partial(seconds_of, run, partial(synchronize, device)) for name, run in runs.items()}
    return alternate(works, rounds, warmup=int(warm))


# --- single calls --------------------------------------------------------------------------------------------------


@contextmanager
def without_maps(maps: dict[str, Tensor]) -> Iterator[None]:
    """Attention that has its maps at hand and does nothing for them."""

    def forward(self: attention.Attention, x: Tensor, context: Any = None, *_: object) -> Tensor:
        v = context[1] if isinstance(context, tuple) else self._split(self.to_v(x if context is None else context))
        return self.to_out[0]((maps[self.address] @ v).transpose(1, 2).flatten(2))

    with patch.object(attention.Attention, "forward", forward):
        yield


@contextmanager
def without_attention() -> Iterator[None]:
    def block(self: attention.TransformerBlock, x: Tensor, *_: object) -> Tensor:
        return x + self.ff(self.norm3(x))

    with patch.object(attention.TransformerBlock, "forward", block):
        yield


def calls(unet: UNet, scale: Scale) -> dict[str, Callable[[], object]]:
    """One guided U-Net call of each kind."""
    shape = (2 * scale.batch, scale.config.in_channels, scale.latents, scale.latents)
    x = torch.randn(*shape, device=scale.device, dtype=scale.dtype)
    context = torch.randn(shape[0], TOKENS, scale.config.cross_attention_dim, device=scale.device, dtype=scale.dtype)
    text, other = unet.text_kv(context), diffusers_unet(unet)

    def call(step: StepPlan = PLAIN, cache: ReuseCache | None = None) -> Callable[[], object]:
        return lambda: unet(x, 500, text, step, cache)

    def limited(manager: Any) -> Callable[[], object]:
        def run() -> None:
            with manager():
                unet(x, 500, text)

        return run

    runs: dict[str, Callable[[], object]] = {
        "full": call(),
        "diffusers": lambda: other(x, 500, encoder_hidden_states=context).sample,
        "explicit": call(StepPlan(explicit=True)),
    }
    own, caches = str(scale.dtype).removeprefix("torch."), dict.fromkeys((scale.dtype, torch.float16, torch.uint8))
    for kind in ("map", "out", "deep"):
        sites = frozenset(select(unet.sites, kind=kind))
        for dtype in caches:
            if kind != "map" and dtype != scale.dtype:
                continue
            cache, name = ReuseCache(dtype), str(dtype).removeprefix("torch.")
            runs[f"store {kind}, {name}"] = call(StepPlan(store=sites), cache)
            runs[f"reuse {kind}, {name}"] = call(StepPlan(reuse=sites), cache)
    maps = ReuseCache(scale.dtype)
    stored = select(unet.sites)
    call(StepPlan(store=frozenset(stored)), maps)()
    held = {site.address: maps.entry(site).tensor.values for site in stored}
    runs[f"limit map, {own}"] = limited(lambda: without_maps(held))
    runs[f"limit out, {own}"] = limited(without_attention)
    return runs


# --- whole runs ----------------------------------------------------------------------------------------------------


def runs(unet: UNet, scale: Scale, compiled: bool = False) -> dict[str, Callable[[], object]]:
    """The sampling loop of one image, `STEPS` steps of guided DDIM: full, with HURRY, and by diffusers."""
    schedule = Schedule.from_config()
    context = torch.randn(2, TOKENS, scale.config.cross_attention_dim, device=scale.device, dtype=scale.dtype)
    x = torch.randn(1, scale.config.in_channels, scale.latents, scale.latents, device=scale.device)

    by = CompiledUNet(unet) if compiled else unet

    def ours(plan: ReusePlan, kernel: str = "fused", dtype: torch.dtype = torch.float16) -> Callable[[], object]:
        def run() -> None:
            denoise = guided_denoise(by, context, schedule, plan, ReuseCache(dtype), attention=kernel)
            for _ in ddim(denoise, x, schedule, schedule.timesteps(STEPS)):
                pass

        return run

    nothing = ReusePlan.nothing(STEPS)
    found = {"full": ours(nothing), "full, explicit": ours(nothing, "explicit")}
    for kind in ("map", "out", "deep"):
        plan = hurry(STEPS, select(unet.sites, kind=kind), k=REUSED)
        found[f"HURRY {kind}"] = ours(plan)
        if kind == "map":
            found["HURRY map, explicit"] = ours(plan, "explicit")
            found["HURRY map, uint8"] = ours(plan, dtype=torch.uint8)
    if compiled:
        return {f"{name}, compiled": run for name, run in found.items() if name in COMPILED}
    # It is not run, but tells the pipeline how much smaller latents are than images.
    tiny = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
    )

    def theirs(prepare: Callable[[Any], object] = lambda pipe: None) -> Callable[[], object]:
        pipe = diffusers.StableDiffusionPipeline(
            vae=tiny,
            text_encoder=None,
            tokenizer=None,
            unet=diffusers_unet(unet),
            scheduler=diffusers.DDIMScheduler.from_config(write_schedule_config(ScheduleConfig())),
            safety_checker=None,
            feature_extractor=None,
        )
        pipe.set_progress_bar_config(disable=True)
        prepare(pipe)
        embeds = {"negative_prompt_embeds": context[:1], "prompt_embeds": context[1:]}
        settings = {"num_inference_steps": STEPS, "output_type": "latent", "latents": x.to(scale.dtype)}
        return lambda: pipe(**embeds, **settings)

    found["diffusers"] = theirs()
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError:
        return found

    def enable(pipe: Any) -> None:
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=2, cache_branch_id=0)
        helper.enable()

    return found | {"DeepCache (package), interval 2": theirs(enable)}


def memory(unet: UNet, scale: Scale) -> dict[str, dict[str, int]]:
    """Bytes told before a run of HURRY and counted in it, by dtype of the cache."""
    with torch.device("meta"):
        empty = UNet(scale.config)
    plan = hurry(2, select(unet.sites), k=1)
    shape = (2, scale.config.in_channels, scale.latents, scale.latents)
    x = torch.zeros(*shape, device=scale.device, dtype=scale.dtype)
    context = torch.zeros(2, TOKENS, scale.config.cross_attention_dim, device=scale.device, dtype=scale.dtype)
    found = {}
    for dtype in (torch.float32, torch.float16, torch.uint8):
        cache = ReuseCache(dtype)
        for call in range(plan.calls):
            unet(x, 500, context, plan.step(call), cache)
        told = forecast(empty, plan, batch=1, size=shape[2:], cache_dtype=dtype).peak
        found[str(dtype).removeprefix("torch.")] = {"forecast": told, "counted": cache.peak_nbytes}
    return found


def curves(scale: Scale, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a full call and of calls that store and reuse maps or outputs, over resolution and batch."""
    unet = build_unet(scale)
    own = str(scale.dtype).removeprefix("torch.")
    wanted = ["full", *(f"{what} {kind}, {own}" for kind in ("map", "out") for what in ("store", "reuse"))]

    def points(varied: Sequence[Scale], xs: Sequence[int]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"x": list(map(float, xs))} | {name: [] for name in wanted}
        for one in varied:
            possible = calls(unet, one)
            for name, seconds in in_turn({n: possible[n] for n in wanted}, rounds, scale.device).items():
                found[name].append(statistics.median(seconds))
        return found

    sides = [scale.latents // 2, scale.latents, scale.latents * 2]
    return {
        "latents' side": points([replace(scale, latents=side) for side in sides], sides),
        "batch": points([replace(scale, batch=n) for n in (1, 2, 4)], (1, 2, 4)),
    }


# --- the report ----------------------------------------------------------------------------------------------------


def ratio(times: Times, name: str, other: str) -> str:
    """The median of the ratios, and their range."""
    values = ratios(times[name], times[other])
    return f"{statistics.median(values):.3f} ({min(values):.2f}-{max(values):.2f})"


def own_precision(single: Times) -> str:
    """What the calls of a scale compute in, as the names of its rows have it."""
    return next(name for name in single if name.startswith("limit map")).split(", ")[1]


def table(results: dict[str, Any]) -> str:
    """Markdown: for each scale the ratios that matter."""
    lines = []
    for label, found in results["scales"].items():
        single, whole = found["calls"], found["runs"]
        own = own_precision(single)
        lines += [f"## {label}", "", "| a call | ratio (range) |", "|---|---|"]
        pairs = [
            ("full", "diffusers"),
            (f"reuse map, {own}", f"limit map, {own}"),
            (f"reuse out, {own}", f"limit out, {own}"),
        ]
        pairs += [(name, "full") for name in single if name not in ("full", "diffusers")]
        lines += [f"| {a} / {b} | {ratio(single, a, b)} |" for a, b in pairs]
        if whole:
            lines += ["", f"| {STEPS} steps, HURRY reuses in {REUSED} | ratio (range) |", "|---|---|"]
            lines += [f"| full / diffusers | {ratio(whole, 'full', 'diffusers')} |"]
            others = [name for name in whole if name not in ("full", "diffusers")]
            lines += [f"| {name} / full | {ratio(whole, name, 'full')} |" for name in others]
            lines += [f"| HURRY map / full, explicit | {ratio(whole, 'HURRY map', 'full, explicit')} |"]
        lines += ["", "| cache of maps | forecast | counted |", "|---|---|---|"]
        lines += [f"| {d} | {b['forecast']:,} | {b['counted']:,} |" for d, b in found["memory"].items()]
        if found["peak"]:
            lines += ["", "Peak memory allocated: " + ", ".join(f"{k} {v:,}" for k, v in found["peak"].items())]
        lines += [""]
    return "\n".join(lines)


def medians(times: Times, *pairs: tuple[str, str]) -> str:
    """The median ratio of each pair, or nothing where a run was not timed."""
    if not {name for pair in pairs for name in pair} <= times.keys():
        return ""
    return " / ".join(f"{median_ratio(times[name], times[other]):.2f}" for name, other in pairs)


def summary(results: dict[str, Any]) -> str:
    """Markdown: the scales side by side in a few rows; medians alone."""
    columns = {}
    for label, found in results["scales"].items():
        single, whole = found["calls"], found["runs"]
        own = own_precision(single)
        columns[label] = {
            "full call / diffusers'": medians(single, ("full", "diffusers")),
            "storing maps, cache of the same precision / float16": medians(
                single, (f"store map, {own}", "full"), ("store map, float16", "full")
            ),
            "reusing maps / outputs / deep features": medians(
                single, *((f"reuse {kind}, {own}", "full") for kind in ("map", "out", "deep"))
            ),
            "reusing maps / the same without `to_q`, `to_k`, scores, softmax": medians(
                single, (f"reuse map, {own}", f"limit map, {own}")
            ),
            "reusing outputs / the same without attention layers": medians(
                single, (f"reuse out, {own}", f"limit out, {own}")
            ),
            f"{STEPS} calls, HURRY with {REUSED}: maps / outputs / deep features": medians(
                whole, *((f"HURRY {kind}", "full") for kind in ("map", "out", "deep"))
            ),
        }
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    rows = next(iter(columns.values()))
    lines += [f"| {row} | " + " | ".join(cells[row] for cells in columns.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Cost over resolution, batch and number of reuse calls."""
    panels = results["curves"]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, values in lines.items():
            if name != "x":
                axis.plot(lines["x"], values, marker="o", label=name)
        axis.set(xlabel=title, ylabel="seconds of a call" if "full" in lines else "time / full", ylim=(0, None))
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def over_k(found: dict[str, Any]) -> dict[str, list[float]]:
    """The time of HURRY as a fraction of the full sampler's, from the measured calls: plain, storing once, reusing."""
    cost = {name: median_ratio(times, found["calls"]["full"]) for name, times in found["calls"].items()}
    ks = range(STEPS)
    lines: dict[str, list[float]] = {"x": [float(k) for k in ks]}
    for kind in ("map", "out", "deep"):
        store, reuse = (next(c for n, c in cost.items() if n.startswith(f"{w} {kind}")) for w in ("store", "reuse"))
        lines[kind] = [(STEPS - k - 1 + store + k * reuse) / STEPS if k else 1.0 for k in ks]
    return lines


def measure(scale: Scale, rounds: int, quick: bool, compiled: bool) -> dict[str, Any]:
    """Everything about one scale."""
    unet = build_unet(scale)
    large = not scale.shipped and scale.device == "cpu"  # seconds a call
    single = in_turn(calls(unet, scale), max(3, rounds // 3) if large else rounds, scale.device)
    chosen = {} if large and quick else runs(unet, scale)  # a minute each
    peak = {}
    if scale.device.startswith("cuda"):
        for name, run in chosen.items():
            torch.cuda.reset_peak_memory_stats(scale.device)
            run()
            peak[name] = torch.cuda.max_memory_allocated(scale.device)
    if compiled and not large:  # only now: graphs keep memory
        chosen |= runs(unet, scale, compiled=True)
    whole = in_turn(chosen, 1 if large else max(3, rounds // 3), scale.device, warm=not large)
    return {"calls": single, "runs": whole, "memory": memory(unet, scale), "peak": peak}


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no curves: under ten minutes on two cores")
    parser.add_argument(
        "--compile", action="store_true", help="compiled U-Nets, too (on a CPU the small one); minutes more"
    )
    parser.add_argument("--rounds", type=int, help="of timed calls; default: 9, or 21 without --quick")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a folder for bench.json, table.md, summary.md and bench.png")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not (shipped_model() / "model_index.json").exists():
        raise ValueError("the shipped model is not there; run this in a checkout or an installed package")
    if args.out is not None and (args.out / "bench.json").exists():
        raise ValueError(f"{args.out} holds results already; name a new folder")
    rounds = args.rounds or (9 if args.quick else 21)
    wanted = scales(args.device, args.quick)
    results: dict[str, Any] = {
        "machine": platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "scales": {
            scale.label: measure(scale, rounds, args.quick, args.compile) for scale in tqdm(wanted, desc="scales")
        },
    }
    results["curves"] = {} if args.quick else curves(wanted[0], max(3, rounds // 3))
    results["curves"]["reuse calls of 20"] = over_k(results["scales"][wanted[0].label])
    print(table(results))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(results, args.out / "bench.png")
        write_whole([args.out / "table.md"], table(results).encode())
        write_whole([args.out / "summary.md"], summary(results).encode())
        write_whole([args.out / "bench.json"], json.dumps(results, indent=1).encode())


if __name__ == "__main__":
    sys.exit(exit_status(main))

"""The method's claims, tried on one model: `python scripts/reproduce.py --out runs/reproduce` (extra `eval`).

What is found goes into a journal: the same command goes on after an interruption. At the end `report.md` states for
every claim whether it holds here, with the figures, and the plots beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

import minireuse
from minireuse.common.journal import Journal
from minireuse.common.metrics import fidelity, interval
from minireuse.common.status import exit_status
from minireuse.evaluate import command as evaluate
from minireuse.evaluate.report import FULL, KERNELS, fraction, summarise
from minireuse.files import read_lines, shipped_model, write_whole
from minireuse.search import command as search
from minireuse.search.plan_files import plans_of

import claims
import verdicts
from claims import Study
from world import caption, parse_caption, things, vary_caption

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Stage = Callable[[argparse.Namespace, Study], dict[str, Any]]
KINDS = ("map", "out", "deep")
CALIBRATION = 4  # prompts that the searches of claim 9 score on
SEARCHED = {"map": "phast:kind=map", "out": "phast:kind=out", "deep": "phast:kind=deep"}  # policies, of order 0
POLICIES = [
    "hurry",
    *(f"{name}:kind={kind}" for kind in KINDS[1:] for name in ("hurry", "phast")),
    "phast:kind=map",
    "deepcache",
    *(f"phast:kind={kind},order=1" for kind in KINDS),
    "deepcache:order=1",
    "hurry:kind=deep,order=1",
]


def evaluation(args: argparse.Namespace, name: str, policies: list[str], *more: str) -> dict[str, Any]:
    """What `python -m minireuse.evaluate` finds, in a folder of its own."""
    out = args.out / name
    if not (out / "results.json").exists():
        model = [] if args.model is None else ["--model", str(args.model), "--prompts-file", str(args.prompts_file)]
        own = ["--prompts", str(args.prompts), "--steps", str(args.steps), "--rounds", str(args.rounds)]
        own += ["--out", str(out), "--policies", *policies]
        done(evaluate.main([*model, *own, *more]), f"the evaluation {name}")
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def compared(args: argparse.Namespace) -> dict[str, Any]:
    """The one evaluation that several claims are about."""
    return evaluation(args, "policies", POLICIES, "--equal-latency", "--fid", "vae")


def done(status: int, what: str) -> None:
    """Raises: KeyboardInterrupt, ValueError where a command did not come to its end."""
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise ValueError(f"{what} failed")


def times(rows: dict[str, Any], *names: str) -> str:
    """What each row takes of the full sampler's time, fused and with explicit maps."""
    return ", ".join(
        f"{name} {' and '.join(f'{fraction(rows[name], rows[FULL], kernel):.2f}' for kernel in KERNELS)}"
        for name in names
    )


def chain(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Claim 5: PHAST above HURRY above fewer steps of equal latency, on prompts no search has seen.

    Of equal latency with the fused kernel, and with every map written out, as it was when the method was published.
    """
    results = compared(args)
    rows, (fused, explicit) = results["rows"], (results["equal_latency"][kernel] for kernel in KERNELS)
    pairs = {
        "PHAST over HURRY (map)": ("phast:kind=map", "hurry"),
        "HURRY over fewer steps (map)": ("hurry", fused["hurry"]),
        "PHAST over fewer steps (map)": ("phast:kind=map", fused["phast:kind=map"]),
        "HURRY over fewer steps (map, explicit)": ("hurry", explicit["hurry"]),
        "PHAST over fewer steps (map, explicit)": ("phast:kind=map", explicit["phast:kind=map"]),
        "PHAST over HURRY (deep)": ("phast:kind=deep", "hurry:kind=deep"),
        "HURRY over fewer steps (deep)": ("hurry:kind=deep", fused["hurry:kind=deep"]),
        "PHAST over fewer steps (deep)": ("phast:kind=deep", fused["phast:kind=deep"]),
        "PHAST over DeepCache (deep)": ("phast:kind=deep", "deepcache"),
    }
    slow = [name for name, (_, other) in pairs.items() if other == FULL]
    links = {n: np.subtract(rows[a]["psnr"], rows[b]["psnr"]) for n, (a, b) in pairs.items() if n not in slow}
    ends = {name: interval(values) for name, values in links.items()}
    text = "; ".join(f"{n} {links[n].mean():+.1f} dB [{low:+.1f}, {high:+.1f}]" for n, (low, high) in ends.items())
    text += "".join(f"; {name}: the full sampler takes as long" for name in slow)
    shares = times(rows, *dict.fromkeys(name for pair in pairs.values() for name in pair))
    text += f". Of the full sampler's time, fused and explicit: {shares}"
    # Where the full sampler is as fast as a plan, that plan saves no time, whatever it paints.
    return {"verdict": "does not hold" if slow else verdicts.above(ends.values()), "text": text}


def tensors(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Claim 7: what each kind of tensor costs and saves."""
    summary = summarise(compared(args), FULL)
    text = "; ".join(
        f"{kind}: {summary[n]['psnr']:.1f} dB at {summary[n]['seconds_ratio']:.2f} of the time "
        f"({summary[n]['seconds_explicit_ratio']:.2f} with explicit maps), {summary[n]['cache_mib']:.2f} MiB"
        for kind, n in SEARCHED.items()
    )
    best = max(SEARCHED, key=lambda kind: summary[SEARCHED[kind]]["psnr"])
    fastest = min(SEARCHED, key=lambda kind: summary[SEARCHED[kind]]["seconds_ratio"])
    return {"verdict": "measured", "text": f"{text}. Closest: {best}; fastest: {fastest}"}


def layerwise(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Claim 9: layer-wise plans are closer than step-wise ones of the same latency."""
    folder, found, slow = args.out / "layerwise", {}, []
    model = [] if args.model is None else ["--model", str(args.model)]
    calibration = ["--prompts-file", str(args.calibration_file), "--prompts", str(CALIBRATION)]
    common = [*model, *calibration, "--steps", str(args.steps), "--budget-latency", "0.7"]
    for name, options in {"layers": ["--layerwise"], **{kind: ["--kind", kind] for kind in KINDS}}.items():
        out = folder / f"{name}.json"
        budget = args.layerwise_budget if name == "layers" else args.search_budget
        status = 0 if out.exists() else search.main([*common, *options, "--budget", budget, "--out", str(out)])
        if status == 2:
            slow.append(name)  # no plan of this kind is fast enough
            continue
        done(status, "the layer-wise search")
        found[name] = str(out)
    if "layers" in slow:
        return {"verdict": "unclear", "text": "no layer-wise plan takes 0.7 of the full sampler's time on this machine"}
    results = evaluation(args, "layerwise-evaluation", list(found.values()))
    rows = {name: results["rows"][path] for name, path in found.items()}
    gains = {n: np.subtract(rows["layers"]["psnr"], r["psnr"]) for n, r in rows.items() if n != "layers"}
    ends = {name: interval(values) for name, values in gains.items()}
    taken = {name: fraction(row, results["rows"][FULL]) for name, row in rows.items()}
    text = (
        f"layer-wise over step-wise, searched on {CALIBRATION} prompts, each estimated at 0.7 of the time: "
        + ", ".join(f"{n} {gains[n].mean():+.1f} dB [{low:+.1f}, {high:+.1f}]" for n, (low, high) in ends.items())
    )
    text += ". Measured: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in taken.items())
    text += "".join(f". No step-wise plan of kind {name} is that fast" for name in slow)
    alike = bool(gains) and all(taken["layers"] <= taken[name] + 0.02 for name in gains)
    return {"verdict": verdicts.above(ends.values(), comparable=alike), "text": text}


def together(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Claim 10: reuse and fewer steps add up: reuse on a shorter run beats a run that is shorter still."""
    short = 3 * args.steps // 4
    fewer = [f"steps:{n}" for n in range(short, args.steps // 3, -1)]
    rows = evaluation(args, "together", fewer)["rows"]
    reused = evaluation(args, "together-short", ["phast:kind=deep"], "--steps", str(short))["rows"]

    def pictures(folder: str, row: str) -> np.ndarray:
        files = (evaluate.picture(args.out / folder, row, i) for i in range(args.prompts))
        return np.stack([np.array(Image.open(file)) for file in files])

    # Against the same image as fewer steps are: the full sampler's with all steps.
    ours = fidelity(pictures("together-short", "phast:kind=deep"), pictures("together", FULL))
    taken = {name: fraction(row, rows[FULL]) for name, row in rows.items()}
    time = taken[f"steps:{short}"] * fraction(reused["phast:kind=deep"], reused[FULL])
    rival = min((name for name in taken if taken[name] >= time), key=lambda name: taken[name], default=FULL)
    gain = ours - np.array(rows[rival]["psnr"])
    low, high = interval(gain)
    text = (
        f"{short} steps with deep reuse take {time:.2f} of the time of {args.steps} and are {ours.mean():.1f} dB from "
        f"their image; {rival} takes {taken[rival]:.2f}: {gain.mean():+.1f} dB [{low:+.1f}, {high:+.1f}] for reuse"
    )
    return {"verdict": verdicts.above([(low, high)]), "text": text}


def quality(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Claim 11: as a set, and against their prompts, the images are as good as the full sampler's."""
    results = compared(args)
    rows, summary = results["rows"], summarise(results, FULL)
    close = [n for n, r in summary.items() if r["psnr"] >= 30 and n != FULL and "follows" in r]
    drops = {n: interval(np.subtract(rows[FULL]["follows"], rows[n]["follows"])) for n in close}
    text = "; ".join(
        f"`{n}` {r['psnr']:.1f} dB, Fréchet distance {r['fid']:.2f}"
        + (f", prompt followed {r['follows']:.3f}" if "follows" in r else "")
        for n, r in summary.items()
    )
    text += f". The distances are of {args.prompts} images: compare them with each other only"
    return {"verdict": verdicts.keeps_to_prompts(drops.values()), "text": text}


def lines(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Claim 12, not the paper's: to go on along the line through the last two values beats holding the last one."""
    results = compared(args)
    rows, twins = results["rows"], results["equal_latency"][KERNELS[0]]
    best = "phast:kind=deep,order=1"
    pairs = {f"PHAST ({kind})": (f"phast:kind={kind},order=1", name) for kind, name in SEARCHED.items()}
    pairs["DeepCache"] = ("deepcache:order=1", "deepcache")
    others = {"HURRY (deep)": ("hurry:kind=deep,order=1", "hurry:kind=deep")}
    others["PHAST (deep) over DeepCache"] = (best, "deepcache")
    if twins[best] != FULL:
        others[f"PHAST (deep) over {twins[best]}"] = (best, twins[best])
    gains = {name: np.subtract(rows[a]["psnr"], rows[b]["psnr"]) for name, (a, b) in (pairs | others).items()}
    ends = {name: interval(values) for name, values in gains.items()}
    text = "order 1 over order 0: " + ", ".join(
        f"{n} {gains[n].mean():+.1f} dB [{low:+.1f}, {high:+.1f}]" for n, (low, high) in ends.items()
    )
    used = dict.fromkeys(name for pair in (pairs | others).values() for name in pair)
    text += f". Of the full sampler's time, fused and explicit: {times(rows, *used)}"
    return {"verdict": verdicts.above([ends[n] for n in pairs]), "text": text}


STAGES: dict[str, tuple[str, Stage]] = {
    "redundancy": ("1. Maps of neighbouring calls are redundant", lambda args, study: claims.redundancy(study)),
    "single": (
        "2. The later a single call reuses, the smaller the distortion",
        lambda args, study: claims.single(study),
    ),
    "growth": ("3. A perturbation of the maps grows along the trajectory", lambda args, study: claims.growth(study)),
    "heuristic": (
        "4. HURRY beats its mirror image, even spreading and random plans",
        lambda args, study: claims.heuristic(study, draws=args.draws),
    ),
    "chain": ("5. PHAST beats HURRY beats fewer steps, on unseen prompts", chain),
    "generalisation": (
        "6. Searched plans carry over to other settings",
        lambda args, study: claims.generalisation(study),
    ),
    "tensors": ("7. Maps, outputs and deep features", tensors),
    "precision": ("8. A half-precision cache is enough", lambda args, study: claims.precision(study)),
    "layerwise": ("9. Layer-wise plans beat step-wise ones at equal latency", layerwise),
    "together": ("10. Reuse and fewer steps add up", together),
    "quality": ("11. Quality as a set does not fall where PSNR is high", quality),
    "lines": ("12. Extrapolated values are closer than held ones, in searched and in even plans", lines),
}


PANELS = {"change": "relative change since the call before", "cosine": "cosine with the call before"}


NEED_PLANS = dict.fromkeys(("chain", "generalisation", "tensors", "together", "quality"), (0,)) | {"lines": (0, 1)}


def draw(name: str, found: dict[str, Any], path: Path) -> bool:
    """The stage's plot, where it has one."""
    figure, axes = plt.subplots(figsize=(7, 4))
    if name == "redundancy":
        plt.close(figure)
        names = [address.replace("transformer_blocks.0.", "") for address in found["addresses"]]
        figure, panels = plt.subplots(1, 2, figsize=(13, 0.28 * len(names) + 2), sharey=True)
        for panel, (measure, title) in zip(panels, PANELS.items(), strict=True):
            extent = (0.5, len(found[measure][0]) + 0.5, len(names) - 0.5, -0.5)
            figure.colorbar(panel.imshow(found[measure], aspect="auto", cmap="magma", extent=extent), ax=panel)
            panel.set(xlabel="call", title=title)
        panels[0].set_yticks(range(len(names)), names, fontsize="x-small")
    elif name == "single":
        axes.semilogy(range(1, len(found["damage"]) + 1), np.mean(found["damage"], axis=1), "o-")
        axes.set(xlabel="the call that reuses its maps", ylabel="mean squared error of the image")
    elif name == "growth":
        calls, values = [int(c) for c in found["exponents"]], list(found["exponents"].values())
        axes.errorbar(calls, np.mean(values, axis=1), np.std(values, axis=1), fmt="o-")
        axes.axhline(0, color="0.5")
        axes.set(xlabel="call that is perturbed", ylabel="growth exponent per call")
    elif name == "precision":
        for dtype, (value, size) in found["rows"].items():
            axes.plot(size, value, "o", label=dtype)
        axes.set(xlabel="cache, MiB an image", ylabel="PSNR to the image with a float32 cache, dB")
        axes.legend()
    elif name == "heuristic":
        axes.hist(found["random"], bins=30, color="0.7", label="random plans")
        for i, (policy, value) in enumerate(found["named"].items()):
            axes.axvline(value, color=f"C{i}", label=policy)
        axes.set(xlabel="PSNR to the full sampler's image, dB")
        axes.legend()
    else:
        plt.close(figure)
        return False
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the shipped model")
    parser.add_argument("--prompts-file", type=Path, help="default: the shipped evaluation prompts")
    parser.add_argument("--prompts", type=int, default=40, help="for the evaluations; other stages take fewer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7, help="of timed runs")
    parser.add_argument("--draws", type=int, default=200, help="random plans")
    shipped = shipped_model() / "prompts" / "calibration.txt"
    parser.add_argument("--calibration-file", type=Path, default=shipped, help="prompts for the searches")
    parser.add_argument("--layerwise-budget", default="18min", help="for the layer-wise search")
    parser.add_argument("--search-budget", default="4min", help="for each of the searches it is compared with")
    parser.add_argument("--sibling", type=Path, help="a second model that knows these prompts, to carry plans over to")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    args = parser.parse_args(argv)
    command = shlex.join(["python", "scripts/reproduce.py", *(sys.argv[1:] if argv is None else argv)])
    if args.model is not None and args.prompts_file is None:
        raise ValueError("--model needs --prompts-file with prompts it can paint")

    prompts = read_lines(args.prompts_file or shipped_model() / "prompts" / "evaluation.txt")
    pipe, plans = minireuse.load(args.model), plans_of(args.model)
    sibling = None if args.sibling is None else minireuse.load(args.sibling)
    settings = {
        "model": pipe.fingerprint,
        "sibling": None if sibling is None else sibling.fingerprint,
        "steps": args.steps,
        "prompts": prompts[: args.prompts],
        "draws": args.draws,
        "rounds": args.rounds,
        "searches": [args.layerwise_budget, args.search_budget, CALIBRATION],
        "plans": [[str(p), p.model, p.plan.to_json()] for p in plans],
    }
    study = Study(pipe, prompts, plans, args.steps, {} if args.model else families(prompts), sibling)
    for kind, order in itertools.product(KINDS, (0, 1)):
        needing = [name for name in args.stages if order in NEED_PLANS.get(name, ())]
        if needing and not study.searched(kind, order):
            raise ValueError(
                f"no plan was searched for this model, ddim, {args.steps} steps, half of them reused, kind {kind} and "
                f"order {order}; search it with python -m minireuse.search, or leave out {', '.join(needing)}"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    study = replace(study, journal=Journal(args.out / "journal.jsonl", settings))
    head = ["# The method's claims on this model", "", f"`{command}`", ""]
    head += [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {pipe.device}, model {pipe.fingerprint}",
        "",
    ]
    for name in args.stages:
        title, stage = STAGES[name]
        found = study.journal.known(f"stage/{name}", lambda stage=stage: json.loads(json.dumps(stage(args, study))))
        print(f"{title}: {found['verdict']}\n  {found['text']}", flush=True)
        finished = {n: study.journal.records[f"stage/{n}"] for n in STAGES if f"stage/{n}" in study.journal.records}
        report(args.out, head, finished)


def report(out: Path, head: Sequence[str], finished: dict[str, dict[str, Any]]) -> None:
    """Write what the finished stages found: to be read, as a table of verdicts, and as data."""
    text = [*head, *itertools.chain(*(section(out, name, found) for name, found in finished.items()))]
    table = ["| claim | on this model |", "|---|---|"]
    table += [f"| {STAGES[name][0]} | {found['verdict']} |" for name, found in finished.items()]
    files = {"report.md": "\n".join(text), "verdicts.md": "\n".join(table) + "\n"}
    for name, content in (files | {"results.json": json.dumps(finished, indent=1)}).items():
        write_whole([out / name], content.encode(), overwrite=True)


def section(out: Path, name: str, found: dict[str, Any]) -> list[str]:
    """A stage's part of the report; draws its plot."""
    title = STAGES[name][0]
    plot = [f"![{title}]({name}.png)", ""] if draw(name, found, out / f"{name}.png") else []
    return [f"## {title}: {found['verdict']}", "", found["text"], "", *plot]


def families(prompts: Sequence[str]) -> dict[str, list[str]]:
    """Prompts of the shipped model's world that differ from the searched ones in kind."""
    scenes = [scene for scene in map(parse_caption, prompts) if scene is not None]
    rng = np.random.default_rng(0)
    return {
        "at most two things": [caption(scene) for scene in scenes if len(things(scene)) <= 2],
        "three things or more": [caption(scene) for scene in scenes if len(things(scene)) > 2],
        "free wording": [vary_caption(scene, rng) for scene in scenes],
    }


if __name__ == "__main__":
    sys.exit(exit_status(main, "interrupted; the same command goes on from the journal"))

"""The method's claims, tried on one model: `python scripts/reproduce.py --out runs/reproduce` (extra `eval`).

Each stage keeps what it found in a file of the output folder and is not run again; at the end `report.md` states for
every claim whether it holds here, with the figures, and the plots beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import minireuse
from minireuse import evaluate, search
from minireuse.files import read_lines, shipped_model, write_whole
from minireuse.metrics import interval
from minireuse.report import summarise
from minireuse.searched import plans_of

import claims
from claims import Study, verdict

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Stage = Callable[[argparse.Namespace, Study], dict[str, Any]]
KINDS = ("map", "out", "deep")
POLICIES = [
    "hurry",
    "phast",
    *(f"{name}:kind={kind}" for kind in KINDS[1:] for name in ("hurry", "phast")),
    "deepcache",
]
TOGETHER = ["steps:15", "steps:13", "steps:10"]


def evaluation(args: argparse.Namespace, name: str, policies: list[str], *more: str) -> dict[str, Any]:
    """What `python -m minireuse.evaluate` finds, in a folder of its own."""
    out = args.out / name
    if not (out / "results.json").exists():
        model = [] if args.model is None else ["--model", str(args.model), "--prompts-file", str(args.prompts_file)]
        own = ["--prompts", str(args.prompts), "--steps", str(args.steps), "--out", str(out), "--policies", *policies]
        if evaluate.main([*model, *own, *more]):
            raise SystemExit(f"error: the evaluation for stage {name} failed")
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def chain(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Claim 5: PHAST above HURRY above fewer steps of equal latency, on prompts no search has seen."""
    results = evaluation(args, "policies", POLICIES, "--equal-latency", "--fid", "vae")
    rows, twins = results["rows"], results["equal_latency"]
    pairs = {
        "PHAST over HURRY (map)": ("phast", "hurry"),
        "HURRY over fewer steps (map)": ("hurry", twins["hurry"]),
        "PHAST over fewer steps (deep)": ("phast:kind=deep", twins["phast:kind=deep"]),
        "PHAST over DeepCache (deep)": ("phast:kind=deep", "deepcache"),
    }
    slow = [name for name, (_, other) in pairs.items() if other == "none"]
    links = {n: np.subtract(rows[a]["psnr"], rows[b]["psnr"]) for n, (a, b) in pairs.items() if n not in slow}
    ends = {name: interval(values) for name, values in links.items()}
    text = "; ".join(f"{n} {links[n].mean():+.1f} dB [{low:+.1f}, {high:+.1f}]" for n, (low, high) in ends.items())
    text += "".join(f"; {name}: not faster than the full sampler" for name in slow)
    holds = not slow and all(low > 0 for low, _ in ends.values())
    return {"verdict": verdict(holds, bool(slow) or any(high < 0 for _, high in ends.values())), "text": text}


def tensors(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Claim 7: what each kind of tensor costs and saves."""
    summary = summarise(evaluation(args, "policies", POLICIES, "--equal-latency", "--fid", "vae"), "none")
    names = {"map": "phast", "out": "phast:kind=out", "deep": "phast:kind=deep"}
    text = "; ".join(
        f"{kind}: {summary[n]['psnr']:.1f} dB at {summary[n]['seconds_ratio']:.2f} of the time "
        f"({summary[n]['seconds_explicit_ratio']:.2f} with explicit maps), {summary[n]['cache_mib']:.2f} MiB"
        for kind, n in names.items()
    )
    best = max(names, key=lambda kind: summary[names[kind]]["psnr"])
    fastest = min(names, key=lambda kind: summary[names[kind]]["seconds_ratio"])
    return {"verdict": "measured", "text": f"{text}. Closest: {best}; fastest: {fastest}"}


def layerwise(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Claim 9: layer-wise plans are closer than step-wise ones of the same latency."""
    folder, found = args.out / "layerwise", {}
    model = [] if args.model is None else ["--model", str(args.model), "--prompts-file", str(args.prompts_file)]
    common = ["--steps", str(args.steps), "--budget-latency", "0.7"]
    for name, options in {"layers": ["--layerwise"], **{k: ["--kind", k] for k in KINDS}}.items():
        out = folder / f"{name}.json"
        if not out.exists():
            search.main([*model, *common, *options, "--budget", args.search_budget, "--out", str(out)])
        if out.exists():  # no map plan may be fast enough
            found[name] = str(out)
    if "layers" not in found or len(found) < 2:
        return {"verdict": "unclear", "text": "no plan of 0.7 of the full sampler's time was found to compare with"}
    results = evaluation(args, "layerwise-evaluation", list(found.values()))
    rows = {name: results["rows"][path] for name, path in found.items()}
    gains = {n: np.subtract(rows["layers"]["psnr"], r["psnr"]) for n, r in rows.items() if n != "layers"}
    ends = {name: interval(values) for name, values in gains.items()}
    text = "layer-wise over step-wise at 0.7 of the time: " + ", ".join(
        f"{n} {gains[n].mean():+.1f} dB [{low:+.1f}, {high:+.1f}]" for n, (low, high) in ends.items()
    )
    holds = all(low > 0 for low, _ in ends.values())
    return {"verdict": verdict(holds, any(high < 0 for _, high in ends.values())), "text": text}


def together(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Claim 10: reuse and fewer steps add up: reuse on a shorter run beats a run that is shorter still."""
    results = evaluation(args, "together", TOGETHER)
    short = evaluation(args, "together-15", ["phast:kind=deep"], "--steps", "15")
    full, fewer = results["rows"], {n: r for n, r in results["rows"].items() if n.startswith("steps:")}
    ratio = np.median(np.array(full["steps:15"]["seconds"]) / np.array(full["none"]["seconds"]))
    again = np.median(
        np.array(short["rows"]["phast:kind=deep"]["seconds"]) / np.array(short["rows"]["none"]["seconds"])
    )
    loss = float(np.mean(short["rows"]["phast:kind=deep"]["psnr"]))
    text = f"15 steps take {ratio:.2f}, with deep reuse {ratio * again:.2f} of the time; reuse keeps the 15-step image "
    text += f"to {loss:.1f} dB, while fewer steps keep the 20-step one to "
    text += ", ".join(f"{np.mean(row['psnr']):.1f} ({name})" for name, row in fewer.items())
    holds = again < 0.9 and loss > np.mean(full["steps:15"]["psnr"])
    return {"verdict": verdict(bool(holds), again > 1), "text": text}


def quality(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Claim 11: as a set, and against their prompts, the images are as good as the full sampler's."""
    summary = summarise(evaluation(args, "policies", POLICIES, "--equal-latency", "--fid", "vae"), "none")
    close = {n: r for n, r in summary.items() if r["psnr"] >= 30}
    drop = {n: summary["none"]["follows"] - r["follows"] for n, r in close.items() if "follows" in r}
    text = "; ".join(
        f"`{n}` {r['psnr']:.1f} dB, Fréchet distance {r['fid']:.2f}"
        + (f", prompt followed {r['follows']:.3f}" if "follows" in r else "")
        for n, r in summary.items()
    )
    worst = max(drop.values(), default=0.0)
    return {"verdict": verdict(worst < 0.01, worst > 0.03), "text": text}


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
}


def draw(name: str, found: dict[str, Any], path: Path) -> bool:
    """The stage's plot, where it has one."""
    figure, axes = plt.subplots(figsize=(7, 4))
    if name == "redundancy":
        shown = axes.imshow(found["change"], aspect="auto", cmap="magma", vmax=1)
        axes.set(xlabel="call - 1", ylabel="site", title="relative change since the call before")
        figure.colorbar(shown)
    elif name == "single":
        axes.semilogy(range(1, len(found["damage"]) + 1), np.mean(found["damage"], axis=1), "o-")
        axes.set(xlabel="the call that reuses its maps", ylabel="mean squared error of the image")
    elif name == "growth":
        calls, values = [int(c) for c in found["exponents"]], list(found["exponents"].values())
        axes.errorbar(calls, np.mean(values, axis=1), np.std(values, axis=1), fmt="o-")
        axes.axhline(0, color="0.5")
        axes.set(xlabel="call that is perturbed", ylabel="growth exponent per call")
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
    parser.add_argument("--draws", type=int, default=200, help="random plans")
    parser.add_argument("--search-budget", default="8min", help="for each search of the layer-wise stage")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    args = parser.parse_args(argv)
    command = shlex.join(["python", "scripts/reproduce.py", *(sys.argv[1:] if argv is None else argv)])

    args.out.mkdir(parents=True, exist_ok=True)
    prompts = read_lines(args.prompts_file or shipped_model() / "prompts" / "evaluation.txt")
    study = Study(minireuse.load(args.model), prompts, plans_of(args.model), args.steps)
    lines = ["# The method's claims on this model", "", f"`{command}`", ""]
    for name in args.stages:
        title, stage = STAGES[name]
        path = args.out / f"{name}.json"
        if not path.exists():
            write_whole([path], json.dumps(stage(args, study), indent=1).encode())
        found = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"## {title}: {found['verdict']}", "", found["text"], ""]
        if draw(name, found, args.out / f"{name}.png"):
            lines += [f"![{title}]({name}.png)", ""]
        write_whole([args.out / "report.md"], "\n".join(lines).encode(), overwrite=True)
        print(f"{title}: {found['verdict']}\n  {found['text']}", flush=True)


if __name__ == "__main__":
    main()

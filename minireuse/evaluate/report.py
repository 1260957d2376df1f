"""From the raw figures of an evaluation to a table, a plot and a grid of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minireuse.common.metrics import interval
from minireuse.common.timing import median_ratio, ratios
from minireuse.files import write_whole

FULL = "none"  # the row of the full sampler, which all others are compared with
KERNELS = ("seconds", "seconds_explicit")  # times of the sampling loop: fused kernel, every map written out
SHOWN = 8  # prompts in the grid of pictures
SAME = 70  # dB: less than one pixel in a hundred is off by one


def summarise(results: dict[str, Any], against: str) -> dict[str, dict[str, Any]]:
    """Means, intervals and ratios of each row, from what `results.json` holds."""
    rows, full = results["rows"], results["rows"][FULL]
    summary = {}
    for name, row in rows.items():
        made: dict[str, Any] = {
            "plan": row["plan"],
            "note": row.get("note", ""),
            "calls": row["calls"],
            "reused": row["reused"],
            "psnr": float(np.mean(row["psnr"])),
            "psnr_interval": interval(row["psnr"]),
            "ssim": float(np.mean(row["ssim"])),
        }
        if None not in row["follows"]:
            made["follows"] = float(np.mean(row["follows"]))
        made |= {key: row[key] for key in ("fid", "clip") if key in row}
        if row.get("seconds"):
            if "cache_peak_bytes" in row:
                made["cache_mib"] = row["cache_peak_bytes"] / 2**20
            for key in {"seconds", "seconds_total", "seconds_explicit"} & row.keys():
                # Each round by itself: what disturbs a machine for a while disturbs neighbours alike.
                made[key] = float(np.median(row[key]))
                made[f"{key}_ratio"] = fraction(row, full, key)
                made[f"{key}_spread"] = [float(q) for q in np.percentile(ratios(row[key], full[key]), [25, 75])]
        twins = {f"twin_{kernel}": pairs.get(name) for kernel, pairs in results["equal_latency"].items()}
        for label, other in (twins | {"against": against}).items():
            if other == FULL:  # the reference: nothing is closer to it than itself
                made |= {label: None} if label in twins else {}
            elif other in rows and other != name:
                gain = np.subtract(row["psnr"], rows[other]["psnr"])
                made[label] = {"row": other, "gain": float(gain.mean()), "interval": interval(gain)}
        summary[name] = made
    return summary


def fraction(row: dict[str, Any], full: dict[str, Any], kernel: str = KERNELS[0]) -> float:
    """What a row takes of another one's time: the median of the ratios, round by round."""
    return median_ratio(row[kernel], full[kernel])


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as Markdown."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "calls, reused": lambda r: f"{r['calls']}, {r['reused']}",
        "PSNR, dB [95 %]": lambda r: _with_interval(r["psnr"], r["psnr_interval"]),
        "SSIM": lambda r: f"{r['ssim']:.4f}",
        "prompt followed": lambda r: f"{r['follows']:.3f}",
        "Fréchet distance": lambda r: f"{r['fid']:.3f}",
        "CLIP score": lambda r: f"{r['clip']:.2f}",
        "time": lambda r: _with_interval(r["seconds_ratio"], r["seconds_spread"], 2),
        "whole time": lambda r: f"{r['seconds_total_ratio']:.2f}",
        "time, explicit maps": lambda r: f"{r['seconds_explicit_ratio']:.2f}",
        "cache, MiB": lambda r: f"{r['cache_mib']:.2f}",
        "at equal time, dB": lambda r: _gain(r["twin_seconds"]),
        "at equal time, explicit maps, dB": lambda r: _gain(r["twin_seconds_explicit"]),
        "paired, dB": lambda r: _gain(r["against"]),
    }
    lines = []
    for name, row in summary.items():
        escaped = name.replace("|", r"\|")
        lines.append([f"`{escaped}`", *(_cell(write, row) for write in columns.values())])
    used = [i for i in range(len(columns) + 1) if any(line[i] for line in lines)]
    head = ["", *columns]
    drawn = markdown([head[i] for i in used], [[line[i] for i in used] for line in lines])
    notes = [f"`{name}`: {row['note']}" for name, row in summary.items() if row["note"]]
    return drawn + "\n".join(["", *notes]) + "\n"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body]) + "\n"


def _cell(write: Callable[[dict[str, Any]], str], row: dict[str, Any]) -> str:
    """What a column says of a row; nothing where it was not measured, or has no meaning."""
    try:
        return write(row)
    except KeyError:
        return ""


def _with_interval(value: float, ends: Sequence[float], digits: int = 1) -> str:
    low, high = (f"{end:.{digits}f}" for end in ends)
    return f"{value:.{digits}f} [{low}, {high}]"


def _gain(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "the full sampler takes as long"
    low, high = difference["interval"]
    return f"{difference['gain']:+.1f} [{low:+.1f}, {high:+.1f}] on `{difference['row']}`"


def write_report(
    out: Path, summary: dict[str, dict[str, Any]], pictures: dict[str, Path], prompts: Sequence[str]
) -> str:
    """Write table.md, pareto.png and grid.png; returns the table, and what could not be drawn.

    pictures: each row's folder of images. Plots need matplotlib (the extra `eval`).
    """
    text = table(summary)
    write_whole([out / "table.md"], text.encode(), overwrite=True)
    grid(out / "grid.png", pictures, min(SHOWN, len(prompts)))
    try:
        import matplotlib
    except ImportError:
        return text + "no plots: matplotlib is not installed; pip install minireuse[eval]\n"
    matplotlib.use("Agg")
    if all("seconds_ratio" in row for row in summary.values()):
        pareto(out / "pareto.png", summary)
    return text


def grid(path: Path, pictures: dict[str, Path], columns: int) -> None:
    """The pictures of the first prompts, a row for each policy, in the order of the table."""
    rows = []
    for folder in pictures.values():
        images = [np.array(Image.open(folder / f"{i:05d}.png")) for i in range(columns)]
        rows.append(np.concatenate(images, axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


def pareto(path: Path, summary: dict[str, dict[str, Any]]) -> None:
    """PSNR over time, with intervals; the plain sampler with fewer steps as a line.

    Rows that give the full sampler's own images but for rounding are left out: they would squeeze all others together.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, max(5.0, 0.2 * len(summary))))  # inches; the legend has a line a row
    plain = {n: r for n, r in summary.items() if n.startswith("steps:") and "+" not in n}
    others = {n: r for n, r in summary.items() if n not in plain and r["psnr"] < SAME}
    points = sorted((r["seconds_ratio"], r["psnr"]) for r in plain.values())
    if points:
        axes.plot(*zip(*points, strict=True), "o-", color="0.5", label="fewer steps")
    for i, (name, row) in enumerate(others.items()):
        low, high = row["psnr_interval"]
        error = [[row["psnr"] - low], [high - row["psnr"]]]
        axes.errorbar(row["seconds_ratio"], row["psnr"], error, fmt="osD^vP*X"[i % 8], color=f"C{i % 10}", label=name)
    axes.set_xlabel("time, as a fraction of the full sampler's")
    axes.set_ylabel("PSNR to the full sampler's image, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""The report: a page whose sections are the paper's own, made from results.json alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib

from minireuse.files import write_whole

from paper import (
    carrying,
    exhaustive,
    extrapolation,
    figure_2,
    figure_3,
    figure_4,
    figure_5,
    layers,
    precision,
    search_rules,
    steps_and_reuse,
    table_1,
    table_2,
    tensors,
    tolerance,
)
from paper.verdicts import PAPER, table

matplotlib.use("Agg")

CHAPTERS: dict[str, dict[str, ModuleType]] = {
    "The paper's figures and tables": {
        "figure-2": figure_2,
        "figure-3": figure_3,
        "exhaustive": exhaustive,
        "figure-4": figure_4,
        "figure-5": figure_5,
        "table-1": table_1,
        "table-2": table_2,
        "search-rules": search_rules,
    },
    "What the paper leaves open": {
        "precision": precision,
        "layers": layers,
        "tensors": tensors,
        "steps-and-reuse": steps_and_reuse,
        "tolerance": tolerance,
    },
    "Beyond the paper": {"carrying": carrying, "extrapolation": extrapolation},
}
FIGURES = {name: module for chapter in CHAPTERS.values() for name, module in chapter.items()}


def write(out: Path, names: Iterable[str] = FIGURES) -> Path:
    """Draw plots and write the page beside the folder, and in it the table of verdicts for the README.

    out: the folder of results.json. names: of the stages whose plots are drawn. Returns the page.
    Raises: OSError, ValueError.
    """
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for name in names:
        if name in results["stages"]:
            FIGURES[name].draw(results["stages"][name]["found"], out / f"{name}.png")
    page = out.parent / f"{out.name}.md"
    for path, text in ((page, page_text(results, out.name)), (out / "verdicts.md", "\n".join(summary(results, "")))):
        write_whole([path], text.encode(), overwrite=True)
    return page


def page_text(results: dict[str, Any], folder: str) -> str:
    """The page as Markdown. folder: where the plots lie, as seen from the page."""
    lines = [
        "# The paper, figure by figure",
        "",
        f"The paper is {PAPER['source']}. {PAPER['marks']}",
        "",
        f"`{results['command']}` made this page. `--report` makes it again from `{folder}/results.json`.",
        "",
        *_setting(results),
        *summary(results, "#"),
    ]
    for chapter, modules in CHAPTERS.items():
        sections = [
            line
            for name, module in modules.items()
            if name in results["stages"]
            for line in section(name, module, results["stages"][name]["found"], folder)
        ]
        lines += [f"## {chapter}", "", *sections] if sections else []
    return "\n".join(lines).rstrip() + "\n"


def section(name: str, module: ModuleType, found: dict[str, Any], folder: str) -> list[str]:
    """One figure: what the paper measured and found, what was found here, the plot, and the verdict."""
    word, sentence = module.verdict(found)
    return [
        f"### {module.TITLE}",
        "",
        *module.papers(),
        "",
        *module.ours(found),
        f"![{module.TITLE}]({folder}/{name}.png)",
        "",
        f"**Verdict: {word}.** {sentence}",
        "",
    ]


def summary(results: dict[str, Any], link: str) -> list[str]:
    """The verdicts as a table, each with its sentence; with a link to the section where `link` is "#"."""
    rows = []
    for name, module in FIGURES.items():
        if name in results["stages"]:
            word, sentence = module.verdict(results["stages"][name]["found"])
            title = f"[{module.TITLE}](#{anchor(module.TITLE)})" if link else module.TITLE
            rows.append([title, word, sentence])
    return table(["the paper's statement", "here", "numbers"], rows)


def anchor(title: str) -> str:
    """What a heading is called in a link, on GitHub."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _setting(results: dict[str, Any]) -> list[str]:
    """What the numbers were found with; a line for each machine or version that was used."""
    known: dict[str, list[str]] = {}
    for name, stage in results["stages"].items():
        s = stage["setting"]
        text = (
            f"model {s['model']}, {s['prediction']} prediction, own grid `{s['spacing']}`, guidance "
            f"{s['guidance_scale']:g}, "
            f"{s['dtype']}, {s['device']} with {s['threads']} threads, torch {s['torch']}"
        )
        known.setdefault(text, []).append(name)
    if len(known) == 1:
        psnr = "PSNR is to the full sampler's image with the same seed; brackets hold 95 % intervals over prompts."
        return [f"All of it was measured with {next(iter(known))}. {psnr}", ""]
    return [*(f"- {', '.join(names)}: {text}." for text, names in known.items()), ""]

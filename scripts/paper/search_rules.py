"""Algorithm 1 as written, its shortened rounds, and the first move that improves: how often and how far they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from minireuse.plan import ReusePlan
from minireuse.policies import hurry
from minireuse.search.phast import Rounds, SearchResult, improve
from minireuse.search.plan_files import read_plan

from paper import exhaustive
from paper.plots import save
from paper.study import GRIDS, REUSED, Study, Way
from paper.verdicts import Verdict, gain, judged, spread, table

NEEDS_PLANS = ("phast-", "first-", "exact-")
TITLE = "Algorithm 1: the whole neighbourhood, and the first move that improves"
EPSILON = 0.02  # dB
RULES = {"whole neighbourhood": Rounds(epsilon=EPSILON), "first improvement": Rounds(first=True, epsilon=EPSILON)}
SEARCHED = {
    "phast": "4 prompts, then the best 8 on all",
    "first": "first improvement",
    "exact": "all moves on all prompts",
}


def measure(study: Study) -> dict[str, Any]:
    """Either rule on every prompt, with all 84 strategies scored; and the searches of 20 steps, on unseen prompts."""
    scored = (study.finished.get("exhaustive") or exhaustive.measure(study))["psnr"]
    found: dict[str, Any] = {"best": np.max(list(scored.values()), axis=0).tolist(), "rules": {}, "searches": {}}
    for rule, how in RULES.items():
        prompts = range(len(found["best"]))
        results = [_follow(study, {name: values[i] for name, values in scored.items()}, how) for i in prompts]
        found["rules"][rule] = {
            "plans": [exhaustive.digits(result.plan) for result in results],
            "psnr": [result.score for result in results],
            "tried": [len(result.tried) for result in results],
        }
    files = {file.stem: file for file in study.plans.glob("*.json")}
    for k in study.scale.ks:
        ways, about = {}, {}
        for rule in SEARCHED:
            file = files.get(f"{rule}-{GRIDS[0]}-{k}")
            if file is not None:
                plan, about[rule] = read_plan(file, study.pipe().sites)
                ways[rule] = Way(plan, spacing=GRIDS[0])
        if len(ways) < 2:
            continue
        ways["full"] = Way(study.full(), spacing=GRIDS[0])
        rows = study.judge(f"search-rules-{k}", ways, study.prompts[: study.scale.search_rules])
        found["searches"][str(k)] = {
            rule: {
                "grid": ways[rule].plan.grid,
                "psnr": rows[rule]["psnr"],
                "calls": about[rule].get("calls_made"),
                "finished": about[rule].get("finished"),
            }
            for rule in about
        }
    return found


def _follow(study: Study, scores: dict[str, float], how: Rounds) -> SearchResult:
    """What the search finds on one prompt whose scores are all known."""

    def score(plans: Sequence[ReusePlan], prompts: Sequence[int] | None) -> Any:
        return iter([scores[exhaustive.digits(plan)] for plan in plans])

    start = hurry(exhaustive.STEPS, study.maps, k=exhaustive.REUSED)
    return improve(score, start, study.maps, k=exhaustive.REUSED, how=how)


def verdict(found: dict[str, Any]) -> Verdict:
    whole, first = (found["rules"][rule] for rule in RULES)
    loss = gain(whole["psnr"], first["psnr"])
    differ = float(np.mean([a != b for a, b in zip(whole["plans"], first["plans"], strict=True)]))
    best = float(np.mean(np.array(whole["psnr"]) >= np.array(found["best"]) - 1e-9))
    word = judged(best > 0.9, best < 0.5)
    return Verdict(
        word,
        f"Where all strategies are known, the whole neighbourhood finds the best on {100 * best:.0f} % of "
        f"the prompts. First improvement ends at another plan on {100 * differ:.0f} % of them, "
        f"{spread(loss, 2)} dB lower, after {np.mean(first['tried']):.0f} instead of "
        f"{np.mean(whole['tried']):.0f} plans.",
    )


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    for i, rule in enumerate(RULES):
        row = found["rules"][rule]
        axes.plot(row["tried"], np.subtract(found["best"], row["psnr"]), "os"[i], fillstyle="none", label=rule)
    axes.set(xlabel="plans scored", ylabel="dB below the best of all strategies")
    axes.legend(title="one mark for each prompt")
    save(figure, path)


def papers() -> list[str]:
    return [
        "The paper's algorithm 1 begins at HURRY, scores every strategy one bit flip away, keeps the best "
        "that gains more "
        "than a small threshold, whose value is not printed, and repeats this until a round gains nothing. It usually "
        "settles within one flip.",
        f"`python -m minireuse.search` does so; its threshold is {EPSILON} dB. `--first` takes the first move that "
        "improves.",
    ]


def ours(found: dict[str, Any]) -> list[str]:
    rows = []
    for rule in RULES:
        row = found["rules"][rule]
        below = np.subtract(found["best"], row["psnr"])
        rows.append([rule, f"{np.mean(below):.2f}", f"{np.max(below):.2f}", f"{np.mean(row['tried']):.0f}"])
    lines = [
        "With all strategies of DPM++, 10 steps and 3 reused, scored on each prompt, both rules can be "
        "followed on every "
        f"prompt by itself ({len(found['best'])} prompts):",
        "",
        *table(["rule", "dB below the best, mean", "largest", "plans scored"], rows),
    ]
    if not found["searches"]:
        return [*lines, "No searches of 20 steps by several rules were at hand; the stage `searches` makes them.", ""]
    rows = [
        [
            k,
            SEARCHED[rule],
            f"`{row['grid']}`",
            spread(row["psnr"]),
            str(row["calls"]),
            "yes" if row["finished"] else "no",
        ]
        for k, rules in found["searches"].items()
        for rule, row in rules.items()
    ]
    head = [
        "reuse calls",
        "a round scores",
        "plan",
        "unseen PSNR, dB [95 %]",
        "U-Net calls",
        "settled within its budget",
    ]
    return [*lines, f"The searches of DDIM-20 on `{GRIDS[0]}`, whose half is {REUSED}:", "", *table(head, rows)]

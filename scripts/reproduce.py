"""The paper's figures and tables on one model: `python scripts/reproduce.py --out docs/paper` (extra `eval`).

The stages are run in turn. The first make what the others need: `searches` finds plans, `distil` and `tolerate` train
siblings of the shipped model. What they have made already is kept: plan files beside the results, weights under
`--work`. Each other stage is a figure of the paper, or a question that it leaves open, and adds what it finds to
results.json. The page, its plots and the table of verdicts are made from that file alone, which `--report` does again.

A run that was interrupted goes on with the same command. With plans and siblings at hand it takes about 80 minutes on
two cores, with `--quick` about 10. The searches take up to three hours more, and each training half an hour.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minireuse.common.journal import Journal
from minireuse.common.status import exit_status
from minireuse.files import digest_of, read_lines, shipped_model, write_whole

import export
import train_unet
from paper import page, searches
from paper.prompts import sets_of
from paper.study import (
    DISTILLED,
    OWN,
    QUICK,
    REUSED,
    SIBLING,
    TUNED_FIXED,
    TUNED_RANDOM,
    Scale,
    Study,
    loaded,
    setting_of,
)

CHECKED = 8  # further calibration prompts, on which a search scores the plan that it found
TRAINED = {DISTILLED: "distil", TUNED_FIXED: "tolerate", TUNED_RANDOM: "tolerate"}


def search_all(args: argparse.Namespace, study: Study) -> None:
    """Find every plan that is not there yet."""
    for search in searches.searches(study.scale.ks, args.search_budget, args.layerwise_budget):
        done = searches.run(
            search,
            study.pipe(search.spacing),
            args.model,
            args.calibration_file,
            args.search_prompts,
            study.plans,
            study.work,
        )
        print(f"{search.name}: {done}", flush=True)


def train_siblings(args: argparse.Namespace, study: Study, names: Sequence[str]) -> None:
    """Train the siblings of these names that are not there yet, from the model itself."""
    start = args.model or shipped_model()
    if not sets_of(study.prompts):
        print("only a model of landscapes can be trained here; its siblings are left out", flush=True)
        return
    for name in names:
        folder = study.models[name]
        assert folder is not None
        began = folder.parent / "began-with.txt"
        if not began.exists():
            write_whole([began], study.pipe().fingerprint.encode())
        if began.read_text() != study.pipe().fingerprint:
            raise ValueError(f"{folder.parent} began with another model; remove it, so that {name} is trained again")
        if folder.exists():
            print(f"{name}: is there", flush=True)
            continue
        run = ["--out", str(folder.parent), "--start", str(start), "--steps", str(args.tuning_steps)]
        run += ["--scenes", str(args.scenes), "--batch", "4", "--lr", "2e-4", "--samples", "0"]
        guidance = study.pipe().guidance_scale
        exported = ["--run", str(folder.parent), "--out", str(folder)]
        if name == DISTILLED:
            run, exported = [*run, "--distil", str(guidance)], [*exported, "--guidance-scale", "1"]
        elif name == TUNED_FIXED:
            file = folder.parent / "plan.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole([file], study.phast(REUSED)[0].to_json().encode(), overwrite=True)
            run += ["--tolerate", str(file)]
        else:
            run += ["--tolerate", "random"]
        train_unet.main(run)
        export.main(exported)
        print(f"{name}: trained", flush=True)


def figure(study: Study, name: str, command: str) -> None:
    """Run the stage of a figure, unless results.json holds it, and make the page again. command: what was typed."""
    module, path = page.FIGURES[name], study.out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"stages": {}}
    settings = json.loads(json.dumps(settings_of(study, name)))
    known = results["stages"].get(name)
    if known is None or known["settings"] != settings:
        journal = Journal(study.work / f"{name}.jsonl", settings)
        finished = {other: stage["found"] for other, stage in results["stages"].items()}
        found = module.measure(replace(study, journal=journal, finished=finished))
        results["stages"][name] = {"settings": settings, "setting": setting_of(study), "found": found}
        results["command"] = command
        write_whole([path], json.dumps(results, indent=1).encode(), overwrite=True)
    word, sentence = module.verdict(results["stages"][name]["found"])
    print(f"{module.TITLE}: {word}. {sentence}", flush=True)
    page.write(study.out, [name])


def settings_of(study: Study, name: str) -> dict[str, Any]:
    """What a stage's numbers depend on: its journal must agree with it to be resumed."""
    module = page.FIGURES[name]
    prefixes: tuple[str, ...] = getattr(module, "NEEDS_PLANS", ())
    files = [file for prefix in prefixes for file in sorted(study.plans.glob(f"{prefix}*.json"))]
    if "phast-" in prefixes:  # they stand in where nothing was searched
        files += sorted(((study.models[OWN] or shipped_model()) / "plans").glob("*.json"))
    models = [m for m in (OWN, *getattr(module, "NEEDS_MODELS", ())) if study.has(m)]
    return {
        "models": {model: study.pipe(model=model).fingerprint for model in models},
        "scale": vars(study.scale),
        "prompts": list(study.prompts[: study.scale.most]),
        "plans": {file.stem: digest_of(file) for file in files},
    }


FIRST: dict[str, Callable[[argparse.Namespace, Study], None]] = {
    "searches": search_all,
    "distil": lambda args, study: train_siblings(args, study, [DISTILLED]),
    "tolerate": lambda args, study: train_siblings(args, study, [TUNED_FIXED, TUNED_RANDOM]),
}
STAGES = (*FIRST, *page.FIGURES)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, help="default: the shipped model")
    prompts_help = "for the figures, one prompt per line; further files are further rows of table 1"
    p.add_argument("--prompts-file", type=Path, nargs="+", metavar="FILE", help=prompts_help)
    p.add_argument("--calibration-file", type=Path, metavar="FILE", help="prompts for the searches")
    p.add_argument("--sibling", type=Path, metavar="FOLDER", help="another model that knows these prompts, for table 1")
    p.add_argument("--stages", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    p.add_argument("--quick", action="store_true", help="2 prompts a stage, and neither searches nor trainings")
    p.add_argument("--prompts", type=int, metavar="N", help="of every stage, instead of its own number")
    p.add_argument("--rounds", type=int, metavar="N", help="of timed runs; default: 5")
    p.add_argument("--search-prompts", type=int, default=6, metavar="N", help="that the searches score plans on")
    p.add_argument("--search-budget", default="4min", metavar="N|Nmin", help="of each search, as its own --budget")
    p.add_argument("--layerwise-budget", default="18min", metavar="N|Nmin", help="of the layer-wise search")
    p.add_argument("--tuning-steps", type=int, default=1200, metavar="N", help="of each training")
    p.add_argument("--scenes", type=int, default=2000, metavar="N", help="that the trainings learn from")
    p.add_argument("--report", action="store_true", help="only make the page again from results.json")
    p.add_argument("--work", type=Path, default=Path("runs/paper"), help="for journals, pictures and weights")
    p.add_argument("--out", type=Path, default=Path("docs/paper"), help="for results, plans and plots; page: OUT.md")
    return p


def scale_of(args: argparse.Namespace) -> Scale:
    """How much of each stage is done. Raises: ValueError."""
    scale = QUICK if args.quick else Scale()
    if args.prompts is not None:
        if args.prompts < 1:
            raise ValueError(f"--prompts is {args.prompts}, expected 1 or more")
        scale = scale.with_prompts(args.prompts)
    return scale if args.rounds is None else replace(scale, rounds=args.rounds)


def study_of(args: argparse.Namespace, scale: Scale) -> Study:
    """The models and prompts that the arguments name. Raises: ValueError, OSError."""
    if args.model is not None and (args.prompts_file is None or args.calibration_file is None):
        raise ValueError("--model needs --prompts-file and --calibration-file with prompts that it can paint")
    first, *others = args.prompts_file or [shipped_model() / "prompts" / "evaluation.txt"]
    prompts = read_lines(first)
    if len(prompts) < scale.most:
        raise ValueError(f"{first} holds {len(prompts)} prompts, but {scale.most} are needed; lower --prompts")
    models = {OWN: args.model, **{name: args.work / name / "model" for name in TRAINED}}
    if args.sibling is not None:
        models[SIBLING] = args.sibling
    sets = {file.stem: read_lines(file) for file in others}
    return Study(models, prompts, scale, args.out / "plans", args.out, args.work, sets)


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    command = shlex.join(["python", "scripts/reproduce.py", *(sys.argv[1:] if argv is None else argv)])
    if args.report:
        print(page.write(args.out))
        return
    study = study_of(args, scale_of(args))
    for folder in (args.out, args.work, study.plans):
        folder.mkdir(parents=True, exist_ok=True)
    for name in args.stages or (page.FIGURES if args.quick else STAGES):
        if name in FIRST:
            FIRST[name](args, study)
            loaded.cache_clear()
        else:
            figure(study, name, command)


if __name__ == "__main__":
    sys.exit(exit_status(main, "interrupted; the same command goes on"))

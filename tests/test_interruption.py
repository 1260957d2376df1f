"""Long work that is killed again and again ends as if it had not been, and a full disk loses nothing."""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minireuse.evaluate import command as evaluate
from minireuse.sample import command as sample
from minireuse.search import command as search

import faults
import reproduce
from trainer import train

# Processes are forked from one that has imported all this and computed nothing: a start costs milliseconds.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["minireuse.search", "minireuse.evaluate", "minireuse.sample", "reproduce", "trainer"])
KILLS = 6  # of each kind of work; all but the last two have to meet it alive


def run_search(argv: list[str], out: Path) -> None:
    torch.set_num_threads(1)
    raise SystemExit(search.main([*argv, "--steps", "10", "--reuse", "5", "--quiet", "--out", str(out / "plan.json")]))


def run_evaluation(argv: list[str], out: Path) -> None:
    torch.set_num_threads(1)
    policies = ["--policies", "hurry", "deepcache", "interval:kind=out", "pab", "steps:6", "random"]
    raise SystemExit(evaluate.main([*argv, *policies, "--steps", "10", "--rounds", "0", "--quiet", "--out", str(out)]))


def run_reproduction(argv: list[str], out: Path) -> None:
    torch.set_num_threads(1)
    stages = ["--stages", "figure-2", "extrapolation", "precision"]
    reproduce.main([*argv, *stages, "--work", str(out / "work"), "--out", str(out)])


def run_training(argv: list[str], out: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = nn.Linear(3, 1)

    def loss(step: int) -> dict[str, Tensor]:
        time.sleep(0.002)
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return {"loss": (module(x) - x.sum(1, keepdim=True)).square().mean()}

    train("line", out, module, loss, steps=500, peak_lr=0.1, ema_decay=0.9, save_every=25)


def plan_found(out: Path) -> Any:
    found = json.loads((out / "plan.json").read_text())
    about = {name: found["about"][name] for name in ("score", "score_start", "scores_unseen", "rounds", "plans_tried")}
    return found["sites"], about


def figures_found(out: Path) -> Any:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {name: (row["psnr"], row["ssim"], row["cache_peak_bytes"]) for name, row in rows.items()}


def claims_found(out: Path) -> Any:
    return {n: stage["found"] for n, stage in json.loads((out / "results.json").read_text())["stages"].items()}


def weights_found(out: Path) -> Any:
    state = torch.load(out / "line.pt", weights_only=True)
    return state["module"]["weight"].tolist(), state["module"]["bias"].tolist(), state["step"]


WORK: dict[str, tuple[Callable[[list[str], Path], None], Callable[[Path], Any]]] = {
    "search": (run_search, plan_found),
    "evaluation": (run_evaluation, figures_found),
    "reproduction": (run_reproduction, claims_found),
    "training": (run_training, weights_found),
}


@pytest.fixture(scope="module")
def given(smallest_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The options that each kind of work shares with the run it is compared with."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red house\na lake\na blue house\nan oak\n" * 3)
    common = ["--model", str(smallest_folder), "--prompts-file", str(prompts)]
    return {
        "search": [*common, "--prompts", "1", "--check", "1", "--device", "cpu"],
        "evaluation": [*common, "--prompts", "4", "--batch-size", "1", "--device", "cpu"],
        "reproduction": [*common, "--calibration-file", str(prompts), "--prompts", "2"],
        "training": [],
    }


def finish(target: Callable[..., None], argv: list[str], out: Path) -> float:
    """Run to the end. Returns the seconds it took."""
    began = time.perf_counter()
    process = FORK.Process(target=target, args=(argv, out))
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - began


@pytest.mark.parametrize("kind", WORK)
def test_killed_work_ends_as_if_it_had_not_been(kind: str, given: dict[str, list[str]], tmp_path: Path) -> None:
    target, found = WORK[kind]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    seconds = finish(target, given[kind], whole)
    moments = random.Random(kind)
    hits = 0
    for _ in range(KILLS):
        process = FORK.Process(target=target, args=(given[kind], killed))
        process.start()
        process.join(moments.uniform(0.03, 0.2) * seconds)
        hits += process.is_alive()
        process.kill()
        process.join()
    finish(target, given[kind], killed)
    assert found(killed) == found(whole)
    assert hits >= KILLS - 2
    faults.note(f"kill -9: {kind}", "resumed to the same result", hits)


def run_search_on_a_full_disk(argv: list[str], out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    run_search(argv, out)


def test_a_full_disk_is_told_and_loses_nothing(
    given: dict[str, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Files may grow to 1500 bytes: the journal is cut off within a line."""
    whole, full = tmp_path / "whole", tmp_path / "full"
    whole.mkdir()
    full.mkdir()
    finish(run_search, given["search"], whole)
    process = FORK.Process(target=run_search_on_a_full_disk, args=(given["search"], full))
    capfd.readouterr()
    process.start()
    process.join()
    said = capfd.readouterr().err.splitlines()
    assert process.exitcode == 2
    assert [line for line in said if "File too large" in line and line.startswith("error: ")] == said[-1:]
    assert not (full / "plan.json").exists()
    finish(run_search, given["search"], full)
    assert plan_found(full) == plan_found(whole)
    faults.note("full disk", "told in one sentence, resumed to the same result")


def test_a_folder_that_cannot_be_written_to(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = sample.main(["--prompt", "a lake", "--model", str(model_folder), "--steps", "1", "--out", "/proc/a/b.png"])
    assert status == 2
    assert capsys.readouterr().err.count("error: ") == 1
    faults.note("folder that cannot be written to", "told in one sentence")

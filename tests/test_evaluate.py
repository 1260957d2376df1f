"""The evaluation command on a tiny model: its figures recomputed by hand, resuming, ranks, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

import minireuse
from minireuse.common import metrics
from minireuse.common.metrics import fidelity, interval, ssim
from minireuse.evaluate import command as evaluate
from minireuse.evaluate import report
from minireuse.evaluate.classifier import Classifier, ClassifierConfig, own_classifier
from minireuse.search.language import build

from conftest import in_two_processes
from train_classifier import write

COMMON = [
    "--steps",
    "5",
    "--prompts",
    "3",
    "--batch-size",
    "2",
    "--rounds",
    "1",
    "--device",
    "cpu",
    "--quiet",
    "--seed",
    "0",
]
POLICIES = ["hurry", "deepcache", "hurry:k=1,kind=out|tgate", "steps:3"]
PROMPTS = ["a red house", "a lake", "a blue house"]


@pytest.fixture
def argv(model_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = ["--model", str(model_folder), "--prompts-file", str(tmp_path / "prompts.txt"), *COMMON]
    return [*given, "--policies", *POLICIES]


def test_figures_are_those_of_the_images(
    argv: list[str], tmp_path: Path, pipeline: minireuse.Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate.main([*argv, "--out", str(out), "--against", "deepcache"]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert list(rows) == ["none", *POLICIES]
    full = pipeline.generate(PROMPTS[:2], seeds=[0, 1], steps=5).images  # a batch as the command makes it
    for name, row in rows.items():
        steps = 3 if name == "steps:3" else 5
        text = "none" if name == "steps:3" else name
        plan = build(text, pipeline.calls("ddim", steps), pipeline.sites)
        images = pipeline.generate(PROMPTS[:2], seeds=[0, 1], steps=steps, plan=plan).images
        assert row["psnr"][:2] == fidelity(images, full).tolist()
        assert row["ssim"][:2] == ssim(images, full).tolist()
        assert (row["calls"], row["reused"]) == (plan.calls, plan.reused)
        kept = np.array(Image.open(evaluate.picture(out, name, 1)))
        np.testing.assert_array_equal(kept, images[1])
        assert len(row["seconds"]) == len(row["seconds_total"]) == len(row["seconds_explicit"]) == 1
        assert (row["cache_peak_bytes"] > 0) == bool(row["reused"])
    assert rows["none"]["psnr"] == [metrics.CEILING] * 3
    table = (out / "table.md").read_text()
    assert table in printed
    assert all(f"| `{name.replace('|', chr(92) + '|')}` |" in table for name in rows)
    assert "on `deepcache`" in table
    assert Image.open(out / "grid.png").size == (3 * 16, len(rows) * 16)
    assert Image.open(out / "pareto.png").size[0] > 500


def test_an_interrupted_evaluation_goes_on(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    assert evaluate.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:
        judged = evaluate.judge_batch
        patched.setattr(evaluate, "judge_batch", lambda *a: stop() if a[4] else judged(*a))
        assert evaluate.main([*argv, "--out", str(tmp_path / "cut")]) == 130
    assert not (tmp_path / "cut" / "results.json").exists()
    with monkeypatch.context() as patched:  # what is known is not measured again
        patched.setattr(evaluate, "judge_batch", lambda *a: judged(*a) if a[4] else stop())
        assert evaluate.main([*argv, "--out", str(tmp_path / "cut")]) == 0
    whole, cut = (json.loads((tmp_path / n / "results.json").read_text())["rows"] for n in ("whole", "cut"))
    lines = (tmp_path / "cut" / "journal.jsonl").read_text().splitlines()[1:]
    rounds = [r["value"] for r in map(json.loads, lines) if r["key"].startswith("round")]
    for name in whole:
        assert cut[name]["seconds"] == [found[name]["seconds"] for found in rounds]
        assert (cut[name]["psnr"], cut[name]["ssim"]) == (whole[name]["psnr"], whole[name]["ssim"])
    assert evaluate.main([*argv, "--out", str(tmp_path / "cut")]) == 2
    assert "holds results or other files" in capsys.readouterr().err


def test_a_changed_plan_is_not_mixed_with_figures_of_the_old_one(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = build("hurry", 5, minireuse.load(argv[1], device="cpu").sites)
    (tmp_path / "p.json").write_text(plan.to_json())
    more = ["--policies", str(tmp_path / "p.json"), "--rounds", "0", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "judge_batch", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert evaluate.main([*argv, *more]) == 130
    (tmp_path / "p.json").write_text(plan.to_json().replace("...##", "..#.#"))
    assert evaluate.main([*argv, *more]) == 2
    assert "belongs to a run with other settings" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_two_processes_give_the_figures_of_one(argv: list[str], tmp_path: Path) -> None:
    assert evaluate.main([*argv, "--out", str(tmp_path / "one")]) == 0
    in_two_processes("minireuse.evaluate", [*argv, "--out", str(tmp_path / "two")])
    one, two = (json.loads((tmp_path / n / "results.json").read_text())["rows"] for n in ("one", "two"))
    for name in one:
        assert (one[name]["psnr"], one[name]["ssim"]) == (two[name]["psnr"], two[name]["ssim"])


def test_equal_latency_pairs_each_policy_with_the_plain_sampler_of_its_time(argv: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate.main([*argv, "--equal-latency", "--against", "steps:2", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    records = map(json.loads, (out / "journal.jsonl").read_text().splitlines()[1:])
    rounds = [r["value"] for r in records if r["key"].startswith("round")]
    assert "steps:2" in results["rows"]  # asked for, whether or not it is a twin
    assert set(results["equal_latency"]) == {"seconds", "seconds_explicit"}
    for kernel, name, twin in [(k, *pair) for k, pairs in results["equal_latency"].items() for pair in pairs.items()]:
        seconds = {name: np.median([found[name][kernel] for found in rounds]) for name in rounds[0]}
        plain = {n: s for n, s in seconds.items() if n == "none" or n.startswith("steps:")}
        assert set(plain) == {"none", "steps:2", "steps:3", "steps:4"}
        assert abs(plain[twin] - seconds[name]) == min(abs(s - seconds[name]) for s in plain.values())
        assert twin in results["rows"]
    assert all(set(pairs) == set(POLICIES[:3]) for pairs in results["equal_latency"].values())


def test_prompt_following_comes_from_the_file_given(argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def follow(images, prompts):\n    return [len(p) / 100 for p in prompts]\n")
    out = tmp_path / "out"
    assert evaluate.main([*argv, "--rounds", "0", "--check", str(tmp_path / "judge.py"), "--out", str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert rows["hurry"]["follows"] == [len(p) / 100 for p in PROMPTS]
    table = (out / "table.md").read_text()
    assert "prompt followed" in table
    assert "| time |" not in table  # not measured
    assert not (out / "pareto.png").exists()


def test_a_models_own_classifier_judges(argv: list[str], model_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = Classifier(ClassifierConfig({"colour": ("red", "blue"), "lake": ("none", "a lake")}, (8, 8))).eval()
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model_folder, model)
    write(classifier, model / "classifier")
    more = ["--model", str(model), "--rounds", "0", "--fid", "classifier", "--policies", "hurry"]
    assert evaluate.main([*argv, *more, "--out", str(out)]) == 0
    row = json.loads((out / "results.json").read_text())["rows"]["hurry"]
    images = [np.array(Image.open(evaluate.picture(out, "hurry", i))) for i in range(3)]
    judge = own_classifier(model)
    assert judge is not None
    assert row["follows"] == judge.follow(images, PROMPTS)
    assert row["follows"][1] is None  # "a lake" leaves the colour open
    assert row["fid"] > 0
    assert evaluate.main([*argv, *more[2:], "--out", str(tmp_path / "none")]) == 2  # a model without one


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fid", "classifier"], "--fid classifier needs the classifier of the shipped model; use --fid vae"),
        (["--policies", "steps:x"], "'steps:x' is not a number of steps"),
        (["--policies", "nonsense"], "policy is 'nonsense'"),
        (["--against", "pab"], "--against is 'pab', expected one of none, hurry"),
        (["--prompts", "9"], "holds 3 prompts, but 9 are needed"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--equal-latency", "--rounds", "0"], "--equal-latency needs times"),
        (["--check", "nowhere.py"], "nowhere.py"),
    ],
)
def test_bad_input(
    argv: list[str], tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([*argv, *more, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert not (tmp_path / "out").exists()


def test_ssim_agrees_with_scikit_image() -> None:
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)
    noisy = np.clip(clean + rng.normal(0, 20, clean.shape), 0, 255).astype(np.uint8)
    settings = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for i, value in enumerate(ssim(noisy, clean)):
        # scikit-image pads before it crops the border of 5 pixels, so its mean is over the same places.
        assert value == pytest.approx(structural_similarity(noisy[i], clean[i], data_range=255, **settings), abs=1e-7)
    assert ssim(clean, clean) == pytest.approx(1)
    with pytest.raises(ValueError, match="11x11"):
        ssim(clean[:, :8], clean[:, :8])
    with pytest.raises(ValueError, match="must agree"):
        ssim(clean, clean[:2])


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    samples = rng.exponential(size=(300, 60))
    covered = [low <= 1 <= high for low, high in (interval(sample, draws=500) for sample in samples)]
    assert 0.87 <= np.mean(covered) <= 0.98
    assert interval([2.0, 2.0]) == (2.0, 2.0)


def test_frechet_distance_against_the_formula(
    argv: list[str], tmp_path: Path, pipeline: minireuse.Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ["--rounds", "0", "--fid", "vae", "--clip-score", str(tmp_path / "no-such-model")]
    assert evaluate.main([*argv, *more, "--out", str(out)]) == 0
    assert "clip could not be computed" in capsys.readouterr().out  # and the rest went on
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert rows["none"]["fid"] == pytest.approx(0, abs=1e-6)

    def moments(name: str) -> tuple[np.ndarray, np.ndarray]:
        images = [np.array(Image.open(evaluate.picture(out, name, i))) for i in range(3)]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels)
        features = latents.unflatten(3, (4, -1)).unflatten(2, (4, -1)).mean(dim=(3, 5)).flatten(1).double().numpy()
        return features.mean(axis=0), np.cov(features.T)

    (a, cov_a), (b, cov_b) = moments("none"), moments("deepcache")
    trace_root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    expected = ((a - b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root
    assert rows["deepcache"]["fid"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert "Fréchet distance" in (out / "table.md").read_text()


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down in one round slows both rows."""
    row = {"plan": ".", "calls": 1, "reused": 0, "psnr": [100.0], "ssim": [1.0], "follows": [None]}
    times = {"seconds_total": [1.0] * 3, "seconds_explicit": [1.0] * 3, "cache_peak_bytes": 2**20}
    rows = {
        "none": row | times | {"seconds": [1.0, 9.0, 2.0]},
        "half": row | times | {"seconds": [0.5, 4.5, 1.0]},
    }
    summary = report.summarise({"rows": rows, "equal_latency": {"seconds": {"half": "none"}}}, "half")
    assert summary["half"]["seconds_ratio"] == 0.5
    assert summary["half"]["seconds_spread"] == [0.5, 0.5]
    assert summary["half"]["twin_seconds"] is None  # no plain sampler but the full one is as slow
    assert summary["none"]["against"]["gain"] == 0
    assert "the full sampler takes as long" in report.table(summary)
    assert summary["half"]["cache_mib"] == 1

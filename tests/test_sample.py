"""The command line, called as a user calls it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minireuse
from minireuse.policies import early, hurry, select
from minireuse.sample import command as sample

import faults


@pytest.fixture
def run(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line on the tiny model inside an empty folder. Returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(
        *argv: str, prompt: str | None = "a red house", model: Path | None = model_folder, steps: int | None = 4
    ) -> tuple[int, str, str]:
        common = ["--model", str(model), "--device", "cpu"] if model else []
        prompts = ["--prompt", prompt] if prompt is not None else []
        count = ["--steps", str(steps)] if steps is not None else []
        try:
            status = sample.main([*prompts, *common, *count, *argv])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_one_image_and_its_json(run, tmp_path: Path, pipeline: minireuse.Pipeline) -> None:
    status, out, err = run("--policy", "hurry", "--seed", "3", "--out", "a.png", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert set(report) == {
        *("images", "seconds", "seconds_total", "calls", "reused", "cache_peak_bytes", "plan", "policy", "sampler"),
        *("steps", "timesteps", "seeds", "model"),
    }
    assert report["images"] == ["a.png"]
    assert (report["calls"], report["reused"], report["plan"], report["seeds"]) == (4, 2, "..##", [3])
    assert 0 < report["seconds"] < report["seconds_total"]
    plan = hurry(4, select(pipeline.sites))
    expected = pipeline.generate("a red house", seeds=3, steps=4, plan=plan)
    assert report["cache_peak_bytes"] == expected.cache_peak_bytes
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.array(image), expected.images[0])
        assert image.text["prompt"] == "a red house"
        assert (image.text["seed"], image.text["sampler"], image.text["size"]) == ("3", "ddim", "16x16")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]  # nothing half-written stays behind


def test_several_images_fill_a_folder_prompts_first_then_seeds(run, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("a lake\n\na pine\n")
    status, out, _ = run(
        *(
            "--prompts-file",
            "more.txt",
            "--seed",
            "5",
            "--num-images",
            "2",
            "--batch-size",
            "4",
            "--out",
            "many",
            "--json",
        )
    )
    assert status == 0
    assert json.loads(out)["images"] == [f"many/{i:05d}.png" for i in range(6)]
    assert json.loads(out)["seeds"] == [5, 6]
    painted = []
    for path in sorted((tmp_path / "many").iterdir()):
        with Image.open(path) as image:
            painted.append((image.text["prompt"], image.text["seed"]))
    assert painted == [(p, s) for p in ("a red house", "a lake", "a pine") for s in ("5", "6")]


def test_nothing_is_overwritten_unless_asked(run, tmp_path: Path) -> None:
    for seed, options in (("0", ()), ("1", ()), ("2", ("--overwrite",))):
        assert run("--out", "a.png", "--seed", seed, "--quiet", *options)[0] == 0
    seeds = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            seeds[path.name] = image.text["seed"]
    assert seeds == {"a.png": "2", "a-1.png": "1"}
    for _ in range(2):
        run("--num-images", "2", "--out", "f", "--quiet")
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == [f"{i:05d}.png" for i in range(4)]


def test_summary_bar_and_quiet(run) -> None:
    _, out, err = run("--policy", "interval", "--reuse", "1")
    assert out.endswith("out.png\n")
    assert "4 calls (1 reused)" in out
    assert "..#." in err or "...#" in err  # the plan, in the progress bar
    assert run("--quiet") == (0, "", "")


def test_plan_file_kinds_and_sites(run, tmp_path: Path, pipeline: minireuse.Pipeline) -> None:
    plan = hurry(4, select(pipeline.sites, "cross", "out"), k=1)
    (tmp_path / "plan.json").write_text(plan.to_json())
    from_file = json.loads(run("--policy", "plan.json", "--out", "a.png", "--json")[1])
    named_options = ("--policy", "hurry", "--reuse", "1", "--sites", "cross", "--kind", "out")
    named = json.loads(run(*named_options, "--out", "b.png", "--json")[1])
    assert (from_file["plan"], from_file["reused"]) == ("...#", 1)
    assert from_file["cache_peak_bytes"] == named["cache_peak_bytes"] > 0
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert np.array_equal(np.array(a), np.array(b))
    mixed = plan | hurry(4, select(pipeline.sites, "self"), k=2)
    (tmp_path / "mixed.json").write_text(mixed.to_json())
    assert json.loads(run("--policy", "mixed.json", "--json")[1])["plan"] is None


def test_policies_take_knobs_and_combine(run) -> None:
    report = json.loads(run("--policy", "deepcache:every=3", "--json")[1])
    assert report["plan"] == ".##."
    status, out, _ = run("--policy", "hurry:k=1 | tgate:gate=3", "--json")
    assert status == 0
    assert (json.loads(out)["plan"], json.loads(out)["reused"]) == (None, 1)
    for policy, message in (
        ("deepcache:often=2", "no knob 'often'; deepcache has every, branch"),
        ("deepcache:every", "not knob=number"),
        ("none:k=1", "none has order"),
        ("deepcache:every=0", "every is 0"),
        ("deepcache:every=2.5", "every is 2.5, expected a whole number"),
        ("hurry:k=1.5", "k is 1.5, expected a whole number"),
        ("pab:start=0.9,end=0.1", "the window is 0.9 to 0.1"),
    ):
        status, _, err = run("--policy", policy)
        assert status == 2
        assert message in err
    status, _, err = run("--policy", "tgate", "--reuse", "2")
    assert status == 2
    assert "has no knob k" in err


def test_an_initial_image_is_resized_and_denoised(run, tmp_path: Path, pipeline: minireuse.Pipeline) -> None:
    Image.fromarray(np.full((16, 24, 3), 128, dtype=np.uint8)).save(tmp_path / "init.png")
    options = (
        "--negative-prompt cross --sampler ddim --guidance-scale 3 --eta 0.5 --attention explicit --width 24"
        " --height 16 --init-image init.png --strength 0.5 --cache-dtype bfloat16 --policy hurry --out a.png"
    )
    status, _, err = run(*options.split(), "--json")
    assert status == 0, err
    gray = torch.full((1, 3, 16, 24), 128.0) / 127.5 - 1  # in float32, as images are read
    expected = pipeline.generate(
        *("a red house",),
        negative_prompts="cross",
        steps=4,
        guidance_scale=3,
        eta=0.5,
        attention="explicit",
        init_images=gray,
        strength=0.5,
        plan=hurry(2, select(pipeline.sites)),
        cache=minireuse.cache.ReuseCache(torch.bfloat16),
    )
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.array(image), expected.images[0])
        assert image.text["cache_dtype"] == "bfloat16"


def test_every_option_arrives_where_it_belongs(
    run, tmp_path: Path, pipeline: minireuse.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option at another value than its default, watched at the two calls that take them."""
    seen: dict[str, object] = {}

    def load(path: Path, **given: object) -> minireuse.Pipeline:
        seen.update(given, path=path)
        return pipeline

    def generate(self: minireuse.Pipeline, prompts: list[str], **given: object) -> object:
        seen.update(given, prompts=prompts)
        return original(self, prompts, **given)

    original = minireuse.Pipeline.generate
    monkeypatch.setattr("minireuse.sample.command.load", load)
    monkeypatch.setattr(minireuse.Pipeline, "generate", generate)
    options = (
        "--negative-prompt cross --sampler ddim --guidance-scale 3 --eta 0.25 --attention explicit --width 24 --seed 9"
        " --height 8 --cache-dtype float32 --policy early --reuse 2 --kind out --sites cross --tokenizer t --dtype"
        " bfloat16 --prediction-type v_prediction --batch-size 1 --quiet --spacing karras --guidance-rescale 0.5"
        " --clip-skip 2"
    )
    assert run(*options.split())[0] == 0
    expected = {
        **{"path": Path(str(seen["path"])), "device": "cpu", "dtype": "bfloat16", "tokenizer": "t"},
        **{"prediction_type": "v_prediction", "prompts": ["a red house"], "negative_prompts": "cross", "steps": 4},
        **{"sampler": "ddim", "guidance_scale": 3.0, "seeds": [9], "height": 8, "width": 24, "eta": 0.25},
        **{"attention": "explicit", "init_images": None, "spacing": "karras", "guidance_rescale": 0.5},
        **{"clip_skip": 2},
    }
    assert {name: seen[name] for name in expected} == expected
    assert seen["plan"] == early(4, select(pipeline.sites, "cross", "out"), k=2)
    assert seen["cache"].dtype == torch.float32  # type: ignore[attr-defined]


def test_long_prompts_and_phast_say_what_they_do(run) -> None:
    status, out, err = run("--policy", "phast:kind=map", "--json", prompt="a " * 100 + "red circle")
    assert status == 0
    assert json.loads(out)["reused"] == 2
    assert "; phast uses one searched with another model" in err
    assert "at most 77" in err
    assert "red circle" in err


def test_phast_by_itself_saves_time_with_any_model(run) -> None:
    """The tiny model has no plans of its own, so deep features are extrapolated evenly."""
    status, out, err = run("--policy", "phast", "--json", steps=10)
    assert (status, json.loads(out)["plan"]) == (0, ".#.#.#.#.#")
    assert "of the full sampler's time, so phast reuses deep features, extrapolated, in 5 of 10 calls, evenly" in err
    status, out, err = run("--policy", "phast", "--latency", "0.3", "--json", steps=10)
    assert (status, json.loads(out)["reused"]) == (0, 9)
    status, _, err = run("--policy", "hurry", "--latency", "0.3")
    assert (status, "hurry takes none; ask for phast" in err) == (2, True)
    status, _, err = run("--policy", "phast", "--latency", "3")
    assert (status, "latency is 3.0, expected a share" in err) == (2, True)


NASTY = {
    "empty": "",
    "spaces": "   ",
    "emoji": "a red \U0001f534 circle \U0001f9d1\u200d\U0001f680",
    "right to left": "\u202eدائرة حمراء\u202c על רקע לבן",  # noqa: RUF001
    "control": "a red\x00 circle\x07\x1b[31m\r\n\u2028",
    "combining": "a z" + "\u0301" * 500,
    "one long word": "circle" * 20_000,
    "many words": "a red house " * 8_000,
    "only spaces": " " * 100_000 + "a red house",
    "markup": "<|endoftext|> <|startoftext|> </w>",
}


@pytest.mark.parametrize("name", NASTY)
def test_any_text_is_a_prompt(run, name: str) -> None:
    began = time.perf_counter()
    status, out, err = run("--json", "--out", "a.png", prompt=NASTY[name])
    assert status == 0
    assert json.loads(out)["images"] == ["a.png"]
    assert all(line.startswith("note: prompt has ") for line in err.splitlines())
    assert ("dropped" in err) == (name in ("combining", "one long word", "many words"))
    assert len(err) < 500
    assert time.perf_counter() - began < 10
    with Image.open("a.png") as image:
        image.load()
        assert image.info["prompt"] == NASTY[name]
    faults.note("strange prompt", "painted; what is dropped is told")


def test_half_a_character_is_refused(run) -> None:
    """What a terminal of another encoding hands over."""
    status, _, err = run("--out", "a.png", "--quiet", prompt="a red \udcff circle")
    assert (status, err.count("\n")) == (2, 1)
    assert not Path("a.png").exists()


@pytest.mark.parametrize(("steps", "k"), [(1, 0), (2, 0), (2, 1), (300, 299)])
def test_short_and_long_schedules(model_folder: Path, steps: int, k: int, tmp_path: Path, capsys) -> None:
    given = ["--prompt", "a lake", "--model", str(model_folder), "--policy", "hurry", "--out", str(tmp_path / "a.png")]
    assert sample.main([*given, "--steps", str(steps), "--reuse", str(k), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["calls"], report["reused"]) == (steps, k)
    assert sample.main([*given, "--steps", str(steps), "--reuse", str(steps)]) == 2
    assert f"k is {steps}, expected a whole number from 0 to {steps - 1}" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["1", "-2.5", "30"])
def test_guidance_of_any_sign(run, scale: str) -> None:
    assert run("--guidance-scale", scale, "--policy", "hurry", "--out", "a.png", "--quiet") == (0, "", "")
    assert Path("a.png").exists()


def test_guidance_zero_is_told_once_and_written_down_as_one(run) -> None:
    said = "note: guidance_scale 0 would ignore the prompt; it runs as 1, without guidance\n"
    many = ("--num-images", "2", "--batch-size", "1")
    assert run("--guidance-scale", "0", *many, "--out", "a", "--quiet") == (0, "", said)
    with Image.open("a/00001.png") as image:
        assert image.text["guidance_scale"] == "1.0"


def test_an_initial_image_keeps_its_proportions(run) -> None:
    Image.new("RGBA", (40, 160), (255, 0, 0, 128)).save("init.png")
    status, _, err = run("--init-image", "init.png", "--strength", "1", "--out", "a.png", "--quiet")
    assert (status, err) == (0, "note: init.png is transparent in places; it is laid onto white\n")
    with Image.open("a.png") as image:
        assert (image.size, image.text["size"]) == ((8, 32), "8x32")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(run, encoding: str) -> None:
    Path("prompts.txt").write_text("a red house\n", encoding=encoding)
    options = ("--steps", "1", "--quiet", "--out")
    assert run("--prompts-file", "prompts.txt", *options, "a.png", prompt=None, steps=None)[0] == 0
    assert run(*options, "b.png", steps=None)[0] == 0
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert a.text["prompt"] == "a red house"
        assert np.array_equal(np.array(a), np.array(b))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--policy", "hurried"), "policy is 'hurried'"),
        (("--policy", "hurry", "--reuse", "4"), "k is 4, expected a whole number from 0 to 3"),
        (("--num-images", "2", "--out", "a.png"), "one file for 2 images"),
        (("--out", "a.jpg"), "images are written as PNG"),
        (("--num-images", "0"), "--num-images is 0"),
        (("--seed", "1", "2", "--num-images", "2"), "several seeds"),
        (("--seed", "-1"), "--seed is -1"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--width", "17"), "width is 17"),
        (("--init-image", "missing.png"), "missing.png"),
        (("--prompts-file", "missing.txt"), "missing.txt"),
        (("--steps", "0"), "steps is 0"),
        (("--eta", "-1.5"), "eta is -1.5, expected 0"),
        (("--eta", "0.5", "--sampler", "plms"), "only ddim takes one"),
        (("--policy", "tgate", "--kind", "out"), "--policy tgate has its own sites"),
        (("--policy", "deepcache|pab", "--sites", "self"), "leave out --kind and --sites"),
        (("--policy", "hurry:kind=bogus"), "kind is 'bogus', expected one of map, out, deep"),
        (("--sampler", "none"), "invalid choice"),
        (("--dtype", "int8"), "invalid choice"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(run, tmp_path: Path, argv: tuple[str, ...], message: str) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_bad_files_are_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "text.png").write_text("not a picture")
    assert "plan.json is not a plan" in run("--policy", "plan.json")[2]
    assert "not an image" in run("--init-image", "text.png")[2]
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, format="PNG")
    (tmp_path / "whole.png").write_bytes(picture.getvalue())
    (tmp_path / "cut.png").write_bytes(picture.getvalue()[:-30])
    assert "cut.png is a broken image" in run("--init-image", "cut.png")[2]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "whole.png is a broken image" in run("--init-image", "whole.png")[2]  # a bomb, for all that Pillow knows
    assert "no model at nowhere" in run(model=Path("nowhere"))[2]
    assert "no prompt given" in run(prompt=None)[2]


def test_interruption_is_quiet_and_leaves_no_file(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(minireuse.pipeline.Pipeline, "generate", interrupt)
    status, out, err = run("--out", "a.png", "--quiet")
    assert (status, out, err) == (130, "", "interrupted\n")
    assert not list(tmp_path.iterdir())


def test_module_is_runnable(model_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minireuse.sample", "--model", str(model_folder), "--prompt", "a lake"]
    done = subprocess.run(
        [*command, "--steps", "2", "--device", "cpu", "--quiet"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out.png").exists()


def test_grids_and_timesteps(run, tmp_path: Path, pipeline: minireuse.Pipeline) -> None:
    """What --timesteps lists is what the model is called at; a picture is made again on the grid it was made on."""
    report = json.loads(run("--timesteps", "900,500.5,100", "--out", "a.png", "--json", steps=None)[1])
    assert (report["steps"], report["timesteps"], report["calls"]) == (3, [900, 500.5, 100], 3)
    expected = pipeline.generate("a red house", steps=(900, 500.5, 100)).images[0]
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.array(image), expected)
        assert image.text["steps"] == "900,500.5,100"
    report = json.loads(run("--spacing", "trailing", "--out", "b.png", "--json")[1])
    assert report["timesteps"] == [999, 749, 499, 249]
    for name in ("a", "b"):
        assert run("--from-png", f"{name}.png", "--out", f"{name}-again.png", prompt=None, steps=None)[0] == 0
        with Image.open(tmp_path / f"{name}.png") as one, Image.open(tmp_path / f"{name}-again.png") as two:
            assert np.array_equal(np.array(one), np.array(two))
    for text, message in (
        ("900,900", "expected numbers that fall"),
        ("100,-1", "expected numbers that fall"),
        ("nan,1", "expected numbers that fall"),
        ("many", "expected numbers such as"),
        ("2000,100", "the model knows no noisier latents"),
    ):
        status, _, err = run("--timesteps", text, steps=None)
        assert status == 2
        assert message in err
    status, _, err = run("--timesteps", "900,100", "--spacing", "karras", steps=None)
    assert (status, "leave out --steps and --spacing" in err) == (2, True)

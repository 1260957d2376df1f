"""A PNG tells how to make it again, pixel for pixel; one that does not is refused with the reason."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import minireuse
from minireuse.compilation import CompiledUNet
from minireuse.sample import command as sample
from minireuse.sample.recipe import Recipe, from_png
from minireuse.samplers import SAMPLERS
from minireuse.unet import UNet

import faults
from conftest import edit_json

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in an empty folder: its status and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*argv: str) -> tuple[int, str]:
        status = sample.main([*argv, "--quiet"])
        return status, capsys.readouterr().err

    def with_model(*argv: str) -> tuple[int, str]:
        return command(*(() if "--from-png" in argv else ("--model", str(model_folder))), *argv)

    return with_model


def pixels(path: str) -> np.ndarray:
    return np.array(Image.open(path))


SETTINGS = [
    *(("--steps", "3", "--sampler", name) for name in SAMPLERS),
    ("--eta", "0.7", "--steps", "4"),
    ("--guidance-scale", "1", "--negative-prompt", "a lake"),
    ("--policy", "hurry|deepcache:every=3", "--steps", "6", "--cache-dtype", "uint8"),
    ("--policy", "deepcache:order=1|interval:order=1", "--steps", "6", "--cache-dtype", "uint8"),
    ("--policy", "random", "--reuse", "2", "--steps", "6", "--attention", "explicit", "--width", "32"),
    ("--dtype", "bfloat16", "--steps", "2"),
    ("--init-image", "first.png", "--strength", "0.5", "--steps", "4"),
    ("--clip-skip", "2", "--steps", "2"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_the_same_pixels_again(run: Run, settings: tuple[str, ...]) -> None:
    if "--init-image" in settings:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8)).save("first.png")
    made = ["--prompt", "a red house", "an oak", "--num-images", "2", "--seed", "5", "--batch-size", "3"]
    assert run(*made, *settings, "--out", "out") == (0, "")
    for name in ("00000.png", "00002.png", "00003.png"):  # the last one in a batch of its own
        status, said = run("--from-png", f"out/{name}", "--out", f"again-{name}")
        assert (status, said) == (0, "")
        assert np.array_equal(pixels(f"again-{name}"), pixels(f"out/{name}"))
        first, second = (from_png(Path(p))[0] for p in (f"out/{name}", f"again-{name}"))
        assert first == second
    faults.note("picture made again from its PNG", "the same pixels", 3)


def test_what_else_is_given_must_not_matter(run: Run, tmp_path: Path) -> None:
    assert run("--prompt", "a lake", "--out", "a.png", "--steps", "2")[0] == 0
    status, said = run("--from-png", "a.png", "--steps", "3")
    assert (status, said) == (2, "error: --from-png takes everything from the file; leave out --steps\n")
    assert not Path("out.png").exists()


def rewritten(change: Callable[[dict[str, str]], object], to: str = "b.png") -> None:
    """A copy of a.png with other texts."""
    with Image.open("a.png") as image:
        chunks = {key: str(value) for key, value in image.info.items()}
        change(chunks)
        info = PngInfo()
        for key, value in chunks.items():
            info.add_itxt(key, value)
        image.save(to, pnginfo=info)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 12}, "was made by another model than"),
        ({"digests": '{"VAE": "0"}'}, "was made by another model than"),
        ({"digests": '{"VAE": 0}'}, "text 'digests' is"),
        ({"digests": "[]"}, "text 'digests' is '[]'"),
        ({"tokens": "0"}, "(another tokenizer); name the tokenizer with --tokenizer"),
        ({"parameters": "words"}, ""),  # for other people's tools
        ({"seed": "elephant"}, ""),  # readable, but what counts stands in the batch
        ({"batch": '{"place": 0, "jobs": [["a lake", -1]]}'}, "text 'batch' is"),
        ({"batch": '{"place": 1, "jobs": [["a lake", 1]]}'}, "place 1 of 1 images"),
        ({"batch": "[" * 5000}, "nested too deeply"),
        ({"steps": "many"}, "text 'steps' is 'many'"),
        ({"steps": "-3"}, "expected"),
        ({"size": "16"}, "text 'size' is '16'"),
        ({"size": "17x16"}, "width is 17, expected a multiple of"),
        ({"size": "1000000x16"}, "expected at most 16384x16384"),
        ({"sampler": "magic"}, "sampler is 'magic', expected one of ddim"),
        ({"cache_dtype": "int4"}, "cache_dtype is 'int4', expected one of"),
        ({"attention": "paid"}, "attention is 'paid', expected one of"),
        ({"compile": "maybe"}, "its text 'compile' is 'maybe'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"plan": "{}"}, "text 'plan' is '{}'"),
        ({"guidance_scale": "nan"}, "guidance_scale is nan, expected a finite number"),
        ({"model": "/nowhere"}, "no model at /nowhere"),
        ({"init_image": '["gone.png", "0123"]'}, "began with the image gone.png, which is gone or has changed"),
        ({"init_image": "7"}, "text 'init_image' is '7'"),
    ],
)
def test_other_texts_are_refused_or_do_not_matter(run: Run, change: dict[str, str], message: str) -> None:
    assert run("--prompt", "a lake", "--out", "a.png", "--steps", "2")[0] == 0
    rewritten(lambda chunks: chunks.update(change))
    status, said = run("--from-png", "b.png", "--out", "c.png")
    assert status == (2 if message else 0)
    assert message in said
    assert said.count("\n") == bool(message)
    assert Path("c.png").exists() is not bool(message)


def changed(folder: Path, part: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The weights of a part, changed in place."""
    path = next((folder / part).glob("*.safetensors"))
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def other_decoder(folder: Path) -> None:
    changed(folder, "vae", lambda tensors: tensors["decoder.conv_out.bias"].add_(0.1))


def other_text_encoder(folder: Path) -> None:
    changed(folder, "text_encoder", lambda tensors: next(iter(tensors.values())).mul_(1.01))


def other_unet(folder: Path) -> None:
    changed(folder, "unet", lambda tensors: tensors["conv_out.bias"].add_(0.1))


def other_tokenizer(folder: Path) -> None:
    """Of the same size, with two tokens that the prompt has exchanged, in whichever files this version wrote."""
    for path in (folder / "tokenizer").glob("*.json"):
        first, second, between = '"red</w>":', '"house</w>":', '"?":'
        text = path.read_text().replace(first, between).replace(second, first)
        path.write_text(text.replace(between, second))


def setting(part: str, **changes: object) -> Callable[[Path], None]:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return lambda folder: edit_json(folder / part / name, **changes)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (other_decoder, "VAE"),
        (other_text_encoder, "text encoder"),
        (other_unet, "U-Net"),
        (other_tokenizer, "tokenizer"),
        (setting("vae", scaling_factor=0.4), "VAE"),
        (setting("unet", attention_head_dim=[4, 4, 4]), "U-Net"),
        (setting("text_encoder", num_attention_heads=4), "text encoder"),
        (setting("text_encoder", hidden_act="gelu"), "text encoder"),
        (setting("scheduler", beta_end=0.013), "schedule"),
        (setting("scheduler", set_alpha_to_one=True), "schedule"),
        (setting("scheduler", steps_offset=0), "schedule"),
        (setting("scheduler", rescale_betas_zero_snr=True), "schedule"),
    ],
)
def test_another_model_is_refused_whatever_part_is_another(
    run: Run, model_folder: Path, change: Callable[[Path], None], part: str
) -> None:
    folder = shutil.copytree(model_folder, Path("model"))
    made = ["--model", "model", "--prompt", "a red house", "--steps", "2"]
    assert run(*made, "--out", "a.png") == (0, "")
    change(folder)
    assert run(*made, "--out", "other.png")[0] == 0
    assert not np.array_equal(pixels("other.png"), pixels("a.png")), "the change must matter"
    status, said = run("--from-png", "a.png", "--out", "b.png")
    assert (status, said.count("\n")) == (2, 1), said
    assert f"a.png was made by another model than model (another {part}); name th" in said
    assert not Path("b.png").exists()


def test_what_changes_no_picture_is_no_other_model(run: Run, model_folder: Path) -> None:
    folder = shutil.copytree(model_folder, Path("model"))
    assert run("--model", "model", "--prompt", "a lake", "--steps", "2", "--out", "a.png") == (0, "")
    edit_json(folder / "unet" / "config.json", sample_size=16)
    edit_json(folder / "vae" / "config.json", force_upcast=False)
    assert run("--from-png", "a.png", "--out", "b.png") == (0, "")
    assert np.array_equal(pixels("b.png"), pixels("a.png"))


def test_a_tokenizer_that_was_given_has_to_be_given_again(run: Run, model_folder: Path) -> None:
    folder = shutil.copytree(model_folder, Path("model"))
    other_tokenizer(folder)
    made = ["--prompt", "a red house", "--steps", "2", "--tokenizer", "model/tokenizer"]
    assert run(*made, "--out", "a.png") == (0, "")
    status, said = run("--from-png", "a.png", "--out", "b.png")
    assert (status, "(another tokenizer); name the tokenizer with --tokenizer" in said) == (2, True)
    assert run("--from-png", "a.png", "--tokenizer", "model/tokenizer", "--out", "b.png") == (0, "")
    assert np.array_equal(pixels("b.png"), pixels("a.png"))


def test_a_picture_of_version_0_1_is_painted_with_a_note(run: Run) -> None:
    assert run("--prompt", "a lake", "--out", "a.png", "--steps", "2")[0] == 0
    newer = ("digests", "tokens", "spacing", "guidance_rescale", "parameters")
    rewritten(lambda chunks: [chunks.pop(name) for name in newer])
    status, said = run("--from-png", "b.png", "--out", "c.png")
    assert status == 0
    assert said == (
        "note: b.png is of version 0.1, which knows another model by its U-Net alone; "
        "where another part has changed, so have the pixels\n"
    )
    assert np.array_equal(pixels("c.png"), pixels("a.png"))


def infotext(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings, as AUTOMATIC1111's `parse_generation_parameters` finds them."""
    *lines, last = text.strip().split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(found) >= 3, "otherwise the last line counts as prompt"
    begins = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[begins:]).removeprefix("Negative prompt:").strip()
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in found}
    return "\n".join(lines[:begins]), negative, values


def test_tools_of_automatic1111_find_prompt_and_settings(run: Run, model_folder: Path) -> None:
    shutil.copytree(model_folder, "my, model: two.safetensors")
    made = ["--prompt", "a red house,\nand Steps: many", "--negative-prompt", "blue, ★", "--seed", "7", "--steps", "3"]
    made += ["--sampler", "dpmpp_2m", "--spacing", "karras", "--guidance-scale", "4.5"]
    assert run("--model", "my, model: two.safetensors", *made, "--out", "a.png") == (0, "")
    with Image.open("a.png") as image:
        prompt, negative, settings = infotext(image.info["parameters"])
    assert (prompt, negative) == ("a red house,\nand Steps: many", "blue, ★")
    assert settings.pop("Version").startswith("minireuse")
    assert settings == {
        "Steps": "3",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "4.5",
        "Seed": "7",
        "Size": "16x16",
        "Model": "my, model: two",
    }


def test_a_prompt_in_latin_letters_is_where_older_tools_look(run: Run) -> None:
    assert run("--prompt", "a réd circle", "--steps", "2", "--out", "a.png") == (0, "")
    assert b"tEXtparameters\0a r\xe9d circle\nSteps: 2, Sampler: DDIM, " in Path("a.png").read_bytes()


def test_an_image_to_begin_with_may_have_moved(run: Run) -> None:
    Image.new("RGB", (16, 16), "red").save("first.png")
    run("--prompt", "a lake", "--init-image", "first.png", "--steps", "4", "--out", "a.png")
    Path("first.png").rename("moved.png")
    assert run("--from-png", "a.png", "--out", "b.png")[0] == 2
    assert run("--from-png", "a.png", "--init-image", "moved.png", "--out", "b.png") == (0, "")
    assert np.array_equal(pixels("b.png"), pixels("a.png"))


def test_what_else_the_pixels_depend_on(run: Run) -> None:
    """What the model predicts, and the kernel that writes maps down, in 8 bits."""
    made = ["--prompt", "a lake", "--steps", "4", "--policy", "hurry", "--cache-dtype", "uint8"]
    assert run(*made, "--out", "plain.png")[0] == 0
    assert run(*made, "--prediction-type", "v_prediction", "--out", "v.png")[0] == 0
    assert run(*made, "--save-maps", "maps", "--out", "watched.png")[0] == 0
    assert not np.array_equal(pixels("v.png"), pixels("plain.png"))
    np.testing.assert_allclose(pixels("watched.png").astype(float), pixels("plain.png"), atol=3)
    assert run("--from-png", "v.png", "--out", "v-again.png") == (0, "")
    assert np.array_equal(pixels("v-again.png"), pixels("v.png"))
    status, said = run("--from-png", "watched.png", "--out", "without.png")
    assert (status, "made with --save-maps" in said) == (0, True)
    assert run("--from-png", "watched.png", "--save-maps", "maps-again", "--out", "w-again.png") == (0, "")
    assert np.array_equal(pixels("w-again.png"), pixels("watched.png"))


def test_a_dry_run_of_a_picture(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("--prompt", "a lake", "--steps", "4", "--policy", "hurry", "--out", "a.png")
    assert run("--from-png", "a.png", "--dry-run") == (0, "")


@pytest.mark.parametrize("name", ["batch", "plan", "fingerprint", "steps", "model"])
def test_a_missing_text_is_named(run: Run, name: str) -> None:
    assert run("--prompt", "a lake", "--out", "a.png", "--steps", "2")[0] == 0
    rewritten(lambda chunks: chunks.pop(name))
    status, said = run("--from-png", "b.png")
    assert (status, f"b.png does not contain the settings it was made with: it has no text {name!r}" in said) == (
        2,
        True,
    )


def test_other_versions_are_told(run: Run) -> None:
    assert run("--prompt", "a lake", "--out", "a.png", "--steps", "2")[0] == 0
    rewritten(lambda chunks: chunks.update(versions="minireuse 0.0"))
    status, said = run("--from-png", "b.png", "--out", "c.png")
    assert status == 0
    assert said.startswith("note: the file was made with minireuse 0.0; this run uses minireuse ")


def test_files_that_are_no_pngs(run: Run) -> None:
    Path("words.png").write_text("no picture")
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format="JPEG")
    Path("photo.png").write_bytes(buffer.getvalue())
    Image.new("RGB", (64, 64)).save("plain.png")
    Path("cut.png").write_bytes(Path("plain.png").read_bytes()[:60])
    for name, message in (
        ("words", "not a PNG"),
        ("photo", "not a PNG"),
        ("plain", "no text 'batch'"),
        ("cut", "a broken image"),
    ):
        status, said = run("--from-png", f"{name}.png")
        assert (status, said.count("\n")) == (2, 1), said
        assert message in said
    assert run("--from-png", "gone.png")[0] == 2


def test_a_picture_beyond_all_bounds(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own guard against files that unpack to gigabytes."""
    Image.new("RGB", (64, 64)).save("huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    status, said = run("--from-png", "huge.png")
    assert (status, "exceeds limit" in said, said.count("\n")) == (2, True, 1)


def test_texts_hold_what_a_reader_looks_for(run: Run) -> None:
    assert run("--prompt", "a réd ★", "--seed", "7", "--steps", "2", "--policy", "hurry", "--out", "a.png")[0] == 0
    with Image.open("a.png") as image:
        texts = dict(image.info)
    assert (texts["prompt"], texts["seed"], texts["size"]) == ("a réd ★", "7", "16x16")
    assert (texts["dtype"], texts["device"]) == ("float32", "cpu")
    assert json.loads(texts["plan"])["calls"] == 2
    assert Recipe.from_chunks(texts).chunks() == texts


def test_out_of_memory_says_what_would_help(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*args: object, **settings: object) -> None:
        raise raised[0]

    raised: list[Exception] = [torch.cuda.OutOfMemoryError("CUDA out of memory.")]
    monkeypatch.setattr(minireuse.Pipeline, "generate", generate)
    for error in (raised[0], RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        raised[0] = error
        status, said = run("--prompt", "a lake", "--policy", "hurry", "--steps", "4")
        assert status == 2
        assert "out of memory with a batch of 1; the cache alone takes up to 0.5 MiB; try --batch-size 1" in said
    raised[0] = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        run("--prompt", "a lake", "--steps", "4")


def test_compiled_pictures_are_made_compiled_again(
    run: Run, smallest_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[CompiledUNet] = []

    def quick(unet: UNet) -> CompiledUNet:
        made.append(CompiledUNet(unet, backend="eager"))
        return made[-1]

    monkeypatch.setattr("minireuse.compilation.CompiledUNet", quick)
    options = ["--model", str(smallest_folder), "--prompt", "a lake", "--steps", "2", "--policy", "hurry"]
    assert run(*options, "--compile", "--out", "a.png") == (0, "")
    assert run("--from-png", "a.png", "--out", "b.png") == (0, "")
    assert run(*options, "--out", "c.png") == (0, "")
    assert [len(compiled.graphs) for compiled in made] == [2, 2]  # one that stores, one that reuses
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert abs(pixels("a.png").astype(int) - pixels("c.png")).max() <= 1
    status, said = run("--from-png", "a.png", "--no-compile", "--out", "d.png")
    assert (status, "made with --compile; this run does not compile; pixels may differ" in said) == (0, True)
    assert np.array_equal(pixels("d.png"), pixels("c.png"))
    status, said = run(*options, "--compile", "--save-maps", "maps")
    assert (status, "leave out --save-maps or --compile" in said) == (2, True)

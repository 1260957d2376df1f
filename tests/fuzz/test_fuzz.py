"""Files from strangers: read, or refused in one sentence. Never a traceback, a hang, or memory without bounds.

Bounded here; `FUZZ_CASES=6000 pytest tests/fuzz --hypothesis-seed=1` tries as many of each kind.
"""

from __future__ import annotations

import functools
import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig

from minireuse.checkpoints import ldm
from minireuse.checkpoints import parts as checkpoint
from minireuse.checkpoints.configs import (
    SCHEDULERS,
    read_schedule_config,
    read_unet_config,
    read_vae_config,
    text_settings,
)
from minireuse.checkpoints.fields import ConfigError
from minireuse.checkpoints.lora import find_lora, merge_loras
from minireuse.checkpoints.tensors import CheckpointError, fill, open_file
from minireuse.checkpoints.tokenizer import read_tokenizer
from minireuse.common.journal import Journal
from minireuse.config import SD1_UNET, SDXL_UNET, VAEConfig
from minireuse.files import read_text
from minireuse.pipeline import Pipeline
from minireuse.plan import ReusePlan, Site
from minireuse.policies import hurry, select
from minireuse.sample.recipe import Recipe, from_png
from minireuse.samplers import Denoise
from minireuse.schedule import Schedule
from minireuse.search import read_searched
from minireuse.text import TextEncoder
from minireuse.unet import UNet
from minireuse.vae import VAE

import faults
from conftest import SMALLEST_UNET
from ldm_layout import FULL, XL, alphas_cumprod, layout, unused
from mutate import bytes_like, json_like, text_of

PUBLISHED = json.loads((Path(__file__).parents[1] / "published_configs.json").read_text())
CASES = int(os.environ.get("FUZZ_CASES", "320"))
SECONDS = 10  # that no case may take
MIB = 256  # that all cases of a kind together may add to the peak of the process; the files are kilobytes
few = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize="FUZZ_CASES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """The peak of the process's memory is measured anew for each kind of file."""
    marks, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not marks.exists():  # not Linux
        yield
        return

    def kibibytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    marks.write_text("5")
    before = kibibytes("VmRSS:")
    yield
    added = (kibibytes("VmHWM:") - before) / 1024
    assert added < MIB, f"{added:.0f} MiB more"


def attempt(kind: str, work: Callable[[], object]) -> None:
    """Do what reads a hostile file; whatever it raises must be a sentence."""
    began = time.perf_counter()
    said = None
    try:
        work()
    except (ValueError, OSError) as error:
        said = str(error)
    faults.note(f"spoilt {kind}", "still good" if said is None else "refused in one sentence")
    assert said != "", "an empty sentence"
    assert "\n" not in (said or ""), f"more than a sentence: {said}"
    assert len(said or "") < 1000, f"a very long sentence: {(said or '')[:300]} ..."
    assert time.perf_counter() - began < SECONDS


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configurations of a good model, each of which is spoilt in turn."""
    copied = tmp_path_factory.mktemp("spoilt")
    for config in (*model_folder.glob("*/config.json"), model_folder / "scheduler" / "scheduler_config.json"):
        (copied / config.parent.name).mkdir()
        (copied / config.parent.name / config.name).write_bytes(config.read_bytes())
    return copied


CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(folder: Path, name: str) -> None:
    good = (folder / name).read_bytes()

    # Building modules takes longer than all other cases together.
    @settings(few, max_examples=CASES // 4 if name.startswith(("unet", "vae")) else CASES)
    @given(text_of(json.loads(good)))
    def spoil(data: bytes) -> None:
        (folder / name).write_bytes(data)
        attempt(f"{name.split('/')[0]} configuration", lambda: checkpoint.empty_parts(folder))

    try:
        spoil()
    finally:
        (folder / name).write_bytes(good)


READERS = dict(zip(CONFIGS, (read_unet_config, read_vae_config, text_settings, read_schedule_config), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_published_configs(model: str, name: str) -> None:
    """Whole files, with every key that diffusers and transformers write, and nulls among them."""

    @settings(few, max_examples=CASES // 4)
    @given(json_like(PUBLISHED[model][name]))
    def spoil(data: Any) -> None:
        attempt(f"published {name.split('/')[0]} configuration", lambda: READERS[name](data, name))

    spoil()


SCHEDULER_KEYS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": [0.1] * 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "rescale_betas_zero_snr": True,
    "clip_sample": True,
    "thresholding": False,
    "use_karras_sigmas": True,
    "use_flow_sigmas": False,
    "final_sigmas_type": "zero",
    "timestep_type": "discrete",
    "sigma_min": None,
}


@few
@given(data=st.data())
def test_schedulers(data: st.DataObject) -> None:
    names = data.draw(st.sets(st.sampled_from(sorted(SCHEDULER_KEYS))))
    scheduler = data.draw(st.sampled_from(sorted(SCHEDULERS)))
    good = {"_class_name": scheduler} | {name: SCHEDULER_KEYS[name] for name in sorted(names)}
    spoilt = data.draw(json_like(good))
    attempt("scheduler", lambda: Schedule.from_config(read_schedule_config(spoilt)).timesteps(7))


@few
@given(text_of({"_class_name": "StableDiffusionPipeline", "_guidance_scale": 7.5, "unet": ["diffusers", "U"]}))
def test_model_indices(folder: Path, data: bytes) -> None:
    (folder / "model_index.json").write_bytes(data)
    try:
        attempt("model index", lambda: checkpoint.describe(folder))
    finally:
        (folder / "model_index.json").unlink()


TINY_FILE = replace(FULL[1], unet=(8, 8, 8, 8), vae=(8, 8, 8, 8), text=8, layers=1, vocabulary=300)
TOLD_BY = (ldm.CONTEXT_KEY, ldm.FIRST_KEY, ldm.LAST_KEY, ldm.PREDICTION_KEY)
SINGLE = unused(TINY_FILE) | {
    key: shape for key, shape in layout(TINY_FILE).items() if key in TOLD_BY or key.startswith("first_stage_model.")
}


def write_single(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    alphas = alphas_cumprod()
    tables = {"alphas_cumprod": alphas, "denoiser.sigmas": ((1 - alphas) / alphas).sqrt()}
    save_file(tensors | {key: table for key, table in tables.items() if shapes.get(key) == (1000,)}, path)


def read_single_vae(path: Path) -> None:
    vae = VAE(VAEConfig(block_out_channels=(8,) * 4, norm_groups=8))
    parts = [(*ldm.split(key), source) for key, source in open_file(path).items() if not ldm.ignored(key)]
    sources = [(name, source) for part, name, source in parts if part == "vae"]
    fill(vae, sources, path, torch.float32, names=partial(ldm.names, "vae"))


@few
@given(data=st.data())
def test_single_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A file in the original layout with names and shapes changed: what it is, and its VAE, read in full."""
    path = tmp_path_factory.getbasetemp() / "single.safetensors"
    write_single(path, spoilt_shapes(data, SINGLE))
    attempt("single file", lambda: checkpoint.describe(path))
    attempt("VAE of a single file", lambda: read_single_vae(path))


def spoilt_shapes(data: st.DataObject, good: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    shapes = dict(good)
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(sorted(shapes)))
        change = data.draw(st.sampled_from(["drop", "rename", "reshape", "prefix", "double"]))
        shape = shapes.pop(key)
        if change == "rename":
            shapes[data.draw(bytes_like(key.encode())).decode("utf-8", "replace")[:300]] = shape
        elif change == "reshape":
            shapes[key] = tuple(data.draw(st.lists(st.integers(0, 9) | st.sampled_from([2560, 2816]), max_size=5)))
        elif change == "prefix":
            prefix = data.draw(st.sampled_from(["_orig_mod.", "module.", "first_stage_model.", "a."]))
            shapes[prefix + key] = shape
        elif change == "double":
            other = key.replace(".attn_1.q.", ".attn_1.to_q.").replace("nin_", "conv_")
            shapes |= {key: shape, other.replace("embedders.1.model", "embedders.1.transformer"): shape[::-1]}
    return {key: shape if math.prod(shape) < 10**6 else () for key, shape in shapes.items()}


TINY_XL = replace(XL, unet=(8, 8, 8), vae=(8, 8, 8, 8), text=8, layers=1, vocabulary=300, depths=(0, 1, 1), context=8)
TINY_XL = replace(TINY_XL, text_2=8, layers_2=2, projection=5)
ENDS = ("input_blocks.0.0.weight", "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", "out.2.weight")
XL_TOLD_BY = (ldm.ADDED_KEY, *(f"model.diffusion_model.{key}" for key in ENDS))
XL_SINGLE = unused(TINY_XL) | {
    key: shape
    for key, shape in layout(TINY_XL).items()
    if key in XL_TOLD_BY or key.startswith("conditioner.embedders.1.")
}


def read_second_text_encoder(path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        text = TextEncoder(CLIPTextConfig(vocab_size=300, projection_dim=5, **sizes), projects=True)
    parts = [(*ldm.split(key), source) for key, source in open_file(path).items() if not ldm.ignored(key)]
    sources = [(name, source) for part, name, source in parts if part == "text_2"]
    fill(text.model, sources, path, torch.float32, names=partial(ldm.names, "text_2"))


@settings(few, max_examples=2 * CASES)
@given(data=st.data())
def test_xl_single_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Of Stable Diffusion XL: what it is and what it says of its prediction, and its second text encoder."""
    path = tmp_path_factory.getbasetemp() / "xl.safetensors"
    said = data.draw(st.sampled_from([{}, {"v_pred": (1,)}, {"v_pred": (0,), "ztsnr": ()}, {"ztsnr": (2, 3)}]))
    write_single(path, spoilt_shapes(data, XL_SINGLE | said))
    attempt("XL single file", lambda: Schedule.from_config(checkpoint.describe(path).schedule))
    attempt("text encoder of an XL single file", lambda: read_second_text_encoder(path))


XL_CONFIGS = PUBLISHED["stable-diffusion-xl-base-1.0"]


@few
@given(data=st.data())
def test_xl_folders(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """What the configurations say together, with one of them spoilt."""
    folder = tmp_path_factory.getbasetemp() / "xl-folder"
    name = data.draw(st.sampled_from(["unet/config.json", "text_encoder_2/config.json", "model_index.json"]))
    for other, content in XL_CONFIGS.items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_text(json.dumps(content))
    (folder / name).write_bytes(data.draw(text_of(XL_CONFIGS[name])))
    attempt("XL folder", lambda: checkpoint.describe(folder))


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]


@few
@given(data=st.data())
def test_schedules_of_single_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "table.safetensors"
    table = alphas_cumprod().double() ** data.draw(st.sampled_from([1, 1, 1.2, 0.5]))
    for _ in range(data.draw(st.integers(0, 3))):
        table[data.draw(st.integers(0, 999))] = data.draw(st.floats() | st.sampled_from([0.0, 1.0, 1e-320]))
    table = table[data.draw(st.integers(0, 999)) if data.draw(st.booleans()) else 0 :].to(
        data.draw(st.sampled_from(DTYPES))
    )
    shape = data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1)]))
    key = data.draw(st.sampled_from([ldm.SCHEDULE_KEY, ldm.SIGMAS_KEY]))
    save_file({key: table.reshape(shape).contiguous() if len(table) else table}, path)
    attempt("schedule of a single file", lambda: Schedule.from_config(checkpoint._schedule(path, open_file(path))))


SIZES = st.sampled_from([0, 1, 2, 3, 5, 31, 32, 32, 33, 77])
SHAPES = st.lists(SIZES, max_size=3) | st.sampled_from([[1, 77, 32], [2, 77, 32], [1, 5, 32]])
FILLINGS = st.sampled_from([0.0, 1.0, float("nan"), float("inf"), 1e38, -1.0])


@few
@given(shape=SHAPES, filling=FILLINGS, dtype=st.sampled_from(DTYPES), seeds=st.integers(0, 3))
def test_embeddings(pipeline: Pipeline, shape: list[int], filling: float, dtype: torch.dtype, seeds: int) -> None:
    """Refused, or given to the U-Net: all that `generate` does before it samples."""
    embeds = torch.full(shape, filling, dtype=torch.float64).to(dtype)
    texts = {"prompt_embeds": embeds} if seeds % 2 else {"prompts": "a star", "negative_prompt_embeds": embeds}
    attempt("embeddings", lambda: pipeline.generate(steps=[1], wrap=nothing, seeds=list(range(seeds)), **texts))


def nothing(denoise: Denoise) -> Denoise:
    return lambda x, t, call: torch.zeros_like(x)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Conv2d(2, 3, 3))


@few
@given(data=st.data())
def test_weights(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "spoilt.safetensors"
    save_file(small().state_dict(), path)
    good = path.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    if data.draw(st.booleans()):
        spoilt = json.dumps(data.draw(json_like(header))).encode()
        path.write_bytes(struct.pack("<Q", len(spoilt)) + spoilt + good[8 + length :])
    else:
        path.write_bytes(data.draw(bytes_like(good)))
    attempt("weights", lambda: fill(small(), open_file(path).items(), path, torch.float32))


LAYERS = {
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": ("lora_down", "lora_up", (16, 32)),
    "lora_unet_input_blocks_1_0_in_layers_2": ("lora_down", "lora_up", (16, 16, 3, 3)),
    "unet.conv_in": ("lora_A", "lora_B", (16, 4, 3, 3)),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": ("lora_down", "lora_up", (8, 8)),
}
PEFT = {"unet.lora_alpha": 2, "unet.alpha_pattern": {"conv_in": 3}, "unet.use_dora": False}


XL_LAYERS = {
    "lora_unet_input_blocks_1_1_transformer_blocks_1_attn1_to_q": ("lora_down", "lora_up", (8, 8)),
    "unet.add_embedding.linear_1": ("lora_A", "lora_B", (32, 17)),
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": ("lora_down", "lora_up", (8, 8)),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": ("lora_down", "lora_up", (8, 8)),
}


def lora_file(path: Path, layers: dict[str, tuple[str, str, tuple[int, ...]]] = LAYERS) -> None:
    """Four layers, with an alpha each or in the metadata."""
    tensors = {}
    for name, (down, up, shape) in layers.items():
        tensors[f"{name}.{down}.weight"] = torch.ones(2, *shape[1:])
        tensors[f"{name}.{up}.weight"] = torch.ones(shape[0], 2, *(1 for _ in shape[2:]))
        tensors |= {} if name.startswith("unet") else {f"{name}.alpha": torch.tensor(4.0)}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(PEFT)})


@functools.cache  # building it takes longer than reading a file; that weights add up does not matter here
def smallest_model() -> dict[str, nn.Module]:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = TextEncoder(CLIPTextConfig(vocab_size=300, **sizes))
    return {"unet": UNet(SMALLEST_UNET), "text_encoder": text.model}


@functools.cache
def smallest_xl() -> dict[str, nn.Module]:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = replace(
        SMALLEST_UNET, block_out_channels=(8,), depths=(2,), cross_attention_dim=16, linear_projection=True
    )
    texts = [TextEncoder(CLIPTextConfig(vocab_size=300, **sizes), projects=second) for second in (False, True)]
    unet = UNet(replace(config, pooled_width=5, size_width=2))
    return {"unet": unet, "text_encoder": texts[0].model, "text_encoder_2": texts[1].model}


def merge(path: Path) -> None:
    merge_loras(smallest_model(), [find_lora(f"{path}:0.5")])


@settings(few, max_examples=2 * CASES)
@given(data=st.data())
def test_loras(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "lora.safetensors"
    lora_file(path)
    spoil_lora(path, data)
    attempt("LoRA", lambda: merge(path))


@few
@given(data=st.data())
def test_xl_loras(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "xl-lora.safetensors"
    lora_file(path, XL_LAYERS)
    spoil_lora(path, data)
    attempt("XL LoRA", lambda: merge_loras(smallest_xl(), [find_lora(f"{path}:0.5")]))


def spoil_lora(path: Path, data: st.DataObject) -> None:
    good = path.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    what = data.draw(st.sampled_from(["header", "metadata", "bytes"]))
    if what == "bytes":
        path.write_bytes(data.draw(bytes_like(good)))
    else:
        if what == "header":
            header = data.draw(json_like(header))
        else:
            header["__metadata__"]["lora_adapter_metadata"] = data.draw(text_of(PEFT)).decode("utf-8", "replace")
        spoilt = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(spoilt)) + spoilt + good[8 + length :])


@few
@given(text_of({"metadata": {"total_size": 9}, "weight_map": {"a": "x-00001-of-00002.safetensors", "b": "y"}}))
def test_shard_indices(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "shards"
    folder.mkdir(exist_ok=True)
    (folder / "m.safetensors.index.json").write_bytes(data)
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, folder / "x-00001-of-00002.safetensors")
    attempt("index of shards", lambda: checkpoint._tensors(folder, "m"))


def test_tokenizers(tokenizer_folder: Path, tmp_path: Path) -> None:
    good = {path.name: path.read_bytes() for path in tokenizer_folder.iterdir()}
    size = len(read_tokenizer(tokenizer_folder, 2**16)[0])
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=size, bos_token_id=0, eos_token_id=1, **sizes)

    def read() -> None:
        tokenizer, padding = read_tokenizer(tmp_path, size)
        text = TextEncoder(config, tokenizer, padding=padding)
        text.encode(["a red house", "", "\U0001f984 <|endoftext|> ..."])

    @few
    @given(data=st.data())
    def spoil(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(good)))
        for other, content in good.items():
            (tmp_path / other).write_bytes(content)
        strategy = text_of(json.loads(good[name])) if name.endswith(".json") else bytes_like(good[name])
        (tmp_path / name).write_bytes(data.draw(strategy))
        attempt("tokenizer", read)

    spoil()


SITES = tuple(Site(f"down_blocks.{i}.attn{j}", kind) for i in range(2) for j in (1, 2) for kind in ("map", "out"))
PLAN = json.loads(hurry(6, SITES, k=2).to_json()) | {"about": {"model": "0" * 12, "sampler": "ddim"}}


@few
@given(text_of(PLAN))
def test_plans(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "plan.json"
    path.write_bytes(data)

    def read() -> None:
        plan = ReusePlan.from_json(read_text(path))
        plan.on(SITES).step(0)

    attempt("plan", read)
    attempt("searched plan", lambda: read_searched(path))


SETTINGS = {"steps": 6, "prompts": ["a", "b"]}
LINES = [{"settings": SETTINGS}, {"key": "..##", "value": 31.5}, {"key": ".#.#", "value": [1, 2]}]
JOURNAL = "".join(json.dumps(line) + "\n" for line in LINES).encode()


@few
@given(bytes_like(JOURNAL) | json_like(LINES).map(lambda d: json.dumps(d).replace("}, ", "}\n").encode()))
def test_journals(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "journal.jsonl"
    path.write_bytes(data)
    attempt("journal", lambda: Journal(path, SETTINGS).add("last", 1.0))


@pytest.fixture(scope="module")
def recipe(pipeline: object) -> dict[str, str]:
    plan = hurry(4, select(pipeline.sites), k=2)  # type: ignore[attr-defined]
    return Recipe(
        jobs=(("a lake", 3), ("an oak", 4)),
        place=1,
        negative_prompt="",
        sampler="ddim",
        steps=4,
        guidance_scale=7.5,
        eta=0.0,
        height=16,
        width=16,
        init_image=(),
        strength=0.8,
        attention="fused",
        compile=False,
        dtype="float32",
        device="cpu",
        cache_dtype="float16",
        policy="hurry",
        plan=plan.to_json(),
        model="shipped",
        fingerprint="0" * 12,
        prediction_type="epsilon",
        watched="",
        tokens="0" * 12,
        digests={"U-Net": "0" * 12, "VAE": "0" * 12},
    ).chunks()


@few
@given(data=st.data())
def test_png_texts(recipe: dict[str, str], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "spoilt.png"
    texts = dict(recipe)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(recipe)))
        texts[name] = data.draw(bytes_like(recipe[name].encode())).decode("utf-8", "replace").replace("\0", "")
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(bytes_like(path.read_bytes())))
    attempt("PNG", lambda: from_png(path))


def test_good_files_are_read(folder: Path, recipe: dict[str, str], tmp_path: Path) -> None:
    """What is spoilt above is fine before: a refusal is for what was changed."""
    checkpoint.empty_parts(folder)
    assert Recipe.from_chunks(recipe).chunks() == recipe
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    assert read_searched(tmp_path / "plan.json").plan.grid == "....##"
    (tmp_path / "journal.jsonl").write_bytes(JOURNAL)
    assert Journal(tmp_path / "journal.jsonl", SETTINGS).records == {"..##": 31.5, ".#.#": [1, 2]}
    write_single(tmp_path / "single.safetensors", SINGLE)
    assert checkpoint.describe(tmp_path / "single.safetensors").unet == SD1_UNET
    read_single_vae(tmp_path / "single.safetensors")
    save_file(small().state_dict(), tmp_path / "m.safetensors")
    fill(small(), checkpoint._tensors(tmp_path, "m").items(), tmp_path, torch.float32)
    write_single(tmp_path / "xl.safetensors", XL_SINGLE | {"v_pred": (1,)})
    described = checkpoint.describe(tmp_path / "xl.safetensors")
    assert (described.unet, described.schedule.prediction_type) == (SDXL_UNET, "v_prediction")
    read_second_text_encoder(tmp_path / "xl.safetensors")
    lora_file(tmp_path / "l.safetensors")
    merge(tmp_path / "l.safetensors")
    lora_file(tmp_path / "xl-l.safetensors", XL_LAYERS)
    merge_loras(smallest_xl(), [find_lora(tmp_path / "xl-l.safetensors")])
    assert issubclass(CheckpointError, ValueError) and issubclass(ConfigError, ValueError)

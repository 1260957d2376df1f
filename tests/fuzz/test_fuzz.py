"""Files from strangers: read, or refused in one sentence. Never a traceback, a hang, or memory without bounds.

Bounded here; `FUZZ_CASES=6000 pytest tests/fuzz --hypothesis-seed=1` tries as many of each kind.
"""

from __future__ import annotations

import functools
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig

from minireuse.checkpoints import parts as checkpoint
from minireuse.checkpoints.fields import ConfigError
from minireuse.checkpoints.lora import find_lora, merge_loras
from minireuse.checkpoints.tensors import CheckpointError, fill, open_file
from minireuse.common.journal import Journal
from minireuse.plan import ReusePlan, Site
from minireuse.policies import hurry, select
from minireuse.sample.recipe import Recipe, from_png
from minireuse.search import read_searched
from minireuse.text import TextEncoder
from minireuse.unet import UNet

import faults
from conftest import SMALLEST_UNET
from mutate import bytes_like, json_like, text_of

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


def lora_file(path: Path) -> None:
    """Four layers, with an alpha each or in the metadata."""
    tensors = {}
    for name, (down, up, shape) in LAYERS.items():
        tensors[f"{name}.{down}.weight"] = torch.ones(2, *shape[1:])
        tensors[f"{name}.{up}.weight"] = torch.ones(shape[0], 2, *(1 for _ in shape[2:]))
        tensors |= {} if name.startswith("unet") else {f"{name}.alpha": torch.tensor(4.0)}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(PEFT)})


@functools.cache  # building it takes longer than reading a file; that weights add up does not matter here
def smallest_model() -> dict[str, nn.Module]:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = TextEncoder(CLIPTextConfig(vocab_size=300, **sizes))
    return {"unet": UNet(SMALLEST_UNET), "text_encoder": text.model}


def merge(path: Path) -> None:
    merge_loras(smallest_model(), [find_lora(f"{path}:0.5")])


@settings(few, max_examples=2 * CASES)
@given(data=st.data())
def test_loras(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "lora.safetensors"
    lora_file(path)
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
    attempt("LoRA", lambda: merge(path))


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
    size = len(checkpoint._read_tokenizer(tokenizer_folder, 2**16))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=size, bos_token_id=0, eos_token_id=1, **sizes)

    def read() -> None:
        text = TextEncoder(config, checkpoint._read_tokenizer(tmp_path, size))
        text.encode(["a red circle", "", "\U0001f984 <|endoftext|> ..."])

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
        plan = ReusePlan.from_json(path.read_text(encoding="utf-8"))
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
        jobs=(("a star", 3), ("a ring", 4)),
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
    save_file(small().state_dict(), tmp_path / "m.safetensors")
    fill(small(), checkpoint._tensors(tmp_path, "m").items(), tmp_path, torch.float32)
    lora_file(tmp_path / "l.safetensors")
    merge(tmp_path / "l.safetensors")
    assert issubclass(CheckpointError, ValueError) and issubclass(ConfigError, ValueError)

"""A model by its name on the hub: what is fetched, what is not, and what happens without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import minireuse
from minireuse.checkpoints import hub
from minireuse.checkpoints.hub import locate
from minireuse.checkpoints.tensors import CheckpointError
from minireuse.sample import command as sample
from minireuse.sample.recipe import from_png

NAME, COMMIT = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"
# What else repositories of models hold, and nobody needs.
NEEDLESS = [
    "README.md",
    "v1-5-pruned.safetensors",
    "v1-5-pruned.ckpt",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "text_encoder/pytorch_model.bin",
    "safety_checker/model.safetensors",
    "safety_checker/config.json",
    "feature_extractor/preprocessor_config.json",
]


@pytest.fixture
def repository(model_folder: Path, tmp_path: Path) -> Path:
    """A model as it lies on the hub."""
    folder = tmp_path / "repository"
    shutil.copytree(model_folder, folder)
    for name in NEEDLESS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be fetched")
    return folder


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- over a network ------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Serves one repository as the hub does. The U-Net's first download halts in the middle, its second one breaks."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked = Counter[str]()
        self.halted = threading.Event()
        self.go_on = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        names = sorted(files_of(self.server.folder))
        if path == f"api/models/{NAME}/revision/main":
            siblings = [{"rfilename": name} for name in names]
            self.send(json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode(), with_body)
        elif path == f"api/models/{NAME}/tree/{COMMIT}":
            sizes = {name: (self.server.folder / name).stat().st_size for name in names}
            listed = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes.items()]
            self.send(json.dumps(listed).encode(), with_body)
        elif (name := path.removeprefix(f"{NAME}/resolve/{COMMIT}/")) in names:
            self.server.asked[name] += with_body
            self.send((self.server.folder / name).read_bytes(), with_body, name)
        else:
            self.send_error(404)

    def send(self, data: bytes, with_body: bool, name: str = "") -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{name.replace("/", "-") or "api"}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        whole = not (name == UNET and self.server.asked[UNET] <= 2)
        if with_body:
            self.wfile.write(data[start:] if whole else data[start : len(data) // 2])
        if with_body and not whole and self.server.asked[UNET] == 1:
            self.wfile.flush()
            self.server.halted.set()
            self.server.go_on.wait()


@pytest.fixture
def server(repository: Path) -> Iterator[Hub]:
    server = Hub(repository)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


def wait_for(condition: object, seconds: float = 240) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_model_is_fetched_by_its_name_goes_on_after_interruptions_and_then_needs_no_network(
    server: Hub, model_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()} | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(cache),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    paint = [sys.executable, "-m", "minireuse.sample", "--model", NAME, "--prompt", "a star", "--steps", "1"]

    def run(out: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [*paint, "--out", out]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment | more, timeout=300
        )

    def fetched() -> set[str]:
        return {name for snapshot in cache.glob("hub/*/snapshots/*") for name in files_of(snapshot)}

    needed = files_of(model_folder)
    killed = subprocess.Popen([*paint, "--out", "killed.png"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: server.halted.is_set() and fetched() == needed - {UNET})
    killed.kill()
    killed.wait()

    done = run("a.png")
    assert done.returncode == 0, done.stderr
    assert fetched() == needed
    assert dict(server.asked) == dict.fromkeys(needed, 1) | {UNET: 3}  # halted, broken, and then whole

    server.shutdown()
    done = run("b.png", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    recipe = from_png(tmp_path / "a.png")[0]
    assert (recipe.model, recipe.fingerprint) == (NAME, minireuse.load(model_folder, device="cpu").fingerprint)
    assert not (tmp_path / "killed.png").exists()


def test_a_name_that_the_hub_does_not_give_ends_the_command_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--model", "nobody/nothing-of-this-name", "--prompt", "a star", "--out", "a.png"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no model at nobody/nothing-of-this-name, and none of that name from the hub (")
    assert said.count("\n") == 1 and not Path("a.png").exists()


# --- what is fetched -----------------------------------------------------------------------------------------------


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache, filled from the folder `repository` as huggingface_hub would. Returns its folder."""
    cache = tmp_path / "cache"

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert name == NAME
        for file in sorted(files_of(tmp_path / "repository")):
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(tmp_path / "repository" / file, cache / file)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return cache


FP16 = "unet/diffusion_pytorch_model.fp16.safetensors"
SHARDS = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
SHARDS += ["unet/diffusion_pytorch_model.safetensors.index.json"]
FP16_SHARDS = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
OLD_FP16_SHARDS = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
INDEX = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"


@pytest.mark.parametrize(
    ("offered", "half", "expected"),
    [
        ([UNET, FP16], False, [UNET]),
        ([UNET, FP16], True, [FP16]),
        ([UNET], True, [UNET]),
        ([FP16], False, [FP16]),
        ([*SHARDS, FP16], False, SHARDS),
        (SHARDS, True, SHARDS),
        ([*SHARDS, *FP16_SHARDS, INDEX], False, SHARDS),
        ([*SHARDS, *FP16_SHARDS, INDEX], True, [*FP16_SHARDS, INDEX]),
        ([*SHARDS, *OLD_FP16_SHARDS, INDEX], False, SHARDS),
        ([*SHARDS, *OLD_FP16_SHARDS, INDEX], True, [*OLD_FP16_SHARDS, INDEX]),
    ],
)
def test_one_set_of_weights_is_fetched_of_each_part(
    offered: list[str], half: bool, expected: list[str], repository: Path, fetch: Path
) -> None:
    rest = files_of(repository) - {UNET, *NEEDLESS}
    (repository / UNET).unlink()
    for name in offered:
        (repository / name).write_bytes(b"weights")
    assert locate(Path(NAME), half=half) == fetch
    assert files_of(fetch) == rest | set(expected)


def test_the_second_text_encoder_and_tokenizer_are_fetched_where_there_are_some(repository: Path, fetch: Path) -> None:
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(repository / name, repository / f"{name}_2")
    locate(Path(NAME), half=True)
    assert files_of(fetch) == files_of(repository) - {*NEEDLESS, "text_encoder_2/pytorch_model.bin"}


def test_a_dry_run_fetches_no_weights(repository: Path, fetch: Path) -> None:
    pipeline = minireuse.load(NAME, device="meta")
    assert pipeline.device.type == "meta"
    assert files_of(fetch) == {name for name in files_of(repository) - set(NEEDLESS) if "safetensors" not in name}


def test_a_path_that_exists_is_a_path_and_a_file_is_no_name(model_folder: Path, fetch: Path) -> None:
    shutil.copytree(model_folder, NAME)
    assert minireuse.load(NAME, device="meta").sites
    for path in ("gone", "/gone/model", "a/b/c", "models/gone.safetensors", "models/gone.ckpt"):
        with pytest.raises(CheckpointError, match=r"no model at [^ ]*; give a diffusers folder"):
            minireuse.load(path)
    assert not fetch.exists()

"""Small models with random weights, written by diffusers and transformers themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minireuse.checkpoints.configs import write_schedule_config, write_unet_config, write_vae_config

# Nothing in these tests may reach out: a missing file must fail at once instead of waiting for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import minireuse
from minireuse.config import UNetConfig, VAEConfig
from minireuse.schedule import ScheduleConfig
from minireuse.unet import UNet

import faults
from make_tokenizer import make_tokenizer


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # each of several workers has a core of its own


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = {kind: dict(found) for kind, found in faults.TRIED.items()}


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    for kind, found in getattr(node, "workeroutput", {}).get("faults", {}).items():
        for outcome, times in found.items():
            faults.note(kind, outcome, times)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if faults.TRIED and not hasattr(terminalreporter.config, "workeroutput"):
        terminalreporter.write_line("\n" + faults.table())
        if "FAULTS" in os.environ:
            Path(os.environ["FAULTS"]).write_text(faults.table() + "\n")


TINY_UNET = UNetConfig(
    block_out_channels=(32, 64, 64),
    attention=(True, True, False),
    layers_per_block=2,
    heads=(2, 4, 4),
    cross_attention_dim=32,
    norm_groups=8,
    sample_size=8,
)
SMALLEST_UNET = UNetConfig(
    block_out_channels=(16,),
    attention=(True,),
    layers_per_block=1,
    heads=(2,),
    cross_attention_dim=32,
    norm_groups=8,
    sample_size=8,
)
TINY_XL_UNET = UNetConfig(
    block_out_channels=(16, 32, 32),
    attention=(False, True, True),
    layers_per_block=2,
    heads=(1, 2, 4),
    depths=(1, 2, 3),
    cross_attention_dim=56,  # 32 of one text encoder and 24 of the other
    linear_projection=True,
    norm_groups=8,
    pooled_width=20,
    size_width=8,
    sample_size=8,
)
TINY_VAE = VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_groups=8, scaling_factor=0.5, sample_size=16)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter off its default, so that an ignored bias or norm weight cannot go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module.eval()


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    return ((given - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are added up in the order in which one of several processes adds them: the last bit can be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_two_processes(module: str, argv: list[str]) -> str:
    """Run `python -m module` under torchrun, one thread each. Returns what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *argv], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, captions=300)
    return folder


def write_pipeline(
    folder: Path, tokenizer_folder: Path, schedule: ScheduleConfig, unet: UNetConfig = TINY_UNET
) -> Path:
    """A diffusers folder with a tiny random model, written by diffusers."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    diffusers.StableDiffusionPipeline(
        vae=randomise(diffusers.AutoencoderKL.from_config(write_vae_config(TINY_VAE))),
        text_encoder=randomise(CLIPTextModel(text_config)),
        tokenizer=tokenizer,
        unet=randomise(diffusers.UNet2DConditionModel.from_config(write_unet_config(unet))),
        scheduler=diffusers.DDIMScheduler.from_config(write_schedule_config(schedule)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


TINY_XL_TEXTS = {  # of both text encoders
    1: {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": "quick_gelu"},
    2: {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "hidden_act": "gelu"},
}


def xl_modules(tokenizer_folder: Path, unet: UNetConfig = TINY_XL_UNET) -> dict[str, Any]:
    """The parts of a tiny Stable Diffusion XL, made by diffusers and transformers."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    # As published: ids that are none of the tokenizer's, of which transformers knows to make the right thing.
    common = {"vocab_size": len(tokenizer), "intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 2}
    first = CLIPTextConfig(**common, **TINY_XL_TEXTS[1], projection_dim=32)
    second = CLIPTextConfig(**common, **TINY_XL_TEXTS[2], projection_dim=unet.pooled_width)
    vae = VAEConfig(**vars(TINY_VAE) | {"scaling_factor": 0.13025, "force_upcast": True})
    return {
        "vae": randomise(diffusers.AutoencoderKL.from_config(write_vae_config(vae))),
        "text_encoder": randomise(CLIPTextModel(first), 1),
        "text_encoder_2": randomise(CLIPTextModelWithProjection(second), 2),
        "tokenizer": tokenizer,
        "tokenizer_2": CLIPTokenizer.from_pretrained(tokenizer_folder, pad_token="!"),
        "unet": randomise(diffusers.UNet2DConditionModel.from_config(write_unet_config(unet))),
        "scheduler": diffusers.DDIMScheduler.from_config(write_schedule_config(ScheduleConfig())),
    }


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("xl")
    diffusers.StableDiffusionXLPipeline(**xl_modules(tokenizer_folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def xl(xl_folder: Path) -> minireuse.Pipeline:
    return minireuse.load(xl_folder, device="cpu")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model"), tokenizer_folder, ScheduleConfig())


@pytest.fixture(scope="session")
def smallest_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("smallest"), tokenizer_folder, ScheduleConfig(), SMALLEST_UNET)


@pytest.fixture(scope="session")
def v_model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    schedule = ScheduleConfig(prediction_type="v_prediction", spacing="trailing", last_alpha_one=True)
    return write_pipeline(tmp_path_factory.mktemp("v-model"), tokenizer_folder, schedule)


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> minireuse.Pipeline:
    return minireuse.load(model_folder, device="cpu")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def smallest_unet() -> UNet:
    return UNet(SMALLEST_UNET)

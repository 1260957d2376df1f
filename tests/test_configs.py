"""Configurations: the published ones as they stand in their repositories, what null means, and scheduler classes."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from minireuse.checkpoints.configs import (
    SCHEDULERS,
    read_schedule_config,
    read_unet_config,
    read_vae_config,
    text_settings,
    write_schedule_config,
    write_unet_config,
)
from minireuse.checkpoints.fields import ConfigError
from minireuse.config import SD1_UNET, SD2_UNET, SD_VAE, SDXL_UNET, SDXL_VAE
from minireuse.sample import command as sample
from minireuse.schedule import SD_SCHEDULE, Schedule

from conftest import TINY_UNET, edit_json

# --- as published --------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "published_configs.json").read_text()
)


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_the_published_configurations_of_sd_1_5_are_read() -> None:
    files = PUBLISHED["stable-diffusion-v1-5"]
    assert read_unet_config(files["unet/config.json"]) == SD1_UNET
    assert read_vae_config(files["vae/config.json"]) == SD_VAE
    assert read_schedule_config(files["scheduler/scheduler_config.json"]) == SD_SCHEDULE
    text = text_settings(files["text_encoder/config.json"])
    assert (text["hidden_size"], text["num_hidden_layers"], text["hidden_act"]) == (768, 12, "quick_gelu")


def test_the_published_configurations_of_sd_2_1_are_read() -> None:
    files = PUBLISHED["stable-diffusion-2-1"]
    assert read_unet_config(files["unet/config.json"]) == SD2_UNET
    assert read_vae_config(files["vae/config.json"]) == replace(SD_VAE, sample_size=768)
    schedule = read_schedule_config(files["scheduler/scheduler_config.json"])
    assert schedule == replace(SD_SCHEDULE, prediction_type="v_prediction")
    text = text_settings(files["text_encoder/config.json"])
    assert (text["hidden_size"], text["num_hidden_layers"], text["hidden_act"]) == (1024, 23, "gelu")


def test_the_published_configurations_of_sdxl_are_read() -> None:
    files = PUBLISHED["stable-diffusion-xl-base-1.0"]
    assert read_unet_config(files["unet/config.json"]) == SDXL_UNET
    assert read_vae_config(files["vae/config.json"]) == SDXL_VAE
    assert read_schedule_config(files["scheduler/scheduler_config.json"]) == SD_SCHEDULE
    assert text_settings(files["text_encoder/config.json"])["hidden_size"] == 768
    second = text_settings(files["text_encoder_2/config.json"])
    assert (second["hidden_size"], second["num_hidden_layers"], second["hidden_act"]) == (1280, 32, "gelu")
    assert (second["projection_dim"], second["eos_token_id"]) == (1280, 2)  # which is no end token of any tokenizer


# --- what null and lists mean --------------------------------------------------------------------------------------

UNET = write_unet_config(TINY_UNET)


@pytest.mark.parametrize(
    "key",
    [
        "num_attention_heads",
        "sample_size",
        "class_embed_type",
        "time_cond_proj_dim",
        "center_input_sample",
        "use_linear_projection",
        "addition_embed_type",
        "cross_attention_norm",
    ],
)
def test_null_where_diffusers_builds_the_same_network(key: str) -> None:
    raw = {k: v for k, v in UNET.items() if k != "sample_size"}
    assert read_unet_config(raw | {key: None}) == read_unet_config(raw)


@pytest.mark.parametrize(
    "key",
    [
        "mid_block_type",
        "flip_sin_to_cos",
        "act_fn",
        "norm_num_groups",
        "cross_attention_dim",
        "layers_per_block",
        "block_out_channels",
        "attention_head_dim",
        "down_block_types",
        "norm_eps",
        "in_channels",
    ],
)
def test_null_where_diffusers_builds_another_network_or_none(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is null, expected "):
        read_unet_config(UNET | {key: None})


@pytest.mark.parametrize("key", ["mid_block_add_attention", "use_quant_conv", "scaling_factor", "latent_channels"])
def test_null_in_the_vae(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is null, expected "):
        read_vae_config({key: None})


def test_no_middle_block_is_refused_before_weights_are_read(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    edit_json(tmp_path / "unet" / "config.json", mid_block_type=None)
    assert sample.main(["--model", str(tmp_path), "--prompt", "a lake", "--dry-run"]) == 2
    assert "unet/config.json: mid_block_type is null, expected 'UNetMidBlock2DCrossAttn'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transformer_layers_per_block", [1, 1, 1]),
        ("transformer_layers_per_block", [1, 1, 1, 1, 1]),
        ("layers_per_block", [2, 2, 2]),
        ("cross_attention_dim", [32, 32, 32]),
        ("sample_size", [8, 8]),
        ("only_cross_attention", [False, False, False]),
    ],
)
def test_a_list_that_repeats_one_value_says_that_value(key: str, value: list[Any]) -> None:
    assert read_unet_config(UNET | {key: value}) == TINY_UNET


@pytest.mark.parametrize("value", [[1, 2], [], [[1], [1]], [2, 2], [1, 2, 0], [1, 2, 65], 0, True, None])
def test_other_lists_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="transformer_layers_per_block is "):
        read_unet_config(UNET | {"transformer_layers_per_block": value})


# --- scheduler classes ---------------------------------------------------------------------------------------------

TOLD = {"clip_sample": False, "thresholding": False}


def scheduler(name: str) -> Any:
    return getattr(diffusers, name)


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"DPMSolverSDEScheduler"}))  # which needs torchsde
def test_defaults_are_those_of_the_class(name: str) -> None:
    """What diffusers' class takes where the file says nothing, and the table of alpha-bar that it makes of it."""
    config = read_schedule_config({"_class_name": name} | TOLD)
    theirs = scheduler(name)()
    torch.testing.assert_close(
        Schedule.from_config(config).alphas_cumprod.float(), theirs.alphas_cumprod.float(), rtol=1e-4, atol=1e-7
    )
    assert config.spacing == getattr(theirs.config, "timestep_spacing", "linspace")
    assert config.offset == getattr(theirs.config, "steps_offset", 0)
    assert config.last_alpha_one is getattr(theirs.config, "set_alpha_to_one", True)


def test_settings_that_are_not_followed_are_told() -> None:
    for changes, expected in (
        ({}, "does not follow clip_sample "),  # on, where DDIM's file says nothing
        ({"clip_sample": False, "thresholding": True}, "does not follow thresholding "),
        ({"clip_sample": True, "use_beta_sigmas": True}, "does not follow clip_sample, use_beta_sigmas "),
    ):
        with pytest.warns(UserWarning, match=expected):
            read_schedule_config({"_class_name": "DDIMScheduler"} | changes)


@pytest.mark.parametrize(
    ("key", "spacing"),
    [("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential"), ("use_lu_lambdas", "exponential")],
)
def test_spacings_that_have_keys_of_their_own_are_followed(key: str, spacing: str) -> None:
    raw = {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "leading"}
    assert read_schedule_config(raw | {key: True}).spacing == spacing
    assert read_schedule_config(raw | {key: False}).spacing == "leading"


NO_TABLE = ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
OTHER_TABLE = ("UnCLIPScheduler", "CogVideoXDDIMScheduler")


@pytest.mark.parametrize("name", [*NO_TABLE, *OTHER_TABLE, "NoSuchScheduler", "", 7, ["DDIMScheduler"], None])
def test_a_class_without_a_known_table_of_betas_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match=r"_class_name is .*, expected one of DDIMScheduler, "):
        read_schedule_config({"_class_name": name, "num_train_timesteps": 1000, "shift": 1.0})


def test_a_file_that_names_no_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="_class_name is null, expected one of "):
        read_schedule_config({"beta_schedule": "scaled_linear"})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"timestep_type": "continuous", "sigma_max": 120.0}, "timestep_type"),  # CosXL: the U-Net is given log sigma
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"beta_start": None}, "beta_start"),
        ({"timestep_spacing": None}, "timestep_spacing"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"trained_betas": [0.1, 1.0, 0.2], "num_train_timesteps": 3}, "trained_betas"),
        ({"trained_betas": [0.1, 1e-320, 0.2], "num_train_timesteps": 3}, "trained_betas"),
    ],
)
def test_schedules_that_are_not_built_are_refused_by_their_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is .*, expected "):
        read_schedule_config({"_class_name": "EulerDiscreteScheduler"} | changes)


def test_betas_in_the_file_stand_in_the_place_of_a_formula() -> None:
    betas = [0.001, 0.01, 0.2, 1.0]
    raw = {"_class_name": "DDIMScheduler", "trained_betas": betas, "num_train_timesteps": 4} | TOLD
    config = read_schedule_config(raw)
    expected = diffusers.DDIMScheduler.from_config(raw).alphas_cumprod
    torch.testing.assert_close(Schedule.from_config(config).alphas_cumprod.float(), expected)
    again = diffusers.DDIMScheduler.from_config(write_schedule_config(config)).alphas_cumprod
    torch.testing.assert_close(again, expected)


def test_null_ends_the_table_as_false_does() -> None:
    raw = {"_class_name": "DDIMScheduler", "set_alpha_to_one": None} | TOLD
    assert read_schedule_config(raw).last_alpha_one is False

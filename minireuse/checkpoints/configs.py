"""Configurations in diffusers' and transformers' JSON, read field by field, and written.

diffusers' JSON keeps some historical names that say the wrong thing. They are translated here, at the border, and
nowhere else: `attention_head_dim` holds the *number* of heads, and block types are spelled out as class names although
all that varies between Stable Diffusion's blocks is whether they hold attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minireuse.checkpoints.fields import Reader
from minireuse.config import GUIDANCE_SCALE, UNetConfig, VAEConfig
from minireuse.schedule import BETA_SCHEDULES, PREDICTION_TYPES, SPACINGS, ScheduleConfig


def read_unet_config(raw: Mapping[str, Any], source: str = "unet/config.json") -> UNetConfig:
    """Read diffusers' `UNet2DConditionModel` configuration.

    Raises: ConfigError where the file describes a U-Net other than Stable Diffusion 1.x / 2.x.
    """
    reader = Reader(raw, source)
    widths = reader.ints("block_out_channels", (320, 640, 1280, 1280))
    levels = len(widths)
    down = reader.strings("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), levels)
    up = reader.strings("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, levels)
    attention = tuple(name == "CrossAttnDownBlock2D" for name in down)
    reader.require(set(down) <= {"CrossAttnDownBlock2D", "DownBlock2D"}, "down_block_types", "SD's block types")
    expected_up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    reader.require(up == expected_up, "up_block_types", f"the mirror image of down_block_types, {expected_up}")
    head_key = "num_attention_heads" if raw.get("num_attention_heads") is not None else "attention_head_dim"
    heads = reader.ints(head_key, (8,) * levels, levels)
    for width, head in zip(widths, heads, strict=True):
        reader.require(width % head == 0, head_key, f"divisors of block_out_channels {widths}")
    groups = reader.integer("norm_num_groups", 32)
    for width in widths:
        reader.require(width % groups == 0, "norm_num_groups", f"a divisor of block_out_channels {widths}")
    config = UNetConfig(
        in_channels=reader.integer("in_channels", 4),
        out_channels=reader.integer("out_channels", 4),
        block_out_channels=widths,
        attention=attention,
        layers_per_block=reader.integer("layers_per_block", 2, most=16),
        heads=heads,
        cross_attention_dim=reader.integer("cross_attention_dim", 1280),
        linear_projection=reader.boolean("use_linear_projection", False),
        norm_groups=groups,
        sample_size=reader.integer("sample_size", 64, most=4096),
    )
    fixed = {
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "center_input_sample": False,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": 1,
        "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "dropout": 0.0,
        "attention_type": "default",
        "resnet_out_scale_factor": 1.0,
        # Without addition_embed_type, which is refused, the first says nothing. The second is a numerical
        # detail of diffusers' own attention: in half precision it takes the scores, too, in float32.
        "addition_embed_type_num_heads": raw.get("addition_embed_type_num_heads"),
        "upcast_attention": raw.get("upcast_attention"),
    }
    reader.finish(fixed)
    return config


def write_unet_config(config: UNetConfig) -> dict[str, Any]:
    """The JSON that diffusers' `UNet2DConditionModel` reads."""
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(config.heads),
        "block_out_channels": list(config.block_out_channels),
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)],
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "use_linear_projection": config.linear_projection,
    }


def read_vae_config(raw: Mapping[str, Any], source: str = "vae/config.json") -> VAEConfig:
    """Read diffusers' `AutoencoderKL` configuration. Raises: ConfigError."""
    reader = Reader(raw, source)
    widths = reader.ints("block_out_channels", (128, 256, 512, 512))
    levels = len(widths)
    down = reader.strings("down_block_types", ("DownEncoderBlock2D",) * levels, levels)
    up = reader.strings("up_block_types", ("UpDecoderBlock2D",) * levels, levels)
    reader.require(set(down) == {"DownEncoderBlock2D"}, "down_block_types", "DownEncoderBlock2D only")
    reader.require(set(up) == {"UpDecoderBlock2D"}, "up_block_types", "UpDecoderBlock2D only")
    groups = reader.integer("norm_num_groups", 32)
    for width in widths:
        reader.require(width % groups == 0, "norm_num_groups", f"a divisor of block_out_channels {widths}")
    config = VAEConfig(
        in_channels=reader.integer("in_channels", 3),
        latent_channels=reader.integer("latent_channels", 4),
        block_out_channels=widths,
        layers_per_block=reader.integer("layers_per_block", 2, most=16),
        norm_groups=groups,
        scaling_factor=reader.number("scaling_factor", 0.18215),
        sample_size=reader.integer("sample_size", 512, most=32768),
    )
    reader.require(raw.get("out_channels", 3) == config.in_channels, "out_channels", "the same as in_channels")
    neutral = {
        "act_fn": "silu",
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "out_channels": config.in_channels,
        # How diffusers' own VAE is run, not what it computes.
        "force_upcast": raw.get("force_upcast"),
    }
    reader.finish(neutral)
    return config


def write_vae_config(config: VAEConfig) -> dict[str, Any]:
    """The JSON that diffusers' `AutoencoderKL` reads."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "sample_size": config.sample_size,
        "scaling_factor": config.scaling_factor,
    }


def read_schedule_config(raw: Mapping[str, Any], source: str = "scheduler/scheduler_config.json") -> ScheduleConfig:
    """Read any of diffusers' scheduler configurations that stem from a betas table. Raises: ConfigError."""
    reader = Reader(raw, source)
    config = ScheduleConfig(
        train_timesteps=reader.integer("num_train_timesteps", 1000, most=100_000),
        beta_start=reader.number("beta_start", 0.0001),
        beta_end=reader.number("beta_end", 0.02),
        beta_schedule=reader.choice("beta_schedule", "linear", BETA_SCHEDULES),
        prediction_type=reader.choice("prediction_type", "epsilon", PREDICTION_TYPES),
        spacing=reader.choice("timestep_spacing", "leading", SPACINGS),
        offset=reader.integer("steps_offset", 0, least=0),
        last_alpha_one=reader.boolean("set_alpha_to_one", True),
        zero_snr=reader.boolean("rescale_betas_zero_snr", False),
    )
    ordered = 0 < config.beta_start <= config.beta_end < 1
    reader.require(ordered, "beta_start", f"0 < beta_start <= beta_end < 1 (beta_end is {config.beta_end})")
    reader.require(raw.get("trained_betas") is None, "trained_betas", "null")
    return config  # what remains are settings of diffusers' solvers, which do not describe the model


def write_schedule_config(config: ScheduleConfig) -> dict[str, Any]:
    """The JSON that diffusers' `DDIMScheduler` reads."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "clip_sample": False,
        "num_train_timesteps": config.train_timesteps,
        "prediction_type": config.prediction_type,
        "set_alpha_to_one": config.last_alpha_one,
        "steps_offset": config.offset,
        "timestep_spacing": config.spacing,
    } | ({"rescale_betas_zero_snr": True} if config.zero_snr else {})


def guidance_scale(raw: Mapping[str, Any], source: str = "model_index.json") -> float:
    """The guidance scale a model is best sampled at, where its pipeline's JSON tells one (`_guidance_scale`, a key of
    this project that diffusers skips). Raises: ConfigError.
    """
    return Reader(raw, source).number("_guidance_scale", GUIDANCE_SCALE)


def text_settings(raw: Mapping[str, Any], source: str = "text_encoder/config.json") -> dict[str, Any]:
    """What transformers' `CLIPTextConfig` is to be given of a `CLIPTextModel`'s JSON. Raises: ConfigError.

    What else stands there says how the model was saved or trained.
    """
    reader = Reader(raw, source)
    reader.choice("model_type", "clip_text_model", ("clip_text_model",))
    settings: dict[str, Any] = {
        "hidden_size": reader.integer("hidden_size", 512),
        "intermediate_size": reader.integer("intermediate_size", 2048, most=2**20),
        "num_hidden_layers": reader.integer("num_hidden_layers", 12, most=100),
        "num_attention_heads": reader.integer("num_attention_heads", 8, most=1024),
        "max_position_embeddings": reader.integer("max_position_embeddings", 77, least=3, most=4096),
        "vocab_size": reader.integer("vocab_size", 49408, least=256, most=2**20),
        "hidden_act": reader.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
        "layer_norm_eps": reader.number("layer_norm_eps", 1e-5),
        "projection_dim": reader.integer("projection_dim", 512),
        "bos_token_id": reader.integer("bos_token_id", 49406, least=0, most=2**20),
        "eos_token_id": reader.integer("eos_token_id", 49407, least=0, most=2**20),
        "pad_token_id": reader.integer("pad_token_id", 1, least=0, most=2**20),
    }
    heads = settings["num_attention_heads"]
    reader.require(settings["hidden_size"] % heads == 0, "num_attention_heads", "a divisor of hidden_size")
    return settings

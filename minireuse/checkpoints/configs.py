"""Configurations in diffusers' and transformers' JSON, read field by field, and written.

diffusers' JSON keeps some historical names that say the wrong thing. They are translated here, at the border, and
nowhere else: `attention_head_dim` holds the *number* of heads, and block types are spelled out as class names although
all that varies between Stable Diffusion's blocks is whether they hold attention.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Mapping
from typing import Any

from minireuse.checkpoints.fields import ConfigError, Reader, repeated
from minireuse.config import GUIDANCE_SCALE, UNetConfig, VAEConfig
from minireuse.schedule import BETA_SCHEDULES, PREDICTION_TYPES, SPACINGS, ScheduleConfig

# Keys of a U-Net that say nothing of Stable Diffusion's network.
UNUSED = {
    # These say nothing without an addition_embed_type and a class_embed_type other than the ones that are built.
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    # A numerical detail of diffusers' own attention: in half precision it takes the scores, too, in float32.
    "upcast_attention",
    # How an average over training was taken (diffusers `training_utils.py`, `EMAModel.save_pretrained`).
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
}


def read_unet_config(raw: Mapping[str, Any], source: str = "unet/config.json") -> UNetConfig:
    """Read diffusers' `UNet2DConditionModel` configuration.

    Raises: ConfigError where the file describes a U-Net other than Stable Diffusion 1.x, 2.x or XL.
    """
    reader = Reader(raw, source, optional=("num_attention_heads", "sample_size", "addition_embed_type"))
    _refuse_by_name(reader)
    widths = reader.ints("block_out_channels", (320, 640, 1280, 1280))
    levels = len(widths)
    down = reader.strings("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), levels)
    up = reader.strings("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, levels)
    attention = tuple(name == "CrossAttnDownBlock2D" for name in down)
    reader.require(set(down) <= {"CrossAttnDownBlock2D", "DownBlock2D"}, "down_block_types", "SD's block types")
    expected_up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    reader.require(up == expected_up, "up_block_types", f"the mirror image of down_block_types, {expected_up}")
    head_key = "num_attention_heads" if "num_attention_heads" in reader.raw else "attention_head_dim"
    heads = reader.ints(head_key, (8,) * levels, levels)
    for width, head in zip(widths, heads, strict=True):
        reader.require(width % head == 0, head_key, f"divisors of block_out_channels {widths}")
    groups = reader.integer("norm_num_groups", 32)
    for width in widths:
        reader.require(width % groups == 0, "norm_num_groups", f"a divisor of block_out_channels {widths}")
    depths = _depths(reader, levels)
    pooled_width, size_width = _added_widths(reader)
    config = UNetConfig(
        in_channels=reader.integer("in_channels", 4),
        out_channels=reader.integer("out_channels", 4),
        block_out_channels=widths,
        attention=attention,
        layers_per_block=reader.integer("layers_per_block", 2, most=16),
        heads=heads,
        depths=depths,
        cross_attention_dim=reader.integer("cross_attention_dim", 1280),
        linear_projection=reader.boolean("use_linear_projection", False),
        pooled_width=pooled_width,
        size_width=size_width,
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
        "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "dropout": 0.0,
        "attention_type": "default",
        "resnet_out_scale_factor": 1.0,
    }
    reader.finish(fixed, UNUSED)
    return config


def _refuse_by_name(reader: Reader) -> None:
    """Raises: ConfigError for relatives of Stable Diffusion that are given more than text and noise."""
    for key, values, model in (
        ("time_cond_proj_dim", None, "a latent consistency model, whose U-Net is told the guidance scale"),
        ("projection_class_embeddings_input_dim", (2560,), "the refiner of Stable Diffusion XL"),
    ):
        value = reader.raw.get(key)
        if isinstance(value, int) and (values is None or value in values):
            advice = "which is not supported; give a base model, or one of Turbo or Lightning"
            raise ConfigError(f"{reader.source}: {key} is {value}, so this is {model}, {advice}")


def _depths(reader: Reader, levels: int) -> tuple[int, ...]:
    """The number of transformer blocks in a row, per level; empty where it is one everywhere. Raises: ConfigError."""
    key = "transformer_layers_per_block"
    everywhere = type(one := repeated(reader.raw.get(key, 1))) is int and one == 1
    depths = (1,) if everywhere else reader.ints(key, (), levels)
    reader.used.add(key)
    reader.require(max(depths) <= 64, key, "at most 64 each")
    return () if set(depths) == {1} else depths


def _added_widths(reader: Reader) -> tuple[int | None, int]:
    """The widths of the pooled text and of a size, where the network is told them. Raises: ConfigError."""
    if "addition_embed_type" not in reader.raw:
        return None, UNetConfig.size_width
    reader.choice("addition_embed_type", "text_time", ("text_time",))
    size = reader.integer("addition_time_embed_dim", 256, most=4096)
    reader.require(size % 2 == 0, "addition_time_embed_dim", "an even number")
    key = "projection_class_embeddings_input_dim"
    pooled = reader.integer(key, 0, least=0) - 6 * size
    reader.require(pooled > 0, key, f"more than six times addition_time_embed_dim, which is {size}")
    return pooled, size


def write_unet_config(config: UNetConfig) -> dict[str, Any]:
    """The JSON that diffusers' `UNet2DConditionModel` reads."""
    written = {
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
    if config.depths:
        written["transformer_layers_per_block"] = list(config.depths)
    if config.added_width is not None:
        written["addition_embed_type"] = "text_time"
        written["addition_time_embed_dim"] = config.size_width
        written["projection_class_embeddings_input_dim"] = config.added_width
    return written


def read_vae_config(raw: Mapping[str, Any], source: str = "vae/config.json") -> VAEConfig:
    """Read diffusers' `AutoencoderKL` configuration. Raises: ConfigError."""
    reader = Reader(raw, source, optional=("sample_size",))
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
        force_upcast=reader.boolean("force_upcast", False),
    )
    reader.require(raw.get("out_channels", 3) == config.in_channels, "out_channels", "the same as in_channels")
    neutral = {
        "act_fn": "silu",
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "out_channels": config.in_channels,
    }
    reader.finish(neutral, ())
    return config


def write_vae_config(config: VAEConfig) -> dict[str, Any]:
    """The JSON that diffusers' `AutoencoderKL` reads."""
    levels = len(config.block_out_channels)
    written = {
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
    return written | ({"force_upcast": True} if config.force_upcast else {})


# What the scheduler classes of diffusers take where a file says nothing: those that stem from a table of betas.
_LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "linspace"}
_LINEAR |= {"set_alpha_to_one": True, "clip_sample": False}
_LEADING = _LINEAR | {"timestep_spacing": "leading", "clip_sample": True}
_NARROW = _LINEAR | {"beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED = _NARROW | {"beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _LEADING,
    "DDIMParallelScheduler": _LEADING,
    "DDPMScheduler": _LEADING,
    "DDPMParallelScheduler": _LEADING,
    "PNDMScheduler": _LEADING | {"set_alpha_to_one": False, "clip_sample": False},
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "HeunDiscreteScheduler": _NARROW,
    "KDPM2DiscreteScheduler": _NARROW,
    "KDPM2AncestralDiscreteScheduler": _NARROW,
    "DPMSolverSDEScheduler": _NARROW,
    "LMSDiscreteScheduler": _LINEAR,
    "EulerDiscreteScheduler": _LINEAR,
    "EulerAncestralDiscreteScheduler": _LINEAR,
    "DPMSolverSinglestepScheduler": _LINEAR,
    "DPMSolverMultistepScheduler": _LINEAR,
    "DEISMultistepScheduler": _LINEAR,
    "UniPCMultistepScheduler": _LINEAR,
    "SASolverScheduler": _LINEAR,
}

# Settings of diffusers' solvers that choose the timesteps as a spacing of this package does.
_SPACED = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_lu_lambdas": "exponential"}
# Those that change the picture, and that no sampler of this package has.
_UNKNOWN = ("clip_sample", "thresholding", "use_beta_sigmas", "sigma_min", "sigma_max")


def read_schedule_config(raw: Mapping[str, Any], source: str = "scheduler/scheduler_config.json") -> ScheduleConfig:
    """Read any of diffusers' scheduler configurations that stem from a betas table, with the defaults of its class.

    Warns of settings that this package does not follow. Raises: ConfigError.
    """
    reader = Reader(raw, source, optional=("trained_betas", *_UNKNOWN))
    name = raw.get("_class_name")
    reader.require(isinstance(name, str) and name in SCHEDULERS, "_class_name", f"one of {', '.join(SCHEDULERS)}")
    default = SCHEDULERS[str(name)]
    spacings = [spacing for key, spacing in _SPACED.items() if reader.boolean(key, False)]
    spacing = reader.choice("timestep_spacing", default["timestep_spacing"], SPACINGS)
    # diffusers' samplers of the other kind end here in another way: at the last entry of the table.
    ends_at_one = default["set_alpha_to_one"] and raw.get("final_sigmas_type") != "sigma_min"
    config = ScheduleConfig(
        train_timesteps=reader.integer("num_train_timesteps", 1000, most=100_000),
        beta_start=reader.number("beta_start", default["beta_start"]),
        beta_end=reader.number("beta_end", default["beta_end"]),
        beta_schedule=reader.choice("beta_schedule", default["beta_schedule"], BETA_SCHEDULES),
        prediction_type=reader.choice("prediction_type", "epsilon", PREDICTION_TYPES),
        spacing=(*spacings, spacing)[0],
        offset=reader.integer("steps_offset", 0, least=0),
        last_alpha_one=reader.boolean("set_alpha_to_one", ends_at_one),
        zero_snr=reader.boolean("rescale_betas_zero_snr", False),
        alphas_cumprod=_trained_table(reader),
    )
    ordered = 0 < config.beta_start <= config.beta_end < 1
    reader.require(ordered, "beta_start", f"0 < beta_start <= beta_end < 1 (beta_end is {config.beta_end})")
    discrete = raw.get("timestep_type", "discrete") == "discrete"
    reader.require(discrete, "timestep_type", "'discrete'")  # otherwise the U-Net is given log sigma
    reader.require(not reader.boolean("use_flow_sigmas", False), "use_flow_sigmas", "false")
    asked = [key for key in _UNKNOWN if reader.raw.get(key, default.get(key)) not in (None, False)]
    if asked:
        told = f"{source}: this package does not follow {', '.join(asked)} (of {name})"
        warnings.warn(f"{told}; pictures differ from those of diffusers where that matters", stacklevel=2)
    return config  # what remains are settings of diffusers' solvers, which do not describe the model


def _trained_table(reader: Reader) -> tuple[float, ...] | None:
    """Alpha-bar of `trained_betas`, which stand in the place of a formula. Raises: ConfigError."""
    betas = reader.raw.get("trained_betas")
    if betas is None:
        return None
    expected = f"num_train_timesteps = {reader.integer('num_train_timesteps', 1000)} numbers between 0 and 1"
    numbers = isinstance(betas, list) and len(betas) == reader.integer("num_train_timesteps", 1000)
    numbers = numbers and all(isinstance(b, (int, float)) and not isinstance(b, bool) and 0 < b <= 1 for b in betas)
    reader.require(numbers, "trained_betas", expected)
    table = tuple(itertools.accumulate((1 - b for b in betas), operator.mul))
    reader.require(all(a > b for a, b in itertools.pairwise((1.0, *table))), "trained_betas", expected)
    return table


def write_schedule_config(config: ScheduleConfig) -> dict[str, Any]:
    """The JSON that diffusers' `DDIMScheduler` reads."""
    written = {
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
    }
    if config.zero_snr:
        written["rescale_betas_zero_snr"] = True
    if config.alphas_cumprod is not None:
        written["trained_betas"] = [1 - b / a for a, b in itertools.pairwise((1.0, *config.alphas_cumprod))]
    return written


def guidance_scale(raw: Mapping[str, Any], source: str = "model_index.json", default: float = GUIDANCE_SCALE) -> float:
    """The guidance scale a model is best sampled at, where its pipeline's JSON tells one (`_guidance_scale`, a key of
    this project that diffusers skips). Raises: ConfigError.
    """
    return Reader(raw, source, optional=("_guidance_scale",)).number("_guidance_scale", default)


def zeros_for_no_prompt(raw: Mapping[str, Any], source: str = "model_index.json") -> bool:
    """Whether SDXL is given zeros where there is no negative prompt. Raises: ConfigError."""
    return Reader(raw, source).boolean("force_zeros_for_empty_prompt", True)


def text_settings(raw: Mapping[str, Any], source: str = "text_encoder/config.json") -> dict[str, Any]:
    """What transformers' `CLIPTextConfig` is to be given of a `CLIPTextModel`'s JSON. Raises: ConfigError.

    What else stands there says how the model was saved or trained. Of a whole CLIP, the half that reads text is meant.
    """
    whole = Reader(raw, source).raw
    if whole.get("model_type") == "clip" and isinstance(whole.get("text_config"), Mapping):
        raw = whole["text_config"]
    reader = Reader(raw, source, optional=("bos_token_id", "eos_token_id", "pad_token_id", "projection_dim"))
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

"""Model and schedule hyper-parameters as frozen dataclasses, read from diffusers' JSON.

diffusers' JSON keeps some historical names that say the wrong thing. They are translated here, at the
border, and nowhere else: `attention_head_dim` holds the *number* of heads, and block types are spelled out
as class names although all that varies between Stable Diffusion's blocks is whether they hold attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minireuse.reader import Reader


@dataclass(frozen=True)
class UNetConfig:
    """The conditional U-Net of Stable Diffusion 1.x / 2.x (Rombach et al., arXiv 2112.10752)."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # does the level of this width hold attention?
    layers_per_block: int = 2  # in the down path; the up path has one more
    heads: tuple[int, ...] = (8, 8, 8, 8)  # per level
    cross_attention_dim: int = 768
    linear_projection: bool = False  # proj_in / proj_out: Linear (SD 2) or 1x1 convolution (SD 1)
    norm_groups: int = 32
    sample_size: int = 64  # latent height and width the model was trained at

    @property
    def divisor(self) -> int:
        """Latent height and width must be multiples of this: one halving between each pair of levels."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any], source: str = "unet/config.json") -> UNetConfig:
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
        config = cls(
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

    def to_diffusers(self) -> dict[str, Any]:
        """The JSON that diffusers' `UNet2DConditionModel` reads."""
        return {
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "attention_head_dim": list(self.heads),
            "block_out_channels": list(self.block_out_channels),
            "cross_attention_dim": self.cross_attention_dim,
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in self.attention],
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(self.attention)],
            "in_channels": self.in_channels,
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_groups,
            "out_channels": self.out_channels,
            "sample_size": self.sample_size,
            "use_linear_projection": self.linear_projection,
        }


@dataclass(frozen=True)
class VAEConfig:
    """The KL autoencoder of Stable Diffusion; latents are scaled by `scaling_factor` inside encode and decode."""

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 512

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any], source: str = "vae/config.json") -> VAEConfig:
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
        config = cls(
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

    def to_diffusers(self) -> dict[str, Any]:
        """The JSON that diffusers' `AutoencoderKL` reads."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "in_channels": self.in_channels,
            "out_channels": self.in_channels,
            "latent_channels": self.latent_channels,
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_groups,
            "sample_size": self.sample_size,
            "scaling_factor": self.scaling_factor,
        }


BETA_SCHEDULES = ("linear", "scaled_linear")
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule a model was trained on, and how its timesteps are chosen at sampling time.

    Source: diffusers `schedulers/scheduling_ddim.py` for the names; arXiv 2305.08891 table 2 for the spacings.
    """

    train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # "scaled_linear": linear in sqrt(beta), Stable Diffusion's
    prediction_type: str = "epsilon"
    spacing: str = "leading"
    offset: int = 1  # added to "leading" timesteps
    last_alpha_one: bool = False  # alpha-bar after the last step: 1, or (False, as in SD) alphas_cumprod[0]

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any], source: str = "scheduler/scheduler_config.json") -> ScheduleConfig:
        """Read any of diffusers' scheduler configurations that stem from a betas table. Raises: ConfigError."""
        reader = Reader(raw, source)
        config = cls(
            train_timesteps=reader.integer("num_train_timesteps", 1000, most=100_000),
            beta_start=reader.number("beta_start", 0.0001),
            beta_end=reader.number("beta_end", 0.02),
            beta_schedule=reader.choice("beta_schedule", "linear", BETA_SCHEDULES),
            prediction_type=reader.choice("prediction_type", "epsilon", PREDICTION_TYPES),
            spacing=reader.choice("timestep_spacing", "leading", SPACINGS),
            offset=reader.integer("steps_offset", 0, least=0),
            last_alpha_one=reader.boolean("set_alpha_to_one", True),
        )
        ordered = 0 < config.beta_start <= config.beta_end < 1
        reader.require(ordered, "beta_start", f"0 < beta_start <= beta_end < 1 (beta_end is {config.beta_end})")
        reader.require(raw.get("trained_betas") is None, "trained_betas", "null")
        reader.require(not raw.get("rescale_betas_zero_snr"), "rescale_betas_zero_snr", "false")
        return config  # what remains are settings of diffusers' solvers, which do not describe the model

    def to_diffusers(self) -> dict[str, Any]:
        """The JSON that diffusers' `DDIMScheduler` reads."""
        return {
            "_class_name": "DDIMScheduler",
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "beta_start": self.beta_start,
            "clip_sample": False,
            "num_train_timesteps": self.train_timesteps,
            "prediction_type": self.prediction_type,
            "set_alpha_to_one": self.last_alpha_one,
            "steps_offset": self.offset,
            "timestep_spacing": self.spacing,
        }


GUIDANCE_SCALE = 7.5  # Stable Diffusion's own


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


SD1_UNET = UNetConfig()
SD2_UNET = UNetConfig(heads=(5, 10, 20, 20), cross_attention_dim=1024, linear_projection=True, sample_size=96)
SD_VAE = VAEConfig()
SD_SCHEDULE = ScheduleConfig()

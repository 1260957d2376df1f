"""Hyper-parameters of the models as frozen dataclasses, and those of the published ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UNetConfig:
    """The conditional U-Net of Stable Diffusion 1.x / 2.x (arXiv 2112.10752) and XL (arXiv 2307.01952)."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # does the level of this width hold attention?
    layers_per_block: int = 2  # in the down path; the up path has one more
    heads: tuple[int, ...] = (8, 8, 8, 8)  # per level
    depths: tuple[int, ...] = ()  # transformer blocks after each residual block, per level; () is one at every level
    cross_attention_dim: int = 768
    linear_projection: bool = False  # proj_in / proj_out: Linear (SD 2, SDXL) or 1x1 convolution (SD 1)
    pooled_width: int | None = None  # of the pooled text that SDXL adds to the time embedding, with six sizes
    size_width: int = 256  # of the sinusoids that stand for each of these sizes
    norm_groups: int = 32
    sample_size: int = 64  # latent height and width the model was trained at

    @property
    def divisor(self) -> int:
        """Latent height and width must be multiples of this: one halving between each pair of levels."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def added_width(self) -> int | None:
        """The width of what is added to the time embedding (`UNet.added`); None where nothing is."""
        return None if self.pooled_width is None else self.pooled_width + 6 * self.size_width


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
    force_upcast: bool = False  # its numbers leave the range of float16, so it runs in float32 instead

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


GUIDANCE_SCALE = 7.5  # Stable Diffusion's own
SDXL_GUIDANCE_SCALE = 5.0

SD1_UNET = UNetConfig()
SD2_UNET = UNetConfig(heads=(5, 10, 20, 20), cross_attention_dim=1024, linear_projection=True, sample_size=96)
SDXL_UNET = UNetConfig(
    block_out_channels=(320, 640, 1280),
    attention=(False, True, True),
    heads=(5, 10, 20),
    depths=(1, 2, 10),
    cross_attention_dim=2048,  # CLIP's 768 and OpenCLIP's 1280, side by side
    linear_projection=True,
    pooled_width=1280,
    sample_size=128,
)
SD_VAE = VAEConfig()
SDXL_VAE = VAEConfig(scaling_factor=0.13025, sample_size=1024, force_upcast=True)

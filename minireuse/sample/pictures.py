"""A picture to begin with: what its file says beside the pixels is heeded, so that it looks as viewers show it."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from minireuse.pipeline import Pipeline
from minireuse.sample.recipe import read_image

GREY = ("1", "L", "LA")
GAMMA = 1 / 2.2  # about that of sRGB


def read_init_image(path: Path, height: int | None, width: int | None, pipeline: Pipeline) -> Tensor:
    """A picture at the size asked for; without one, in its own proportions and of the model's own area.

    Shapes: -> (1, 3, H, W) in -1 ... 1. Raises: ValueError for what is no picture; OSError.
    """
    picture = read_picture(path)
    own = pipeline.latent_size()[0] * pipeline.vae.config.factor
    height, width = fitting_size((picture.height, picture.width), (height, width), own, pipeline.unit)
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 127.5 - 1


def fitting_size(
    picture: tuple[int, int], asked: tuple[int | None, int | None], own: int, unit: int
) -> tuple[int, int]:
    """Height and width for a picture: as asked, and what is not asked in its proportions, in multiples of `unit`.

    own: the side of the square that the model was trained at, whose area is kept where nothing is asked.
    """
    height, width = asked
    ratio = picture[1] / picture[0]
    most = own * own // unit  # the longer side of a strip that is one unit wide

    def rounded(side: float) -> int:
        return min(max(unit, round(side / unit) * unit), most)

    if height is None and width is None:
        return rounded(own / ratio**0.5), rounded(own * ratio**0.5)
    if height is None:
        return rounded((width or own) / ratio), width or own
    return height, rounded(height * ratio) if width is None else width


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB: upright, in sRGB, without transparency. Raises: ValueError for what is none; OSError."""
    image = read_image(path, "give --init-image a picture, as PNG, say")
    with Image.open(path) as opened:
        frames = getattr(opened, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # whose further pictures are a phone's own notes on the first
        warnings.warn(f"{path} holds {frames} pictures; the first of them is used", stacklevel=2)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError(f"{path} holds fractions of unknown range; save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        image = _eight_bits(image, path)
    if "A" not in image.getbands() and "transparency" not in image.info:
        return _in_srgb(image, path)
    alpha = image.convert("RGBA").getchannel("A")
    opaque = image.convert("L") if image.mode in GREY else image.convert("RGBA").convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(_in_srgb(opaque, path), mask=alpha)
    if alpha.getextrema()[0] != 255:
        warnings.warn(f"{path} is transparent in places; it is laid onto white", stacklevel=2)
    return white


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """A grey picture of 16 bits, which Pillow would clip at 255. A grey value may stand for transparent."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{path} has more than 16 bits per channel; save it with 8 or 16")
    grey = Image.fromarray(np.round(values / 257).astype(np.uint8))
    info = dict(image.info)
    clear = info.pop("transparency", None)
    if clear is not None:
        grey = Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))
    grey.info = info
    return grey


def _in_srgb(image: Image.Image, path: Path) -> Image.Image:
    """An opaque picture's colours as its profile, or else its gamma, means them. Shapes: -> RGB."""
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma")
    if profile:
        try:
            meant = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = meant.profile.xcolor_space.strip()
            inputs = {"GRAY": ("L", GREY), "CMYK": ("CMYK", ("CMYK",)), "RGB": ("RGB", ("RGB", "P", "RGBX", *GREY))}
            mode, fits = inputs.get(space, ("", ()))
            if image.mode not in fits:
                raise ValueError(f"a profile for {space} in a picture of mode {image.mode}")
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image.convert(mode), meant, srgb, outputMode="RGB")
            assert converted is not None  # it is None only where the picture is changed in place
            return converted
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            warnings.warn(f"the colour profile of {path} is left out ({error}); colours may differ", stacklevel=3)
    image = image.convert("RGB")
    if profile or not gamma or "srgb" in image.info or abs(gamma - GAMMA) < 0.05:
        return image
    light = (np.arange(256) / 255) ** (1 / gamma)
    coded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    return image.point([round(255 * float(value)) for value in coded] * 3)

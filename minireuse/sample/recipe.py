"""What a picture was made from: written into its PNG as text, and read back to make it again."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from minireuse.common.options import count_of, parse_timesteps
from minireuse.files import parse_json, shown
from minireuse.plan import PlanError, ReusePlan, Site
from minireuse.text import TextEncoder, TextEncoders

T = TypeVar("T")
SHIPPED = "shipped"  # the name of the model that comes with the package
FLAG = {"False": False, "True": True}


def _steps(text: str) -> int | tuple[float, ...]:
    return parse_timesteps(text) if "," in text or "." in text else int(text)


# The fields of a recipe whose text is that of the value itself.
PLAIN: dict[str, Callable[[str], Any]] = {
    "sampler": str,
    "steps": _steps,
    "guidance_scale": float,
    "eta": float,
    "strength": float,
    "attention": str,
    "compile": FLAG.__getitem__,
    "dtype": str,
    "device": str,
    "cache_dtype": str,
    "policy": str,
    "plan": str,
    "model": str,
    "fingerprint": str,
    "prediction_type": str,
    "watched": str,
}


def _loras(text: str) -> tuple[tuple[str, float, str], ...]:
    return tuple((str(path), float(strength), str(digest)) for path, strength, digest in parse_json(text))


# Not in files of version 0.1, but for a negative prompt, which is left out where there was none.
NEWER: dict[str, Callable[[str], Any]] = {
    "negative_prompt": str,
    "spacing": str,
    "guidance_rescale": float,
    "tokens": str,
    "loras": _loras,
    "clip_skip": lambda text: int(text) if text else None,
}

# What AUTOMATIC1111/stable-diffusion-webui calls the samplers and spacings that it has, too.
SAMPLER_NAMES = {"ddim": "DDIM", "plms": "PLMS", "euler": "Euler", "euler_a": "Euler a"}
SAMPLER_NAMES |= {"dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE"}
SCHEDULE_TYPES = {"karras": "Karras", "exponential": "Exponential", "ays": "Align Your Steps"}


@dataclass(frozen=True)
class Recipe:
    """Everything that a picture's pixels depend on, beside the machine and its libraries.

    jobs: prompts and seeds of the batch it was sampled in, of which it is number `place`; matrix products may sum in
    another order for another batch. init_image: path and digest, or empty. plan: as JSON. model: a path.
    fingerprint: of the U-Net's weights. watched: the sites of which --save-maps wrote the maps, or empty; then every
    map is computed by another kernel. digests: of every part of the model (`Pipeline.digests`), empty in files of
    version 0.1. tokens: digest of what the tokenizer made of the batch's prompts (`tokens_of`). loras: path, strength
    and digest of each.
    """

    jobs: tuple[tuple[str, int], ...]
    place: int
    sampler: str
    steps: int | tuple[float, ...]
    guidance_scale: float
    eta: float
    height: int
    width: int
    init_image: tuple[str, str] | tuple[()]
    strength: float
    attention: str
    compile: bool
    dtype: str
    device: str
    cache_dtype: str
    policy: str
    plan: str
    model: str
    fingerprint: str
    prediction_type: str
    watched: str
    negative_prompt: str | None = None
    spacing: str = ""  # of the timesteps; empty in files of version 0.1, which have the model's own
    guidance_rescale: float = 0.0
    tokens: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    clip_skip: int | None = None
    loras: tuple[tuple[str, float, str], ...] = ()

    def chunks(self) -> dict[str, str]:
        """The text of a PNG."""
        prompt, seed = self.jobs[self.place]
        return {
            "prompt": prompt,
            "seed": str(seed),
            **{name: str(value) for name in (*PLAIN, *NEWER) if (value := getattr(self, name)) is not None},
            "clip_skip": "" if self.clip_skip is None else str(self.clip_skip),
            "steps": str(self.steps) if isinstance(self.steps, int) else ",".join(map(str, self.steps)),
            "size": f"{self.width}x{self.height}",
            "init_image": json.dumps(self.init_image),
            "loras": json.dumps(self.loras),
            "batch": json.dumps({"place": self.place, "jobs": self.jobs}),
            "digests": json.dumps(self.digests),
            "versions": versions(),
            "parameters": self.parameters(),
        }

    def parameters(self) -> str:
        """The text under which AUTOMATIC1111's tools, and those that follow them, look for the settings.

        Source: AUTOMATIC1111/stable-diffusion-webui `modules/infotext_utils.py`, parse_generation_parameters.
        """
        prompt, seed = self.jobs[self.place]
        settings = {
            "Steps": count_of(self.steps),
            "Sampler": SAMPLER_NAMES.get(self.sampler, self.sampler),
            "Schedule type": SCHEDULE_TYPES.get(self.spacing),
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": seed,
            "Size": f"{self.width}x{self.height}",
            "Model": Path(self.model).stem,
            "Denoising strength": self.strength if self.init_image else None,
            "Eta DDIM": self.eta or None,
            "Clip skip": self.clip_skip,
            "Version": own_version(),
        }
        said = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items() if value is not None)
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt else []
        return "\n".join([prompt, *negative, said])

    def other_parts(self, digests: Mapping[str, str], tokens: str) -> list[str]:
        """The parts of a model that are not those the picture was made with, as far as it tells."""
        parts = [name for name, digest in self.digests.items() if digests.get(name) != digest]
        return parts + (["tokenizer"] if self.tokens not in ("", tokens) else [])

    def check_text(self) -> None:
        """Raises: ValueError for what a PNG cannot hold: found out before the pictures are painted, not after."""
        try:
            "".join(replace(self, jobs=(("", 0),), place=0).chunks().values()).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a path or a text is not UTF-8 ({error.reason}), which a PNG cannot hold") from None

    def plan_over(self, sites: Iterable[Site]) -> ReusePlan:
        """The plan, over a model's own sites. Raises: ValueError for what is none."""
        try:
            return ReusePlan.from_json(self.plan, sites)
        except PlanError as error:
            advice = "give a PNG that this command wrote"
            raise ValueError(f"the picture's text 'plan' is {shown(self.plan)} ({error}); {advice}") from None

    @classmethod
    def from_chunks(cls, chunks: dict[str, str]) -> Recipe:
        """The inverse of `chunks`. Raises: ValueError naming the chunk that is missing or wrong."""

        def get(name: str, convert: Callable[[str], T]) -> T:
            if name not in chunks:
                raise ValueError(f"it has no text {name!r}")
            try:
                return convert(chunks[name])
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise ValueError(f"its text {name!r} is {shown(chunks[name])} ({str(error)[:200]})") from None

        def batch(text: str) -> tuple[int, tuple[tuple[str, int], ...]]:
            data = parse_json(text)
            jobs = tuple((str(prompt), _seed(seed)) for prompt, seed in data["jobs"])
            place = data["place"]
            if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(jobs) <= 4096:
                raise ValueError(f"place {shown(place)} of {len(jobs)} images")
            return place, jobs

        place, jobs = get("batch", batch)
        width, height = get("size", _size)
        plain: dict[str, Any] = {name: get(name, kind) for name, kind in PLAIN.items()}
        plain |= {name: get(name, kind) for name, kind in NEWER.items() if name in chunks}
        return cls(
            jobs=jobs,
            place=place,
            height=height,
            width=width,
            init_image=get("init_image", _init_image),
            digests=get("digests", _digests) if "digests" in chunks else {},
            **plain,
        )


def _seed(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"seed {shown(value)}")
    return value


def _size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    if not (0 < width <= 16384 and 0 < height <= 16384):
        raise ValueError("expected at most 16384x16384")
    return width, height


def _init_image(text: str) -> tuple[str, str] | tuple[()]:
    data = parse_json(text)
    if data == []:
        return ()
    path, digest = data
    return str(path), str(digest)


def _digests(text: str) -> dict[str, str]:
    data = parse_json(text)
    if not isinstance(data, dict) or len(data) > 64 or not all(isinstance(digest, str) for digest in data.values()):
        raise ValueError("expected an object of texts")
    return data


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def tokens_of(text: TextEncoder | TextEncoders, jobs: Iterable[tuple[str, int]], negative_prompt: str | None) -> str:
    """A digest of the tokens that a batch is painted from: another tokenizer matters where it gives others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of words that are dropped, which painting tells
        ids = text.tokenize([negative_prompt or "", *(prompt for prompt, _ in jobs)])
    return hashlib.sha256(repr(ids.tolist()).encode()).hexdigest()[:12]


def own_version() -> str:
    try:
        return f"minireuse {version('minireuse')}"
    except PackageNotFoundError:
        return "minireuse source"


def versions() -> str:
    return f"{own_version()}, torch {torch.__version__}, python {platform.python_version()}"


def to_png(image: np.ndarray, recipe: Recipe) -> bytes:
    """A PNG file with the recipe as text. Shapes: image (H, W, 3) uint8."""
    chunks = PngInfo()
    for key, value in recipe.chunks().items():
        # Other people's tools look for theirs in the older kind of text, where it can hold it.
        (chunks.add_text if key == "parameters" else chunks.add_itxt)(key, value)
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", pnginfo=chunks)
    return file.getvalue()


def read_image(path: Path, remedy: str, formats: list[str] | None = None) -> Image.Image:
    """A picture from a file, wholly read. Raises: ValueError, with a remedy, for what is none; OSError."""
    try:
        with Image.open(path, formats=formats) as image:
            image.load()  # texts may follow the pixels
            return image
    except UnidentifiedImageError:
        kind = "an image that Pillow can read" if formats is None else f"a {' or '.join(formats)}"
        raise ValueError(f"{path} is not {kind}; {remedy}") from None
    except (SyntaxError, ValueError, OSError, Image.DecompressionBombError) as error:  # Pillow's, for broken files
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's own
        raise ValueError(f"{path} is a broken image ({error}); {remedy}") from None


def from_png(path: Path) -> tuple[Recipe, str]:
    """The recipe in a PNG, and the versions it was made with. Raises: ValueError, OSError."""
    image = read_image(path, "give a PNG that this command wrote", ["PNG"])
    chunks = {str(key): str(value) for key, value in image.info.items()}
    try:
        return Recipe.from_chunks(chunks), chunks.get("versions", "unknown versions")
    except ValueError as error:
        advice = "give a PNG that this command wrote"
        raise ValueError(f"{path} does not contain the settings it was made with: {error}; {advice}") from None

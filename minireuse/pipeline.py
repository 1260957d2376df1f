"""Prompts to images: `load` a model, `Pipeline.generate` pictures."""

from __future__ import annotations

import copy
import hashlib
import math
import operator
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minireuse import checkpoints
from minireuse.attention import Watch
from minireuse.cache import ReuseCache
from minireuse.config import GUIDANCE_SCALE, UNetConfig, VAEConfig
from minireuse.devices import pick_device, pick_dtype
from minireuse.files import shipped_model
from minireuse.guidance import ConditionalUNet, guided_denoise
from minireuse.plan import ReusePlan, Site
from minireuse.samplers import SAMPLERS, Denoise, Sampler, Step, call_timesteps, count_calls
from minireuse.schedule import PREDICTION_TYPES, Schedule
from minireuse.text import Conditioning, TextEncoder, TextEncoders
from minireuse.unet import UNet
from minireuse.vae import VAE

ATTENTIONS = ("fused", "explicit")


@dataclass(frozen=True)
class Result:
    """What one generation gave.

    Shapes: images (B, H, W, 3) uint8; latents (B, 4, h, w) float32.
    Units: seconds of the sampling loop alone; calls of the U-Net, for the whole batch.
    """

    images: np.ndarray
    latents: Tensor
    seconds: float
    calls: int
    cache_peak_bytes: int


def load(
    path: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    prediction_type: str | None = None,
    spacing: str | None = None,
    tokenizer: str | Path | None = None,
    loras: Sequence[str | Path] = (),
) -> Pipeline:
    """Load a model: None is the one shipped with the package, a folder is in diffusers' layout, a file in LDM's.

    path: where nothing of that name is there, "owner/name" is fetched from the hub.
    device: auto takes cuda, then mps, then cpu; meta reads no weights, for looking at sites and plans.
    dtype: auto is float16 on cuda, else float32.
    prediction_type: epsilon or v_prediction, where the checkpoint does not tell or tells wrongly.
    spacing: of the timesteps, instead of the model's own (`minireuse.schedule.Schedule.timesteps`).
    tokenizer: a folder or hub name instead of the model's own; single files carry none and get CLIP's.
    loras: "FILE" or "FILE:STRENGTH", each; merged into the weights.

    Raises: ValueError with one sentence that says what is wrong with the checkpoint or an argument.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type is {prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}")
    place = pick_device(device)
    precision = pick_dtype(dtype, place)
    found = tuple(map(checkpoints.find_lora, [loras] if isinstance(loras, (str, Path)) else loras))
    half, weights = precision in (torch.float16, torch.bfloat16), place.type != "meta"
    folder = checkpoints.locate(Path(path or shipped_model()), half=half, weights=weights)
    before = None
    if place.type == "meta":
        parts = checkpoints.empty_parts(folder, prediction_type)
    else:
        parts = checkpoints.load_parts(folder, precision, prediction_type, tokenizer)
        if found:
            before = _sampled(parts.unet.parameters())
            texts = zip(("text_encoder", "text_encoder_2"), parts.text.encoders, strict=False)
            checkpoints.merge_loras({"unet": parts.unet, **{name: text.model for name, text in texts}}, found)
    # Convolutions are faster with channels last on CUDA's tensor cores and in oneDNN.
    unet = parts.unet.to(place).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae = parts.vae.to(place).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    text = parts.text.to(place, dtype=precision)
    for module in (unet, vae, text):
        module.eval().requires_grad_(False)
    config = parts.schedule if spacing is None else replace(parts.schedule, spacing=spacing)
    schedule = Schedule.from_config(config)
    return Pipeline(unet, vae, text, schedule, parts.guidance_scale, loras=found, before_loras=before)


@dataclass
class Pipeline:
    """The parts of a text-to-image model, usable one by one, and the loop that joins them."""

    unet: UNet
    vae: VAE
    text: TextEncoder | TextEncoders
    schedule: Schedule
    guidance_scale: float = GUIDANCE_SCALE  # what `generate` takes where none is given
    compiled: ConditionalUNet | None = None  # what `generate` calls instead of `unet`, such as a `CompiledUNet` of it
    loras: tuple[checkpoints.LoRA, ...] = ()  # what was merged into the weights
    before_loras: str | None = None  # the fingerprint that the U-Net had then

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every reusable tensor of the U-Net."""
        return self.unet.sites

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def unit(self) -> int:
        """Heights and widths of images are multiples of this. Units: pixels."""
        return self.vae.config.factor * self.unet.config.divisor

    def guidance(self, scale: float | None = None) -> float:
        """The guidance scale that a run uses: None is the model's own, and 0 becomes 1, with a warning.

        0 would follow the negative prompt alone. Model cards write it where they mean that guidance is off.
        Raises: ValueError for what is no number.
        """
        scale = self.guidance_scale if scale is None else scale
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale is {scale}, expected a finite number")
        if scale == 0:
            warnings.warn("guidance_scale 0 would ignore the prompt; it runs as 1, without guidance", stacklevel=2)
            return 1.0
        return float(scale)

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that tell this U-Net's weights, as they were loaded, from others.

        They are those of the U-Net before any LoRA: plans that were searched for a model serve it with LoRAs, too.
        They come from thousands of numbers of every tensor, not from all, which would take seconds. A model stored in
        half precision has the same ones in float32. Without weights, on the meta device, there are none.
        """
        if self.before_loras is not None:
            return self.before_loras
        return "" if self.device.type == "meta" else _sampled(self.unet.parameters())

    @property
    def digests(self) -> dict[str, str]:
        """What tells the U-Net, VAE, text encoder and schedule from others: weights, as in `fingerprint`, and settings.

        Twelve hexadecimal digits each; none without weights, on the meta device.
        """
        if self.device.type == "meta":
            return {}
        texts = zip(("text encoder", "second text encoder"), self.text.encoders, strict=False)
        table = self.schedule.alphas_cumprod.float()  # the last digits of a double may depend on the machine
        return {
            "U-Net": _digest(self.fingerprint, _settings(self.unet.config)),
            "VAE": _digest(_sampled(self.vae.parameters()), _settings(self.vae.config)),
            **{name: _text_digest(encoder) for name, encoder in texts},
            "schedule": _digest(table.tolist(), self.schedule.last_alpha_cumprod == 1, self.schedule.offset),
        }

    def timesteps(self, steps: int | Sequence[float], strength: float | None = None) -> list[float]:
        """The timesteps a run visits: all, or with an initial image the last `strength` of them.

        steps: how many, spaced as the schedule says, or the timesteps themselves. Raises: ValueError.
        """
        timesteps = self.schedule.timesteps(steps) if isinstance(steps, int) else list(steps)
        if strength is None:
            return timesteps
        if not 0 < strength <= 1:
            expected = "above 0 (keep the image) to 1 (keep a faint trace of it)"
            raise ValueError(f"strength is {strength}, expected {expected}")
        return timesteps[-max(1, round(len(timesteps) * strength)) :]

    def calls(self, sampler: str, steps: int | Sequence[float], strength: float | None = None) -> int:
        """The number of U-Net calls of a run, which a plan has to match."""
        return count_calls(_sampler(sampler), self.schedule, self.timesteps(steps, strength))

    def call_timesteps(self, sampler: str, steps: int | Sequence[float], strength: float | None = None) -> list[float]:
        """The timestep of each U-Net call of a run: by them a plan is carried over to it."""
        return call_timesteps(_sampler(sampler), self.schedule, self.timesteps(steps, strength))

    def latent_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """The height and width of the latents of an image; None is what the model was trained at.

        Units: pixels. Raises: ValueError for a size that the model cannot make.
        """
        factor, config, unit = self.vae.config.factor, self.unet.config, self.unit
        size = []
        for name, pixels in (("height", height), ("width", width)):
            pixels = config.sample_size * factor if pixels is None else pixels
            if pixels < unit or pixels % unit:
                near = max(unit, pixels // unit * unit)
                raise ValueError(f"{name} is {pixels}, expected a multiple of {unit} such as {near} or {near + unit}")
            size.append(pixels // factor)
        return size[0], size[1]

    @torch.inference_mode()
    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        negative_prompts: str | Sequence[str | None] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        steps: int | Sequence[float] = 20,
        sampler: str = "ddim",
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        seeds: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
        plan: ReusePlan | None = None,
        latents: Tensor | None = None,
        init_images: Tensor | None = None,
        strength: float = 0.8,
        eta: float = 0.0,
        cache: ReuseCache | None = None,
        attention: str = "fused",
        on_step: Callable[[Step], object] | None = None,
        wrap: Callable[[Denoise], Denoise] | None = None,
        watch: Watch | None = None,
    ) -> Result:
        """Generate one batch of images: a prompt and a seed each, either of them given once for all.

        negative_prompts: None is none, which SDXL tells from "".
        prompt_embeds, negative_prompt_embeds: (B, M, D), what the text encoder would give, instead of its texts. M may
        be more than 77, but is the same in both. SDXL needs pooled_prompt_embeds and negative_pooled_prompt_embeds,
        (B, P), beside them.
        steps: how many timesteps, spaced as `schedule` says, or the timesteps themselves, falling.
        height, width: pixels; None is what the model was trained at. latents: initial noise instead of the seeds'.
        guidance_scale: None is the model's own, or where it says nothing 7.5, or 5 for SDXL; 1 is off, and 0 runs as 1.
        clip_skip: the layer of the text encoder: 1 the last, 2 the one before (`TextEncoder.encode`); None is its own.
        guidance_rescale: 0 to 1, how much of the contrast that guidance adds is taken back (arXiv 2305.08891).
        init_images: (B, 3, H, W) in -1 ... 1, taken `strength` of the way to noise and denoised from there. At 1 all
            steps run, and as much of the image is left as the schedule leaves at its first timestep: alpha(t) of it.
        eta: noise added by ddim (0 none, 1 as much as DDPM); samplers that are stochastic by name always use 1.
        cache: where reused tensors are kept; None makes one in float16. attention: "explicit" writes every map out.
        watch: sees, and may change, the scores of every attention that is computed (`minireuse.attention.Watch`).
        wrap: makes what the sampler is given out of the model's `denoise(x, t, call)`, to replay known answers, say.

        Raises: ValueError with one sentence for an argument that does not fit; PlanError for a plan that does not.
        """
        solver = _sampler(sampler)
        guidance_scale = self.guidance(guidance_scale)
        if not math.isfinite(eta):
            raise ValueError(f"eta is {eta}, expected a finite number")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale is {guidance_rescale}, expected 0 (off) to 1")
        if eta < 0:
            raise ValueError(f"eta is {eta}, expected 0 for no noise, to 1 for as much as DDPM adds")
        if eta and sampler != "ddim":
            raise ValueError(f"eta is {eta}, but only ddim takes one; leave it out of {sampler}")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention is {attention!r}, expected one of {', '.join(ATTENTIONS)}")
        timesteps = self.timesteps(steps, None if init_images is None else strength)
        calls = count_calls(solver, self.schedule, timesteps)
        plan = ReusePlan.nothing(calls) if plan is None else plan.on(self.sites)
        plan.check_calls(calls, sampler)
        cache = ReuseCache() if cache is None else cache
        if len(cache):
            raise ValueError("the cache still holds tensors of another run; pass a new one or call its clear()")

        if negative_prompts is None and negative_prompt_embeds is None:
            negative_prompts = (None,)
        positive = self._texts("", prompts, prompt_embeds, pooled_prompt_embeds)
        negative = self._texts("negative_", negative_prompts, negative_prompt_embeds, negative_pooled_prompt_embeds)
        seeds = [seeds] if isinstance(seeds, (int, np.integer)) else list(seeds)
        positive, negative, seeds = _batch(
            {"prompts": positive, "negative_prompts": negative, "seeds": [operator.index(seed) for seed in seeds]}
        )
        groups = [positive] if guidance_scale == 1 else [negative, positive]
        context, pooled = self._conditioning(clip_skip, *groups)
        # One generator per image, on the CPU: an image depends on its own seed alone, on every device and in any batch.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = self._start(generators, (height, width), latents, init_images, timesteps[0])
        pixels_high, pixels_wide = (self.vae.config.factor * side for side in x.shape[2:])
        denoise = guided_denoise(
            self.compiled or self.unet,
            context,
            self.schedule,
            plan,
            cache,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            attention=attention,
            watch=watch,
            added=self.unet.added(pooled, pixels_high, pixels_wide),
        )
        if wrap is not None:
            denoise = wrap(denoise)
        options = {"eta": eta} if eta else {}
        cache.peak_nbytes = 0

        self.synchronize()
        started = time.perf_counter()
        noise = lambda like: _noise(generators, like.shape[1:]).to(like)  # noqa: E731
        finite: list[Tensor] = []  # looked at after the loop: asking the device at every step would stall it
        for step in solver(denoise, x, self.schedule, timesteps, noise=noise, **options):
            x = step.x
            finite.append(torch.isfinite(x).flatten(1).all(dim=1))
            if on_step is not None:
                on_step(step)
        self.synchronize()
        seconds = time.perf_counter() - started

        broken = [i for i, fine in enumerate(torch.stack(finite).tolist()) if not all(fine)]
        if broken:
            where = f"step {broken[0] + 1} of {len(timesteps)} (t = {timesteps[broken[0]]})"
            raise ValueError(f"the latents became NaN or inf at {where}, computed in {self.dtype}; try dtype float32")
        return Result(self.to_images(x), x, seconds, calls, cache.peak_nbytes)

    def _texts(
        self, kind: str, texts: str | Sequence[str | None] | None, embeds: Tensor | None, pooled: Tensor | None
    ) -> list[Any]:
        """The texts of a batch, or what stands for each of them: a `Conditioning`, without the batch's dimension.

        kind: "" or "negative_". Raises: ValueError for both of them, none, or what does not fit the U-Net.
        """
        name = f"{kind}prompt"
        if (texts is None) == (embeds is None):
            given = "neither of them is given" if texts is None else "both are given"
            raise ValueError(f"{name}s and {name}_embeds: {given}; give one of them")
        pooled_width, pooled_name = self.unet.config.pooled_width, f"{kind}pooled_prompt_embeds"
        if pooled is not None and (embeds is None or pooled_width is None):
            reason = "there are no" if embeds is None else "this model reads only"
            raise ValueError(f"{pooled_name} are given, but {reason} {name}_embeds; leave them out")
        if embeds is None:
            return [texts] if isinstance(texts, str) else list(texts or [])
        context = self._embeds(f"{name}_embeds", embeds, ("B", "tokens", self.unet.config.cross_attention_dim))
        if pooled_width is None:
            return list(map(Conditioning, context))
        if pooled is None:
            raise ValueError(f"{name}_embeds are given without {pooled_name}, which this model reads, too; give both")
        rows = self._embeds(pooled_name, pooled, (len(context), pooled_width))
        return list(map(Conditioning, context, rows))

    def _embeds(self, name: str, embeds: Tensor, shape: Sequence[int | str]) -> Tensor:
        """What another library made of texts, as the U-Net takes it. shape: a name stands for any size but 0.

        Raises: ValueError for another shape, and for what is not finite.
        """
        given = tuple(embeds.shape)
        fits = lambda size, wanted: size > 0 if isinstance(wanted, str) else size == wanted  # noqa: E731
        if len(given) != len(shape) or not all(map(fits, given, shape)):
            expected = ", ".join(map(str, shape))
            raise ValueError(f"{name} have shape {given}, expected ({expected}), as text.condition gives")
        if not torch.isfinite(embeds).all():
            raise ValueError(f"{name} hold NaN or inf; compute them again, in float32")
        return embeds.to(self.device, self.dtype)

    def _conditioning(self, clip_skip: int | None, *groups: list[Any]) -> Conditioning:
        """What the U-Net is told of texts and of what stands for them: of all groups, one after the other."""
        if not any(isinstance(text, Conditioning) for group in groups for text in group):
            return self.text.condition([text for group in groups for text in group], clip_skip)
        parts = [
            _joined(torch.stack, g) if isinstance(g[0], Conditioning) else self.text.condition(g, clip_skip)
            for g in groups
        ]
        if len({part.context.shape[1] for part in parts}) > 1:
            lengths = " and ".join(str(part.context.shape[1]) for part in parts)
            raise ValueError(
                f"negative and positive prompts are {lengths} tokens long, expected the same length; "
                "give prompt_embeds and negative_prompt_embeds of one length"
            )
        return _joined(torch.cat, parts)

    def _start(
        self,
        generators: list[torch.Generator],
        size: tuple[int | None, int | None],
        latents: Tensor | None,
        init_images: Tensor | None,
        t: float,
    ) -> Tensor:
        """The latents the sampler starts from. Shapes: -> (B, 4, h, w) float32."""
        if init_images is not None:
            size = self._check_images(init_images, len(generators), size)
        shape = (self.unet.config.in_channels, *self.latent_size(*size))
        if latents is not None and tuple(latents.shape) != (len(generators), *shape):
            expected = (len(generators), *shape)
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected {expected} for these prompts and size"
            )
        noise = _noise(generators, shape) if latents is None else latents
        noise = noise.to(self.device, torch.float32)
        if init_images is None:
            return noise
        clean = self._through_vae(VAE.encode, init_images.to(self.device), "encoded")
        return self.schedule.alpha(t) * clean + self.schedule.sigma(t) * noise

    def _check_images(self, images: Tensor, batch: int, size: tuple[int | None, int | None]) -> tuple[int, int]:
        """The size of the initial images. Raises: ValueError where they do not fit the batch, the size or the range."""
        channels = self.vae.config.in_channels
        if images.ndim != 4 or images.shape[:2] != (batch, channels):
            raise ValueError(f"init_images have shape {tuple(images.shape)}, expected ({batch}, {channels}, H, W)")
        height, width = images.shape[2:]
        if any(asked not in (None, own) for asked, own in zip(size, (height, width), strict=True)):
            raise ValueError(f"init_images are {width}x{height}, which is not the size asked for; resize them first")
        if not -1.01 <= images.min() <= images.max() <= 1.01:
            raise ValueError("init_images have values outside -1 to 1; scale them, as in image / 127.5 - 1")
        return height, width

    def to_images(self, latents: Tensor) -> np.ndarray:
        """Decode latents, one image at a time, so that memory does not grow with the batch.

        What overflows in half precision is decoded again in float32; a warning says so.
        Shapes: (B, 4, h, w) -> (B, H, W, 3) uint8. Raises: ValueError for what is not finite even so.
        """
        pixels = self._through_vae(VAE.decode, latents, "decoded")
        images = pixels.clamp(-1, 1).add(1).mul(127.5).round().to("cpu", torch.uint8)
        return images.permute(0, 2, 3, 1).numpy()

    def _through_vae(self, function: Callable[[VAE, Tensor], Tensor], inputs: Tensor, done: str) -> Tensor:
        """`VAE.encode` or `VAE.decode`, one image at a time, and again in float32 where it overflows.

        Shapes: as the function's; float32. Raises: ValueError for what is not finite even so.
        """
        dtype = self.vae.quant_conv.weight.dtype  # not always that of the U-Net: `VAEConfig.force_upcast`
        outputs = torch.cat([function(self.vae, x[None].to(dtype)).float() for x in inputs])
        if not torch.isfinite(outputs).all() and dtype != torch.float32:
            warnings.warn(f"the VAE overflowed in {dtype}, so the images are {done} in float32", stacklevel=3)
            vae = copy.deepcopy(self.vae).float()
            outputs = torch.cat([function(vae, x[None].float()) for x in inputs])
        if not torch.isfinite(outputs).all():
            raise ValueError("the VAE gave NaN or inf; its weights or what it was given are broken")
        return outputs

    def synchronize(self) -> None:
        """Wait until the device has done what it was given: before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def _joined(how: Callable[[list[Tensor]], Tensor], parts: Sequence[Conditioning]) -> Conditioning:
    """Several of them as one. how: `torch.cat` for batches, `torch.stack` for single ones."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditioning(how([part.context for part in parts]), how(pooled) if pooled else None)


def _sampled(tensors: Iterable[Tensor]) -> str:
    """A digest of thousands of numbers of each tensor."""
    digest = hashlib.sha256()
    for tensor in tensors:
        # Channels last, as they lie in memory, so that the tensor is not copied.
        values = (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).detach().flatten()
        digest.update(values[:: max(1, len(values) // 4096)].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:12]


def _settings(config: UNetConfig | VAEConfig) -> dict[str, object]:
    """What a configuration sets apart from defaults, so that a field that a later version adds changes nothing.

    The size that a model was trained at changes no picture: a size that is not given is known before painting begins.
    """
    values = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    return {name: own for name, (own, default) in values.items() if own != default and name != "sample_size"}


def _text_digest(encoder: TextEncoder) -> str:
    config = encoder.model.config
    # By the names of transformers 5, so that another version's order does not matter.
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in encoder.model.named_parameters()}
    return _digest(
        _sampled(tensors[name] for name in sorted(tensors)),
        [config.num_attention_heads, config.hidden_act, config.layer_norm_eps],
    )


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _sampler(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}, expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _noise(generators: list[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, each image's from its own generator. Shapes: -> (B, *shape), on the CPU."""
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def _batch(columns: dict[str, list[Any]]) -> list[list[Any]]:
    """Prompts, negative prompts and seeds, each repeated to the batch where only one is given."""
    size = max(map(len, columns.values()))
    for name, values in columns.items():
        if len(values) not in (1, size) or not values:
            raise ValueError(f"{name} has {len(values)} entries for a batch of {size}, expected 1 or {size}")
    return [values * size if len(values) == 1 else values for values in columns.values()]

"""The tensors of original Stable Diffusion files, counted out from the loops that number their modules.

Source: CompVis/stable-diffusion `ldm/modules/diffusionmodules/openaimodel.py` (UNetModel) and `model.py` (Encoder,
Decoder), `configs/stable-diffusion/v1-inference.yaml`; Stability-AI/stablediffusion `configs/stable-diffusion/
v2-inference.yaml`; Stability-AI/generative-models `configs/inference/sd_xl_base.yaml`; mlfoundations/open_clip
`src/open_clip/transformer.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

LATENT = 4
LAST_BLOCK = 23  # of OpenCLIP's 24: in the files, but SD 2 reads the output of the one before


@dataclass(frozen=True)
class Sizes:
    """What differs between the families, and between a full model and one small enough for a test."""

    second: bool
    unet: tuple[int, ...]
    context: int
    vae: tuple[int, int, int, int]
    text: int
    layers: int  # of the text encoder that are used
    vocabulary: int
    attention_at: tuple[int, ...] = (1, 2, 4)  # halvings of the latent at which there are transformers
    depths: tuple[int, ...] = (1, 1, 1, 1)
    added: int = 0  # SDXL's: inputs of label_emb
    text_2: int = 0
    layers_2: int = 0
    projection: int = 0


FULL = {
    1: Sizes(False, (320, 640, 1280, 1280), 768, (128, 256, 512, 512), 768, 12, 49408),
    2: Sizes(True, (320, 640, 1280, 1280), 1024, (128, 256, 512, 512), 1024, 23, 49408),
}
XL = Sizes(
    True,
    (320, 640, 1280),
    2048,
    (128, 256, 512, 512),
    768,
    12,
    49408,
    attention_at=(2, 4),
    depths=(0, 2, 10),
    added=2816,
    text_2=1280,
    layers_2=32,
    projection=1280,
)


def layout(sizes: Sizes) -> Shapes:
    """Every tensor that belongs to a model."""
    shapes = {**_prefixed("model.diffusion_model", _unet(sizes)), **_prefixed("first_stage_model", _vae(sizes))}
    if sizes.added:
        second = replace(sizes, text=sizes.text_2, layers=sizes.layers_2)
        projection: Shapes = {"text_projection": (sizes.text_2, sizes.projection)}
        shapes |= _prefixed("conditioner.embedders.0.transformer", _clip(sizes))
        return shapes | _prefixed("conditioner.embedders.1.model", _open_clip(second) | projection)
    text = _open_clip(sizes) if sizes.second else _clip(sizes)
    return shapes | _prefixed("cond_stage_model.model" if sizes.second else "cond_stage_model.transformer", text)


def unused(sizes: Sizes) -> Shapes:
    """What published files hold besides: training state, tables, and the parts of CLIP that SD does not use."""
    tables = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"]
    tables += ["log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"]
    tables += ["posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"]
    shapes: Shapes = dict.fromkeys([*tables, "logvar"], (1000,))
    shapes |= {"model_ema.decay": (), "model_ema.num_updates": (), "scale_factor": ()}
    shapes |= {"model_ema.diffusion_modelinput_blocks00weight": (sizes.unet[0], LATENT, 3, 3)}
    if sizes.added:
        shapes = {"conditioner.embedders.1.model.logit_scale": (), "denoiser.sigmas": (1000,)}
        return shapes | {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77)}
    if not sizes.second:
        return shapes | {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)}
    head: Shapes = {"text_projection": (sizes.text, sizes.text), "logit_scale": (), "attn_mask": (77, 77)}
    head |= _prefixed(f"transformer.resblocks.{LAST_BLOCK}", _open_clip_block(sizes.text))
    return shapes | _prefixed("cond_stage_model.model", head)


def random_tensors(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """A file's worth of values, no two tensors alike."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    table = alphas_cumprod()
    tables = {"alphas_cumprod": table, "denoiser.sigmas": ((1 - table) / table).sqrt()}
    return tensors | {key: tensor for key, tensor in tables.items() if key in shapes}


def alphas_cumprod(power: int = 2) -> Tensor:
    """The table of alpha-bar in published files (`ldm/models/diffusion/ddpm.py`, register_schedule); float32."""
    betas = np.linspace(0.00085 ** (1 / power), 0.012 ** (1 / power), 1000) ** power
    return torch.from_numpy(np.cumprod(1 - betas)).float()


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{key}": shape for key, shape in shapes.items()}


def _join(parts: Iterable[tuple[str, Shapes]]) -> Shapes:
    return {f"{name}.{key}": shape for name, shapes in parts for key, shape in shapes.items()}


def _norm(width: int) -> Shapes:
    return {"weight": (width,), "bias": (width,)}


def _linear(inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {"weight": (outputs, inputs), **({"bias": (outputs,)} if bias else {})}


def _conv(inputs: int, outputs: int, kernel: int = 3) -> Shapes:
    return {"weight": (outputs, inputs, kernel, kernel), "bias": (outputs,)}


# --- U-Net ---------------------------------------------------------------------------------------------------------


def _unet(sizes: Sizes) -> Shapes:
    """Blocks are numbered as they are appended; inside a block, layers are numbered as they are appended."""
    time, last = 4 * sizes.unet[0], len(sizes.unet) - 1

    def transformer(width: int, level: int) -> Shapes:
        return _transformer(width, sizes.context, linear=sizes.second, depth=sizes.depths[level])

    width, halving, skips = sizes.unet[0], 1, [sizes.unet[0]]
    inputs: list[list[Shapes]] = [[_conv(LATENT, width)]]
    for level, level_width in enumerate(sizes.unet):
        for _ in range(2):
            block = [_resnet(width, level_width, time)]
            width = level_width
            if halving in sizes.attention_at:
                block.append(transformer(width, level))
            inputs.append(block)
            skips.append(width)
        if level < last:
            inputs.append([_prefixed("op", _conv(width, width))])
            skips.append(width)
            halving *= 2
    middle = [_resnet(width, width, time), transformer(width, last), _resnet(width, width, time)]
    outputs: list[list[Shapes]] = []
    for level in range(last, -1, -1):
        for i in range(3):
            block = [_resnet(width + skips.pop(), sizes.unet[level], time)]
            width = sizes.unet[level]
            if halving in sizes.attention_at:
                block.append(transformer(width, level))
            if level > 0 and i == 2:
                block.append(_prefixed("conv", _conv(width, width)))
                halving //= 2
            outputs.append(block)
    assert not skips
    label = [("label_emb.0.0", _linear(sizes.added, time)), ("label_emb.0.2", _linear(time, time))]
    return {
        **_join([("time_embed.0", _linear(sizes.unet[0], time)), ("time_embed.2", _linear(time, time))]),
        **_join(label if sizes.added else []),
        **_join((f"input_blocks.{i}.{j}", layer) for i, block in enumerate(inputs) for j, layer in enumerate(block)),
        **_join((f"middle_block.{j}", layer) for j, layer in enumerate(middle)),
        **_join((f"output_blocks.{i}.{j}", layer) for i, block in enumerate(outputs) for j, layer in enumerate(block)),
        **_join([("out.0", _norm(width)), ("out.2", _conv(width, LATENT))]),
    }


def _resnet(inputs: int, outputs: int, time: int) -> Shapes:
    parts = [("in_layers.0", _norm(inputs)), ("in_layers.2", _conv(inputs, outputs))]
    parts += [("emb_layers.1", _linear(time, outputs))]
    parts += [("out_layers.0", _norm(outputs)), ("out_layers.3", _conv(outputs, outputs))]
    return _join(parts + ([] if inputs == outputs else [("skip_connection", _conv(inputs, outputs, 1))]))


def _transformer(width: int, context: int, linear: bool, depth: int) -> Shapes:
    project = _linear(width, width) if linear else _conv(width, width, 1)
    block: list[tuple[str, Shapes]] = [(f"norm{i}", _norm(width)) for i in (1, 2, 3)]
    for name, source in (("attn1", width), ("attn2", context)):
        block.append((f"{name}.to_q", _linear(width, width, bias=False)))
        block += [(f"{name}.to_{letter}", _linear(source, width, bias=False)) for letter in "kv"]
        block.append((f"{name}.to_out.0", _linear(width, width)))
    block += [("ff.net.0.proj", _linear(width, 8 * width)), ("ff.net.2", _linear(4 * width, width))]
    blocks = [(f"transformer_blocks.{i}", _join(block)) for i in range(depth)]
    return _join([("norm", _norm(width)), ("proj_in", project), *blocks, ("proj_out", project)])


# --- VAE -----------------------------------------------------------------------------------------------------------


def _vae(sizes: Sizes) -> Shapes:
    first, last = sizes.vae[0], sizes.vae[-1]
    middle = [("mid.block_1", _vae_resnet(last, last)), ("mid.block_2", _vae_resnet(last, last))]
    middle += [("mid.attn_1.norm", _norm(last))]
    middle += [(f"mid.attn_1.{name}", _conv(last, last, 1)) for name in ("q", "k", "v", "proj_out")]

    encoder, width = [("conv_in", _conv(3, first)), *middle], first
    for level, level_width in enumerate(sizes.vae):
        for i in range(2):
            encoder.append((f"down.{level}.block.{i}", _vae_resnet(width, level_width)))
            width = level_width
        if level < 3:
            encoder.append((f"down.{level}.downsample.conv", _conv(width, width)))
    encoder += [("norm_out", _norm(last)), ("conv_out", _conv(last, 2 * LATENT))]

    decoder, width = [("conv_in", _conv(LATENT, last)), *middle], last
    for level in (3, 2, 1, 0):  # levels count from the pixels here too
        for i in range(3):
            decoder.append((f"up.{level}.block.{i}", _vae_resnet(width, sizes.vae[level])))
            width = sizes.vae[level]
        if level > 0:
            decoder.append((f"up.{level}.upsample.conv", _conv(width, width)))
    decoder += [("norm_out", _norm(first)), ("conv_out", _conv(first, 3))]

    ends = [("quant_conv", _conv(2 * LATENT, 2 * LATENT, 1)), ("post_quant_conv", _conv(LATENT, LATENT, 1))]
    return _join([("encoder", _join(encoder)), ("decoder", _join(decoder)), *ends])


def _vae_resnet(inputs: int, outputs: int) -> Shapes:
    parts = [("norm1", _norm(inputs)), ("conv1", _conv(inputs, outputs))]
    parts += [("norm2", _norm(outputs)), ("conv2", _conv(outputs, outputs))]
    return _join(parts + ([] if inputs == outputs else [("nin_shortcut", _conv(inputs, outputs, 1))]))


# --- text encoders -------------------------------------------------------------------------------------------------


def _clip(sizes: Sizes) -> Shapes:
    width = sizes.text
    layer = [(f"self_attn.{name}_proj", _linear(width, width)) for name in ("q", "k", "v", "out")]
    layer += [("layer_norm1", _norm(width)), ("layer_norm2", _norm(width))]
    layer += [("mlp.fc1", _linear(width, 4 * width)), ("mlp.fc2", _linear(4 * width, width))]
    parts: list[tuple[str, Shapes]] = [
        ("embeddings.token_embedding", {"weight": (sizes.vocabulary, width)}),
        ("embeddings.position_embedding", {"weight": (77, width)}),
        ("final_layer_norm", _norm(width)),
    ]
    parts += [(f"encoder.layers.{i}", _join(layer)) for i in range(sizes.layers)]
    return _prefixed("text_model", _join(parts))


def _open_clip(sizes: Sizes) -> Shapes:
    blocks = ((f"transformer.resblocks.{i}", _open_clip_block(sizes.text)) for i in range(sizes.layers))
    return {
        "positional_embedding": (77, sizes.text),
        "token_embedding.weight": (sizes.vocabulary, sizes.text),
        **_join(blocks),
        **_prefixed("ln_final", _norm(sizes.text)),
    }


def _open_clip_block(width: int) -> Shapes:
    mlp = [("mlp.c_fc", _linear(width, 4 * width)), ("mlp.c_proj", _linear(4 * width, width))]
    attention: Shapes = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    rest = [("attn.out_proj", _linear(width, width)), ("ln_1", _norm(width)), ("ln_2", _norm(width)), *mlp]
    return attention | _join(rest)


if __name__ == "__main__":  # a float16 file as large as Stable Diffusion 1.5's, for `.ci/run`
    generator = torch.Generator().manual_seed(0)
    shapes = layout(FULL[1]) | unused(FULL[1])
    tensors = {key: (torch.randn(shape, generator=generator) / 50).half() for key, shape in shapes.items()}
    save_file(tensors | {"alphas_cumprod": alphas_cumprod()}, sys.argv[1])

"""The names of the original (latent-diffusion) checkpoint layout, translated to diffusers' names used here.

Source: CompVis/stable-diffusion `ldm/modules/diffusionmodules/openaimodel.py` and `model.py`, mlfoundations/open_clip
`src/open_clip/transformer.py`; diffusers `scripts/convert_original_stable_diffusion_to_diffusers.py`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

Target = tuple[str, tuple[int, int] | None]  # a name here; of a fused tensor, which of how many equal parts

CONTEXT_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
PREDICTION_KEY = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"

_CLIP: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
SD1_TEXT = _CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
SD2_TEXT = _CLIP | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # SD 2 reads the penultimate of 24 layers, so the last one is never needed
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}

# Training state and what generation never uses: EMA copies of the U-Net, schedule tables, the loss, OpenCLIP's head.
_IGNORED = re.compile(
    r"model_ema\..*|cond_stage_model\.logit_scale|.*\.position_ids|.*\.attn_mask|loss\..*"
    r"|betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|logvar|scale_factor"
)
_IGNORED_SD2 = re.compile(
    r"cond_stage_model\.model\.(transformer\.resblocks\.23\..*|text_projection|logit_scale|attn_mask)"
)


def ignored(key: str, second: bool) -> bool:
    """Whether a key of a published file may be left unread."""
    return bool(_IGNORED.fullmatch(key) or (second and _IGNORED_SD2.fullmatch(key)))


def predicts_v(bias: Tensor) -> bool:
    """Guess from one norm's bias whether an SD 2.x U-Net predicts v: its spread is larger there.

    Source: comfyanonymous/ComfyUI `comfy/supported_models.py`, which found the threshold.
    """
    return bias.float().std(unbiased=False).item() > 0.09


def translate(key: str, second: bool) -> tuple[str, list[Target]]:
    """Part (unet, vae or text) and the names here of one key; no names where the key is none of these models'."""
    if key.startswith("model.diffusion_model."):
        name = _unet(key.removeprefix("model.diffusion_model."))
        return "unet", [(name, None)] if name else []
    if key.startswith("first_stage_model."):
        name = _vae(key.removeprefix("first_stage_model."))
        return "vae", [(name, None)] if name else []
    if second and key.startswith("cond_stage_model.model.") and not ignored(key, second):
        return "text", _open_clip(key.removeprefix("cond_stage_model.model."))
    prefix = "cond_stage_model.transformer."
    if not second and key.startswith(prefix) and not ignored(key, second):
        return "text", [(key.removeprefix(prefix), None)]
    return "text", []


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_LAYERS = 2  # residual blocks per level of SD's down path; each level of the up path has one more


def _unet(key: str) -> str | None:
    """The down path is numbered flat (a level's layers, then its downsampler), and so is the up path."""
    stem, _, leaf = key.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{leaf}"
    if match := re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)", key):
        side, number, place, rest = match[1], int(match[2]), int(match[3]), match[4]
        if side == "input_blocks":
            level, layer = divmod(number - 1, _LAYERS + 1)
            block, sampler, last = f"down_blocks.{level}", "downsamplers.0.conv", layer == _LAYERS
            if last:
                return f"{block}.{sampler}.{rest.removeprefix('op.')}" if rest.startswith("op.") else None
        else:
            level, layer = divmod(number, _LAYERS + 1)
            block, sampler = f"up_blocks.{level}", "upsamplers.0.conv"
            if rest.startswith("conv."):  # after the transformer where there is one, so its place varies
                return f"{block}.{sampler}.{rest.removeprefix('conv.')}"
        return _layer(f"{block}.resnets.{layer}", f"{block}.attentions.{layer}", place == 0, rest)
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", key):
        place = int(match[1])
        return _layer(f"mid_block.resnets.{place // 2}", "mid_block.attentions.0", place != 1, match[2])
    return None


def _layer(resnet: str, attention: str, is_resnet: bool, rest: str) -> str | None:
    if not is_resnet:
        return f"{attention}.{rest}"  # the inside of a transformer is named alike in both layouts
    stem, _, leaf = rest.rpartition(".")
    return f"{resnet}.{_RESNET[stem]}.{leaf}" if stem in _RESNET else None


_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _vae(key: str) -> str | None:
    key = key.replace("nin_shortcut", "conv_shortcut")
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2)\.(.+)", key):
        side, what, rest = match[1], match[2], match[3]
        if what == "attn_1":
            stem, _, leaf = rest.rpartition(".")
            return f"{side}.mid_block.attentions.0.{_VAE_ATTENTION[stem]}.{leaf}" if stem in _VAE_ATTENTION else None
        return f"{side}.mid_block.resnets.{int(what[-1]) - 1}.{rest}"
    if match := re.fullmatch(r"encoder\.down\.(\d)\.(?:block\.(\d)|(downsample))\.(.+)", key):
        block = f"encoder.down_blocks.{match[1]}"
        return f"{block}.downsamplers.0.{match[4]}" if match[3] else f"{block}.resnets.{match[2]}.{match[4]}"
    if match := re.fullmatch(r"decoder\.up\.(\d)\.(?:block\.(\d)|(upsample))\.(.+)", key):
        block = f"decoder.up_blocks.{3 - int(match[1])}"  # counted from the pixels there, from the latents here
        return f"{block}.upsamplers.0.{match[4]}" if match[3] else f"{block}.resnets.{match[2]}.{match[4]}"
    if match := re.fullmatch(r"(encoder|decoder)\.norm_out\.(.+)", key):
        return f"{match[1]}.conv_norm_out.{match[2]}"
    return key if re.fullmatch(r"((encoder|decoder)\.conv_(in|out)|(post_)?quant_conv)\.(weight|bias)", key) else None


_OPEN_CLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _open_clip(key: str) -> list[Target]:
    if key in _OPEN_CLIP:
        return [(_OPEN_CLIP[key], None)]
    if match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key):
        block = f"encoder.layers.{match[1]}.self_attn"
        return [(f"{block}.{letter}_proj.{match[2]}", (i, 3)) for i, letter in enumerate("qkv")]
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", key)
    if match and match[2] in _OPEN_CLIP_LAYER:
        return [(f"encoder.layers.{match[1]}.{_OPEN_CLIP_LAYER[match[2]]}.{match[3]}", None)]
    return []

"""The names that files give to tensors, translated to those used here: diffusers' and transformers' newest.

A single file in the original (latent-diffusion) layout holds every part under a prefix of its own. Within a part a
tensor may have the original name, OpenCLIP's, or an older or newer one of diffusers or transformers, whatever the file:
tools that convert, merge and train write them in every mixture.

Source: CompVis/stable-diffusion `ldm/modules/diffusionmodules/openaimodel.py` and `model.py`, mlfoundations/open_clip
`src/open_clip/transformer.py`; diffusers `scripts/convert_original_stable_diffusion_to_diffusers.py`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from minireuse.checkpoints.tensors import Target

CONTEXT_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
ADDED_KEY = "model.diffusion_model.label_emb.0.0.weight"  # SDXL's, whose width tells the base model from the refiner
ADDED_WIDTH, REFINER_WIDTH = 2816, 2560
GUIDED_KEY = "model.diffusion_model.time_embed.cond_proj.weight"  # of models that are told the guidance scale
FIRST_KEY, LAST_KEY = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.weight"
PREDICTION_KEY = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SCHEDULE_KEY, SIGMAS_KEY = "alphas_cumprod", "denoiser.sigmas"  # sigmas: sqrt((1 - alpha-bar) / alpha-bar)
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"  # fine-tunes say by holding these that they predict v, from noise alone

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
SDXL_TEXT_2 = _CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

# Where the parts of a single file lie. SD Turbo has its text encoder where SDXL has its first.
PARTS = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "text",
    "cond_stage_model.model.": "text",
    "conditioner.embedders.0.transformer.": "text",
    "conditioner.embedders.0.model.": "text",
    "conditioner.embedders.1.model.": "text_2",
    "conditioner.embedders.1.transformer.": "text_2",
}

# Training state, what is read apart, and what generation never uses: EMA copies, the loss, the last of 24 layers.
_IGNORED = re.compile(
    r"(.*\.)?(model_ema|loss|embedding_manager)\..*|global_step|epoch|cond_stage_model\.logit_scale"
    r"|betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|denoiser\.sigmas"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|logvar|scale_factor"
    r"|v_pred|ztsnr"
    r"|(?!conditioner\.embedders\.1\.).*\.(resblocks|encoder\.layers)\.23\..*"  # SDXL's second has 32
)
# Of CLIP: heads and masks, a buffer that some versions of transformers saved, and the half that sees pictures.
_UNREAD_TEXT = re.compile(
    r"(.*\.)?position_ids|text_projection(\.weight)?|logit_scale|attn_mask|(vision_model|visual|visual_projection)\..*"
)
# The one of these that SDXL reads, of its second text encoder. OpenCLIP's is the transpose of transformers'.
_PROJECTION: dict[str, Target] = {
    "text_projection.weight": ("text_projection.weight", None),
    "text_projection": ("text_projection.weight", "transposed"),
}
# What torch.compile, DistributedDataParallel and FSDP put before the names of a module that they wrap.
_WRAPPER = re.compile(r"^module\.|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def predicts_v(bias: Tensor) -> bool:
    """Guess from one norm's bias whether an SD 2.x U-Net predicts v: its spread is larger there.

    Source: comfyanonymous/ComfyUI `comfy/supported_models.py`, which found the threshold.
    """
    return bias.float().std(unbiased=False).item() > 0.09


def ignored(key: str) -> bool:
    """Whether a key of a single file may be left unread."""
    return bool(_IGNORED.fullmatch(_WRAPPER.sub("", key)))


def split(key: str) -> tuple[str, str]:
    """The part of a key of a single file (unet, vae, text, text_2, or "" for none), and its name there."""
    key = _WRAPPER.sub("", key)
    prefix = next((prefix for prefix in PARTS if key.startswith(prefix)), None)
    return ("", key) if prefix is None else (PARTS[prefix], key.removeprefix(prefix))


def names(part: str, key: str) -> list[Target]:
    """The names here of one key within a part; none for what is not needed. A name that is known nowhere stays."""
    key = _WRAPPER.sub("", key)
    if part == "text_2" and key in _PROJECTION:
        return [_PROJECTION[key]]
    if part in ("text", "text_2"):
        return _text(key)
    return [(_unet(key) if part == "unet" else _vae(key), None)]


def translate(key: str) -> tuple[str, list[Target]]:
    """The part of one key of a single file, and its names here; its own name where it belongs to no part."""
    part, name = split(key)
    return part, names(part, name) if part else [(name, None)]


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
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_LAYERS = 2  # residual blocks per level of SD's down path; each level of the up path has one more


def _unet(key: str) -> str:
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
                return f"{block}.{sampler}.{rest.removeprefix('op.')}" if rest.startswith("op.") else key
        else:
            level, layer = divmod(number, _LAYERS + 1)
            block, sampler = f"up_blocks.{level}", "upsamplers.0.conv"
            if rest.startswith("conv."):  # after the transformer where there is one, so its place varies
                return f"{block}.{sampler}.{rest.removeprefix('conv.')}"
        return _layer(f"{block}.resnets.{layer}", f"{block}.attentions.{layer}", place == 0, rest)
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", key):
        place = int(match[1])
        return _layer(f"mid_block.resnets.{place // 2}", "mid_block.attentions.0", place != 1, match[2])
    return key


def _layer(resnet: str, attention: str, is_resnet: bool, rest: str) -> str:
    if not is_resnet:
        return f"{attention}.{rest}"  # the inside of a transformer is named alike in both layouts
    stem, _, leaf = rest.rpartition(".")
    return f"{resnet}.{_RESNET.get(stem, stem)}.{leaf}"


# The original names, and those of diffusers before 0.17.
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_ATTENTION |= {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _vae(key: str) -> str:
    key = key.replace("nin_shortcut", "conv_shortcut")
    if match := re.fullmatch(r"(encoder|decoder)\.mid(?:\.attn_1|_block\.attentions\.0)\.(.+)\.(weight|bias)", key):
        return f"{match[1]}.mid_block.attentions.0.{_VAE_ATTENTION.get(match[2], match[2])}.{match[3]}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", key):
        return f"{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{match[3]}"
    if match := re.fullmatch(r"encoder\.down\.(\d)\.(?:block\.(\d)|(downsample))\.(.+)", key):
        block = f"encoder.down_blocks.{match[1]}"
        return f"{block}.downsamplers.0.{match[4]}" if match[3] else f"{block}.resnets.{match[2]}.{match[4]}"
    if match := re.fullmatch(r"decoder\.up\.(\d)\.(?:block\.(\d)|(upsample))\.(.+)", key):
        block = f"decoder.up_blocks.{3 - int(match[1])}"  # counted from the pixels there, from the latents here
        return f"{block}.upsamplers.0.{match[4]}" if match[3] else f"{block}.resnets.{match[2]}.{match[4]}"
    if match := re.fullmatch(r"(encoder|decoder)\.norm_out\.(.+)", key):
        return f"{match[1]}.conv_norm_out.{match[2]}"
    return key


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


def _text(key: str) -> list[Target]:
    key = key.removeprefix("text_model.")
    if _UNREAD_TEXT.fullmatch(key):
        return []
    if key in _OPEN_CLIP:
        return [(_OPEN_CLIP[key], None)]
    if match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key):
        block = f"encoder.layers.{match[1]}.self_attn"
        return [(f"{block}.{letter}_proj.{match[2]}", (i, 3)) for i, letter in enumerate("qkv")]
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", key)
    if match and match[2] in _OPEN_CLIP_LAYER:
        return [(f"encoder.layers.{match[1]}.{_OPEN_CLIP_LAYER[match[2]]}.{match[3]}", None)]
    return [(key, None)]

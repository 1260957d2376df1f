"""LoRA files of every format change a model as diffusers changes it; anything else is refused by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import minireuse
from minireuse.checkpoints.lora import find_lora, merge_loras, name_table
from minireuse.checkpoints.tensors import CheckpointError
from minireuse.common.options import load_model, loras_of
from minireuse.config import SD1_UNET
from minireuse.evaluate import command as evaluate
from minireuse.sample import command as sample
from minireuse.search import command as search
from minireuse.unet import UNet

from conftest import TINY_UNET, relative_error
from ldm_layout import FULL, layout

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
ATTENTION = [
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.attn2.to_v",
    "up_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_q",
]
LINEAR = [f"{BLOCK}.ff.net.0.proj", "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2"]
CONVOLUTIONS = [
    "down_blocks.0.attentions.1.proj_in",  # 1x1
    "mid_block.attentions.0.proj_out",
    "down_blocks.1.resnets.0.conv1",  # 3x3
    "mid_block.resnets.1.conv2",
    "up_blocks.0.resnets.2.conv_shortcut",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.1.upsamplers.0.conv",
]
TEXT_ATTENTION = [f"encoder.layers.{i}.self_attn.{x}_proj" for i, x in enumerate(("q", "out"))]
TEXT = [*TEXT_ATTENTION, "encoder.layers.0.self_attn.v_proj", "encoder.layers.1.mlp.fc1", "encoder.layers.0.mlp.fc2"]

Pairs = dict[str, tuple[Tensor, Tensor]]
Spell = Callable[[str, str], dict[str, str]]  # part, layer -> role -> name of the tensor


def bare(name: str) -> str:
    return name.removeprefix("text_model.")


def pairs_for(module: nn.Module, names: list[str], seed: int = 0) -> Pairs:
    """Random down and up for some layers, each of a rank of its own."""
    generator = torch.Generator().manual_seed(seed)
    weights = {bare(key.removesuffix(".weight")): value for key, value in module.state_dict().items()}
    pairs = {}
    for rank, name in enumerate(names, 2):
        weight = weights[name]
        down, up = (rank, *weight.shape[1:]), (weight.shape[0], rank, *(1 for _ in weight.shape[2:]))
        pairs[name] = (torch.randn(down, generator=generator) / 3, torch.randn(up, generator=generator) / 3)
    return pairs


def kohya(part: str, name: str) -> dict[str, str]:
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te_text_model"}[part]
    stem = f"{prefix}_{name.replace('.', '_')}"
    return {"down": f"{stem}.lora_down.weight", "up": f"{stem}.lora_up.weight", "alpha": f"{stem}.alpha"}


def peft(part: str, name: str) -> dict[str, str]:
    stem = f"{part}.{name if part == 'unet' else f'text_model.{name}'}"
    return {"down": f"{stem}.lora_A.weight", "up": f"{stem}.lora_B.weight"}


def older(part: str, name: str) -> dict[str, str]:
    stem = f"unet.{name}.lora" if part == "unet" else f"text_encoder.text_model.{name}.lora_linear_layer"
    return {"down": f"{stem}.down.weight", "up": f"{stem}.up.weight"}


def oldest(part: str, name: str) -> dict[str, str]:
    """Attention layers only: diffusers' first LoRA knew no others."""
    if part == "unet":
        above, layer = name.removesuffix(".0").rsplit(".", 1)
        stem = f"unet.{above}.processor.{layer}_lora"
    else:
        above, layer = name.rsplit(".", 1)
        stem = f"text_encoder.text_model.{above}.to_{layer.removesuffix('_proj')}_lora"
    return {"down": f"{stem}.down.weight", "up": f"{stem}.up.weight"}


def save_lora(
    path: Path,
    parts: Mapping[str, Pairs],
    spell: Spell,
    alpha: float | None = None,
    metadata: dict[str, object] | None = None,
) -> Path:
    """alpha: of every layer, as a tensor of its own. metadata: PEFT's, in the header."""
    tensors = {}
    for part, pairs in parts.items():
        for name, (down, up) in pairs.items():
            names = spell(part, name)
            tensors |= {names["down"]: down, names["up"]: up}
            if alpha is not None:
                tensors[names["alpha"]] = torch.tensor(alpha)
    header = {} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt"} | header)
    return path


@pytest.fixture
def theirs(model_folder: Path) -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)


@pytest.fixture
def both(pipeline: minireuse.Pipeline) -> dict[str, Pairs]:
    """For layers of every kind."""
    return {
        "unet": pairs_for(pipeline.unet, ATTENTION + LINEAR + CONVOLUTIONS),
        "text_encoder": pairs_for(pipeline.text.model, TEXT),
    }


def attention_of(both: dict[str, Pairs]) -> dict[str, Pairs]:
    return {part: {n: p for n, p in pairs.items() if n in ATTENTION + TEXT[:3]} for part, pairs in both.items()}


def compare(
    ours: minireuse.Pipeline, theirs: diffusers.StableDiffusionPipeline, plain: minireuse.Pipeline, changed: int
) -> None:
    """Every weight is that of diffusers' fused model, and as many differ from the plain model as there are layers."""
    count = 0
    for mine, its, before in (
        (ours.unet, theirs.unet, plain.unet),
        (ours.text.model, theirs.text_encoder, plain.text.model),
    ):
        expected = {bare(key).replace(".base_layer", ""): value for key, value in its.state_dict().items()}
        for (key, value), old in zip(mine.state_dict().items(), before.state_dict().values(), strict=True):
            assert relative_error(value, expected[bare(key)]) < 1e-4, key
            count += not torch.equal(value, old)
    assert count == changed


def fuse(theirs: diffusers.StableDiffusionPipeline, file: Path, strength: float, **more: object) -> None:
    """Merge a file as diffusers does. Its loader does not know yet that transformers 5 has no `text_model`."""
    if not hasattr(theirs.text_encoder, "text_model"):
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            header = opened.metadata()
        file = file.with_name(f"without-text_model-{file.name}")
        short = lambda text: re.sub(r"(?<=[._^\"])text_model[._]", "", text)  # noqa: E731
        save_file({short(k): v for k, v in tensors.items()}, file, {k: short(v) for k, v in header.items()})
    theirs.load_lora_weights(str(file), **more)
    theirs.fuse_lora(lora_scale=strength)
    theirs.unload_lora_weights()


SETTINGS = [(kohya, 6.0, 1.0), (kohya, 6.0, -0.6), (peft, None, 0.5), (older, None, -1.0), (oldest, None, 1.0)]


@pytest.mark.parametrize(("spell", "alpha", "strength"), SETTINGS)
def test_weights_are_those_that_diffusers_fuses(
    spell: Spell,
    alpha: float | None,
    strength: float,
    both: dict[str, Pairs],
    theirs: diffusers.StableDiffusionPipeline,
    model_folder: Path,
    pipeline: minireuse.Pipeline,
    tmp_path: Path,
) -> None:
    parts = attention_of(both) if spell is oldest else both
    file = save_lora(tmp_path / "l.safetensors", parts, spell, alpha)
    fuse(theirs, file, strength)
    ours = minireuse.load(model_folder, device="cpu", loras=[f"{file}:{strength}"])
    compare(ours, theirs, pipeline, sum(map(len, parts.values())))


def test_alpha_may_stand_in_the_metadata(
    both: dict[str, Pairs],
    theirs: diffusers.StableDiffusionPipeline,
    model_folder: Path,
    pipeline: minireuse.Pipeline,
    tmp_path: Path,
) -> None:
    ranks = {part: {name: len(down) for name, (down, _) in pairs.items()} for part, pairs in both.items()}
    metadata: dict[str, object] = {}
    for part, prefix in (("unet", ""), ("text_encoder", "text_model.")):
        names = [prefix + name for name in ranks[part]]
        settings = {"r": 4, "lora_alpha": 3, "rank_pattern": dict(zip(names, ranks[part].values(), strict=True))}
        settings |= {"alpha_pattern": {names[1]: 7.5, f"^{names[2]}": 1}, "target_modules": names, "use_dora": False}
        metadata |= {f"{part}.{key}": value for key, value in settings.items()}
    file = save_lora(tmp_path / "l.safetensors", both, peft, metadata=metadata)
    fuse(theirs, file, 0.7)
    ours = minireuse.load(model_folder, device="cpu", loras=[f"{file}:0.7"])
    compare(ours, theirs, pipeline, sum(map(len, both.values())))


# The layers of TINY_UNET in the layout of Stability-AI/generative-models, counted by hand.
ORIGINAL = {
    f"{BLOCK}.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "up_blocks.2.attentions.1.proj_in": "output_blocks.7.1.proj_in",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_q": "middle_block.1.transformer_blocks.0.attn2.to_q",
    "down_blocks.1.resnets.0.conv1": "input_blocks.4.0.in_layers.2",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "mid_block.resnets.0.time_emb_proj": "middle_block.0.emb_layers.1",
    "up_blocks.0.resnets.2.conv_shortcut": "output_blocks.2.0.skip_connection",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_2": "time_embed.2",
}


def test_original_block_names_are_read_as_diffusers_converts_them(
    theirs: diffusers.StableDiffusionPipeline, model_folder: Path, pipeline: minireuse.Pipeline, tmp_path: Path
) -> None:
    parts = {"unet": pairs_for(pipeline.unet, list(ORIGINAL))}
    spell = lambda part, name: kohya(part, ORIGINAL[name])  # noqa: E731
    file = save_lora(tmp_path / "l.safetensors", parts, spell, alpha=4.0)
    fuse(theirs, file, 1.0, unet_config=theirs.unet.config)
    compare(minireuse.load(model_folder, device="cpu", loras=[file]), theirs, pipeline, len(ORIGINAL))


def test_every_layer_of_an_original_file_has_a_name_for_a_lora() -> None:
    """Counted out from the loops that number the original's modules; the shapes tell that each is the right one."""
    with torch.device("meta"):
        unet = UNet(SD1_UNET)
    table = name_table({"unet": unet})
    prefix = "model.diffusion_model."
    original = {k.removeprefix(prefix).removesuffix(".weight"): s for k, s in layout(FULL[1]).items() if prefix in k}
    places = {}
    for name, shape in original.items():
        if len(shape) >= 2:
            place, role = table[f"lora_unet_{name.replace('.', '_')}.lora_down.weight"]
            assert place is not None and role == "down"
            assert tuple(unet.get_submodule(place.name).weight.shape) == shape
            places[place.name] = name
    layers = [name for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert sorted(places) == sorted(layers)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {bare(key): value.clone() for key, value in module.state_dict().items()}


def test_each_layer_has_the_alpha_and_rank_of_its_own(
    both: dict[str, Pairs], model_folder: Path, pipeline: minireuse.Pipeline, tmp_path: Path
) -> None:
    tensors = {}
    for number, (name, (down, up)) in enumerate(both["unet"].items(), 1):
        names = kohya("unet", name)
        tensors |= {names["down"]: down, names["up"]: up}
        if number > 1:  # the first has none
            tensors[names["alpha"]] = torch.tensor(number) if number % 2 else torch.tensor([number / 2])
    save_file(tensors, tmp_path / "l.safetensors")
    changed = weights(minireuse.load(model_folder, device="cpu", loras=[tmp_path / "l.safetensors"]).unet)
    for number, (name, (down, up)) in enumerate(both["unet"].items(), 1):
        weight = pipeline.unet.state_dict()[f"{name}.weight"]
        alpha = len(down) if number == 1 else number if number % 2 else number / 2
        expected = weight + alpha / len(down) * torch.einsum("or,r...->o...", up.flatten(1), down)
        assert relative_error(changed[f"{name}.weight"], expected) < 1e-5


def test_a_convolution_of_1x1_and_a_linear_layer_are_alike(
    model_folder: Path, pipeline: minireuse.Pipeline, tmp_path: Path
) -> None:
    convolution, linear = "down_blocks.0.attentions.1.proj_in", f"{BLOCK}.attn1.to_q"
    plain = pairs_for(pipeline.unet, [convolution, linear])
    swapped = {
        convolution: tuple(x.flatten(1) for x in plain[convolution]),
        linear: tuple(x[..., None, None] for x in plain[linear]),
    }
    files = [save_lora(tmp_path / f"{i}.safetensors", {"unet": p}, peft) for i, p in enumerate((plain, swapped))]
    first, second = (weights(minireuse.load(model_folder, device="cpu", loras=[file]).unet) for file in files)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first[f"{linear}.weight"], pipeline.unet.state_dict()[f"{linear}.weight"])


def test_several_files_are_summed_before_one_rounding(
    model_folder: Path, pipeline: minireuse.Pipeline, tmp_path: Path
) -> None:
    """In half precision, changes that cancel leave the weights as they were, though one alone would round them away."""
    pairs = {"unet": pairs_for(pipeline.unet, ATTENTION)}
    file = save_lora(tmp_path / "l.safetensors", pairs, peft)
    plain = weights(minireuse.load(model_folder, device="cpu", dtype="float16").unet)
    loaded = minireuse.load(model_folder, device="cpu", dtype="float16", loras=[f"{file}:1000", f"{file}:-1000"])
    assert all(torch.equal(value, plain[key]) for key, value in weights(loaded.unet).items())
    one = minireuse.load(model_folder, device="cpu", dtype="float16", loras=[f"{file}:0.5", f"{file}:0.25"])
    down, up = pairs["unet"][ATTENTION[0]]
    expected = (plain[f"{ATTENTION[0]}.weight"].float() + 0.75 * (up @ down)).half()
    given = weights(one.unet)[f"{ATTENTION[0]}.weight"]
    assert relative_error(given.float(), expected.float()) < 1e-3
    assert given.dtype == torch.float16


def text_encoder(layers: int) -> CLIPTextModel:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 300}
    return CLIPTextModel(CLIPTextConfig(num_hidden_layers=layers, **sizes))


@pytest.mark.parametrize(("built", "extra", "fine"), [(23, 23, True), (11, 11, True), (12, 12, False), (23, 24, False)])
def test_a_text_layer_that_is_published_and_not_built_is_ignored_by_its_name(
    built: int, extra: int, fine: bool, tmp_path: Path
) -> None:
    encoder = text_encoder(built)
    pairs = pairs_for(encoder, ["encoder.layers.0.self_attn.q_proj"])
    pairs[f"encoder.layers.{extra}.self_attn.q_proj"] = (torch.ones(2, 8), torch.ones(8, 2))
    save_lora(tmp_path / "l.safetensors", {"text_encoder": pairs}, kohya, 1.0)
    with torch.device("meta"):
        unet = UNet(TINY_UNET)
    work = lambda: merge_loras({"unet": unet, "text_encoder": encoder}, [find_lora(tmp_path / "l.safetensors")])  # noqa: E731
    if fine:
        before = weights(encoder)
        work()
        changed = [key for key, value in weights(encoder).items() if not torch.equal(value, before[key])]
        assert changed == ["encoder.layers.0.self_attn.q_proj.weight"]
    else:
        with pytest.raises(CheckpointError, match=f"has unknown .*layers_{extra}_self_attn_q_proj"):
            work()


def test_two_text_encoders_have_names_of_their_own() -> None:
    """As Kohya and diffusers write them for Stable Diffusion XL."""
    with torch.device("meta"):
        first, second = text_encoder(11), text_encoder(32)
    table = name_table({"text_encoder": first, "text_encoder_2": second})
    layer = "encoder_layers_3_mlp_fc1.lora_up.weight"
    for name, part in (("lora_te1_text_model_", "text_encoder"), ("lora_te2_text_model_", "text_encoder_2")):
        place, role = table[name + layer]
        assert place is not None and (place.part, bare(place.name), role) == (part, "encoder.layers.3.mlp.fc1", "up")
    place, _ = table["text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj.lora_A.weight"]
    assert place is not None and place.part == "text_encoder_2"
    assert table["lora_te1_text_model_encoder_layers_11_mlp_fc1.alpha"] == (None, "alpha")


# --- refusals ------------------------------------------------------------------------------------------------------

GOOD = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"  # (64, 32)


def tensors_of(**extra: Tensor) -> dict[str, Tensor]:
    return {f"{GOOD}.lora_down.weight": torch.ones(2, 32), f"{GOOD}.lora_up.weight": torch.ones(64, 2)} | extra


def wide(width: int) -> dict[str, Tensor]:
    return tensors_of() | {f"{GOOD}.lora_down.weight": torch.ones(2, width)}


def renamed(name: str) -> dict[str, Tensor]:
    return {key.replace(GOOD, name): value for key, value in tensors_of().items()}


REFUSED = [
    (tensors_of(**{f"{GOOD}.hada_w1_a": torch.ones(2)}), "so it is LoHa; only plain LoRA is supported"),
    (tensors_of(**{f"{GOOD}.lokr_w1": torch.ones(2)}), "so it is LoKr"),
    (tensors_of(**{f"{GOOD}.dora_scale": torch.ones(2)}), "so it is DoRA"),
    (tensors_of(**{"unet.conv_in.lora_magnitude_vector": torch.ones(2)}), "so it is DoRA"),
    (tensors_of(**{f"{GOOD}.lora_mid.weight": torch.ones(2, 2, 3, 3)}), r"third matrix \(lora_mid\)"),
    (tensors_of(**{f"{GOOD}.diff": torch.ones(64, 32)}), r"full differences of weights \(.diff\)"),
    (tensors_of(**{f"{GOOD}.oft_blocks": torch.ones(2)}), f"has unknown {GOOD}.oft_blocks; it is no LoRA of this"),
    (tensors_of(**{"unet.mid_block.x.lora_A.weight": torch.ones(2)}), "has unknown unet.mid_block.x.lora_A.weight"),
    (
        renamed("lora_unet_label_emb_0_0"),
        "for Stable Diffusion XL, and this model is a model that reads text of width 32",
    ),
    (renamed("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "is a LoRA for Stable Diffusion XL"),
    (renamed("lora_unet_double_blocks_0_img_attn_qkv"), "for a transformer, such as Stable Diffusion 3 or FLUX"),
    (renamed("transformer.transformer_blocks.0.attn.to_q"), "for a transformer, such as Stable Diffusion 3 or FLUX"),
    (wide(768), "is a LoRA for Stable Diffusion 1.x, and this model"),
    (wide(1024), "is a LoRA for Stable Diffusion 2.x"),
    (wide(2048), "is a LoRA for Stable Diffusion XL"),
    (tensors_of() | {f"{GOOD}.lora_up.weight": torch.ones(64, 3)}, r"has mis-shaped .*lora_down.weight \(2, 32\)"),
    (tensors_of() | {f"{GOOD}.lora_up.weight": torch.ones(63, 2)}, "has mis-shaped"),
    (tensors_of() | {f"{GOOD}.lora_up.weight": torch.ones(64, 2, 3, 3)}, "has mis-shaped"),
    (tensors_of() | {f"{GOOD}.lora_down.weight": torch.ones(())}, "has mis-shaped"),
    (tensors_of(**{f"{GOOD}.alpha": torch.ones(2)}), "has mis-shaped"),
    ({f"{GOOD}.lora_down.weight": torch.ones(0, 32), f"{GOOD}.lora_up.weight": torch.ones(64, 0)}, "has mis-shaped"),
    ({f"{GOOD}.lora_down.weight": torch.ones(2, 32)}, f"has only a part of {GOOD}.lora_down.weight"),
    ({f"{GOOD}.alpha": torch.ones(())}, "has only a part of"),
    (tensors_of() | {f"{GOOD}.lora_up.weight": torch.ones(64, 2, dtype=torch.int8)}, "is I8; quantized LoRAs are not"),
    (tensors_of() | {f"{GOOD}.lora_up.weight": torch.full((64, 2), 3e38)}, r"in unet.mid_block.*lower its strength"),
    (tensors_of(**{f"{GOOD}.alpha": torch.tensor(torch.nan)}), "gives NaN, inf"),
    (tensors_of(**{f"{GOOD.replace('lora_unet', 'unet')}": torch.ones(1)}), "has unknown"),
    (
        tensors_of(**{"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.ones(2, 32)}),
        "two names of the same tensor",
    ),
    ({}, "is empty"),
]


@pytest.mark.parametrize(("tensors", "expected"), REFUSED)
def test_what_is_no_lora_of_this_model_is_refused_by_its_name(
    tensors: dict[str, Tensor], expected: str, pipeline: minireuse.Pipeline, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "l.safetensors")
    before = weights(pipeline.unet)
    with pytest.raises(CheckpointError, match=expected) as error:
        merge_loras(
            {"unet": pipeline.unet, "text_encoder": pipeline.text.model}, [find_lora(tmp_path / "l.safetensors")]
        )
    assert "l.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in weights(pipeline.unet).items())


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ('{"unet.use_dora": true}', "says unet.use_dora, which changes how it is added"),
        ('{"unet.use_rslora": true}', "says unet.use_rslora"),
        ("{", "its lora_adapter_metadata is not JSON"),
        ("[1]", r"its lora_adapter_metadata is \[1\], expected an object"),
        ('{"unet.lora_alpha": "4"}', "its metadata says lora_alpha '4', expected a number"),
        (f'{{"unet.lora_alpha": 1{"0" * 400}}}', "expected a number"),
        ('{"unet.alpha_pattern": 3}', "its alpha_pattern is 3, expected an object"),
        ('{"unet.alpha_pattern": {"(a+)+": 3}}', r"alpha_pattern has '\(a\+\)\+', expected the name of a layer"),
    ],
)
def test_metadata_that_cannot_be_followed_is_refused(
    metadata: str, expected: str, pipeline: minireuse.Pipeline, tmp_path: Path
) -> None:
    save_file(tensors_of(), tmp_path / "l.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(CheckpointError, match=expected):
        merge_loras({"unet": pipeline.unet}, [find_lora(tmp_path / "l.safetensors")])


def test_what_follows_the_last_colon_is_the_strength_unless_the_whole_text_is_a_file(tmp_path: Path) -> None:
    plain, odd = tmp_path / "a.safetensors", tmp_path / "b.safetensors:2"
    plain.write_bytes(b"a")
    odd.write_bytes(b"b")
    found = [find_lora(text) for text in (plain, str(plain), f"{plain}:-0.5", str(odd), f"{odd}:3")]
    assert [(lora.path, lora.strength) for lora in found] == [(plain, 1), (plain, 1), (plain, -0.5), (odd, 1), (odd, 3)]
    assert found[0].digest == "ca978112ca1bbdca"  # the SHA-256 of "a"


@pytest.mark.parametrize("text", ["gone.safetensors", "gone:1", "a.safetensors:", "a.safetensors:much", ".", ":", ""])
def test_a_text_that_names_no_file_or_no_strength_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.safetensors").write_bytes(b"a")
    for broken in (text, "a.safetensors:nan", "a.safetensors:inf"):
        with pytest.raises(CheckpointError, match=r"no LoRA at .*expected FILE or FILE:STRENGTH"):
            find_lora(broken)


# --- what a run says of it -----------------------------------------------------------------------------------------


@pytest.fixture
def style(pipeline: minireuse.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_lora(Path("style.safetensors"), {"unet": pairs_for(pipeline.unet, ATTENTION)}, peft)


def paint(*argv: str) -> int:
    return sample.main([*argv, "--quiet"])


def test_the_fingerprint_stays_the_models_so_that_its_searched_plans_are_found(
    style: Path, model_folder: Path, pipeline: minireuse.Pipeline
) -> None:
    changed = minireuse.load(model_folder, device="cpu", loras=[style])
    assert changed.fingerprint == pipeline.fingerprint
    assert [(lora.path, lora.strength) for lora in changed.loras] == [(style, 1.0)]
    assert any(
        not torch.equal(a, b) for a, b in zip(changed.unet.parameters(), pipeline.unet.parameters(), strict=True)
    )


def test_journals_and_plan_files_keep_runs_with_other_loras_apart(
    style: Path, model_folder: Path, pipeline: minireuse.Pipeline
) -> None:
    for parser in (search.parser(), evaluate.parser()):
        args = parser.parse_args(["--model", str(model_folder), "--lora", f"{style}:0.5", "--out", "out"])
        changed = load_model(args, "cpu")
        assert loras_of(changed) == {"loras": [[changed.loras[0].digest, 0.5]]}
    assert loras_of(pipeline) == {}  # so that what was begun by an earlier version can go on


def test_a_png_is_made_again_with_the_same_loras(
    style: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ("--model", str(model_folder), "--prompt", "a lake", "--steps", "2")
    assert paint(*made, "--out", "plain.png") == 0
    assert paint(*made, "--lora", "style.safetensors:0.5", "--lora", "style.safetensors", "--out", "a.png") == 0
    assert paint("--from-png", "a.png", "--out", "b.png") == 0
    plain, first, again = (np.array(Image.open(f"{name}.png")) for name in ("plain", "a", "b"))
    assert np.array_equal(first, again) and not np.array_equal(plain, first)

    Path("style.safetensors").rename("moved.safetensors")
    assert paint("--from-png", "a.png", "--out", "c.png") == 2
    assert "no LoRA at style.safetensors:0.5" in capsys.readouterr().err
    assert paint("--from-png", "a.png", "--lora", "moved.safetensors:0.5", "moved.safetensors", "--out", "c.png") == 0
    assert np.array_equal(np.array(Image.open("c.png")), first)

    for wrong in (("moved.safetensors:0.5",), ("moved.safetensors:0.5", "moved.safetensors:2")):
        assert paint("--from-png", "a.png", "--lora", *wrong, "--out", "d.png") == 2
        assert "gives other files or strengths" in capsys.readouterr().err
    assert paint("--from-png", "plain.png", "--lora", "moved.safetensors", "--out", "d.png") == 2
    assert "was made without a LoRA" in capsys.readouterr().err
    save_file({"other": torch.zeros(1)}, "style.safetensors")
    assert paint("--from-png", "a.png", "--out", "d.png") == 2
    assert "a file has changed" in capsys.readouterr().err
    assert not Path("d.png").exists()


def test_a_wrong_lora_ends_the_command_in_one_sentence(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(wide(768), "l.safetensors")
    made = ("--model", str(model_folder), "--prompt", "a lake", "--out", "a.png")
    assert paint(*made, "--lora", "l.safetensors") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: l.safetensors is a LoRA for Stable Diffusion 1.x") and said.count("\n") == 1
    assert not Path("a.png").exists()

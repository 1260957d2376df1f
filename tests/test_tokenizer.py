"""CLIP's tokenizer: its ids against transformers', from the package's own merges and from every kind of folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTokenizerFast, PreTrainedTokenizerFast

from minireuse.checkpoints import ldm, load_parts
from minireuse.checkpoints import parts as checkpoint
from minireuse.checkpoints.tokenizer import MERGES, clip_vocabulary, read_tokenizer
from minireuse.config import SD1_UNET, SD2_UNET, VAEConfig
from minireuse.text import TextEncoder, normalised

from ldm_layout import FULL, layout, random_tensors

SIZE = 49408
START, END = SIZE - 2, SIZE - 1
ODD = [chr(code) for code in (*range(0x80, 0x250), *range(0xFB00, 0xFB10), *range(0xFF00, 0xFFF0))]
many = settings(max_examples=300, deadline=None, database=None, derandomize=True)


@pytest.fixture(scope="module")
def clip() -> PreTrainedTokenizerFast:
    return read_tokenizer(None, SIZE)[0]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same vocabulary as published folders hold it."""
    folder, vocabulary = tmp_path_factory.mktemp("clip"), clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary.tokens, ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{first} {second}\n" for first, second in vocabulary.merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def reference(clip_folder: Path) -> CLIPTokenizerFast:
    return CLIPTokenizerFast.from_pretrained(clip_folder)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer([text], truncation=False, verbose=False)["input_ids"][0]


def encoder(source: Path) -> TextEncoder:
    tokenizer, padding = read_tokenizer(source, SIZE + 10)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return TextEncoder(CLIPTextConfig(vocab_size=300, **small), tokenizer, padding=padding)


# --- CLIP's own ids --------------------------------------------------------------------------------------------------


def test_clip_has_49408_tokens_and_openais_notice_beside_it(clip: PreTrainedTokenizerFast) -> None:
    assert len(clip.get_vocab()) == SIZE
    assert ids_of(clip, "a photo of a cat") == [START, 320, 1125, 539, 320, 2368, END]
    assert (MERGES.parent / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2021 OpenAI")


@many
@given(text=st.text(max_size=40) | st.text("abc' !ſΣİéñ<|>&;0123,.\n\u0301\u2019ﬁ\uff21圆", max_size=40))
def test_ids_are_those_of_transformers(clip: PreTrainedTokenizerFast, reference: CLIPTokenizerFast, text: str) -> None:
    text = normalised(text)
    assert ids_of(clip, text) == ids_of(reference, text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a \u201cred\u201d circle\u2019s edge", 'a "red" circle\'s edge'),
        ("\uff52\uff45\uff44\u3000\uff11", "red 1"),
        ("\uff76\uff9e", "\u30ac"),  # a letter and a mark of half the width become one letter
        ("\ufb02at \ufb01eld\ufb03", "flat fieldffi"),
        ("\ufb05 \u0149 \u01c6", "\u017ft 'n d\u017e"),
        ("black &amp; white &lt;3", "black & white <3"),
        ("&amp;quot;red&amp;quot;", '"red"'),
        ("\ufeffa red\x00 cir\x07cle\x7f", "a red circle"),
        ("\x1b[31mred\x1b[0m circle", "red circle"),
        ("\x93red\x94", '"red"'),  # Windows' quotes, decoded as Latin-1
        ("  a\u2028red\xa0\t\r\ncircle ", "a red circle"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u039f\u0394\u039f\u03a3", "\u03bf\u03b4\u03bf\u03c2"),  # the small letter sigma that ends a word
        ("A <Cat-Toy>, 10\u00b3 \u00bd", "A <Cat-Toy>, 10\u00b3 \u00bd"),
    ],
)
def test_what_a_prompt_becomes_before_it_is_split(given: str, expected: str) -> None:
    assert normalised(given) == expected
    assert normalised(expected) == expected


@many
@given(text=st.text(max_size=40) | st.text(ODD))
def test_characters_become_what_ftfy_makes_of_them(text: str) -> None:
    ftfy = pytest.importorskip("ftfy")
    text = text.replace("&", "").replace("\u03a3", "")  # OpenAI's reading of these follows that of ftfy
    expected = ftfy.fix_text(text, fix_encoding=False)
    assert normalised(text) == " ".join(expected.split())


# --- folders ---------------------------------------------------------------------------------------------------------


def with_exclamation_in_the_map(folder: Path) -> None:
    """As Stable Diffusion 2.1 is published: the two files differ, and the map counts."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))


def with_exclamation_as_an_added_token(folder: Path) -> None:
    """As transformers 4 writes it."""
    token = {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {"0": token | {"special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "!", "added_tokens_decoder": added}))


def with_exclamation_saved_by_transformers(folder: Path) -> None:
    """As the installed transformers writes it, without what it was read from."""
    CLIPTokenizerFast.from_pretrained(folder, pad_token="!").save_pretrained(folder)
    assert (folder / "tokenizer.json").exists()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    "write",
    [with_exclamation_in_the_map, with_exclamation_as_an_added_token, with_exclamation_saved_by_transformers],
)
def test_an_exclamation_mark_in_a_prompt_is_no_padding(
    write: Callable[[Path], None], clip_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "tokenizer")
    write(folder)
    ids = encoder(folder).tokenize(["a red! circle !"])[0].tolist()
    assert ids == [START, 320, 736, 256, 7117, 256, END] + [0] * 70


def test_added_tokens_are_found_as_they_stand(clip_folder: Path, tmp_path: Path) -> None:
    """As textual inversion adds them, in each of the three files that may say so."""
    tokenizer = CLIPTokenizerFast.from_pretrained(clip_folder)
    tokenizer.add_tokens(["<Cat-Toy>", "<b>"])
    saved = tmp_path / "saved"
    tokenizer.save_pretrained(saved)
    texts = shutil.copytree(clip_folder, tmp_path / "texts")
    (texts / "added_tokens.json").write_text(json.dumps({"<Cat-Toy>": SIZE, "<b>": SIZE + 1}))
    decoder = shutil.copytree(clip_folder, tmp_path / "decoder")
    added = {str(SIZE): {"content": "<Cat-Toy>"}, str(SIZE + 1): {"content": "<b>"}}
    (decoder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    for folder in (saved, texts, decoder):
        ids = encoder(folder).tokenize(["a <Cat-Toy>, <b> red"])[0].tolist()
        assert ids[:7] == [START, 320, SIZE, 267, SIZE + 1, 736, END], folder


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_tokenizer_is_read_however_its_files_were_saved(encoding: str, clip_folder: Path, tmp_path: Path) -> None:
    for path in clip_folder.iterdir():
        text = path.read_text(encoding="utf-8").replace("\n", "\r\n")
        (tmp_path / path.name).write_text(text, encoding=encoding, newline="")
    assert encoder(tmp_path).tokenize(["a red circle"])[0, :5].tolist() == [START, 320, 736, 7117, END]


def test_words_that_are_dropped_are_told_as_words(clip_folder: Path) -> None:
    with pytest.warns(UserWarning, match="at most 77 are used; dropped: 'blue star , caf\u00e9 '"):
        encoder(clip_folder).tokenize(["red " * 75 + "blue star, caf\u00e9"])


# --- single files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "padding"), [(1, END), (2, 0)])
def test_a_single_file_needs_no_network_for_its_tokenizer(
    family: int, padding: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout is that of the published files, with all tokens; the other widths are small."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    widths: Any = {"block_out_channels": (8, 16, 32, 32), "norm_groups": 8}
    monkeypatch.setattr(
        checkpoint, f"SD{family}_UNET", replace((SD1_UNET, SD2_UNET)[family - 1], heads=(2, 2, 2, 2), **widths)
    )
    monkeypatch.setattr(checkpoint, "SD_VAE", VAEConfig(**widths))
    narrow = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(ldm, f"SD{family}_TEXT", getattr(ldm, f"SD{family}_TEXT") | narrow)
    sizes = replace(FULL[family], unet=(8, 16, 32, 32), vae=(8, 16, 32, 32), text=8, layers=1)
    save_file(random_tensors(layout(sizes)), tmp_path / "model.safetensors")
    text = load_parts(tmp_path / "model.safetensors", torch.float32).text
    assert text.tokenize(["a red! circle !"])[0].tolist() == [START, 320, 736, 256, 7117, 256, END] + [padding] * 70

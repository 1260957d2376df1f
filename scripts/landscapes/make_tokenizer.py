"""A small byte-pair tokenizer in CLIP's format, learned from the world's own captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from data import scene_at
from world import vary_caption

LENGTH = 77


def make_tokenizer(folder: Path, captions: int = 4000, vocabulary: int = 1024) -> CLIPTokenizer:
    """Write vocab.json, merges.txt and the settings CLIPTokenizer reads, and return the tokenizer.

    All 256 bytes are in the vocabulary, so any text can be encoded, if not understood.
    """
    rng = np.random.default_rng(0)
    lines = [vary_caption(scene_at(0, i), rng) for i in range(captions)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(lines, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's own order: bytes, bytes that end a word, merges, then the two specials.
    tokens = alphabet + [a + "</w>" for a in alphabet] + [a + b for a, b in merges]
    tokens = [*list(dict.fromkeys(tokens)), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")
    end = "<|endoftext|>"
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
    }
    specials = {k: v for k, v in settings.items() if k.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2))
    # Last: its presence says that the folder is complete.
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return CLIPTokenizer.from_pretrained(folder)

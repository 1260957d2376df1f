"""CLIP's tokenizer: the one that comes with the package, or one from a folder or the hub.

Files give the vocabulary alone. How a text becomes words is the same for every CLIP model and is built here from the
package tokenizers, so that ids do not depend on the version of transformers, nor on whether ftfy is installed.
Source: openai/CLIP `clip/simple_tokenizer.py`; transformers `models/clip/tokenization_clip.py`.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from minireuse.checkpoints.tensors import CheckpointError, read_json, reason
from minireuse.files import lines_of, read_text

MERGES = Path(__file__).parent / "clip" / "merges.txt.gz"
END_OF_WORD = "</w>"
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"""
START, END = "<|startoftext|>", "<|endoftext|>"
ADVICE = (
    "pass --tokenizer with a folder that holds vocab.json and merges.txt, or tokenizer.json, "
    "or with the name of one on the hub"
)


@dataclass(frozen=True)
class Vocabulary:
    """What distinguishes one CLIP tokenizer from another.

    tokens: their ids. merges: pairs of tokens in the order in which they are joined. added: ids of tokens that a text
    is searched for before it is split into words, such as those of textual inversion.
    start, end: the tokens around a text. padding: the token that fills up what is left.
    """

    tokens: Mapping[str, int]
    merges: list[tuple[str, str]]
    added: Mapping[str, int]
    start: str = START
    end: str = END
    padding: str = END

    @property
    def ids(self) -> dict[str, int]:
        return {**self.added, **self.tokens}

    def check(self, size: int) -> None:
        """Raises: ValueError for what a text encoder with `size` tokens cannot be given."""
        ids = self.ids
        if len(ids) < 256 or min(ids.values()) < 0 or max(ids.values()) >= size:
            expected = f"256 (one per byte) to {size} (as the text encoder), numbered from 0"
            raise ValueError(f"it has {len(ids)} tokens, expected {expected}")
        if self.start == self.end or not {self.start, self.end, self.padding} <= ids.keys():
            raise ValueError("it does not mark where a text begins and ends, or lacks padding")


def read_tokenizer(source: str | Path | None, size: int) -> tuple[PreTrainedTokenizerFast, int]:
    """A tokenizer and the id that fills up short prompts.

    source: None is CLIP's own, which comes with the package; a folder; a string that is no folder is a name on the hub.
    size: of the text encoder's vocabulary. Raises: CheckpointError.
    """
    try:
        vocabulary = clip_vocabulary() if source is None else _vocabulary_in(_folder(source))
        vocabulary.check(size)
        return _build(vocabulary), vocabulary.ids[vocabulary.padding]
    except Exception as error:  # the hub and tokenizers raise many kinds, network errors among them
        where = source or MERGES
        raise CheckpointError(f"no CLIP tokenizer could be read from {where} ({reason(error)}); {ADVICE}") from None


def clip_vocabulary() -> Vocabulary:
    """CLIP's own 49,408 tokens: bytes, bytes that end a word, what each merge joins, and the two around a text."""
    lines = lines_of(gzip.decompress(MERGES.read_bytes()).decode())
    merges = _pairs(lines)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = (first + second for first, second in merges)
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *joined, START, END]
    return Vocabulary({token: i for i, token in enumerate(tokens)}, merges, {})


def _build(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    start, end, ids = vocabulary.start, vocabulary.end, vocabulary.ids
    bpe = models.BPE(vocab=ids, merges=vocabulary.merges, end_of_word_suffix=END_OF_WORD, unk_token=end)
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.post_processor = processors.BertProcessing((end, ids[end]), (start, ids[start]))
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(END_OF_WORD, " ")])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (start, end)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in vocabulary.added if token])
    # The padding is not told: a pad token such as "!" would be taken out of every prompt.
    names = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def _folder(source: str | Path) -> Path:
    """Raises: OSError, and the hub's own errors."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if isinstance(source, Path):
        raise FileNotFoundError("no such folder")
    return Path(snapshot_download(source, allow_patterns=["vocab.json", "merges.txt", "*token*.json"]))


def _vocabulary_in(folder: Path) -> Vocabulary:
    """What the files of transformers 4 and 5 say. Raises: many kinds of error for files that are broken."""
    settings = {**_optional(folder / "tokenizer_config.json"), **_optional(folder / "special_tokens_map.json")}
    whole = _optional(folder / "tokenizer.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tokens, merges = read_json(folder / "vocab.json"), _pairs(lines_of(read_text(folder / "merges.txt")))
    elif whole:
        tokens, merges = dict(whole["model"]["vocab"]), _pairs(whole["model"]["merges"])
    else:
        raise FileNotFoundError("it holds neither vocab.json and merges.txt nor tokenizer.json")
    added = {str(token["content"]): token["id"] for token in whole.get("added_tokens", [])}
    added |= {str(token["content"]): int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    added |= _optional(folder / "added_tokens.json")
    start, end = _token(settings.get("bos_token", START)), _token(settings.get("eos_token", END))
    padding = _token(settings.get("pad_token", end))
    new = {token: i for token, i in added.items() if token not in tokens}
    return Vocabulary(tokens, merges, new, start, end, padding)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Pairs of tokens, each a list or a line of two. Raises: ValueError."""
    pairs = [line.split() if isinstance(line, str) else line for line in merges]
    if pairs and pairs[0] and str(pairs[0][0]).endswith("#version:"):
        del pairs[0]
    return [(str(first), str(second)) for first, second in filter(None, pairs)]


def _token(value: Any) -> str:
    """A token by its text, which some files wrap into an object. Empty for what is none."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else ""

"""The CLIP text encoders of Stable Diffusion: transformers' models and tokenizers behind two small classes."""

from __future__ import annotations

import html
import re
import unicodedata
import warnings
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from minireuse.files import shown


class Conditioning(NamedTuple):
    """What a U-Net is told of prompts. Shapes: context (B, M, D); pooled (B, P), where the model reads it (SDXL)."""

    context: Tensor
    pooled: Tensor | None = None


class TextEncoder(nn.Module):
    """Prompts to the context that cross-attention reads.

    layer: which hidden state is the context: -1 the last (SD 1.x), -2 the penultimate. SD 2.x was trained on the
    penultimate of 24 layers; its diffusers folders simply hold 23.
    padding: the id that fills up short prompts; None is the tokenizer's own. SD 2.x fills up with 0, an id that is not
    that of a "!" in a prompt; so does SDXL's second encoder.
    norm: whether the final layer norm follows, as in SD 1.x and 2.x but not in SDXL.
    projects: whether there is a pooled state too: the last one at the end of the prompt, normed and projected.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        layer: int = -1,
        padding: int | None = None,
        *,
        norm: bool = True,
        projects: bool = False,
    ) -> None:
        super().__init__()
        self.model = CLIPTextModelWithProjection(config) if projects else CLIPTextModel(config)
        self.tokenizer = tokenizer
        self.layer = layer
        self.padding = padding
        self.norm = norm
        self.projects = projects

    @property
    def encoders(self) -> tuple[TextEncoder, ...]:
        return (self,)

    @property
    def length(self) -> int:
        """Tokens per prompt, M: 77 for CLIP."""
        return int(self.model.config.max_position_embeddings)

    def forward(self, ids: Tensor, clip_skip: int | None = None) -> Tensor:
        """Shapes: ids (B, M) -> (B, M, D)."""
        return self._states(ids, clip_skip)[0]

    def _states(self, ids: Tensor, clip_skip: int | None) -> tuple[Tensor, Tensor]:
        """The context, and the last hidden state with the final norm. Shapes: ids (B, M) -> two of (B, M, D)."""
        layer = self.layer if clip_skip is None else -clip_skip
        # A model with a projection keeps the transformer under `text_model`, as every one does in transformers 4.
        inner = getattr(self.model, "text_model", self.model)
        is_last = layer == -1 and self.norm
        states = inner(input_ids=ids, output_hidden_states=not is_last)
        last = states.last_hidden_state
        if is_last:
            return last, last
        state = states.hidden_states[layer]
        return cast(nn.Module, inner.final_layer_norm)(state) if self.norm else state, last

    def _require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("this model came without a tokenizer; pass tokenizer= (a folder or a hub name)")
        return self.tokenizer

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids, padded to M. Warns with the words that are dropped where a prompt is too long.

        Shapes: -> (len(prompts), M).
        Raises: ValueError without a tokenizer.
        """
        tokenizer = self._require_tokenizer()
        rows: list[list[int]] = []
        padding = tokenizer.pad_token_id if self.padding is None else self.padding
        texts = list(map(self._cut, prompts))
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a prompt is not text ({error.reason}); type it again, in UTF-8") from None
        tokenized: list[list[int]] = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        for ids in tokenized:
            if len(ids) > self.length:
                dropped = shown(str(tokenizer.decode(ids[self.length - 1 : -1])), 200)
                warnings.warn(
                    f"prompt has {len(ids)} tokens, at most {self.length} are used; dropped: {dropped}", stacklevel=3
                )
                ids = ids[: self.length - 1] + ids[-1:]  # the end token stays: the encoder was trained with it
            rows.append(ids + [padding] * (self.length - len(ids)))
        return torch.tensor(rows)

    def pieces(self, prompt: str) -> list[str]:
        """The prompt's tokens as text, as far as they are used, without those that begin and end it."""
        tokenizer = self._require_tokenizer()
        return list(tokenizer.tokenize(self._cut(prompt)))[: self.length - 2]

    def _cut(self, prompt: str) -> str:
        """The prompt without what no token can reach: byte-pair encoding of one endless word takes quadratic time."""
        return normalised(prompt)[: 64 * self.length]

    def encode(self, prompts: Sequence[str], clip_skip: int | None = None) -> Tensor:
        """The context of each prompt: that of `condition`. Shapes: -> (len(prompts), M, D). Raises: as there."""
        return self.condition(prompts, clip_skip).context

    def condition(self, prompts: Sequence[str | None], clip_skip: int | None = None) -> Conditioning:
        """What the U-Net is told of each prompt; None, which is no prompt at all, is read as "".

        clip_skip: the layer that is read instead of the model's own, counted as AUTOMATIC1111 does: 1 is the last of
        those that the model has, 2 the one before it. diffusers counts one less, and for SDXL two less.
        Raises: ValueError for a layer that there is not.
        """
        layers = int(self.model.config.num_hidden_layers)
        if clip_skip is not None and not 1 <= clip_skip <= layers:
            raise ValueError(f"clip_skip is {clip_skip}, expected 1 (the last layer) to {layers} (the first)")
        ids = self.tokenize([prompt or "" for prompt in prompts]).to(next(self.parameters()).device)
        context, last = self._states(ids, clip_skip)
        if not self.projects:
            return Conditioning(context)
        # The first one of the tokenizer's: published configurations name another id, and padding may be the same one.
        ends = (ids == self._require_tokenizer().eos_token_id).int().argmax(dim=1)
        project = cast(nn.Module, self.model.text_projection)
        return Conditioning(context, project(last[torch.arange(len(last)), ends]))


class TextEncoders(nn.Module):
    """SDXL's two encoders: their contexts side by side, and the second's pooled state.

    zeros: whether a prompt that is None becomes zeros, instead of what the encoders make of "".
    """

    def __init__(self, first: TextEncoder, second: TextEncoder, *, zeros: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.zeros = first, second, zeros

    @property
    def encoders(self) -> tuple[TextEncoder, ...]:
        return self.first, self.second

    @property
    def length(self) -> int:
        """Tokens per prompt, M: 77 for CLIP."""
        return self.first.length

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """The token ids of both encoders, one after the other. Shapes: -> (len(prompts), 2M). Raises: ValueError."""
        return torch.cat([encoder.tokenize(prompts) for encoder in self.encoders], dim=1)

    def pieces(self, prompt: str) -> list[str]:
        """As `TextEncoder.pieces`, of the first."""
        return self.first.pieces(prompt)

    def encode(self, prompts: Sequence[str], clip_skip: int | None = None) -> Tensor:
        """The context of each prompt: that of `condition`. Shapes: -> (len(prompts), M, D). Raises: as there."""
        return self.condition(prompts, clip_skip).context

    def condition(self, prompts: Sequence[str | None], clip_skip: int | None = None) -> Conditioning:
        """What the U-Net is told of each prompt; None is no prompt at all. clip_skip: as in `TextEncoder.condition`."""
        (first, _), (second, pooled) = (encoder.condition(prompts, clip_skip) for encoder in self.encoders)
        assert pooled is not None
        absent = torch.tensor([self.zeros and prompt is None for prompt in prompts], device=pooled.device)
        context = torch.cat([first, second], dim=-1).masked_fill(absent[:, None, None], 0)  # (B, M, D + D')
        return Conditioning(context, pooled.masked_fill(absent[:, None], 0))


# --- what a prompt becomes before it is split into words -------------------------------------------------------------

TERMINAL_CODES = re.compile("\x1b\\[[\\d;]*[a-zA-Z]")
C1 = {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
LIGATURES = [*map(ord, "Ĳĳﬆ"), *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB05)]
WIDTHS = [0x3000, *range(0xFF01, 0xFFF0)]  # of letters that are as wide as Chinese ones, or half as wide
CONTROLS = [*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
PLAIN: dict[int, str | None] = {
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in (*LIGATURES, *WIDTHS)},
    0xFB05: "\u017ft",  # NFKC would change the long s
    0x149: "'n",
    **dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
    **dict.fromkeys(CONTROLS),
}


def normalised(prompt: str) -> str:
    """A prompt as OpenAI's tokenizer takes it: one space between words, plain quotes, plain letters.

    What ftfy changes character by character is done here. Its guesses at wrongly decoded text are left out.
    Source: openai/CLIP `clip/simple_tokenizer.py` (basic_clean, whitespace_clean); ftfy `ftfy/fixes.py`.
    """
    text = html.unescape(html.unescape(prompt)).translate(C1)
    text = TERMINAL_CODES.sub("", text).translate(PLAIN)
    # A capital sigma that ends a word is another small letter than one within it, which tokenizers do not know.
    words = (word.lower() if "Σ" in word else word for word in unicodedata.normalize("NFC", text).split())
    return " ".join(words)

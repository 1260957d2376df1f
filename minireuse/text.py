"""The CLIP text encoder of Stable Diffusion: transformers' model and tokenizer behind one small class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minireuse.files import shown


class TextEncoder(nn.Module):
    """Prompts to the context that cross-attention reads.

    layer: which hidden state is the context: -1 the last (SD 1.x), -2 the penultimate; the final layer norm follows
    either. SD 2.x was trained on the penultimate of 24 layers; its diffusers folders simply hold 23.
    """

    def __init__(self, config: CLIPTextConfig, tokenizer: CLIPTokenizer | None = None, layer: int = -1) -> None:
        super().__init__()
        self.model = CLIPTextModel(config)
        self.tokenizer = tokenizer
        self.layer = layer

    @property
    def length(self) -> int:
        """Tokens per prompt, M: 77 for CLIP."""
        return int(self.model.config.max_position_embeddings)

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: ids (B, M) -> (B, M, D)."""
        states = self.model(input_ids=ids, output_hidden_states=self.layer != -1)
        if self.layer == -1:
            return states.last_hidden_state
        # transformers 4 keeps the transformer under `text_model`, transformers 5 does not.
        inner = getattr(self.model, "text_model", self.model)
        return inner.final_layer_norm(states.hidden_states[self.layer])

    def _require_tokenizer(self) -> CLIPTokenizer:
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
        pad = int(tokenizer.pad_token_id)
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
            rows.append(ids + [pad] * (self.length - len(ids)))
        return torch.tensor(rows)

    def pieces(self, prompt: str) -> list[str]:
        """The prompt's tokens as text, as far as they are used, without those that begin and end it."""
        tokenizer = self._require_tokenizer()
        return list(tokenizer.tokenize(self._cut(prompt)))[: self.length - 2]

    def _cut(self, prompt: str) -> str:
        """The prompt without what no token can reach: byte-pair encoding of one endless word takes quadratic time."""
        most = 64 * self.length
        return prompt if len(prompt) <= most else " ".join(prompt.split())[:most]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The context of each prompt. Shapes: -> (len(prompts), M, D)."""
        ids = self.tokenize(prompts).to(next(self.parameters()).device)
        context: Tensor = self(ids)
        return context

"""Text for a network: its embeddings, kept on the disk, and the words that a small text encoder does not know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vgen.embeddings import Embeddings
from vgen.latents import file_hash
from vgen.networks import Networks


class Texts:
    """The text encoder of a checkpoint, as `kind` (t5, clip), for texts padded and cut to `length` tokens."""

    def __init__(self, networks: Networks, kind: str, length: int) -> None:
        self.networks, self.kind, self.length = networks, kind, length

    @cached_property
    def space(self) -> str:
        """What identifies its embeddings: the encoder's weights, and the length."""
        return f"{self.kind}:{file_hash(self.networks.folder / 'text_encoder')[:16]}:{self.length}"

    def of(self, texts: list[str]) -> Tensor:
        """Embeddings (B, L, D) of texts. Padding is attended to, as in the released models."""
        encoder, told = self.networks.get("text_encoder"), {"truncation": True, "return_tensors": "pt"}
        tokens = self.networks.tokenizer(texts, padding="max_length", max_length=self.length, **told)
        out: Tensor = encoder(tokens.input_ids.to(encoder.device))[0]
        return out

    def embed(self, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """The embedding (L, D) of each text, alone, so that its bits do not depend on the others.

        The text encoder leaves memory after the last.
        """
        for one in texts:  # every store holds the empty text: for that alone the encoder need not load
            yield self._alone(one) if one else self._cache().fetch(one, self._alone)
        self.networks.release("text_encoder")

    def cached(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The embedding (L, D) of each text, from the disk where it is there; the encoder loads only for the others."""
        found = {one: self._cache().fetch(one, self._alone)["text"] for one in texts}
        self.networks.release("text_encoder")
        return found

    def notes(self, text: str) -> list[str]:
        """What a user should hear of a text: the words that a small text encoder does not know."""
        words, known = unknown(self.networks.folder / "tokenizer", text)
        if not words:
            return []
        return [f"This checkpoint does not know: {', '.join(words)}. It knows: {', '.join(known)}."]

    def _cache(self) -> Embeddings:
        precision = str(self.networks.machine.dtype).removeprefix("torch.")
        return Embeddings(None, f"{self.space}:{precision}")

    def _alone(self, one: str) -> dict[str, Tensor]:
        with self.networks.machine.holding(self.networks.get("text_encoder")), torch.no_grad():
            return {"text": self.of([one])[0].cpu()}


def unknown(folder: Path, text: str, most: int = 200) -> tuple[list[str], list[str]]:
    """The words of `text` that a tokenizer of at most so many words does not know, and all that it knows.

    Both are empty for larger tokenizers, which know every text by its pieces.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return [], []
    tokenizer = Tokenizer.from_file(str(file))
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    known = sorted(set(tokenizer.get_vocab()) - special)
    none = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
    if len(known) > most or none is None:
        return [], []
    return [word for word in text.split() if none in tokenizer.encode(word, add_special_tokens=False).ids], known

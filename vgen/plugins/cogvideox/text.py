"""The text encoder of CogVideoX: T5, or a small one of the same class and the same interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor


def tokenize(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Token ids (B, length), padded and cut to `length`."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, add_special_tokens=True, return_tensors="pt"
    ).input_ids
    return ids


def embed(encoder: Any, tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Embeddings (B, length, D). Padding is attended to, as in the released models."""
    ids = tokenize(tokenizer, texts, length).to(encoder.device)
    out: Tensor = encoder(ids)[0]
    return out


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

"""The text encoder of CogVideoX: T5, or a small one of the same class and the same interface."""

from __future__ import annotations

from typing import Any

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


def unknown(tokenizer: Any, text: str) -> list[str]:
    """The words of a text that the tokenizer does not know; none for a tokenizer of pieces."""
    if tokenizer.unk_token_id is None:
        return []
    return [
        word for word in text.split() if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids
    ]


def known(tokenizer: Any, most: int = 200) -> list[str]:
    """All words of a tokenizer with a small vocabulary; empty for a large one."""
    special = set(tokenizer.all_special_tokens)
    return sorted(set(tokenizer.get_vocab()) - special) if len(tokenizer) <= most else []

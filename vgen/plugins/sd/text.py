"""Stable Diffusion's text encoder: CLIP's (CLIPTextModel), or a small one of the same class."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def embed(encoder: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Embeddings (B, L, D), L the encoder's own length. Padding is not masked, as in the released models."""
    length = encoder.config.max_position_embeddings
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    out: Tensor = encoder(tokens.input_ids.to(encoder.device))[0]
    return out


def unknown_words(tokenizer: Any, text: str, most: int = 200) -> tuple[list[str], list[str]]:
    """The words of `text` that a tokenizer of at most so many words does not know, and all that it knows.

    Nothing of either for a larger one: CLIP's is made of pieces and knows every word.
    """
    if len(tokenizer) > most:
        return [], []
    known = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    unknown = tokenizer.unk_token_id
    words = [word for word in text.split() if unknown in tokenizer(word, add_special_tokens=False).input_ids]
    return words, known

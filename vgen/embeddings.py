"""Text embeddings on disk, by text and encoder, so that a text encoder runs once for each text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vgen.files import NoFile, cache_folder, delete
from vgen.tensorfile import Damaged, dumps, load_tensors, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "vgen-text/1"


class Embeddings:
    """A folder of text embeddings, one file per text. Any number of processes may use it at once.

    `encoder` identifies the weights and settings of the text encoder. Tensors are kept as given; give them unpadded.
    """

    def __init__(self, folder: Path | None, encoder: str) -> None:
        self.folder = folder or cache_folder() / "text"
        self.encoder = encoder

    def path(self, text: str) -> Path:
        """The file of a text."""
        key = hashlib.sha256(dumps([self.encoder, text]).encode()).hexdigest()[:32]
        return self.folder / key[:2] / f"{key}.safetensors"

    def put(self, text: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the embedding of a text. Raises VgenError."""
        save_tensors(self.path(text), tensors, {"format": FORMAT, "encoder": self.encoder, "text": text})

    def load(self, text: str) -> dict[str, Tensor]:
        """The embedding of a text. Raises NoFile where there is none, Damaged, VgenError."""
        path = self.path(text)
        tensors, record = load_tensors(path)
        if (record.get("encoder"), record.get("text")) != (self.encoder, text):
            raise Damaged(f"{path} is not the embedding of {text!r}.", "Remove the file.")
        return tensors

    def get(self, text: str) -> dict[str, Tensor] | None:
        """The embedding of a text, or None.

        This is a cache: a damaged file counts as none and is removed, for the caller computes it again.
        """
        try:
            return self.load(text)
        except NoFile:
            return None
        except Damaged:
            delete(self.path(text))
            return None

    def fetch(self, text: str, make: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The embedding of a text from the disk; where it is not there, `make` makes it, and it is kept."""
        found = self.get(text)
        if found is None:
            found = make(text)
            self.put(text, found)
        return found

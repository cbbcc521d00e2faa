"""A long output made in parts: each one is kept from the moment it is whole, so that a run that was killed goes on.

The parts lie in NAME.parts beside the output, which is removed when the output is written. Parts of a video are
encoded as it is and joined without coding them again; those of a GIF and of a folder of pictures are pictures.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgen import video, video_write
from vgen.cache import read_json
from vgen.files import replacing
from vgen.lock import claimed
from vgen.remux import FORMATS, Clock, join
from vgen.video_write import Look

IDENTITY, CLAIM = "made-by.json", "running"


@dataclass(frozen=True)
class Parts:
    """The parts of one output, numbered from 0. `changed` says what sets this run apart from the one that left parts.

    `found` are the parts that were there already.
    """

    output: Path
    folder: Path
    fps: Fraction
    look: Look
    found: frozenset[int]
    changed: tuple[str, ...] = ()

    def path(self, number: int) -> Path:
        """Where a part lies."""
        kind = self.output.suffix.lower()
        return self.folder / f"part-{number:06d}{kind if kind in FORMATS else ''}"

    def write(self, number: int, frames: Iterable[Tensor]) -> None:
        """Keep a part: frames (H, W, 3) uint8."""
        video_write.write(self.path(number), frames, self.fps, look=self.look)
        gc.collect()  # PyAV's containers and streams hold each other, and the encoder's frames with them

    def paths(self) -> list[Path]:
        """All parts that are there, in order."""
        return sorted(self.folder.glob("part-*"))

    def frames(self) -> Iterator[Tensor]:
        """The frames of all parts as they were written, (H, W, 3) uint8."""
        for part in self.paths():
            if not part.is_dir():
                yield from video.frames(part)
                continue
            for path in sorted(part.iterdir()):
                with Image.open(path) as image:
                    yield torch.from_numpy(np.array(image))

    def finish(self, clock: Clock, metadata: Mapping[str, Any], *, heard: Path | None, since: Fraction) -> None:
        """Write the output from the parts; `heard` and `since` are those of `remux.join`."""
        if self.output.suffix.lower() in FORMATS:
            comment = video_write.as_text(metadata)
            join(self.output, self.paths(), clock, comment=comment, heard=heard, since=since)
            return
        hold = clock.last * clock.tick
        video_write.write(self.output, self.frames(), self.fps, metadata=dict(metadata), hold=hold)

    def remove(self) -> None:
        """Remove the parts, and what killed writers left among them."""
        for path in self.folder.iterdir():
            if path.name != CLAIM:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def opened(output: Path, fps: Fraction, look: Look, identity: Mapping[str, Any]) -> Iterator[Parts]:
    """The parts of an output, for one run at a time: those that a run of the same `identity` left are kept.

    `identity` is a flat table of plain values that decides every frame. Raises UsageError where another run is at it.
    """
    folder = output.with_name(output.name + ".parts")
    told = json.loads(json.dumps(identity, default=str))
    with claimed(folder / CLAIM):
        parts = Parts(output, folder, fps, look, frozenset())
        before = read_json(folder / IDENTITY)
        changed = tuple(sorted(k for k in {*before, *told} if before.get(k) != told.get(k))) if before else ()
        if changed or not before:
            parts.remove()
            with replacing(folder / IDENTITY) as file:
                file.write(json.dumps(told, indent=1).encode())
        found = frozenset(int(path.stem.partition("-")[2]) for path in parts.paths())
        yield Parts(output, folder, fps, look, found, changed)
    if not (folder / IDENTITY).exists():
        shutil.rmtree(folder, ignore_errors=True)  # a killed run may have left its claim

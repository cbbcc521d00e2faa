"""`vgen decode`: latents, from a file or a store, to clips."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen.commands.prepare import Job
from vgen.errors import UsageError
from vgen.outputs import check_output, sheet_of, spread

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.latents import Space

Clip = tuple[dict[str, "Tensor"], dict[str, Any]]


def run(job: Job) -> int:
    """Decode every clip, write it with its record, and print its path."""
    from vgen.encode import as_latents
    from vgen.generate import decode
    from vgen.video_write import contact_sheet, write

    options = job.options
    if not options.inputs:
        raise UsageError("No latents are given.", "Name a latent file (.safetensors) or a store of them.")
    model = job.card.loader()(job.folder(), job.found.checkpoint, job.machine())
    mend = f"vgen encode {job.card.name} CLIPS --checkpoint {job.found.reference} -o ANOTHER_FOLDER"
    inputs = [Path(one) for one in options.inputs]
    paths = spread(options.output, sum(map(_count, inputs)))
    for path in paths:
        check_output(path, options.overwrite)
    clips = (clip for path in inputs for clip in _clips(path, model.space, mend))
    with job.out.progress() as on_step:
        for i, (path, (streams, record)) in enumerate(zip(paths, clips, strict=True)):
            frames = decode(model, as_latents({name: s[None] for name, s in streams.items()}))[0]
            fps = Fraction(options.fps).limit_denominator(100_000) if options.fps else Fraction(record["fps"])
            write(path, frames, fps, metadata=job.run.table())
            facts = {"contact_sheet": str(contact_sheet(frames, sheet_of(path)))} if options.contact_sheet else {}
            job.run.write(path, source=record.get("source", {}), captions=record.get("captions", []))
            on_step("decode", i + 1, len(paths))
            job.out.result(path, seconds=job.run.seconds, **facts)
    return 0


def _count(path: Path) -> int:
    """Clips in a latent file or a store."""
    from vgen.store import Store

    return len(Store.open(path)) if path.is_dir() else 1


def _clips(path: Path, space: Space, mend: str) -> Iterator[Clip]:
    """The clips of a latent file or a store. Raises VgenError for latents of another space."""
    from vgen import latents
    from vgen.store import Store

    if path.is_dir():
        store = Store.open(path, space=space, mend=mend)
        yield from map(store.get, store.keys())
        return
    streams, record = latents.read(path)
    latents.require(record["space"], space, mend)
    yield streams, record

"""`vgen sample`: text, and whatever a family adds, to clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen.commands.prepare import Job
from vgen.outputs import check_output, sheet_of, spread

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.model import Model


def run(job: Job) -> int:
    """Make the clips, write them and their records, and print their paths."""
    from vgen.generate import generate

    options = job.options
    paths = spread(options.output, options.num_videos_per_prompt)
    for path in paths:
        check_output(path, options.overwrite)
    model = job.card.loader()(job.folder(), job.found.checkpoint, job.machine())
    for note in [*model.notes(options), *_adapted(job, model)]:
        job.out.warning(note)
    with job.out.progress() as on_step:
        streams = generate(model, options, on_step)
    for i, path in enumerate(paths):
        _write(job, model, {name: stream[i : i + 1] for name, stream in streams.items()}, path, options.seed + i)
    return 0


def _adapted(job: Job, model: Model) -> list[str]:
    """Put the adapters of --lora on the model, note them in the record, and return what a user should hear of them."""
    if not job.options.lora:
        return []
    from vgen import lora, lora_source

    sources = [lora_source.locate(spec) for spec in job.options.lora]
    job.run.options = {**job.run.options, "lora": [source.spec for source in sources]}
    job.run.facts["adapters"] = {source.spec: source.sha256() for source in sources}
    return lora.use(job.card, model, job.folder(), sources)


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Facts in lines for people: of a list of figures, a line each."""
    for name, value in facts.items():
        several = value if isinstance(value, list) else [value]
        for i, one in enumerate(several):
            figures = ", ".join(f"{k} {v}" for k, v in one.items()) if isinstance(one, Mapping) else one
            yield f"{name}{f' {i + 1}' if len(several) > 1 else ''}: {figures}"


def _write(job: Job, model: Model, streams: Mapping[str, Tensor], path: Path, seed: int) -> None:
    """One clip: as latents or as pictures, by the path's extension; its contact sheet; its record."""
    from vgen import latents
    from vgen.generate import decode
    from vgen.video_write import contact_sheet, write

    fps = Fraction(job.options.fps).limit_denominator(1001)
    record = job.run.table(seed=seed)
    frames = decode(model, streams)[0] if path.suffix != ".safetensors" or job.options.contact_sheet else None
    if path.suffix == ".safetensors":
        told = {"fps": fps, "captions": [job.options.prompt], "space": model.space, "run": record}
        latents.write(path, {name: s[0] for name, s in streams.items()}, told)
    else:
        assert frames is not None
        write(path, frames, fps, metadata=record)
    measure = getattr(model, "measure", None)
    facts: dict[str, Any] = measure(job.options, frames) if measure and frames is not None else {}
    for line in lines(facts):
        job.out.say(line)
    job.run.facts |= facts
    if job.options.contact_sheet and frames is not None:
        facts["contact_sheet"] = str(contact_sheet(frames, sheet_of(path)))
    job.run.write(path, seed=seed)
    job.out.result(
        path,
        family=job.card.name,
        checkpoint=job.found.reference,
        seed=seed,
        seconds=job.run.seconds,
        **facts,
    )

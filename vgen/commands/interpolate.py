"""`vgen interpolate`: a video to one with more frames, of the same duration, with its sound."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen.commands.prepare import Job
from vgen.errors import UsageError
from vgen.outputs import LATENTS, check_frames, sheet_of

if TYPE_CHECKING:
    from vgen.interpolate import Told
    from vgen.parts import Parts
    from vgen.placing import Placing
    from vgen.probe import Probe

APART = ("input", "output", "overwrite", "contact_sheet", "measure", "audio", "threads")  # they change no frame
USUAL = 4  # times as many frames, where nothing else is asked for
FASTEST = {".gif": 50, ".webm": 500}  # frames a second that an output can hold
ROWS, COLUMNS, WIDE = 6, 9, 320  # gaps and frames of each on a contact sheet, and pixels across a frame, at most


def run(job: Job) -> int:
    """Make the frames, write the video and its record, and print its path."""
    from vgen import parts
    from vgen.remux import sound
    from vgen.video_write import Look

    options = job.options
    told = look(options)
    heard, notes = sound(told.path, options.output) if options.audio else (False, [])
    for note in notes:
        job.out.warning(note)
    model = job.card.loader()(job.found.folder, job.found.checkpoint, job.machine())
    placing = place(told, options, getattr(model, "steps", None))
    with parts.opened(options.output, placing.fps, Look.of(told), _identity(job)) as kept:
        _say(job, placing, kept)
        facts = _made(job, model, placing, kept)
        if options.contact_sheet:
            facts["contact_sheet"] = str(_sheet(placing, kept))
        source = told.path if heard else None
        kept.finish(placing.clock(), job.run.table(**facts), heard=source, since=told.pts[0])
        job.run.write(options.output, **facts)
        kept.remove()
    job.out.result(options.output, seconds=job.run.seconds, **facts)
    return 0


def _made(job: Job, model: Any, placing: Placing, kept: Parts) -> dict[str, Any]:
    """Make the parts, and return what the record and the answer tell. What cannot be read leaves none behind."""
    from vgen.interpolate import interpolate
    from vgen.probe import BadClip

    try:
        with job.out.progress() as on_step:
            facts = _facts(placing, interpolate(model, placing, kept, job.options, on_step), kept)
            if job.options.measure:
                from vgen.leave_out import measure

                facts["measured"] = measure(model, placing, kept.frames(), job.options, on_step)
    except BadClip:
        kept.remove()
        raise
    except KeyboardInterrupt:
        job.out.hint(f"What is done lies in {kept.folder}. The same command goes on with it.")
        raise
    return facts


def look(options: Any) -> Probe:
    """The clip that is asked for, checked together with the options. Raises UsageError or BadClip."""
    from vgen.probe import BadClip, probe

    if not options.input:
        raise UsageError("No clip is given.", "Name a video.")
    if Path(options.input).suffix.lower() == LATENTS:
        do = f"Make a video of them first: vgen decode FAMILY {options.input} -o CLIP.mp4"
        raise UsageError(f"{options.input} holds latents; frames are made between those of a video.", do)
    if options.output.suffix.lower() == LATENTS:
        raise UsageError(f"{options.output} would be latents; frames are made.", "Name a video or a folder.")
    check_frames(options.output, 2)
    if options.fps is not None and options.factor is not None:
        raise UsageError("--factor and --fps both say how many frames to make.", "Give one of them.")
    told = probe(options.input)
    if len(told.pts) < 2:
        raise BadClip(told.path, "it has one frame, and new frames are made between two", "Name a clip.")
    if options.fps is not None and (options.fps < told.fps or (options.fps == told.fps and not told.vfr)):
        raise UsageError(
            f"--fps {options.fps} is no more than the {told.fps} that {told.path} has.",
            "Frames are made, not taken out: ask for a higher rate.",
        )
    fps, kind = options.fps or told.fps * (options.factor or USUAL), options.output.suffix.lower()
    if fps > FASTEST.get(kind, math.inf):
        raise UsageError(
            f"{options.output} cannot be shown at {float(fps):g} fps: the format ends at {FASTEST[kind]}.",
            "Write an .mp4, or ask for fewer frames with --factor or --fps.",
        )
    return told


def place(told: Probe, options: Any, steps: int | None) -> Placing:
    """Which frames are shown when. A varying rate is kept where the output can hold it."""
    from vgen.placing import Placing
    from vgen.remux import FORMATS

    factor, rate = options.factor or USUAL, options.fps
    if rate is None and told.vfr and options.output.suffix.lower() not in FORMATS:
        rate = told.fps * factor
    return Placing(told, factor, rate, steps)


def _identity(job: Job) -> dict[str, Any]:
    """All that decides the frames, so that parts of another run are not taken for this one's."""
    from vgen.record import versions

    told = {name: value for name, value in job.run.options.items() if name not in APART}
    inputs = list(job.run.facts["inputs"].values())
    return {**told, "input": inputs, "weights": job.run.checkpoint["files"], "versions": versions()}


def _say(job: Job, placing: Placing, kept: Parts) -> None:
    """What will be made, and what is there already."""
    told = placing.told
    job.out.say(f"{len(told.pts)} frames at {told.fps} fps to {placing.count} at {placing.fps} ...")
    if kept.changed:
        job.out.warning(f"the parts in {kept.folder} differ in {', '.join(kept.changed)} and are made anew.")
    elif kept.found:
        job.out.say(f"Going on with the {len(kept.found)} parts in {kept.folder}.")


def _facts(placing: Placing, met: Told, kept: Parts) -> dict[str, Any]:
    """What the record and the answer tell."""
    facts: dict[str, Any] = {"given": len(placing.told.pts), "frames": placing.count, "rate": str(placing.fps)}
    facts |= {"made": met.made, "still": met.still, "cuts": met.cuts, "parts_found": len(kept.found)}
    return facts


def _sheet(placing: Placing, kept: Parts) -> Path:
    """A picture with a row for some of the gaps: the given frame, those made, and the next given frame."""
    from torch.nn.functional import interpolate as resized

    from vgen.video_write import contact_sheet

    wide = min(COLUMNS, math.ceil(placing.fps / placing.told.fps) + 1, placing.count)
    rows = min(ROWS, placing.gaps)
    firsts = [min(placing.start(k * placing.gaps // rows), placing.count - wide) for k in range(rows)]
    wanted = [first + k for first in firsts for k in range(wide)]
    shown = {}
    for index, frame in enumerate(islice(kept.frames(), max(wanted) + 1)):
        if index in wanted:
            small = min(1.0, WIDE / frame.shape[1])
            size = [max(1, round(side * small)) for side in frame.shape[:2]]
            scaled = resized(frame.permute(2, 0, 1)[None].float(), size, mode="bilinear", antialias=True)
            shown[index] = scaled[0].permute(1, 2, 0).round().clamp(0, 255).byte()
    return contact_sheet([shown[index] for index in wanted], sheet_of(kept.output), columns=wide)

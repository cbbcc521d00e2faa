"""`vgen encode`: clips to a store of latents."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vgen.commands.prepare import Job
from vgen.errors import UsageError, VgenError

if TYPE_CHECKING:
    from vgen.encode import Encoded, Size
    from vgen.model import Model
    from vgen.store import Store


def run(job: Job) -> int:
    """Encode every input, print the store (with --json every clip); 3 if some inputs were set aside."""
    from vgen import clips
    from vgen.encode import embed_captions, encode
    from vgen.store import Store

    options = job.options
    if not options.inputs:
        raise UsageError("No input is given.", "Name clips, images, or folders of them.")
    items = clips.discover(options.inputs, options.captions)
    if not items:
        raise UsageError(f"No clip was found in: {', '.join(options.inputs)}.", "Check the paths.")
    model = job.card.loader()(job.folder(), job.found.checkpoint, job.machine())
    mend = (
        f"vgen encode {job.card.name} {' '.join(options.inputs)} --checkpoint {job.found.reference} -o ANOTHER_FOLDER"
    )
    store = Store.open(options.output, space=model.space, text_space=model.text_space, create=True, mend=mend)
    store.repair()
    with job.out.progress() as on_step:
        embed_captions(model, store, items, on_step)
        results = list(encode(model, store, items, sizes(options), options, on_step))
    return _report(job, model, store, results)


def sizes(options: Any) -> list[Size]:
    """The sizes (frames, height, width) that clips may have: --bucket, else the one of the three flags."""
    parsed = []
    for text in getattr(options, "bucket", []):
        numbers = text.lower().split("x")
        if len(numbers) != 3 or not all(n.isdigit() for n in numbers):
            raise UsageError(f"--bucket {text} is not FRAMESxHEIGHTxWIDTH.", "For example: --bucket 49x480x720")
        parsed.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
    return parsed or [(options.num_frames, options.height, options.width)]


def _report(job: Job, model: Model, store: Store, results: Sequence[Encoded]) -> int:
    """Say what became of the inputs."""
    options = job.options
    aside = [one for one in results if one.status == "set aside"]
    for one in aside:
        job.out.warning(f"set aside {one.source}: {one.reason}")
    if job.out.mode == "json":
        for one in results:
            job.out.object({"source": one.source, "key": one.key, "status": one.status, "psnr": one.psnr}, one.source)
    figures = [one.psnr for one in results if one.psnr is not None]
    facts: dict[str, Any] = {
        "clips": len(results) - len(aside),
        "new": sum(one.status == "encoded" for one in results),
        "set_aside": len(aside),
    }
    if figures:
        facts["psnr"] = round(statistics.fmean(figures), 2)
        job.out.say(f"Round trip: {facts['psnr']} dB mean, {min(figures):.2f} dB worst of {len(figures)}.")
    if options.contact_sheet:
        facts["contact_sheet"] = _sheet(job, model, store, [one.key for one in results if one.key])
    if options.verify:
        _verify(store)
    job.run.write(options.output, **facts)
    job.out.say(f"{facts['clips']} clips ({facts['new']} new), {len(aside)} set aside.")
    job.out.result(options.output, seconds=job.run.seconds, **facts)
    if aside and not facts["clips"]:
        raise VgenError("No input could be encoded.", f"See why in {options.output / 'set-aside.jsonl'}.")
    return 3 if aside else 0


def _verify(store: Store) -> None:
    """Hash every tensor of the store again. Raises VgenError where one has changed."""
    problems = store.verify()
    if problems:
        told = "; ".join(f"{key}: {', '.join(what)}" for key, what in list(problems.items())[:5])
        raise VgenError(f"{len(problems)} clips of {store.folder} are damaged: {told}.", "Encode them again.")


def _sheet(job: Job, model: Model, store: Store, keys: Sequence[str]) -> str:
    """A PNG with the first frames of up to 16 clips as the autoencoder gives them back."""
    from vgen.encode import as_latents
    from vgen.generate import decode
    from vgen.video_write import contact_sheet

    frames = []
    for key in keys[:16]:
        streams = {name: s[None] for name, s in store.get(key)[0].items()}
        frames.append(decode(model, as_latents(streams))[0][0])
    sizes_seen = {frame.shape for frame in frames}
    if len(sizes_seen) != 1:
        raise UsageError("A contact sheet needs clips of one size.", "Leave --contact-sheet out, or one --bucket.")
    return str(contact_sheet(frames, job.options.output / "sheet.png"))

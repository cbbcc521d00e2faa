"""`vgen train-lora`: train an adapter on latents; or, of ordinary clips, one for a motion of the camera."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen.commands.finetune import train, trained
from vgen.commands.prepare import Job
from vgen.errors import UsageError

if TYPE_CHECKING:
    from vgen.camera_data import Choice
    from vgen.model import Model


def run(job: Job) -> int:
    """Train the adapter and print its folder. Of a camera: 3 if one does not turn the camera as asked."""
    from vgen.lora import train_lora

    if not getattr(job.options, "camera", None):
        return train(job, train_lora)
    from vgen import camera_data

    words = camera_data.words(job.options.camera)
    plan = _planned(job, words)
    adapters = {word: job.options.output / word if len(words) > 1 else job.options.output for word in words}
    good = [_adapter(job, plan, word, adapters[word]) for word in words]
    return 0 if all(good) else 3


@dataclass(frozen=True)
class _Plan:
    """What is there before anything trains: a store for each word, and options of the samples to check with."""

    stores: dict[str, Path]
    samples: Sequence[Any]


def _planned(job: Job, words: Sequence[str]) -> _Plan:
    """Find the clips, make more, and encode them. All that was done by an earlier run is not done again."""
    from vgen import camera_check, camera_data
    from vgen.finetune import DATA, require_room

    options, folder = job.options, job.options.output / DATA
    for word in words:
        require_room(options.output / word if len(words) > 1 else options.output, options)
    items = camera_data.discover(options.data)
    told = camera_data.encoding(job.card, options, job.found.checkpoint)
    size = (told.num_frames, told.height, told.width)
    with job.out.progress() as on_step:
        found, aside = camera_data.survey(items, size, told.fps, folder / "motion.jsonl", on_step)
    for reason in aside:
        job.out.warning(f"left out {reason}")
    choice = camera_data.choose(
        found, words, synthesize=options.synthesize, least=options.min_clips, pictures=options.check_samples
    )
    pictures = camera_data.pictures(choice.pictures, size, told.fps, folder / "pictures")
    samples = camera_check.wanted(job.card, job.found.checkpoint, pictures, size, options.seed)
    if len(words) > 1:
        job.run.write(options.output)
    return _Plan({word: _stored(job, choice, word, told, folder / word, len(found)) for word in words}, samples)


def _stored(job: Job, choice: Choice, word: str, told: Any, folder: Path, total: int) -> Path:
    """The latents of the clips of one word."""
    from vgen import camera_data
    from vgen.store import Store

    options, size = job.options, (told.num_frames, told.height, told.width)
    kept = [one.item for one in choice.kept[word]]
    with job.out.progress() as on_step:
        made = camera_data.make(choice.sources, word, options.synthesize, size, told.fps, folder / "made", on_step)
    have = f"{len(kept)} of {total} clips show '{word}'"
    if len(kept) + len(made) < options.min_clips:
        raise UsageError(
            f"{have} and {len(made)} could be made; {options.min_clips} are needed.",
            "The still pictures have too little texture: give more --data, or lower --min-clips.",
        )
    shown = camera_data.sheet([*kept, *made], size, told.fps, folder / "kept.png")
    job.out.say(f"{have}, {len(made)} more were made; see {shown}.")
    if len(made) < options.synthesize:
        job.out.warning(f"{options.synthesize} were to be made: of some still pictures the motion cannot be read back.")
    model: Model = job.card.loader()(job.folder(), job.found.checkpoint, job.machine())
    mend = f"rm -r {shlex.quote(str(folder))}, and run it again"
    store = Store.open(folder / "latents", space=model.space, text_space=model.text_space, create=True, mend=mend)
    with job.out.progress() as on_step:
        results = camera_data.fill(model, store, [*kept, *made], size, told, on_step)
    for one in results:
        if one.status == "set aside":
            job.out.warning(f"set aside {one.source}: {one.reason}")
    return store.folder


def _adapter(job: Job, plan: _Plan, word: str, folder: Path) -> bool:
    """Train the adapter of one word, check it, print its folder; whether it is good."""
    from vgen import camera_check
    from vgen.finetune import sign
    from vgen.lora import MANIFEST, train_lora

    options, base = job.options, job.folder()
    resume = options.resume and (folder / "training" / "state.safetensors").exists()
    told = replace(options, data=[str(plan.stores[word])], output=folder, resume=resume)
    figures = trained(replace(job, options=told), train_lora)
    sign(folder / MANIFEST, {"summary": f"The motion of a camera: {word}", "camera": {"word": word}})
    facts: dict[str, Any] = {}
    if plan.samples:

        def load() -> Model:
            model: Model = job.card.loader()(base, job.found.checkpoint, job.machine())
            return model

        with job.out.progress() as on_step:
            facts = camera_check.check(job.card, load, base, folder, word, plan.samples, on_step)
        sign(folder / MANIFEST, {"camera": facts})
        job.run.write(folder, figures=figures, camera=facts)
        job.out.say(camera_check.told(facts))
        if not facts["good"]:
            job.out.warning(f"{folder} does not turn the camera as asked. {camera_check.mend(facts)}")
    job.out.result(folder, **{**figures, "camera": facts or {"word": word}, "seconds": job.run.seconds})
    return bool(facts.get("good", True))

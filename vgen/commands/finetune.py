"""`vgen finetune`, and what `vgen train-lora` shares with it: a training run, its record, and how to go on with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vgen.commands.prepare import Job


def run(job: Job) -> int:
    """Train the part and print the folder of the checkpoint."""
    from vgen.finetune import finetune

    return train(job, finetune)


def train(job: Job, act: Callable[..., dict[str, Any]]) -> int:
    """Train by `act`, which takes what `vgen.finetune.finetune` takes, and print the folder of what came of it."""
    figures = trained(job, act)
    job.out.result(job.options.output, **{**figures, "seconds": job.run.seconds})
    return 0


def trained(job: Job, act: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Train by `act` and return the figures of the last step.

    The record is written at the start too, so that a run that was killed can go on by it.
    """
    folder, output = job.folder(), job.options.output
    where = job.machine()
    model = job.card.loader()(folder, job.found.checkpoint, where)
    hooks = {
        "on_start": partial(job.run.write, output),
        "on_note": job.out.warning,
        "hashes": job.run.checkpoint.get("files"),
    }
    again = f"vgen {job.verb} {job.card.name} --config {output / 'run.toml'} --resume"
    try:
        with job.out.progress() as on_step:
            figures = act(job.card, model, folder, job.options, where, on_step, **hooks)
    except KeyboardInterrupt:
        if (output / "training" / "state.safetensors").exists():
            job.out.hint(f"The run is saved in {output / 'training'}. To go on: {again}")
        raise
    resumed = figures.pop("resumed", None)
    job.run.write(output, figures=figures, resumed=resumed)
    return figures

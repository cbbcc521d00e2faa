"""`vgen train-lora`: train an adapter on latents."""

from __future__ import annotations

from vgen.commands.prepare import Job


def run(job: Job) -> int:
    """Train the adapter and print its folder."""
    from vgen.lora import train_lora

    options = job.options
    folder = job.folder()
    where = job.machine()
    model = job.card.loader()(folder, job.found.checkpoint, where)
    with job.out.progress() as on_step:
        figures = train_lora(job.card, model, folder, options, where, on_step)
    job.run.write(options.output, figures=figures)
    job.out.result(options.output, **{**figures, "seconds": job.run.seconds})
    return 0

"""`vgen finetune`: train a part of a family on latents or clips."""

from __future__ import annotations

from vgen.commands.prepare import Job


def run(job: Job) -> int:
    """Train the part and print the folder of the checkpoint."""
    from vgen.finetune import finetune

    options = job.options
    folder = job.folder()
    where = job.machine()
    model = job.card.loader()(folder, job.found.checkpoint, where)
    with job.out.progress() as on_step:
        figures = finetune(job.card, model, folder, options, where, on_step)
    job.run.write(options.output, figures=figures)
    job.out.result(options.output, **{**figures, "seconds": job.run.seconds})
    return 0

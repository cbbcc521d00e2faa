"""`vgen finetune`: train a part of a family on latents or clips."""

from __future__ import annotations

from vgen.commands.prepare import Job


def run(job: Job) -> int:
    """Train the part and print the folder of the checkpoint."""
    from vgen.train import finetune  # LEAD: to be adapted to vgen/train.py

    with job.out.progress() as on_step:
        figures = finetune(job.card, job.found, job.options, on_step)
    job.run.write(job.options.output, figures=figures)
    job.out.result(job.options.output, seconds=job.run.seconds, **figures)
    return 0

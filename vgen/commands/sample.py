"""`vgen sample`: text, and whatever a family adds, to clips."""

from __future__ import annotations

from vgen.commands.prepare import Job


def run(job: Job) -> int:
    """Make the clips and print their paths."""
    from vgen.generate import sample  # LEAD: to be adapted to vgen/generate.py

    with job.out.progress() as on_step:
        paths = sample(job.card, job.found, job.options, on_step)
    for path in paths:
        job.run.write(path)
        job.out.result(path, seed=job.options.seed, checkpoint=job.found.reference, seconds=job.run.seconds)
    return 0

"""`vgen encode`: clips to a store of latents."""

from __future__ import annotations

from vgen.commands.prepare import Job


def run(job: Job) -> int:
    """Encode every input and print the store; 3 if some inputs were skipped."""
    from vgen.generate import encode  # LEAD: to be adapted to the store

    with job.out.progress() as on_step:
        skipped = encode(job.card, job.found, job.options, on_step)
    for path, reason in skipped:
        job.out.warning(f"skipped {path}: {reason}")
    job.run.write(job.options.output)
    job.out.result(job.options.output, seconds=job.run.seconds, skipped=[str(path) for path, _ in skipped])
    return 3 if skipped else 0

"""`--dry-run --cost`: what a clip would take, from the configurations of the checkpoint alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vgen.errors import UsageError, VgenError

if TYPE_CHECKING:
    from vgen.commands.prepare import Job


def bill(job: Job) -> dict[str, Any]:
    """The bill of the clips that a job would make. Imports torch. Raises UsageError, VgenError."""
    if job.verb != "sample":
        raise UsageError(f"--cost tells what a clip takes; '{job.verb}' makes none.", "Ask: vgen sample ... --cost")
    if job.found.folder is None:
        do = f"Fetch it: vgen checkpoints pull {job.found.reference}"
        raise VgenError(f"The configurations of {job.found.reference} are not on this disk.", do)
    import torch

    from vgen import cost
    from vgen.machine import Machine

    asked = job.machine()
    model = job.card.loader()(job.folder(), job.found.checkpoint, Machine(torch.device("meta"), asked.dtype))
    tell = getattr(model, "cost", None)
    if tell is None:
        raise UsageError(f"'{job.card.name}' does not tell what its clips take.", "Leave --cost out.")
    with torch.no_grad():
        return cost.report(tell(replace(job.options, compile=False)), offload=asked.offload)

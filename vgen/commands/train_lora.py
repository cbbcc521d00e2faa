"""`vgen train-lora`: train an adapter on latents."""

from __future__ import annotations

from vgen.commands.finetune import train
from vgen.commands.prepare import Job


def run(job: Job) -> int:
    """Train the adapter and print its folder."""
    from vgen.lora import train_lora

    return train(job, train_lora)

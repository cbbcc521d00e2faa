"""Errors in the user's words: which can be mended and how, and what becomes of the others."""

from __future__ import annotations

import traceback
from dataclasses import fields

from vgen.commands.output import complain
from vgen.commands.quiet import debugging
from vgen.errors import VgenError
from vgen.files import FULL

SAVERS = {  # what lessens memory, cheapest first, by the option that must exist
    "vae_tiling": "--vae-tiling",
    "cpu_offload": "--cpu-offload",
    "gradient_checkpointing": "--gradient-checkpointing",
    "batch_size": "--batch-size 1",
    "train_batch_size": "--train-batch-size 1",
    "mixed_precision": "--mixed-precision bf16",
    "num_frames": "fewer --num-frames",
    "height": "a smaller --height",
}


def explain(error: Exception, options: object | None = None) -> Exception:
    """A VgenError for what a user can mend: no memory, no space, no right; any other error as it is."""
    if isinstance(error, (VgenError, BrokenPipeError)):
        return error
    if _out_of_memory(error):
        names = {f.name for f in fields(options)} if options else set()  # type: ignore[arg-type]
        flags = [text for name, text in SAVERS.items() if name in names or not options][:3]
        first = str(error).partition("\n")[0]
        return VgenError(f"Out of memory. {first}", f"Cheapest first, try: {', '.join(flags)}.")
    if isinstance(error, OSError) and error.errno:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in FULL:
            return VgenError(f"No space is left on the device{where}.", "Free some, or choose another place with -o.")
        return VgenError(f"{error.strerror}{where}.", "Check the path and the right to use it.")
    return error


def _out_of_memory(error: BaseException) -> bool:
    """Whether the error is torch's (any device's), Python's or the allocator's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    told = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in told or "can't allocate memory" in told)


def report(error: Exception) -> int:
    """Say what happened on stderr and return the exit code."""
    error = explain(error)
    if debugging():
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        return 1
    if isinstance(error, VgenError):
        complain(str(error))
        return error.exit_code
    complain(f"unexpected {type(error).__name__}: {error}\n  Please report it; VGEN_DEBUG=1 shows the traceback.")
    return 1

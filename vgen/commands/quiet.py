"""Keeps other libraries' start-up noise off the terminal; VGEN_DEBUG=1 lets it through."""

from __future__ import annotations

import logging
import os
import warnings

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "huggingface_hub", "kernels")
SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def debugging() -> bool:
    """Whether VGEN_DEBUG asks for tracebacks and for what other libraries say."""
    return os.environ.get("VGEN_DEBUG", "") not in ("", "0")


def hush(bars: bool = False) -> None:
    """Quieten other libraries. Call it before they are imported; a variable that is already set is left alone.

    `bars` leaves the Hub its progress bars, for a download that someone watches.
    """
    if debugging():
        return
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", kind)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")

"""`vgen doctor`: what is installed, what the machine can do, and what to do about the rest."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from vgen import __version__, cache
from vgen.commands.families import Json, Quiet
from vgen.commands.output import Out, mode
from vgen.commands.quiet import hush
from vgen.errors import VgenError
from vgen.family import family, installed
from vgen.files import cache_folder

EXAMPLES = ("vgen doctor", "vgen doctor --json")
CODECS = {"h264": "libx264", "vp9": "libvpx-vp9", "av1": "libsvtav1"}  # decoder: the encoder we would use
Fact = tuple[str, Any, str]  # what, its state, what to do (or nothing)


def run(json: Json = False, quiet: Quiet = False) -> None:
    """Show what is installed, which accelerator and codecs there are, cache sizes, and what to do."""
    hush()
    out = Out(mode(json, quiet), silent=quiet)
    checks: tuple[Callable[[], Iterator[Fact]], ...] = (_system, _accelerator, _packages, _codecs, _disk, _families)
    facts = [fact for check in checks for fact in check()]
    if json:
        todo = [do for _, _, do in facts if do]
        out.object({**{name: state for name, state, _ in facts}, "todo": todo}, "")
        return
    out.table(
        [{"name": name, "state": state, "do": f"-> {do}" if do else ""} for name, state, do in facts],
        ("name", "state", "do"),
    )


def _system() -> Iterator[Fact]:
    yield "vgen", __version__, ""
    yield "python", f"{platform.python_version()} ({sys.executable})", ""
    yield "platform", platform.platform(), ""
    yield "cpus", os.cpu_count(), ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield (
            "memory",
            _gib(total),
            "" if total > 8 << 30 else "less than 8 GiB: the demo checkpoints run, full models do not",
        )


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _accelerator() -> Iterator[Fact]:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        yield "accelerator", f"torch does not import: {error}", "pip install torch"
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            told = torch.cuda.get_device_properties(index)
            yield f"cuda:{index}", f"{told.name}, {_gib(told.total_memory)}", ""
    elif torch.backends.mps.is_available():
        yield "mps", "Apple GPU", ""
    else:
        built = torch.version.cuda or torch.version.hip
        do = (
            "install a GPU driver"
            if built
            else "for an NVIDIA GPU install a CUDA build of torch: pytorch.org/get-started"
        )
        yield "accelerator", "none; the CPU is used", do


def _packages() -> Iterator[Fact]:
    for line in requires("vgen") or []:
        need, _, marker = line.partition(";")
        if "extra ==" in marker:
            continue
        name = need.strip().split(">")[0].split("[")[0].strip()
        try:
            yield name, version(name), ""
        except PackageNotFoundError:
            optional = "(this platform does without)" if marker else ""
            yield name, f"not installed {optional}".strip(), "" if optional else f'pip install "{need.strip()}"'


def _codecs() -> Iterator[Fact]:
    try:
        av: Any = importlib.import_module("av")
    except ImportError as error:
        yield "codecs", f"PyAV does not import: {error}", "pip install av"
        return
    for name, encoder in CODECS.items():
        can = [word for word, codec, how in (("read", name, "r"), ("write", encoder, "w")) if _has(av, codec, how)]
        missing = "" if len(can) == 2 else "pip install --force-reinstall av (its wheels bring the codecs)"
        yield f"codec {name}", " and ".join(can) or "none", missing


def _has(av: Any, name: str, how: str) -> bool:
    try:
        av.codec.Codec(name, how)
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def _disk() -> Iterator[Fact]:
    for name, folder in (("HF_HOME", cache.home()), ("vgen cache (VGEN_HOME)", cache_folder())):
        held = _gib(cache.size(folder)) if folder.is_dir() else "empty"
        yield name, f"{folder} ({held})", ""
    there = next(p for p in (cache.hub(), *cache.hub().parents) if p.exists())
    free = shutil.disk_usage(there).free
    yield "free disk", f"{_gib(free)} at {there}", "" if free > 30 << 30 else "a full model needs up to 30 GiB"
    yield "free disk here", _gib(shutil.disk_usage(Path.cwd()).free), ""


def _families() -> Iterator[Fact]:
    for name in installed():
        try:
            card = family(name)
        except VgenError as error:
            yield f"family {name}", error.message, error.do
            continue
        demo = (
            "with a demo" if card.demo and not cache.missing(card.demo) else "no demo checkpoint in this installation"
        )
        yield f"family {card.name}", f"{', '.join(card.verbs)}; {demo}", ""

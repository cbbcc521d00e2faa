"""What a checkpoint may hold: names that stay inside their folder, files that only carry data, nothing that runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from vgen.cache import ADAPTER, PICKLES, read_json
from vgen.errors import VgenError

DATA = (".safetensors", ".json", ".txt", ".model", ".md", ".png", ".gif", ".mp4")
PLAIN = ("LICENSE", "NOTICE", ".gitattributes")  # data that has no extension
LIBRARIES = ("diffusers", "transformers", "vgen")  # whose classes a model_index.json may name


def escapes(name: str) -> bool:
    """Whether a path of a repository or an archive leads out of its folder, or could on some system."""
    drive = name[1:2] == ":"
    return not name.isprintable() or drive or "\\" in name or any(part in ("", ".", "..") for part in name.split("/"))


def odd(names: Iterable[str]) -> list[str]:
    """Those of the files that are not of a kind that only carries data."""
    return [name for name in names if PurePosixPath(name).name not in PLAIN and not name.lower().endswith(DATA)]


def pickled(names: Iterable[str]) -> list[str]:
    """Pickled weights of networks (folders with a config.json) that are not there in safetensors too."""
    files = {PurePosixPath(name) for name in names}
    safe = {path.parent for path in files if path.suffix == ".safetensors"}
    networks = {path.parent for path in files if path.name == "config.json"}
    networks |= {PurePosixPath()} if not {path.name for path in files} & {"model_index.json", ADAPTER} else set()
    return sorted(str(p) for p in files if p.suffix in PICKLES and p.parent in networks - safe)


def code(folder: Path) -> Iterator[str]:
    """What in the configurations below a folder asks for code of its own, one sentence each."""
    for path in sorted((*folder.glob("*.json"), *folder.glob("*/*config.json"))):
        if path.name != "model_index.json" and not path.name.endswith("config.json"):
            continue
        told, name = read_json(path), path.relative_to(folder)
        if "auto_map" in told:
            yield f"{name} asks for code of its own (auto_map)"
        if path.name == "model_index.json":
            yield from _foreign(told)


def _foreign(index: Mapping[str, object]) -> Iterator[str]:
    """Components of a model_index.json that are not of a known library, and a pipeline that is a file."""
    for part, told in index.items():
        pair = told if isinstance(told, list) and len(told) == 2 else None
        if part == "_class_name" and pair:
            yield f"model_index.json asks for a pipeline of its own ({pair[0]})"
        elif pair and isinstance(pair[0], str) and pair[0].partition(".")[0] not in LIBRARIES:
            yield f"model_index.json asks for {part} from '{pair[0]}', which is none of {', '.join(LIBRARIES)}"


def refuse_code(folder: Path, what: str) -> None:
    """Refuse a folder whose configurations ask for code. Raises VgenError that names the file."""
    for fault in code(folder):
        raise VgenError(f"{what} is refused: {fault}.", "vgen runs no code that comes with weights.")


def refuse_names(names: Iterable[str], what: str) -> None:
    """Refuse a listing with a path that leads out, or with weights that are only pickled. Raises VgenError."""
    every = list(names)
    for name in filter(escapes, every):
        raise VgenError(
            f"{what} is refused: it holds the path {name!r}, which leads out of its folder.", "Do not use it."
        )
    for name in pickled(every):
        raise VgenError(
            f"{what} is refused: the weights {name} are pickled, which can run any code when they are read.",
            "Look for a revision in safetensors, or convert them: save_pretrained(..., safe_serialization=True).",
        )

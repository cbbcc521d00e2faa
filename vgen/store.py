"""A store: a folder of encoded clips that grows atomically, resumes after kill -9, and packs into few files.

    store.json                      what it holds; never changes
    loose/ab/<key>.safetensors      one clip each; any number of processes may add
    packs/<id>.safetensors          many clips each; never change, named by their content
    texts/ab/<key>.safetensors      text embeddings, each text once

The key of a clip is a hash of its source, its transform and its autoencoder: the same key is the same work, so a run
resumes by skipping keys that are there, and stores of one space merge by copying files. A pack's header is its index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vgen import __version__, latents, tensorfile
from vgen.embeddings import Embeddings
from vgen.errors import VgenError
from vgen.files import NoFile, alone, delete, explained, replacing, sweep
from vgen.latents import FORMAT, Space
from vgen.tensorfile import Damaged, Header, dumps

if TYPE_CHECKING:
    from torch import Tensor

KEY = re.compile(r"[0-9a-f]{32}")
PACK_BYTES = 512 << 20
MEND = "vgen encode FAMILY INPUT... -o ANOTHER_FOLDER"
T = TypeVar("T")


def key(source_sha256: str, transform: Mapping[str, Any], space_id: str) -> str:
    """The key of a clip, 32 hex digits: its source's content, exact transform (frames, crop ...) and space."""
    return hashlib.sha256(dumps([source_sha256, transform, space_id]).encode()).hexdigest()[:32]


class Store:
    """A folder of encoded clips of one latent space and one text encoder. Open it with `Store.open`."""

    def __init__(self, folder: Path, space: Space, text_space: str | None) -> None:
        self.folder, self.space, self.text_space = folder, space, text_space
        self.texts = Embeddings(folder / "texts", text_space or "")
        self._packs: dict[Path, Header] = {}

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        space: Space | None = None,
        text_space: str | None = None,
        create: bool = False,
        mend: str = MEND,
    ) -> Store:
        """The store in a folder, made there when `create` says so and it is empty.

        `space` and `text_space` are what the caller needs; a store of others is refused with a VgenError that shows
        both and `mend`, the command that makes the right one.
        """
        path = folder / "store.json"
        if create and not path.exists():
            if space is None:
                raise ValueError("a new store needs a space")
            _create(path, space, text_space)
        told = _told(path)
        store = cls(folder, Space.from_dict(told["space"]), told["text_space"])
        if space is not None:
            latents.require(store.space, space, mend)
        if text_space is not None and store.text_space != text_space:
            raise VgenError(
                f"The texts of {folder} were embedded by '{store.text_space}'; the model needs '{text_space}'.",
                f"Encode again with: {mend}",
            )
        return store

    # Clips

    def put(self, clip_key: str, streams: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Add a clip; one that is there already stays. Raises VgenError, for streams that are not finite too."""
        _check_key(clip_key)
        if clip_key in self:
            return
        latents.require(record.get("space", self.space), self.space, MEND)
        for name, tensor in streams.items():
            if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                raise VgenError(
                    f"The stream '{name}' of clip {clip_key} holds NaN or infinity.", "Encode with --dtype fp32."
                )
        told = {**record, "key": clip_key, "space": self.space, "text_space": self.text_space}
        latents.write(self._loose(clip_key), streams, told)

    def __contains__(self, clip_key: str) -> bool:
        if self._packed(clip_key) or self._loose(clip_key).exists():
            return True
        self._refresh()
        return self._packed(clip_key) is not None

    def keys(self) -> list[str]:
        """The keys of all clips, sorted."""
        loose = set(self._loose_keys())  # first: what is packed meanwhile is then found in a pack
        self._refresh()
        return sorted(loose.union(*(head.record["clips"] for head in self._packs.values())))

    def __len__(self) -> int:
        return len(self.keys())

    def get(self, clip_key: str, *, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The streams and the record of a clip. Raises VgenError, and Damaged for bytes that changed."""
        return self._with(clip_key, lambda head: latents.clip(head, clip_key, check=check))

    def record(self, clip_key: str) -> dict[str, Any]:
        """The record of a clip, with dtype and shape of its streams under "tensors". Torch-free."""
        return self._with(clip_key, lambda head: latents.record_of(head, clip_key))

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all clips, by key."""
        return map(self.record, self.keys())

    # Texts

    def put_text(self, caption: str, tensors: Mapping[str, Tensor]) -> None:
        """Add the embedding of a caption, unpadded; one that is there already stays. Raises VgenError."""
        if self.text_space is None:
            raise VgenError(f"{self.folder} was made without a text encoder.", f"Encode again with: {MEND}")
        if not self.has_text(caption):
            self.texts.put(caption, tensors)

    def has_text(self, caption: str) -> bool:
        """Whether the embedding of a caption is there."""
        return self.texts.path(caption).exists()

    def text(self, caption: str) -> dict[str, Tensor]:
        """The embedding of a caption. Raises VgenError where there is none, and Damaged."""
        return self.texts.load(caption)

    # Care

    def pack(self, target_bytes: int = PACK_BYTES) -> list[Path]:
        """Move loose clips into packs of about `target_bytes`; gives the new packs.

        Others may read and write meanwhile, and a kill at any moment loses nothing. Raises Damaged for a damaged clip.
        """
        with alone(self.folder):
            self._refresh()
            made, group, size = [], [], 0
            for clip_key in self._loose_keys():
                if self._packed(clip_key):
                    self._unlink([clip_key])
                    continue
                group.append(clip_key)
                size += self._loose(clip_key).stat().st_size
                if size >= target_bytes:
                    made.append(self._pack(group))
                    group, size = [], 0
            return [*made, self._pack(group)] if group else made

    def verify(self) -> dict[str, list[str]]:
        """What is wrong, by the key of the clip or, for texts and unreadable files, by file name. Torch-free."""
        problems: dict[str, list[str]] = {}
        for path in self._files():
            try:
                head = latents.open_file(path)
                for clip_key in head.record["clips"]:
                    wrong = tensorfile.verify(head, latents.names_of(head, clip_key).values())
                    if wrong:
                        problems.setdefault(clip_key, []).extend(wrong)
            except NoFile:
                continue  # packed meanwhile
            except Damaged as error:
                problems[str(path.relative_to(self.folder))] = [error.message]
        for path in sorted((self.folder / "texts").glob("??/*.safetensors")):
            try:
                wrong = tensorfile.verify(tensorfile.header(path))
            except Damaged as error:
                wrong = [error.message]
            if wrong:
                problems[str(path.relative_to(self.folder))] = wrong
        return problems

    def repair(self) -> list[str]:
        """Bring the store back to what can be trusted; says what was done, one line each.

        Removes what killed writers left, loose copies of packed clips, and damaged clips and texts: the next encode
        makes them again. A file that cannot be read at all is kept under the name "<name>.damaged".
        """
        done = [f"removed {path} of a killed writer" for path in sweep(self.folder)]
        problems = self.verify()
        damaged = [name for name in problems if KEY.fullmatch(name)]
        with alone(self.folder):
            for name in problems.keys() - set(damaged):
                path = self.folder / name
                with explained(f"rename {path}"):
                    path.replace(path.with_name(path.name + ".damaged"))
                done.append(f"set aside {path} as {path.name}.damaged")
            self._refresh()
            twice = [one for one in self._loose_keys() if self._packed(one)]
            self._unlink(twice)
        self.remove(damaged)
        done += [f"removed the damaged clip {one}" for one in damaged]
        return done + [f"removed the loose copy of the packed clip {one}" for one in twice]

    def remove(self, keys: Iterable[str]) -> None:
        """Remove clips, also from packs, which are then written again without them."""
        gone = set(keys)
        with alone(self.folder):
            self._unlink(gone)
            self._refresh()
            for path, head in list(self._packs.items()):
                stay = [one for one in head.record["clips"] if one not in gone]
                if len(stay) == len(head.record["clips"]):
                    continue
                if stay:
                    self._write_pack(dict.fromkeys(stay, head))
                delete(path)
            self._refresh()

    # Inside

    def _loose(self, clip_key: str) -> Path:
        _check_key(clip_key)
        return self.folder / "loose" / clip_key[:2] / f"{clip_key}.safetensors"

    def _loose_keys(self) -> list[str]:
        return sorted(p.stem for p in (self.folder / "loose").glob("??/*.safetensors") if KEY.fullmatch(p.stem))

    def _files(self) -> list[Path]:
        loose = [self._loose(one) for one in self._loose_keys()]
        return loose + sorted((self.folder / "packs").glob("*.safetensors"))

    def _refresh(self) -> None:
        """Read the headers of packs that are new, forget those that are gone."""
        found = {}
        for path in sorted((self.folder / "packs").glob("*.safetensors")):
            with contextlib.suppress(NoFile):
                found[path] = self._packs.get(path) or latents.open_file(path)
        self._packs = found

    def _packed(self, clip_key: str) -> Header | None:
        """The header of the pack that is known to hold a clip."""
        return next((head for head in self._packs.values() if clip_key in head.record["clips"]), None)

    def _with(self, clip_key: str, use: Callable[[Header], T]) -> T:
        """use(header of the file that holds a clip), again from the start when another process moved the clip."""
        for _ in range(4):
            try:
                return use(self._packed(clip_key) or latents.open_file(self._loose(clip_key)))
            except NoFile:
                self._refresh()
        raise NoFile(f"There is no clip {clip_key} in {self.folder}.", f"Encode it again with: {MEND}")

    def _pack(self, keys: list[str]) -> Path:
        """Copy loose clips into one pack, then delete them."""
        path = self._write_pack({one: latents.open_file(self._loose(one)) for one in keys})
        self._unlink(keys)
        return path

    def _write_pack(self, heads: Mapping[str, Header]) -> Path:
        clips = {
            one: (
                {name: tensorfile.copied(head, full) for name, full in latents.names_of(head, one).items()},
                head.record["clips"][one],
            )
            for one, head in heads.items()
        }
        told = {one: [latents.record_of(head, one)] for one, head in heads.items()}
        name = hashlib.sha256(dumps(told).encode()).hexdigest()[:32]
        path = self.folder / "packs" / f"{name}.safetensors"
        latents.write_clips(path, clips)
        return path

    def _unlink(self, keys: Iterable[str]) -> None:
        for one in keys:
            delete(self._loose(one))


def _check_key(clip_key: str) -> None:
    if not KEY.fullmatch(clip_key):
        raise VgenError(f"{clip_key!r} is not the key of a clip: 32 hex digits.", "Make it with vgen.store.key.")


def _create(path: Path, space: Space, text_space: str | None) -> None:
    """Write store.json unless another process did so first."""
    others = [p.name for p in path.parent.iterdir() if not p.name.startswith(".")] if path.parent.is_dir() else []
    if others and not path.exists():
        raise VgenError(f"{path.parent} is neither empty nor a latent store.", "Choose another folder.")
    told = {
        "format": FORMAT,
        "space": space.to_dict(),
        "text_space": text_space,
        "created_by": f"vgen {__version__}",
    }
    with replacing(path, keep=True) as file:
        file.write((json.dumps(told, indent=2, sort_keys=True) + "\n").encode())


def _told(path: Path) -> dict[str, Any]:
    """store.json. Raises VgenError."""
    try:
        with explained(f"open the latent store {path.parent}"):
            told = json.loads(path.read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise VgenError(f"{path.parent} has the format {told['format']}, not {FORMAT}.", f"Encode again: {MEND}")
        return {"space": told["space"], "text_space": told["text_space"], "created_by": told["created_by"]}
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is damaged.", f"Encode again: {MEND}") from error


def describe(folder: Path) -> dict[str, Any]:
    """A summary of a store, without torch: space, shapes, counts of clips, captions, texts, bytes. Raises VgenError."""
    store = Store.open(folder)
    shapes: Counter[str] = Counter()
    clips = captioned = 0
    for record in store.records():
        clips += 1
        captioned += bool(record.get("captions"))
        shapes.update(f"{name} {'x'.join(map(str, t['shape']))} {t['dtype']}" for name, t in record["tensors"].items())
    texts = list((folder / "texts").glob("??/*.safetensors"))
    files = store._files()
    return {
        "folder": str(folder),
        "format": FORMAT,
        "space": store.space.id,
        "text_space": store.text_space,
        "clips": clips,
        "captioned": captioned,
        "texts": len(texts),
        "packs": len(store._packs),
        "shapes": dict(sorted(shapes.items())),
        "bytes": sum(path.stat().st_size for path in files + texts),
    }

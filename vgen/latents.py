"""The latent file: the space that latents live in, and one way to write, read and check them.

A file holds one clip or several. A clip is named streams, [C, T, H, W] where they are video latents, and a record of
everything needed to use them again. Common streams: `mean` and `logvar` of the autoencoder's posterior, or `latents`;
`content`, `motion_x`, `motion_y`; `cond_image_mean`. Latents are stored as the autoencoder gave them, unscaled.

Common fields of the record: space, text_space, fps (a fraction), pts (seconds), source {uri, sha256, bytes, codec,
container}, orig_hw, resize_hw, crop_xyxy, flip, rotation, captions, posterior, decoder, seconds, check {psnr}.
A file of one clip names its tensors "<stream>", a file of several "<key>/<stream>".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import tensorfile
from vgen.errors import VgenError
from vgen.files import cache_folder, explained, replacing
from vgen.tensorfile import Damaged, Header, Source, digest, dumps

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

FORMAT = "vgen-latents/1"
WEIGHTS = ("diffusion_pytorch_model", "model")
SAME_OUTPUT = {  # configuration that does not change what an autoencoder or encoder gives
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "sample_size",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "architectures",
}


@dataclass(frozen=True)
class Space:
    """What latents mean: which autoencoder made them, and how the denoiser wants them scaled.

    `strides` are pixels per latent over (t, h, w). `hash` identifies the weights (`file_hash`). Two spaces are the same
    when their `id` is: scaling is the model's own affair, since files are unscaled.
    """

    name: str
    channels: int
    strides: tuple[int, int, int]
    scaling_factor: float = 1.0
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    hash: str = ""

    @property
    def id(self) -> str:
        """The name and the first 16 digits of the hash; the name alone where there are no weights (pixels)."""
        return f"{self.name}:{self.hash[:16]}" if self.hash else self.name

    def to_dict(self) -> dict[str, Any]:
        """The space as JSON."""
        return json.loads(dumps(asdict(self)))

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Space:
        """The space that `to_dict` gave. Raises VgenError."""
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise VgenError(f"This is not a latent space: {dumps(told)[:200]}.") from error


def require(found: Space | Mapping[str, Any], wanted: Space, mend: str) -> None:
    """Refuse latents of another space. `mend` is the command that makes them anew. Raises VgenError with both ids."""
    have = found if isinstance(found, Space) else Space.from_dict(found)
    if have.id != wanted.id:
        raise VgenError(
            f"These latents are of the space '{have.id}'; the model needs '{wanted.id}'.", f"Encode again with: {mend}"
        )


def _statistics(space: Space, z: Tensor) -> tuple[Any, Any]:
    """Shift and factor that take unscaled latents to scaled ones: (z - shift) * factor."""
    shift: Any = space.shift_factor or 0.0
    factor: Any = space.scaling_factor
    if space.latents_mean is not None:
        shift = shift + z.new_tensor(space.latents_mean).view(-1, 1, 1, 1)
    if space.latents_std is not None:
        factor = factor / z.new_tensor(space.latents_std).view(-1, 1, 1, 1)
    return shift, factor


def scale(space: Space, z: Tensor) -> Tensor:
    """Latents as stored to latents as the denoiser takes them. [..., C, T, H, W] where statistics are per channel."""
    shift, factor = _statistics(space, z)
    return (z - shift) * factor


def unscale(space: Space, z: Tensor) -> Tensor:
    """The inverse of `scale`: what the denoiser gives, to what is stored and decoded."""
    shift, factor = _statistics(space, z)
    return z / factor + shift


def sample_posterior(streams: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
    """Unscaled latents of a clip or a batch: a draw from mean and logvar, else the mean, else what was stored.

    The draw is made in float32 on the generator's device. Raises VgenError where there is none of the three.
    """
    import torch

    if "mean" in streams and "logvar" in streams:
        mean, logvar = streams["mean"], streams["logvar"].float().clamp(-30.0, 20.0)
        device = generator.device if generator is not None else mean.device
        noise = torch.randn(mean.shape, generator=generator, device=device).to(mean.device)
        return (mean.float() + torch.exp(0.5 * logvar) * noise).to(mean.dtype)
    for name in ("mean", "latents"):
        if name in streams:
            return streams[name]
    raise VgenError(f"There is no 'mean' and no 'latents' among the streams: {', '.join(sorted(streams)) or 'none'}.")


# The identity of weights


def _combined(hashes: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """One hash of tensors and of the configuration that changes what they give."""
    kept = {key: value for key, value in config.items() if key not in SAME_OUTPUT and not key.startswith("_")}
    return hashlib.sha256(dumps([sorted(hashes.items()), kept]).encode()).hexdigest()


def tensor_hash(weights: nn.Module | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> str:
    """The identity of weights in memory: SHA-256 over name, dtype, shape and bytes of every tensor, and the config.

    Nothing is cast, so half and full precision copies differ: they give different latents. Equal to `file_hash` of the
    checkpoint when the weights are in memory as they are stored.
    """
    state = weights if isinstance(weights, Mapping) else weights.state_dict()
    hashes = {}
    for name, tensor in state.items():
        one = tensorfile.source(tensor)
        hashes[name] = f"{one.dtype} {list(one.shape)} {one.sha256}"
    return _combined(hashes, config or {})


def file_hash(where: Path, *, variant: str | None = None) -> str:
    """The identity of weights as stored: of a safetensors file, or of a diffusers or transformers folder.

    A folder's config.json counts, less what does not change the output. `variant` picks "<name>.<variant>.safetensors".
    Streams the files; the answer is kept in the cache folder by path, size and time. Raises NoFile, Damaged, VgenError.
    """
    files = [where] if where.is_file() else _weight_files(where, variant)
    configs = [] if where.is_file() else [path for path in [where / "config.json"] if path.exists()]
    with explained(f"read {where}"):
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files + configs]
    kept = cache_folder() / "hashes" / hashlib.sha256(dumps(stats).encode()).hexdigest()[:32]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        answer = kept.read_text(encoding="ascii")
        if len(answer) == 64:
            return answer
    hashes = {}
    for head in map(tensorfile.header, files):
        for name, entry in head.entries.items():
            hashes[name] = f"{entry.dtype} {list(entry.shape)} {digest(tensorfile.chunks(head, name))}"
    answer = _combined(hashes, _settings(configs[0]) if configs else {})
    with contextlib.suppress(VgenError), replacing(kept) as file:  # without the cache it is computed again
        file.write(answer.encode())
    return answer


def _settings(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint. Raises Damaged, VgenError."""
    try:
        with explained(f"read {path}"):
            told = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(told, dict):
            return told
    except ValueError as error:
        raise Damaged(f"{path} is not JSON: {error}.", "Fetch the checkpoint again.") from error
    raise Damaged(f"{path} is not a JSON object.", "Fetch the checkpoint again.")


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of a model folder: one file, or the shards that the index names."""
    end = f".{variant}.safetensors" if variant else ".safetensors"
    for stem in WEIGHTS:
        if (folder / (stem + end)).exists():
            return [folder / (stem + end)]
        index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
        if index.exists():
            shards = _settings(index).get("weight_map", {}).values()
            return [folder / Path(name).name for name in sorted(set(shards))]
    alone = sorted(folder.glob("*.safetensors"))
    if len(alone) == 1 and not variant:
        return alone
    raise VgenError(
        f"{folder} does not hold one set of safetensors weights.", "Name the file, or fetch the checkpoint again."
    )


# The file


def write(path: Path, streams: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Write one clip, atomically; equal content gives equal bytes. Raises VgenError, for a full disk too.

    `record` may hold a Space, Fractions and all that JSON can say; its "key", where it has one, names the clip.
    """
    sources = {name: tensorfile.source(tensor) for name, tensor in streams.items()}
    write_clips(path, {str(record.get("key") or _content_key(sources)): (sources, record)})
    return path


def _content_key(sources: Mapping[str, Source]) -> str:
    told = {name: [one.dtype, list(one.shape), one.sha256] for name, one in sources.items()}
    return hashlib.sha256(dumps(told).encode()).hexdigest()[:32]


def write_clips(path: Path, clips: Mapping[str, tuple[Mapping[str, Source], Mapping[str, Any]]]) -> None:
    """Write a file of clips, given by key, atomically. Raises VgenError."""
    sources, records = {}, {}
    for key, (streams, record) in clips.items():
        kept = {name: value for name, value in record.items() if name not in ("key", "tensors")}
        if isinstance(kept.get("space"), Space):
            kept["space"] = kept["space"].to_dict()
        records[key] = {**kept, "streams": sorted(streams)}
        for name, one in streams.items():
            sources[name if len(clips) == 1 else f"{key}/{name}"] = one
    tensorfile.save(path, sources, {"format": FORMAT, "clips": records})


def open_file(path: Path) -> Header:
    """The header of a latent file, checked. Torch-free. Raises NoFile, Damaged, VgenError."""
    head = tensorfile.header(path)
    if head.record.get("format") != FORMAT:
        told = head.record.get("format", "no vgen file")
        raise VgenError(f"{path} is not a latent file of this vgen ({told} instead of {FORMAT}).", "Encode it again.")
    clips = head.record.get("clips")
    names = [name for key in clips for name in names_of(head, key).values()] if isinstance(clips, dict) else []
    if sorted(names) != sorted(head.entries):
        raise Damaged(f"{path}: its records and its tensors do not agree.", "Encode it again.")
    return head


def names_of(head: Header, key: str) -> dict[str, str]:
    """The streams of a clip, and the names of their tensors in the file."""
    clips = head.record["clips"]
    return {name: name if len(clips) == 1 else f"{key}/{name}" for name in clips[key]["streams"]}


def record_of(head: Header, key: str) -> dict[str, Any]:
    """The record of a clip, with its "key" and, under "tensors", dtype, shape and sha256 of each stream."""
    told = {name: (head.entries[full], head.sha256[full]) for name, full in names_of(head, key).items()}
    tensors = {name: {"dtype": e.dtype, "shape": list(e.shape), "sha256": sha} for name, (e, sha) in told.items()}
    return {**head.record["clips"][key], "key": key, "tensors": tensors}


def clip(head: Header, key: str, *, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The streams and the record of a clip. With `check`, bytes that changed raise Damaged."""
    names = names_of(head, key)
    found = tensorfile.tensors(head, names.values(), check=check)
    return {name: found[full] for name, full in names.items()}, record_of(head, key)


def header(path: Path) -> dict[str, Any]:
    """What a latent file says of itself, without torch: {"format": ..., "clips": {key: record}}.

    Raises NoFile, Damaged for a truncated, altered or hostile file, VgenError for one that is no latent file.
    """
    head = open_file(path)
    return {"format": FORMAT, "clips": {key: record_of(head, key) for key in sorted(head.record["clips"])}}


def read(path: Path, *, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The streams and the record of a file of one clip. Raises as `header`, and Damaged for bytes that changed."""
    head = open_file(path)
    keys = list(head.record["clips"])
    if len(keys) != 1:
        raise VgenError(f"{path} holds {len(keys)} clips, not one.", "Give the folder of the store that it belongs to.")
    return clip(head, keys[0], check=check)


def verify(path: Path) -> list[str]:
    """What is wrong with a latent file; nothing when it is whole. Torch-free."""
    try:
        return tensorfile.verify(open_file(path))
    except VgenError as error:
        return [error.message]

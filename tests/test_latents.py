"""The latent file: round trips, what its header refuses, damage, atomic writes, spaces and the identity of weights."""

import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vgen import latents
from vgen.errors import VgenError
from vgen.files import NoFile
from vgen.latents import Space
from vgen.tensorfile import Damaged, save_tensors

SPACE = Space("tiny-vae", 4, (4, 8, 8), scaling_factor=0.5, hash="0123456789abcdef" * 4)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]


def clip(seed: int, count: int) -> dict[str, torch.Tensor]:
    """Streams of seeded shapes and dtypes, also of no dimension and of no element."""
    generator = torch.Generator().manual_seed(seed)
    names = ["mean", "logvar", "text/0", "motion_x"][:count]
    streams = {}
    for name in names:
        dims, dtype = torch.randint(0, 5, (2,), generator=generator).tolist()
        shape = torch.randint(0, 5, (dims,), generator=generator).tolist()
        streams[name] = torch.randn(shape, generator=generator).to(DTYPES[(dtype + seed) % len(DTYPES)])
    return streams


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.double(), b.double())


def run(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_round_trip(tmp_path, seed, count):
    streams = clip(seed, count)
    record = {"key": "k", "space": SPACE, "fps": Fraction(30000, 1001), "pts": [0.0, 1 / 3], "captions": ["ein Bär 🐻"]}
    path = latents.write(tmp_path / "a" / "clip.safetensors", streams, record)
    again, told = latents.read(path)
    assert again.keys() == streams.keys()
    assert all(equal(again[name], streams[name]) for name in streams)
    assert (told["key"], told["fps"], told["pts"]) == ("k", "30000/1001", [0.0, 1 / 3])
    assert told["captions"] == ["ein Bär 🐻"]
    assert Space.from_dict(told["space"]) == SPACE
    assert latents.verify(path) == []
    assert latents.header(path) == {"format": "vgen-latents/1", "clips": {"k": told}}


def test_other_programs_read_it(tmp_path):
    streams = {"mean": torch.randn(4, 3, 2, 2).bfloat16(), "n": torch.tensor([1, 2]), "odd": torch.ones(3).half()}
    path = latents.write(tmp_path / "clip.safetensors", streams, {})
    found = load_file(path)
    assert found.keys() == streams.keys()
    assert all(equal(found[name], streams[name]) for name in streams)
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["vgen"]


def test_views_are_written_as_they_look(tmp_path):
    whole = torch.arange(24.0).reshape(2, 3, 4)
    path = latents.write(tmp_path / "clip.safetensors", {"mean": whole.transpose(0, 2)[1:]}, {})
    assert torch.equal(latents.read(path)[0]["mean"], whole.transpose(0, 2)[1:])


def test_header_needs_no_torch(tmp_path):
    path = latents.write(tmp_path / "clip.safetensors", clip(0, 3), {"key": "k", "captions": ["x"]})
    done = run(
        "import sys; from pathlib import Path; from vgen.latents import header, verify\n"
        "path = Path(sys.argv[1]); assert verify(path) == []\n"
        "print(header(path)['clips']['k']['captions'])\n"
        "print({'torch', 'numpy', 'safetensors'} & set(sys.modules))",
        path,
    )
    assert done.stdout == "['x']\nset()\n", done.stderr


def test_equal_content_gives_equal_bytes_in_every_process(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from vgen.latents import write\n"
        "g = torch.Generator().manual_seed(0); names = set('abcdefgh')\n"
        "s = {n: torch.full((3,), float(ord(n))) for n in names}\n"
        "write(Path(sys.argv[1]), s, {n: n for n in names})"
    )
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for seed, path in enumerate(files):
        done = run(code, path, PYTHONHASHSEED=str(seed + 1))
        assert done.returncode == 0, done.stderr
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = latents.write(tmp_path / "clip.safetensors", clip(0, 1), {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_every_flipped_bit_is_seen(tmp_path):
    path = latents.write(tmp_path / "clip.safetensors", {"mean": torch.ones(2, 2)}, {"captions": ["a bear"]})
    good = path.read_bytes()
    missed = []
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        if not latents.verify(path):
            missed.append(bit)
    assert missed == []


def test_a_flipped_bit_is_never_read(tmp_path):
    path = latents.write(tmp_path / "clip.safetensors", {"mean": torch.ones(64)}, {})
    bad = bytearray(path.read_bytes())
    bad[-1] ^= 1
    path.write_bytes(bad)
    latents.header(path)
    with pytest.raises(Damaged, match="'mean' is damaged"):
        latents.read(path)


def test_every_truncation_is_refused(tmp_path):
    path = latents.write(tmp_path / "clip.safetensors", clip(3, 3), {})
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(Damaged):
            latents.header(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(Damaged):
        latents.header(path)


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(**told: object) -> dict[str, object]:
    return {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **told}}


HOSTILE = {
    "empty": b"",
    "no length": b"\x01\x02",
    "length of the universe": raw({}, length=2**64 - 1),
    "length beyond the cap": raw(b"{}" + b" " * 10, length=100_000_001),
    "not json": raw(b"hello, world"),
    "not text": raw(b"\xff\xfe{}"),
    "a list": raw([1, 2]),
    "deep": raw(b"[" * 200_000),
    "long number": raw(b'{"a":' + b"9" * 10_000 + b"}"),
    "twice": raw(
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    ),
    "unknown dtype": raw(one(dtype="C64"), b"1234"),
    "unhashable dtype": raw(one(dtype=[]), b"1234"),
    "negative shape": raw(one(shape=[-2, -2]), b"1234"),
    "true shape": raw(one(shape=[True, 4]), b"1234"),
    "shape beyond the data": raw(one(shape=[2**62, 2**62]), b"1234"),
    "many dimensions": raw(one(shape=[1] * 100_000 + [4]), b"1234"),
    "offsets backwards": raw(one(data_offsets=[4, 0]), b"1234"),
    "three offsets": raw(one(data_offsets=[0, 2, 4]), b"1234"),
    "gap": raw(one(data_offsets=[4, 8]), b"12345678"),
    "overlap": raw({**one(), "b": one()["a"]}, b"1234"),
    "trailing": raw(one(), b"12345"),
    "metadata no table": raw({"__metadata__": 3}),
    "metadata no text": raw({"__metadata__": {"vgen": 3}}),
    "record no json": raw({"__metadata__": {"vgen": "x"}}),
    "record no table": raw({"__metadata__": {"vgen": "[1]"}}),
    "record without hashes": raw({"__metadata__": {"vgen": '{"format":"vgen-latents/1","clips":{}}'}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(tmp_path, name):
    path = tmp_path / "clip.safetensors"
    path.write_bytes(HOSTILE[name])
    start = time.process_time()
    with pytest.raises(Damaged):
        latents.header(path)
    assert latents.verify(path)
    assert time.process_time() - start < 5


def test_files_of_others_are_told_apart(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(VgenError, match="is not a latent file"):
        latents.header(path)
    save_tensors(path, {"w": torch.ones(2)}, {"format": "vgen-latents/2"})
    with pytest.raises(VgenError, match="vgen-latents/2 instead of vgen-latents/1"):
        latents.header(path)
    with pytest.raises(NoFile, match="no such file"):
        latents.read(tmp_path / "none.safetensors")
    with pytest.raises(VgenError, match="Cannot read"):
        latents.read(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "", ".hidden", "a//b", "a\0b", "__metadata__\n"])
def test_hostile_stream_names_are_refused(tmp_path, name):
    with pytest.raises(VgenError, match="cannot be the name of a tensor"):
        latents.write(tmp_path / "clip.safetensors", {name: torch.ones(1)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, torch.ones(1), "\ud800"])
def test_records_that_json_cannot_say_are_refused(tmp_path, value):
    with pytest.raises(VgenError, match="record of a file cannot be written"):
        latents.write(tmp_path / "clip.safetensors", {"mean": torch.ones(1)}, {"x": value})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = latents.write(tmp_path / "clip.safetensors", {"mean": torch.zeros(8)}, {})
    before = path.read_bytes()
    done = run(
        "import resource, sys, torch; from pathlib import Path\n"
        "from vgen.errors import VgenError; from vgen.latents import write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write(Path(sys.argv[1]), {'mean': torch.ones(100_000)}, {})\n"
        "except VgenError as error: print(error)",
        path,
    )
    assert "Cannot write" in done.stdout, done.stderr
    assert "Free some space" in done.stdout
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_scale_and_its_inverse():
    z = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    mean, std = (0.1, -0.2, 0.3, 0.0), (1.0, 2.0, 0.5, 3.0)
    shifted = Space("s", 4, (1, 8, 8), scaling_factor=0.36, shift_factor=0.12)
    assert torch.allclose(latents.scale(shifted, z), (z - 0.12) * 0.36)
    channels = Space("c", 4, (1, 8, 8), latents_mean=mean, latents_std=std)
    expected = torch.stack([(z[:, c] - mean[c]) / std[c] for c in range(4)], dim=1)
    assert torch.allclose(latents.scale(channels, z), expected)
    for space in (shifted, channels, SPACE):
        assert torch.allclose(latents.unscale(space, latents.scale(space, z)), z, atol=1e-6)
        assert latents.scale(space, z.half()).dtype == torch.float16


def test_posterior():
    mean, logvar = torch.full((4, 5, 50, 50), 2.0), torch.full((4, 5, 50, 50), -1.0)
    draw = latents.sample_posterior({"mean": mean, "logvar": logvar}, torch.Generator().manual_seed(1))
    assert draw.mean().item() == pytest.approx(2.0, abs=0.01)
    assert draw.std().item() == pytest.approx(0.6065, abs=0.01)
    again = latents.sample_posterior({"mean": mean, "logvar": logvar}, torch.Generator().manual_seed(1))
    assert torch.equal(draw, again)
    assert latents.sample_posterior({"mean": mean}) is mean
    assert latents.sample_posterior({"latents": mean}) is mean
    with pytest.raises(VgenError, match="among the streams: audio"):
        latents.sample_posterior({"audio": mean})


def test_another_space_is_refused_with_both_and_the_command():
    other = Space("tiny-vae", 4, (4, 8, 8), scaling_factor=0.7, hash="f" * 64)
    with pytest.raises(VgenError) as caught:
        latents.require(SPACE.to_dict(), other, "vgen encode svd clips/ -o new/")
    for told in (SPACE.id, other.id, "vgen encode svd clips/ -o new/"):
        assert told in str(caught.value)
    latents.require(SPACE, Space("tiny-vae", 4, (4, 8, 8), scaling_factor=0.7, hash=SPACE.hash), "")
    with pytest.raises(VgenError, match="not a latent space"):
        latents.require({"nme": "x"}, SPACE, "")


def test_identity_of_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("VGEN_HOME", str(tmp_path / "home"))
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    folder = tmp_path / "vae"
    folder.mkdir()
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(net.state_dict(), file)
    plain = latents.tensor_hash(net)
    assert latents.file_hash(file) == latents.file_hash(folder) == plain
    (folder / "config.json").write_text('{"_class_name": "A", "scaling_factor": 0.7, "sample_size": 8}')
    assert latents.file_hash(folder) == plain
    (folder / "config.json").write_text('{"act_fn": "silu", "_diffusers_version": "1"}')
    assert latents.file_hash(folder) == latents.tensor_hash(net, {"act_fn": "silu"}) != plain
    assert latents.tensor_hash(net.half()) != plain
    save_file(net.state_dict(), folder / "diffusion_pytorch_model.fp16.safetensors")
    assert latents.file_hash(folder, variant="fp16") == latents.tensor_hash(net, {"act_fn": "silu"})
    with pytest.raises(VgenError, match="does not hold one set"):
        latents.file_hash(folder, variant="bf16")
    (folder / "config.json").write_text("[1")
    with pytest.raises(Damaged, match="is not JSON"):
        latents.file_hash(folder)


def test_identity_of_sharded_weights_is_that_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("VGEN_HOME", str(tmp_path / "home"))
    state = {"a": torch.ones(2), "b": torch.zeros(3)}
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for key, name in names.items():
        save_file({key: state[key]}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert latents.file_hash(tmp_path) == latents.tensor_hash(state)


def test_identity_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("VGEN_HOME", str(tmp_path / "home"))
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(4)}, path)
    first, stat = latents.file_hash(path), path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert latents.file_hash(path) == first, "same path, size and time: taken from the cache"
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert latents.file_hash(path) != first


def test_identity_without_a_cache_folder(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file where the cache folder should be")
    monkeypatch.setenv("VGEN_HOME", str(tmp_path / "home"))
    path: Path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(4)}, path)
    assert latents.file_hash(path) == latents.tensor_hash({"w": torch.ones(4)})

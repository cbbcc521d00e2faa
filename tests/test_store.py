"""The store: keys, packs, many writers, kill -9, full disks, damage and repair; and the cache of text embeddings."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vgen import latents
from vgen.embeddings import Embeddings
from vgen.errors import VgenError
from vgen.files import NoFile
from vgen.latents import Space
from vgen.store import Store, describe, key
from vgen.tensorfile import Damaged

SPACE = Space("tiny-vae", 4, (4, 8, 8), hash="0123456789abcdef" * 4)
BAD_SPACE = '{"format": "vgen-latents/1", "space": 3, "text_space": null, "created_by": "x"}'
FORK = multiprocessing.get_context("fork")


def clip(i: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    return {name: torch.randn(4, 3, 4, 4 + i % 2, generator=generator).bfloat16() for name in ("mean", "logvar")}


def clip_key(i: int) -> str:
    return key(f"source {i}", {"num_frames": 9, "size": [32, 32]}, SPACE.id)


def made(folder: Path, count: int = 6, **options: object) -> Store:
    """A store with `count` loose clips."""
    store = Store.open(folder, space=SPACE, create=True, **options)
    for i in range(count):
        store.put(clip_key(i), clip(i), {"captions": [f"clip {i}"], "fps": "8/1"})
    return store


def holds(store: Store, i: int) -> bool:
    streams, record = store.get(clip_key(i))
    return record["captions"] == [f"clip {i}"] and all(torch.equal(streams[n], t) for n, t in clip(i).items())


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120)


def test_key_is_content_and_transform_and_space():
    first = key("abc", {"flip": False, "crop": [0, 0, 8, 8]}, "vae:1")
    assert first == key("abc", {"crop": [0, 0, 8, 8], "flip": False}, "vae:1")
    others = [key("abd", {}, "vae:1"), key("abc", {"flip": True}, "vae:1"), key("abc", {}, "vae:2")]
    assert len({first, *others}) == 4
    assert len(first) == 32


def test_loose_and_packed_clips_read_the_same(tmp_path):
    store = made(tmp_path)
    loose = list(store.records())
    packs = store.pack(target_bytes=4000)
    assert len(packs) > 1
    assert not [name for name in files(tmp_path) if name.startswith("loose")]
    for reader in (store, Store.open(tmp_path)):
        assert len(reader) == 6
        assert reader.keys() == sorted(map(clip_key, range(6)))
        assert list(reader.records()) == loose
        assert all(holds(reader, i) for i in range(6))
        assert reader.verify() == {}
    assert store.pack() == []


def test_what_is_there_is_not_written_again(tmp_path):
    store = made(tmp_path, 2)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    made(tmp_path, 2)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)} == before
    store.pack()
    made(tmp_path, 3)
    assert len([name for name in files(tmp_path) if name.startswith("loose")]) == 1


def test_packs_of_equal_content_are_equal(tmp_path):
    names = [made(tmp_path / one).pack()[0] for one in "ab"]
    assert names[0].name == names[1].name
    assert names[0].read_bytes() == names[1].read_bytes()


def test_stores_of_one_space_merge_by_copying(tmp_path):
    a, b = made(tmp_path / "a", 3), made(tmp_path / "b", 5)
    path = b.pack()[0]
    (tmp_path / "a" / "packs").mkdir()
    (tmp_path / "a" / "packs" / path.name).write_bytes(path.read_bytes())
    assert len(a) == 5
    assert a.pack() == []
    assert all(holds(a, i) for i in range(5))
    assert len(files(tmp_path / "a")) == 3  # store.json, the lock, the pack


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "x" * 32, "A" * 32, "", "a" * 31, "a" * 32 + "\n"])
def test_hostile_keys_are_refused(tmp_path, name):
    store = made(tmp_path / "s", 0)
    for act in (lambda: store.put(name, clip(0), {}), lambda: store.get(name), lambda: name in store):
        with pytest.raises(VgenError, match="is not the key of a clip"):
            act()
    assert files(tmp_path) == ["s/store.json"]


def test_another_autoencoder_is_refused_with_both_and_the_command(tmp_path):
    store = made(tmp_path, 1, text_space="t5:1")
    stale = Space("tiny-vae", 4, (4, 8, 8), hash="f" * 64)
    for create in (True, False):
        with pytest.raises(VgenError) as caught:
            Store.open(tmp_path, space=stale, create=create, mend="vgen encode cmd clips -o new")
        for told in (SPACE.id, stale.id, "vgen encode cmd clips -o new"):
            assert told in str(caught.value)
    with pytest.raises(VgenError, match="'t5:1'; the model needs 't5:2'") as caught:
        Store.open(tmp_path, space=SPACE, text_space="t5:2")
    assert "vgen encode" in str(caught.value)
    with pytest.raises(VgenError, match="the model needs"):
        store.put(clip_key(1), clip(1), {"space": stale.to_dict()})


def test_folders_that_are_no_store_are_refused(tmp_path):
    with pytest.raises(NoFile, match="Cannot open the latent store"):
        Store.open(tmp_path / "none")
    (tmp_path / "holiday.mp4").write_bytes(b"")
    with pytest.raises(VgenError, match="neither empty nor a latent store"):
        Store.open(tmp_path, space=SPACE, create=True)
    for text in ("{", "[]", '{"format": "vgen-latents/1"}', '{"format": "vgen-latents/9"}', BAD_SPACE):
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(VgenError, match=r"is damaged|vgen-latents/9|not a latent space"):
            Store.open(tmp_path, space=SPACE, create=True)


def test_nan_is_refused(tmp_path):
    store = made(tmp_path, 0)
    with pytest.raises(VgenError, match=r"'mean' of clip .* holds NaN"):
        store.put(clip_key(0), {"mean": torch.tensor([1.0, float("nan")])}, {})
    assert store.keys() == []


def test_texts_are_kept_once(tmp_path):
    store = made(tmp_path, 1, text_space="t5:1")
    embedding = {"text": torch.randn(3, 8).bfloat16(), "text_mask": torch.ones(3, dtype=torch.bool)}
    store.put_text("a bear", embedding)
    store.put_text("a bear", {"text": torch.zeros(1)})
    found = Store.open(tmp_path).text("a bear")
    assert all(torch.equal(found[name], embedding[name]) for name in embedding)
    assert store.has_text("a bear")
    with pytest.raises(NoFile):
        store.text("a cat")
    flip(store.texts.path("a bear"), -1)
    with pytest.raises(Damaged):
        store.text("a bear")
    assert list(store.verify()) == [str(store.texts.path("a bear").relative_to(tmp_path))]
    assert len(store.repair()) == 1
    assert not store.has_text("a bear")
    with pytest.raises(VgenError, match="made without a text encoder"):
        made(tmp_path / "other", 0).put_text("a bear", embedding)


def test_describe_and_verify_need_no_torch(tmp_path):
    store = made(tmp_path, 5, text_space="t5:1")
    store.pack(6000)
    store.put(clip_key(9), clip(9), {})
    store.put_text("x", {"text": torch.ones(2, 2)})
    done = run(
        "import json, sys; from pathlib import Path; from vgen.store import Store, describe\n"
        "folder = Path(sys.argv[1]); assert Store.open(folder).verify() == {}; told = describe(folder)\n"
        "print(told['clips'], told['captioned'], told['texts'], told['packs'], told['space'], told['shapes'])\n"
        "print({'torch', 'numpy', 'safetensors'} & set(sys.modules))",
        tmp_path,
    )
    told = describe(tmp_path)
    assert done.stdout == f"6 5 1 {told['packs']} {SPACE.id} {told['shapes']}\nset()\n", done.stderr
    assert told["shapes"]["mean 4x3x4x5 BF16"] == 3
    size = sum((tmp_path / name).stat().st_size for name in files(tmp_path) if name.endswith(".safetensors"))
    assert told["bytes"] == size


def test_damage_in_a_pack_costs_one_clip(tmp_path):
    store = made(tmp_path)
    [pack] = store.pack()
    head = latents.open_file(pack)
    flip(pack, head.entries[f"{clip_key(2)}/mean"].begin)
    assert list(store.verify()) == [clip_key(2)]
    with pytest.raises(Damaged):
        store.get(clip_key(2))
    assert store.repair() == [f"removed the damaged clip {clip_key(2)}"]
    assert clip_key(2) not in store
    store.put(clip_key(2), clip(2), {"captions": ["clip 2"]})
    assert all(holds(Store.open(tmp_path), i) for i in range(6))
    assert Store.open(tmp_path).verify() == {}


def test_a_damaged_loose_clip_is_not_packed(tmp_path):
    store = made(tmp_path)
    [path] = tmp_path.rglob(f"{clip_key(3)}.safetensors")
    flip(path, -1)
    with pytest.raises(Damaged, match=clip_key(3)):
        store.pack()
    assert len(store) == 6
    assert len(store.repair()) == 1
    assert len(store.pack()) == 1
    assert [i for i in range(6) if clip_key(i) in store and holds(store, i)] == [0, 1, 2, 4, 5]


def test_files_that_cannot_be_read_are_set_aside(tmp_path):
    store = made(tmp_path, 4)
    [pack] = store.pack()
    store.put(clip_key(7), clip(7), {"captions": ["clip 7"]})
    flip(pack, 20)
    with pytest.raises(Damaged):
        Store.open(tmp_path).keys()
    assert Store.open(tmp_path).repair() == [f"set aside {pack} as {pack.name}.damaged"]
    assert Store.open(tmp_path).keys() == [clip_key(7)]
    assert pack.with_name(pack.name + ".damaged").exists()


def test_remove_takes_clips_out_of_packs(tmp_path):
    store = made(tmp_path)
    store.pack()
    store.put(clip_key(8), clip(8), {})
    store.remove([clip_key(0), clip_key(8)])
    assert store.keys() == sorted(map(clip_key, range(1, 6)))
    assert all(holds(store, i) for i in range(1, 6))
    store.remove(store.keys())
    assert files(tmp_path) == [".lock", "store.json"]


@pytest.mark.parametrize("act", ["pack", "put"])
def test_a_full_disk_harms_nothing(tmp_path, act):
    made(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from vgen.errors import VgenError; from vgen.store import Store, key\n"
        "store = Store.open(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "acts = {'pack': store.pack, 'put': lambda: store.put(key('x', {}, ''), {'mean': torch.ones(9999)}, {})}\n"
        "try: acts[sys.argv[2]]()\n"
        "except VgenError as error: print(error)"
    )
    done = run(code, tmp_path, act)
    assert "Free some space" in done.stdout, done.stderr
    after = {name: (tmp_path / name).read_bytes() for name in files(tmp_path) if not name.endswith(".lock")}
    assert after == before


# Many processes


def _write_all(folder: Path, seed: int, count: int) -> None:
    """Encode `count` clips in a seeded order, packing now and then: what a resumed run does."""
    torch.set_num_threads(1)
    order = list(range(count))
    random.Random(seed).shuffle(order)
    store = Store.open(folder, space=SPACE, create=True)
    for n, i in enumerate(order):
        if clip_key(i) not in store:
            store.put(clip_key(i), clip(i), {"captions": [f"clip {i}"]})
        if n % 7 == 6:
            store.pack(target_bytes=10_000)


def test_two_writers_that_pack_and_are_killed_lose_nothing(tmp_path):
    count, chance, kills = 200, random.Random(7), 0
    writers = [FORK.Process(target=_write_all, args=(tmp_path, seed, count)) for seed in range(2)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 60
    while any(writer.exitcode != 0 for writer in writers) and time.monotonic() < deadline:
        time.sleep(chance.uniform(0.002, 0.08))
        n = chance.randrange(2)
        if writers[n].exitcode is None and kills < 60:
            os.kill(writers[n].pid, signal.SIGKILL)
            writers[n].join()
            kills += writers[n].exitcode == -signal.SIGKILL
        for i, writer in enumerate(writers):
            if writer.exitcode not in (None, 0):
                assert writer.exitcode == -signal.SIGKILL, "a writer failed by itself"
                writers[i] = FORK.Process(target=_write_all, args=(tmp_path, i, count))
                writers[i].start()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert kills > 5
    store = Store.open(tmp_path, space=SPACE)
    assert store.verify() == {}
    assert store.keys() == sorted(map(clip_key, range(count)))
    assert all(holds(store, i) for i in range(count))
    store.repair()
    store.pack()
    assert not [name for name in files(tmp_path) if name.endswith(".tmp") or name.startswith("loose")]
    assert all(holds(store, i) for i in range(count))


def _pack_and_remove(folder: Path, count: int, done: object) -> None:
    """Pack and take apart again, so that every clip keeps moving; ever the same clips."""
    store = Store.open(folder)
    for n in range(30):
        store.pack(target_bytes=5000)
        i = n % count
        store.remove([clip_key(count + i)])
        store.put(clip_key(count + i), clip(count + i), {"captions": [f"clip {count + i}"]})
    done.set()


def test_reading_while_another_process_packs(tmp_path):
    made(tmp_path, 12)
    done = FORK.Event()
    packer = FORK.Process(target=_pack_and_remove, args=(tmp_path, 6, done))
    packer.start()
    reader, rounds = Store.open(tmp_path), 0
    while not done.is_set() and packer.is_alive():
        assert all(holds(reader, i) for i in range(6))  # 6 to 11 come and go
        assert set(map(clip_key, range(6))) <= set(reader.keys())
        rounds += 1
    packer.join()
    assert packer.exitcode == 0
    assert rounds > 1
    assert all(holds(reader, i) for i in range(12))


def _open(folder: Path, digit: str, barrier: object) -> None:
    barrier.wait()
    try:
        Store.open(folder, space=Space("v", 4, (1, 1, 1), hash=digit * 64), create=True)
    except VgenError:
        os._exit(3)
    os._exit(0)


def test_one_of_two_makers_of_different_stores_wins(tmp_path):
    for n in range(8):
        barrier = FORK.Barrier(2)
        makers = [FORK.Process(target=_open, args=(tmp_path / str(n), digit, barrier)) for digit in "ab"]
        for maker in makers:
            maker.start()
        for maker in makers:
            maker.join()
        assert sorted(maker.exitcode for maker in makers) == [0, 3]
        assert files(tmp_path / str(n)) == ["store.json"]


def _stop_while_writing(path: Path, ready: object) -> None:
    from vgen.files import replacing

    with replacing(path) as file:
        file.write(b"half")
        file.flush()
        ready.set()
        time.sleep(60)


def test_repair_sweeps_up_after_the_dead_and_leaves_the_living_alone(tmp_path):
    store = made(tmp_path, 1)
    writers = []
    for n in range(2):
        ready = FORK.Event()
        writers.append(FORK.Process(target=_stop_while_writing, args=(tmp_path / "loose" / "ab" / str(n), ready)))
        writers[-1].start()
        assert ready.wait(30)
    assert len([name for name in files(tmp_path) if name.endswith(".tmp")]) == 2
    os.kill(writers[0].pid, signal.SIGKILL)
    writers[0].join()
    [done] = store.repair()
    assert "killed writer" in done
    assert len([name for name in files(tmp_path) if name.endswith(".tmp")]) == 1
    writers[1].kill()
    writers[1].join()
    assert len(store.repair()) == 1
    assert store.keys() == [clip_key(0)]


# The cache of text embeddings


def test_embeddings_by_text_and_encoder(tmp_path, monkeypatch):
    monkeypatch.setenv("VGEN_HOME", str(tmp_path))
    cache, other = Embeddings(None, "t5:1"), Embeddings(None, "t5:2")
    assert cache.folder == tmp_path / "cache" / "text"
    texts = ["", "a bear", "a bear ", "../../x", "ein Bär 🐻", "x" * 10_000]
    for n, text in enumerate(texts):
        assert cache.get(text) is None
        cache.put(text, {"text": torch.full((2, 3), float(n)).bfloat16()})
    for n, text in enumerate(texts):
        found = cache.get(text)
        assert found is not None
        assert torch.equal(found["text"], torch.full((2, 3), float(n)).bfloat16())
        assert other.get(text) is None
    assert len(files(tmp_path / "cache" / "text")) == len(texts)


@pytest.mark.parametrize("at", [0, 30, -1])
def test_a_damaged_embedding_counts_as_absent(tmp_path, at):
    cache = Embeddings(tmp_path, "t5:1")
    cache.put("a bear", {"text": torch.ones(4)})
    flip(cache.path("a bear"), at)
    assert cache.get("a bear") is None
    assert not cache.path("a bear").exists()
    cache.put("a bear", {"text": torch.ones(4)})
    cache.path("a cat").parent.mkdir(exist_ok=True)
    cache.path("a cat").write_bytes(cache.path("a bear").read_bytes())
    assert cache.get("a cat") is None


def _embed(folder: Path, seed: int) -> None:
    cache = Embeddings(folder, "t5:1")
    for n in random.Random(seed).choices(range(10), k=60):
        found = cache.get(str(n))
        if found is None:
            cache.put(str(n), {"text": torch.full((50,), float(n))})
        elif not torch.equal(found["text"], torch.full((50,), float(n))):
            os._exit(1)


def test_embeddings_of_many_processes(tmp_path):
    workers = [FORK.Process(target=_embed, args=(tmp_path, seed)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(files(tmp_path)) == 10

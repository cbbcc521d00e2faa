"""References, the Hub's cache as it lies on the disk, and what is said when weights are not there."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import loopback
import pytest
from shell import TOYS, run, vgen

from vgen import cache, registry
from vgen.errors import UsageError, VgenError

sys.path.insert(0, str(TOYS))
from toy_family import family as toy

SHA = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS, CONFIG = b"weights" * 99, b'{"width": 3}'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "hf" / "hub"


def git(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def checkpoint(folder: Path, **extra: object) -> Path:
    """A whole checkpoint: one component with a configuration and weights."""
    (folder / "net").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Toy", "net": ["diffusers", "Net"]}))
    (folder / "net" / "config.json").write_bytes(CONFIG)
    (folder / "net" / "net.safetensors").write_bytes(WEIGHTS)
    if extra:
        (folder / "vgen.json").write_text(json.dumps(extra))
    return folder


def cached(hub: Path, repo: str = "toys/big", branch: str = "main", **extra: object) -> Path:
    """The same in the Hub's cache: blobs named by hash, a snapshot of links, a branch."""
    base = hub / f"models--{repo.replace('/', '--')}"
    folder = checkpoint(base / "snapshots" / SHA, **extra)
    (base / "blobs").mkdir()
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        data = path.read_bytes()
        blob = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else git(data)
        path.rename(base / "blobs" / blob)
        path.symlink_to(base / "blobs" / blob)
    (base / "refs").mkdir()
    (base / "refs" / branch).write_text(SHA)
    return folder


def find(reference, accelerator=False):
    return registry.resolve(toy, reference, accelerator=accelerator)


def test_without_a_reference_the_demo_runs_and_says_so(hub):
    found = find(None)
    assert (found.demo, found.reference, found.folder) == (True, "demo", toy.demo)
    assert "--checkpoint toy.big" in found.note
    assert found.checkpoint.defaults["num_frames"] == 9


def test_with_an_accelerator_or_in_the_cache_the_default_runs(hub):
    assert (find(None, True).reference, find(None, True).folder) == ("toy.big", None)
    folder = cached(hub)
    found = find(None)
    assert (found.folder, found.revision, found.reference) == (folder, SHA, f"toys/big@{SHA}")
    assert not found.note


def test_without_demo_and_weights_a_checkpoint_must_be_named(hub):
    with pytest.raises(UsageError, match=r"toy\.big"):
        registry.resolve(replace(toy, demo=None), None, accelerator=False)


@pytest.mark.parametrize("reference", ["toy.1.5-xl", "1.5-xl", "toys/xl", "toys/xl@main"])
def test_four_ways_to_name_one_checkpoint(hub, reference):
    found = find(reference)
    assert (found.repo, found.revision, found.checkpoint.tag) == ("toys/xl", "main", "1.5-xl")


def test_repository_revision_and_subfolder(hub):
    found = find("some-one/thing_2@v1.0:deep/part")
    assert (found.repo, found.revision, found.subfolder) == ("some-one/thing_2", "v1.0", "deep/part")
    assert found.checkpoint.defaults == {}


def test_a_record_names_the_commit_and_finds_it_again(hub):
    folder = cached(hub)
    assert find(find("big").reference).folder == folder
    assert find(f"toys/big@{SHA}").checkpoint.defaults["num_frames"] == 49


def test_an_unknown_repository_in_the_cache_is_described_by_its_files(hub):
    cached(hub, "other/one", "v2", family="toy")
    found = find("other/one@v2")
    assert found.checkpoint.defaults["num_frames"] == 9
    assert [one.reference for one in registry.on_disk(toy)] == ["demo", f"other/one@{SHA}"]


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("toy.bigg", "Did you mean 'big'"),
        ("cogvideox.2b", "a checkpoint of 'cogvideox'"),
        ("./no/such", "no folder"),
        ("a/b/c", "no folder"),
        ("nonsense", "Known: 1.5-xl, big, demo"),
    ],
)
def test_what_means_nothing_is_refused(hub, reference, says):
    with pytest.raises(UsageError, match=says):
        find(reference)


def test_a_local_folder(tmp_path):
    folder = checkpoint(tmp_path / "mine", family="toy")
    found = find(str(folder))
    assert (found.folder, found.reference, found.checkpoint.tag) == (folder, str(folder), "mine")


def test_a_folder_of_another_family(tmp_path):
    with pytest.raises(UsageError, match="'svd'"):
        find(str(checkpoint(tmp_path / "mine", family="svd")))


@pytest.mark.parametrize("name", ["net.bin", "net.ckpt", "net.pt"])
def test_pickles_are_refused_with_the_reason(tmp_path, name):
    folder = checkpoint(tmp_path / "mine")
    (folder / "net" / "net.safetensors").rename(folder / "net" / name)
    with pytest.raises(VgenError, match="can run any code"):
        find(str(folder))


@pytest.mark.parametrize("lost", ["model_index.json", "net/net.safetensors", "net/config.json"])
def test_a_folder_that_is_not_whole(tmp_path, lost):
    folder = checkpoint(tmp_path / "mine")
    (folder / lost).unlink()
    if lost == "net/config.json":
        (folder / "net" / "net.safetensors").unlink()
    with pytest.raises(VgenError, match="it lacks"):
        find(str(folder))


def test_half_a_download_does_not_count(hub):
    folder = cached(hub)
    (folder / "net" / "net.safetensors").resolve().unlink()
    assert find("big").folder is None
    index = {"weight_map": {"a": "net-1.safetensors", "b": "net-2.safetensors"}}
    (folder / "net" / "net.safetensors").unlink()
    (folder / "net" / "net-1.safetensors").write_bytes(WEIGHTS)
    (folder / "net" / "net.safetensors.index.json").write_text(json.dumps(index))
    assert cache.missing(folder) == ["net/net-2.safetensors"]


def test_verify_by_blob_names_listing_and_manifest(hub, tmp_path):
    folder = cached(hub)
    assert cache.verify(folder) == (3, [])
    blob = (folder / "net" / "net.safetensors").resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"X")
    assert [fault.path for fault in cache.verify(folder)[1]] == ["net/net.safetensors"]
    mine = checkpoint(tmp_path / "mine")
    right = {"net/config.json": "sha256:" + hashlib.sha256(CONFIG).hexdigest(), "net/gone.json": "0" * 64}
    (mine / "vgen.json").write_text(json.dumps({"files": right}))
    count, faults = cache.verify(mine)
    assert (count, [(fault.path, fault.reason) for fault in faults]) == (2, [("net/gone.json", "missing")])


def test_verify_by_the_listing_where_there_are_no_links(hub):
    base = hub / "models--toys--big"
    folder = checkpoint(base / "snapshots" / SHA)
    files = {
        "net/config.json": {"size": len(CONFIG), "blob_id": git(CONFIG)},
        "net/net.safetensors": {"size": 1, "blob_id": "0" * 40, "lfs_sha256": hashlib.sha256(WEIGHTS).hexdigest()},
    }
    (base / "trees").mkdir()
    (base / "trees" / f"{SHA}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    assert cache.verify(folder) == (2, [])
    (folder / "net" / "config.json").write_bytes(CONFIG.replace(b"3", b"4"))
    assert [fault.path for fault in cache.verify(folder)[1]] == ["net/config.json"]


def test_no_network_and_nothing_cached(tmp_path):
    done = vgen("sample", "toy", "x", "--checkpoint", "toy.big", "-o", tmp_path / "x.mp4", HF_HOME=str(tmp_path / "hf"))
    assert (done.code, done.out) == (1, "")
    assert "toys/big@main is not in the cache" in done.err
    assert "HF_HUB_OFFLINE is set" in done.err
    assert "--checkpoint demo" in done.err
    assert "Traceback" not in done.err


def test_a_hub_that_cannot_be_reached(tmp_path):
    script = (
        "from vgen import registry; from toy_family import family\n"
        "found = registry.resolve(family, 'big', accelerator=False)\n"
        "try: registry.download(family, found)\n"
        "except registry.VgenError as error: print(error)"
    )
    where = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run([sys.executable, "-c", script], HF_HUB_DISABLE_TELEMETRY="1", **where)
    assert "the Hub cannot be reached" in done.out, done.err


def test_list_show_verify_remove(hub):
    folder = cached(hub)
    home = {"HF_HOME": str(hub.parent)}
    listed = [json.loads(line) for line in vgen("checkpoints", "list", "toy", "--json", **home).out.splitlines()]
    assert {row["checkpoint"]: row["where"] for row in listed} == {
        "toy.1.5-xl": "hub",
        "toy.demo": "with vgen",
        f"toys/big@{SHA}": "cached",
    }
    shown = vgen("checkpoints", "show", "toy.big", "--json", **home).json()
    assert (shown["folder"], shown["license"], shown["defaults"]["num_frames"]) == (str(folder), "mit", 49)
    assert vgen("checkpoints", "verify", "toy.big", **home).code == 0
    (folder / "net" / "config.json").resolve().write_bytes(b"{}")
    broken = vgen("checkpoints", "verify", "toys/big", **home)
    assert (broken.code, "net/config.json" in broken.err) == (1, True)
    asked = vgen("checkpoints", "remove", "toy.big", **home)
    assert (asked.code, "--yes" in asked.err, folder.exists()) == (2, True, True)
    removed = vgen("checkpoints", "remove", "toy.big", "--yes", "--json", **home)
    assert removed.code == 0, removed.err
    assert removed.json()["freed"] > len(WEIGHTS)
    assert not folder.exists()
    assert vgen("checkpoints", "remove", "toy.demo", "--yes", **home).code == 2


DOWNLOAD = """
import json, sys
from vgen import registry
from toy_family import family
for reference in sys.argv[1:]:
    found = registry.resolve(family, reference, accelerator=False)
    try:
        got = registry.download(family, found)
        files = sorted(str(p.relative_to(got.folder)) for p in got.folder.rglob("*") if p.is_file())
        print(json.dumps([got.reference, files, dict(got.checkpoint.defaults)]))
    except registry.VgenError as error:
        print(json.dumps(str(error)))
"""
FILES = {
    "model_index.json": json.dumps({"_class_name": "Toy", "net": ["diffusers", "Net"]}).encode(),
    "net/config.json": CONFIG,
    "net/net.safetensors": WEIGHTS,
    "net/net.fp16.safetensors": WEIGHTS,
    "net/net.bin": b"a pickle",
    "everything-in-one.safetensors": WEIGHTS,
    "run_me.py": b"print('no')",
}


def download(home: Path, server: loopback.Hub, *references: str) -> list:
    done = run([sys.executable, "-c", DOWNLOAD, *references], **server.environment(home))
    assert done.code == 0, done.err
    assert not [path for path in server.asked if path.endswith((".bin", ".py", ".fp16.safetensors", "one.safetensors"))]
    return [json.loads(line) for line in done.out.splitlines()]


def test_the_real_client_downloads_what_is_safe_and_pins_it(tmp_path):
    with loopback.hub({"toys/big": FILES, "me/mine": FILES}) as server:
        big, mine, again = download(tmp_path, server, "toy.big", "me/mine@main", "big")
        heads = {name: repo.names["main"] for name, repo in server.repos.items()}
    safe = ["model_index.json", "net/config.json", "net/net.safetensors"]
    assert big == [f"toys/big@{heads['toys/big']}", safe, {"num_frames": 49, "fps": 8.0}]
    assert mine[:2] == [f"me/mine@{heads['me/mine']}", safe]
    assert mine[2]["num_frames"] == 9
    assert again == big


def test_the_hubs_refusals_say_what_to_do(tmp_path):
    pickled = {name: data for name, data in FILES.items() if "safetensors" not in name}
    with loopback.hub({"me/pickled": pickled, "me/old": FILES}) as server:
        server.add("toys/gated", FILES, gated=True)
        wanted = ("toys/gated", "toys/gone", "me/old@v9", "me/pickled")
        gated, gone, old, pickles = download(tmp_path, server, *wanted)
    assert "hf auth login" in gated
    assert "agree" in gated.lower()
    assert "does not exist on the Hub, or is private" in gone
    assert "no revision 'v9'" in old
    assert "can run any code" in pickles
    assert "net/net.bin" in pickles


def test_a_damaged_download_is_not_used_and_fetched_anew(tmp_path):
    with loopback.hub({"toys/big": FILES}) as server:
        server.damage["net/net.safetensors"] = WEIGHTS[::-1]
        (told,) = download(tmp_path, server, "big")
        assert "arrived damaged: net/net.safetensors" in told
        assert "vgen checkpoints pull" in told
        server.damage.clear()
        (well,) = download(tmp_path, server, "big")
        assert well[0] == f"toys/big@{server.repos['toys/big'].names['main']}"


def test_a_reference_without_a_family(hub, tmp_path):
    mine = checkpoint(tmp_path / "mine", family="toy")
    assert vgen("checkpoints", "show", mine, "--json").json()["family"] == "toy"
    nothing = vgen("checkpoints", "show", "nothing")
    assert (nothing.code, nothing.out) == (2, "")
    assert "'nothing' is no checkpoint of any installed family" in nothing.err
    assert "no checkpoint of any" in vgen("checkpoints", "show", "some/thing").err
    (mine / "net" / "net.safetensors").rename(mine / "net" / "net.bin")
    assert "can run any code" in vgen("checkpoints", "show", mine).err
    twice = vgen("checkpoints", "show", "big", VGEN_FAMILIES="toy=toy_family:family,copy=toy_family:family")
    assert (twice.code, "several families" in twice.err) == (2, True)

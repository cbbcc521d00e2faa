"""Other servers and other transports: olah, an independent mirror; Xet with a local store; no network after a pull."""

import hashlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import loopback
from shell import environment, run, vgen
from test_bundle import NO_NETWORK
from test_exchange import ANN, files, tensors, written

OLAH = """
[basic]
host = "127.0.0.1"
port = {port}
repos-path = "{folder}/repos"
hf-scheme = "http"
hf-netloc = "{upstream}"
hf-lfs-netloc = "{upstream}"
mirror-scheme = "http"
mirror-netloc = "127.0.0.1:{port}"
mirror-lfs-netloc = "127.0.0.1:{port}"

[accessibility]
offline = false

[[accessibility.proxy]]
repo = "*"
allow = true

[[accessibility.cache]]
repo = "*"
allow = true
"""


@contextmanager
def olah(folder: Path, upstream: str) -> Iterator[str]:
    """A mirror of a Hub, in a process of its own: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    settings = folder / "olah.toml"
    settings.write_text(OLAH.format(port=port, folder=folder, upstream=upstream.removeprefix("http://")))
    command = [sys.executable, "-m", "olah.server", "-c", str(settings)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def test_pull_through_a_mirror(tmp_path):
    with loopback.hub({"bob/bears": files(2)}) as server, olah(tmp_path / "olah", server.address) as mirror:
        repo = server.repos["bob/bears"]
        repo.tags["v1"] = repo.names["main"]
        server.add("bob/bears", files(3))
        here = {**server.environment(tmp_path / "here"), "HF_ENDPOINT": mirror}
        got = vgen("checkpoints", "pull", "bob/bears@v1", "--json", **here)
        assert got.code == 0, got.err
        assert got.json()["revision"] == repo.tags["v1"]
        assert (Path(got.json()["folder"]) / "net/net.safetensors").read_bytes() == tensors(2)
        by_commit = vgen("checkpoints", "pull", f"bob/bears@{repo.names['main']}", "--json", **here)
        assert by_commit.json()["revision"] == repo.names["main"]
        assert "no revision 'v7'" in vgen("checkpoints", "pull", "bob/bears@v7", **here).err
        pushed = vgen("checkpoints", "push", written(tmp_path / "m", files()), "ann/m", **here, HF_TOKEN=ANN)
        assert (pushed.code, "only serves downloads" in pushed.err) == (1, True), pushed.err
        searched = vgen("checkpoints", "search", **here)
        assert (searched.code, "does not list models" in searched.err) == (1, True)


def test_xet_up_and_down(tmp_path):
    store, data = tmp_path / "xet", tensors(5, 1 << 20)
    store.mkdir()
    mine = written(tmp_path / "mine", {**files(), "net/net.safetensors": data})
    with loopback.hub(xet=store) as server:
        pushed = vgen(
            "checkpoints", "push", mine, "ann/bears", "--tag", "v1", **server.environment(tmp_path / "a", ANN)
        )
        assert pushed.code == 0, pushed.err
        assert any("xet-write-token" in one for one in server.asked)
        assert not any("objects/batch" in one for one in server.asked)
        assert server.xet_hash(hashlib.sha256(data).hexdigest())
        here = server.environment(tmp_path / "b")
        got = vgen("checkpoints", "pull", "ann/bears@v1", "--json", **here)
        assert got.code == 0, got.err
        assert not any("GET" in one and one.endswith(".safetensors") for one in server.asked)
        folder = Path(got.json()["folder"])
        assert (folder / "net/net.safetensors").read_bytes() == data
        made = vgen("checkpoints", "export", "ann/bears@v1", "-o", "b.tar", cwd=tmp_path, **here)
        assert made.code == 0, made.err
        assert (tmp_path / "b.tar").stat().st_size > len(data)  # though the cache holds links to a store of its own


def test_after_a_pull_no_command_needs_a_socket(tmp_path):
    with loopback.hub({"toys/big": files()}) as server:
        here = server.environment(tmp_path / "here")
        assert vgen("checkpoints", "pull", "toy.big", **here).code == 0
    for words in (
        ["checkpoints", "show", "toy.big", "--json"],
        ["checkpoints", "verify", "toys/big", "--json"],
        ["sample", "toy", "x", "--checkpoint", "toys/big", "--dry-run", "--json"],
    ):
        done = run([sys.executable, "-c", NO_NETWORK, *words], **here)
        assert done.code == 0, done.err
        told = json.loads(done.out)
        assert server.repos["toys/big"].names["main"] in json.dumps(told)

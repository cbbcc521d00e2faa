"""Export and import: one tar to a machine without a network, and tars that mean harm."""

import io
import json
import sys
import tarfile
from pathlib import Path

import loopback
import pytest
from shell import run, vgen
from test_exchange import files, tensors, written

from vgen import bundle, cache, registry
from vgen.errors import VgenError

NO_NETWORK = """
import socket, sys
def refuse(*words): raise RuntimeError("a socket was used")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
from vgen.cli import main
main()
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, of this process too."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "there"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "there"


def test_what_was_pulled_moves_and_is_found_by_its_name_without_a_network(tmp_path, home):
    with loopback.hub({"bob/bears": files()}) as server:
        commit = server.repos["bob/bears"].names["main"]
        here = server.environment(tmp_path / "here")
        assert vgen("checkpoints", "pull", "bob/bears", **here).code == 0
    alone = {**here, "HF_HUB_OFFLINE": "1"}
    made = vgen("checkpoints", "export", "bob/bears", "--json", cwd=tmp_path, **alone).json()
    tar = tmp_path / made["output"]
    assert (tar.name, made["checkpoint"]) == ("bob--bears.tar", f"bob/bears@{commit}")
    with tarfile.open(tar) as opened:  # unpacked by hand it is a plain folder
        assert opened.getnames() == ["vgen-bundle.json", *(f"bob--bears/{name}" for name in sorted(files()))]
    there = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    done = run([sys.executable, "-c", NO_NETWORK, "checkpoints", "import", str(tar)], **there)
    assert (done.code, done.out.strip()) == (0, f"bob/bears@{commit}"), done.err
    for reference in ("bob/bears", f"bob/bears@{commit}"):
        found = registry.ready(registry.named(reference))
        assert (found.revision, cache.verify(found.folder)) == (commit, (4, []))
    shown = run([sys.executable, "-c", NO_NETWORK, "checkpoints", "show", "bob/bears", "--json"], **there)
    assert json.loads(shown.out)["revision"] == commit
    again = vgen("checkpoints", "export", "bob/bears", "-o", tmp_path / "again.tar", **there, cwd=tmp_path)
    assert (again.code, (tmp_path / "again.tar").read_bytes()) == (0, tar.read_bytes())
    assert vgen("checkpoints", "export", "bob/bears", cwd=tmp_path, **there).code == 2  # it exists


def test_a_folder_of_ones_own_needs_a_name(tmp_path, home):
    mine = written(tmp_path / "mine", {**files(), "run.toml": b"output = '/home/ann'"})
    assert vgen("checkpoints", "export", mine, cwd=tmp_path).code == 2
    done = vgen("checkpoints", "export", mine, "--as", "me/mine", "-o", "m.tar", cwd=tmp_path)
    assert done.code == 0, done.err
    told = bundle.unpack(tmp_path / "m.tar")
    assert sorted(told.files) == sorted(files())
    assert registry.here(registry.named("me/mine")).revision == told.commit
    client = "from huggingface_hub import snapshot_download; print(snapshot_download('me/mine'))"
    found = run([sys.executable, "-c", client], HF_HOME=str(home), HF_HUB_OFFLINE="1")
    assert Path(found.out.strip()) == cache.snapshot("me/mine"), found.err


def test_a_damaged_file_is_not_exported(tmp_path, home):
    mine = written(tmp_path / "mine", files(files={"net/config.json": "sha256:" + "0" * 64}))
    with pytest.raises(VgenError, match="damaged"):
        bundle.pack(mine, tmp_path / "m.tar", "me/mine")
    assert not (tmp_path / "m.tar").exists()


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    told = tarfile.TarInfo(name)
    told.type, told.linkname = kind, target
    return told


def member(name: str, data: bytes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    told = tarfile.TarInfo(name)
    told.size = len(data)
    return told, io.BytesIO(data)


@pytest.fixture
def parts(tmp_path):
    """The members of a good tar, to make bad ones of."""
    mine = written(tmp_path / "mine", files())
    bundle.pack(mine, tmp_path / "good.tar", "me/mine")
    with tarfile.open(tmp_path / "good.tar") as opened:
        return {one.name: opened.extractfile(one).read() for one in opened}


def rewritten(tmp_path: Path, parts: dict[str, bytes], extra: tuple) -> Path:
    """A tar of these members, and of one more: its head and, where it has them, its bytes."""
    with tarfile.open(tmp_path / "bad.tar", "w") as out:
        for name, data in parts.items():
            out.addfile(*member(name, data))
        if extra:
            out.addfile(*extra)
    return tmp_path / "bad.tar"


def told(parts: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    """The same with another manifest."""
    head = {**json.loads(parts["vgen-bundle.json"]), **changes}
    return {**parts, "vgen-bundle.json": json.dumps(head).encode()}


def renamed(parts: dict[str, bytes], name: str) -> dict[str, bytes]:
    """The same with a file under another name, in manifest and tar."""
    listed = json.loads(parts["vgen-bundle.json"])["files"]
    listed[name] = listed.pop("net/config.json")
    changed = told(parts, files=listed)
    data = changed.pop("me--mine/net/config.json")
    return {**changed, f"me--mine/{name}": data}


HARM = {
    "symlink": lambda p: (p, (link("me--mine/x.json", tarfile.SYMTYPE),)),
    "hard link": lambda p: (p, (link("me--mine/x.json", tarfile.LNKTYPE),)),
    "device": lambda p: (p, (link("me--mine/x.json", tarfile.CHRTYPE),)),
    "fifo": lambda p: (p, (link("me--mine/x.json", tarfile.FIFOTYPE),)),
    "folder": lambda p: (p, (link("me--mine/x", tarfile.DIRTYPE),)),
    "a file that is not told of": lambda p: (p, member("../../evil.json", b"{}")),
    "twice": lambda p: (p, member("me--mine/net/config.json", b'{"width": 4}')),
    "up and out": lambda p: (renamed(p, "../../evil.json"), ()),
    "absolute": lambda p: (renamed(p, "/tmp/evil.json"), ()),
    "backslashes": lambda p: (renamed(p, "..\\evil.json"), ()),
    "a program": lambda p: (renamed(p, "net/run.py"), ()),
    "a repository that leads out": lambda p: (told(p, repo="../.."), ()),
    "a revision that leads out": lambda p: (told(p, revisions=["../../../x"]), ()),
    "no commit": lambda p: (told(p, commit="../" * 13 + "x"), ()),
    "another format": lambda p: (told(p, format="zip"), ()),
    "no manifest": lambda p: ({k: v for k, v in p.items() if k != "vgen-bundle.json"}, ()),
    "a changed byte": lambda p: ({**p, "me--mine/net/net.safetensors": tensors(9)}, ()),
    "a lost file": lambda p: ({k: v for k, v in p.items() if "config" not in k}, ()),
    "code": lambda p: (p, ()),
}


@pytest.mark.parametrize("harm", HARM)
def test_tars_that_mean_harm_are_refused_and_leave_nothing(tmp_path, home, parts, harm):
    if harm == "code":
        mine = written(tmp_path / "code", {**files(), "net/config.json": b'{"auto_map": {}}'})
        bundle.pack(mine, tmp_path / "bad.tar", "me/mine")
        tar = tmp_path / "bad.tar"
    else:
        held, extra = HARM[harm](parts)
        tar = rewritten(tmp_path, held, extra)
    with pytest.raises(VgenError) as caught:
        bundle.unpack(tar)
    assert str(tar) in str(caught.value)
    assert not list(home.rglob("*.json"))
    assert not list(tmp_path.rglob("evil.json"))


def test_half_a_tar_and_no_tar(tmp_path, home, parts):
    good = (tmp_path / "good.tar").read_bytes()
    for cut in (0, 100, 700, len(good) // 2):
        (tmp_path / "half.tar").write_bytes(good[:cut])
        with pytest.raises(VgenError):
            bundle.unpack(tmp_path / "half.tar")
    done = vgen("checkpoints", "import", tmp_path / "half.tar", HF_HOME=str(home))
    assert (done.code, "Traceback" in done.err) == (1, False)
    with pytest.raises(VgenError, match="no such file"):
        bundle.unpack(tmp_path / "none.tar")

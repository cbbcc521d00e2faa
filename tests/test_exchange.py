"""Search, pull, push, export and import: real vgen processes and the real client against a Hub on this machine."""

import hashlib
import json
import struct
from pathlib import Path

import loopback
import pytest
from shell import vgen

CONFIG = b'{"width": 3}'
BASE = f"toys/big@{'1' * 40}"
ANN = "hf_ann"


def tensors(fill: int = 1, count: int = 64) -> bytes:
    """A safetensors file of one tensor of bytes."""
    head = json.dumps({"a.lora_A.weight": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
    return struct.pack("<Q", len(head)) + head + bytes([fill]) * count


def files(fill: int = 1, **manifest: object) -> dict[str, bytes]:
    """A checkpoint of the toy family."""
    told = {"format": "vgen-checkpoint/1", "family": "toy", "license": "mit", **manifest}
    return {
        "model_index.json": json.dumps({"_class_name": "Toy", "net": ["diffusers", "Net"]}).encode(),
        "net/config.json": CONFIG,
        "net/net.safetensors": tensors(fill),
        "vgen.json": json.dumps(told).encode(),
    }


def written(folder: Path, held: dict[str, bytes]) -> Path:
    for name, data in held.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def mine(tmp_path):
    return written(tmp_path / "mine", files())


@pytest.fixture
def server():
    with loopback.hub() as running:
        yield running


@pytest.fixture
def ask(server, tmp_path):
    """Run `vgen checkpoints` as ann, or as another token's owner."""

    def ask(*words, token=ANN, home="home", **more):
        return vgen("checkpoints", *words, **{**server.environment(tmp_path / home, token), **more})

    return ask


def test_push_pull_show_and_push_again(ask, server, mine):
    (mine / "training").mkdir()
    (mine / "training" / "state.safetensors").write_bytes(b"not for the world")
    (mine / "run.toml").write_text("output = '/home/ann/secret'")
    done = ask("push", mine, "ann/bears", "--tag", "v1.0.0", "--json")
    assert done.code == 0, done.err
    told, repo = done.json(), server.repos["ann/bears"]
    assert told["checkpoint"] == f"ann/bears@{repo.tags['v1.0.0']}"
    assert (told["status"], len(repo.trees)) == ("published", 2)  # the Hub's own first commit, and ours
    there = repo.trees[repo.tags["v1.0.0"]]
    assert sorted(there) == [".gitattributes", "README.md", *sorted(files())]
    manifest = json.loads(there["vgen.json"])
    assert manifest["files"]["net/net.safetensors"] == "sha256:" + hashlib.sha256(tensors()).hexdigest()
    assert sorted(manifest["files"]) == ["model_index.json", "net/config.json", "net/net.safetensors"]
    card = repo.card()
    assert (card["library_name"], card["license"], card["pipeline_tag"]) == ("diffusers", "mit", "text-to-video")
    assert card["tags"] == ["vgen", "vgen-family:toy", "vgen-kind:checkpoint"]
    got = ask("pull", "ann/bears@v1.0.0", "--json").json()
    assert (got["revision"], got["kind"]) == (repo.tags["v1.0.0"], "checkpoint")
    assert (Path(got["folder"]) / "net/net.safetensors").read_bytes() == tensors()
    shown = ask("show", "ann/bears@v1.0.0", "--json", HF_HUB_OFFLINE="1").json()
    assert (shown["family"], shown["license"], shown["revision"]) == ("toy", "mit", got["revision"])
    again = ask("push", mine, "ann/bears", "--tag", "v1.0.0", "--json").json()
    assert (again["status"], len(repo.trees)) == ("already published", 2)
    later = ask("push", mine, "ann/bears", "--tag", "v1.0.1", "--json").json()
    assert (later["status"], repo.tags["v1.0.1"], len(repo.trees)) == ("tagged", repo.tags["v1.0.0"], 2)


def test_a_tag_never_moves_and_old_files_go(ask, server, mine):
    assert ask("push", mine, "ann/bears", "--tag", "v1").code == 0
    written(mine, {"net/net.safetensors": tensors(2)})
    (mine / "net" / "net.safetensors").rename(mine / "net" / "new.safetensors")
    refused = ask("push", mine, "ann/bears", "--tag", "v1")
    assert (refused.code, len(server.repos["ann/bears"].trees)) == (1, 2)
    assert "a tag v1 already, with other content" in refused.err
    assert "net/net.safetensors" in refused.err
    assert ask("push", mine, "ann/bears", "--tag", "v2", "-m", "second").code == 0
    repo = server.repos["ann/bears"]
    assert "net/net.safetensors" not in repo.trees[repo.tags["v2"]]
    assert repo.trees[repo.tags["v1"]]["net/net.safetensors"] == tensors()


def test_a_stale_parent_is_refused_and_nothing_is_lost(ask, server, mine):
    head = server.add("ann/bears", {".gitattributes": b"", "README.md": b"---\nlicense: mit\n---\nby hand"})
    server.race = lambda: server.add("ann/bears", {"other.json": b"{}"})
    late = ask("push", mine, "ann/bears", "--tag", "v1")
    assert (late.code, server.repos["ann/bears"].tags) == (1, {})
    assert "412" in late.err
    assert "Someone else has pushed since" in late.err
    expected = ask("push", mine, "ann/bears", "--parent", head)
    assert (expected.code, "not at the expected" in expected.err) == (1, True)


def test_a_card_written_by_hand_stays(ask, server, mine):
    server.add("ann/bears", {"README.md": b"---\nlicense: mit\n---\nby hand"})
    assert ask("push", mine, "ann/bears").code == 0
    assert server.repos["ann/bears"].trees[server.repos["ann/bears"].names["main"]]["README.md"].endswith(b"by hand")


def test_private_gated_and_other_peoples_repositories(ask, server, mine):
    assert ask("push", mine, "ann/secret", "--private").code == 0
    assert server.repos["ann/secret"].private
    assert "does not exist on the Hub, or is private" in ask("pull", "ann/secret", token="").err
    assert ask("pull", "ann/secret").code == 0
    server.add("bob/terms", files(), gated=True)
    gated = ask("pull", "bob/terms", token="")
    assert (gated.code, "bob/terms is gated" in gated.err) == (1, True)
    theirs = ask("push", mine, "bob/terms")
    assert (theirs.code, "(403)" in theirs.err, "rights to write" in theirs.err) == (1, True, True)
    reader = ask("push", mine, "ann/new", token="hf_reader")
    assert (reader.code, "ann/new" in server.repos) == (1, False)
    wrong = ask("push", mine, "ann/new", token="hf_wrong")
    assert (wrong.code, "hf auth login" in wrong.err) == (1, True)
    server.add("ann/open", files())
    public = ask("push", mine, "ann/open", "--private")
    assert (public.code, "there already, and public" in public.err) == (1, True)


def test_a_pull_request(ask, server, mine):
    head = server.add("bob/bears", {"README.md": b"---\nlicense: mit\n---\n"})
    done = ask("push", mine, "bob/bears", "--create-pr", "--json")
    assert done.code == 0, done.err
    assert done.json()["pull_request"].endswith("/bob/bears/discussions/1")
    repo = server.repos["bob/bears"]
    assert (repo.names["main"], repo.trees[repo.names["refs/pr/1"]]["net/config.json"]) == (head, CONFIG)
    assert ask("push", mine, "bob/bears", "--create-pr", "--tag", "v1").code == 2


def test_what_arrived_is_compared_before_it_is_tagged(ask, server, mine):
    server.spoil = True
    done = ask("push", mine, "ann/bears", "--tag", "v1")
    assert (done.code, server.repos["ann/bears"].tags) == (1, {})
    assert "is not what was sent: net/net.safetensors" in done.err


def refusals():
    bare = {name: data for name, data in files().items() if name != "vgen.json"}
    lora = {"pytorch_lora_weights.safetensors": tensors()}
    own = {"vgen.json": b'{"family": "toy", "license": "mit"}'}
    index = json.dumps({"_class_name": "Toy", "net": ["my_code", "Net"]}).encode()
    shards = json.dumps({"weight_map": {"lost": "net.safetensors"}}).encode()
    wrong = {"net/config.json": "sha256:" + "0" * 64}
    yield {**files(), "net/old.bin": b""}, [], 2, "net/old.bin, which is not published"
    yield {**files(), "run.py": b""}, [], 2, "run.py, which is not published"
    yield bare, ["--license", "mit"], 2, "--family NAME"
    yield bare, ["--family", "toy"], 2, "--license ID"
    yield {**files(), "net/net.safetensors": tensors()[:-1]}, [], 1, "net.safetensors is damaged"
    yield {**files(), "model_index.json": index}, [], 1, "asks for net from 'my_code'"
    yield {**files(), "net/config.json": b'{"auto_map": {"AutoModel": "x.Y"}}'}, [], 1, "net/config.json asks for code"
    yield {**files(), "net/net.safetensors.index.json": shards}, [], 1, "lacks the tensor lost"
    yield files(files=wrong), [], 1, "net/config.json is not the file that vgen.json tells of"
    yield {**lora, **own}, [], 2, "--base REFERENCE"
    yield {"readme.txt": b"nothing"}, [], 2, "neither a checkpoint"
    yield {k: v for k, v in files().items() if "safetensors" not in k}, [], 1, "not whole"


def test_push_refuses_what_would_not_open_elsewhere(ask, server, tmp_path):
    for number, (held, flags, code, says) in enumerate(refusals()):
        done = ask("push", written(tmp_path / str(number), held), "ann/bears", *flags)
        assert (done.code, says in done.err) == (code, True), done.err
    assert not server.asked


def test_an_adapter_by_folder_and_by_file(ask, server, tmp_path):
    told = {"family": "toy", "license": "mit", "base": {"reference": BASE}, "part": "body"}
    held = {"pytorch_lora_weights.safetensors": tensors(), "vgen.json": json.dumps(told).encode()}
    folder = written(tmp_path / "look", held)
    assert ask("push", folder, "ann/look", "--tag", "v1").code == 0
    card = server.repos["ann/look"].card()
    assert (card["base_model"], card["base_model_relation"]) == ("toys/big", "adapter")
    assert "lora" in card["tags"]
    same = ask("push", folder / "pytorch_lora_weights.safetensors", "ann/look", "--tag", "v1", "--json")
    assert same.json()["status"] == "already published"
    got = ask("pull", "ann/look@v1", "--json").json()
    assert got["kind"] == "adapter"
    assert ask("verify", "ann/look@v1", HF_HUB_OFFLINE="1").code == 0
    rows = [json.loads(line) for line in ask("list", "toy", "--json").out.splitlines()]
    assert (got["checkpoint"], "adapter") in [(row["checkpoint"], row["kind"]) for row in rows]
    used = vgen("sample", "toy", "x", "--checkpoint", got["folder"])
    assert (used.code, "is an adapter" in used.err, "--lora" in used.err) == (2, True, True)


def test_search_by_tags(ask, server, mine, tmp_path):
    assert ask("push", mine, "ann/bears").code == 0
    server.add("bob/bears", {"README.md": b"---\ntags: [bears]\nlicense: mit\n---\n"})
    server.add("bob/hidden", server.repos["ann/bears"].trees[server.repos["ann/bears"].names["main"]], private=True)
    (row,) = [json.loads(line) for line in ask("search", "--json").out.splitlines()]
    assert (row["checkpoint"], row["family"], row["kind"], row["license"]) == ("ann/bears", "toy", "checkpoint", "mit")
    assert "ann/bears" in ask("search", "bear", "--family", "toy", "--kind", "checkpoint", "--tag", "license:mit").out
    assert ask("search", "--kind", "adapter").out == ""
    assert ask("search", "--kind", "model").code == 2


def test_an_interrupted_download_goes_on(ask, server, tmp_path):
    big = tensors(3, 11 << 20)
    server.add("bob/big", {**files(), "net/net.safetensors": big})
    server.cut["net/net.safetensors"] = [(10 << 20) + 9]
    got = ask("pull", "bob/big", "--json")
    assert got.code == 0, got.err
    assert (Path(got.json()["folder"]) / "net/net.safetensors").read_bytes() == big
    assert [one.rpartition(" ")[2] for one in server.asked if "bytes=" in one] == [f"bytes={10 << 20}-"]


def test_a_download_that_breaks_off_says_so_and_keeps_what_is_whole(ask, server, tmp_path):
    server.add("bob/big", files())
    server.cut["net/net.safetensors"] = [9] * 9
    broken = ask("pull", "bob/big")
    assert (broken.code, "Traceback" in broken.err) == (1, False)
    assert "cannot be reached: peer closed" in broken.err
    server.cut.clear()
    server.asked.clear()
    assert ask("pull", "bob/big").code == 0
    assert not [one for one in server.asked if one.startswith("GET") and "resolve" in one and "config" in one]


def test_corrupted_bytes_are_found_before_use_also_in_a_cache_filled_by_others(ask, server, tmp_path):
    server.add("bob/big", files())
    server.damage["net/config.json"] = CONFIG.replace(b"3", b"4")
    bad = ask("pull", "bob/big")
    assert (bad.code, "arrived damaged: net/config.json" in bad.err) == (1, True)
    server.damage.clear()
    good = ask("pull", "bob/big", "--json").json()
    config = (Path(good["folder"]) / "net/config.json").resolve()
    config.write_bytes(CONFIG.replace(b"3", b"5"))
    used = vgen("sample", "toy", "x", "--checkpoint", good["checkpoint"], **server.environment(tmp_path / "home"))
    assert (used.code, "arrived damaged: net/config.json" in used.err) == (1, True), used.err
    assert not config.exists()


@pytest.mark.parametrize("revision", ["", "@{}"])
def test_a_false_hash_in_the_repositorys_own_vgen_json_is_told_and_nothing_is_fetched_again(ask, server, revision):
    false = {"net/config.json": "sha256:" + "0" * 64, "net/net.safetensors": hashlib.sha256(tensors()).hexdigest()}
    name = "bob/big" + revision.format(server.add("bob/big", files(files=false)))
    bad = ask("pull", name)
    assert (bad.code, bad.out, bad.err.count("Error")) == (1, "", 1)
    assert "contradicts itself: net/config.json arrived whole, but vgen.json tells sha256:0000" in bad.err
    assert "Fetching it again cannot mend it" in bad.err
    server.asked.clear()
    assert ask("pull", name).err == bad.err
    assert not [one for one in server.asked if one.startswith("GET") and "resolve" in one]
    told = ask("verify", name)
    assert (told.code, "contradicts itself" in told.err) == (1, True), told.err
    server.add("bob/big", files())
    assert ask("pull", "bob/big").code == 0


def test_a_branch_is_asked_for_anew_and_a_commit_stays(ask, server, tmp_path):
    first = server.add("bob/big", files(1))
    assert ask("pull", "bob/big", "--json").json()["revision"] == first
    second = server.add("bob/big", files(2))
    assert ask("pull", "bob/big@main", "--json").json()["revision"] == second
    assert ask("pull", f"bob/big@{first}", "--json").json()["revision"] == first
    server.asked.clear()
    offline = ask("pull", "bob/big", "--json", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9").json()
    assert (offline["revision"], server.asked) == (second, [])


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"../../evil.json": b"{}"}, "'../../evil.json', which leads out"),
        ({"/etc/evil.json": b"{}"}, "'/etc/evil.json', which leads out"),
        ({"a\\..\\evil.json": b"{}"}, "which leads out"),
        ({"net/net.safetensors": None, "net/model.bin": b"x"}, "net/model.bin are pickled"),
        ({"net/config.json": b'{"auto_map": {}}'}, "net/config.json asks for code of its own"),
        ({"model_index.json": b'{"_class_name": ["mine", "Toy"]}'}, "a pipeline of its own"),
    ],
)
def test_hostile_repositories_are_refused_by_name(ask, server, tmp_path, held, says):
    server.add("bob/evil", {k: v for k, v in {**files(), **held}.items() if v is not None})
    done = ask("pull", "bob/evil")
    assert (done.code, says in done.err) == (1, True), done.err
    assert not list(tmp_path.rglob("evil.json"))


def test_odd_files_are_left_out_and_named(ask, server):
    server.add("bob/mixed", {**files(), "run_me.py": b"print()", "all.ckpt": b"x", "LICENSE": b"mit"})
    done = ask("pull", "bob/mixed", "--json")
    assert "all.ckpt, run_me.py" in done.err
    held = {path.name for path in Path(done.json()["folder"]).rglob("*") if path.is_file()}
    assert held == {"model_index.json", "config.json", "net.safetensors", "vgen.json", "LICENSE"}

"""Where weights come from, as vgen.json and records tell it: data, run, checkpoint, sample."""

import json

import pytest
from shell import vgen
from test_exchange import files, tensors, written

from vgen import lineage, record
from vgen.errors import VgenError

SETTINGS = {"max_train_steps": 1000, "seed": 1, "output": "tuned", "checkpoint": "toy.big", "data": ["latents"]}


def trained(base, reference, folder, fill):
    """A checkpoint that says it was trained from `base`."""
    origin = {
        "base": lineage.base(base, reference),
        "data": lineage.data({"/home/ann/latents": ["b" * 32, "a" * 32]}),
        "run": lineage.run("finetune", "toy", SETTINGS),
    }
    return written(folder, files(fill, **origin))


@pytest.fixture
def generations(tmp_path):
    """A checkpoint, one trained from it, and one trained from that."""
    first = written(tmp_path / "first", files(1))
    second = trained(first, f"toys/big@{'1' * 40}", tmp_path / "second", 2)
    return first, second, trained(second, "second", tmp_path / "third", 3)


def test_the_chain_goes_back_to_the_first_base(generations):
    first, second, third = generations
    lines = list(lineage.chain(third, "third"))
    assert [line.partition(" ")[0] for line in lines] == ["checkpoint", "run", "data", "base", "run", "data", "base"]
    assert lines[0] == f"checkpoint third ({lineage.identity(third)[:19]})"
    assert lines[1].endswith(": finetune, 1000 steps")
    assert lines[2].startswith("data latents: 2 clips (sha256:")  # the folder's name alone, not where it lies
    assert lines[3] == f"base second ({lineage.identity(second)[:19]})"
    assert lines[6] == f"base toys/big@{'1' * 40} ({lineage.identity(first)[:19]})"
    assert "/home/ann" not in (third / "vgen.json").read_text()


def test_hashes_of_data_and_runs_depend_on_what_decides_them():
    one, same = lineage.data({"x": ["b", "a"]}), lineage.data({"elsewhere/x": ["a", "b"]})
    assert one == same
    assert lineage.data({"x": ["a", "c"]})[0]["hash"] != one[0]["hash"]
    run = lineage.run("finetune", "toy", SETTINGS)
    assert lineage.run("finetune", "toy", {**SETTINGS, "output": "other"}) == run
    assert lineage.run("finetune", "toy", {**SETTINGS, "seed": 2})["id"] != run["id"]


def test_a_sample_names_its_checkpoint_by_hash(generations, tmp_path):
    third = generations[2]
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"")
    told = {"reference": "third", "folder": str(third), "files": lineage.weights(third)}
    record.Run("sample", "toy", {}, told).write(clip, adapters={"ann/look:0.5": "sha256:" + "7" * 64})
    shown = vgen("checkpoints", "show", clip, "--json").json()
    assert [line.partition(" ")[0] for line in shown["lineage"][:4]] == ["sample", "adapter", "checkpoint", "run"]
    written(third, {"net/net.safetensors": tensors(9)})
    changed = vgen("checkpoints", "show", clip)
    assert "which is not at" in changed.out
    assert "run " not in changed.out
    (tmp_path / "clip.mp4.toml").unlink()
    bare = vgen("checkpoints", "show", clip)
    assert (bare.code, "has no record beside it" in bare.err) == (1, True)
    with pytest.raises(VgenError, match="no record"):
        lineage.sample(tmp_path / "none.mp4")


def test_a_manifest_that_tells_nonsense_is_no_lineage(tmp_path):
    nonsense = ({"base": "x"}, {"run": {}}, {"base": {}, "data": 1, "run": 3}, {"base": {"files": 2}, "data": ["x"]})
    for number, told in enumerate(nonsense):
        folder = written(tmp_path / str(number), files(**told))
        first, *_ = lineage.chain(folder, "x")
        assert first.startswith("checkpoint x (sha256:")
    (folder / "vgen.json").write_text(json.dumps([1]))
    assert len(list(lineage.chain(folder, "x"))) == 1

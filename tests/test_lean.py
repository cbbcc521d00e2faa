"""A run that only runs networks imports no more than that; what it left out is there for whoever asks later."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
from shell import run

MODULES = """
import json, sys
from vgen.cli import main
try:
    main()
except SystemExit as end:
    names = ("bitsandbytes", "diffusers", "peft", "transformers", "torch._dynamo")
    print(json.dumps([end.code or 0, [name for name in names if name in sys.modules]]), file=sys.stderr)
"""
AFTERWARDS = """
import sys
from pathlib import Path
from vgen import lean
lean.leave_out()
from vgen.plugins.cogvideox import describe
from vgen.plugins.cogvideox.model import load
import torch
from vgen.machine import machine
assert not {"peft", "bitsandbytes", "transformers", "torch._dynamo"} & set(sys.modules)

folder = Path(sys.argv[1])
network = load(folder, describe(folder), machine("cpu", "fp32")).networks.get("transformer")
import peft, transformers
adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"]), network)
assert any("lora_A" in name for name, _ in adapted.named_parameters())
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
assert torch._dynamo.disable(len) is not len
"""
STAND_IN = """
import sys
from vgen import lean
lean.leave_out()
with lean.imports("transformers"):
    import torch
    import transformers
    stand_in = sys.modules["torch._dynamo"]
    assert torch.compiler.disable(len) is len
    assert torch.compiler.disable()(len) is len
    assert torch.compiler.allow_in_graph(len) is len
    try:
        import peft
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("peft was imported")
    assert stand_in.OptimizedModule.__module__ == "torch._dynamo.eval_frame"
    assert sys.modules["torch._dynamo"] is not stand_in
import peft, bitsandbytes
assert torch._dynamo.disable(len) is not len
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("lean") / "c")


def sampled(checkpoint: Path, folder: Path, *flags: str) -> list[str]:
    """The libraries that sampling imported."""
    words = ["sample", "cogvideox", "a red ball rising", "--checkpoint", str(checkpoint), "--seed", "1"]
    done = run(
        [sys.executable, "-c", MODULES, *words, "--num-inference-steps", "2", "--overwrite", "-o", "x.mp4", *flags],
        cwd=folder,
        VGEN_HOME=str(folder),
    )
    code, names = json.loads(done.err.splitlines()[-1])
    assert code == 0
    return names


def test_sampling_imports_what_it_uses(checkpoint: Path, tmp_path: Path):
    assert sampled(checkpoint, tmp_path) == ["diffusers", "transformers"]  # the text is new
    assert sampled(checkpoint, tmp_path) == ["diffusers"]


def test_with_caching_nothing_breaks(checkpoint: Path, tmp_path: Path):
    assert "peft" not in sampled(checkpoint, tmp_path, "--cache", "fbcache")


@pytest.mark.parametrize("script", [AFTERWARDS, STAND_IN])
def test_what_was_left_out_can_be_had_afterwards(checkpoint: Path, script: str):
    done = run([sys.executable, "-c", script, str(checkpoint)])
    assert done.code == 0, done.err


def test_without_being_told_nothing_is_left_out():
    script = "from vgen import lean\nwith lean.imports():\n    import peft, torch._dynamo\n    torch._dynamo.config"
    done = run([sys.executable, "-c", script])
    assert done.code == 0, done.err

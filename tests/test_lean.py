"""A run imports what it uses and no more; what it left out is there for whoever asks later."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import trained
from shell import run

from vgen.lora import train_lora
from vgen.plugins.cogvideox import family

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
ALONE = """
import sys
from vgen import lean
lean.leave_out("peft")
with lean.imports("peft", "transformers"):
    import peft, torch
    assert torch._dynamo.config.verbose is False
    assert torch._dynamo is sys.modules["torch._dynamo"] is not None
    assert not torch.distributed.is_available()
assert torch.distributed.is_available()
assert not {"sympy", "torch._dynamo", "torch.distributed.tensor", "bitsandbytes"} & set(sys.modules)
with lean.untraced():
    assert torch.distributed.is_available()
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([w])
    torch.utils.checkpoint.checkpoint(lambda w: (w * w).sum(), w, use_reentrant=False).backward()
    optimizer.step()
    optimizer.zero_grad()
assert "torch._dynamo" not in sys.modules
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
assert torch._dynamo.config.verbose is False
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("lean") / "c")


def imported(checkpoint: Path, folder: Path, *words: str) -> list[str]:
    """The libraries that a run in `folder` imported."""
    line = [*words, "--checkpoint", str(checkpoint), "--seed", "3", "--device", "cpu", "--overwrite"]
    done = run([sys.executable, "-c", MODULES, *line], cwd=folder, VGEN_HOME=str(folder))
    code, names = json.loads(done.err.splitlines()[-1])
    assert code == 0, done.err
    return names


def sampled(checkpoint: Path, folder: Path, *flags: str) -> list[str]:
    """The libraries that sampling imported."""
    words = ("sample", "cogvideox", "a red ball rising", "--num-inference-steps", "2", "-o", "x.mp4")
    return imported(checkpoint, folder, *words, *flags)


def test_sampling_imports_what_it_uses(checkpoint: Path, tmp_path: Path):
    assert sampled(checkpoint, tmp_path) == ["diffusers", "transformers"]  # the text is new
    assert sampled(checkpoint, tmp_path) == ["diffusers"]


def test_with_caching_nothing_breaks(checkpoint: Path, tmp_path: Path):
    assert "peft" not in sampled(checkpoint, tmp_path, "--cache", "fbcache")


def test_training_imports_what_it_uses_and_has_the_same_bits(checkpoint: Path, tmp_path: Path):
    """In this process nothing is left out."""
    data = trained.stored(checkpoint, tmp_path / "store", ["world:20"], (1, 32, 32))
    flags: dict[str, Any] = {"data": [data], "max_train_steps": 2, "rank": 2, "gradient_checkpointing": True}
    words = ("cogvideox", "--data", data, "--max-train-steps", "2", "--gradient-checkpointing")
    lora = ("train-lora", *words, "--rank", "2", "-o", "lora", "--validation-prompt", "a ball")
    assert imported(checkpoint, tmp_path, *lora) == ["diffusers", "peft", "transformers"]
    asked = tiny.asked(checkpoint, "train-lora", **flags, output=tmp_path / "whole")
    train_lora(family, tiny.model(checkpoint), checkpoint, asked, tiny.CPU)
    assert trained.same(trained.state(tmp_path / "lora"), trained.state(tmp_path / "whole"))
    assert imported(checkpoint, tmp_path, "finetune", *words, "-o", "weights") == ["diffusers"]
    assert sampled(checkpoint, tmp_path, "--lora", "whole") == ["diffusers", "peft", "transformers"]


@pytest.mark.parametrize("script", [AFTERWARDS, STAND_IN, ALONE])
def test_what_was_left_out_can_be_had_afterwards(checkpoint: Path, script: str):
    done = run([sys.executable, "-c", script, str(checkpoint)])
    assert done.code == 0, done.err


def test_without_being_told_nothing_is_left_out():
    script = "from vgen import lean\nwith lean.imports():\n    import peft, torch._dynamo\n    torch._dynamo.config"
    done = run([sys.executable, "-c", script])
    assert done.code == 0, done.err

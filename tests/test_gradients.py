"""What a step does: optimizers, accumulation, faults, which weights train, and what is held out of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import ignore
from torch import Tensor, nn
from trained import MANY, asked, log, run, same, state, stored

from vgen import diffusion, train
from vgen.dataset import hold_out
from vgen.errors import UsageError, VgenError
from vgen.finetune import batches
from vgen.optimizers import optimizers
from vgen.options import FinetuneOptions
from vgen.plugins.cogvideox import family


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty pictures of the world."""
    return stored(folder, tmp_path_factory.mktemp("data") / "store", [f"world:{MANY}"], (1, 32, 32))


# Optimizers


@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit"])
def test_other_optimizers_resume_to_the_bit(folder: Path, store: str, tmp_path: Path, optimizer: str) -> None:
    told = {"data": [store], "optimizer": optimizer}
    run(folder, tmp_path / "whole", **told, max_train_steps=4)
    run(folder, tmp_path / "half", **told, max_train_steps=2)
    run(folder, tmp_path / "half", **told, max_train_steps=4, resume=True)
    assert same(state(tmp_path / "whole"), state(tmp_path / "half"))
    eight = [t for name, t in state(tmp_path / "half").items() if t.dtype == torch.uint8]
    assert bool(eight) == (optimizer == "adamw8bit")


@pytest.mark.parametrize("optimizer", ["paged-adamw", "paged-adamw8bit"])
def test_paged_optimizers_need_an_accelerator(folder: Path, store: str, tmp_path: Path, optimizer: str) -> None:
    with pytest.raises(UsageError, match="pages its state"):
        run(folder, tmp_path / "out", data=[store], optimizer=optimizer)
    assert not (tmp_path / "out").exists()


def test_muon_takes_the_kernels_of_a_convolution_as_rows_of_a_matrix() -> None:
    torch.manual_seed(0)
    kernels = nn.Parameter(torch.randn(4, 3, 3, 3))
    rows = nn.Parameter(kernels.detach().flatten(1).clone())
    options = FinetuneOptions(optimizer="muon", learning_rate=0.1, adam_weight_decay=0.1)
    (ours,) = optimizers({"conv": kernels}, options, torch.device("cpu"))
    told = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon([rows], **told)
    for _ in range(3):
        grad = torch.randn_like(kernels)
        kernels.grad, rows.grad = grad, grad.flatten(1)
        ours.step()
        theirs.step()
        assert kernels.shape == kernels.grad.shape == (4, 3, 3, 3)
        assert torch.equal(kernels.flatten(1), rows)
    assert not torch.equal(kernels.grad, torch.zeros_like(kernels))


# Gradients


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 3)])
def test_accumulated_gradients_are_those_of_one_batch(folder: Path, store: str, tmp_path: Path, sizes: Any) -> None:
    """One forward pass over all clips, by hand, with the times and the noise that the micro-batches draw."""
    told = asked(folder, tmp_path, data=[store])
    data, part = batches(family, tiny.model(folder), told), tiny.model(folder).part("transformer", told)
    (network,) = part.modules.values()
    some = [{k: v[:n] for k, v in {**data(i), **_more(data, i)}.items()} for i, n in enumerate(sizes)]
    loss = train.gradients(part, some, told, tiny.CPU, 7, torch.amp.GradScaler("cpu", enabled=False))
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()

    times, noise = [], []
    for k, batch in enumerate(some):
        generator = train.seeded(told.seed, "noise", 7, k)
        times.append(diffusion.sample_times(part.process, sizes[k], generator, (k, len(sizes))))
        noise.append(torch.randn(batch["latents"].shape, generator=generator))
    t, e, x = torch.cat(times), torch.cat(noise), torch.cat([batch["latents"] for batch in some])
    a, s = diffusion.levels(part.process, t, x)
    text = torch.cat([batch["text"] for batch in some])
    out = diffusion.call(part.predict, part.process, a * x + s * e, t, {"text": text})
    whole = (out - diffusion.target("v", x, e, a, s)).square().mean()
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for p, grad in zip(network.parameters(), found, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-6 * max(1.0, float(p.grad.abs().max())))
    shares = [int(one * len(sizes) / 1000) for one in torch.cat(times)]
    assert shares == [k for k, n in enumerate(sizes) for _ in range(n)]


def _more(data: Any, i: int) -> dict[str, Any]:
    """A batch of three clips, made of two."""
    first, then = data(2 * i), data(2 * i + 1)
    return {k: torch.cat([v, then[k]]) if isinstance(v, Tensor) else [*v, *then[k]] for k, v in first.items()}


def test_each_time_by_itself_where_that_is_asked_for() -> None:
    process = diffusion.cogvideox()
    draws = [diffusion.sample_times(process, 8, torch.Generator().manual_seed(i), None) for i in range(40)]
    strata = [sorted((t // 125).long().tolist()) for t in draws]
    assert list(range(8)) not in strata
    assert torch.cat(draws).mean() == pytest.approx(500, abs=60)


class Fragile:
    """A part that breaks on some clips: in its loss (NaN), or in its gradient alone (great numbers)."""

    name = "fragile"

    def __init__(self) -> None:
        self.modules = {"net": nn.Linear(1, 1)}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        net = self.modules["net"]
        made = net(batch["x"].clamp(max=1)).mean()
        steep = (net.weight - net.weight.detach()).abs().sqrt().sum()  # 0, with a slope that is not finite
        return made + steep if bool((batch["x"] > 1e30).any()) else made


@pytest.mark.parametrize(("value", "says"), [(torch.nan, "loss became nan"), (3e38, "norm of the gradients became")])
def test_the_one_clip_that_breaks_is_found(folder: Path, tmp_path: Path, value: float, says: str) -> None:
    told = asked(folder, tmp_path, data=["x"], gradient_accumulation_steps=3)

    def batch(i: int) -> dict[str, Any]:
        x = torch.tensor([[1.0], [value if i == 4 else 0.5]])
        return {"x": x, "keys": [f"good-{i}", "bad" if i == 4 else f"fine-{i}"]}

    with pytest.raises(VgenError, match=rf"{says}.* at step 2, on: bad\."):
        train.fit(Fragile(), batch, told, tiny.CPU, tmp_path, train.Between(ignore))  # type: ignore[arg-type]


def test_only_what_is_named_trains(folder: Path, store: str, tmp_path: Path) -> None:
    out, told = tmp_path / "out", {"data": [store], "trainable": ["transformer_blocks.1.attn1", "proj_out"]}
    run(folder, out, **told, max_train_steps=1)
    run(folder, out, **told, resume=True)
    before, after = (tiny.model(where).networks.get("transformer").state_dict() for where in (folder, out))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {n for n in after if n.startswith(("transformer_blocks.1.attn1.", "proj_out."))}
    kept = [name for name in state(out) if name.startswith("weights/")]
    assert len(kept) == len(changed) + len([n for n in kept if n.endswith("pos_embedding")])
    with pytest.raises(UsageError, match=r"--trainable proj_in: no weight .*\n.*Did you mean 'proj(_out)?'"):
        run(folder, tmp_path / "no", data=[store], trainable=["proj_in"])


# Held-out clips


def test_some_clips_are_held_out_and_evaluated(folder: Path, store: str, tmp_path: Path) -> None:
    told = {"data": [store], "eval_share": 0.15, "eval_steps": 2, "ema_decay": 0.5, "max_train_steps": 3}
    run(folder, tmp_path / "a", **told)
    run(folder, tmp_path / "b", **told)
    lines = [line for line in log(tmp_path / "a") if "eval_loss" in line]
    assert lines == [line for line in log(tmp_path / "b") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 3]
    for line in lines:
        bands = [line[f"eval_loss_band_{band}"] for band in range(4)]
        assert line["eval_loss"] == pytest.approx(sum(bands) / 4)
    data = batches(family, tiny.model(folder), asked(folder, tmp_path, data=[store], eval_share=0.15))
    held = {key for make in data.held for key in make()["keys"]}
    assert len(held) == 3
    assert held.isdisjoint(key for i in range(40) for key in data(i)["keys"])
    # by hand, on the average that was exported
    part = tiny.model(tmp_path / "a").part("transformer", asked(folder, tmp_path, data=[store]))
    again = train.evaluate(part, data.held, 3)
    assert again == pytest.approx({k: v for k, v in lines[-1].items() if k != "step"}, rel=1e-5)


def test_evaluation_changes_nothing(folder: Path, store: str, tmp_path: Path) -> None:
    for name, every in (("often", 1), ("never", 0)):
        run(folder, tmp_path / name, data=[store], eval_steps=every, part="transformer")
    assert same(state(tmp_path / "often"), state(tmp_path / "never"))
    pixels = {"part": "autoencoder", "data": ["world:17"], "num_frames": 1, "max_train_steps": 1}
    for name, every in (("ae-often", 1), ("ae-never", 0)):
        run(folder, tmp_path / name, **pixels, eval_steps=every)
    assert same(state(tmp_path / "ae-often"), state(tmp_path / "ae-never"))
    assert {"step", "eval_loss"} == set(log(tmp_path / "ae-often")[0])


def test_what_is_held_out() -> None:
    assert hold_out({"a": range(15)}, 0.5, 1)[1] == {}
    assert hold_out({"a": range(40)}, 0.0, 1)[1] == {}
    train_on, held = hold_out({"a": range(30), "alone": [99]}, 0.02, 1)
    assert train_on["alone"] == [99]
    assert len(held["a"]) == 1
    assert sorted([*train_on["a"], *held["a"]]) == list(range(30))
    assert len(hold_out({"a": range(1000)}, 0.5, 1)[1]["a"]) == 4
    assert hold_out({"a": range(1000)}, 0.5, 1) == hold_out({"a": range(1000)}, 0.5, 1)

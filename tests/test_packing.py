"""Packs of clips of any shapes: filled, repeated and trained as if each clip were alone; curricula; pictures."""

from __future__ import annotations

import inspect
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vgen import clips, curriculum, diffusion, packing
from vgen.encode import embed_captions, encode
from vgen.errors import UsageError, VgenError
from vgen.family import resolve
from vgen.finetune import batches, finetune
from vgen.packing import Packs, fill
from vgen.plugins.cogvideox import CHECKPOINTS, Finetune, describe, family
from vgen.plugins.cogvideox.attention import Products
from vgen.plugins.cogvideox.pictures import Pictures
from vgen.plugins.cogvideox.transformer import Transformer
from vgen.settings import gather
from vgen.store import Store
from vgen.tensorfile import load_tensors

SIZES = [(9, 32, 32), (1, 32, 32), (1, 32, 48)]
TOKENS = {(9, 32, 32): 8 + 3 * 16, (1, 32, 32): 8 + 16, (1, 32, 48): 8 + 24}
PACKED = {"pack": 80, "learning_rate": 3e-3, "lr_scheduler": "constant", "caption_dropout": 0.3}


def ignore(*_: Any) -> None:
    """Nobody watches."""


def fill_store(folder: Path, place: Path, sizes: list[tuple[int, int, int]], each: int) -> str:
    """A store of `each` clips of the world in each of the sizes."""
    model, items = tiny.model(folder), clips.discover([f"world:{each * len(sizes)}"])
    made = Store.open(place, space=model.space, text_space=model.text_space, create=True)
    told = tiny.asked(folder, "encode", inputs=["world:1"])
    embed_captions(model, made, items, ignore)
    for i, size in enumerate(sizes):
        list(encode(model, made, items[i * each : (i + 1) * each], [size], told, ignore))
    return str(place)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "c", "5b")


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "i", "1.5-5b-i2v")


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four clips of three shapes each: many frames, one frame, and one frame of another size."""
    return fill_store(folder, tmp_path_factory.mktemp("data") / "store", SIZES, 4)


def run(folder: Path, output: Path, **flags: Any) -> dict[str, Any]:
    told = tiny.asked(folder, "finetune", **{"max_train_steps": 6, **flags}, output=output)
    return finetune(family, tiny.model(folder), folder, told, tiny.CPU)


def lines(output: Path) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in (output / "training" / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in told]


def shaped(batch: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Frames, height and width of the clips of a batch."""
    found = [one for some in batch["latents"] for one in (some if some.ndim == 5 else [some])]
    return [curriculum.pixels(one.shape, (4, 4, 4)) for one in found]


# The network


def network(kind: str) -> Any:
    torch.manual_seed(0)
    made = tiny._transformer(kind)
    for p in made.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return made


def of_kind(kind: str) -> tuple[Transformer, list[Tensor], Tensor, Tensor]:
    """A transformer, three clips (1, C, T, H, W) of the shapes that it takes, their texts and times."""
    part = Transformer(network(kind), diffusion.cogvideox())
    t = part.network.config.patch_size_t or 1
    sizes = [(3, 8, 8)] * 3 if kind == "5b-i2v" else [(4 if t > 1 else 3, 8, 8), (t, 8, 8), (2, 8, 4)]
    return part, [torch.randn(1, 4, *size) for size in sizes], torch.randn(3, 8, 16), torch.tensor([10.0, 500.0, 999.0])


@pytest.mark.parametrize("processor", [None, Products()], ids=["fused", "products"])
@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_a_packed_call_is_as_many_separate_calls(kind: str, processor: Any) -> None:
    part, given, text, t = of_kind(kind)
    if processor:
        part.network.set_attn_processor(processor)
    pictures = {"image": [torch.randn_like(x) for x in given]} if "i2v" in kind else {}
    alone = [
        part.predict(x, t[i : i + 1], {"text": text[i : i + 1], **{k: v[i] for k, v in pictures.items()}})
        for i, x in enumerate(given)
    ]
    apart = gradients(part.network, alone)
    for recompute in (False, True):
        if recompute:
            part.network.enable_gradient_checkpointing()
        together = part.predict_pack(given, t, {"text": text, **pictures})
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        for a, b in zip(gradients(part.network, together), apart, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def gradients(net: nn.Module, outputs: list[Tensor]) -> list[Tensor]:
    net.zero_grad()
    sum(((one**2).mean() for one in outputs), torch.zeros(())).backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("change", ["latents", "text", "time"])
def test_no_clip_of_a_pack_sees_another(change: str) -> None:
    part, given, text, t = of_kind("5b")
    with torch.no_grad():
        before = part.predict_pack(given, t, {"text": text})
        if change == "latents":
            given[1] = torch.randn_like(given[1])
        elif change == "text":
            text[1] = torch.randn_like(text[1])
        else:
            t[1] = 700.0
        after = part.predict_pack(given, t, {"text": text})
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_no_table_of_pairs_of_tokens_is_made() -> None:
    """The largest tensor of a packed pass is smaller than one value for each pair of its tokens."""
    part = Transformer(network("5b"), diffusion.cogvideox())
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    n = 40
    given = [torch.randn(1, 4, 1, 8, 8) for _ in range(n)]
    with torch.no_grad(), Watch():
        part.predict_pack(given, torch.full((n,), 5.0), {"text": torch.randn(n, 8, 16)})
    assert largest < (n * (8 + 16)) ** 2


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_plain_products_are_the_attention_of_diffusers(kind: str) -> None:
    part, given, text, t = of_kind(kind)
    with torch.no_grad():
        usual = part.predict(given[0], t[:1], {"text": text[:1]})
        part.network.set_attn_processor(Products())
        plain = part.predict(given[0], t[:1], {"text": text[:1]})
    torch.testing.assert_close(plain, usual, atol=1e-5, rtol=0)


def test_bf16_on_the_cpu_trains_by_plain_products(folder: Path) -> None:
    for flags, expected in (({"mixed_precision": "bf16"}, True), ({}, False)):
        part = tiny.model(folder).part("transformer", tiny.asked(folder, "finetune", data=["x"], **flags))
        made = {isinstance(one, Products) for one in part.modules["transformer"].attn_processors.values()}
        assert made == {expected}


# The loss


def test_a_pack_of_one_shape_has_the_loss_of_a_batch() -> None:
    part, _, text, _ = of_kind("5b")
    x, weight = torch.randn(3, 4, 3, 8, 8), torch.rand(3, 1, 3, 8, 8)
    for share in ((0, 1), (1, 4)):
        told = (part.process, part.output)
        generators = [torch.Generator().manual_seed(5) for _ in range(2)]
        whole = diffusion.loss(part.predict, *told, x, {"text": text}, generators[0], weight=weight, share=share)
        split, weights = list(x.split(1)), list(weight.split(1))
        many = packing.loss(
            part.predict_pack, *told, split, {"text": text}, generators[1], weights=weights, share=share
        )
        torch.testing.assert_close(many, whole, atol=1e-6, rtol=1e-5)


def test_long_clips_weigh_no_more_than_short_ones() -> None:
    """With a network that says nothing, each clip's error is about its own mean square: 1 and 9 have the mean 5."""
    process = diffusion.cogvideox()
    short, long = torch.ones(1, 4, 1, 8, 8), torch.ones(1, 4, 30, 8, 8)
    found = []
    for i in range(300):
        generator = torch.Generator().manual_seed(i)
        found.append(
            packing.loss(
                lambda z, t, c: [torch.zeros_like(one) for one in z], process, "x0", [short, 3 * long], {}, generator
            )
        )
    assert torch.stack(found).mean().item() == pytest.approx(5.0)


@pytest.mark.parametrize("micro", [1, 3])
def test_times_of_a_step_cover_every_stratum_once(micro: int) -> None:
    """Explicit uniform sampling over packs, and over the packs of one step."""
    seen: list[int] = []

    def watch(z: list[Tensor], t: Tensor, cond: Mapping[str, Any]) -> list[Tensor]:
        seen.extend(int(one) for one in t)
        return z

    given = [torch.zeros(1, 1, 1 + i % 2, 2, 2) for i in range(5)]
    for k in range(micro):
        generator = torch.Generator().manual_seed(k)
        packing.loss(watch, diffusion.cogvideox(), "v", given, {}, generator, share=(k, micro))
    width = 1000 / (5 * micro)
    assert Counter(int(one // width) for one in sorted(seen)) == Counter(range(5 * micro))


# Filling


def test_packs_hold_every_item_once_in_each_epoch_and_repeat() -> None:
    lengths = [10] * 7 + [25] * 5 + [60] * 3 + [95] * 2
    items = [(n, i) for i, n in enumerate(lengths)]
    packs, again, other = (Packs(items, lambda item: item[0], 100, seed) for seed in (1, 1, 2))
    per = len(packs.plan)
    for epoch in range(3):
        made = [packs.of(epoch * per + i) for i in range(per)]
        assert Counter(itertools.chain(*made)) == Counter(items)
        assert all(sum(n for n, _ in pack) <= 100 for pack in made)
    assert [packs.of(0), packs.of(per)] != [packs.of(per), packs.of(0)]
    assert [again.of(i) for i in reversed(range(3 * per))] == [packs.of(i) for i in reversed(range(3 * per))]
    assert [other.of(i) for i in range(per)] != [packs.of(i) for i in range(per)]


@pytest.mark.parametrize(
    ("counts", "budget", "packs"),
    [({5: 3}, 5, 3), ({6: 2, 4: 2}, 10, 2), ({1: 10}, 10, 1), ({7: 1, 3: 1, 2: 5}, 10, 2)],
)
def test_packs_are_as_full_as_can_be(counts: dict[int, int], budget: int, packs: int) -> None:
    made = fill(counts, budget)
    assert len(made) == packs
    assert Counter(itertools.chain(*made)) == Counter(counts)


def test_the_clips_of_the_paper_fill_its_budgets() -> None:
    """75,000 tokens with clips of 480x720, 49 frames and stills: at least nine tenths are used."""
    lengths = {13 * 1350 + 226: 90, 1350 + 226: 200, 600 + 226: 200}
    items = [(n, i) for n, count in lengths.items() for i in range(count)]
    packs = Packs(items, lambda item: item[0], 75_000, 0)
    assert packs.utilisation > 0.9
    assert packs.utilisation == pytest.approx(sum(n for n, _ in items) / (75_000 * len(packs.plan)))


def test_what_cannot_be_packed() -> None:
    with pytest.raises(UsageError, match="30 tokens does not fit into --pack 20"):
        Packs([30, 5], int, 20, 0)
    with pytest.raises(VgenError, match="nothing to train on"):
        Packs([], int, 20, 0)


# Training


def test_batches_of_a_store_are_packs(folder: Path, store: str) -> None:
    model, told = tiny.model(folder), tiny.asked(folder, "finetune", data=[store], **PACKED)
    make = batches(family, model, told)
    made = [make(i) for i in range(8)]
    sizes = [shaped(one) for one in made]
    assert [sum(TOKENS[one] for one in some) for some in sizes] == [
        sum(model.tokens(tuple(x.shape[-4:])) for some in one["latents"] for x in (some if some.ndim == 5 else [some]))
        for one in made
    ]
    assert all(sum(TOKENS[one] for one in some) <= 80 for some in sizes)
    assert any(isinstance(one["latents"], list) for one in made)
    assert all(len(one["text"]) == len(one["captions"]) == len(some) for one, some in zip(made, sizes, strict=True))


@pytest.mark.parametrize("flags", [PACKED, {"train_batch_size": 2, "learning_rate": 3e-3}], ids=["packed", "grouped"])
def test_a_store_of_pictures_and_clips_trains_and_resumes(
    folder: Path, store: str, tmp_path: Path, flags: dict[str, Any]
) -> None:
    told = {"data": [store], **flags, "lr_scheduler": "constant", "gradient_accumulation_steps": 2}
    run(folder, tmp_path / "whole", **told)
    run(folder, tmp_path / "half", **told, max_train_steps=3)
    run(folder, tmp_path / "half", **told, resume=True)
    assert lines(tmp_path / "half") == lines(tmp_path / "whole")
    same_state(tmp_path / "half", tmp_path / "whole")


def same_state(a: Path, b: Path) -> None:
    one, other = (load_tensors(place / "training" / "state.safetensors")[0] for place in (a, b))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_loss_of_packs_falls(folder: Path, store: str, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", data=[store], **{**PACKED, "learning_rate": 1e-2, "max_train_steps": 60})
    losses = [line["loss"] for line in lines(tmp_path / "out")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"pack": 20}, "does not fit into --pack 20"),
        ({"pack": 80, "train_batch_size": 2}, "--train-batch-size does nothing with --pack"),
        ({"pack": 80, "compile": True}, "--compile does nothing with --pack"),
        ({"pack": 80, "part": "autoencoder"}, "--pack does nothing for --part autoencoder"),
        ({"image_noise": 0.0}, "--image-noise does nothing"),
    ],
)
def test_settings_that_do_nothing_are_refused(folder: Path, store: str, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        batches(family, tiny.model(folder), tiny.asked(folder, "finetune", data=[store], **flags))


# Curricula

STAGES = """
[[stage]]
steps = 2
max_frames = 1
max_pixels = 1024
learning_rate = 2e-3
train_batch_size = 2

[[stage]]
steps = 2
buckets = ["1x32x32", "1x32x48"]
pack = 64

[[stage]]
steps = 2
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_curriculum_says_which_clips_come_when(folder: Path, store: str, tmp_path: Path) -> None:
    told = {"data": [store], "learning_rate": 1e-3, "max_train_steps": 6, "gradient_accumulation_steps": 3}
    plan = written(tmp_path / "plan.toml", STAGES)
    options = tiny.asked(folder, "finetune", **told, curriculum=plan)
    made = [batches(family, tiny.model(folder), options)(i) for i in range(18)]
    assert {size for one in made[:6] for size in shaped(one)} == {(1, 32, 32)}
    assert {len(shaped(one)) for one in made[:6]} == {2}
    assert {size for one in made[6:12] for size in shaped(one)} == {(1, 32, 32), (1, 32, 48)}
    assert {size for one in made[12:] for size in shaped(one)} <= set(SIZES)
    assert [one["rate"] for one in made] == [2.0] * 6 + [1.0] * 12


def test_stages_take_stores_of_their_own(folder: Path, store: str, tmp_path: Path) -> None:
    other = fill_store(folder, tmp_path / "other", [(1, 64, 64)], 2)
    text = f'[[stage]]\nsteps = 1\ndata = ["{other}"]\n[[stage]]\nsteps = 1\ndata = ["{store}"]\n'
    plan = written(tmp_path / "plan.toml", text)
    options = tiny.asked(folder, "finetune", data=[store], max_train_steps=2, curriculum=plan)
    make = batches(family, tiny.model(folder), options)
    assert set(shaped(make(0))) == {(1, 64, 64)}
    assert set(shaped(make(1))) < set(SIZES)
    plan = written(tmp_path / "plan.toml", f'[[stage]]\nsteps = 9\n[[stage]]\nsteps = 1\ndata = ["{other}"]\n')
    options = tiny.asked(folder, "finetune", data=[store], max_train_steps=9, curriculum=plan)
    make = batches(family, tiny.model(folder), options)
    assert {size for i in range(9) for size in shaped(make(i))} <= set(SIZES)


def test_a_resume_across_the_edge_of_a_stage_is_exact(folder: Path, store: str, tmp_path: Path) -> None:
    plan = written(tmp_path / "plan.toml", STAGES)
    told = {"data": [store], "learning_rate": 1e-3, "lr_scheduler": "constant", "curriculum": plan}
    run(folder, tmp_path / "whole", **told)
    assert [line["learning_rate"] for line in lines(tmp_path / "whole")] == [2e-3] * 2 + [1e-3] * 4
    for stop in (2, 3):
        half = tmp_path / f"half-{stop}"
        run(folder, half, **told, max_train_steps=stop)
        run(folder, half, **told, resume=True)
        assert lines(half) == lines(tmp_path / "whole")
        same_state(half, tmp_path / "whole")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no stages"),
        ("stage = 3", "has no stages"),
        ("speed = 1\n[[stage]]\nsteps = 6", "no setting 'speed'"),
        ("[[stage]]\nsteps = 6\nmax_frame = 9", "stage 1: no setting 'max_frame'"),
        ("[[stage]]\nmax_frames = 9", "stage 1 does not say how long it is"),
        ("[[stage]]\nsteps = 0", "steps = 0 is not a whole number above 0"),
        ("[[stage]]\nsteps = 6\nlearning_rate = true", "learning_rate = True is not a number above 0"),
        ('[[stage]]\nsteps = 6\nbuckets = ["9x32"]', "'9x32' is not FRAMESxHEIGHTxWIDTH"),
        ('[[stage]]\nsteps = 6\nbuckets = "9x32x32"', "buckets is not a list"),
        ("[[stage]\nsteps = 6", "is not TOML"),
        ("[[stage]]\nsteps = 3\n[[stage]]\nsteps = 3\nmax_pixels = 9", "no clip fits stage 2"),
        ("[[stage]]\nsteps = 5", "last 5 steps, and --max-train-steps is 6"),
    ],
)
def test_a_curriculum_that_cannot_be(folder: Path, store: str, tmp_path: Path, text: str, says: str) -> None:
    plan = written(tmp_path / "plan.toml", text)
    options = tiny.asked(folder, "finetune", data=[store], max_train_steps=6, curriculum=plan)
    with pytest.raises(UsageError, match=says):
        batches(family, tiny.model(folder), options)


def test_a_curriculum_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        curriculum.read(tmp_path / "nowhere.toml")


# Pictures


@pytest.mark.parametrize("kind", ["5b-i2v", "1.5-5b-i2v"])
def test_the_loss_of_a_clip_from_a_picture_is_a_step_written_by_hand(kind: str) -> None:
    part, _, text, _ = of_kind(kind)
    inverse = kind == "1.5-5b-i2v"
    part.pictures = Pictures(noise=0.05, dropout=0.4, scale=0.7**-2 if inverse else 1.0)
    x, config = 0.7 * torch.randn(3, 4, 3, 8, 8), part.network.config
    loss = part.loss({"latents": x, "text": text}, torch.Generator().manual_seed(3))

    draw = torch.Generator().manual_seed(3)
    x = torch.cat([x[:, :, :1], x], 2) if inverse else x
    image = torch.zeros_like(x)
    dropped = []
    for i in range(3):  # unscaled, noised, dropped, then scaled with the released factor
        sigma = torch.exp(0.5 * torch.randn((), generator=draw)) * 0.05
        picture = (x[i, :, 0] + sigma * torch.randn(1, 4, 1, 8, 8, generator=draw)[0, :, 0]) / 0.7
        dropped.append(bool(torch.rand((), generator=draw) < 0.4))
        image[i, :, 0] = 0.0 if dropped[-1] else picture / 0.7 if inverse else picture * 0.7
    assert set(dropped) == {True, False}
    t = ((torch.randperm(3, generator=draw) + torch.rand(3, generator=draw, dtype=torch.float64)) * 1000 / 3).floor()
    noise = torch.randn(x.shape, generator=draw)
    abar = part.process.abar[t.long()].float().view(-1, 1, 1, 1, 1)
    noisy = abar.sqrt() * x + (1 - abar).sqrt() * noise
    out = part.network(
        hidden_states=torch.cat([noisy, image], 1).transpose(1, 2),
        encoder_hidden_states=text,
        timestep=t.float(),
        ofs=torch.full((1,), 2.0) if config.ofs_embed_dim else None,
        image_rotary_emb=part._rotary(x.shape[2:], x.device),
        return_dict=False,
    )[0].transpose(1, 2)
    clean = abar.sqrt() * noisy - (1 - abar).sqrt() * out
    by_hand = ((clean - x) ** 2 / (1 - abar)).flatten(1).mean(1).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_pictures_are_noised_and_left_out_as_often_as_told() -> None:
    generator, x = torch.Generator().manual_seed(0), torch.randn(1, 4, 2, 8, 8)
    made = [Pictures(0.05, 0.05).of(x, generator) for _ in range(2000)]
    kept = [one[:, :, 0] - x[:, :, 0] for one in made if one.any()]
    assert 1 - len(kept) / 2000 == pytest.approx(0.05, abs=0.015)
    logs = torch.stack([one.std() for one in kept]).log()
    assert logs.mean().item() == pytest.approx(-3.0, abs=0.05)
    assert logs.std().item() == pytest.approx(0.5, abs=0.04)
    assert all(not one[:, :, 1:].any() for one in made)


@pytest.mark.parametrize("flags", [{}, {"pack": 100}], ids=["grouped", "packed"])
def test_a_checkpoint_that_starts_from_images_trains(
    pictured: Path, tmp_path: Path, flags: dict[str, Any], store_of_pictured: str
) -> None:
    told = {"data": [store_of_pictured], "learning_rate": 1e-2, "lr_scheduler": "constant", **flags}
    run(pictured, tmp_path / "out", **told, max_train_steps=40)
    losses = [line["loss"] for line in lines(tmp_path / "out")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert tiny.model(tmp_path / "out").part("transformer", tiny.asked(pictured, "finetune")).pictures == Pictures(
        0.05, 0.05, pytest.approx(0.7**-2)
    )


@pytest.fixture(scope="module")
def store_of_pictured(pictured: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return fill_store(pictured, tmp_path_factory.mktemp("data") / "pictured", [(9, 32, 32), (1, 32, 32)], 2)


def test_learned_positions_take_no_other_size() -> None:
    part, _, text, _ = of_kind("5b-i2v")
    part.pictures = Pictures(0.05, 0.05)
    with pytest.raises(VgenError, match=r"learned positions for latents of \(3, 8, 8\) and no others.*\(1, 8, 8\)"):
        part.loss({"latents": torch.zeros(1, 4, 1, 8, 8), "text": text[:1]}, torch.Generator())


def test_a_clip_knows_its_size() -> None:
    assert curriculum.pixels((16, 13, 60, 90), (4, 8, 8)) == (49, 480, 720)


# Recipes

RECIPES = sorted(Path(inspect.getfile(type(family))).parent.glob("plugins/cogvideox/finetune-*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_their_checkpoint_and_train(recipe: Path, tmp_path: Path) -> None:
    """As they stand, but on a tiny network of the same kind, its size of clips, and one step of one pass."""
    values, _ = gather(Finetune, {}, {}, recipe)
    tag = recipe.stem.removeprefix("finetune-")
    assert values["checkpoint"] == f"cogvideox.{tag}"
    resolve(family, Finetune(**values), family.checkpoint(tag))
    made = tiny.checkpoint(tmp_path / "c", tag)
    frames = describe(made).defaults["num_frames"]
    data = fill_store(made, tmp_path / "store", [(frames, 32, 32)], 1)
    small = {"data": [data], "max_train_steps": 1, "gradient_accumulation_steps": 1, "optimizer": "adamw"}
    told = {name: value for name, value in values.items() if name not in ("output", "checkpoint")}
    run(made, tmp_path / "out", **{**told, **small, "device": "cpu"})
    assert lines(tmp_path / "out")[-1]["step"] == 1


def test_every_released_checkpoint_has_a_recipe() -> None:
    assert {path.stem.removeprefix("finetune-") for path in RECIPES} == {one.tag for one in CHECKPOINTS}

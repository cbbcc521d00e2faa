"""Training CMD: each part alone and two at once, losses written out, networks that a checkpoint lacks, what stays."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cmd_tiny
import pytest
import tiny
import torch
from safetensors.torch import load_file
from shell import environment
from torch import Tensor

from vgen import adapter_file, clips, diffusion
from vgen.adapters import layers
from vgen.errors import UsageError
from vgen.finetune import batches, finetune
from vgen.generate import generate
from vgen.latents import scale
from vgen.lora import merged, train_lora, use
from vgen.lora_source import locate
from vgen.plugins.cmd import family
from vgen.plugins.cmd.autoencoder import Factoring
from vgen.plugins.cmd.factored import FactoredAutoencoder
from vgen.plugins.cmd.maps import joined
from vgen.plugins.cmd.variance import bound

FAST: dict[str, Any] = {"train_batch_size": 2, "learning_rate": 3e-3, "lr_scheduler": "constant", "max_train_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cmd_tiny.checkpoint(tmp_path_factory.mktemp("cmd") / "c")


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data") / "d"
    told = cmd_tiny.asked(folder, "encode", inputs=["world:4"])
    tiny.fill(cmd_tiny.model(folder), place, told, (clips.discover(["world:4"]), (4, 32, 32)))
    return place


def asked(folder: Path, part: str, data: Path | str = "", **flags: Any) -> Any:
    return cmd_tiny.asked(folder, "finetune", **{**FAST, "part": part, "data": [str(data)], **flags})


def run(folder: Path, output: Path, part: str, data: Path | str, **flags: Any) -> dict[str, Any]:
    options = asked(folder, part, data, **flags, output=output)
    return finetune(family, cmd_tiny.model(folder), folder, options, tiny.CPU)


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    """The networks of which any weight has changed."""
    names = {path.parent.name for path in before.glob("*/diffusion_pytorch_model.safetensors")}
    old, new = ({name: weights(place, name) for name in names} for place in (before, after))
    return {n for n in names if any(not torch.equal(old[n][k].float(), new[n][k].float()) for k in old[n])}


# --- batches and losses ---------------------------------------------------------------------------------------------


def test_batches_hold_the_streams_as_stored(folder, data):
    made = batches(family, cmd_tiny.model(folder), asked(folder, "motion", data))(0)
    shapes = {name: tuple(value.shape) for name, value in made.items() if isinstance(value, Tensor)}
    assert shapes == {
        "content": (2, 4, 1, 8, 8),
        "motion_x": (2, 4, 4, 4, 1),
        "motion_y": (2, 4, 4, 1, 4),
        "mask": (2, 1, 1, 8, 8),
        "text": (2, 16, 16),
    }


def test_the_loss_of_motion_is_that_of_dit(folder, data):
    """|e - eps(z_t, c, content, t)|^2 on scaled maps, given the true content frame, and the bound of the variance."""
    model, options = cmd_tiny.model(folder), asked(folder, "motion", data)
    made, part = batches(family, model, options)(0), model.part("motion", options)
    with torch.no_grad():
        ours = part.loss(made, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    process = diffusion.Discrete(diffusion.linear())
    t = diffusion.sample_times(process, 2, generator, (0, 1))
    x0 = 1.5 * joined(made["motion_x"], made["motion_y"])
    e = torch.randn(x0.shape, generator=generator)
    x = diffusion.add_noise(process, x0, e, t)
    content = (0.7 * made["content"])[:, :, 0]
    with torch.no_grad():
        out = part.network(x[..., 0], t.float(), content, made["text"].mean(1))[..., None]
    error = (out[:, :4] - e).square().mean()
    more = bound(process, x0, x, t, out[:, :4], out[:, 4:])
    assert more > 1e-6
    assert ours.item() == pytest.approx((error + more).item(), rel=1e-5)


def test_the_loss_of_content_is_that_of_the_image_model(folder, data):
    model, options = cmd_tiny.model(folder), asked(folder, "content", data)
    made, part = batches(family, model, options)(0), model.part("content", options)
    with torch.no_grad():
        ours = part.loss(made, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    process = diffusion.Discrete(diffusion.scaled_linear())
    t = diffusion.sample_times(process, 2, generator, (0, 1))
    x0 = scale(model.space, made["content"])
    e = torch.randn(x0.shape, generator=generator)
    with torch.no_grad():
        out = part.network(diffusion.add_noise(process, x0, e, t)[:, :, 0], t.float(), made["text"]).sample
    assert ours.item() == pytest.approx((out - e[:, :, 0]).square().mean().item(), rel=1e-5)


def test_masks_of_objects_weigh_the_content(folder, data):
    model = cmd_tiny.model(folder)
    plain, heavy = (asked(folder, "content", data, mask_weight=weight) for weight in (0.0, 5.0))
    made = {**batches(family, model, plain)(0), "progress": 0}
    losses = [model.part("content", o).loss(made, torch.Generator().manual_seed(5)).item() for o in (plain, heavy)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "network"), [("content", "unet"), ("motion", "motion")])
def test_a_part_trains_and_the_others_stay(folder, data, tmp_path, part, network):
    figures = run(folder, tmp_path / "o", part, data)
    assert figures["step"] == 2
    assert changed(folder, tmp_path / "o") == {network}
    assert json.loads((tmp_path / "o" / "vgen.json").read_text())["part"] == part
    assert cmd_tiny.model(tmp_path / "o").space.id == cmd_tiny.model(folder).space.id


def test_content_and_motion_train_at_the_same_time(folder, data, tmp_path):
    """Two processes on one store; the motion of one, put into the other's folder, makes a whole checkpoint."""
    start = [sys.executable, "-m", "vgen.cli", "finetune", "cmd", "--checkpoint", str(folder), "--data", str(data)]
    flags = ["--max-train-steps", "1", "--train-batch-size", "2", "--seed", "1", "-o"]
    both = [
        subprocess.Popen([*start, "--part", part, *flags, str(tmp_path / part)], env=environment(), text=True)
        for part in ("content", "motion")
    ]
    assert [one.wait(240) for one in both] == [0, 0]
    for path in (tmp_path / "motion" / "motion").iterdir():
        path.replace(tmp_path / "content" / "motion" / path.name)
    assert changed(folder, tmp_path / "content") == {"unet", "motion"}
    assert cmd_tiny.model(tmp_path / "content").networks.get("motion") is not None


def test_the_autoencoder_trains_on_pixels_and_measures_its_motion(folder, tmp_path):
    run(folder, tmp_path / "o", "autoencoder", "world:4", num_frames=4, height=32, width=32)
    assert changed(folder, tmp_path / "o") == {"autoencoder"}
    model, output = cmd_tiny.model(folder), cmd_tiny.model(tmp_path / "o")
    assert output.space.id != model.space.id
    size = 1 / output.networks.config("autoencoder")["scaling_factor"]
    assert 0.01 < size < 1
    clip = torch.stack([clips.load(item, 4, 32, 32, fps=None).pixels for item in clips.discover(["world:4"])])
    streams = model.encode(clip)
    assert size == pytest.approx(joined(streams["motion_x"], streams["motion_y"]).square().mean().sqrt(), rel=0.5)


def test_a_network_that_is_not_there_begins_with_the_asked_sizes(tmp_path):
    """From an image model to a whole checkpoint, a part at a time."""
    start, sizes = cmd_tiny.image(tmp_path / "image"), tmp_path / "sizes.json"
    sizes.write_text(json.dumps(cmd_tiny.AUTOENCODER))
    small = {"num_frames": 4, "height": 32, "width": 32}
    run(start, tmp_path / "a", "autoencoder", "world:2", network=sizes, max_train_steps=1, **small)
    first = cmd_tiny.model(tmp_path / "a")
    told = first.networks.config("autoencoder")
    assert (told["in_channels"], told["width"], told["pixels"]) == (4, 16, False)
    tiny.fill(first, tmp_path / "d", cmd_tiny.asked(tmp_path / "a", "encode", inputs=["world:2"]), (
        clips.discover(["world:2"]), (4, 32, 32)
    ))  # fmt: skip
    sizes.write_text(json.dumps({"width": 32, "depth": 1, "heads": 2, "content_patch_size": 4}))
    run(tmp_path / "a", tmp_path / "m", "motion", tmp_path / "d", network=sizes, max_train_steps=1)
    told = cmd_tiny.model(tmp_path / "m").networks.config("motion")
    assert (told["motion_channels"], told["text_width"], told["content_channels"], told["classes"]) == (4, 16, 4, 0)
    assert cmd_tiny.asked(tmp_path / "m", num_frames=4).num_frames == 4
    for bad, why in (({"motion_channels": 9}, "does not fit"), ({}, "--network is for")):
        sizes.write_text(json.dumps(bad))
        options = asked(tmp_path / "m", "motion", tmp_path / "d", network=sizes, from_scratch=bool(bad))
        with pytest.raises(UsageError, match=why):
            cmd_tiny.model(tmp_path / "m").part("motion", options)


def test_classes_train_on_labels_of_a_manifest(tmp_path):
    folder = cmd_tiny.classes(tmp_path / "k")
    items = [replace(item, facts={"label": k % 3}) for k, item in enumerate(clips.discover(["world:3"]))]
    told = cmd_tiny.asked(folder, "encode", inputs=["world:3"])
    tiny.fill(cmd_tiny.model(folder), tmp_path / "d", told, (items, (4, 32, 32)))
    options = asked(folder, "motion", tmp_path / "d", train_batch_size=3)
    model = cmd_tiny.model(folder)
    made = batches(family, model, options)(0)
    assert sorted(made["label"][:, 0].tolist()) == [0, 1, 2]
    for share, kept in ((0.0, {0, 1, 2}), (1.0, {3})):
        part = model.part("motion", asked(folder, "motion", tmp_path / "d", caption_dropout=share))
        assert set(part.labels.of(made, torch.Generator())["label"].tolist()) == kept
    assert run(folder, tmp_path / "o", "content", tmp_path / "d")["step"] == 2
    with pytest.raises(UsageError, match="no 'label'"):
        part.labels.of({}, torch.Generator())


def adapted(folder: Path, output: Path, part: str, data: Path) -> Path:
    options = cmd_tiny.asked(folder, "train-lora", **{**FAST, "part": part, "data": [str(data)]}, rank=2, output=output)
    train_lora(family, cmd_tiny.model(folder), folder, options, tiny.CPU)
    return output


def test_adapters_of_content_and_motion(folder, data, tmp_path):
    """Each changes its own network, both together, and merged; one of scale 0 nothing, to the bit."""
    paths = {part: adapted(folder, tmp_path / part, part, data) for part in ("content", "motion")}

    def sampled(*specs: str, base: Path = folder) -> dict[str, Tensor]:
        model = cmd_tiny.model(base)
        use(family, model, base, [locate(spec) for spec in specs])
        return generate(model, cmd_tiny.asked(base, seed=7), tiny.ignore)

    plain, moved = sampled(), sampled(f"{paths['motion']}")
    assert torch.equal(plain["content"], moved["content"])
    assert not torch.equal(plain["motion_x"], moved["motion_x"])
    assert torch.equal(plain["motion_x"], sampled(f"{paths['motion']}:0")["motion_x"])
    both = sampled(*map(str, paths.values()))
    assert not torch.equal(plain["content"], both["content"])
    sources = [locate(str(path)) for path in paths.values()]
    merged(family, cmd_tiny.model(folder), folder, "c", sources, tmp_path / "one", torch.float32)
    assert changed(folder, tmp_path / "one") == {"unet", "motion"}
    again = sampled(base=tmp_path / "one")
    assert all(torch.allclose(again[name], both[name], atol=1e-4) for name in both)


def test_an_adapter_of_the_image_model_works_on_its_unet(folder, data, tmp_path):
    path = adapted(folder, tmp_path / "look", "content", data)
    file = path / "pytorch_lora_weights.safetensors"
    told = adapter_file.about(file)
    assert (told["family"], told["part"], told["network"]) == ("cmd", "unet", "UNet2DConditionModel")
    pairs = adapter_file.read(file, "unet", layers(cmd_tiny.model(folder).networks.get("unet"))).pairs
    for name, fits in (("sd", True), ("svd", False)):
        adapter_file.write(tmp_path / name / file.name, "unet", pairs, {**told, "family": name})
        if fits:
            assert use(family, cmd_tiny.model(folder), folder, [locate(str(tmp_path / name))]) == []
        else:
            with pytest.raises(UsageError, match="is an adapter of 'svd'"):
                use(family, cmd_tiny.model(folder), folder, [locate(str(tmp_path / name))])


def test_a_trained_autoencoder_keeps_colours_whatever_moves():
    """A tiny one learns squares that move; motion of other clips then leaves the mean colour nearly as it is."""
    torch.manual_seed(0)
    network = FactoredAutoencoder(**{**cmd_tiny.AUTOENCODER, "width": 32}, in_channels=3, pixels=True)
    part = Factoring(network, lambda pixels: pixels, l1_weight=1.0)
    generator, steps = torch.Generator().manual_seed(0), []
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(120):
        loss = part.loss({"pixels": squares(6, generator)}, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(loss.item())
    assert sum(steps[-10:]) < 0.4 * sum(steps[:10])
    some = squares(8, generator)
    with torch.no_grad():
        content, rows, columns = network.encoder(some)
        whole = network.decoder(content, rows, columns)
        other = network.decoder(content, rows.roll(1, 0), columns.roll(1, 0))
    apart = (whole.mean((2, 3, 4)) - whole.roll(1, 0).mean((2, 3, 4))).abs().mean()
    assert (other - whole).abs().mean() > 0.01
    assert (other.mean((2, 3, 4)) - whole.mean((2, 3, 4))).abs().mean() < 0.25 * apart


def squares(count: int, generator: torch.Generator) -> Tensor:
    """Clips (count, 3, 4, 8, 8) of a square of one colour that moves over a ground of another."""
    colours = torch.rand(count, 2, 3, generator=generator) * 1.6 - 0.8
    places, steps = (
        torch.randint(0, 3, (count, 2), generator=generator),
        torch.randint(0, 2, (count, 2), generator=generator),
    )
    made = colours[:, 0, :, None, None, None].expand(-1, -1, 4, 8, 8).clone()
    for i in range(count):
        for t in range(4):
            y, x = (places[i] + t * steps[i]).tolist()
            made[i, :, t, y : y + 3, x : x + 3] = colours[i, 1][:, None, None]
    return made

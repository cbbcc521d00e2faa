"""The family cmd: what is stored of a clip, content as diffusers makes it, motion, pictures, classes, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cmd_tiny
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from shell import vgen
from torch import Tensor

from vgen import clips, latents
from vgen.errors import UsageError, VgenError
from vgen.generate import decode, generate
from vgen.latents import scale
from vgen.plugins.cmd import CHECKPOINTS, Sample, check, describe, family
from vgen.plugins.cmd.maps import joined
from vgen.registry import resolve
from vgen.store import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cmd_tiny.checkpoint(tmp_path_factory.mktemp("cmd") / "c")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cmd_tiny.classes(tmp_path_factory.mktemp("cmd") / "k")


def made(folder: Path, **flags: Any) -> dict[str, Tensor]:
    return generate(cmd_tiny.model(folder), cmd_tiny.asked(folder, **flags), tiny.ignore)


# --- encoding -------------------------------------------------------------------------------------------------------


def test_a_clip_is_stored_as_its_content_and_motion(folder, tmp_path):
    items = clips.discover(["world:2"])
    told = cmd_tiny.asked(folder, "encode", inputs=["world:2"], check=True)
    model = cmd_tiny.model(folder)
    done = tiny.fill(model, tmp_path / "d", told, (items, (4, 32, 32)))
    store = Store.open(tmp_path / "d", space=model.space, text_space=model.text_space)
    streams, record = store.get(done[0].key)
    shapes = {name: tuple(s.shape) for name, s in streams.items()}
    assert shapes == {"content": (4, 1, 8, 8), "motion_x": (4, 4, 4, 1), "motion_y": (4, 4, 1, 4), "mask": (1, 1, 8, 8)}
    (item,) = [i for i in items if str(i.path) == record["source"]["uri"]]
    pixels = clips.load(item, 4, 32, 32, fps=None).pixels
    vae, network = model.networks.get("vae"), model.networks.get("autoencoder")
    frames = vae.encode(pixels.transpose(0, 1)).latent_dist.mean.transpose(0, 1)[None] * 0.7
    with torch.no_grad():
        content, motion_x, motion_y = network.encoder(frames)
        back = network.decoder(content, motion_x, motion_y) / 0.7
        shown = vae.decode(back[0].transpose(0, 1)).sample.transpose(0, 1)
    assert torch.allclose(streams["content"] * 0.7, content[0], atol=1e-4)
    assert torch.allclose(streams["motion_x"], motion_x[0], atol=1e-4)
    assert torch.allclose(streams["motion_y"], motion_y[0], atol=1e-4)
    again = model.decode({name: s[None] for name, s in streams.items()})[0]
    assert torch.allclose(again, shown, atol=1e-3)
    assert {"psnr"} == record["check"].keys()


def test_latents_of_another_autoencoder_are_another_space(folder, tmp_path):
    other = cmd_tiny.checkpoint(tmp_path / "other")
    assert cmd_tiny.model(other).space.id == cmd_tiny.model(folder).space.id
    network = cmd_tiny.model(folder).networks.get("autoencoder")
    cmd_tiny.awake(network).save_pretrained(other / "autoencoder")
    assert cmd_tiny.model(other).space.id != cmd_tiny.model(folder).space.id


# --- sampling -------------------------------------------------------------------------------------------------------


def test_the_content_frame_is_the_picture_of_diffusers_pipeline(folder):
    """The checkpoint's folder is one of Stable Diffusion, and loads as that."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    small = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(3)
    theirs = pipe("a red ball rising", **small, generator=generator, output_type="np").images[0]
    model, options = (
        cmd_tiny.model(folder),
        cmd_tiny.asked(folder, content_steps=4, guidance_scale=3.0, content_only=True),
    )
    streams = generate(model, options, tiny.ignore)
    assert streams.keys() == {"content"}
    ours = decode(model, streams)[0].numpy() / 255
    assert ours.shape == (1, 32, 32, 3)
    assert ours.std() > 0.01
    assert abs(ours[0] - theirs).max() < 0.01


def test_motion_is_made_by_ddim_given_the_content(folder):
    """Both steps written out, from the noise of the motion's seed, with the noise of the network guided."""
    streams = made(folder, motion_guidance_scale=2.0, motion_seed=11)
    model, options = cmd_tiny.model(folder), cmd_tiny.asked(folder, motion_seed=11)
    asked = model.draw("motion", options, streams)
    part = model.denoiser("motion", options)
    seen = scale(model.space, streams["content"])[:, :, 0]
    assert torch.equal(asked.cond["content"], seen)
    assert torch.allclose(asked.cond["text"], model.texts.cached([options.prompt])[options.prompt].mean(0), atol=1e-6)
    x = asked.x[..., 0].double()
    abar = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)
    text = [model.texts.cached([words])[words].mean(0)[None] for words in (options.prompt, "")]
    for t, a, after in ((500, abar[500], abar[0]), (0, abar[0], torch.tensor(1.0, dtype=torch.float64))):
        with torch.no_grad():
            told = [part.network(x.float(), torch.tensor([float(t)]), seen, one)[:, :4].double() for one in text]
        e = told[1] + 2.0 * (told[0] - told[1])
        x = after.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - after).sqrt() * e
    map_ = joined(streams["motion_x"], streams["motion_y"])[..., 0]
    assert map_.shape == (1, 4, 4, 8)
    assert torch.allclose(map_.double(), x / 1.5, atol=1e-4)


def test_another_motion_of_the_same_content(folder):
    one, other = made(folder, motion_seed=1), made(folder, motion_seed=2)
    assert torch.equal(one["content"], other["content"])
    assert not torch.allclose(one["motion_x"], other["motion_x"], atol=1e-3)
    usual = made(folder)
    assert torch.equal(usual["motion_x"], made(folder, motion_seed=3)["motion_x"])
    assert torch.equal(usual["content"], one["content"])


def test_each_clip_of_several_is_that_of_its_seed(folder):
    both, second = made(folder, num_videos_per_prompt=2), made(folder, seed=4)
    assert torch.allclose(both["content"][1:], second["content"], atol=1e-5)
    assert torch.allclose(both["motion_y"][1:], second["motion_y"], atol=1e-5)


def test_a_picture_is_set_in_motion(folder, tmp_path):
    picture = tmp_path / "p.png"
    Image.new("RGB", (32, 32), (200, 40, 40)).save(picture)
    model, options = cmd_tiny.model(folder), cmd_tiny.asked(folder, content_image=picture)
    streams = generate(model, options, tiny.ignore)
    pixels = clips.load_file(picture, 1, 32, 32)[0]
    mean = model.networks.get("vae").encode(pixels.transpose(0, 1)).latent_dist.mean
    assert torch.allclose(streams["content"][:, :, 0], mean, atol=1e-5)
    assert "unet" not in model.networks.loaded
    assert decode(model, streams)[0].shape == (4, 32, 32, 3)
    both = generate(model, cmd_tiny.asked(folder, content_image=picture, num_videos_per_prompt=2), tiny.ignore)
    assert both["content"].shape == (2, 4, 1, 8, 8)


def test_other_shapes_of_clips(folder):
    streams = made(folder, num_frames=6, height=48, width=16)
    assert {name: tuple(s.shape[1:]) for name, s in streams.items()} == {
        "content": (4, 1, 12, 4),
        "motion_x": (4, 6, 6, 1),
        "motion_y": (4, 6, 1, 2),
    }
    assert cmd_tiny.model(folder).decode(streams).shape == (1, 3, 6, 48, 16)


def test_classes_in_place_of_text_on_pixels(classes):
    model = cmd_tiny.model(classes)
    assert (model.text_space, model.classes, model.space.strides) == (None, 3, (1, 1, 1))
    one = made(classes, prompt="", class_label=0)
    other = made(classes, prompt="", class_label=2)
    assert one["content"].shape == (1, 3, 1, 16, 16)
    assert not torch.allclose(one["content"], other["content"], atol=1e-4)
    assert decode(model, one)[0].shape == (4, 16, 16, 3)


def test_a_clip_by_the_command_line(folder, tmp_path):
    """A picture first, then set in motion as latents; what they decode to is tested above."""
    start = ("sample", "cmd", "a red ball rising", "--checkpoint", folder, "--seed", "1")
    first = vgen(*start, "--content-only", cwd=tmp_path)
    assert (first.code, first.out) == (0, "cmd-1.png\n"), first.err
    done = vgen(*start, "--content-image", "cmd-1.png", "--motion-seed", "5", "-o", "b.safetensors", cwd=tmp_path)
    assert (done.code, done.out) == (0, "b.safetensors\n"), done.err
    streams, record = latents.read(tmp_path / "b.safetensors")
    assert streams.keys() == {"content", "motion_x", "motion_y"}
    assert record["space"]["name"] == "cmd"
    assert decode(cmd_tiny.model(folder), {name: s[None] for name, s in streams.items()})[0].shape == (4, 32, 32, 3)


# --- checkpoints and refusals ---------------------------------------------------------------------------------------


def test_a_checkpoint_is_described_by_its_folder(folder, classes, tmp_path):
    told = describe(folder)
    assert (told.defaults["num_frames"], told.defaults["height"], told.defaults["motion_steps"]) == (4, 32, 2)
    assert (told.rules["height"].step, told.rules["num_frames"].step) == (16, 2)
    assert told.facts["parts"] == ("content", "autoencoder", "motion")
    assert describe(classes).facts["classes"] == 3
    start = cmd_tiny.image(tmp_path / "image")
    assert describe(start).facts["parts"] == ("content",)
    with pytest.raises(UsageError, match="no 'autoencoder' yet"):
        cmd_tiny.asked(start, "encode", inputs=["world:1"])
    with pytest.raises(VgenError, match="no 'autoencoder' yet"):
        cmd_tiny.model(start).space  # noqa: B018
    for one in CHECKPOINTS:
        with pytest.raises(UsageError, match="no 'autoencoder' yet"):
            check(Sample(prompt="x"), one)


def test_checkpoints_of_image_models_are_a_start(tmp_path):
    start = cmd_tiny.image(tmp_path / "image")
    for name, fits in (("sd", True), ("cmd", True), ("svd", False)):
        (start / "vgen.json").write_text(f'{{"family": "{name}"}}')
        if fits:
            assert resolve(family, str(start), accelerator=False).folder == start
        else:
            with pytest.raises(UsageError, match="is a checkpoint of 'svd'"):
                resolve(family, str(start), accelerator=False)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"prompt": " "}, "empty"),
        ({"class_label": 1}, "takes text"),
        ({"content_only": True, "motion_seed": 1}, "--motion-seed"),
        ({"content_only": True, "content_image": Path("x.png")}, "--content-image"),
        ({"negative_prompt": "x", "guidance_scale": 1.0, "motion_guidance_scale": 1.0}, "--negative-prompt"),
        ({"negative_prompt": "x", "guidance_scale": 1.0, "content_only": True}, "--negative-prompt"),
        ({"num_frames": 5}, "--num-frames"),
        ({"height": 24}, "--height"),
    ],
)
def test_what_can_not_be_is_refused(folder, flags, told):
    with pytest.raises(UsageError) as error:
        cmd_tiny.asked(folder, **flags)
    assert told in f"{error.value.message} {error.value.do}"


def test_a_class_is_asked_for_where_there_are_classes(classes):
    for flags in ({"prompt": "a ball"}, {"prompt": "", "class_label": 3}):
        with pytest.raises(UsageError, match="class"):
            cmd_tiny.asked(classes, **flags)
    assert replace(cmd_tiny.asked(classes, prompt="", class_label=2)).class_label == 2

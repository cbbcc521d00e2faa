"""The family magicvideo: the image model at first, what is stored, key frames by DDIM, decoders, frames between."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import magicvideo_tiny
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from shell import vgen
from torch import Tensor

from vgen import clips, latents, options
from vgen.diffusion import initial
from vgen.errors import UsageError, VgenError
from vgen.generate import decode, generate
from vgen.plugins.magicvideo import CHECKPOINTS, Sample, check, describe, family, keyframes
from vgen.plugins.sd.model import load as load_sd
from vgen.registry import resolve
from vgen.store import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return magicvideo_tiny.checkpoint(tmp_path_factory.mktemp("magicvideo") / "c")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return magicvideo_tiny.image(tmp_path_factory.mktemp("magicvideo") / "image")


def made(folder: Path, **flags: Any) -> Tensor:
    told = magicvideo_tiny.asked(folder, **flags)
    return generate(magicvideo_tiny.model(folder), told, tiny.ignore)["latents"]


# --- encoding -------------------------------------------------------------------------------------------------------


def test_what_conditions_is_stored_with_the_latents(folder, tmp_path):
    model, items = magicvideo_tiny.model(folder), clips.discover(["world:2"])
    told = magicvideo_tiny.asked(folder, "encode", inputs=["world:2"], check=True)
    done = tiny.fill(model, tmp_path / "d", told, (items, (4, 32, 32)))
    streams, record = Store.open(tmp_path / "d", space=model.space, text_space=model.text_space).get(done[0].key)
    assert {name: tuple(s.shape) for name, s in streams.items()} == {
        **dict.fromkeys(("mean", "logvar"), (4, 4, 8, 8)),
        "embedding": (3, 16),
        "fps": (1,),
        "mask": (1, 4, 8, 8),
    }
    assert streams["fps"].item() == 8
    (item,) = [i for i in items if str(i.path) == record["source"]["uri"]]
    pixels = clips.load(item, 4, 32, 32, fps=None).pixels
    again = model.encode(pixels[None, :, 2:3])
    assert torch.allclose(streams["embedding"][1:2], again["embedding"][0, :1], atol=1e-5)
    assert torch.allclose(streams["mean"][:, 2:3], again["mean"][0], atol=1e-4)
    assert record["check"].keys() == {"psnr"}


def test_latents_are_those_of_the_image_model(folder):
    """A clip that one has encoded is a clip for the other; training the decoder changes nothing in that."""
    sd = load_sd(folder, describe(folder), tiny.CPU)
    assert magicvideo_tiny.model(folder).space == sd.space


# --- key frames -----------------------------------------------------------------------------------------------------


def test_key_frames_are_made_by_ddim_with_guidance(folder):
    """Two steps written out, with the network's noise guided."""
    told = {"guidance_scale": 3.0, "fps": 2.0}
    streams = made(folder, **told)
    model, options = magicvideo_tiny.model(folder), magicvideo_tiny.asked(folder, **told)
    network = model.inflated("unet").eval()
    text = [model.texts.cached([one])[one][None] for one in (options.prompt, "")]
    x = torch.stack([torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))]).double()
    times = model.process.times(2)
    levels = [model.process.level(t) for t in times]
    x = initial(model.process, times[0], x.float()).double()
    for i, t in enumerate(times):
        a, s = levels[i]
        after = levels[i + 1] if i + 1 < len(times) else (torch.tensor(1.0), torch.tensor(0.0))
        with torch.no_grad():
            one, other = (
                network(x.float(), model.process.network_time(t)[None], words, fps=torch.tensor([2.0])).double()
                for words in text
            )
        e = other + 3.0 * (one - other)
        x = after[0] * (x - s * e) / a + after[1] * e
    assert torch.allclose(streams.double(), x / 0.7, atol=1e-3)


def test_each_clip_of_several_is_that_of_its_seed(folder):
    torch.testing.assert_close(made(folder, num_videos_per_prompt=2)[1:], made(folder, seed=4), atol=1e-3, rtol=1e-3)


def test_the_frame_rate_the_text_and_the_sampler_count(folder):
    plain = made(folder)
    assert plain.shape == (1, 4, 4, 8, 8)
    for flags in ({"fps": 1.0}, {"prompt": "a blue box"}, {"negative_prompt": "a blue box"}, {"sampler": "dpmpp-2m"}):
        assert not torch.allclose(made(folder, num_inference_steps=3, **flags), made(folder, num_inference_steps=3))
    assert made(folder, num_frames=2, height=48, width=16).shape == (1, 4, 2, 12, 4)


def test_layers_that_are_new_make_the_pictures_of_the_image_model(start, tmp_path):
    """Each frame is what diffusers' pipeline makes of its noise, before the layers in time have learned anything."""
    options = magicvideo_tiny.asked(start, "finetune", clip_frames=3)
    model = magicvideo_tiny.model(start)
    part = model.part("text", options)
    shutil.copytree(start, tmp_path / "new")
    part.modules["temporal"].save_pretrained(tmp_path / "new" / "temporal")
    told = {"num_inference_steps": 3, "guidance_scale": 2.0, "num_frames": 3, "image_decoder": False}
    model, options = magicvideo_tiny.model(tmp_path / "new"), magicvideo_tiny.asked(tmp_path / "new", **told)
    clip = generate(model, options, tiny.ignore)
    ours = decode(model, clip)[0].numpy() / 255
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3)).transpose(0, 1)
    pipe = StableDiffusionPipeline.from_pretrained(start)
    pipe.set_progress_bar_config(disable=True)
    same = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 32, "width": 32, "output_type": "np"}
    theirs = pipe(["a red ball rising"] * 3, **same, latents=noise).images
    assert ours.std() > 0.01
    assert abs(ours - theirs).max() < 0.01
    assert describe(tmp_path / "new").defaults["num_frames"] == 3


# --- the decoder ----------------------------------------------------------------------------------------------------


def test_the_decoder_sees_frames_in_time_and_the_image_decoder_does_not(folder):
    z = magicvideo_tiny.noise(1, 4, 4, 8, 8)
    other = z.clone()
    other[:, :, 2] += 1
    for plain in (False, True):
        model = magicvideo_tiny.model(folder)
        model.image_decoder = plain
        one, two = (model.decode({"latents": some}) for some in (z, other))
        same = [torch.equal(one[:, :, k], two[:, :, k]) for k in range(4)]
        assert same == [True, True, False, plain]


def test_less_memory_for_the_decoder_gives_nearly_the_same(folder):
    model, z = magicvideo_tiny.model(folder), magicvideo_tiny.noise(2, 4, 4, 16, 16)
    whole = model.decode({"latents": z})
    model.slicing = True
    assert torch.allclose(model.decode({"latents": z}), whole, atol=1e-5)
    model.tiling = True
    network = model.networks.get("video_decoder").inflated.image
    network.tile_sample_min_size, network.tile_latent_min_size = 32, 8
    tiled = model.decode({"latents": z})
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)


# --- frames between -------------------------------------------------------------------------------------------------


def test_frames_between_two(folder):
    model, told = magicvideo_tiny.model(folder), magicvideo_tiny.asked(folder, "interpolate", input="x.mp4")
    assert (told.num_inference_steps, told.conditioning_fps, model.steps, model.multiple) == (2, 8.0, 3, 8)
    ends = magicvideo_tiny.noise(2, 3, 2, 32, 32).clamp(-1, 1)
    between = model.between(ends, told, [1, 2])
    assert between.shape == (2, 3, 3, 32, 32)
    alone = model.between(ends[1:], told, [2])
    assert torch.allclose(between[1:], alone, atol=1e-4)
    other = ends.clone()
    other[:, :, 0] = -other[:, :, 0]
    assert not torch.allclose(model.between(other, told, [1, 2]), between, atol=1e-2)


def test_the_network_between_sees_both_ends_and_where_they_are():
    ends = magicvideo_tiny.noise(1, 4, 2, 3, 3)
    seen = keyframes.known(ends, 5)
    assert seen.shape == (1, 5, 5, 3, 3)
    assert torch.equal(seen[:, :4, [0, 4]], ends)
    assert seen[:, :4, 1:4].abs().sum() == 0
    assert seen[0, 4, :, 0, 0].tolist() == [1, 0, 0, 0, 1]


# --- the command line -----------------------------------------------------------------------------------------------


def test_key_frames_to_a_smooth_clip_by_the_command_line(folder, tmp_path):
    told = ("--checkpoint", folder, "--seed", "1")
    done = vgen("sample", "magicvideo", "a red ball rising", *told, "-o", "k.safetensors", cwd=tmp_path)
    assert (done.code, done.out) == (0, "k.safetensors\n"), done.err
    streams, record = latents.read(tmp_path / "k.safetensors")
    assert (streams.keys(), record["space"]["name"]) == ({"latents"}, "sd-vae")
    done = vgen("decode", "magicvideo", "k.safetensors", "--checkpoint", folder, "-o", "k.mp4", cwd=tmp_path)
    assert done.code == 0, done.err
    done = vgen("interpolate", "magicvideo", "k.mp4", *told, "-o", "smooth", cwd=tmp_path)
    assert done.code == 0, done.err
    assert len(list((tmp_path / "smooth").glob("*.png"))) == 13


# --- checkpoints and refusals ---------------------------------------------------------------------------------------


def test_checkpoints_are_described_by_their_folders(folder, start):
    told = describe(folder)
    assert (told.defaults["num_frames"], told.defaults["height"], told.rules["num_frames"].high) == (4, 32, 4)
    assert told.facts == {"parts": ("temporal", "interpolator", "video_decoder"), "pictures": True}
    assert describe(start).facts == {"parts": (), "pictures": True}
    assert resolve(family, str(start), accelerator=False).folder == start
    for one in CHECKPOINTS:
        with pytest.raises(UsageError, match="no 'temporal' yet"):
            check(Sample(prompt="x"), one)


def test_other_checkpoints_are_refused(start, tmp_path):
    shutil.copytree(start, tmp_path / "c")
    config = tmp_path / "c" / "unet" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    with pytest.raises(VgenError, match="not that of a text-to-image model"):
        describe(tmp_path / "c")


@pytest.mark.parametrize(
    ("verb", "flags", "told"),
    [
        ("sample", {"prompt": " "}, "empty"),
        ("sample", {"negative_prompt": "x", "guidance_scale": 1.0}, "--negative-prompt"),
        ("sample", {"num_frames": 5}, "--num-frames"),
        ("sample", {"height": 20}, "--height"),
        ("finetune", {"mask": "post"}, "--mask is for new layers"),
        ("finetune", {"clip_frames": 8}, "--clip-frames is for new layers"),
        ("finetune", {"clip_frames": 8, "adaptor": "convolution", "from_scratch": True}, "any length"),
        ("finetune", {"part": "interpolate", "image_layers": True}, "--image-layers does nothing"),
        ("finetune", {"flicker_weight": 1.0}, "--flicker-weight does nothing"),
    ],
)
def test_what_can_not_be_is_refused(folder, verb, flags, told):
    with pytest.raises(UsageError) as error:
        magicvideo_tiny.asked(folder, verb, **flags)
    assert told in f"{error.value.message} {error.value.do}"


def test_what_is_still_to_be_trained_is_refused(start, tmp_path):
    for verb, part in (("sample", "text"), ("train-lora", "text"), ("interpolate", "interpolate")):
        with pytest.raises(UsageError, match="yet") as error:
            magicvideo_tiny.asked(start, verb)
        assert f"--part {part}" in error.value.do
    bare = magicvideo_tiny.image(tmp_path / "bare", pictures=False)
    with pytest.raises(UsageError, match="no image encoder"):
        magicvideo_tiny.asked(bare, "finetune", part="unsupervised")


def test_the_verbs_are_those_of_the_core():
    for verb, kind in family.verbs.items():
        assert issubclass(kind, options.RunOptions), verb

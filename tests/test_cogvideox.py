"""CogVideoX against diffusers' pipelines: the same weights, seed and scheduler give the same frames."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from vgen import clips
from vgen.generate import generate
from vgen.video_write import write

PIPELINES = {
    "text": diffusers.CogVideoXPipeline,
    "image": diffusers.CogVideoXImageToVideoPipeline,
    "video": diffusers.CogVideoXVideoToVideoPipeline,
}


def released(folder: Path, start: str, **call: Any) -> Tensor:
    """Frames (B, 3, T, H, W) in [-1, 1] as diffusers' pipeline gives them."""
    scheduler = getattr(diffusers, tiny.json.loads((folder / "model_index.json").read_text())["scheduler"][1])
    pipe = PIPELINES[start](
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=AutoencoderKLCogVideoX.from_pretrained(folder / "vae"),
        transformer=CogVideoXTransformer3DModel.from_pretrained(folder / "transformer"),
        scheduler=scheduler.from_pretrained(folder / "scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    told = {"prompt": "a red ball rising", "num_inference_steps": 4, "guidance_scale": 6.0, "height": 32, "width": 32}
    generator = torch.Generator().manual_seed(3)
    frames = pipe(**{**told, "max_sequence_length": 8, "generator": generator, "output_type": "pt", **call}).frames
    return frames.transpose(1, 2) * 2 - 1


def ours(folder: Path, **flags: Any) -> Tensor:
    """The same as vgen gives them, before they are rounded to 8 bits."""
    model = tiny.model(folder)
    streams = generate(model, tiny.asked(folder, **flags), lambda *_: None)
    return model.decode(streams).clamp(-1, 1)


def same(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def picture(path: Path, seed: int = 1) -> Path:
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def movie(path: Path, num_frames: int = 9) -> Path:
    pixels = torch.randint(0, 256, (num_frames, 32, 32, 3), dtype=torch.uint8)
    write(path, pixels, Fraction(8), metadata={})
    return path


def pils(path: Path, num_frames: int) -> list[Image.Image]:
    pixels = clips.load_file(path, num_frames, 32, 32)[0]
    frames = pixels.permute(1, 2, 3, 0).add(1).mul(127.5).round().to(torch.uint8)
    return [Image.fromarray(frame.numpy()) for frame in frames]


@pytest.mark.parametrize("sampler", ["DDIM", "DPM"])
@pytest.mark.parametrize("kind", ["2b", "5b", "1.5-5b"])
def test_text_to_video_equals_diffusers(tmp_path: Path, kind: str, sampler: str) -> None:
    folder = tiny.checkpoint(tmp_path / "c", kind, sampler=sampler)
    # of 1.5's 17 frames come 5 latents; a sixth fills up the patch of two and is dropped again
    num_frames = 17 if kind == "1.5-5b" else 9
    theirs = released(folder, "text", num_frames=num_frames)
    assert theirs.shape == (1, 3, num_frames, 32, 32)
    assert theirs.std() > 0.05
    same(ours(folder, num_frames=num_frames), theirs)


@pytest.mark.parametrize(("kind", "sampler"), [("5b-i2v", "DDIM"), ("5b-i2v", "DPM"), ("1.5-5b-i2v", "DPM")])
def test_image_to_video_equals_diffusers(tmp_path: Path, kind: str, sampler: str) -> None:
    folder, image = tiny.checkpoint(tmp_path / "c", kind, sampler=sampler), picture(tmp_path / "i.png")
    num_frames = 17 if kind == "1.5-5b-i2v" else 9
    theirs = released(folder, "image", image=Image.open(image), num_frames=num_frames)
    mine = ours(folder, image=image, num_frames=num_frames)
    same(mine, theirs)
    assert not torch.allclose(ours(folder, image=picture(image, seed=2), num_frames=num_frames), mine, atol=1e-3)


@pytest.mark.parametrize(("kind", "sampler"), [("5b", "DDIM"), ("2b", "DPM")])
def test_video_to_video_equals_diffusers(tmp_path: Path, kind: str, sampler: str) -> None:
    folder, video = tiny.checkpoint(tmp_path / "c", kind, sampler=sampler), movie(tmp_path / "v.mp4")
    theirs = released(folder, "video", video=pils(video, 9), strength=0.5)
    same(ours(folder, video=video, strength=0.5), theirs)


def test_other_sizes_equal_diffusers(tmp_path: Path) -> None:
    for kind in ("2b", "5b", "1.5-5b"):
        folder = tiny.checkpoint(tmp_path / kind, kind)
        theirs = released(folder, "text", num_frames=17, height=24, width=16)
        same(ours(folder, num_frames=17, height=24, width=16, window=17), theirs)
    assert ours(folder, height=48, width=40).isfinite().all()  # larger than diffusers' rule for 1.5 allows


def test_dynamic_guidance_quirk_equals_diffusers(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "c", "5b", sampler="DPM")
    theirs = released(folder, "text", num_frames=9, use_dynamic_cfg=True)
    same(ours(folder, use_dynamic_cfg=True, dynamic_cfg_quirk=True), theirs)
    assert not torch.allclose(ours(folder, use_dynamic_cfg=True), theirs, atol=1e-3)


def test_eta_adds_noise_where_diffusers_ignores_it(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "c", "5b")
    theirs = released(folder, "text", num_frames=9, eta=0.7)
    same(ours(folder), theirs)
    assert not torch.allclose(ours(folder, eta=0.7), theirs, atol=1e-3)

"""A repository as SVD-XT is released, with small random weights: pulled, sampled, encoded, trained, adapted, pushed."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import loopback
import numpy as np
import pytest
import svd_tiny
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from PIL import Image
from repository import Repo
from safetensors.torch import load_file
from shell import run, vgen
from test_bundle import NO_NETWORK
from transformers import CLIPVisionModelWithProjection

REPO = "stabilityai/stable-video-diffusion-img2vid-xt"
NETWORKS = {
    "image_encoder": (CLIPVisionModelWithProjection, "model"),
    "unet": (UNetSpatioTemporalConditionModel, "diffusion_pytorch_model"),
    "vae": (AutoencoderKLTemporalDecoder, "diffusion_pytorch_model"),
}
PULLED = [
    "LICENSE.md",
    "README.md",
    "feature_extractor/preprocessor_config.json",  # not read: CLIP's sizes and means are its own, in pictures.py
    "image_encoder/config.json",
    "image_encoder/model.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
LEFT = [  # the release has them; vgen reads none of them, and `pull` leaves them where they are
    ".gitattributes",
    "comparison.png",
    "output_tile.gif",
    "image_encoder/model.fp16.safetensors",  # the same weights once more, halved: --dtype fp16 halves as it loads
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "svd_xt.safetensors",  # the same weights once more, in one file under other names
    "svd_xt_image_decoder.safetensors",  # another decoder, frame by frame
]
SMALL = "--num-frames|4|--height|64|--width|64|--seed|3"
VERBS = f"""
{NO_NETWORK.replace("main()", "words = sys.argv[1:]")}
for line in words:
    sys.argv[1:] = line.split("|")
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""
OPEN = """
import json, sys, torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
told = {"revision": sys.argv[2], "use_safetensors": True, "torch_dtype": torch.float32}
pipe = StableVideoDiffusionPipeline.from_pretrained(sys.argv[1], **told)
weights = {name: float(p.detach().double().sum()) for name, p in pipe.unet.named_parameters()}
small = {"num_frames": 4, "height": 64, "width": 64, "num_inference_steps": 2, "fps": 7, "min_guidance_scale": 1.5}
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(3)
frames = pipe(Image.open(sys.argv[3]), generator=generator, output_type="np", **small).frames
print(json.dumps([type(pipe.feature_extractor).__name__, weights, frames.tolist()]))
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the repository."""
    folder = svd_tiny.checkpoint(tmp_path_factory.mktemp("released") / "xt")
    for name, (kind, _) in NETWORKS.items():
        kind.from_pretrained(folder / name).half().save_pretrained(folder / name, variant="fp16")
    for name in ("LICENSE.md", "comparison.png", "output_tile.gif", *LEFT[-2:], ".gitattributes"):
        (folder / name).write_text(name)
    card = {"pipeline_tag": "image-to-video", "license": "other", "license_name": "stable-video-diffusion-community"}
    (folder / "README.md").write_text("\n".join(["---", *(f"{k}: {v}" for k, v in card.items()), "---", "# SVD"]))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_layout_is_that_of_the_release(released):
    assert sorted(released) == sorted([*PULLED, *LEFT])


def test_pulled_sampled_encoded_trained_adapted_pushed_and_opened_by_diffusers(released, tmp_path):
    first = svd_tiny.picture(tmp_path / "first.png", size=(64, 64))
    with loopback.hub({REPO: released}) as server:
        commit = server.repos[REPO].names["main"]
        here = server.environment(tmp_path / "here", "hf_ann")
        got = vgen("checkpoints", "pull", "svd.img2vid-xt", "--json", **here)
        assert got.code == 0, got.err
        folder = Path(got.json()["folder"])
        assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == sorted(PULLED)
        _work(tmp_path, here, commit)
        pushed = vgen("checkpoints", "push", tmp_path / "tuned", "ann/tuned", "--tag", "v1", "--json", **here)
        assert pushed.code == 0, pushed.err
        _told(server.repos["ann/tuned"], tmp_path, released, commit)
        there = server.environment(tmp_path / "elsewhere")
        again = vgen("checkpoints", "pull", "ann/tuned@v1", **there)
        assert again.code == 0, again.err
        sampled = f"sample|svd|first.png|--checkpoint|ann/tuned@v1|{SMALL}|--num-inference-steps|2|-o|again"
        done = run([sys.executable, "-c", VERBS, sampled], cwd=tmp_path, **{**there, "HF_HUB_OFFLINE": "1"})
        assert done.code == 0, done.err
        opened = run([sys.executable, "-c", OPEN, "ann/tuned", "v1", first], **there)
        assert opened.code == 0, opened.err
    _same(json.loads(opened.out.splitlines()[-1]), tmp_path)


def _work(place: Path, here: dict[str, str], commit: str) -> None:
    """Every verb by the name of the family alone: what was pulled is its default checkpoint. No socket is opened."""
    train = "--data|latents|--max-train-steps|1|--learning-rate|1e-2|--seed|3"
    lines = [
        f"sample|svd|first.png|{SMALL}|--num-inference-steps|2|-o|plain",
        f"sample|svd|--prompt|a red ball|{SMALL}|--num-inference-steps|2|-o|ball.mp4",
        f"encode|svd|world:2|{SMALL}|--fps|8|-o|latents",
        f"finetune|svd|{train}|-o|tuned",
        f"train-lora|svd|{train}|--rank|2|-o|moves",
        f"sample|svd|first.png|{SMALL}|--num-inference-steps|2|--lora|moves:30|-o|moved",
        f"sample|svd|first.png|{SMALL}|--num-inference-steps|2|--lora|moves:0|-o|still",
    ]
    done = run([sys.executable, "-c", VERBS, *lines], cwd=place, **{**here, "HF_HUB_OFFLINE": "1"})
    assert done.code == 0, done.err
    pinned = f"{REPO}@{commit}"
    record = (place / "ball.mp4.toml").read_text()
    assert pinned in record
    assert "picture" in record
    assert "sd (demo)" in record  # what made the picture
    assert json.loads((place / "moves" / "vgen.json").read_text())["base"]["reference"] == pinned
    plain, moved, still = ((place / name / "frame_00003.png").read_bytes() for name in ("plain", "moved", "still"))
    assert plain == still != moved


def _told(repo: Repo, place: Path, released: dict[str, bytes], commit: str) -> None:
    """What the pushed checkpoint says of itself: what it was made of, and under which terms."""
    told = json.loads((place / "tuned" / "vgen.json").read_text())
    assert (told["base"]["reference"], told["base"]["revision"]) == (f"{REPO}@{commit}", commit)
    assert (told["part"], told["data"][0]["clips"], told["run"]["verb"]) == ("i2v", 2, "finetune")
    name = "unet/diffusion_pytorch_model.safetensors"
    assert told["base"]["files"][name] == "sha256:" + hashlib.sha256(released[name]).hexdigest()
    card = repo.card()
    assert (card["license"], card["license_name"]) == ("other", "stable-video-diffusion-community")
    assert (card["base_model"], card["base_model_relation"]) == (REPO, "finetune")
    assert (card["pipeline_tag"], card["library_name"]) == ("image-to-video", "diffusers")
    assert "vgen-part:i2v" in card["tags"]


def _same(opened: list[Any], place: Path) -> None:
    """Diffusers has the weights that were trained, and makes of them the clip that vgen makes, to a level of 255.

    vgen takes the guidance, as all else that is not asked for, from the release that it was made of.
    """
    extractor, weights, (frames,) = opened
    tuned = load_file(place / "tuned" / "unet" / "diffusion_pytorch_model.safetensors")
    assert extractor.startswith("CLIPImageProcessor")
    assert weights == {key: float(tensor.double().sum()) for key, tensor in tuned.items()}
    ours = [np.asarray(Image.open(path), float) for path in sorted((place / "again").glob("frame_*.png"))]
    assert len(ours) == 4
    assert abs(np.stack(ours) - 255 * np.asarray(frames)).max() <= 1

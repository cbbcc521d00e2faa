"""Multi-view from the command line: drawn orbits, a manifest that tells their elevation, training, an orbit sampled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import orbit
import pytest
import svd_tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from shell import vgen

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_the_shadow_of_a_turned_cube_has_the_area_that_geometry_tells():
    """4 h^2 (|x| + |y| + |z|) of the direction, at each of 21 views; the frame is 2 x 2."""
    size = 128
    for elevation in (0.0, 10.0, 35.0):
        for k, picture in enumerate(orbit.turn(elevation, size=size)):
            ahead = orbit.axes(360 * k / 21, elevation)[0]
            area = picture.any(-1).mean() * 4
            assert area == pytest.approx(4 * orbit.HALF**2 * abs(ahead).sum(), abs=0.04)


def test_a_quarter_of_a_turn_shows_the_next_face():
    faces = [np.unique(frame.reshape(-1, 3)[frame.any(-1).ravel()], axis=0) for frame in orbit.turn(0.0, count=4)]
    assert [len(colours) for colours in faces] == [1] * 4
    assert [tuple(colours[0]) for colours in faces] == [tuple(orbit.COLOURS[face]) for face in (0, 1, 3, 4)]
    assert (orbit.view(0.0, 90.0)[16, 16] == orbit.COLOURS[2]).all()


def test_orbits_are_encoded_trained_on_and_sampled(tmp_path: Path) -> None:
    folder = svd_tiny.checkpoint(tmp_path / "c")
    rows = []
    for name, elevation in (("low.mp4", 5.0), ("high.mp4", 30.0)):
        orbit.clip(tmp_path / name, elevation, start=40.0)
        row = {"source": name, "start_frame": 0, "end_frame": 21, "captions": {}, "caption_probs": {}}
        rows.append({**row, "decision": "keep", "elevation": elevation})
    (tmp_path / "orbits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    on = ("--checkpoint", folder, "--seed", "3")
    done = vgen("encode", "svd", "orbits.jsonl", *on, "-n", "21", "-o", "latents", cwd=tmp_path)
    assert done.code == 0, done.err
    stored = [load_file(path) for path in (tmp_path / "latents").rglob("*.safetensors")]
    clips = [streams for streams in stored if "elevation" in streams]
    assert sorted(streams["elevation"].item() for streams in clips) == [5.0, 30.0]
    assert {tuple(streams["mean"].shape) for streams in clips} == {(4, 21, 8, 8)}
    steps = ("--max-train-steps", "2", "--learning-rate", "1e-2", "-o", "tuned")
    done = vgen("finetune", "svd", *on, "--part", "multiview", "--data", "latents", *steps, cwd=tmp_path)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "tuned" / "unet" / "config.json").read_text())
    assert config["projection_class_embeddings_input_dim"] == 5 * config["addition_time_embed_dim"]
    old, new = (load_file(place / "unet" / WEIGHTS) for place in (folder, tmp_path / "tuned"))
    name, width = "add_embedding.linear_1.weight", 3 * config["addition_time_embed_dim"]
    assert new[name][:, width:].abs().max() > 0  # began at zero
    assert not torch.equal(new[name][:, :width], old[name])
    Image.fromarray(orbit.view(0.0, 10.0)).save(tmp_path / "front.png")
    around = ("--orbit", "--elevation", "10", "--views", "21", "--num-inference-steps", "2", "-o", "around")
    done = vgen("sample", "svd", "front.png", "--checkpoint", "tuned", "--seed", "3", *around, cwd=tmp_path)
    assert done.code == 0, done.err
    assert len(list((tmp_path / "around").glob("frame_*.png"))) == 21

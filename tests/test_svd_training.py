"""Training Stable Video Diffusion: what is stored of clips, EDM's loss, every part, what trains and what stays."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import svd_tiny
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from vgen import clips, diffusion, motion
from vgen.errors import UsageError
from vgen.finetune import batches, finetune
from vgen.latents import sample_posterior
from vgen.lora import train_lora
from vgen.plugins.svd import NOISE, describe, family, pictures
from vgen.plugins.svd.blank import Blank
from vgen.plugins.svd.unet import dropped, without
from vgen.store import Store

FAST: dict[str, Any] = {"train_batch_size": 2, "learning_rate": 3e-3, "lr_scheduler": "constant", "max_train_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return svd_tiny.checkpoint(tmp_path_factory.mktemp("svd") / "c")


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(folder, tmp_path_factory.mktemp("data") / "d", 4)


def stored(folder: Path, place: Path, frames: int, **facts: float) -> Path:
    items = [replace(item, facts=facts) for item in clips.discover(["world:4"])]
    told = svd_tiny.asked(folder, "encode", inputs=["world:4"], fps=8.0)
    tiny.fill(svd_tiny.model(folder), place, told, (items, (frames, 32, 32)))
    return place


def run(folder: Path, output: Path, data: Path, part: str = "i2v", **flags: Any) -> dict[str, Any]:
    options = svd_tiny.asked(folder, "finetune", **{**FAST, "part": part, "data": [str(data)], **flags}, output=output)
    return finetune(family, svd_tiny.model(folder), folder, options, tiny.CPU)


def batch(folder: Path, data: Path, part: str = "i2v") -> dict[str, Any]:
    options = svd_tiny.asked(folder, "finetune", part=part, data=[str(data)], train_batch_size=2)
    return batches(family, svd_tiny.model(folder), options)(0)


def weights(folder: Path, name: str = "unet") -> dict[str, Tensor]:
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def changed(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a.keys() & b.keys() if a[name].shape != b[name].shape or not torch.equal(a[name], b[name])}


# --- what is stored -------------------------------------------------------------------------------------------------


def test_all_that_conditions_is_stored(folder, data):
    store = Store.open(data, space=svd_tiny.model(folder).space, text_space=None)
    streams, record = store.get(store.keys()[0])
    shapes = {name: tuple(s.shape) for name, s in streams.items()}
    kept = {"mean": (4, 4, 8, 8), "logvar": (4, 4, 8, 8), "conditioning": (pictures.DRAWS, 4, 8, 8)}
    assert shapes == {
        **kept,
        "noise": (pictures.DRAWS,),
        "embedding": (2, 16),
        "mask": (1, 4, 8, 8),
        **dict.fromkeys(("fps", "motion", "bucket"), (1,)),
    }
    (item,) = [i for i in clips.discover(["world:4"]) if str(i.path) == record["source"]["uri"]]
    pixels = clips.load(item, 4, 32, 32, fps=None).pixels
    frames = pixels.add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
    score = motion.score(frames, Fraction(8))
    assert streams["motion"].item() == pytest.approx(score)
    assert streams["bucket"].item() == motion.bucket(score, motion.default_table())
    assert streams["fps"].item() == 8
    model = svd_tiny.model(folder)
    sigma, noise = pictures.strengths(pixels[:, 0])
    assert torch.allclose(streams["noise"], sigma)
    seen = pixels[:, 0] + sigma[:, None, None, None] * noise
    assert torch.allclose(streams["conditioning"], model.conditioning(seen), atol=1e-5)
    assert torch.allclose(streams["embedding"][1:], model.embedding(pixels[None, :, -1])[0], atol=1e-5)


def test_the_draws_of_noise_are_the_papers():
    some = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sigma = torch.stack([pictures.strengths(picture)[0] for picture in some]).flatten()
    assert len(sigma.unique()) == 1600
    assert sigma.median().item() == pytest.approx(0.0498, rel=0.1)
    assert sigma.log().std().item() == pytest.approx(0.5, rel=0.1)


def test_a_manifest_says_the_bucket(folder, tmp_path):
    data = stored(folder, tmp_path / "d", 4, motion_score=9.0, motion_bucket=33, elevation=10.0)
    made = batch(folder, data)
    assert made["bucket"].tolist() == [[33.0], [33.0]]
    assert made["motion"].tolist() == [[9.0], [9.0]]
    assert made["elevation"].tolist() == [[10.0], [10.0]]


# --- the loss -------------------------------------------------------------------------------------------------------


def test_the_loss_is_edms(folder, data):
    """lambda |D - x0|^2 with D = c_skip x + c_out F(c_in x; c_noise), written out by hand (equations of systems 4b)."""
    made, model = batch(folder, data), svd_tiny.model(folder)
    part = model.part("i2v", svd_tiny.asked(folder, "finetune", condition_dropout=0.0))
    with torch.no_grad():
        ours = part.loss(made, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    assert part.told is not None
    cond = part.told(made, generator)
    torch.rand(2, generator=generator)  # the draw of what is dropped
    sigma = diffusion.sample_times(part.process, 2, generator, (0, 1))
    x0 = made["latents"]
    s = sigma.float().view(-1, 1, 1, 1, 1)
    x = x0 + s * torch.randn(x0.shape, generator=generator)
    c_skip, c_out, c_in = 1 / (s**2 + 1), -s / (s**2 + 1).sqrt(), 1 / (s**2 + 1).sqrt()
    seen = torch.cat([c_in * x, cond["concat"]], 1).transpose(1, 2)
    told = {"encoder_hidden_states": cond["context"], "added_time_ids": cond["vector"]}
    with torch.no_grad():
        out = part.network(seen, 0.25 * sigma.log().float(), **told).sample.transpose(1, 2)
    error = (1 + s**2) / s**2 * (c_skip * x + c_out * out - x0) ** 2
    assert ours.item() == pytest.approx(error.mean().item(), rel=1e-4)


def test_each_part_has_the_noise_of_the_paper(folder, data):
    for name, (mean, std) in NOISE.items():
        if name != "t2v":
            options = svd_tiny.asked(folder, "finetune", part=name)
            process = svd_tiny.model(folder).part(name, options).process
            assert (process.P_mean, process.P_std) == (mean, std)
            middle = process.training_time(torch.tensor([0.5], dtype=torch.float64)).item()
            assert middle == pytest.approx(torch.tensor(mean).exp().item())
    options = svd_tiny.asked(folder, "finetune", p_mean=-1.2, p_std=1.0)
    assert svd_tiny.model(folder).part("i2v", options).process.P_mean == -1.2


def test_dropped_conditions_are_those_of_the_unconditional_pass():
    cond = {"context": torch.ones(500, 1, 2), "concat": torch.ones(500, 1, 1, 1, 1), "vector": torch.ones(500, 3)}
    kept = dropped(cond, 0.15, torch.Generator().manual_seed(0))
    gone = kept["context"].flatten(1).sum(1) == 0
    assert 0.1 < gone.float().mean() < 0.2
    assert torch.equal(gone, kept["concat"].flatten() == 0)
    assert torch.equal(kept["vector"], cond["vector"])
    assert torch.equal(without(cond)["context"], torch.zeros(500, 1, 2))
    assert dropped(cond, 0.0, torch.Generator())["context"].all()


def test_the_picture_conditions_as_it_was_stored(folder, data):
    made, model = batch(folder, data), svd_tiny.model(folder)
    part = model.part("i2v", svd_tiny.asked(folder, "finetune"))
    assert part.told is not None
    cond = part.told(made, torch.Generator().manual_seed(1))
    assert cond["concat"].shape == (2, 4, 4, 8, 8)
    k = [int((made["noise"][b] == cond["vector"][b, 2]).nonzero()) for b in range(2)]
    for b in range(2):
        assert torch.equal(cond["concat"][b, :, 0], made["conditioning"][b, k[b]])
        assert torch.equal(cond["concat"][b, :, 3], made["conditioning"][b, k[b]])
    assert cond["vector"][:, 0].tolist() == [7.0, 7.0]
    assert torch.equal(cond["context"], made["embedding"][:, :1])


# --- parts ----------------------------------------------------------------------------------------------------------


def test_i2v_trains_all_of_the_unet_and_nothing_else(folder, data, tmp_path):
    run(folder, tmp_path / "o", data, max_train_steps=3)
    before, after = weights(folder), weights(tmp_path / "o")
    still = before.keys() - changed(before, after)
    assert before.keys() == after.keys()
    assert not [name for name in still if "attn2.to_q" not in name and "attn2.to_k" not in name and "norm2" not in name]
    assert not changed(weights(folder, "vae"), weights(tmp_path / "o", "vae"))
    assert json.loads((tmp_path / "o" / "vgen.json").read_text())["part"] == "i2v"


def test_a_resumed_run_is_the_undisturbed_one(folder, data, tmp_path):
    run(folder, tmp_path / "a", data, max_train_steps=4, lr_scheduler="constant")
    run(folder, tmp_path / "b", data, max_train_steps=2, lr_scheduler="constant")
    state = json.loads((tmp_path / "b" / "vgen.json").read_text())
    assert state["part"] == "i2v"
    run(folder, tmp_path / "b", data, max_train_steps=4, lr_scheduler="constant", resume=True)
    assert not changed(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_interpolation_grows_the_unet_and_learns_the_blank(folder, tmp_path):
    data = stored(folder, tmp_path / "d", 5)
    run(folder, tmp_path / "o", data, "interpolate", max_train_steps=3)
    config = json.loads((tmp_path / "o" / "interpolator" / "config.json").read_text())
    assert (config["in_channels"], config["num_frames"]) == (9, 5)
    assert weights(tmp_path / "o", "blank")["embedding"].abs().min() > 0
    assert not changed(weights(folder), weights(tmp_path / "o"))
    assert describe(tmp_path / "o").facts["interpolates"]
    ends = torch.rand(3, 3, 2, 32, 32) * 2 - 1
    options = svd_tiny.asked(tmp_path / "o", "interpolate", num_inference_steps=2)
    model = svd_tiny.model(tmp_path / "o")
    made = model.between(ends, options, [1, 2, 3])
    assert made.shape == (3, 3, 3, 32, 32)
    assert torch.allclose(model.between(ends[1:2], options, [2]), made[1:2], atol=1e-4)
    run(tmp_path / "o", tmp_path / "p", data, "interpolate")  # goes on from the network that is there
    assert changed(weights(tmp_path / "o", "interpolator"), weights(tmp_path / "p", "interpolator"))


def test_the_condition_of_interpolation_is_the_papers(folder, tmp_path):
    """(5, 9, H/8, W/8): both ends known, three learned embeddings between, and a mask that says so."""
    blank = Blank(4)
    blank.embedding.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ends = torch.randn(2, 4, 2, 8, 8)
    seen = blank(ends, 5)
    assert seen.shape == (2, 5, 5, 8, 8)
    assert torch.equal(seen[:, :4, [0, 4]], ends)
    assert seen[0, :4, 2, 3, 3].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert seen[0, 4, :, 0, 0].tolist() == [1, 0, 0, 0, 1]
    made = batch(folder, stored(folder, tmp_path / "d", 5), "interpolate")
    part = svd_tiny.model(folder).part("interpolate", svd_tiny.asked(folder, "finetune", part="interpolate"))
    assert part.told is not None
    cond = part.told(made, torch.Generator().manual_seed(0))
    assert cond["context"].shape == (2, 2, 16)
    sigma = cond["vector"][:, 2].view(-1, 1, 1, 1, 1)
    error = cond["concat"][:, :4, [0, 4]] * 0.7 - made["latents"][:, :, [0, 4]]
    assert error.std().item() == pytest.approx(sigma.square().mean().sqrt().item(), rel=0.2)


def test_interpolation_wants_five_frames(folder, data, tmp_path):
    with pytest.raises(UsageError, match="5 frames, not 4"):
        run(folder, tmp_path / "o", data, "interpolate")


def test_multiview_is_told_the_angles(folder, data, tmp_path):
    orbits = stored(folder, tmp_path / "d", 4, elevation=10.0)
    run(folder, tmp_path / "o", orbits, "multiview")
    assert describe(tmp_path / "o").facts["vectors"] == 5
    options = svd_tiny.asked(
        tmp_path / "o", image=svd_tiny.picture(tmp_path / "p.png"), orbit=True, num_inference_steps=2
    )
    from vgen.generate import generate

    assert generate(svd_tiny.model(tmp_path / "o"), options, tiny.ignore)["latents"].shape == (1, 4, 4, 8, 8)
    with pytest.raises(UsageError, match="no 'elevation'"):
        run(folder, tmp_path / "e", data, "multiview")


def test_text_to_video_trains_with_captions(folder, tmp_path):
    texts = svd_tiny.checkpoint(tmp_path / "t", text=True)
    data = stored(texts, tmp_path / "d", 4)
    run(texts, tmp_path / "o", data, "t2v")
    assert changed(weights(texts), weights(tmp_path / "o"))
    run(texts, tmp_path / "i", data, "i2v")  # the picture's channels are added, and say nothing at first
    assert weights(tmp_path / "i")["conv_in.weight"].shape[1] == 8
    with pytest.raises(UsageError, match="no text encoder"):
        run(folder, tmp_path / "n", data, "t2v")


@pytest.mark.parametrize("part", ["decoder", "autoencoder"])
def test_the_decoder_trains_and_the_encoder_only_when_asked(folder, tmp_path, part):
    told: dict[str, Any] = {"num_frames": 2, "height": 32, "width": 32}
    options = svd_tiny.asked(
        folder, "finetune", **{**FAST, "part": part, "data": ["world:4"], **told}, output=tmp_path / "o"
    )
    finetune(family, svd_tiny.model(folder), folder, options, tiny.CPU)
    moved = changed(weights(folder, "vae"), weights(tmp_path / "o", "vae"))
    assert any("decoder" in name and "temporal" in name for name in moved)
    assert any(name.startswith(("encoder", "quant_conv")) for name in moved) == (part == "autoencoder")
    scale = [json.loads((f / "vae" / "config.json").read_text())["scaling_factor"] for f in (folder, tmp_path / "o")]
    assert (scale[0] == scale[1]) == (part == "decoder")


def test_an_adapter_sits_on_temporal_attention_and_changes_nothing_at_scale_0(folder, data, tmp_path):
    options = svd_tiny.asked(folder, "train-lora", **{**FAST, "data": [str(data)], "rank": 4}, output=tmp_path / "o")
    train_lora(family, svd_tiny.model(folder), folder, options, tiny.CPU)
    (path,) = (tmp_path / "o").glob("*.safetensors")
    names = list(load_file(path))
    assert names
    assert all("temporal_transformer_blocks" in name and ".attn1." in name for name in names)
    told = json.loads((tmp_path / "o" / "vgen.json").read_text())
    assert told["family"] == "svd"


def test_a_picture_is_validated_while_it_trains(folder, data, tmp_path):
    image = svd_tiny.picture(tmp_path / "first.png")
    run(folder, tmp_path / "o", data, validation_image=image, validation_steps=1)
    made = sorted(path.name for path in (tmp_path / "o" / "validation").iterdir())
    assert made == ["000001-0.mp4", "000002-0.mp4"]


def test_a_training_batch_is_a_function_of_seed_and_step(folder, data):
    first, again = batch(folder, data), batch(folder, data)
    assert first["keys"] == again["keys"]
    assert torch.equal(first["latents"], again["latents"])


def test_the_posterior_of_a_clip_is_scaled_for_training(folder, data):
    store = Store.open(data, space=svd_tiny.model(folder).space, text_space=None)
    made = batch(folder, data)
    names = {store.record(key)["source"]["uri"]: key for key in store.keys()}  # noqa: SIM118, a store is no dict
    streams, _ = store.get(names[made["keys"][0]])
    drawn = sample_posterior(streams, torch.Generator().manual_seed(0)) * 0.7
    assert (drawn - made["latents"][0]).abs().max() < 6 * 0.7 * (0.5 * streams["logvar"]).exp().max()

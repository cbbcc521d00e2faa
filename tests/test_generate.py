"""Sampling: seeds, guidance, windows, memory, caches of text and of activations, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vgen import latents
from vgen.errors import UsageError, VgenError
from vgen.generate import decode, generate
from vgen.machine import Machine
from vgen.plugins.cogvideox.model import CogVideoX


@pytest.fixture(scope="module")
def model(folder: Path) -> CogVideoX:
    return tiny.model(folder)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGEN_HOME", str(tmp_path / "home"))


def make(model: CogVideoX, **flags: Any) -> Tensor:
    """Latents (B, C, T, H, W)."""
    return generate(model, tiny.asked(model.folder, **flags), tiny.ignore)["latents"]


def loaded(model: CogVideoX) -> set[str]:
    return set(model.networks.loaded)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_each_of_several_clips_is_the_one_made_alone(model: CogVideoX, sampler: str) -> None:
    eta = {"eta": 0.5} if sampler == "ddim" else {}
    three = make(model, sampler=sampler, num_videos_per_prompt=3, seed=5, **eta)
    alone = [make(model, sampler=sampler, seed=5 + i, **eta) for i in range(3)]
    torch.testing.assert_close(three, torch.cat(alone), atol=1e-5, rtol=0)
    assert not torch.allclose(three[0], three[1], atol=0.1)


def test_the_same_seed_gives_the_same_bits(model: CogVideoX) -> None:
    assert torch.equal(make(model), make(model))
    assert not torch.equal(make(model), make(model, seed=4))


def test_prompts_and_guidance_matter(model: CogVideoX) -> None:
    clips = [
        make(model),
        make(model, prompt="a blue box falling"),
        make(model, negative_prompt="a green star"),
        make(model, guidance_scale=2.0),
        make(model, use_dynamic_cfg=True),
        make(model, eta=1.0),
    ]
    for i, one in enumerate(clips):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in clips[:i])


def test_guidance_of_one_asks_the_network_once(model: CogVideoX) -> None:
    def flops(**flags: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            make(model, **flags)
        return counter.get_total_flops()

    make(model)  # the text is embedded
    once, both = flops(guidance_scale=1.0), flops(guidance_scale=6.0)
    assert both == 2 * once


def test_a_longer_clip_is_made_in_windows(model: CogVideoX) -> None:
    long = make(model, num_frames=25)
    assert long.shape == (1, 4, 7, 8, 8)
    assert long.isfinite().all()
    assert not torch.allclose(long, make(model, num_frames=25, window=25), atol=1e-3)
    assert decode(model, {"latents": long})[0].shape == (25, 32, 32, 3)


def test_windows_fill_whole_patches_in_time(tmp_path: Path) -> None:
    newer = tiny.model(tiny.checkpoint(tmp_path / "c", "1.5-5b"))
    assert make(newer, num_frames=33, window=17).shape == (1, 4, 9, 8, 8)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"num_frames": 10}, "--num-frames 10 is not 8k+1"),
        ({"window": 10, "num_frames": 17}, "--window 10"),
        ({"height": 30}, "--height 30 is not a multiple of 8"),
        ({"eta": 0.5, "sampler": "dpm"}, "--eta belongs to DDIM"),
        ({"strength": 0.5}, "--strength"),
        ({"negative_prompt": "x", "guidance_scale": 1.0}, "--negative-prompt does nothing"),
        ({"dynamic_cfg_quirk": True}, "--dynamic-cfg-quirk"),
        ({"cache": "pab", "num_frames": 17}, "--cache and --num-frames"),
        ({"cache": "fbcache", "use_dynamic_cfg": True}, "--cache and --use-dynamic-cfg"),
        ({"image": Path("x.png")}, "starts from text or video"),
        ({"prompt": " "}, "The prompt is empty"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_loads(folder: Path, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        tiny.asked(folder, **flags)


def test_an_image_starts_no_more_than_one_window(tmp_path: Path) -> None:
    newer = tiny.checkpoint(tmp_path / "c", "1.5-5b-i2v")
    with pytest.raises(UsageError, match="--image makes clips of at most 17 frames"):
        tiny.asked(newer, image=Path("x.png"), num_frames=33)
    learned = tiny.checkpoint(tmp_path / "d", "5b-i2v")
    with pytest.raises(UsageError, match="--num-frames 17"):  # its table of positions has 9 frames
        tiny.asked(learned, image=Path("x.png"), num_frames=17)


def test_too_small_a_strength_leaves_no_step(model: CogVideoX, tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    latents.write(path, {"latents": torch.randn(4, 3, 8, 8)}, {"space": model.space})
    with pytest.raises(UsageError, match="leaves none"):
        make(model, video=path, strength=0.1)


def test_latents_start_a_clip_where_they_fit(model: CogVideoX, tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    clip = {"mean": torch.randn(4, 3, 8, 8), "logvar": torch.zeros(4, 3, 8, 8)}
    latents.write(path, clip, {"space": model.space})
    assert make(model, video=path, strength=0.5).shape == (1, 4, 3, 8, 8)
    with pytest.raises(UsageError, match="9 frames of 32x32, but 17 of 32x32"):
        make(model, video=path, num_frames=17, window=17)
    other = latents.Space("other", 4, (4, 4, 4), hash="0" * 64)
    latents.write(path, clip, {"space": other})
    with pytest.raises(VgenError, match=f"(?s){other.id}.*{model.space.id}"):
        make(model, video=path)


# Text


def test_text_is_embedded_once_and_its_encoder_leaves(folder: Path) -> None:
    first = tiny.model(folder)
    made = make(first)
    assert loaded(first) == {"transformer"}
    second = tiny.model(folder)
    second.networks.classes = {"transformer": second.networks.classes["transformer"]}  # no other network can load
    assert torch.equal(make(second), made)
    with pytest.raises(KeyError, match="text_encoder"):
        make(second, prompt="a blue box")


def test_the_encoder_has_left_before_denoising(folder: Path) -> None:
    model = tiny.model(folder)
    there: list[set[str]] = []
    generate(model, tiny.asked(folder), lambda name, i, n: there.append(loaded(model)))
    assert there == [{"transformer"}] * 4


def test_an_embedding_does_not_depend_on_its_company(model: CogVideoX) -> None:
    texts = ["a red ball", "a blue box falling", ""]
    together = [tensors["text"] for tensors in model.embed(texts)]
    alone = [next(iter(model.embed([text])))["text"] for text in texts]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_another_encoder_has_another_cache(folder: Path, tmp_path: Path) -> None:
    other = tiny.model(tiny.checkpoint(tmp_path / "c", "5b", seed=1))
    mine = tiny.model(folder).texts.cached(["a red ball"])["a red ball"]
    assert not torch.equal(other.texts.cached(["a red ball"])["a red ball"], mine)
    half = tiny.model(folder, Machine(torch.device("cpu"), torch.bfloat16)).texts.cached(["a red ball"])
    assert half["a red ball"].dtype == torch.bfloat16


# Memory and speed


def test_slicing_and_tiling(model: CogVideoX) -> None:
    z = torch.randn(2, 4, 3, 24, 16)
    tiny_z = z[..., :4, :4]
    plain, small = model.decode({"latents": z}), model.decode({"latents": tiny_z})
    make(model, vae_slicing=True)
    assert model._vae().use_slicing
    torch.testing.assert_close(model.decode({"latents": z}), plain, atol=1e-4, rtol=1e-4)
    make(model, vae_tiling=True)
    assert (model._vae().use_slicing, model._vae().use_tiling) == (False, True)
    tiled = model.decode({"latents": z})
    assert tiled.shape == plain.shape
    assert not torch.equal(tiled, plain)
    assert torch.equal(model.decode({"latents": tiny_z}), small)  # one tile holds it
    make(model)
    assert torch.equal(model.decode({"latents": z}), plain)


@pytest.mark.parametrize("size", [(480, 720), (64, 64), (768, 1360), (40, 56)])
def test_tiles_meet(model: CogVideoX, size: tuple[int, int]) -> None:
    """The crops of diffusers' tiles are as long as the steps between them."""
    from vgen.plugins.cogvideox.autoencoder import save_memory

    vae = tiny._vae("5b").requires_grad_(False)
    vae.register_to_config(sample_height=size[0], sample_width=size[1])
    save_memory(vae, slicing=False, tiling=True)
    for side, latent, overlap in (
        (vae.tile_sample_min_height, vae.tile_latent_min_height, vae.tile_overlap_factor_height),
        (vae.tile_sample_min_width, vae.tile_latent_min_width, vae.tile_overlap_factor_width),
    ):
        assert int(latent * (1 - overlap)) * 4 == side - int(side * overlap)
        assert side == 4 * latent >= size[0] / 2 or side >= size[1] / 2


def test_offloading_takes_every_network_off_the_device(folder: Path) -> None:
    """Seen by its moves, since the device here is the CPU too."""
    model = tiny.model(folder, Machine(torch.device("cpu"), torch.float32, offload=True))
    there: list[str] = []
    network = model.networks.get("transformer")
    before = network.to
    network.to = lambda *place: there.append(str(place[0])) or before(*place)
    assert torch.equal(make(model), make(tiny.model(folder)))
    assert there == ["cpu", "cpu"]  # to the device, and off it


@pytest.mark.parametrize("kind", ["fbcache", "pab"])
def test_cached_activations_stay_near(model: CogVideoX, kind: str) -> None:
    plain = make(model, num_inference_steps=20)
    cached = make(model, num_inference_steps=20, cache=kind)
    assert cached.isfinite().all()
    assert (cached - plain).abs().mean() < 0.1 * plain.std()
    assert torch.equal(make(model, num_inference_steps=20), plain)  # the hooks are gone


def test_compile_is_asked_for(folder: Path) -> None:
    model = tiny.model(folder)
    assert model.denoiser("transformer", tiny.asked(folder)).network._compiled_call_impl is None
    assert model.denoiser("transformer", tiny.asked(folder, compile=True)).network._compiled_call_impl is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder: Path, dtype: torch.dtype) -> None:
    model = tiny.model(folder, Machine(torch.device("cpu"), dtype))
    made = make(model)
    assert {p.dtype for p in model.networks.get("transformer").parameters()} == {dtype}
    assert made.isfinite().all()
    assert decode(model, {"latents": made})[0].shape == (9, 32, 32, 3)


def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tiny.checkpoint(tmp_path / "c", "5b")
    for name, file in (
        ("transformer", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        path = other / name / f"{file}.safetensors"
        weights = load_file(path)
        weights.pop(sorted(weights)[3])
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(VgenError, match=f"'{name}'"):
            tiny.model(other).networks.get(name)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(VgenError, match=f"'{name}'"):
            tiny.model(other).networks.get(name)

"""Stable Video Diffusion: the same clips as diffusers' pipeline, published sizes, layers in time, windows, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import svd_tiny
import tiny
import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from vgen import clip_image, diffusion, samplers
from vgen.errors import UsageError, VgenError
from vgen.generate import generate, joined
from vgen.grow import grown
from vgen.plugins.svd import CHECKPOINTS, NOISE, Sample, check, describe, draw, family
from vgen.plugins.svd.steering import steered
from vgen.plugins.svd.told import turning, vector


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return svd_tiny.checkpoint(tmp_path_factory.mktemp("svd") / "c")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return svd_tiny.checkpoint(tmp_path_factory.mktemp("svd") / "t", text=True)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return svd_tiny.picture(tmp_path_factory.mktemp("picture") / "first.png")


def told(image: Path | None, **flags: Any) -> dict[str, Any]:
    return {"image": image, "num_inference_steps": 3, **flags}


def made(folder: Path, image: Path | None, **flags: Any) -> torch.Tensor:
    options = svd_tiny.asked(folder, **told(image, **flags))
    return generate(svd_tiny.model(folder), options, tiny.ignore)["latents"]


# --- the released pipeline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [(1.0, 2.5), (1.5, 3.0)])
def test_a_clip_is_that_of_diffusers_pipeline(folder, image, guidance):
    pipe = StableVideoDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    small = {"height": 32, "width": 32, "num_frames": 4, "num_inference_steps": 3, "fps": 7, "motion_bucket_id": 90}
    scales = {"min_guidance_scale": guidance[0], "max_guidance_scale": guidance[1]}
    generator = torch.Generator().manual_seed(3)
    theirs = pipe(Image.open(image), **small, **scales, generator=generator, output_type="pt").frames[0]
    options = svd_tiny.asked(folder, **told(image, motion_bucket_id=90, **scales))
    model = svd_tiny.model(folder)
    streams = generate(model, options, tiny.ignore)
    ours = model.decode(streams)[0].transpose(0, 1)
    assert ours.std() > 0.01
    assert torch.allclose((ours / 2 + 0.5).clamp(0, 1), theirs, atol=1e-4)


def test_the_picture_for_clip_is_that_of_the_pipeline():
    from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

    for size in ((576, 1024), (64, 64), (300, 200)):
        x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert torch.allclose(clip_image.shrunk(x, 224), _resize_with_antialiasing(x, (224, 224)), atol=1e-5)


def test_decoding_in_chunks_is_the_pipelines(folder, image):
    model = svd_tiny.model(folder)
    z = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = model.decode({"latents": z})
    model.chunk = 2
    parts = model.decode({"latents": z})
    assert parts.shape == whole.shape == (1, 3, 4, 32, 32)
    alone = [model.network("vae").decode(z[0, :, k : k + 2].transpose(0, 1), num_frames=2).sample for k in (0, 2)]
    assert torch.allclose(parts[0].transpose(0, 1), torch.cat(alone), atol=1e-5)
    assert not torch.allclose(parts, whole, atol=1e-3)


def test_the_latents_of_the_picture_are_the_mode_and_not_scaled(folder):
    model = svd_tiny.model(folder)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    mode = model.network("vae").encode(x).latent_dist.mode()
    assert torch.equal(model.conditioning(x), mode)


# --- published sizes ------------------------------------------------------------------------------------------------


def _meta(**change: Any) -> UNetSpatioTemporalConditionModel:
    with torch.device("meta"):
        made = UNetSpatioTemporalConditionModel(**change)
    return made.to("meta")  # its blenders are made on the CPU all the same


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_at_full_size():
    whole = _meta()
    assert count(whole) == 1_524_623_082
    assert count(_meta(in_channels=4)) == 1_524_611_562
    temporal = [p for n, p in whole.named_parameters() if "temporal" in n or "time_mixer" in n or "time_pos" in n]
    assert sum(p.numel() for p in temporal) == 656_076_838
    assert count(_decoder().decoder) == 63_579_183


def _decoder() -> AutoencoderKLTemporalDecoder:
    return AutoencoderKLTemporalDecoder(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2
    )


def test_the_camera_adapter_at_full_size():
    from vgen import adapters

    layers = adapters.targets(_meta(), list(family.lora_targets))
    sizes = {name: m for name, m in _meta().named_modules() if name in layers}
    assert len(layers) == 64
    assert all("temporal_transformer_blocks" in name and ".attn1." in name for name in layers)
    assert sum(16 * (m.in_features + m.out_features) for m in sizes.values()) == 1_597_440


def multiplications(call: Any) -> tuple[float, float]:
    """Of a call, in 10^12; and without the products of attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" in str(op) or "bmm" in str(op))
    return counter.get_total_flops() / 2e12, (counter.get_total_flops() - products) / 2e12


@pytest.mark.parametrize(
    ("size", "all_", "most"),
    [((14, 72, 128), 22.401, 18.048), ((25, 72, 128), 39.974, 32.187), ((14, 40, 72), 6.069, None)],
)
def test_multiplications_of_a_call_at_full_size(size, all_, most):
    network, (frames, height, width) = _meta(), size
    x = torch.empty(1, frames, 8, height, width, device="meta")
    one, ids = torch.empty(1, 1, 1024, device="meta"), torch.empty(1, 3, device="meta")
    told = {"encoder_hidden_states": one, "added_time_ids": ids}
    whole, rest = multiplications(lambda: network(x, torch.empty(1, device="meta"), **told))
    assert whole == pytest.approx(all_, rel=1e-3)
    assert most is None or rest == pytest.approx(most, rel=1e-3)


def test_multiplications_of_the_decoder_at_full_size():
    with torch.device("meta"):
        vae = _decoder()
    vae.to("meta")
    z = torch.empty(14, 4, 72, 128, device="meta")
    assert multiplications(lambda: vae.decode(z, num_frames=14))[0] == pytest.approx(48.60, rel=1e-3)


def test_defaults_of_the_released_checkpoints():
    by_tag = {c.tag: c for c in CHECKPOINTS}
    assert [by_tag[t].defaults["num_frames"] for t in ("img2vid", "img2vid-xt", "img2vid-xt-1-1")] == [14, 25, 25]
    assert by_tag["img2vid"].defaults["max_guidance_scale"] == 2.5
    assert NOISE["i2v"] == (1.0, 1.6)


def test_a_folder_of_the_released_shape_is_sampled_as_the_release(tmp_path):
    """Its configurations tell a square of 768; what was trained from a release has all that the release has."""
    unet = {"num_frames": 25, "sample_size": 96, "in_channels": 8, "block_out_channels": [320, 640, 1280, 1280]}
    unet |= {"projection_class_embeddings_input_dim": 768, "addition_time_embed_dim": 256}
    for name, told in {"unet": unet, "vae": {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(told))
    found, released = describe(tmp_path), CHECKPOINTS[1]
    assert (found.defaults, found.rules, found.facts) == (released.defaults, released.rules, released.facts)
    base = {"reference": f"{CHECKPOINTS[2].repo}@{'0' * 40}"}
    (tmp_path / "vgen.json").write_text(json.dumps({"base": base}))
    assert describe(tmp_path).defaults == CHECKPOINTS[2].defaults
    assert released.defaults["fps"] != CHECKPOINTS[2].defaults["fps"]


# --- EDM and guidance -----------------------------------------------------------------------------------------------


def test_the_process_is_the_released_schedulers(folder):
    times = svd_tiny.model(folder).process.times(25).tolist()
    first = [700, 545.7292, 421.5691, 322.4537, 244.0231, 182.5471]
    assert times[:6] == pytest.approx(first, abs=1e-3)
    assert times[-3:] == pytest.approx([0.0248, 0.0079, 0.002], abs=1e-4)


def test_another_scheduler_is_refused():
    with pytest.raises(VgenError, match="use_karras_sigmas"):
        diffusion.edm_from_scheduler_config({**svd_tiny.SCHEDULER, "use_karras_sigmas": False})


def test_guidance_over_frames():
    def make(profile: str, low: float = 1.0, high: float = 3.0) -> Any:
        told = {"guidance_profile": profile, "min_guidance_scale": low, "max_guidance_scale": high}
        return draw.guidance(Sample(**told), 5)  # type: ignore[arg-type]

    assert make("linear").tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert make("triangular").tolist() == [1.0, 2.0, 3.0, 2.0, 1.0]
    assert make("constant") == 3.0
    assert make("linear", 2.0, 2.0) == 2.0


def test_linear_guidance_leaves_the_first_frame_conditional(folder, image):
    """At scale 1 the unconditional pass has no weight: the first frame's x0 is the conditional one."""
    options = svd_tiny.asked(folder, **told(image, min_guidance_scale=1.0, max_guidance_scale=3.0))
    model = svd_tiny.model(folder)
    asked, part = model.draw("unet", options, {}), model.denoiser("unet", options)
    both = samplers.guided(part.predict, part.process, "v", asked.cond, asked.uncond, asked.guidance)
    one = diffusion.denoiser(part.predict, part.process, "v", asked.cond)
    with torch.no_grad():
        x0, alone = both(asked.x, asked.times[0]), one(asked.x, asked.times[0])
    assert torch.allclose(x0[:, :, 0], alone[:, :, 0], atol=1e-4)
    assert not torch.allclose(x0[:, :, -1], alone[:, :, -1], atol=1e-3)


def test_heun_is_another_clip_from_the_same_noise(folder, image):
    assert not torch.equal(made(folder, image), made(folder, image, sampler="heun"))


# --- layers in time -------------------------------------------------------------------------------------------------


def call(network: Any, x: torch.Tensor, **more: Any) -> torch.Tensor:
    cond = {"encoder_hidden_states": torch.ones(len(x), 1, 16), "added_time_ids": torch.zeros(len(x), 3), **more}
    with torch.no_grad():
        return network(x, torch.zeros(len(x)), **cond).sample


def test_a_mix_of_30_makes_frames_independent():
    torch.manual_seed(0)
    network = svd_tiny.unet().eval()
    for name, p in network.named_parameters():
        if name.endswith("mix_factor"):
            p.data.fill_(30.0)
    x = torch.randn(1, 4, 8, 8, 8)
    changed = x.clone()
    changed[:, 2] += 1
    a, b = call(network, x), call(network, changed)
    assert torch.equal(a[:, [0, 1, 3]], b[:, [0, 1, 3]])
    assert not torch.equal(a[:, 2], b[:, 2])
    free = svd_tiny.unet().eval()
    assert not torch.equal(call(free, x)[:, 0], call(free, changed)[:, 0])


def test_an_indicator_of_images_makes_frames_independent():
    """The network says 0, a clip, of all frames; where blenders are told 1, the branch in time has no part."""
    from diffusers.models.resnet import AlphaBlender

    torch.manual_seed(0)
    network = svd_tiny.unet().eval()
    x = torch.randn(1, 4, 8, 8, 8)
    changed = x.clone()
    changed[:, 2] += 1

    def images(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "image_only_indicator": torch.ones_like(kwargs["image_only_indicator"])}

    blenders = [module for module in network.modules() if isinstance(module, AlphaBlender)]
    assert {blender.merge_strategy for blender in blenders} == {"learned_with_images"}
    hooks = [blender.register_forward_pre_hook(images, with_kwargs=True) for blender in blenders]
    a, b = call(network, x), call(network, changed)
    assert torch.equal(a[:, [0, 1, 3]], b[:, [0, 1, 3]])
    assert not torch.equal(a[:, 2], b[:, 2])
    for hook in hooks:
        hook.remove()
    for name, p in network.named_parameters():
        if name.endswith("mix_factor"):
            p.data.fill_(torch.inf)
    assert torch.equal(call(network, x), a)  # the same as a mix of +infinity


def test_the_layers_in_time_can_have_a_context_of_their_own():
    torch.manual_seed(0)
    network = svd_tiny.unet().eval()
    x, context = torch.randn(2, 4, 8, 8, 8), torch.randn(2, 1, 16)
    plain = call(network, x, encoder_hidden_states=context)
    with steered(network, context, None):
        assert torch.allclose(call(network, x, encoder_hidden_states=context), plain, atol=1e-6)
    with steered(network, torch.randn(2, 3, 16), None):
        assert not torch.allclose(call(network, x, encoder_hidden_states=context), plain, atol=1e-4)
    assert torch.equal(call(network, x, encoder_hidden_states=context), plain)


def test_vectors_of_each_frame_are_those_of_the_clip_where_they_agree():
    torch.manual_seed(0)
    network = svd_tiny.unet().eval()
    x, ids = torch.randn(2, 4, 8, 8, 8), torch.tensor([[6.0, 127, 0.02], [6.0, 20, 0.02]])
    plain = call(network, x, added_time_ids=ids)
    same = ids[:, None].expand(-1, 4, -1)
    with steered(network, None, same):
        assert torch.allclose(call(network, x, added_time_ids=ids), plain, atol=1e-5)
    apart = same.clone()
    apart[:, 3, 1] = 255
    with steered(network, None, apart):
        assert not torch.allclose(call(network, x, added_time_ids=ids), plain, atol=1e-5)


def test_a_grown_network_says_what_it_said():
    torch.manual_seed(0)
    network = svd_tiny.unet().eval()
    wide = grown(network, in_channels=9, projection_class_embeddings_input_dim=40).eval()
    x = torch.randn(1, 4, 8, 8, 8)
    more = torch.cat([x, torch.randn(1, 4, 1, 8, 8)], 2)
    ids = torch.tensor([[6.0, 127, 0.02, 10, 90]])
    assert torch.allclose(call(wide, more, added_time_ids=ids), call(network, x, added_time_ids=ids[:, :3]), atol=1e-5)
    assert grown(network, in_channels=8) is network


def test_one_frame_is_a_clip(folder, image):
    assert made(folder, image, num_frames=1).shape == (1, 4, 1, 8, 8)


def test_conditions_change_the_clip(folder, image, tmp_path):
    plain = made(folder, image)
    other = svd_tiny.picture(tmp_path / "other.png", 4)
    for flags in ({"motion_bucket_id": 5}, {"fps": 20.0}, {"noise_aug_strength": 0.5}, {"temporal_image": other}):
        assert not torch.equal(made(folder, image, **flags), plain), flags
    assert torch.equal(made(folder, image), plain)


# --- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "overlap", "windows"), [(4, 1, 1), (5, 1, 2), (7, 1, 2), (8, 1, 3), (8, 2, 3)])
def test_long_clips_are_chained(folder, image, frames, overlap, windows):
    options = svd_tiny.asked(folder, **told(image, num_frames=frames, window_overlap=overlap, num_inference_steps=2))
    chain = svd_tiny.model(folder).chain(options)
    assert chain.count == windows
    long = generate(svd_tiny.model(folder), options, tiny.ignore)["latents"]
    assert long.shape[2] == frames
    first = made(folder, image, num_inference_steps=2)
    assert torch.equal(long[:, :, : 4 - overlap + 1], first[:, :, : 4 - overlap + 1])


def test_windows_fade_into_each_other():
    a, b = torch.zeros(1, 1, 4, 1, 1), torch.ones(1, 1, 4, 1, 1)
    assert joined(a, b, 2).flatten().tolist() == [0, 0, 0, 0.5, 1, 1]
    assert joined(a, b, 1).flatten().tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_the_drift_of_each_window_is_told(folder, image):
    options = svd_tiny.asked(folder, **told(image, num_frames=7))
    frames = torch.zeros(7, 8, 8, 3, dtype=torch.uint8)
    frames[4:] = 200
    told_of = svd_tiny.model(folder).measure(options, frames)["window"]
    assert told_of[0] == {"colour": [0.0, 0.0, 0.0], "sharpness": 0.0}
    assert told_of[1]["colour"] == [150.0, 150.0, 150.0]
    short = svd_tiny.asked(folder, **told(image))
    assert svd_tiny.model(folder).measure(short, frames[:4]) == {}


# --- orbits and text ------------------------------------------------------------------------------------------------


def test_an_orbit_turns_once_around(image, tmp_path):
    folder = svd_tiny.checkpoint(tmp_path / "mv", projection_class_embeddings_input_dim=40)
    options = svd_tiny.asked(folder, **told(image, orbit=True, elevation=10.0, views=6))
    asked = svd_tiny.model(folder).draw("unet", options, {})
    assert asked.cond["vector"][0, :, 3].tolist() == [10.0] * 6
    assert asked.cond["vector"][0, :, 4].tolist() == [0.0, 60.0, 120.0, 180.0, 240.0, 300.0]
    assert generate(svd_tiny.model(folder), options, tiny.ignore)["latents"].shape[2] == 6


def test_elevation_alone_is_the_case_of_four_vectors(image, tmp_path):
    folder = svd_tiny.checkpoint(tmp_path / "mv", projection_class_embeddings_input_dim=32)
    options = svd_tiny.asked(folder, **told(image, orbit=True, elevation=10.0))
    assert svd_tiny.model(folder).draw("unet", options, {}).cond["vector"].shape == (1, 4, 4)


def test_twenty_one_views_are_parts_of_a_turn():
    clip = vector(torch.tensor([7.0]), torch.tensor([127.0]), torch.tensor([0.02]))
    views = turning(clip, torch.tensor([5.0]), 21)
    assert views.shape == (1, 21, 5)
    assert views[0, :, 4].tolist() == pytest.approx([360 * k / 21 for k in range(21)])
    assert views[0, 0].tolist() == pytest.approx([6.0, 127.0, 0.02, 5.0, 0.0])


def test_text_checkpoints_take_text_for_space_and_for_time(texts):
    plain = made(texts, None, prompt="a red ball rising")
    assert plain.shape == (1, 4, 4, 8, 8)
    assert not torch.equal(made(texts, None, prompt="a blue box falling"), plain)
    steered_ = made(texts, None, prompt="a red ball rising", temporal_prompt="a blue box falling")
    same = made(texts, None, prompt="a red ball rising", temporal_prompt="a red ball rising")
    assert not torch.equal(steered_, plain)
    assert torch.allclose(same, plain, atol=1e-5)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "The picture is missing"),
        ({"image": "x.png", "prompt": "a ball"}, "exclude each other"),
        ({"image": "x.png", "orbit": True}, "multi-view"),
        ({"image": "x.png", "elevation": 10.0}, "belongs to --orbit"),
        ({"image": "x.png", "min_guidance_scale": 4.0}, "above"),
        ({"image": "x.png", "temporal_prompt": "left"}, "take text"),
        ({"image": "x.png", "num_frames": 9, "window_overlap": 4}, "leaves nothing new"),
        ({"image": "x.png", "height": 36}, "multiple of 8"),
        ({"prompt": "a ball", "image_checkpoint": "nobody"}, "no family 'nobody'"),
        ({"prompt": "a ball", "image_checkpoint": "svd"}, "makes no pictures"),
        ({"prompt": "a ball", "image_checkpoint": "sd.9"}, "no checkpoint"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_load(folder, flags, message):
    with pytest.raises(UsageError, match=message):
        svd_tiny.asked(folder, **flags)


def test_text_checkpoints_refuse_pictures(texts):
    with pytest.raises(UsageError, match="none was given"):
        svd_tiny.asked(texts)
    with pytest.raises(UsageError, match="takes text"):
        svd_tiny.asked(texts, prompt="a ball", image=Path("x.png"))


def test_the_released_checkpoints_interpolate_nothing(folder):
    with pytest.raises(UsageError, match="no network for frames between frames"):
        check(family.verbs["interpolate"](input="a.mp4"), CHECKPOINTS[0])

"""Layers in time on an image network: identity at insertion, causality, order, sizes, copies, what is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vgen.errors import VgenError
from vgen.temporal import Attention, Clip, FrameAdaptor, Inflated, Mask, Temporal, Told, sites

FRAMES = 5
CONVOLUTIONS = "*.resnets.*.conv[12]"
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def unet(**change: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**SMALL, **change})


def plan(network: nn.Module, mask: Mask = "pre", kind: str = "adaptor", frames: int = FRAMES) -> list[dict[str, Any]]:
    beside = {"frames": frames} if kind == "adaptor" else {}
    return [
        {"kind": kind, **beside, "sites": sites(network, CONVOLUTIONS)},
        {"kind": "attention", "mask": mask, "head_width": 8, "sites": sites(network, "*attentions.?")},
        {"kind": "told", "sites": sites(network, "time_embedding", channels=lambda m: m.linear_2.out_features)},
    ]


def inflated(mask: Mask = "pre", kind: str = "adaptor", *, awake: bool = True) -> Inflated:
    """A network with layers in time; those of one that is awake do something."""
    image = unet()
    made = Inflated(image, Temporal(plan(image, mask, kind))).eval()
    if awake:
        with torch.no_grad():
            for p in made.temporal.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return made


def given(batch: int = 2, frames: int = FRAMES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (batch, 4, frames, 8, 8), "context": (batch, 3, 16)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**made, "t": torch.tensor([900.0, 30.0])[:batch], "fps": torch.tensor([8.0, 2.0])[:batch]}


# --- at insertion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adaptor", "convolution"])
@pytest.mark.parametrize("mask", ["pre", "post", "none"])
@torch.no_grad()
def test_a_network_just_inflated_is_the_image_model_bit_for_bit(mask, kind):
    told, made = given(), inflated(mask, kind, awake=False)
    x, frames = told["x"], FRAMES
    pictures = x.transpose(1, 2).flatten(0, 1)
    each = told["t"].repeat_interleave(frames), told["context"].repeat_interleave(frames, 0)
    plain = unet().eval()(pictures, *each).sample
    assert torch.equal(made(**told).transpose(1, 2).flatten(0, 1), plain)
    assert made.ready
    assert not torch.equal(inflated(mask, kind)(**told).transpose(1, 2).flatten(0, 1), plain)


def test_the_weights_of_the_image_model_keep_their_names():
    made = inflated()
    with torch.no_grad():
        made(**given())
    assert list(made.image.state_dict()) == list(unet().state_dict())
    names = set(made.temporal.state_dict())
    assert {"adaptor.conv_in.scale"}.isdisjoint(names)
    assert {"adaptor.mid_block.resnets.1.conv2.shift", "told.time_embedding.linear_1.weight"} <= names
    assert "attention.down_blocks.0.attentions.0.to_out.0.weight" in names


@torch.no_grad()
def test_a_picture_is_a_clip_of_one_frame():
    told, made = given(frames=1), inflated()
    assert made(**told).shape == (2, 4, 1, 8, 8)


def test_longer_clips_than_there_are_frames_are_refused():
    with pytest.raises(VgenError, match="tell 5 frames apart; the clip has 6"):
        inflated()(**given(frames=6))


def test_layers_of_another_network_are_refused():
    layers = Temporal(plan(unet(layers_per_block=2)))
    with pytest.raises(VgenError, match="do not fit the image network, which has no 'down_blocks"):
        Inflated(unet(), layers)(**given())


# --- time has a direction -------------------------------------------------------------------------------------------


def changed(mask: Mask, frame: int) -> list[bool]:
    """Whether each frame of the whole network's output changes, to the bit, with one frame of its input."""
    told, made = given(batch=1), inflated(mask)
    other = {**told, "x": told["x"].clone()}
    other["x"][:, :, frame] += 1
    with torch.no_grad():
        one, two = made(**told), made(**other)
    return [not torch.equal(one[:, :, k], two[:, :, k]) for k in range(FRAMES)]


def test_with_the_mask_before_the_softmax_no_frame_knows_later_ones():
    assert changed("pre", 2) == [False, False, True, True, True]
    assert changed("pre", 4) == [False, False, False, False, True]


def test_with_the_mask_after_the_softmax_they_do():
    """Later frames are in the denominator: the rule as it is printed is not causal."""
    assert changed("post", 2) == [True] * 5
    assert changed("none", 2) == [True] * 5


def layer(mask: Mask) -> Attention:
    torch.manual_seed(3)
    made = Attention(16, 8, mask)
    nn.init.normal_(made.to_out[0].weight)
    return made


@torch.no_grad()
def test_masks_are_what_they_say():
    """Each written out: scores of later frames are left out before, or after, the softmax."""
    x = torch.randn(1 * FRAMES, 16, 1, 1, generator=torch.Generator().manual_seed(5))
    for mask in ("pre", "post", "none"):
        made = layer(mask)
        tokens = made.norm(x[:, :, 0, 0])
        rates = 10000 ** -(torch.arange(8) / 8)
        angles = torch.arange(FRAMES)[:, None] * rates
        tokens = tokens + torch.cat([angles.cos(), angles.sin()], -1)
        q, k, v = (one(tokens).view(FRAMES, 2, 8) for one in (made.to_q, made.to_k, made.to_v))
        out = torch.zeros(FRAMES, 2, 8)
        for i in range(FRAMES):
            for head in range(2):
                scores = [float(q[i, head] @ k[j, head]) / 8**0.5 for j in range(FRAMES)]
                exp = torch.tensor(scores).exp()
                whole = exp[: i + 1].sum() if mask == "pre" else exp.sum()
                last = FRAMES if mask == "none" else i + 1
                out[i, head] = sum(exp[j] / whole * v[j, head] for j in range(last))
        expected = x[:, :, 0, 0] + made.to_out[0](out.flatten(1))
        assert torch.allclose(made(x, x, Clip(FRAMES))[:, :, 0, 0], expected, atol=1e-5)


@torch.no_grad()
def test_the_order_of_frames_counts():
    """Reversed clips do not give the reversed output, even where each frame sees all."""
    x = torch.randn(FRAMES, 16, 2, 2, generator=torch.Generator().manual_seed(5))
    for mask in ("pre", "post", "none"):
        made = layer(mask)
        forth, back = made(x, x, Clip(FRAMES)), made(x.flip(0), x.flip(0), Clip(FRAMES)).flip(0)
        assert not torch.allclose(forth, back, atol=1e-2)
    kept = FrameAdaptor(16, FRAMES)
    kept.scale.normal_()
    assert not torch.allclose(kept(x, x, Clip(FRAMES)), kept(x, x.flip(0), Clip(FRAMES)).flip(0), atol=1e-2)


@torch.no_grad()
def test_places_are_looked_at_in_portions_without_a_difference(monkeypatch):
    x, made = torch.randn(2 * FRAMES, 16, 4, 4), layer("pre")
    whole = made(x, x, Clip(FRAMES))
    monkeypatch.setattr("vgen.temporal.AT_ONCE", 5)
    assert torch.allclose(made(x, x, Clip(FRAMES)), whole, atol=1e-6)


@torch.no_grad()
def test_clips_of_a_batch_do_not_know_each_other():
    told, made = given(), inflated()
    alone = {name: value[1:] for name, value in told.items()}
    torch.testing.assert_close(made(**told)[1:], made(**alone), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_number_that_is_told_changes_the_output_once_trained():
    told = given()
    for awake in (False, True):
        made = inflated(awake=awake)
        same = torch.equal(made(**told), made(**{**told, "fps": told["fps"] + 1}))
        assert same != awake
    other = Told(8, "speed")
    assert torch.equal(other(torch.zeros(0), torch.ones(2, 8), Clip(2, {"speed": torch.ones(1)})), torch.ones(2, 8))


# --- training -------------------------------------------------------------------------------------------------------


def gradients(made: Inflated) -> dict[str, Tensor]:
    made.zero_grad(set_to_none=True)
    made(**given()).square().mean().backward()
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def test_gradients_are_only_where_they_are_asked_for():
    made = inflated()
    made.image.requires_grad_(False)
    assert set(gradients(made)) == {f"temporal.{name}" for name, _ in made.temporal.named_parameters()}
    made.image.requires_grad_(True)
    made.temporal.requires_grad_(False)
    assert {name.partition(".")[0] for name in gradients(made)} == {"image"}


def test_activations_computed_again_leave_the_numbers_as_they_are():
    made = inflated().train()
    plain = gradients(made)
    made.image.enable_gradient_checkpointing()
    made.temporal.enable_gradient_checkpointing()
    assert made.temporal.get_submodule("attention.mid_block.attentions.0").gradient_checkpointing
    again = gradients(made)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_copy_has_layers_of_its_own():
    """Layers hung as functions would stay the original's: changing the original would change the copy."""
    told, made = given(), inflated()
    with torch.no_grad():
        before = made(**told)
        twin = copy.deepcopy(made)
        picture = copy.deepcopy(made.image)
        for p in made.temporal.parameters():
            p.zero_()
        after = made(**told)
        assert not torch.equal(before, after)
        assert torch.equal(twin(**told), before)
        for p in twin.temporal.parameters():
            p.zero_()
        assert torch.equal(twin(**told), after)
    assert list(picture.state_dict()) == list(made.image.state_dict())
    assert twin.clip is not made.clip


def test_copies_of_other_lengths_do_not_disturb_each_other():
    made = inflated()
    with torch.no_grad():
        made(**given())
        twin = copy.deepcopy(made)
        one = made(**given(frames=3))
        twin(**given())
        assert torch.equal(one, made(**given(frames=3)))


# --- on the disk ----------------------------------------------------------------------------------------------------


def test_layers_are_saved_alone_and_load_in_the_layout_of_diffusers(tmp_path: Path):
    made = inflated("post")
    made.image.save_pretrained(tmp_path / "unet")
    made.temporal.save_pretrained(tmp_path / "temporal")
    assert {path.name for path in (tmp_path / "temporal").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    image = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    layers = Temporal.from_pretrained(tmp_path / "temporal")
    with torch.no_grad():
        assert torch.equal(Inflated(image, layers).eval()(**given()), made(**given()))
    assert sorted(layers.hung) == sorted(made.temporal.hung)


def test_layers_hang_on_a_decoder_too():
    vae = AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=8).eval()  # fmt: skip
    places = {
        **sites(vae.decoder, "up_blocks.*.resnets.1"),
        **sites(vae.decoder, "mid_block.attentions.?", channels=lambda m: m.query_dim),
    }
    layers = Temporal([{"kind": "attention", "head_width": 8, "sites": places}])
    made, z = Inflated(vae.decoder, layers), torch.randn(2 * FRAMES, 4, 4, 4)
    with torch.no_grad():
        plain = vae.decode(z).sample
        made.begin(FRAMES)
        assert torch.equal(vae.decode(z).sample, plain)
        nn.init.normal_(layers.get_submodule("attention.mid_block.attentions.0.to_out.0").weight)
        assert not torch.equal(vae.decode(z).sample, plain)


# --- sizes ----------------------------------------------------------------------------------------------------------


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_sizes_at_the_size_of_stable_diffusion():
    """A scale and a shift for 16 frames are a hundredth of convolutions over three frames in the same places."""
    with torch.device("meta"):
        network = UNet2DConditionModel(cross_attention_dim=768)
        assert size(network) == 859_520_964
        places = sites(network, CONVOLUTIONS)
        assert (len(places), sum(places.values())) == (44, 40_320)
        adaptor = Temporal([{"kind": "adaptor", "frames": 16, "sites": places}])
        convolution = Temporal([{"kind": "convolution", "sites": places}])
        attention = Temporal([{"kind": "attention", "sites": sites(network, "*attentions.?")}])
    assert (size(adaptor), size(convolution)) == (1_290_240, 133_365_120)
    assert size(convolution) // size(adaptor) == 103
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    assert size(attention) == sum(4 * c * c + 3 * c for c in widths)


def macs(side: int) -> int:
    """Multiplications of the convolutions of an inflated network over two frames of side x side."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    with torch.device("meta"):
        image = unet(**blocks)
        layers = Temporal([{"kind": "convolution", "sites": sites(image, CONVOLUTIONS)}])
        x = torch.empty(1, 4, 2, side, side), torch.empty(1), torch.empty(1, 1, 16)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            Inflated(image, layers)(*x)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for name, count in counts.items() if "convolution" in str(name)) // 2


def test_a_network_on_latents_multiplies_64_times_less_than_on_pixels():
    assert macs(256) == 64 * macs(32) > 0

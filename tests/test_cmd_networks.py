"""CMD's own networks: published sizes and costs, the content frame, what motion reaches, what is zero at first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cmd_tiny
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from vgen import diffusion
from vgen.cost import counted
from vgen.plugins.cmd.factored import FactoredAutoencoder
from vgen.plugins.cmd.maps import joined, parted
from vgen.plugins.cmd.transformer import MotionTransformer
from vgen.plugins.cmd.variance import bound


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_meta(kind: Callable[..., Any], **config: Any) -> Any:
    with torch.device("meta"):
        return kind(**config).to("meta")


def count(network: Any) -> int:
    return sum(p.numel() for p in network.parameters())


def cost(network: Any, *inputs: Any) -> tuple[float, float]:
    """Tera multiplications of a call: without the products of attention, and with them."""
    count = counted(lambda: network(*inputs), network)
    return count.plain / 1e12, count.flops / 2e12


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


SD21 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
L2 = {"width": 1024, "depth": 24, "content_patch_size": 4}


@pytest.fixture(scope="module")
def autoencoder() -> FactoredAutoencoder:
    torch.manual_seed(0)
    return cmd_tiny.awake(FactoredAutoencoder(**cmd_tiny.AUTOENCODER)).eval()


# --- sizes and costs ------------------------------------------------------------------------------------------------


def test_parameters_at_the_papers_sizes():
    parts = [on_meta(FactoredAutoencoder), on_meta(MotionTransformer), on_meta(UNet2DConditionModel, **SD21)]
    assert [count(one) for one in parts] == [47_365_656, 675_213_760, 865_910_724]
    assert sum(map(count, parts)) == pytest.approx(1.6e9, rel=0.01)
    assert count(on_meta(MotionTransformer, **L2)) == 457_980_992
    assert count(on_meta(UNet2DConditionModel, **SD15)) == 859_520_964


def test_the_papers_costs_of_its_own_networks():
    """Table 0.6: multiplications as the paper counts them, without the products of attention; and with."""
    auto, motion = on_meta(FactoredAutoencoder), on_meta(MotionTransformer)
    rows = [
        (cost(auto, meta(1, 4, 16, 64, 64)), (0.77341, 0.9828)),
        (cost(auto, meta(1, 4, 16, 64, 128)), (1.54681, 2.3779)),
        (cost(motion, meta(1, 8, 16, 64), meta(1), meta(1, 4, 64, 64), meta(1, 1024)), (0.1430, 0.1496)),
        (cost(motion, meta(1, 8, 16, 96), meta(1), meta(1, 4, 64, 128), meta(1, 1024)), (0.2286, 0.2455)),
        (
            cost(on_meta(MotionTransformer, **L2), meta(1, 8, 16, 64), meta(1), meta(1, 4, 64, 64), meta(1, 1024)),
            (0.1548, 0.1677),
        ),
    ]
    for found, told in rows:
        assert found == pytest.approx(told, rel=5e-4)


@pytest.mark.parametrize(
    ("config", "wide", "rows"),
    [(SD15, 768, {64: (0.33861, 0.40164), 128: (0.67572, 0.9243)}), (SD21, 1024, {64: (0.33910, 0.40213)})],
)
def test_the_papers_costs_of_the_content_model(config, wide, rows):
    network = on_meta(UNet2DConditionModel, **config)
    for side, told in rows.items():
        assert cost(network, meta(1, 4, 64, side), meta(1), meta(1, 77, wide)) == pytest.approx(told, rel=5e-4)


def test_sizes_of_what_is_stored():
    """A clip of 16 frames of 512x1024: 11.6 times smaller than its latents, 558.6 times smaller than its pixels."""
    content, motion_x, motion_y = on_meta(FactoredAutoencoder).encoder(meta(1, 4, 16, 64, 128))
    sizes = content.numel(), motion_x.numel() + motion_y.numel()
    assert sizes == (32_768, 12_288)
    assert 16 * 4 * 64 * 128 / sum(sizes) == pytest.approx(11.6, abs=0.05)
    assert 16 * 3 * 512 * 1024 / sum(sizes) == pytest.approx(558.6, abs=0.1)


# --- the autoencoder ------------------------------------------------------------------------------------------------


def test_the_content_frame_is_a_weighted_mean(autoencoder):
    clip = noise(2, 4, 5, 8, 12)
    weights = autoencoder.encoder.weights(autoencoder.encoder.run(autoencoder.encoder.patches(clip)))
    assert weights.shape == clip.shape
    assert weights.std(2).mean() > 1e-3
    assert torch.allclose(weights.sum(2), torch.ones(2, 4, 8, 12), atol=1e-5)
    content = autoencoder.encoder(clip)[0][:, :, 0]
    low, high = clip.amin(2), clip.amax(2)
    assert bool(((content >= low - 1e-5) & (content <= high + 1e-5)).all())
    assert not torch.allclose(content, clip.mean(2), atol=1e-3)


def test_the_content_frame_of_a_still_clip_is_its_frame(autoencoder):
    frame = noise(1, 4, 1, 8, 8)
    assert torch.allclose(autoencoder.encoder(frame.expand(-1, -1, 6, -1, -1))[0], frame, atol=1e-5)


def test_frames_that_count_alike_make_the_mean():
    clip = noise(1, 4, 6, 8, 8)
    fresh = FactoredAutoencoder(**cmd_tiny.AUTOENCODER)
    assert torch.allclose(fresh.encoder(clip)[0], clip.mean(2, keepdim=True), atol=1e-5)
    plain = cmd_tiny.awake(FactoredAutoencoder(**cmd_tiny.AUTOENCODER, mean_content=True))
    assert torch.allclose(plain.encoder(clip)[0], clip.mean(2, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 8, 8), (4, 6, 14), (5, 10, 2), (16, 4, 6)])
def test_shapes_of_odd_sizes(autoencoder, size):
    frames, height, width = size
    streams = autoencoder.encoder(noise(2, 4, frames, height, width))
    shapes = [tuple(one.shape) for one in streams]
    assert shapes == [(2, 4, 1, height, width), (2, 4, frames, height // 2, 1), (2, 4, frames, 1, width // 2)]
    assert all(bool((one.abs() <= 1).all()) for one in streams[1:])
    assert autoencoder.decoder(*streams).shape == (2, 4, frames, height, width)
    made = joined(*streams[1:])
    assert made.shape == (2, 4, frames, (height + width) // 2, 1)
    back = parted(made, height // 2)
    assert torch.equal(back[0], streams[1])
    assert torch.equal(back[1], streams[2])


def test_before_the_blocks_a_patch_is_a_sum_of_three(autoencoder):
    """Mixed differences over (t, h, w) vanish; over (t, h) they are the rows', over (t, w) the columns' alone."""
    content, rows, columns = noise(1, 4, 1, 8, 8), noise(1, 4, 5, 4, 1, seed=1), noise(1, 4, 5, 1, 4, seed=2)
    told = autoencoder.decoder.told(content, rows, columns)
    assert told.std() > 0.01
    assert told.diff(dim=1).diff(dim=2).diff(dim=3).abs().max() < 1e-5
    other = autoencoder.decoder.told(noise(1, 4, 1, 8, 8, seed=3), rows, noise(1, 4, 5, 1, 4, seed=4))
    assert torch.allclose(told.diff(dim=1).diff(dim=2), other.diff(dim=1).diff(dim=2), atol=1e-5)
    assert not torch.allclose(told.diff(dim=1).diff(dim=3), other.diff(dim=1).diff(dim=3), atol=1e-2)
    third = autoencoder.decoder.told(noise(1, 4, 1, 8, 8, seed=5), noise(1, 4, 5, 4, 1, seed=6), columns)
    assert torch.allclose(told.diff(dim=1).diff(dim=3), third.diff(dim=1).diff(dim=3), atol=1e-5)


def test_pixels_stay_in_range():
    network = cmd_tiny.awake(FactoredAutoencoder(**cmd_tiny.AUTOENCODER, in_channels=3, pixels=True))
    made = network(10 * noise(1, 3, 4, 8, 8))
    assert bool((made.abs() <= 1).all())


# --- the motion model -----------------------------------------------------------------------------------------------


def motion(awake: bool = True, **change: Any) -> Any:
    torch.manual_seed(0)
    made = MotionTransformer(**{**cmd_tiny.MOTION, "learned_variance": False, **change})
    return cmd_tiny.awake(made) if awake else made


def told(seed: int = 0) -> dict[str, Tensor]:
    return {"content": noise(2, 4, 8, 8, seed=seed), "text": noise(2, 16, seed=1)}


def test_a_new_motion_model_says_exactly_zero():
    x, t = noise(2, 4, 4, 8), torch.tensor([3.0, 700.0])
    assert bool((motion(awake=False)(x, t, **told()) == 0).all())
    assert bool((motion(awake=False, learned_variance=True)(x, t, **told()) == 0).all())
    for block in motion(awake=False).blocks:
        tokens = noise(2, 5, 32)
        assert torch.equal(block(tokens, noise(2, 32, seed=1)), tokens)


def test_what_the_motion_model_depends_on():
    network, x, t = motion(), noise(2, 4, 4, 8), torch.tensor([3.0, 700.0])
    first = network(x, t, **told())
    assert first.shape == x.shape
    content, text = told()["content"], told()["text"]
    turned = content.unflatten(2, (2, 4)).flip(2).flatten(2, 3)  # the same tokens in other places
    assert sorted(turned.flatten().tolist()) == sorted(content.flatten().tolist())
    for change in ({"content": turned}, {"content": noise(2, 4, 8, 8, seed=9)}, {"text": noise(2, 16, seed=9)}):
        assert not torch.allclose(network(x, t, **{"content": content, "text": text, **change}), first, atol=1e-4)
    assert not torch.allclose(network(x, t + 90, **told()), first, atol=1e-4)
    blind = motion(content_patch_size=0)
    assert blind(x, t, text=text).shape == x.shape


def test_each_clip_of_a_batch_is_by_itself():
    network, x, t = motion(), noise(2, 4, 4, 8), torch.tensor([3.0, 700.0])
    both = network(x, t, **told())
    alone = network(x[1:], t[1:], **{name: value[1:] for name, value in told().items()})
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_classes_in_place_of_text():
    network = motion(text_width=0, classes=3)
    x, t, content = noise(2, 4, 4, 8), torch.tensor([3.0, 700.0]), told()["content"]
    made = [network(x, t, content, label=torch.tensor([k, 3])) for k in (0, 1)]
    assert not torch.allclose(made[0][0], made[1][0], atol=1e-5)
    assert torch.allclose(made[0][1], made[1][1], atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for again in (False, True):
        network = motion().train()
        if again:
            network.enable_gradient_checkpointing()
        network(noise(2, 4, 4, 8), torch.tensor([3.0, 7.0]), **told()).square().mean().backward()
        grads.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


# --- the learned variance -------------------------------------------------------------------------------------------


def test_the_bound_of_the_true_step_is_nothing():
    """Where the noise is known and the variance is the true step's, the step is the true one: no bits."""
    process = diffusion.Discrete(diffusion.linear())
    x0, e, t = noise(3, 4, 4, 8, 1), noise(3, 4, 4, 8, 1, seed=1), torch.tensor([5.0, 400.0, 999.0])
    x = diffusion.add_noise(process, x0, e, t)
    low, high = -torch.ones_like(x), torch.ones_like(x)
    assert bound(process, x0, x, t, e, low).abs() < 1e-4
    assert bound(process, x0, x, t, e, high) > 1e-4
    assert bound(process, x0, x, t, e + 0.3, low) > bound(process, x0, x, t, e + 0.1, low) > 1e-5


def test_the_bound_is_that_of_two_normal_distributions():
    process = diffusion.Discrete(diffusion.linear())
    x0, e, k = noise(1, 2, 2, 2, 1), noise(1, 2, 2, 2, 1, seed=1), 400
    t, guess, share = torch.tensor([float(k)]), noise(1, 2, 2, 2, 1, seed=2), 0.3 * torch.ones(1, 2, 2, 2, 1)
    x = diffusion.add_noise(process, x0, e, t)
    abar, before = process.abar[k].item(), process.abar[k - 1].item()
    alpha = abar / before
    variance = (1 - before) / (1 - abar) * (1 - alpha)

    def mean(clean: Tensor) -> Tensor:
        return (before**0.5 * (1 - alpha) * clean + alpha**0.5 * (1 - before) * x) / (1 - abar)

    own = (x - (1 - abar) ** 0.5 * guess) / abar**0.5
    logs = 0.65 * torch.tensor(1 - alpha).log() + 0.35 * torch.tensor(variance).log()
    p = torch.distributions.Normal(mean(x0), torch.tensor(variance).sqrt())
    q = torch.distributions.Normal(mean(own), (0.5 * logs).exp())
    told = torch.distributions.kl_divergence(p, q).mean() / torch.tensor(2.0).log()
    assert bound(process, x0, x, t, guess, share).item() == pytest.approx(told.item(), rel=1e-3)

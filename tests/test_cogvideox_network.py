"""CogVideoX's networks: their sizes and costs at full scale, and what positions, norms and convolutions must obey."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tiny
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from diffusers.models.embeddings import apply_rotary_emb
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from vgen import diffusion
from vgen.generate import generate
from vgen.plugins.cogvideox import CHECKPOINTS, family
from vgen.plugins.cogvideox.model import CogVideoX
from vgen.plugins.cogvideox.transformer import Transformer

BIG = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
NEWER = {**BIG, "patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300, "sample_frames": 81}
RELEASED: dict[str, dict[str, Any]] = {  # as in each checkpoint's transformer/config.json, where it is not the default
    "2b": {},
    "5b": BIG,
    "5b-i2v": {**BIG, "in_channels": 32, "use_learned_positional_embeddings": True},
    "1.5-5b": {**NEWER, "max_text_seq_length": 224},
    "1.5-5b-i2v": {**NEWER, "in_channels": 32, "ofs_embed_dim": 512},
}


@cache
def transformer(tag: str) -> CogVideoXTransformer3DModel:
    with torch.device("meta"):
        return CogVideoXTransformer3DModel(**RELEASED[tag])


def vae() -> AutoencoderKLCogVideoX:
    with torch.device("meta"):
        return AutoencoderKLCogVideoX(
            block_out_channels=(128, 256, 256, 512),
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            latent_channels=16,
        )


def size(network: Any) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("tag", "count"),
    [
        ("2b", 1_693_783_872),
        ("5b", 5_570_283_072),
        ("5b-i2v", 5_570_479_680),
        ("1.5-5b", 5_570_676_352),
        ("1.5-5b-i2v", 5_571_594_880),
    ],
)
def test_sizes_of_the_transformers(tag: str, count: int) -> None:
    assert family.checkpoint(tag) in CHECKPOINTS
    assert size(transformer(tag)) == count


@pytest.mark.parametrize(("tag", "block", "lora"), [("2b", 56_081_536, 58_982_400), ("5b", 132_197_632, 132_120_576)])
def test_sizes_of_a_block_and_of_an_adapter(tag: str, block: int, lora: int) -> None:
    whole = transformer(tag)
    assert {size(one) for one in whole.transformer_blocks} == {block}
    with torch.device("meta"):
        one = CogVideoXTransformer3DModel(**{**RELEASED[tag], "num_layers": 1})
    inject_adapter_in_model(LoraConfig(r=128, target_modules=list(family.lora_targets)), one)
    adapter = sum(p.numel() for name, p in one.named_parameters() if "lora_" in name)
    assert adapter * len(whole.transformer_blocks) == lora


def test_sizes_of_autoencoder_and_text_encoder() -> None:
    assert [size(net) for net in (vae(), vae().encoder, vae().decoder)] == [215_583_907, 92_215_456, 123_368_451]
    told = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        assert size(T5EncoderModel(told)) == 4_762_310_656


@pytest.mark.parametrize(("tag", "total", "plain"), [("2b", 59.999, 23.597), ("5b", 166.099, 84.559)])
def test_costs_of_one_call(tag: str, total: float, plain: float) -> None:
    """In tera multiply-accumulates, with and without the products of attention; more than half of 2B's is attention."""
    network = transformer(tag).to("meta")  # buffers too
    tokens: set[int] = set()
    network.transformer_blocks[0].attn1.register_forward_hook(
        lambda _, args, out: tokens.add(sum(o.shape[1] for o in out))
    )
    rotary = torch.empty(13 * 30 * 45, 64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(
            hidden_states=torch.empty(1, 13, 16, 60, 90, device="meta"),
            encoder_hidden_states=torch.empty(1, 226, 4096, device="meta"),
            timestep=torch.zeros(1, device="meta"),
            image_rotary_emb=None if tag == "2b" else (rotary, rotary),
        )
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counts.items() if "attention" in op or "bmm" in op)
    macs = sum(counts.values()) / 2e12, (sum(counts.values()) - products) / 2e12
    assert tokens == {17_776}
    assert macs == (pytest.approx(total, abs=5e-4), pytest.approx(plain, abs=5e-4))


# Positions, norms and convolutions, at tiny size


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> CogVideoX:
    return tiny.model(tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "c", "5b"))


def test_attention_sees_relative_positions_only(tiny_model: CogVideoX) -> None:
    """Shifting a grid along time, rows and columns leaves the products of queries and keys as they were."""
    part = tiny_model.denoiser("transformer", tiny.asked(tiny_model.folder))
    wide = tiny.CogVideoXTransformer3DModel.from_config(
        {**part.network.config, "sample_height": 24, "sample_width": 24}
    )
    cos, sin = Transformer(wide, part.process)._rotary((6, 24, 24), torch.device("cpu"))
    grid = [table.view(6, 12, 12, -1) for table in (cos, sin)]
    q, k = torch.randn(2, 1, 1, 2 * 4 * 4, 16)

    def scores(t: int, row: int, column: int) -> Tensor:
        here = [table[t : t + 2, row : row + 4, column : column + 4].reshape(32, -1) for table in grid]
        return apply_rotary_emb(q, (here[0], here[1])) @ apply_rotary_emb(k, (here[0], here[1])).mT

    for shift in ((1, 0, 0), (0, 3, 0), (0, 0, 5), (4, 8, 7)):
        torch.testing.assert_close(scores(*shift), scores(0, 0, 0), atol=1e-5, rtol=0)
    assert not torch.allclose(scores(0, 0, 0), q @ k.mT, atol=1e-2)


def test_text_tokens_have_no_positions(tiny_model: CogVideoX, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary table turns the queries and keys of pictures, and leaves those of text."""
    attention = tiny_model.networks.get("transformer").transformer_blocks[0].attn1
    text, pictures, rotary = torch.randn(1, 8, 32), torch.randn(1, 16, 32), torch.randn(2, 16, 16)
    seen: list[Tensor] = []
    product = functional.scaled_dot_product_attention

    def look(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        seen.extend([query, key])
        return product(query, key, value, **rest)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", look)
    for table in (None, (rotary[0], rotary[1])):
        attention(hidden_states=pictures, encoder_hidden_states=text, image_rotary_emb=table)
    for before, after in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(before[:, :, :8], after[:, :, :8])
        assert not torch.allclose(before[:, :, 8:], after[:, :, 8:], atol=1e-2)


def test_the_expert_norm_of_text_touches_text_only(tiny_model: CogVideoX) -> None:
    norm = tiny_model.networks.get("transformer").transformer_blocks[0].norm1
    pictures, text, time = torch.randn(1, 16, 32), torch.randn(1, 8, 32), torch.randn(1, 16)
    before = norm(pictures, text, time)
    kept = {name: p.clone() for name, p in norm.linear.named_parameters()}
    with torch.no_grad():
        for p in norm.linear.parameters():
            p[3 * 32 :] = 0  # shift, scale and gate of text come after those of the pictures
    after = norm(pictures, text, time)
    norm.linear.load_state_dict(kept)
    for i, name in enumerate(("pictures", "text", "gate of pictures", "gate of text")):
        assert torch.equal(before[i], after[i]) == (name.endswith("pictures")), name
    torch.testing.assert_close(after[1], norm.norm(text))


def test_convolutions_are_causal_and_work_in_chunks() -> None:
    conv = CogVideoXCausalConv3d(3, 4, kernel_size=3, pad_mode="first")
    x = torch.randn(1, 3, 9, 6, 6)
    later = x.clone()
    later[:, :, 5:] = torch.randn(1, 3, 4, 6, 6)
    whole, _ = conv(x)
    torch.testing.assert_close(conv(later)[0][:, :, :5], whole[:, :, :5], atol=0, rtol=0)
    assert not torch.allclose(conv(later)[0][:, :, 5:], whole[:, :, 5:])
    cache, parts = None, []
    for chunk in x.split([4, 2, 3], 2):
        part, cache = conv(chunk, cache)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17])
def test_frames_of_the_autoencoder(tiny_model: CogVideoX, frames: int) -> None:
    streams = tiny_model.encode(torch.rand(1, 3, frames, 16, 24) * 2 - 1)
    assert {s.shape for s in streams.values()} == {(1, 4, (frames - 1) // 4 + 1, 4, 6)}
    decoded = tiny_model.decode({"latents": streams["mean"]}).shape[2]
    # diffusers' decoder gives four frames for each of an even number of latents: so the card asks for 8k+1 frames
    assert decoded == (frames if frames % 8 == 1 else frames + 3)


def test_compression_at_full_size() -> None:
    config = vae().config
    stride = 2 ** (len(config.block_out_channels) - 1)
    assert (stride, config.temporal_compression_ratio) == (8, 4)
    assert 3 * 4 * stride**2 / config.latent_channels == 48
    assert pytest.approx(45.2, abs=0.05) == 49 * 480 * 720 * 3 / (13 * 60 * 90 * 16)


def test_the_released_autoencoder_is_not_causal_from_end_to_end(tiny_model: CogVideoX) -> None:
    """Its norms average over time too: the latent of the first frame knows the frames that follow."""
    x = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    later = x.clone()
    later[:, :, 5:] *= -1
    first = tiny_model.encode(x)["mean"][:, :, 0]
    assert not torch.allclose(tiny_model.encode(later)["mean"][:, :, 0], first, atol=1e-4)
    assert not torch.allclose(tiny_model.encode(x[:, :, :1])["mean"][:, :, 0], first, atol=1e-4)


# Loss and first step


def test_the_loss_of_the_part_is_the_weighted_loss_on_clean_data(tiny_model: CogVideoX) -> None:
    part = tiny_model.part("transformer", tiny.asked(tiny_model.folder, "finetune", data=["x"]))
    batch = {"latents": torch.randn(3, 4, 3, 8, 8), "text": torch.randn(3, 8, 16), "progress": 0}
    loss = part.loss(batch, torch.Generator().manual_seed(1))
    again, x0 = torch.Generator().manual_seed(1), batch["latents"]
    t = diffusion.sample_times(part.process, 3, again)
    e = torch.randn(x0.shape, generator=again)
    z = diffusion.add_noise(part.process, x0, e, t)
    denoise = diffusion.denoiser(part.predict, part.process, "v", {"text": batch["text"]})
    weight = 1 / (1 - part.process.abar[t.long()])
    expected = (weight.view(-1, 1, 1, 1, 1) * (denoise(z, t) - x0) ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_mask_weighs_the_loss_and_fades(tiny_model: CogVideoX) -> None:
    told = tiny.asked(tiny_model.folder, "finetune", data=["x"], mask_weight=3.0, mask_steps=10)
    part = tiny_model.part("transformer", told)
    batch = {"latents": torch.randn(2, 4, 3, 8, 8), "text": torch.randn(2, 8, 16)}

    def loss(**more: Any) -> float:
        return part.loss({**batch, **more}, torch.Generator().manual_seed(1)).item()

    plain = loss(progress=0)
    half = torch.zeros(2, 1, 3, 8, 8)
    half[..., :4] = 1
    assert loss(progress=0, mask=torch.ones_like(half)) == pytest.approx(plain)  # weights have mean 1
    parts = [loss(progress=0, mask=m) for m in (half, 1 - half)]
    assert parts[0] != pytest.approx(plain, rel=1e-4)
    assert sum(parts) / 2 == pytest.approx(plain)  # (1 + 3) + 1 of 2.5 each
    assert loss(progress=10, mask=half) == loss(progress=11, mask=half) == plain


def test_the_first_step_starts_from_no_signal_without_nan(tiny_model: CogVideoX) -> None:
    assert tiny_model.process.level(torch.tensor(999.0))[0] == 0
    for sampler in ("ddim", "dpm"):
        for steps in (1, 2):
            asked = tiny.asked(tiny_model.folder, sampler=sampler, num_inference_steps=steps)
            told = generate(tiny_model, asked, lambda *_: None)["latents"]
            assert told.isfinite().all()
            assert told.std() > 0.1

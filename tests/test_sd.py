"""Stable Diffusion: the same images as diffusers' pipeline, published sizes, what is refused, training, pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from shell import vgen
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from vgen import clips, latents, world
from vgen.errors import UsageError, VgenError
from vgen.finetune import finetune
from vgen.generate import generate
from vgen.plugins.sd import describe, family
from vgen.plugins.sd.model import StableDiffusion, load
from vgen.video_write import read_metadata

DEMO = family.demo
assert DEMO is not None
SCHEDULERS: dict[str, dict[str, Any]] = {  # as released, but for the end of the schedule: see docs/sd.md
    "1.5": {"prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1},
    "2.1": {"prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1},
    "demo": json.loads((DEMO / "scheduler" / "scheduler_config.json").read_text()),
}
PLAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
KINDS: dict[str, dict[str, Any]] = {
    "1.5": {},
    "2.1": {"attention_head_dim": (1, 2), "use_linear_projection": True},
    "demo": {
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "resnet_time_scale_shift": "scale_shift",
    },
}


def unet(**more: Any) -> UNet2DConditionModel:
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **more})


def checkpoint(folder: Path, kind: str = "1.5", **change: Any) -> Path:
    """Write a checkpoint for 32x32 images with random weights to `folder`; `change` goes to the U-Net."""
    torch.manual_seed(0)
    shutil.copytree(DEMO / "tokenizer", folder / "tokenizer")
    told = json.loads((DEMO / "text_encoder" / "config.json").read_text())
    text = {**told, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(**text)).save_pretrained(folder / "text_encoder")
    unet(**{**KINDS[kind], **change}).save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
    )
    vae.save_pretrained(folder / "vae")
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, **PLAIN, **SCHEDULERS[kind]}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    shutil.copy(DEMO / "model_index.json", folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("sd") / "small")


def model(folder: Path) -> StableDiffusion:
    return load(folder, describe(folder), tiny.CPU)


def asked(folder: Path, verb: str = "sample", **flags: Any) -> Any:
    """As `tiny.asked`."""
    told = {"prompt": "a red ball"} if verb == "sample" else {}
    return tiny.asked(folder, verb, card=family, **{**told, **flags})


def ours(folder: Path, **flags: Any) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as vgen makes them, before they are rounded to 8 bits."""
    made = model(folder)
    pixels = made.decode(generate(made, asked(folder, **flags), tiny.ignore))
    assert pixels.shape[2] == 1
    return pixels[:, :, 0].add(1).div(2).clamp(0, 1)


def released(folder: Path, scheduler: Any = None, **call: Any) -> Tensor:
    """The same as diffusers' pipeline gives them."""
    pipe = StableDiffusionPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=scheduler or diffusers.DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    told = {"prompt": "a red ball", "num_inference_steps": 4, "guidance_scale": 7.5, "height": 32, "width": 32}
    generator = [torch.Generator().manual_seed(3 + i) for i in range(call.get("num_images_per_prompt", 1))]
    return pipe(**{**told, "generator": generator, "output_type": "pt", **call}).images


def same(mine: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.02
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_images_equal_diffusers(tmp_path: Path, kind: str) -> None:
    folder = checkpoint(tmp_path / "c", kind)
    same(ours(folder), released(folder))
    shape = {"height": 24, "width": 40, "guidance_scale": 3.0}
    mine = ours(folder, num_videos_per_prompt=2, negative_prompt="blue", eta=0.5, **shape)
    same(mine, released(folder, num_images_per_prompt=2, negative_prompt="blue", eta=0.5, **shape))


def test_the_other_sampler_equals_diffusers(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(small, folder)
    told = {"num_train_timesteps": 1000, **PLAIN, "prediction_type": "epsilon", "timestep_spacing": "trailing"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
    solver = diffusers.DPMSolverMultistepScheduler.from_config(told)
    same(ours(folder, sampler="dpmpp-2m", num_inference_steps=8), released(folder, solver, num_inference_steps=8))


def test_an_image_is_the_same_in_any_batch(small: Path) -> None:
    two = ours(small, num_videos_per_prompt=2)
    torch.testing.assert_close(ours(small, seed=4), two[1:], atol=1e-5, rtol=0)
    assert not torch.allclose(two[0], two[1], atol=1e-2)


def size(network: Any) -> int:
    return sum(p.numel() for p in network.parameters())


def test_sizes_as_published() -> None:
    text = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    larger = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
    with torch.device("meta"):
        assert size(UNet2DConditionModel(cross_attention_dim=768)) == 859_520_964
        second = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
        assert size(UNet2DConditionModel(**second)) == 865_910_724
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        encoder = size(vae.encoder) + size(vae.quant_conv)
        decoder = size(vae.decoder) + size(vae.post_quant_conv)
        assert (size(vae), size(vae.encoder), size(vae.decoder)) == (83_653_863, 34_163_592, 49_490_179)
        assert encoder + decoder == size(vae)
        assert size(CLIPTextModel(CLIPTextConfig(**text))) == 123_060_480
        assert size(CLIPTextModel(CLIPTextConfig(**{**text, **larger}))) == 340_387_840


def test_frames_of_a_clip_are_images_of_their_own(small: Path) -> None:
    made = model(small)
    pixels = torch.rand(2, 3, 3, 24, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    streams = made.encode(pixels)
    assert {name: s.shape for name, s in streams.items()} == dict.fromkeys(("mean", "logvar"), (2, 4, 3, 6, 8))
    alone = made.encode(pixels[1:, :, 2:])
    torch.testing.assert_close(streams["mean"][1:, :, 2:], alone["mean"], atol=1e-5, rtol=0)
    decoded = made.decode({"latents": streams["mean"]})
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(decoded[1:, :, 2:], made.decode({"latents": alone["mean"]}), atol=1e-5, rtol=0)
    part = made.denoiser("unet", asked(small))
    x, t = torch.randn(2, 4, 3, 8, 8), torch.tensor([900.0, 100.0])
    cond = {"text": torch.randn(2, 16, 16)}
    one = part.predict(x[1:, :, 2:], t[1:], {"text": cond["text"][1:]})
    torch.testing.assert_close(part.predict(x, t, cond)[1:, :, 2:], one, atol=1e-5, rtol=0)


def test_less_memory_gives_nearly_the_same(small: Path) -> None:
    big = {"height": 64, "width": 64}
    plain, sliced, tiled = (ours(small, **big, **more) for more in ({}, {"vae_slicing": True}, {"vae_tiling": True}))
    assert torch.equal(plain, sliced)
    assert not torch.equal(plain, tiled)
    assert torch.corrcoef(torch.stack([plain.flatten(), tiled.flatten()]))[0, 1] > 0.7


def test_weights_under_their_first_names_load(small: Path, tmp_path: Path) -> None:
    """The released autoencoder names its attention otherwise, and the text encoder brings a table of positions."""
    shutil.copytree(small, folder := tmp_path / "old")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, tensor in load_file(path).items():
        new, was = next(((n, o) for n, o in names.items() if f".{n}." in name), ("", ""))
        old[name.replace(f".{new}.", f".{was}.") if new else name] = tensor
    assert sum("proj_attn" in name for name in old) == 4
    save_file(old, path)
    path = folder / "text_encoder" / "model.safetensors"
    save_file({**load_file(path), "text_model.embeddings.position_ids": torch.arange(16)[None]}, path)
    assert torch.equal(ours(folder), ours(small))
    path.unlink()
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "text_encoder" / "model.safetensors")
    with pytest.raises(VgenError, match="do not fit"):
        list(model(folder).embed(["a ball"]))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"num_frames": 2}, "Nearest: 1"),
        ({"height": 30}, "Nearest: 28 or 32"),
        ({"width": 4}, "Nearest: 8"),
        ({"prompt": " "}, "The prompt is empty"),
        ({"sampler": "dpmpp-2m", "eta": 0.5}, "--eta belongs to DDIM"),
        ({"negative_prompt": "blue", "guidance_scale": 1.0}, "does nothing at --guidance-scale 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(small: Path, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        asked(small, **flags)


def test_settings_of_the_other_part_are_refused(small: Path) -> None:
    with pytest.raises(UsageError, match="--mask-weight does nothing for --part autoencoder"):
        asked(small, "finetune", part="autoencoder", mask_weight=2.0)
    with pytest.raises(UsageError, match="--kl-weight does nothing for --part unet"):
        asked(small, "finetune", kl_weight=2.0)


def test_checkpoints_that_need_more_than_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VgenError, match="takes 9 channels"):
        describe(checkpoint(tmp_path / "inpainting", in_channels=9))
    with pytest.raises(VgenError, match="not a Stable Diffusion checkpoint"):
        describe(tmp_path)


def test_the_demo_is_what_its_configurations_say() -> None:
    told = describe(DEMO)
    assert dict(told.defaults) | {"num_frames": 1, "height": 64, "width": 64} == dict(told.defaults)
    with torch.device("meta"):
        networks = [
            UNet2DConditionModel.from_config(json.loads((DEMO / "unet" / "config.json").read_text())),
            AutoencoderKL.from_config(json.loads((DEMO / "vae" / "config.json").read_text())),
            CLIPTextModel(CLIPTextConfig(**json.loads((DEMO / "text_encoder" / "config.json").read_text()))),
        ]
    assert sum(map(size, networks)) * 2 < 8e6  # bytes in bf16


def test_the_demo_knows_the_words_of_the_world(small: Path) -> None:
    captions = [prompt.text for prompt in world.prompts(200)]
    made = model(small)
    assert made.notes(asked(small, prompt=" ".join(captions))) == []
    assert max(len(made.networks.tokenizer(text).input_ids) for text in captions) <= 16
    (note,) = made.notes(asked(small, prompt="a red zebra", negative_prompt="fog"))
    assert note.startswith("This checkpoint does not know: zebra, fog. It knows: a, ")


def tuned(folder: Path, output: Path, **flags: Any) -> StableDiffusion:
    """A checkpoint after two steps of training."""
    told = {"max_train_steps": 2, "train_batch_size": 2, "learning_rate": 1e-2, "output": output, **flags}
    finetune(family, model(folder), folder, asked(folder, "finetune", **told), tiny.CPU)
    return model(output)


def changed(before: StableDiffusion, after: StableDiffusion) -> set[str]:
    """The networks whose weights differ."""
    pairs = {
        name: [m.networks.get(name).state_dict() for m in (before, after)] for name in ("unet", "vae", "text_encoder")
    }
    return {name for name, (a, b) in pairs.items() if any(not torch.equal(a[key], b[key]) for key in a)}


def test_parts_are_trained_apart(small: Path, tmp_path: Path) -> None:
    before = model(small)
    after = tuned(small, tmp_path / "vae", part="autoencoder", data=["world:4"])
    assert changed(before, after) == {"vae"}
    spread = after.encode(torch.stack([world.clip(0, i, 1, 32, 32)[0] for i in range(4)]))["mean"].std()
    assert after.space.scaling_factor != 0.7
    assert 0.2 < after.space.scaling_factor * spread < 5
    items = clips.discover(["world:4"])
    done = tiny.fill(before, tmp_path / "store", asked(small, "encode"), (items, (1, 32, 32)))
    assert [one.status for one in done] == ["encoded"] * 4
    data = {"data": [str(tmp_path / "store")], "mask_weight": 3.0, "mask_steps": 4}
    assert changed(before, tuned(small, tmp_path / "unet", **data)) == {"unet"}
    assert changed(before, tuned(small, tmp_path / "both", **data, train_text_encoder=True)) == {"unet", "text_encoder"}
    anew = tuned(small, tmp_path / "anew", **data, from_scratch=True, learning_rate=0.0)
    assert changed(before, anew) == {"unet"}


def test_the_error_on_the_object_weighs_more_at_first(small: Path) -> None:
    part = model(small).part("unet", asked(small, "finetune", mask_weight=4.0, mask_steps=10))
    batch = {"latents": torch.randn(1, 4, 1, 8, 8), "text": torch.randn(1, 16, 16), "mask": torch.zeros(1, 1, 1, 8, 8)}
    batch["mask"][..., :2] = 1
    early, late = (part.loss({**batch, "progress": n}, torch.Generator().manual_seed(0)).item() for n in (0, 10))
    plain = part.loss({"latents": batch["latents"], "text": batch["text"]}, torch.Generator().manual_seed(0)).item()
    assert late == plain != early


def test_pictures_from_the_command_line(small: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint", small, "--num-inference-steps", "2", "--seed", "5")
    done = vgen("sample", "sd", "a red ball", *flags, cwd=tmp_path)
    assert (done.code, done.out) == (0, "sd-5.png\n"), done.err
    with Image.open(tmp_path / "sd-5.png") as image:
        assert (image.format, image.size) == ("PNG", (32, 32))
        pixels = torch.tensor(list(image.convert("RGB").getdata())).view(32, 32, 3)
    mine = ours(small, seed=5, num_inference_steps=2)[0].permute(1, 2, 0).mul(255).round()
    assert (pixels - mine).abs().max() <= 1
    assert read_metadata(tmp_path / "sd-5.png")["seed"] == 5
    made = model(small)
    streams = generate(made, asked(small, seed=5, num_inference_steps=2), tiny.ignore)
    latents.write(tmp_path / "z.safetensors", {"latents": streams["latents"][0]}, {"space": made.space, "fps": "1"})
    done = vgen("decode", "sd", "z.safetensors", "--checkpoint", small, cwd=tmp_path)
    assert (done.code, done.out) == (0, "sd-decode.png\n"), done.err
    assert (tmp_path / "sd-decode.png.toml").is_file()
    with Image.open(tmp_path / "sd-decode.png") as again:
        decoded = torch.tensor(list(again.convert("RGB").getdata())).view(32, 32, 3)
    assert torch.equal(decoded, pixels)

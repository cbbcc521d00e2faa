"""CogVideoX as the core sees it: what it encodes, decodes, conditions on and trains (arXiv:2408.06072)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen import clips, convolution, diffusion, latents
from vgen.cost import Cost
from vgen.errors import UsageError
from vgen.family import Checkpoint
from vgen.latents import Space, file_hash, sample_posterior, scale
from vgen.machine import Machine
from vgen.model import Draw
from vgen.networks import Networks, prepare
from vgen.pixels import Autoencoder
from vgen.plugins.cogvideox import autoencoder, caching, cost, draw
from vgen.plugins.cogvideox.attention import Products
from vgen.plugins.cogvideox.pictures import Pictures
from vgen.plugins.cogvideox.transformer import Transformer
from vgen.text import Texts

CLASSES = {
    "vae": "diffusers:AutoencoderKLCogVideoX",
    "transformer": "diffusers:CogVideoXTransformer3DModel",
    "text_encoder": "transformers:T5EncoderModel",
}


def load(folder: Path, checkpoint: Checkpoint, machine: Machine) -> CogVideoX:
    """The model of a checkpoint folder. Networks load when they are first used."""
    return CogVideoX(folder, checkpoint, machine)


class CogVideoX:
    """The networks of one checkpoint."""

    base = ("transformer",)

    def __init__(self, folder: Path, checkpoint: Checkpoint, machine: Machine) -> None:
        self.folder, self.checkpoint, self.machine = folder, checkpoint, machine
        self.networks = Networks(folder, machine, CLASSES)
        self.slicing = self.tiling = False

    @cached_property
    def space(self) -> Space:
        """The latents of this checkpoint's autoencoder."""
        vae = self.networks.config("vae")
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
        return Space(
            name="cogvideox-vae",
            channels=vae["latent_channels"],
            strides=(int(vae["temporal_compression_ratio"]), spatial, spatial),
            scaling_factor=vae["scaling_factor"],
            hash=file_hash(self.folder / "vae"),
        )

    @cached_property
    def process(self) -> diffusion.Discrete:
        """The noise process of the released scheduler."""
        return diffusion.from_scheduler_config(self.networks.config("scheduler"))

    @cached_property
    def texts(self) -> Texts:
        """The text encoder."""
        return Texts(self.networks, "t5", self.networks.config("transformer")["max_text_seq_length"])

    @property
    def text_space(self) -> str:
        """What identifies text embeddings."""
        return self.texts.space

    def embed(self, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """The embedding (L, D) of each text, as they are made."""
        return self.texts.embed(texts)

    def notes(self, options: Any) -> list[str]:
        """What a user should hear before the clip is made: words that the text encoder does not know."""
        return self.texts.notes(f"{options.prompt} {options.negative_prompt}")

    def ready_to_encode(self) -> None:
        """Load the autoencoder."""
        self.networks.get("vae")

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels (B, 3, T, H, W) in [-1, 1] to unscaled 'mean' and 'logvar'."""
        vae = self._vae()
        with self.machine.holding(vae), torch.no_grad(), convolution.quick():
            return autoencoder.encode(vae, pixels.to(self.machine.device))

    def decode(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Unscaled 'latents' (B, C, T, H, W) to pixels (B, 3, T, H, W)."""
        vae = self._vae()
        with self.machine.holding(vae), torch.no_grad(), convolution.quick():
            return autoencoder.decode(vae, streams["latents"].to(self.machine.device))

    def _vae(self) -> Any:
        vae = self.networks.get("vae")
        autoencoder.save_memory(vae, slicing=self.slicing, tiling=self.tiling)
        return vae

    def denoiser(self, name: str, options: Any) -> Transformer:
        """The transformer, ready for sampling."""
        network = self.networks.get("transformer")
        part = Transformer(network, self.process)
        caching.arrange(network, options.cache, lambda: part.timestep)
        if options.compile:
            network.compile()
        return part

    def draw(self, name: str, options: Any, streams: Mapping[str, Tensor]) -> Draw:
        """What the transformer is asked for: `num_videos_per_prompt` clips, with seeds that count up from `seed`."""
        self.slicing, self.tiling = options.vae_slicing, options.vae_tiling
        count, device = options.num_videos_per_prompt, self.machine.device
        generators = [torch.Generator().manual_seed(options.seed + i) for i in range(count)]
        wanted = options.prompt, options.negative_prompt
        texts = self.texts.cached(wanted)
        cond, uncond = ({"text": torch.stack([texts[one]] * count).to(device)} for one in wanted)
        shape, skip = self.shape(options)
        if options.image:
            picture = torch.stack([self._given(options.image, options, 1, g) for g in generators])
            cond["image"] = uncond["image"] = draw.first_frame(self._image_scale(picture), shape[1]).to(device)
        given = None
        times = draw.times_of(self.process, options)
        if options.video:
            clips = [self._given(options.video, options, options.num_frames, g) for g in generators]
            given = scale(self.space, torch.stack(clips))
            given = torch.cat([given[:, :, :1]] * skip + [given], 2)
        x = draw.start(self.process, times, shape, generators, given).to(device)
        return Draw(
            x=x,
            times=times,
            cond=cond,
            uncond=uncond,
            guidance=draw.guidance_of(options, times),
            sampler=draw.sampler_of(options, draw.steps_noise(shape, generators, device)),
            window=self.window(options, shape[1]),
            skip=skip,
        )

    def window(self, options: Any, frames: int) -> tuple[int, int] | None:
        """Size and stride, in frames of latents, of the windows that a clip of so many is denoised in; None for one."""
        if options.num_frames <= options.window:
            return None
        size = (options.window - 1) // self.space.strides[0] + 1
        size = min(frames, size + -size % self.patch_size_t)
        return size, max(1, size // 2)

    def tokens(self, shape: Sequence[int]) -> int:
        """Tokens of text and video for a clip whose latents have the shape (C, T, H, W)."""
        told, p_t = self.networks.config("transformer"), self.patch_size_t
        area = (shape[2] // told["patch_size"]) * (shape[3] // told["patch_size"])
        return int(told["max_text_seq_length"] + -(-shape[1] // p_t) * area)

    @property
    def patch_size_t(self) -> int:
        """Frames of latents in one patch."""
        return int(self.networks.config("transformer").get("patch_size_t") or 1)

    def shape(self, options: Any) -> tuple[tuple[int, int, int, int], int]:
        """Shape (C, T, H, W) of the latents of a clip, and how many of T only fill up a patch in time."""
        t, h, w = self.space.strides
        frames = (options.num_frames - 1) // t + 1
        skip = -frames % self.patch_size_t
        return (self.space.channels, frames + skip, options.height // h, options.width // w), skip

    def _given(self, path: Path, options: Any, num_frames: int, generator: torch.Generator) -> Tensor:
        """Unscaled latents (C, T, H, W) of a picture, a clip or a latent file, drawn from the posterior.

        Raises UsageError for latents of another size.
        """
        if path.suffix == ".safetensors":
            streams, record = latents.read(path)
            latents.require(record["space"], self.space, f"vgen encode cogvideox CLIP --checkpoint {self.folder}")
            z = sample_posterior(streams, generator)
            t, h, w = self.space.strides
            wanted = [(num_frames - 1) // t + 1, options.height // h, options.width // w]
            if list(z.shape[1:]) != wanted:
                frames, height, width = (z.shape[1] - 1) * t + 1, z.shape[2] * h, z.shape[3] * w
                raise UsageError(
                    f"{path} holds {frames} frames of {height}x{width}, but {num_frames} of"
                    f" {options.height}x{options.width} are asked for.",
                    f"For a clip: --num-frames {frames} --height {height} --width {width}. Or encode it anew.",
                )
            return z
        pixels, _ = clips.load_file(path, num_frames, options.height, options.width, options.fps)
        streams = {name: s[0].cpu() for name, s in self.encode(pixels[None]).items()}
        return sample_posterior(streams, generator)

    def _image_scale(self, z: Tensor) -> Tensor:
        """Scaled latents of the picture. CogVideoX1.5 was trained with the inverse factor for them."""
        inverse = self.networks.config("vae").get("invert_scale_latents")
        return z / self.space.scaling_factor if inverse else scale(self.space, z)

    def cost(self, options: Any) -> Cost:
        """What a clip takes."""
        return cost.cost(self, options)

    def part(self, name: str, options: Any) -> Transformer | Autoencoder:
        """A part made ready for training by `options`; its weights take gradients, all others stay as they are."""
        if options.from_scratch:
            also = ["text_encoder"] if options.train_text_encoder else []
            self.networks.start_anew(["vae" if name == "autoencoder" else "transformer", *also], options.seed)
        part = self._autoencoder(options) if name == "autoencoder" else self._transformer(options)
        prepare(part.modules.values(), options)
        return part

    def _autoencoder(self, options: Any) -> Autoencoder:
        vae, weights = self.networks.get("vae"), {"l1_weight": options.l1_weight, "kl_weight": options.kl_weight}
        return Autoencoder(vae, autoencoder.encode, autoencoder.decode, **weights)

    def _transformer(self, options: Any) -> Transformer:
        part = Transformer(self.networks.get("transformer"), self.process)
        part.mask_weight, part.mask_steps = options.mask_weight, options.mask_steps
        if "image" in self.checkpoint.modes:
            scale = float(self._image_scale(torch.ones(())) / self.space.scaling_factor)
            part.pictures = Pictures(options.image_noise, options.image_dropout, scale)
        if self.machine.device.type == "cpu" and options.mixed_precision == "bf16":
            part.network.set_attn_processor(Products())
        if options.train_text_encoder:
            part.modules = {**part.modules, "text_encoder": self.networks.get("text_encoder")}
            part.embed = self.texts.of
        return part

"""Stable Diffusion as the core sees it: what it encodes, decodes, conditions on and trains (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen import diffusion, framewise, samplers
from vgen.cost import Cost
from vgen.family import Checkpoint
from vgen.latents import Space, file_hash
from vgen.machine import Machine
from vgen.model import Draw, Sampler
from vgen.networks import Networks, prepare
from vgen.pixels import Autoencoder
from vgen.plugins.sd import cost
from vgen.plugins.sd.unet import UNet
from vgen.text import Texts

CLASSES = {
    "vae": "diffusers:AutoencoderKL",
    "unet": "diffusers:UNet2DConditionModel",
    "text_encoder": "transformers:CLIPTextModel",
}


def load(folder: Path, checkpoint: Checkpoint, machine: Machine) -> StableDiffusion:
    """The model of a checkpoint folder. Networks load when they are first used."""
    return StableDiffusion(folder, checkpoint, machine)


class StableDiffusion:
    """The networks of one checkpoint."""

    base = ("unet",)

    def __init__(self, folder: Path, checkpoint: Checkpoint, machine: Machine) -> None:
        self.folder, self.checkpoint, self.machine = folder, checkpoint, machine
        self.networks = Networks(folder, machine, CLASSES, spare=True)
        self.slicing = self.tiling = False

    @cached_property
    def space(self) -> Space:
        """The latents of this checkpoint's autoencoder; frames are apart from each other."""
        vae = self.networks.config("vae")
        stride = 2 ** (len(vae["block_out_channels"]) - 1)
        return Space(
            name="sd-vae",
            channels=vae["latent_channels"],
            strides=(1, stride, stride),
            scaling_factor=vae.get("scaling_factor", 0.18215),  # the first releases do not name it
            hash=file_hash(self.folder / "vae"),
        )

    @cached_property
    def process(self) -> diffusion.Discrete:
        """The noise process of the released scheduler."""
        return diffusion.from_scheduler_config(self.networks.config("scheduler"))

    @cached_property
    def texts(self) -> Texts:
        """The text encoder."""
        return Texts(self.networks, "clip", self.networks.config("text_encoder")["max_position_embeddings"])

    @property
    def text_space(self) -> str:
        """What identifies text embeddings."""
        return self.texts.space

    def embed(self, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """The embedding (L, D) of each text, as they are made."""
        return self.texts.embed(texts)

    def notes(self, options: Any) -> list[str]:
        """What a user should hear before the image is made: words that the text encoder does not know."""
        return self.texts.notes(f"{options.prompt} {options.negative_prompt}")

    def ready_to_encode(self) -> None:
        """Load the autoencoder."""
        self.networks.get("vae")

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels (B, 3, T, H, W) in [-1, 1] to unscaled 'mean' and 'logvar'."""
        vae = self._vae()
        with self.machine.holding(vae), torch.no_grad():
            return framewise.encode(vae, pixels.to(self.machine.device))

    def decode(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Unscaled 'latents' (B, C, T, H', W') to pixels (B, 3, T, H, W)."""
        vae = self._vae()
        with self.machine.holding(vae), torch.no_grad():
            return framewise.decode(vae, streams["latents"].to(self.machine.device))

    def _vae(self) -> Any:
        vae = self.networks.get("vae")
        framewise.save_memory(vae, slicing=self.slicing, tiling=self.tiling)
        return vae

    def denoiser(self, name: str, options: Any) -> UNet:
        """The U-Net, ready for sampling."""
        part = self._unet()
        if options.compile:
            part.network.compile()
        return part

    def _unet(self) -> UNet:
        output = diffusion.kind_of_scheduler_config(self.networks.config("scheduler"))
        return UNet(self.networks.get("unet"), self.process, output)

    def draw(self, name: str, options: Any, streams: Mapping[str, Tensor]) -> Draw:
        """What the U-Net is asked for: `num_videos_per_prompt` images, with seeds that count up from `seed`.

        Noise is drawn in the order of diffusers' pipeline, so that a seed gives the image that it gives there.
        """
        self.slicing, self.tiling = options.vae_slicing, options.vae_tiling
        count, device = options.num_videos_per_prompt, self.machine.device
        texts = self.texts.cached((options.prompt, options.negative_prompt))
        cond, uncond = (
            {"text": torch.stack([texts[one]] * count).to(device)} for one in (options.prompt, options.negative_prompt)
        )
        _, h, w = self.space.strides
        shape = (self.space.channels, options.num_frames, options.height // h, options.width // w)
        noise = samplers.clip_noise(shape, [options.seed + i for i in range(count)], device)
        sampler: Sampler = samplers.dpmpp_2m
        if options.sampler == "ddim":
            sampler = partial(samplers.ddim, eta=options.eta, noise=noise)
        times = self.process.times(options.num_inference_steps)
        return Draw(noise(), times, cond, uncond, float(options.guidance_scale), sampler)

    def cost(self, options: Any) -> Cost:
        """What an image takes."""
        return cost.cost(self, options)

    def part(self, name: str, options: Any) -> UNet | Autoencoder:
        """A part made ready for training by `options`; its weights take gradients, all others stay as they are."""
        if options.from_scratch:
            also = ["text_encoder"] if options.train_text_encoder else []
            self.networks.start_anew(["vae" if name == "autoencoder" else "unet", *also], options.seed)
        part = self._autoencoder(options) if name == "autoencoder" else self._trained(options)
        prepare(part.modules.values(), options)
        return part

    def _autoencoder(self, options: Any) -> Autoencoder:
        vae, weights = self.networks.get("vae"), {"l1_weight": options.l1_weight, "kl_weight": options.kl_weight}
        return Autoencoder(vae, framewise.encode, framewise.decode, **weights)

    def _trained(self, options: Any) -> UNet:
        part = self._unet()
        part.mask_weight, part.mask_steps = options.mask_weight, options.mask_steps
        if options.train_text_encoder:
            part.modules = {**part.modules, "text_encoder": self.networks.get("text_encoder")}
            part.embed = self.texts.of
        return part

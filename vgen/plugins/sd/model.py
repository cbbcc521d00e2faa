"""Stable Diffusion as the core sees it: what it encodes, decodes, conditions on and trains (arXiv:2112.10752)."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from vgen import diffusion, samplers
from vgen.embeddings import Embeddings
from vgen.errors import VgenError
from vgen.family import Checkpoint
from vgen.latents import Space, file_hash
from vgen.machine import Machine
from vgen.model import Draw, Sampler
from vgen.plugins.sd import autoencoder, text
from vgen.plugins.sd.autoencoder import Autoencoder
from vgen.plugins.sd.unet import UNet

CLASSES: Mapping[str, Any] = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}


def load(folder: Path, checkpoint: Checkpoint, machine: Machine) -> StableDiffusion:
    """The model of a checkpoint folder. Networks load when they are first used."""
    return StableDiffusion(folder, checkpoint, machine)


class StableDiffusion:
    """The networks of one checkpoint."""

    base = ("unet",)

    def __init__(self, folder: Path, checkpoint: Checkpoint, machine: Machine) -> None:
        self.folder, self.checkpoint, self.machine = folder, checkpoint, machine
        self.from_scratch: frozenset[str] = frozenset()
        self.slicing = self.tiling = False
        self._loaded: dict[str, Any] = {}

    def config(self, name: str) -> dict[str, Any]:
        """The configuration of a component, without loading it."""
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        read: dict[str, Any] = json.loads((self.folder / name / file).read_text())
        return read

    def network(self, name: str) -> Any:
        """A network by its subfolder, loaded on first use."""
        if name not in self._loaded:
            make = self._random if name in self.from_scratch else self._pretrained
            self._loaded[name] = make(name).eval().requires_grad_(False)
        return self._loaded[name]

    def _pretrained(self, name: str) -> nn.Module:
        told: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        mend = "Fetch the checkpoint again, or train it first (--from-scratch)."
        try:
            made, info = CLASSES[name].from_pretrained(self.folder / name, torch_dtype=self.machine.dtype, **told)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise VgenError(f"The weights of '{name}' in {self.folder} could not be loaded: {error}", mend) from error
        wrong = [key for kind in ("missing_keys", "mismatched_keys") for key in info[kind]]
        if wrong:
            raise VgenError(f"The weights of '{name}' in {self.folder} do not fit its config.json: {wrong[0]}.", mend)
        network: nn.Module = made
        return network

    def _random(self, name: str) -> nn.Module:
        if name == "text_encoder":
            return CLIPTextModel(CLIPTextConfig(**self.config(name)))
        network: nn.Module = CLASSES[name].from_config(self.config(name))
        return network

    def release(self, name: str) -> None:
        """Give back the memory of a network."""
        if self._loaded.pop(name, None) is not None:
            gc.collect()
            if self.machine.device.type == "cuda":
                torch.cuda.empty_cache()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the text encoder."""
        return AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)

    @cached_property
    def space(self) -> Space:
        """The latents of this checkpoint's autoencoder; frames are apart from each other."""
        vae = self.config("vae")
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
        return diffusion.from_scheduler_config(self.config("scheduler"))

    @cached_property
    def text_space(self) -> str:
        """What identifies text embeddings: the encoder's weights and its length."""
        length = self.config("text_encoder")["max_position_embeddings"]
        return f"clip:{file_hash(self.folder / 'text_encoder')[:16]}:{length}"

    def embed(self, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """The embedding (L, D) of each text, alone, so that its bits do not depend on the others.

        The text encoder leaves memory after the last.
        """
        for one in texts:
            encoder = self.network("text_encoder")
            with self.machine.holding(encoder), torch.no_grad():
                embedding = text.embed(encoder, self.tokenizer, [one])[0].cpu()
            yield {"text": embedding}
        self.release("text_encoder")

    def cached_text(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The embedding (L, D) of each text, from the disk where it is there; the encoder loads only for the others."""
        precision = str(self.machine.dtype).removeprefix("torch.")
        cache = Embeddings(None, f"{self.text_space}:{precision}")
        found = {one: cache.get(one) for one in texts}
        missing = [one for one, tensors in found.items() if tensors is None]
        for one, tensors in zip(missing, self.embed(missing), strict=True):
            cache.put(one, tensors)
            found[one] = tensors
        return {one: tensors["text"] for one, tensors in found.items() if tensors is not None}

    def notes(self, options: Any) -> list[str]:
        """What a user should hear before the image is made: words that a small text encoder does not know."""
        words, known = text.unknown_words(self.tokenizer, f"{options.prompt} {options.negative_prompt}")
        if not words:
            return []
        return [f"This checkpoint does not know: {', '.join(words)}. It knows: {', '.join(known)}."]

    def ready_to_encode(self) -> None:
        """Load the autoencoder."""
        self.network("vae")

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels (B, 3, T, H, W) in [-1, 1] to unscaled 'mean' and 'logvar'."""
        vae = self._vae()
        with self.machine.holding(vae), torch.no_grad():
            return autoencoder.encode(vae, pixels.to(self.machine.device))

    def decode(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Unscaled 'latents' (B, C, T, H', W') to pixels (B, 3, T, H, W)."""
        vae = self._vae()
        with self.machine.holding(vae), torch.no_grad():
            return autoencoder.decode(vae, streams["latents"].to(self.machine.device))

    def _vae(self) -> Any:
        vae = self.network("vae")
        autoencoder.save_memory(vae, slicing=self.slicing, tiling=self.tiling)
        return vae

    def denoiser(self, name: str, options: Any) -> UNet:
        """The U-Net, ready for sampling."""
        part = self._unet()
        if options.compile:
            part.network.compile()
        return part

    def _unet(self) -> UNet:
        output = diffusion.kind_of_scheduler_config(self.config("scheduler"))
        return UNet(self.network("unet"), self.process, output)

    def draw(self, name: str, options: Any, streams: Mapping[str, Tensor]) -> Draw:
        """What the U-Net is asked for: `num_videos_per_prompt` images, with seeds that count up from `seed`.

        Noise is drawn in the order of diffusers' pipeline, so that a seed gives the image that it gives there.
        """
        self.slicing, self.tiling = options.vae_slicing, options.vae_tiling
        count, device = options.num_videos_per_prompt, self.machine.device
        texts = self.cached_text((options.prompt, options.negative_prompt))
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

    def part(self, name: str, options: Any) -> UNet | Autoencoder:
        """A part made ready for training by `options`; its weights take gradients, all others stay as they are."""
        if options.from_scratch:
            also = {"text_encoder"} if options.train_text_encoder else set()
            self.from_scratch = frozenset({"vae" if name == "autoencoder" else "unet"} | also)
            torch.manual_seed(options.seed)
        part = self._autoencoder(options) if name == "autoencoder" else self._trained(options)
        networks: list[Any] = list(part.modules.values())
        for network in networks:
            network.requires_grad_(True).train()
            if options.dtype == "auto":
                network.float()  # small steps vanish in bf16; --mixed-precision makes fp32 fast
            if options.gradient_checkpointing:
                _recompute(network)
            if options.compile:
                for called in [network.encoder, network.decoder] if name == "autoencoder" else [network]:
                    called.compile()
        return part

    def _autoencoder(self, options: Any) -> Autoencoder:
        return Autoencoder(self.network("vae"), l1_weight=options.l1_weight, kl_weight=options.kl_weight)

    def _trained(self, options: Any) -> UNet:
        part = self._unet()
        part.mask_weight, part.mask_steps = options.mask_weight, options.mask_steps
        if options.train_text_encoder:
            encoder = self.network("text_encoder")
            part.modules = {**part.modules, "text_encoder": encoder}
            part.embed = lambda captions: text.embed(encoder, self.tokenizer, captions)
        return part


def _recompute(network: Any) -> None:
    """Turn gradient checkpointing on, in diffusers' words or in transformers'."""
    if isinstance(network, CLIPTextModel):
        network.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        network.enable_gradient_checkpointing()

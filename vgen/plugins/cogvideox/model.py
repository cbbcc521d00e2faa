"""CogVideoX as the core sees it: what it encodes, decodes, conditions on and trains (arXiv:2408.06072)."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from vgen import diffusion
from vgen.errors import VgenError
from vgen.family import Checkpoint
from vgen.latents import Space, file_hash
from vgen.machine import Machine
from vgen.plugins.cogvideox import autoencoder, text
from vgen.plugins.cogvideox.autoencoder import Autoencoder
from vgen.plugins.cogvideox.transformer import Transformer

CLASSES: Mapping[str, Any] = {
    "vae": AutoencoderKLCogVideoX,
    "transformer": CogVideoXTransformer3DModel,
    "text_encoder": T5EncoderModel,
}


def load(folder: Path, checkpoint: Checkpoint, machine: Machine) -> CogVideoX:
    """The model of a checkpoint folder. Networks load when they are first used."""
    return CogVideoX(folder, checkpoint, machine)


class CogVideoX:
    """The networks of one checkpoint."""

    base = ("transformer",)

    def __init__(self, folder: Path, checkpoint: Checkpoint, machine: Machine) -> None:
        self.folder, self.checkpoint, self.machine = folder, checkpoint, machine
        self.from_scratch: frozenset[str] = frozenset()
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
        dtype = self.machine.dtype
        try:
            network: nn.Module = CLASSES[name].from_pretrained(
                self.folder / name, torch_dtype=dtype, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise VgenError(
                f"The weights of '{name}' in {self.folder} could not be loaded: {error}",
                "Fetch the checkpoint again, or train it first (--from-scratch).",
            ) from error
        return network.to(dtype)

    def _random(self, name: str) -> nn.Module:
        if name == "text_encoder":
            return T5EncoderModel(T5Config(**self.config(name)))
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
        """The latents of this checkpoint's autoencoder."""
        vae = self.config("vae")
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
        return diffusion.from_scheduler_config(self.config("scheduler"))

    @cached_property
    def transformer(self) -> Transformer:
        """The denoiser."""
        return Transformer(self.network("transformer"), self.process)

    def embed(self, texts: list[str]) -> list[dict[str, Tensor]]:
        """Text embeddings (L, D) of each text."""
        encoder = self.network("text_encoder")
        with self.machine.holding(encoder), torch.no_grad():
            made = text.embed(encoder, self.tokenizer, texts, text.length_of(self.config("transformer")))
        return [{"text": one.cpu()} for one in made]

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels (B, 3, T, H, W) in [-1, 1] to unscaled 'mean' and 'logvar'."""
        vae = self.network("vae")
        with self.machine.holding(vae), torch.no_grad():
            return autoencoder.encode(vae, pixels.to(self.machine.device))

    def decode(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Unscaled 'latents' (B, C, T, H, W) to pixels (B, 3, T, H, W)."""
        vae = self.network("vae")
        with self.machine.holding(vae), torch.no_grad():
            return autoencoder.decode(vae, streams["latents"].to(self.machine.device))

    def part(self, name: str, options: Any) -> Transformer | Autoencoder:
        """A part made ready for training by `options`; its weights take gradients, all others stay as they are."""
        if options.from_scratch:
            also = {"text_encoder"} if options.train_text_encoder else set()
            self.from_scratch = frozenset({"vae" if name == "autoencoder" else "transformer"} | also)
            torch.manual_seed(options.seed)
        part = self._autoencoder(options) if name == "autoencoder" else self._transformer(options)
        for network in part.modules.values():
            network.requires_grad_(True).train()
            if options.gradient_checkpointing:
                network.enable_gradient_checkpointing()
        return part

    def _autoencoder(self, options: Any) -> Autoencoder:
        return Autoencoder(self.network("vae"), l1_weight=options.l1_weight, kl_weight=options.kl_weight)

    def _transformer(self, options: Any) -> Transformer:
        part = Transformer(self.network("transformer"), self.process)
        part.stratify = options.stratify
        part.mask_weight, part.mask_steps = options.mask_weight, options.mask_steps
        if options.train_text_encoder:
            encoder, length = self.network("text_encoder"), text.length_of(self.config("transformer"))
            part.modules = {**part.modules, "text_encoder": encoder}
            part.embed = lambda captions: text.embed(encoder, self.tokenizer, captions, length)
        return part

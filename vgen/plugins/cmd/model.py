"""CMD as the core sees it: what it encodes, decodes, conditions on and trains (arXiv:2403.14148)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen import diffusion, framewise
from vgen.cost import Cost
from vgen.errors import VgenError
from vgen.family import Checkpoint
from vgen.latents import Space, file_hash, scale, unscale
from vgen.machine import Machine
from vgen.model import Draw
from vgen.networks import Networks, prepare
from vgen.plugins.cmd import autoencoder, cost, draw, sizes
from vgen.plugins.cmd.autoencoder import Factoring
from vgen.plugins.cmd.content import Content
from vgen.plugins.cmd.labels import Labels
from vgen.plugins.cmd.motion import Motion
from vgen.text import Texts

CLASSES = {
    "vae": "diffusers:AutoencoderKL",
    "unet": "diffusers:UNet2DConditionModel",
    "text_encoder": "transformers:CLIPTextModel",
    "autoencoder": "vgen.plugins.cmd.factored:FactoredAutoencoder",
    "motion": "vgen.plugins.cmd.transformer:MotionTransformer",
}
FOLDERS = {"autoencoder": "autoencoder", "content": "unet", "motion": "motion"}  # of the networks of the parts


def load(folder: Path, checkpoint: Checkpoint, machine: Machine) -> CMD:
    """The model of a checkpoint folder. Networks load when they are first used."""
    return CMD(folder, checkpoint, machine)


class CMD:
    """The networks of one checkpoint.

    Its folder is one of an image model with two more in it, 'autoencoder' and 'motion'. One without a 'vae' works on
    pixels, one without a 'text_encoder' is told classes.
    """

    base = ("unet", "motion")

    def __init__(self, folder: Path, checkpoint: Checkpoint, machine: Machine) -> None:
        self.folder, self.checkpoint, self.machine = folder, checkpoint, machine
        self.networks = Networks(folder, machine, CLASSES, spare=True)
        self.slicing = self.tiling = False

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a network of that name."""
        return (self.folder / name).is_dir()

    def config(self, name: str) -> dict[str, Any]:
        """The configuration of a network. Raises VgenError where the checkpoint has none."""
        if self.has(name):
            return self.networks.config(name)
        raise VgenError(
            f"{self.folder} has no '{name}' yet.",
            f"Train it: vgen finetune cmd --part {name} --checkpoint {self.folder}",
        )

    @cached_property
    def space(self) -> Space:
        """Content frames, in the space of the image autoencoder's latents, with motion beside them."""
        self.config("autoencoder")
        hashes = [file_hash(self.folder / name) for name in ("vae", "autoencoder") if self.has(name)]
        side, factor = 1, 1.0
        if self.has("vae"):
            vae = self.networks.config("vae")
            side, factor = 2 ** (len(vae["block_out_channels"]) - 1), vae.get("scaling_factor", 0.18215)
        return Space(
            name="cmd",
            channels=self.config("autoencoder")["in_channels"],
            strides=(1, side, side),
            scaling_factor=factor,
            hash=hashlib.sha256("".join(hashes).encode()).hexdigest(),
        )

    @cached_property
    def texts(self) -> Texts:
        """The text encoder."""
        return Texts(self.networks, "clip", self.networks.config("text_encoder")["max_position_embeddings"])

    @property
    def text_space(self) -> str | None:
        """What identifies text embeddings; None for checkpoints that are told classes."""
        return self.texts.space if self.has("text_encoder") else None

    @property
    def classes(self) -> int:
        """How many classes the checkpoint knows, besides none; 0 where it takes text."""
        return 0 if self.has("text_encoder") else int(self.networks.config("unet")["num_class_embeds"]) - 1

    def embed(self, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """The embedding (L, D) of each text, as they are made."""
        return self.texts.embed(texts)

    def notes(self, options: Any) -> list[str]:
        """What a user should hear before the clip is made: words that the text encoder does not know."""
        return self.texts.notes(f"{options.prompt} {options.negative_prompt}") if self.has("text_encoder") else []

    def ready_to_encode(self) -> None:
        """Load both autoencoders."""
        for name in ("vae", "autoencoder"):
            if self.has(name):
                self.networks.get(name)

    def images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] to scaled latents of each frame (B, C, T, h, w), or to themselves."""
        pixels = pixels.to(self.machine.device)
        if not self.has("vae"):
            return pixels
        vae = self._vae()
        with self.machine.holding(vae), torch.no_grad():
            mean: Tensor = framewise.encode(vae, pixels)["mean"]
        return mean.to(pixels.dtype) * vae.config.scaling_factor

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels (B, 3, T, H, W) in [-1, 1] to the content frame (B, C, 1, h, w), unscaled, and motion."""
        clip, network = self.images(pixels), self.networks.get("autoencoder")
        with self.machine.holding(network), torch.no_grad():
            streams = autoencoder.encode(network, clip)
        return {**streams, "content": unscale(self.space, streams["content"])}

    def beside(self, pixels: Tensor, record: Mapping[str, Any]) -> dict[str, Tensor]:
        """What else is stored of a clip: its 'label', where a manifest says it and the checkpoint takes classes."""
        label = record.get("facts", {}).get("label")
        return {} if label is None or not self.classes else {"label": torch.tensor([float(label)])}

    def decode(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Unscaled streams to pixels (B, 3, T, H, W): of a content frame without motion, a picture of it."""
        clip = scale(self.space, streams["content"].to(self.machine.device))
        if "motion_x" in streams:
            network = self.networks.get("autoencoder")
            told = {name: s.to(self.machine.device) for name, s in streams.items() if name in autoencoder.STREAMS}
            with self.machine.holding(network), torch.no_grad():
                clip = autoencoder.decode(network, {**told, "content": clip})
        if not self.has("vae"):
            return clip
        vae = self._vae()
        with self.machine.holding(vae), torch.no_grad():
            return framewise.decode(vae, unscale(self.space, clip))

    def _vae(self) -> Any:
        vae = self.networks.get("vae")
        framewise.save_memory(vae, slicing=self.slicing, tiling=self.tiling)
        return vae

    def start(self, options: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """What need not be made, and what is: a given content frame; no motion where a picture is asked for."""
        given = {"content": draw.given(self, options)} if options.content_image else {}
        run = {"unet": not given, "motion": not options.still}
        return given, tuple(name for name in self.base if run[name])

    def denoiser(self, name: str, options: Any) -> Content | Motion:
        """A denoiser, ready for sampling."""
        part: Content | Motion = self._content(0.0) if name == "unet" else self._motion(0.0)
        if isinstance(part, Motion):
            part.rows = sizes.motion(self, options)[0]
        if options.compile:
            part.network.compile()
        return part

    def draw(self, name: str, options: Any, streams: Mapping[str, Tensor]) -> Draw:
        """What a denoiser is asked for: `num_videos_per_prompt` clips, with seeds that count up from `seed`."""
        self.slicing, self.tiling = options.vae_slicing, options.vae_tiling
        return draw.content(self, options) if name == "unet" else draw.motion(self, options, streams)

    def cost(self, options: Any) -> Cost:
        """What a clip takes."""
        return cost.cost(self, options)

    def _content(self, dropout: float) -> Content:
        told = self.networks.config("scheduler")
        process, output = diffusion.from_scheduler_config(told), diffusion.kind_of_scheduler_config(told)
        return Content(self.networks.get("unet"), process, output, self.space, Labels(self.classes, dropout))

    def _motion(self, dropout: float) -> Motion:
        network, factor = self.networks.get("motion"), float(self.config("autoencoder")["scaling_factor"])
        told = sizes.noise(network.config)
        process, output = diffusion.from_scheduler_config(told), diffusion.kind_of_scheduler_config(told)
        return Motion(network, process, output, self.space, factor, Labels(self.classes, dropout))

    def part(self, name: str, options: Any) -> Content | Motion | Factoring:
        """A part made ready for training by `options`; its weights take gradients, all others stay as they are.

        A network that the checkpoint lacks starts from random weights.
        """
        folder = FOLDERS[name]
        configs = sizes.configs(self, folder, options)
        if options.from_scratch or configs:
            self.networks.start_anew([folder], options.seed, configs)
        part: Content | Motion | Factoring
        if name == "autoencoder":
            part = Factoring(self.networks.get(folder), self.images, options.l1_weight)
        elif name == "content":
            part = self._content(options.caption_dropout)
            part.mask_weight, part.mask_steps = options.mask_weight, options.mask_steps
        else:
            part = self._motion(options.caption_dropout)
        prepare(part.modules.values(), options)
        return part

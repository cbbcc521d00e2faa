"""MagicVideo as the core sees it: what it encodes, decodes, conditions on and trains (arXiv:2211.11018)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen import clip_image, diffusion, framewise
from vgen.errors import UsageError
from vgen.family import Checkpoint
from vgen.grow import grown
from vgen.latents import Space, file_hash
from vgen.machine import Machine
from vgen.model import Draw
from vgen.networks import Networks, prepare, recompute
from vgen.options import LoraOptions
from vgen.pixels import Autoencoder
from vgen.plugins.magicvideo import BETWEEN, DECODER, FRAMES, KEYS, decoder, draw, keyframes, plan
from vgen.plugins.magicvideo.decoder import VideoDecoder
from vgen.plugins.magicvideo.keyframes import Frames
from vgen.temporal import Inflated
from vgen.text import Texts

CLASSES = {
    "vae": "diffusers:AutoencoderKL",
    "unet": "diffusers:UNet2DConditionModel",
    "text_encoder": "transformers:CLIPTextModel",
    "image_encoder": "transformers:CLIPVisionModelWithProjection",
    KEYS: "vgen.temporal:Temporal",
    BETWEEN: "diffusers:UNet2DConditionModel",
    f"{BETWEEN}_{KEYS}": "vgen.temporal:Temporal",
    DECODER: "vgen.plugins.magicvideo.decoder:VideoDecoder",
}
LAYERS = {"unet": KEYS, BETWEEN: f"{BETWEEN}_{KEYS}"}  # the layers in time of each image network


def load(folder: Path, checkpoint: Checkpoint, machine: Machine) -> MagicVideo:
    """The model of a checkpoint folder. Networks load when they are first used."""
    return MagicVideo(folder, checkpoint, machine)


class MagicVideo:
    """The networks of one checkpoint.

    Its folder is one of an image model, untouched, with more in it: 'temporal', the layers in time of the key frames'
    network, 'interpolator', and 'video_decoder'.
    """

    base = ("unet",)
    steps = keyframes.SPAN - 2  # frames made between two

    def __init__(self, folder: Path, checkpoint: Checkpoint, machine: Machine) -> None:
        self.folder, self.checkpoint, self.machine = folder, checkpoint, machine
        self.networks = Networks(folder, machine, CLASSES, spare=True)
        self.slicing = self.tiling = self.image_decoder = False
        self._inflated: dict[str, Inflated] = {}

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a network of that name."""
        return (self.folder / name).is_dir()

    @cached_property
    def space(self) -> Space:
        """The latents of the image autoencoder, frame by frame."""
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
        """The noise process of the image model's scheduler."""
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
        """What a user should hear before the clip is made: words that the text encoder does not know."""
        return self.texts.notes(f"{options.prompt} {options.negative_prompt}")

    def ready_to_encode(self) -> None:
        """Load the autoencoder, and the image encoder where there is one."""
        for name in ("vae", "image_encoder"):
            if self.has(name):
                self.networks.get(name)

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels (B, 3, T, H, W) in [-1, 1] to 'mean' and 'logvar', unscaled, and CLIP's 'embedding'.

        That is (B, 3, D), of the first, the middle and the last frame.
        """
        pixels = pixels.to(self.machine.device)
        streams = self.moments(pixels)
        if self.has("image_encoder"):
            encoder = self.networks.get("image_encoder")
            places = (0, pixels.shape[2] // 2, pixels.shape[2] - 1)
            with self.machine.holding(encoder), torch.no_grad():
                found = [clip_image.embedding(encoder, pixels[:, :, k]).float() for k in places]
            streams["embedding"] = torch.cat(found, 1)
        return streams

    def moments(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels (B, 3, T, H, W) in [-1, 1] to unscaled 'mean' and 'logvar'."""
        vae = self._vae()
        with self.machine.holding(vae), torch.no_grad():
            return framewise.encode(vae, pixels.to(self.machine.device))

    def beside(self, pixels: Tensor, record: Mapping[str, Any]) -> dict[str, Tensor]:
        """What else is stored of a clip: its frame rate 'fps' (1,)."""
        return {"fps": torch.tensor([float(Fraction(record["fps"]))])}

    def decode(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Unscaled 'latents' (B, C, T, H', W') to pixels (B, 3, T, H, W)."""
        latents = streams["latents"].to(self.machine.device)
        own = self.has(DECODER) and not self.image_decoder
        network = self.networks.get(DECODER) if own else self._vae()
        with self.machine.holding(network), torch.no_grad():
            if own:
                return decoder.decode(network, latents, slicing=self.slicing, tiling=self.tiling)
            return framewise.decode(network, latents)

    def _vae(self) -> Any:
        vae = self.networks.get("vae")
        framewise.save_memory(vae, slicing=self.slicing, tiling=self.tiling)
        return vae

    def inflated(self, name: str) -> Inflated:
        """An image network, 'unet' or 'interpolator', with its layers in time."""
        if name not in self._inflated:
            self._inflated[name] = Inflated(self.networks.get(name), self.networks.get(LAYERS[name]))
        return self._inflated[name]

    def denoiser(self, name: str, options: Any) -> Frames:
        """A denoiser, ready for sampling."""
        part = self._frames(name)
        if getattr(options, "compile", False):
            part.network.image.compile()
        return part

    def _frames(self, name: str) -> Frames:
        output = diffusion.kind_of_scheduler_config(self.networks.config("scheduler"))
        network = self.inflated(name)
        part = Frames(name, network, self.process, output)
        part.modules = {name: network.image, LAYERS[name]: network.temporal}
        return part

    def draw(self, name: str, options: Any, streams: Mapping[str, Tensor]) -> Draw:
        """What the key frames' network is asked for: `num_videos_per_prompt` clips, with seeds that count up."""
        self.slicing, self.tiling = options.vae_slicing, options.vae_tiling
        self.image_decoder = options.image_decoder
        return draw.keys(self, options)

    @property
    def multiple(self) -> int:
        """What height and width are multiples of, where frames of any size are padded."""
        return self.space.strides[1] * 2 ** (len(self.networks.config("unet")["block_out_channels"]) - 1)

    def between(self, ends: Tensor, options: Any, seeds: Sequence[int]) -> Tensor:
        """New frames (B, 3, 3, H, W) of pairs of frames (B, 3, 2, H, W), both in [-1, 1]; a seed for each pair."""
        return draw.between(self, ends, options, seeds)

    def part(self, name: str, options: Any) -> Frames | Autoencoder:
        """A part made ready for training by `options`; its weights take gradients, all others stay as they are."""
        if name == "decoder":
            return self._decoder(options)
        adapted = isinstance(options, LoraOptions)
        folder = BETWEEN if name == "interpolate" else "unet"
        if not adapted:
            self._layers(folder, options)
        part = self._frames(folder)
        part.name = name
        part.mask_weight, part.mask_steps = options.mask_weight, options.mask_steps
        part.told = self._told(name, options)
        image, layers = part.modules[folder], part.modules[LAYERS[folder]]
        along = adapted or folder == BETWEEN or options.image_layers
        part.modules = {folder: image} if adapted else part.modules if along else {LAYERS[folder]: layers}
        prepare(part.modules.values(), options)
        for network in (image, layers):
            network.to(self.machine.device)
            if options.gradient_checkpointing:
                recompute(network)
        if options.compile and not along:
            image.compile()
        return part

    def _told(self, name: str, options: Any) -> keyframes.Told:
        if name == "unsupervised":
            wide = self.networks.config("unet")["cross_attention_dim"]
            made = self.networks.config("image_encoder")["projection_dim"]
            if wide != made:
                told = f"The image encoder makes embeddings of {made} numbers; the U-Net takes {wide}."
                raise UsageError(told, "Take the CLIP model whose text encoder the image model has.")
            return partial(keyframes.picture, dropout=options.caption_dropout)
        return keyframes.between if name == "interpolate" else keyframes.text

    def _layers(self, folder: str, options: Any) -> None:
        """Have the networks of a part, new where the checkpoint lacks them or all is to start anew."""
        new = options.from_scratch or not self.has(LAYERS[folder])
        if options.from_scratch and (options.image_layers or folder == BETWEEN):
            self.networks.start_anew(["unet", folder], options.seed)
        frames = options.clip_frames or FRAMES
        if folder == BETWEEN:
            frames = keyframes.SPAN
            if not self.has(BETWEEN) or options.from_scratch:
                wide = 2 * self.space.channels + 1
                self.networks.loaded[BETWEEN] = grown(self.networks.get("unet"), in_channels=wide)
                self.networks.release("unet")
        if new:
            groups = plan.unet(self.networks.get(folder), frames, options.mask or "pre", options.adaptor or "frame")
            self.networks.start_anew([LAYERS[folder]], options.seed, {LAYERS[folder]: {"plan": groups}})

    def _decoder(self, options: Any) -> Autoencoder:
        """The decoder that sees time; the encoder stays, and with it the space of the latents."""
        vae = self.networks.get("vae").to(self.machine.device)
        if options.from_scratch or not self.has(DECODER):
            told = {"vae": self.networks.config("vae"), "plan": plan.decoder(vae, options.mask or "pre")}
            self.networks.start_anew([DECODER], options.seed, {DECODER: told})
        network: VideoDecoder = self.networks.get(DECODER)
        if not options.from_scratch and not self.has(DECODER):
            network.copy_of(vae)
        part = Autoencoder(
            vae,
            framewise.encode,
            lambda _, latents: network(latents),
            l1_weight=options.l1_weight,
            kl_weight=0.0,
            scaled=False,
            flicker_weight=options.flicker_weight,
        )
        part.modules = {DECODER: network}
        prepare(part.modules.values(), options)
        return part

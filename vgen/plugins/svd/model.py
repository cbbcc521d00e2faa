"""Stable Video Diffusion as the core sees it: what it encodes, decodes, conditions on and trains (arXiv:2311.15127)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen import clip_image, convolution, diffusion, framewise, motion
from vgen.cache import read_json
from vgen.cost import Cost
from vgen.errors import UsageError
from vgen.family import Checkpoint
from vgen.generate import to_frames
from vgen.grow import grown
from vgen.latents import Space, file_hash
from vgen.machine import Machine
from vgen.model import Chain, Draw
from vgen.networks import Networks, prepare
from vgen.pixels import Autoencoder
from vgen.plugins.svd import NOISE, autoencoder, between, cost, draw, image_checkpoint, pictures, told
from vgen.plugins.svd.unet import UNet, plain_products
from vgen.text import Texts

CLASSES = {
    "vae": "diffusers:AutoencoderKLTemporalDecoder",
    "unet": "diffusers:UNetSpatioTemporalConditionModel",
    "interpolator": "diffusers:UNetSpatioTemporalConditionModel",
    "blank": "vgen.plugins.svd.blank:Blank",
    "image_encoder": "transformers:CLIPVisionModelWithProjection",
    "text_encoder": "transformers:CLIPTextModel",
}


def load(folder: Path, checkpoint: Checkpoint, machine: Machine) -> StableVideoDiffusion:
    """The model of a checkpoint folder. Networks load when they are first used."""
    return StableVideoDiffusion(folder, checkpoint, machine)


class StableVideoDiffusion:
    """The networks of one checkpoint."""

    base = ("unet",)

    def __init__(self, folder: Path, checkpoint: Checkpoint, machine: Machine) -> None:
        self.folder, self.checkpoint, self.machine = folder, checkpoint, machine
        self.networks = Networks(folder, machine, CLASSES, spare=True)
        self.chunk: int | None = None
        self.steps = between.STEPS

    @cached_property
    def space(self) -> Space:
        """The latents of this checkpoint's autoencoder; frames are apart from each other."""
        vae = self.networks.config("vae")
        stride = 2 ** (len(vae["block_out_channels"]) - 1)
        return Space(
            name="svd-vae",
            channels=vae["latent_channels"],
            strides=(1, stride, stride),
            scaling_factor=vae.get("scaling_factor", 0.18215),
            hash=file_hash(self.folder / "vae"),
        )

    @property
    def process(self) -> diffusion.EDM:
        """The noise process of the released scheduler."""
        return diffusion.edm_from_scheduler_config(self.networks.config("scheduler"))

    @property
    def takes_text(self) -> bool:
        """Whether the U-Net's context is text; else it is a picture's embedding."""
        return int(self.networks.config("unet")["in_channels"]) == self.space.channels

    @cached_property
    def texts(self) -> Texts:
        """The text encoder of a checkpoint that takes text."""
        return Texts(self.networks, "clip", self.networks.config("text_encoder")["max_position_embeddings"])

    @property
    def text_space(self) -> str | None:
        """What identifies text embeddings; None for checkpoints that know pictures only."""
        return self.texts.space if (self.folder / "text_encoder").is_dir() else None

    def embed(self, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """The embedding (L, D) of each text, as they are made."""
        return self.texts.embed(texts)

    def notes(self, options: Any) -> list[str]:
        """What a user should hear before the clip is made. Raises BadClip for a picture that cannot be read."""
        if self.takes_text:
            return self.texts.notes(f"{options.prompt} {options.temporal_prompt}")
        pictures_ = filter(None, (options.image, options.temporal_image))
        return [note for path in pictures_ for note in draw.cut_away(path, options, self.multiple)]

    def ready_to_encode(self) -> None:
        """Load the autoencoder and the image encoder."""
        self.network("vae")
        self._image_encoder()

    def _image_encoder(self) -> Any:
        return self.networks.get("image_encoder") if (self.folder / "image_encoder").is_dir() else None

    def network(self, name: str) -> Any:
        """A network by its subfolder, loaded on first use; its convolutions in time are quick on the CPU."""
        network = self.networks.get(name)
        convolution.in_time(network)
        return network

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels (B, 3, T, H, W) in [-1, 1] to streams of B clips.

        'mean' and 'logvar', unscaled; 'conditioning' (B, K, C, H', W'), the encoder's mode of the first frame with K
        draws of noise, as strong as 'noise' (B, K) says; 'embedding' (B, 2, D), CLIP's of first and last frame.
        """
        vae, pixels = self.network("vae"), pixels.to(self.machine.device)
        with self.machine.holding(vae), torch.no_grad():
            streams = framewise.encode(vae, pixels)
            drawn, streams["noise"] = pictures.noisy(pixels[:, :, 0])
            streams["conditioning"] = autoencoder.mode(vae, drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])
        if self._image_encoder() is not None:
            ends = [self.embedding(pixels[:, :, k]) for k in (0, -1)]
            streams["embedding"] = torch.cat(ends, 1)
        return streams

    def embedding(self, images: Tensor) -> Tensor:
        """CLIP's embedding (B, 1, D) of pictures (B, 3, H, W) in [-1, 1]."""
        encoder = self._image_encoder()
        with self.machine.holding(encoder), torch.no_grad():
            return clip_image.embedding(encoder, images.to(self.machine.device)).float()

    def conditioning(self, images: Tensor) -> Tensor:
        """What the U-Net sees of pictures (B, 3, H, W) in [-1, 1]: unscaled latents (B, C, H', W')."""
        vae = self.network("vae")
        with self.machine.holding(vae), torch.no_grad():
            return autoencoder.mode(vae, images.to(self.machine.device)).float()

    def beside(self, pixels: Tensor, record: Mapping[str, Any]) -> dict[str, Tensor]:
        """What else is stored of a clip (3, T, H, W): 'fps', 'motion' (its score), 'bucket', and angles of a camera.

        The bucket is what a manifest says, or by the checkpoint's table of scores.
        """
        facts = record.get("facts", {})
        score = float(facts.get("motion_score", motion.score(to_frames(pixels), Fraction(record["fps"]))))
        table = read_json(self.folder / "vgen.json").get("motion_table") or motion.default_table()
        bucket = int(facts.get("motion_bucket", motion.bucket(score, table)))
        known = {"fps": float(Fraction(record["fps"])), "motion": score, "bucket": float(bucket)}
        angles = {name: float(facts[name]) for name in ("elevation",) if name in facts}
        return {name: torch.tensor([value]) for name, value in {**known, **angles}.items()}

    def decode(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Unscaled 'latents' (B, C, T, H', W') to pixels (B, 3, T, H, W)."""
        vae = self.network("vae")
        with self.machine.holding(vae), torch.no_grad():
            return autoencoder.decode(vae, streams["latents"].to(self.machine.device), self.chunk)

    @property
    def multiple(self) -> int:
        """What height and width are multiples of, where frames of any size are padded."""
        return self.space.strides[1] * 2 ** (len(self.networks.config("unet")["block_out_channels"]) - 1)

    def between(self, ends: Tensor, options: Any, seeds: Sequence[int]) -> Tensor:
        """New frames (B, 3, 3, H, W) of pairs of frames (B, 3, 2, H, W), both in [-1, 1]; a seed for each pair."""
        return between.between(self, ends, options, seeds)

    def denoiser(self, name: str, options: Any) -> UNet:
        """The U-Net, ready for sampling."""
        part = UNet(name, self.network("unet"), self.process)
        if options.compile:
            part.network.compile()
        return part

    def draw(self, name: str, options: Any, streams: Mapping[str, Tensor]) -> Draw:
        """What the U-Net is asked for: `num_videos_per_prompt` clips, with seeds that count up from `seed`.

        'before' among the streams are the latents that the clip goes on from.
        """
        self.chunk = options.decode_chunk_size
        return draw.draw(self, options, streams.get("before"))

    def chain(self, options: Any) -> Chain:
        """The windows that a clip is made of."""
        return draw.chain(options)

    def measure(self, options: Any, frames: Tensor) -> dict[str, Any]:
        """How a long clip of frames (T, H, W, 3) of 8 bits drifts, window by window, and what made its picture."""
        drift = draw.drift(self.chain(options), frames)
        if self.takes_text or options.image:
            return drift
        card, found = image_checkpoint(options.image_checkpoint)
        return {"picture": f"{card.name} ({found.reference})", **drift}

    def cost(self, options: Any) -> Cost:
        """What a clip takes."""
        return cost.cost(self, options)

    def part(self, name: str, options: Any) -> UNet | Autoencoder:
        """A part made ready for training by `options`; its weights take gradients, all others stay as they are."""
        if name in ("decoder", "autoencoder"):
            return self._autoencoder(name, options)
        folder = "interpolator" if name == "interpolate" else "unet"
        if options.from_scratch:
            self.networks.start_anew([folder, "blank"], options.seed)
        part = UNet(name, self._grown(name), self._trained_process(name, options), folder)
        if name == "interpolate":
            part.modules = {**part.modules, "blank": self._blank()}
        part.told = partial(told.OF[name], self)
        part.dropout = options.condition_dropout
        part.mask_weight, part.mask_steps = options.mask_weight, options.mask_steps
        if self.machine.device.type == "cpu" and options.mixed_precision == "bf16":
            plain_products(part.network)
        prepare(part.modules.values(), options)
        return part

    def _trained_process(self, name: str, options: Any) -> diffusion.EDM:
        """The process of training: the part's own distribution of noise."""
        mean, std = NOISE[name]
        mean, std = options.p_mean if options.p_mean is not None else mean, options.p_std or std
        own = self.process
        return diffusion.EDM(own.sigma_min, own.sigma_max, own.rho, P_mean=mean, P_std=std)

    def _grown(self, name: str) -> Any:
        """The U-Net of a part: as it is stored, or made of the checkpoint's with the inputs that the part needs."""
        if name == "interpolate":
            stored = (self.folder / "interpolator").is_dir()
            network = self.network("interpolator" if stored else "unet")
            made = grown(network, in_channels=2 * self.space.channels + 1, num_frames=told.BETWEEN)
        else:
            network, dim = self.network("unet"), self.networks.config("unet")["addition_time_embed_dim"]
            wide = self.space.channels * (1 if name == "t2v" else 2)
            told_of = {"projection_class_embeddings_input_dim": 5 * dim} if name == "multiview" else {}
            if network.config.in_channels > wide:
                raise UsageError("--part t2v cannot start from a U-Net that takes pictures.", "Take a text checkpoint.")
            made = grown(network, in_channels=wide, **told_of)
        convolution.in_time(made)
        self.networks.loaded["interpolator" if name == "interpolate" else "unet"] = made
        return made

    def _blank(self) -> Any:
        """The learned latents that stand where frames are not known."""
        if not (self.folder / "blank").is_dir():
            from vgen.plugins.svd.blank import Blank

            self.networks.loaded.setdefault("blank", Blank(self.space.channels))
        return self.networks.get("blank")

    def _autoencoder(self, name: str, options: Any) -> Autoencoder:
        """The autoencoder; with 'decoder' its encoder stays, and with it the space of the latents."""
        if options.from_scratch:
            self.networks.start_anew(["vae"], options.seed)
        whole = name == "autoencoder"
        vae = self.network("vae")
        kl = options.kl_weight if whole else 0.0
        part = Autoencoder(
            vae, framewise.encode, autoencoder.decode, l1_weight=options.l1_weight, kl_weight=kl, scaled=whole
        )
        prepare(part.modules.values(), options)
        if not whole:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        return part

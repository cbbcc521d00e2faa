"""CogVideoX as the core sees it: what it encodes, decodes, conditions on and trains (arXiv:2408.06072)."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vgen import clips, diffusion, latents, lean
from vgen.embeddings import Embeddings
from vgen.errors import UsageError, VgenError
from vgen.family import Checkpoint
from vgen.latents import Space, file_hash, sample_posterior, scale
from vgen.machine import Machine
from vgen.model import Draw
from vgen.plugins.cogvideox import autoencoder, caching, draw, text
from vgen.plugins.cogvideox.autoencoder import Autoencoder
from vgen.plugins.cogvideox.transformer import Transformer

with lean.imports():
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

CLASSES: Mapping[str, Any] = {"vae": AutoencoderKLCogVideoX, "transformer": CogVideoXTransformer3DModel}


def load(folder: Path, checkpoint: Checkpoint, machine: Machine) -> CogVideoX:
    """The model of a checkpoint folder. Networks load when they are first used."""
    return CogVideoX(folder, checkpoint, machine)


class CogVideoX:
    """The networks of one checkpoint."""

    base = ("transformer",)

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
            with lean.imports("transformers"):
                made, info = _class(name).from_pretrained(self.folder / name, torch_dtype=self.machine.dtype, **told)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise VgenError(f"The weights of '{name}' in {self.folder} could not be loaded: {error}", mend) from error
        wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
        if wrong:
            raise VgenError(f"The weights of '{name}' in {self.folder} do not fit its config.json: {wrong[0]}.", mend)
        network: nn.Module = made
        return network

    def _random(self, name: str) -> nn.Module:
        kind, config = _class(name), self.config(name)
        network: nn.Module = kind(kind.config_class(**config)) if name == "text_encoder" else kind.from_config(config)
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
        with lean.imports("transformers"):
            from transformers import AutoTokenizer
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

    def embed(self, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """The embedding (L, D) of each text, alone, so that its bits do not depend on the others.

        The text encoder leaves memory after the last.
        """
        for one in texts:  # every store holds the empty text: for that alone the encoder need not load
            yield {"text": self._embedding(one) if one else self._cached(one)}
        self.release("text_encoder")

    def _embedding(self, one: str) -> Tensor:
        encoder = self.network("text_encoder")
        with self.machine.holding(encoder), torch.no_grad():
            return text.embed(encoder, self.tokenizer, [one], self.text_length)[0].cpu()

    @property
    def text_length(self) -> int:
        """Tokens of text that the transformer takes."""
        return int(self.config("transformer")["max_text_seq_length"])

    @cached_property
    def text_space(self) -> str:
        """What identifies text embeddings: the encoder's weights, and the length."""
        return f"t5:{file_hash(self.folder / 'text_encoder')[:16]}:{self.text_length}"

    def notes(self, options: Any) -> list[str]:
        """What a user should hear before the clip is made: words that a small text encoder does not know."""
        unknown, knows = text.unknown(self.folder / "tokenizer", f"{options.prompt} {options.negative_prompt}")
        if not unknown:
            return []
        return [f"This checkpoint does not know: {', '.join(unknown)}. It knows: {', '.join(knows)}."]

    def cached_text(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The embedding (L, D) of each text, from the disk where it is there; the encoder loads only for the others."""
        found = {one: self._cached(one) for one in texts}
        self.release("text_encoder")
        return found

    def _cached(self, one: str) -> Tensor:
        precision = str(self.machine.dtype).removeprefix("torch.")
        cache = Embeddings(None, f"{self.text_space}:{precision}")
        found = cache.get(one)
        if found is None:
            found = {"text": self._embedding(one)}
            cache.put(one, found)
        return found["text"]

    def ready_to_encode(self) -> None:
        """Load the autoencoder."""
        self.network("vae")

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels (B, 3, T, H, W) in [-1, 1] to unscaled 'mean' and 'logvar'."""
        vae = self._vae()
        with self.machine.holding(vae), torch.no_grad():
            return autoencoder.encode(vae, pixels.to(self.machine.device))

    def decode(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Unscaled 'latents' (B, C, T, H, W) to pixels (B, 3, T, H, W)."""
        vae = self._vae()
        with self.machine.holding(vae), torch.no_grad():
            return autoencoder.decode(vae, streams["latents"].to(self.machine.device))

    def _vae(self) -> Any:
        vae = self.network("vae")
        autoencoder.save_memory(vae, slicing=self.slicing, tiling=self.tiling)
        return vae

    def denoiser(self, name: str, options: Any) -> Transformer:
        """The transformer, ready for sampling."""
        network = self.network("transformer")
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
        texts = self.cached_text(wanted)
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
            window=self._window(options, shape[1]),
            skip=skip,
        )

    def _window(self, options: Any, frames: int) -> tuple[int, int] | None:
        """Size and stride, in frames of latents, of the windows that a clip of so many is denoised in; None for one."""
        if options.num_frames <= options.window:
            return None
        size = (options.window - 1) // self.space.strides[0] + 1
        size = min(frames, size + -size % self.patch_size_t)
        return size, max(1, size // 2)

    @property
    def patch_size_t(self) -> int:
        """Frames of latents in one patch."""
        return int(self.config("transformer").get("patch_size_t") or 1)

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
        return z / self.space.scaling_factor if self.config("vae").get("invert_scale_latents") else scale(self.space, z)

    def part(self, name: str, options: Any) -> Transformer | Autoencoder:
        """A part made ready for training by `options`; its weights take gradients, all others stay as they are."""
        if options.from_scratch:
            also = {"text_encoder"} if options.train_text_encoder else set()
            self.from_scratch = frozenset({"vae" if name == "autoencoder" else "transformer"} | also)
            torch.manual_seed(options.seed)
        part = self._autoencoder(options) if name == "autoencoder" else self._transformer(options)
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

    def _transformer(self, options: Any) -> Transformer:
        part = Transformer(self.network("transformer"), self.process)
        part.mask_weight, part.mask_steps = options.mask_weight, options.mask_steps
        if options.train_text_encoder:
            encoder, length = self.network("text_encoder"), self.text_length
            part.modules = {**part.modules, "text_encoder": encoder}
            part.embed = lambda captions: text.embed(encoder, self.tokenizer, captions, length)
        return part


def _class(name: str) -> Any:
    """The class of a component. T5's is imported only here: a text that was embedded before does not need it."""
    if name != "text_encoder":
        return CLASSES[name]
    from transformers import T5EncoderModel

    return T5EncoderModel


def _recompute(network: Any) -> None:
    """Turn gradient checkpointing on, in diffusers' words or in transformers'."""
    if hasattr(network, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()
    else:
        network.gradient_checkpointing_enable({"use_reentrant": False})

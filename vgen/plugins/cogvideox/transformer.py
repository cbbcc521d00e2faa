"""CogVideoX's expert transformer (CogVideoXTransformer3DModel) as a denoiser: positions, conditions, loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vgen import diffusion, lean, packing
from vgen.diffusion import Kind, Process
from vgen.emphasis import emphasis
from vgen.errors import VgenError
from vgen.plugins.cogvideox import packed
from vgen.plugins.cogvideox.pictures import Pictures

with lean.imports():
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

Embed = Callable[[list[str]], Tensor]


class Transformer:
    """The part 'transformer'. Latents are (B, C, T, H, W), scaled; the network itself takes (B, T, C, H, W)."""

    name = "transformer"
    stream = "latents"
    output: Kind = "v"

    def __init__(self, network: Any, process: Process) -> None:
        self.network, self.process = network, process
        self.modules: Mapping[str, nn.Module] = {"transformer": network}
        self.embed: Embed | None = None  # set where a text encoder trains along
        self.timestep = 0  # the last one asked for; diffusers' caching hooks look at it
        self.mask_weight, self.mask_steps = 0.0, 0
        self.pictures: Pictures | None = None  # set where clips start from pictures
        self._rotary = lru_cache(maxsize=8)(self._rotary_of)

    def predict(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """v of noisy latents x (B, C, T, H, W) at times t (B,). `cond`: text (B, L, D), perhaps image, shaped as x."""
        given = torch.cat([x, cond["image"]], 1) if "image" in cond else x
        network, config = self.network, self.network.config
        dtype = network.patch_embed.proj.weight.dtype  # network.dtype walks through all of it to find out
        given = given.transpose(1, 2).to(dtype)
        self.timestep = 0 if t.is_meta else int(t[0])
        ofs = given.new_full((1,), 2.0) if config.ofs_embed_dim else None
        # to enter it is to walk the whole network, and to import torch.compile's tracer: not for nothing
        with network.cache_context("cond_uncond") if network.is_cache_enabled else nullcontext():
            out = network(
                hidden_states=given,
                encoder_hidden_states=cond["text"].to(dtype),
                timestep=t,
                ofs=ofs,
                image_rotary_emb=self._rotary(x.shape[2:], x.device),
                return_dict=False,
            )[0]
        v: Tensor = out.transpose(1, 2).to(x.dtype)
        return v

    def predict_pack(self, x: list[Tensor], t: Tensor, cond: Mapping[str, Any]) -> list[Tensor]:
        """v of clips of any shapes, each (1, C, T, H, W), at times t (n,). `cond`: text (n, L, D), perhaps images."""
        dtype = self.network.patch_embed.proj.weight.dtype
        given = [torch.cat(pair, 1) for pair in zip(x, cond["image"], strict=True)] if "image" in cond else x
        ofs = x[0].new_full((1,), 2.0) if self.network.config.ofs_embed_dim else None
        out = packed.predict(
            self.network,
            [one.transpose(1, 2).to(dtype) for one in given],
            cond["text"].to(dtype),
            t,
            [self._rotary(one.shape[2:], one.device) for one in x],
            ofs,
        )
        return [v.transpose(1, 2).to(one.dtype) for v, one in zip(out, x, strict=True)]

    def _rotary_of(self, size: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Rotary positions of latents of `size` (T, H, W), as the released pipelines lay them out."""
        config = self.network.config
        if not config.use_rotary_positional_embeddings:
            return None
        p, p_t = config.patch_size, config.patch_size_t
        num_frames, rows, columns = size[0], size[1] // p, size[2] // p
        native = (config.sample_height // p, config.sample_width // p)
        if p_t is None:
            where: dict[str, Any] = {"crops_coords": _crop((rows, columns), native), "temporal_size": num_frames}
        else:
            where = {"crops_coords": None, "temporal_size": -(-num_frames // p_t), "grid_type": "slice"}
            where["max_size"] = (max(rows, native[0]), max(columns, native[1]))
        made: Any = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim, grid_size=(rows, columns), device=device, **where
        )
        cos, sin = made
        return cos, sin

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """The v-loss of a batch: 'latents' (B, C, T, H, W) scaled, 'text' (B, L, D) or 'captions', 'mask' if any.

        Equal to the squared error of x0 weighted by 1 / (1 - abar) (arXiv:2408.06072, section 2). The latents, and the
        masks, of a pack of clips of several shapes are lists of (1, C, T, H, W).
        """
        cond: dict[str, Any] = {"text": self.embed(batch["captions"]) if self.embed is not None else batch["text"]}
        share = batch.get("share", (0, 1))
        if isinstance(batch["latents"], list):
            return self._loss_of_pack(batch, cond, generator, share)
        x = self._filled(batch["latents"])
        if self.pictures is not None:
            self._check_size(x)
            cond["image"] = torch.cat([self.pictures.of(one, generator) for one in x.split(1)])
        weight = emphasis(batch, self.mask_weight, self.mask_steps, self._filled)
        return diffusion.loss(self.predict, self.process, self.output, x, cond, generator, weight=weight, share=share)

    def _loss_of_pack(
        self, batch: Mapping[str, Any], cond: dict[str, Any], generator: torch.Generator, share: Any
    ) -> Tensor:
        device = cond["text"].device
        clips = [self._filled(one.to(device)) for one in batch["latents"]]
        if self.pictures is not None:
            for one in clips:
                self._check_size(one)
            cond["image"] = [self.pictures.of(one, generator) for one in clips]
        masks = [{**batch, "mask": one.to(device)} for one in batch.get("mask", [])]
        found = [emphasis(one, self.mask_weight, self.mask_steps, self._filled) for one in masks]
        weights = [one for one in found if one is not None] or None  # all of them fade at once
        return packing.loss(
            self.predict_pack, self.process, self.output, clips, cond, generator, weights=weights, share=share
        )

    def _check_size(self, x: Tensor) -> None:
        """Raises VgenError for latents that a learned table of positions has no places for."""
        config = self.network.config
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        native = (frames, config.sample_height, config.sample_width)
        if config.use_learned_positional_embeddings and tuple(x.shape[2:]) != native:
            raise VgenError(
                f"This checkpoint has learned positions for latents of {native} and no others; a clip has"
                f" {tuple(x.shape[2:])}.",
                f"Encode {config.sample_frames} frames at the checkpoint's own size.",
            )

    def _filled(self, x: Tensor) -> Tensor:
        """x (B, C, T, H, W) with its first frame repeated until T fills whole patches in time."""
        return torch.cat([x[:, :, :1]] * (-x.shape[2] % (self.network.config.patch_size_t or 1)) + [x], 2)


def _crop(size: tuple[int, int], native: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The part of the native grid that a grid of another shape is laid on: scaled to fit, centred."""
    (rows, columns), (native_rows, native_columns) = size, native
    if rows / columns > native_rows / native_columns:
        high, wide = native_rows, round(native_rows / rows * columns)
    else:
        high, wide = round(native_columns / columns * rows), native_columns
    top, left = round((native_rows - high) / 2.0), round((native_columns - wide) / 2.0)
    return (top, left), (top + high, left + wide)

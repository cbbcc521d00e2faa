"""The networks of a checkpoint folder in diffusers' layout: configurations, loading on first use, training."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from vgen import lean
from vgen.errors import VgenError
from vgen.family import fetch
from vgen.machine import Machine
from vgen.options import LoraOptions

MEND = "Fetch the checkpoint again, or train it first (--from-scratch)."


class Networks:
    """The components of a folder, each in the subfolder of its name; at most one network of each is in memory.

    On a machine of the meta device they are made of their configurations alone, without weights.

    `classes` names the class of each, as in {"vae": "diffusers:AutoencoderKL"}: a library is imported when a network
    of it is first used. With `spare`, files may hold weights that a network does not take.
    """

    def __init__(self, folder: Path, machine: Machine, classes: Mapping[str, str], *, spare: bool = False) -> None:
        self.folder, self.machine, self.classes = folder, machine, classes
        self.wrong = ("missing_keys", "mismatched_keys", *(() if spare else ("unexpected_keys",)))
        self.from_scratch: frozenset[str] = frozenset()  # components that start from random weights
        self.configs: dict[str, Mapping[str, Any]] = {}  # of those that are not as the folder has them
        self.loaded: dict[str, Any] = {}

    def config(self, name: str) -> dict[str, Any]:
        """The configuration of a component, without loading it."""
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        read: dict[str, Any] = json.loads((self.folder / name / file).read_text())
        return read

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the text encoder."""
        with lean.imports("transformers"):
            from transformers import AutoTokenizer
        return AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)

    def get(self, name: str) -> Any:
        """A network by its subfolder, without gradients, loaded on first use. Raises VgenError."""
        if name not in self.loaded:
            hollow = self.machine.device.type == "meta"
            make = self._hollow if hollow else self._random if name in self.from_scratch else self._pretrained
            self.loaded[name] = make(name).eval().requires_grad_(False)
        return self.loaded[name]

    def release(self, name: str) -> None:
        """Give back the memory of a network."""
        if self.loaded.pop(name, None) is not None:
            gc.collect()
            if self.machine.device.type == "cuda":
                torch.cuda.empty_cache()

    def start_anew(
        self, names: Iterable[str], seed: int, configs: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    ) -> None:
        """Have these networks begin with random weights, drawn from `seed` in the order of their first use.

        `configs` has configurations that replace those of the folder, by name.
        """
        self.from_scratch, self.configs = frozenset(names), dict(configs)
        torch.manual_seed(seed)

    def _library(self, name: str) -> str:
        return self.classes[name].partition(":")[0]

    def _class(self, name: str) -> Any:
        with lean.imports(self._library(name)):
            return fetch(self.classes[name])

    def _pretrained(self, name: str) -> nn.Module:
        told: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        kind = self._class(name)
        try:
            with lean.imports("transformers"):
                made, info = kind.from_pretrained(self.folder / name, torch_dtype=self.machine.dtype, **told)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise VgenError(f"The weights of '{name}' in {self.folder} could not be loaded: {error}", MEND) from error
        wrong = [key for these in self.wrong for key in info[these]]
        if wrong:
            raise VgenError(f"The weights of '{name}' in {self.folder} do not fit its config.json: {wrong[0]}.", MEND)
        network: nn.Module = made
        return network

    def _hollow(self, name: str) -> nn.Module:
        """A network without weights, of which only sizes are asked."""
        with torch.device("meta"):
            made = self._random(name)
        return made.to(device="meta", dtype=self.machine.dtype)  # some are made on the CPU all the same

    def _random(self, name: str) -> nn.Module:
        kind, config = self._class(name), dict(self.configs[name]) if name in self.configs else self.config(name)
        transformers = self._library(name) == "transformers"
        network: nn.Module = kind(kind.config_class(**config)) if transformers else kind.from_config(config)
        return network


def prepare(networks: Iterable[Any], options: Any) -> None:
    """Make networks ready for training as `options` (TrainOptions) say: their weights take gradients.

    Under an adapter (LoraOptions) they take none, and keep the precision in which they were loaded.
    """
    frozen = isinstance(options, LoraOptions)
    for network in networks:
        network.requires_grad_(not frozen).train()
        if options.dtype == "auto" and not frozen:
            network.float()  # small steps vanish in bf16; --mixed-precision makes fp32 fast
        if options.gradient_checkpointing:
            recompute(network)
        if options.compile:
            halves = [network.encoder, network.decoder] if hasattr(network, "decoder") else [network]
            for called in halves:  # of an autoencoder only the halves are ever called
                called.compile()


def recompute(network: Any) -> None:
    """Turn gradient checkpointing on, in diffusers' words or in transformers'."""
    if hasattr(network, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()
    else:
        network.gradient_checkpointing_enable({"use_reentrant": False})

"""The contract: what the core asks of a loaded family. Nothing here is inherited; agreeing names are enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Generator, Tensor, nn

from vgen.diffusion import Conditions, Denoise, Kind, Process
from vgen.latents import Space
from vgen.machine import Machine
from vgen.samplers import Guidance, Step

OnStep = Callable[[str, int, int], None]  # the name of the act, how many are done, of how many


class Sampler(Protocol):
    """A function of `samplers`, with whatever is its own (noise, eta) filled in."""

    def __call__(
        self, denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, on_step: Callable[[Step], None]
    ) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Draw:
    """What one denoiser is asked for. The family makes it from the options.

    `x` is (B, C, T, H, W) at times[0]; `cond` and `uncond` hold the conditions, (B, ...) each, with and without;
    `window` is (size, stride) in frames of x where the clip is longer than the network takes; the first `skip`
    frames of the result only fill up a patch in time and are dropped. `batched` asks for both passes at once.
    """

    x: Tensor
    times: Tensor
    cond: Conditions
    uncond: Conditions
    guidance: Guidance
    sampler: Sampler
    window: tuple[int, int] | None = None
    skip: int = 0
    batched: bool = True


@dataclass(frozen=True)
class Chain:
    """A clip made window after window: `count` windows of `size` frames of latents, cut to `frames` at the end.

    Each begins with the last `overlap` frames of the one before.
    """

    count: int
    size: int
    overlap: int
    frames: int


class Part(Protocol):
    """One network of a loaded model, or several that train together.

    A part may also have `state`, named tensors that its loss changes in place and that a resume brings back, and
    `settle()`, called before each export.
    """

    name: str
    modules: Mapping[str, nn.Module]  # what trains, by the subfolder it is saved in

    def loss(self, batch: Mapping[str, Any], generator: Generator) -> Tensor:
        """The training loss of one batch, a scalar. Most parts return `diffusion.loss`."""
        ...


class Denoiser(Part, Protocol):
    """A part that diffuses. One that makes several streams at once has `apart(made)` -> them by name, unscaled."""

    process: Process
    output: Kind  # what predict means
    stream: str  # the stream of the latent file that it makes

    def predict(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """One call of the network, raw output, of the shape of x."""
        ...


class Interpolator(Protocol):
    """What the verb interpolate asks of a loaded model. One that can make a frame of any time has `at` instead.

    `at(ends, places, options)`, with `places` between 0 and 1, one for each new frame, gives the same as `between`.
    """

    machine: Machine
    steps: int  # frames made between two; more are made between those in turn. None with `at`
    multiple: int  # of height and width; other sizes are padded, and cut again

    def between(self, ends: Tensor, options: Any, seeds: Sequence[int]) -> Tensor:
        """New frames (B, 3, steps, H, W), evenly spaced in time, of pairs of frames (B, 3, 2, H, W), one seed for each.

        Both in [-1, 1]. It loads networks when first called, and brings them to the device.
        """
        ...


class Model(Protocol):
    """What the core asks of a loaded family. Pixels are (B, 3, T, H, W) in [-1, 1].

    A model that trains on packs of clips of several shapes also has `tokens(shape)`: the tokens of a clip whose latents
    are (C, T, H, W), text included. The loss of its part then takes a list of (1, C, T, H, W) for 'latents'.
    One that makes long clips has `chain(options)` -> Chain; `draw` is then given, as the stream 'before', all unscaled
    latents that the next window goes on from. One that stores more of a clip than `encode` makes has
    `beside(pixels, record)` -> streams of one clip (3, T, H, W). One with figures to tell of a finished clip has
    `measure(options, frames)`, frames (T, H, W, 3) of 8 bits.
    One of which not every base part runs for all options has `start(options)` -> (streams that need not be made, names
    of the denoisers that run). One that says what a clip takes has `cost(options)` -> cost.Cost, where it was loaded
    for the meta device. One that takes adapters has its networks in `networks` (networks.Networks), under the names of
    its base parts.
    """

    space: Space
    text_space: str | None  # identifies text embeddings; None without a text encoder
    machine: Machine
    base: tuple[str, ...]  # the denoisers that `sample` runs, in order

    def ready_to_encode(self) -> None:
        """Load what `encode` needs: loading changes torch's default dtype for all threads, so none may run yet."""
        ...

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels to streams (B, ...), unscaled: the posterior's 'mean' and 'logvar', or what the family stores."""
        ...

    def decode(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Streams (B, ...), unscaled, to pixels."""
        ...

    def embed(self, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Text embeddings as they are made, one dict of tensors for each text; the encoder leaves memory at the end."""
        ...

    def notes(self, options: Any) -> list[str]:
        """What a user should hear before a clip is made: unknown words, say."""
        ...

    def draw(self, name: str, options: Any, streams: Mapping[str, Tensor]) -> Draw:
        """What the denoiser `name` is asked for, given the streams of the parts before it."""
        ...

    def denoiser(self, name: str, options: Any) -> Denoiser:
        """A denoiser made ready for sampling as `options` say. Whoever runs it brings its modules to the device."""
        ...

    def part(self, name: str, options: Any) -> Part:
        """A part ready for training: gradients on, random weights where asked."""
        ...

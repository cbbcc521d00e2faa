"""Noise processes, what a network's output means, and the one training loss.

The letters, here and in `samplers`: x0 clean data, e standard normal noise, z = a x0 + s e the noisy data at time t,
abar = a^2 where a^2 + s^2 = 1, sigma = s / a, lambda = log(a^2 / s^2). Data are (B, ...), mostly (B, C, T, H, W).
Times are float tensors, () or (B,), on the CPU; what is computed from them keeps at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Generator, Tensor

from vgen.errors import UsageError, VgenError, did_you_mean

Kind = Literal["eps", "v", "x0", "flow"]
Spacing = Literal["trailing", "leading", "linspace"]
Conditions = Mapping[str, Tensor]
Predict = Callable[[Tensor, Tensor, Conditions], Tensor]
Denoise = Callable[[Tensor, Tensor], Tensor]


class Process(Protocol):
    """How data turn into noise. Time grows with the noise; what it counts is the process's own affair."""

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) at the times t, of their shape, in float64."""
        ...

    def input_scale(self, t: Tensor) -> Tensor:
        """What z is multiplied by before the network sees it, of the shape of t."""
        ...

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told of t, of its shape."""
        ...

    def training_time(self, u: Tensor) -> Tensor:
        """The time below which a share u, in (0, 1), of the training draws lie."""
        ...

    def times(self, steps: int) -> Tensor:
        """Times at which a sampler of so many steps calls the network, (steps,), descending.

        The end, a = 1 and s = 0, is not among them: every sampler goes there by itself.
        """
        ...


# --- processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Discrete:
    """A variance-preserving process of N steps (Ho et al. 2020): t is a whole number from 0 to N - 1.

    `abar` is (N,), float64. `spacing` and `offset` choose the sampling times by the rules of diffusers' schedulers
    (Lin et al. 2023, table 2). Where N is no multiple of the steps, diffusers steps to t - N // steps, which is not
    its next time; here a sampler always steps to the next time. The last step goes to clean data ("set_alpha_to_one").
    """

    abar: Tensor
    spacing: Spacing = "leading"
    offset: int = 0

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.abar[t.long()]
        return abar.sqrt(), (1 - abar).sqrt()

    def input_scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def training_time(self, u: Tensor) -> Tensor:
        return (u * len(self.abar)).floor()

    def times(self, steps: int) -> Tensor:
        """See `Process.times`. Raises UsageError where the schedule has no room for so many steps."""
        n = len(self.abar)
        i = torch.arange(_positive(steps), dtype=torch.float64)
        if self.spacing == "trailing":
            t = (n - i * (n / steps)).round() - 1
        elif self.spacing == "leading":
            t = (i * (n // steps)).flip(0) + self.offset
        else:
            t = torch.linspace(0, n - 1, steps, dtype=torch.float64).round().flip(0)
        if steps > n or t[0] >= n:
            most = n if self.spacing != "leading" or not self.offset else n // 2
            raise UsageError(
                f"{steps} steps do not fit a schedule of {n} ({self.spacing}, offset {self.offset}).",
                f"Set --num-inference-steps between 1 and {most}.",
            )
        return t


@dataclass(frozen=True)
class EDM:
    """A variance-exploding process (Karras et al. 2022): t is sigma, z = x0 + sigma e.

    Training draws ln sigma ~ N(P_mean, P_std^2). The network sees z / sqrt(1 + sigma^2) and .25 ln sigma. With output
    "v" this is SVD's preconditioning c_skip = 1 / (sigma^2 + 1), c_out = -sigma / sqrt(sigma^2 + 1), and the plain
    mean square error on v is its loss with weight (1 + sigma^2) / sigma^2.
    """

    sigma_min: float = 0.002
    sigma_max: float = 700.0
    rho: float = 7.0
    P_mean: float = 1.0
    P_std: float = 1.6

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.double()
        return torch.ones_like(sigma), sigma

    def input_scale(self, t: Tensor) -> Tensor:
        return (1 + t**2).rsqrt()

    def network_time(self, t: Tensor) -> Tensor:
        return 0.25 * t.log()

    def training_time(self, u: Tensor) -> Tensor:
        return (self.P_mean + self.P_std * torch.special.ndtri(u)).exp()

    def times(self, steps: int) -> Tensor:
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        ramp = torch.linspace(0, 1, _positive(steps), dtype=torch.float64)
        return (high + ramp * (low - high)) ** self.rho


@dataclass(frozen=True)
class Cosine:
    """The continuous cosine process of VDM (Kingma et al. 2021; Ho et al. 2022): t in [0, 1].

    lambda(t) = -2 ln tan(a t + b) falls from lambda_max to lambda_min. The network is told 1000 t.
    """

    lambda_min: float = -20.0
    lambda_max: float = 20.0

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda(t), float64."""
        b = math.atan(math.exp(-self.lambda_max / 2))
        a = math.atan(math.exp(-self.lambda_min / 2)) - b
        return -2 * (a * t.double() + b).tan().log()

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self.log_snr(t)
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def input_scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def network_time(self, t: Tensor) -> Tensor:
        return 1000 * t

    def training_time(self, u: Tensor) -> Tensor:
        return u

    def times(self, steps: int) -> Tensor:
        return _evenly(steps)


@dataclass(frozen=True)
class Flow:
    """The straight path of flow matching (Lipman et al. 2023): t in [0, 1], a = 1 - t, s = t. Told as 1000 t."""

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t.double(), t.double()

    def input_scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def network_time(self, t: Tensor) -> Tensor:
        return 1000 * t

    def training_time(self, u: Tensor) -> Tensor:
        return u

    def times(self, steps: int) -> Tensor:
        return _evenly(steps)


def _positive(steps: int) -> int:
    if steps < 1:
        raise UsageError(f"{steps} steps cannot be taken.", "Set --num-inference-steps to 1 or more.")
    return steps


def _evenly(steps: int) -> Tensor:
    """1, 1 - 1/steps, ..., 1/steps."""
    return torch.arange(_positive(steps), 0, -1, dtype=torch.float64) / steps


# --- discrete schedules -------------------------------------------------------------------------------------------


def scaled_linear(start: float = 8.5e-4, end: float = 1.2e-2, n: int = 1000) -> Tensor:
    """abar of Stable Diffusion's schedule, (n,): beta is linear in its square root."""
    return (1 - torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2).cumprod(0)


def linear(start: float = 1e-4, end: float = 2e-2, n: int = 1000) -> Tensor:
    """abar of DDPM's and DiT's schedule, (n,): beta is linear."""
    return (1 - torch.linspace(start, end, n, dtype=torch.float64)).cumprod(0)


def snr_shift(abar: Tensor, k: float) -> Tensor:
    """The same schedule with every SNR divided by k (CogVideoX: 3 for 2B, 1 for 5B)."""
    return abar / (k + (1 - k) * abar)


def zero_terminal_snr(abar: Tensor) -> Tensor:
    """sqrt(abar) moved and stretched so that the last is 0 and the first stays (Lin et al. 2023, algorithm 1)."""
    root = abar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def cogvideox(k: float = 1.0) -> Discrete:
    """CogVideoX's process: Stable Diffusion's schedule, shifted first, then brought to zero terminal SNR."""
    return Discrete(zero_terminal_snr(snr_shift(scaled_linear(), k)), "trailing")


_SCHEDULES = {"scaled_linear": scaled_linear, "linear": linear}
_KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# What else a scheduler may ask for, and the only value of it that a Discrete process can honour.
_PLAIN = {"trained_betas": None, "clip_sample": False, "thresholding": False, "use_karras_sigmas": False}
_EDIT = "Edit the checkpoint's scheduler/scheduler_config.json, or take another checkpoint."
_LINSPACE = ("Euler", "DPMSolver", "LMS", "Heun", "KDPM2", "UniPC", "DEIS")  # their spacing where none is written


def from_scheduler_config(config: Mapping[str, Any]) -> Discrete:
    """The process that a diffusers `scheduler_config.json` describes.

    Raises VgenError for a setting that it could not follow. `set_alpha_to_one` is not read: see `Discrete`.
    """
    for key, value in _PLAIN.items():
        if config.get(key, value) not in (value, None):
            raise VgenError(f"The scheduler asks for {key} = {config[key]!r}, which vgen does not do.", _EDIT)
    name = _setting(config, "beta_schedule")
    if name not in _SCHEDULES:
        raise VgenError(f"vgen does not know the noise schedule '{name}'.", did_you_mean(name, _SCHEDULES))
    first, last, n = (_setting(config, key) for key in ("beta_start", "beta_end", "num_train_timesteps"))
    abar = snr_shift(_SCHEDULES[name](first, last, n), config.get("snr_shift_scale") or 1.0)
    if config.get("rescale_betas_zero_snr"):
        abar = zero_terminal_snr(abar)
    usual = "linspace" if str(config.get("_class_name", "")).startswith(_LINSPACE) else "leading"
    spacing = config.get("timestep_spacing", usual)
    if spacing not in get_args(Spacing):
        raise VgenError(f"vgen does not know the spacing '{spacing}'.", did_you_mean(spacing, get_args(Spacing)))
    return Discrete(abar, spacing, config.get("steps_offset", 0))


def edm_from_scheduler_config(config: Mapping[str, Any]) -> EDM:
    """The process that a diffusers `scheduler_config.json` of a network with continuous noise describes.

    Raises VgenError for a setting that it could not follow.
    """
    asked = {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True}
    for key, value in asked.items():
        if config.get(key) != value:
            raise VgenError(f"The scheduler asks for {key} = {config.get(key)!r}; vgen runs {value!r}.", _EDIT)
    return EDM(sigma_min=float(_setting(config, "sigma_min")), sigma_max=float(_setting(config, "sigma_max")))


def kind_of_scheduler_config(config: Mapping[str, Any]) -> Kind:
    """What the network's output means by a diffusers `scheduler_config.json`. Raises VgenError."""
    name = config.get("prediction_type", "epsilon")
    if name not in _KINDS:
        raise VgenError(f"vgen does not know the prediction type '{name}'.", did_you_mean(name, _KINDS))
    return _KINDS[name]


def _setting(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise VgenError(f"The scheduler's settings have no '{key}'.", _EDIT)
    return config[key]


# --- what the output means ----------------------------------------------------------------------------------------
#
#   eps    e
#   v      (a e - s x0) / r with r = sqrt(a^2 + s^2): Salimans & Ho's v where r = 1, SVD's network where a = 1
#   x0     x0
#   flow   e - x0


def target(kind: Kind, x0: Tensor, e: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """What the network should have said. All of one shape, or broadcastable."""
    if kind == "eps":
        return e
    if kind == "v":
        return (a * e - s * x0) / _norm(a, s)
    if kind == "x0":
        return x0
    return e - x0


def to_x0(output: Tensor, kind: Kind, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The clean data that an output at z = x stands for. Affine in `output`: guidance may act on either."""
    if kind == "eps":
        return (x - s * output) / a
    if kind == "v":
        r = _norm(a, s)
        return (a / r * x - s * output) / r
    if kind == "x0":
        return output
    return (x - s * output) / (a + s)


def to_eps(x: Tensor, x0: Tensor, a: Tensor | float, s: Tensor | float) -> Tensor:
    """The noise in z = x, given its clean data; s > 0."""
    return (x - a * x0) / s


def _norm(a: Tensor, s: Tensor) -> Tensor:
    return (a * a + s * s).sqrt()


# --- the seam -----------------------------------------------------------------------------------------------------


def levels(process: Process, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(a, s) at t, () or (B,), shaped to multiply x, on its device, in float32 or in x's dtype if that is wider."""
    a, s = process.level(t)
    return _beside(a, x), _beside(s, x)


def _beside(value: Tensor, x: Tensor) -> Tensor:
    # the dtype first: some devices have no float64
    wide = value.to(torch.promote_types(x.dtype, torch.float32)).to(x.device)
    return wide.reshape(-1, *[1] * (x.ndim - 1))


def add_noise(process: Process, x0: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """z = a x0 + s e at the times t, () or (B,)."""
    a, s = levels(process, t, x0)
    return a * x0 + s * e


def initial(process: Process, t: Tensor, e: Tensor) -> Tensor:
    """Where sampling starts at time t: noise as wide as z is there for data of unit variance."""
    a, s = levels(process, t, e)
    return e * _norm(a, s)


def call(predict: Predict, process: Process, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    """The network's raw output at z = x and t, () or (B,). `predict` gets (B,) float32 times and casts as it needs."""
    told = process.network_time(t).to(torch.float32).to(x.device).expand(len(x))
    return predict(_beside(process.input_scale(t), x) * x, told, cond)


def denoiser(predict: Predict, process: Process, kind: Kind, cond: Conditions) -> Denoise:
    """denoise(x, t) -> x0, the one function that samplers and wrappers know.

    Raises VgenError for output "eps" where sampling starts without signal: the noise says nothing about the data.
    """
    if kind == "eps" and process.level(process.times(2))[0][0] == 0:
        raise VgenError("A network that predicts noise cannot start from zero signal.", "Its output should be 'v'.")

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = levels(process, t, x)
        return to_x0(call(predict, process, x, t, cond), kind, x, a, s)

    return denoise


# --- training -----------------------------------------------------------------------------------------------------


def sample_times(process: Process, n: int, generator: Generator, share: tuple[int, int] | None = (0, 1)) -> Tensor:
    """Training times of n clips, (n,), one from each of n strata of the process's distribution, in random order.

    `share` = (r, R) draws from the r-th of R equal parts only: CogVideoX's explicit uniform sampling, a micro-batch as
    r; over all parts the distribution is the process's own, and the loss varies less. None draws each by itself.
    """
    if share is None:
        u = torch.rand(n, generator=generator, dtype=torch.float64)
    else:
        strata = torch.randperm(n, generator=generator) + share[0] * n
        u = (strata + torch.rand(n, generator=generator, dtype=torch.float64)) / (n * share[1])
    return process.training_time(u.clamp(2**-32, 1 - 2**-32))  # rounding could reach the ends, which have no time


def loss(
    predict: Predict,
    process: Process,
    kind: Kind,
    x0: Tensor,
    cond: Conditions,
    generator: Generator,
    *,
    weight: Tensor | None = None,
    share: tuple[int, int] | None = (0, 1),
) -> Tensor:
    """Mean square error on the network's own target, a scalar.

    For "v" it equals |x0hat - x0|^2 / (1 - abar), the loss of CogVideoX. `weight`, broadcastable to x0, multiplies
    the error of each element before the mean (an object mask, say; 1 changes nothing). Times and noise come from
    `generator`, which lives on the CPU, so that a run repeats on any device; `share` as in `sample_times`.
    """
    t = sample_times(process, len(x0), generator, share)
    e = torch.randn(x0.shape, generator=generator).to(x0.device)
    a, s = levels(process, t, x0)
    output = call(predict, process, a * x0 + s * e, t, cond)
    error = (output - target(kind, x0, e, a, s)) ** 2
    return (error if weight is None else error * weight).mean()

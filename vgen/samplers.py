"""Samplers as flat functions over denoise(x, t) -> x0, and the wrappers that change what denoise says.

A sampler takes x at times[0] (see `diffusion.initial`) and the descending `times` of the process, and returns clean
data: after the last time it goes to a = 1, s = 0 by itself. To change a given clip, add noise up to a later of the
`times` and sample from there (SDEdit). x is float32 as a rule; the coefficients are computed in float64. Data are
(B, C, T, H, W) where frames matter, any shape otherwise. Letters as in `diffusion`; an, sn are the next a and s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from vgen.diffusion import Conditions, Denoise, Kind, Predict, Process, denoiser, to_eps
from vgen.errors import VgenError

Noise = Callable[[], Tensor]  # gives standard normal noise of the shape of x, anew at each call
Guidance = float | Tensor | Callable[[Tensor], float | Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """What a sampler tells after each step: `index` of `steps`, the new x, and the x0 it was made from."""

    index: int
    steps: int
    x: Tensor
    x0: Tensor


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class _Move:
    """One step from (a, s) at time t to (an, sn); `snr` is SNR / next SNR = exp(-2h), 0 from pure noise or to data."""

    index: int
    t: Tensor
    a: float
    s: float
    an: float
    sn: float

    @property
    def snr(self) -> float:
        return (self.a * self.sn / (self.s * self.an)) ** 2

    @property
    def half_log_snr(self) -> float:
        """L = ln(a / s), -inf from pure noise."""
        return math.log(self.a / self.s) if self.a else -math.inf

    @property
    def last(self) -> bool:
        return self.sn == 0


def _moves(times: Tensor, process: Process) -> Iterator[_Move]:
    a, s = (level.tolist() for level in process.level(times))
    for i, t in enumerate(times):
        yield _Move(i, t, a[i], s[i], [*a, 1.0][i + 1], [*s, 0.0][i + 1])


def _tell(on_step: OnStep | None, move: _Move, times: Tensor, x: Tensor, x0: Tensor) -> None:
    if on_step is not None:
        on_step(Step(move.index, len(times), x, x0))


# --- samplers -----------------------------------------------------------------------------------------------------


def ddim(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    process: Process,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, equation 12): `eta` 0 is deterministic, 1 is DDPM.

    Raises VgenError for an eta outside 0 to 1, or above 0 without noise.
    """
    if not 0 <= eta <= 1:
        raise VgenError(f"DDIM's eta is from 0 to 1, not {eta}.")
    if eta and noise is None:
        raise VgenError("DDIM with eta above 0 adds noise, and was given none.", "Pass noise=clip_noise(...).")
    for m in _moves(times, process):
        x0 = denoise(x, m.t)
        n = eta * m.sn * math.sqrt(1 - m.snr)
        x = m.an * x0 + math.sqrt(m.sn**2 - n**2) * to_eps(x, x0, m.a, m.s)
        if n and noise is not None:
            x = x + n * noise()
        _tell(on_step, m, times, x, x0)
    return x


def ddim_invert(
    denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, on_step: OnStep | None = None
) -> Tensor:
    """The noise at times[0] from which `ddim` makes the clean data x, nearly: its steps run upward.

    Each step takes e at the latent it starts from, told that latent's own time; the data, which have none, are told
    the lowest. The way back takes e at the other end of each step, so the error falls with the length of the steps.
    """
    upward = list(_moves(times, process))[::-1]
    own = upward[0]
    for i, m in enumerate(upward):
        x0 = denoise(x, own.t)
        e = to_eps(x, x0, own.a, own.s)
        x = m.a * (x - m.sn * e) / m.an + m.s * e
        own = m
        if on_step is not None:
            on_step(Step(i, len(times), x, x0))
    return x


def euler(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, on_step: OnStep | None = None) -> Tensor:
    """Euler's method on dx/dsigma = (x - x0) / sigma (Karras et al. 2022), SVD's sampler.

    Where a = 1 (EDM), and in t where a = 1 - t (Flow), this is the same step as DDIM's, so it is DDIM.
    """
    return ddim(denoise, x, times, process, on_step=on_step)


def heun(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, on_step: OnStep | None = None) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 1), in x / a and sigma = s / a; two calls of the network a step.

    The last step, and a first one from zero signal, where sigma is infinite, are Euler's.
    """
    for m, t_next in zip(_moves(times, process), [*times[1:], None], strict=True):
        x0 = denoise(x, m.t)
        e = to_eps(x, x0, m.a, m.s)
        x = m.an * x0 + m.sn * e
        if t_next is not None and m.a:
            e_next = to_eps(x, denoise(x, t_next), m.an, m.sn)
            x = x + (m.sn - m.an * m.s / m.a) * (e_next - e) / 2
        _tell(on_step, m, times, x, x0)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++(2M), multistep and deterministic (Lu et al. 2022, algorithm 2)."""
    before: tuple[float, Tensor] | None = None
    for m in _moves(times, process):
        x0 = denoise(x, m.t)
        d = _extrapolate(x0, before, m)
        x = (m.sn / m.s) * x + m.an * (1 - math.sqrt(m.snr)) * d
        before = (m.half_log_snr, x0)
        _tell(on_step, m, times, x, x0)
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    process: Process,
    *,
    noise: Noise,
    on_step: OnStep | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5), the sampler of CogVideoX-5B.

    One draw of noise a step, none at the last. diffusers' CogVideoXDPMScheduler draws twice at every step but the
    first and the last, throws the first draw away, and draws once at the last to multiply it by zero.
    """
    before: tuple[float, Tensor] | None = None
    for m in _moves(times, process):
        x0 = denoise(x, m.t)
        d = _extrapolate(x0, before, m)
        x = (m.sn / m.s) * math.sqrt(m.snr) * x + m.an * (1 - m.snr) * d
        if not m.last:
            x = x + m.sn * math.sqrt(1 - m.snr) * noise()
        before = (m.half_log_snr, x0)
        _tell(on_step, m, times, x, x0)
    return x


def _extrapolate(x0: Tensor, before: tuple[float, Tensor] | None, m: _Move) -> Tensor:
    """D = (1 + 1/(2r)) x0 - 1/(2r) x0_before with r = h_before / h; x0 at the first step and at the last."""
    if before is None or m.last:
        return x0
    half_log_snr, x0_before = before
    h = math.log(m.an / m.sn) - m.half_log_snr
    c = h / (2 * (m.half_log_snr - half_log_snr))  # 0 after a step from pure noise
    return (1 + c) * x0 - c * x0_before


def ancestral(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    process: Process,
    *,
    noise: Noise,
    gamma: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """The ancestral sampler of Video Diffusion Models (Ho et al. 2022, equations 3 and 4).

    The log-variance lies `gamma` of the way from the posterior's (0) to the forward step's (1).
    """
    for m in _moves(times, process):
        x0 = denoise(x, m.t)
        x = (m.sn / m.s) * math.sqrt(m.snr) * x + (1 - m.snr) * m.an * x0
        if not m.last:
            x = x + math.sqrt(1 - m.snr) * m.sn ** (1 - gamma) * m.s**gamma * noise()
        _tell(on_step, m, times, x, x0)
    return x


# --- noise --------------------------------------------------------------------------------------------------------


def clip_noise(shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu") -> Noise:
    """Noise (len(seeds), *shape) at each call, float32. A clip's noise depends on its own seed alone.

    So a clip is the same whichever batch it is made in. Drawn on the CPU: the same on every device.
    """
    generators = [Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device)


# --- guidance -----------------------------------------------------------------------------------------------------


def guided(
    predict: Predict,
    process: Process,
    kind: Kind,
    cond: Conditions,
    uncond: Conditions,
    scale: Guidance,
    *,
    batched: bool = True,
) -> Denoise:
    """denoise with classifier-free guidance: u + g (c - u), the same on x0 as on the network's output.

    `scale` is g: a number, a tensor (T,) with one for each frame, or a function of the time t that gives either.
    Where the number is 1 the unconditional pass is left out. `batched` asks the network once for both, with the
    unconditional half after the conditional; else twice in turn, in less memory. Every condition is (B, ...).
    Raises VgenError when the two do not have the same names.
    """
    if cond.keys() != uncond.keys():
        odd = ", ".join(sorted(cond.keys() ^ uncond.keys()))
        raise VgenError(f"Guidance needs each condition with and without: {odd}.")
    one = denoiser(predict, process, kind, cond)
    other = denoiser(predict, process, kind, uncond)
    two = denoiser(predict, process, kind, {k: torch.cat([cond[k], uncond[k]]) for k in cond} if batched else {})

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        g = scale(t) if callable(scale) else scale
        if not isinstance(g, Tensor) and g == 1:
            return one(x, t)
        c, u = two(torch.cat([x, x]), t).chunk(2) if batched else (one(x, t), other(x, t))
        return u + (_per_frame(g, x) if isinstance(g, Tensor) else g) * (c - u)

    return denoise


def _per_frame(g: Tensor, x: Tensor) -> Tensor:
    return g.to(x).reshape(-1, 1, 1)


def dynamic_guidance(g: float, times: Tensor) -> Callable[[Tensor], float]:
    """CogVideoX's dynamic guidance as intended: from 1 at the first of `times` towards 1 + g after the last."""
    return lambda t: guidance_curve(g, int((times > t).sum()) / len(times))


def dynamic_guidance_quirk(g: float, steps: int) -> Callable[[Tensor], float]:
    """CogVideoX's dynamic guidance as released: the time step (0-999) stands where the step's index is meant.

    The power of a large number is far outside the curve, so the scale jumps between 1 and 1 + g without an order.
    """
    return lambda t: guidance_curve(g, (steps - t.item()) / steps)


def guidance_curve(g: float, u: float) -> float:
    """1 + g (1 - cos(pi u^5)) / 2."""
    return 1 + g * (1 - math.cos(math.pi * u**5.0)) / 2


# --- windows ------------------------------------------------------------------------------------------------------


def windowed(denoise: Denoise, size: int, stride: int, dim: int = 2) -> Denoise:
    """denoise over overlapping windows of `size` along `dim`, averaged (MultiDiffusion, Bar-Tal et al. 2023).

    In time (dim 2) this makes clips longer than the network was trained for, as Lumiere does for super-resolution.
    Data no longer than a window are passed on whole. Raises VgenError when windows would leave gaps.
    """

    def run(x: Tensor, t: Tensor) -> Tensor:
        length = x.shape[dim]
        if length <= size:
            return denoise(x, t)
        x0 = torch.zeros_like(x)
        for start, weight in zip(
            window_starts(length, size, stride), window_weights(length, size, stride), strict=True
        ):
            part = denoise(x.narrow(dim, start, size), t)
            w = weight[start : start + size].to(part).reshape(-1, *[1] * (x.ndim - 1 - dim % x.ndim))
            x0.narrow(dim, start, size).add_(part * w)
        return x0

    _check_window(size, stride)
    return run


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows begin: every `stride`, and one that ends at the end."""
    _check_window(size, stride)
    last = max(length - size, 0)
    return [*range(0, last, stride), last]


def window_weights(length: int, size: int, stride: int) -> Tensor:
    """Weights (windows, length), float64: each rises to its middle and falls again; over the windows they sum to 1."""
    hat = torch.minimum(torch.arange(1.0, size + 1), torch.arange(size, 0.0, -1)).double()
    starts = window_starts(length, size, stride)
    weights = torch.zeros(len(starts), length, dtype=torch.float64)
    for row, start in zip(weights, starts, strict=True):
        row[start : start + size] = hat[: length - start]
    return weights / weights.sum(0)


def _check_window(size: int, stride: int) -> None:
    if not 1 <= stride <= size:
        raise VgenError(f"Windows of {size} every {stride} leave gaps.", "Set the stride between 1 and the size.")

"""Samplers against closed forms and diffusers' schedulers; guidance, noise and windows against their invariants."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from torch import Tensor

from vgen import diffusion as D
from vgen import samplers as S
from vgen.errors import VgenError

MU, STD = 1.5, 0.3
SD = D.Discrete(D.scaled_linear(), "trailing")
PROCESSES: dict[str, D.Process] = {
    "sd": SD,
    "cogvideox": D.cogvideox(),
    "edm": D.EDM(sigma_max=80.0),
    "cosine": D.Cosine(),
    "flow": D.Flow(),
}
Sampler = Callable[..., Tensor]
PLAIN: dict[str, Sampler] = {"ddim": S.ddim, "euler": S.euler, "heun": S.heun, "dpmpp_2m": S.dpmpp_2m}
NOISY: dict[str, Sampler] = {
    "ddim": lambda *a, **k: S.ddim(*a, eta=1.0, **k),
    "dpmpp_2m_sde": S.dpmpp_2m_sde,
    "ancestral": S.ancestral,
    "ancestral-mid": lambda *a, **k: S.ancestral(*a, gamma=0.3, **k),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def gaussian_x0(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The mean of N(MU, STD^2) data given z = x."""
    return MU + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MU)


def gaussian_network(process: D.Process, kind: D.Kind) -> D.Denoise:
    """The perfect network of N(MU, STD^2) data, asked for `kind` and read back through the seam."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = D.levels(process, t, x)
        x0 = gaussian_x0(x, a, s)
        output = D.target(kind, x0, D.to_eps(x, x0, a, s), a, s)
        return D.denoiser(lambda scaled, told, cond: output, process, kind, {})(x, t)

    return denoise


def noise_for(x: Tensor, seed: int = 1) -> S.Noise:
    g = generator(seed)
    return lambda: torch.randn(x.shape, generator=g, dtype=x.dtype)


# --- closed forms -------------------------------------------------------------------------------------------------


def gaussian_flow(x: Tensor, process: D.Process, t: Tensor) -> Tensor:
    """Where the probability flow of N(MU, STD^2) data takes x from time t: each quantile keeps its place."""
    a, s = D.levels(process, t, x)
    return MU + STD * (x - a * MU) / (a**2 * STD**2 + s**2).sqrt()


def flow_error(sampler: Sampler, process: D.Process, kind: D.Kind, steps: int) -> float:
    times = process.times(steps)
    x = D.initial(process, times[0], randn(2000))
    x0 = sampler(gaussian_network(process, kind), x, times, process)
    return (x0 - gaussian_flow(x, process, times[0])).abs().mean().item()


@pytest.mark.parametrize("sampler", PLAIN)
@pytest.mark.parametrize("name", PROCESSES)
def test_plain_samplers_follow_the_gaussian_flow(name: str, sampler: str) -> None:
    assert flow_error(PLAIN[sampler], PROCESSES[name], "v", 250) < 0.01


@pytest.mark.parametrize("kind", get_args(D.Kind))
def test_every_output_follows_the_gaussian_flow(kind: D.Kind) -> None:
    for process in (SD, PROCESSES["edm"], PROCESSES["cosine"]):
        assert flow_error(S.ddim, process, kind, 250) < 0.01


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(sampler: str, order: int) -> None:
    coarse, fine = (flow_error(PLAIN[sampler], PROCESSES["edm"], "v", steps) for steps in (40, 80))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("sampler", NOISY)
@pytest.mark.parametrize("name", PROCESSES)
def test_noisy_samplers_find_the_gaussian(name: str, sampler: str) -> None:
    process, data = PROCESSES[name], MU + STD * randn(20_000)
    times = process.times(500)
    x = D.add_noise(process, data, randn(20_000, seed=2), times[0])
    x0 = NOISY[sampler](gaussian_network(process, "v"), x, times, process, noise=noise_for(x))
    assert x0.mean().item() == pytest.approx(MU, abs=0.01)
    assert x0.std().item() == pytest.approx(STD, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([x0, data]))[0, 1].item()) < 0.03  # fresh data, not the old


@pytest.mark.parametrize("name", PROCESSES)
def test_perfect_knowledge_is_reached_in_one_step(name: str) -> None:
    process, x0 = PROCESSES[name], randn(4)
    times = process.times(1)
    x = D.initial(process, times[0], randn(4, seed=1))
    for sampler in [*PLAIN.values(), *(lambda *a, s=s: s(*a, noise=noise_for(x)) for s in NOISY.values())]:
        torch.testing.assert_close(sampler(lambda x, t: x0, x, times, process), x0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("run", "noisy"), [*((s, False) for s in PLAIN.values()), *((s, True) for s in NOISY.values())]
)
def test_zero_terminal_snr_is_finite_at_both_ends(run: Sampler, noisy: bool, steps: int, dtype: torch.dtype) -> None:
    process = D.cogvideox()
    x = randn(2, 3).to(dtype)
    seen: list[Tensor] = []
    more = {"noise": noise_for(x)} if noisy else {}
    x0 = run(
        D.denoiser(lambda x, t, cond: torch.tanh(x), process, "v", {}),
        x,
        process.times(steps),
        process,
        on_step=lambda step: seen.append(step.x),
        **more,
    )
    assert len(seen) == steps
    assert all(one.isfinite().all() for one in seen)
    assert x0.dtype == dtype


# --- identities ---------------------------------------------------------------------------------------------------


def test_ddim_equals_its_log_snr_form() -> None:
    process, times = D.Cosine(), D.Cosine().times(10)
    xs = [randn(5)]
    told: list[Tensor] = []
    denoise = gaussian_network(process, "v")
    S.ddim(denoise, xs[0], times, process, on_step=lambda step: (xs.append(step.x), told.append(step.x0)))
    for i in range(9):
        now, then = process.log_snr(times[i]), process.log_snr(times[i + 1])
        (a, _), (a_n, _) = process.level(times[i]), process.level(times[i + 1])
        k = ((now - then) / 2).exp()
        torch.testing.assert_close(xs[i + 1], k * (a_n / a) * xs[i] + (1 - k) * a_n * told[i])


def test_ddim_equals_the_rotation_of_v() -> None:
    process, times = D.cogvideox(), D.cogvideox().times(10)
    xs, v = [randn(5)], randn(5, seed=1)
    denoise = D.denoiser(lambda x, t, cond: v, process, "v", {})
    S.ddim(denoise, xs[0], times, process, on_step=lambda step: xs.append(step.x))
    for i in range(9):
        phi, phi_n = (torch.atan2(*reversed(process.level(t))) for t in times[i : i + 2])
        torch.testing.assert_close(xs[i + 1], (phi_n - phi).cos() * xs[i] + (phi_n - phi).sin() * v)


def test_ddim_with_eta_one_is_the_lower_ancestral_sampler() -> None:
    process, x = D.Cosine(), randn(100)
    denoise = gaussian_network(process, "eps")
    runs = [
        run(denoise, x, process.times(20), process, noise=noise_for(x)) for run in (NOISY["ddim"], NOISY["ancestral"])
    ]
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_ancestral_is_the_formula_of_vdm(gamma: float) -> None:
    process, x = D.Cosine(), randn(7)
    times, draws, xs = process.times(4), [], [x]
    draw = noise_for(x)

    def noise() -> Tensor:
        draws.append(draw())
        return draws[-1]

    denoise = gaussian_network(process, "v")
    S.ancestral(denoise, x, times, process, noise=noise, gamma=gamma, on_step=lambda step: xs.append(step.x))
    for i in range(3):
        (a, sd), (a_s, sd_s) = process.level(times[i]), process.level(times[i + 1])
        k = (process.log_snr(times[i]) - process.log_snr(times[i + 1])).exp()
        mean = k * (a_s / a) * xs[i] + (1 - k) * a_s * denoise(xs[i], times[i])
        var = ((1 - k) * sd_s**2) ** (1 - gamma) * ((1 - k) * sd**2) ** gamma
        torch.testing.assert_close(xs[i + 1], mean + var.sqrt() * draws[i])
    assert len(draws) == 3


def test_ancestral_mean_and_variance_are_the_posterior() -> None:
    process = SD
    (a, s), (a_s, s_s) = process.level(torch.tensor(500.0)), process.level(torch.tensor(480.0))
    forward = s**2 - (a / a_s) ** 2 * s_s**2  # variance of z_t given z_s
    x0, x = randn(6), randn(6, seed=1)
    mean = (a / a_s) * s_s**2 / s**2 * x + a_s * forward / s**2 * x0
    std = (forward * s_s**2 / s**2).sqrt()
    xs: list[Tensor] = []
    one = torch.ones(6, dtype=torch.float64)
    times = torch.tensor([500.0, 480.0])
    S.ancestral(lambda x, t: x0, x, times, process, noise=lambda: one, on_step=lambda step: xs.append(step.x))
    torch.testing.assert_close(xs[0], mean + std)


def test_euler_is_the_step_of_karras() -> None:
    process = D.EDM()
    times, x = process.times(8), 700 * randn(5)
    denoise = gaussian_network(process, "v")
    by_hand = x
    for sigma, sigma_next in zip(times, [*times[1:], 0.0], strict=True):
        by_hand = by_hand + (sigma_next - sigma) * (by_hand - denoise(by_hand, sigma)) / sigma
    torch.testing.assert_close(S.euler(denoise, x, times, process), by_hand)


def test_dpm_solver_is_its_formula() -> None:
    process = SD
    times, xs, x0s = process.times(6), [randn(5)], []
    denoise = gaussian_network(process, "eps")
    S.dpmpp_2m(denoise, xs[0], times, process, on_step=lambda step: (xs.append(step.x), x0s.append(step.x0)))
    a, s = process.level(times)
    half = (a / s).log()
    for i in range(1, 5):
        h = half[i + 1] - half[i]
        r = (half[i] - half[i - 1]) / h
        d = (1 + 1 / (2 * r)) * x0s[i] - 1 / (2 * r) * x0s[i - 1]
        torch.testing.assert_close(xs[i + 1], s[i + 1] / s[i] * xs[i] - a[i + 1] * torch.expm1(-h) * d)
    torch.testing.assert_close(xs[-1], x0s[-1])


@pytest.mark.parametrize("name", PROCESSES)
def test_inversion_comes_back(name: str) -> None:
    process = PROCESSES[name]
    x0 = MU + STD * randn(500)
    denoise = gaussian_network(process, "v")

    def error(steps: int) -> float:
        times = process.times(steps)
        noise = S.ddim_invert(denoise, x0, times, process)
        return (S.ddim(denoise, noise, times, process) - x0).abs().mean().item()

    assert error(500) < 0.005
    assert error(500) < error(50) / 4


def test_inversion_is_exact_where_the_noise_does_not_depend_on_the_latent() -> None:
    x0, e = randn(6), randn(6, seed=1)
    denoise = D.denoiser(lambda x, t, cond: e, SD, "eps", {})
    noise = S.ddim_invert(denoise, x0, SD.times(20), SD)
    torch.testing.assert_close(noise, D.add_noise(SD, x0, e, SD.times(20)[0]))
    torch.testing.assert_close(S.ddim(denoise, noise, SD.times(20), SD), x0)


def test_sampling_can_start_in_the_middle() -> None:
    times = SD.times(50)[20:]
    clip, e = MU + STD * randn(5000), randn(5000, seed=1)
    x0 = S.ddim(gaussian_network(SD, "v"), D.add_noise(SD, clip, e, times[0]), times, SD)
    assert x0.mean().item() == pytest.approx(MU, abs=0.02)
    assert torch.corrcoef(torch.stack([x0, clip]))[0, 1] > 0.1


def test_eta_out_of_range_or_without_noise_is_refused() -> None:
    with pytest.raises(VgenError, match="eta"):
        S.ddim(lambda x, t: x, randn(2), SD.times(2), SD, eta=0.5)
    with pytest.raises(VgenError, match="0 to 1"):
        S.ddim(lambda x, t: x, randn(2), SD.times(2), SD, eta=1.5, noise=noise_for(randn(2)))


# --- parity with diffusers ----------------------------------------------------------------------------------------


def network(x: Tensor, t: float) -> Tensor:
    """A stand-in whose output depends on all it is given."""
    return torch.sin(3 * x + t / 100) + 0.3 * x.roll(1, -1)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize(("k", "dtype"), [(3.0, torch.float32), (1.0, torch.float64)])
def test_ddim_is_that_of_cogvideox(k: float, dtype: torch.dtype, steps: int) -> None:
    theirs = CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True,
        snr_shift_scale=k,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    theirs.set_timesteps(steps)
    x = first = randn(1, 2, 3, 4, 4).to(dtype)
    wanted = []
    for t in theirs.timesteps:
        x = theirs.step(network(x, t.item()), t, x, return_dict=False)[0].to(dtype)
        wanted.append(x)
    process, got = D.from_scheduler_config(theirs.config), []
    denoise = D.denoiser(lambda x, t, cond: network(x, t.item()), process, "v", {})
    S.ddim(denoise, first, process.times(steps), process, on_step=lambda step: got.append(step.x))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dpm_sde_is_that_of_cogvideox(dtype: torch.dtype, steps: int) -> None:
    theirs = CogVideoXDPMScheduler(
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    theirs.set_timesteps(steps)
    x = first = randn(1, 2, 3, 4, 4).to(dtype)
    old, wanted, g = None, [], generator(5)
    for i, t in enumerate(theirs.timesteps):
        back = theirs.timesteps[i - 1] if i > 0 else None
        x, old = theirs.step(network(x, t.item()), old, t, back, x, generator=g)
        x = x.to(dtype)
        wanted.append(x)
    process, got, calls, h = D.from_scheduler_config(theirs.config), [], [], generator(5)

    def noise() -> Tensor:
        if calls:  # theirs draws once more and throws it away, at every step but the first and the last
            torch.randn(first.shape, generator=h, dtype=dtype)
        calls.append(1)
        return torch.randn(first.shape, generator=h, dtype=dtype)

    denoise = D.denoiser(lambda x, t, cond: network(x, t.item()), process, "v", {})
    S.dpmpp_2m_sde(denoise, first, process.times(steps), process, noise=noise, on_step=lambda s: got.append(s.x))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) == steps - 1


# --- guidance -----------------------------------------------------------------------------------------------------


def counting(calls: list[int]) -> D.Predict:
    def predict(x: Tensor, t: Tensor, cond: D.Conditions) -> Tensor:
        calls.append(len(x))
        return torch.sin(x + cond["c"].reshape(-1, 1, 1, 1, 1))

    return predict


COND, UNCOND = {"c": torch.tensor([0.5, -0.5])}, {"c": torch.zeros(2)}


@pytest.mark.parametrize("kind", get_args(D.Kind))
@pytest.mark.parametrize("name", ["sd", "edm", "cosine"])
@pytest.mark.parametrize("batched", [True, False])
def test_guidance_on_data_is_guidance_on_outputs(name: str, kind: D.Kind, batched: bool) -> None:
    process, x, calls = PROCESSES[name], randn(2, 3, 4, 2, 2), []
    predict, t = counting(calls), process.times(4)[2]
    a, s = D.levels(process, t, x)
    c, u = (D.call(predict, process, x, t, cond) for cond in (COND, UNCOND))
    wanted = D.to_x0(u + 6 * (c - u), kind, x, a, s)
    calls.clear()
    got = S.guided(predict, process, kind, COND, UNCOND, 6.0, batched=batched)(x, t)
    torch.testing.assert_close(got, wanted)
    assert calls == ([4] if batched else [2, 2])


def test_guidance_of_one_is_the_conditional_model_alone() -> None:
    calls: list[int] = []
    x, t = randn(2, 3, 4, 2, 2), torch.tensor(500.0)
    for scale in (1, 1.0, lambda t: 1.0):
        got = S.guided(counting(calls), SD, "v", COND, UNCOND, scale)(x, t)
        torch.testing.assert_close(got, D.denoiser(counting([]), SD, "v", COND)(x, t), rtol=0, atol=0)
    assert calls == [2, 2, 2]


def test_guidance_of_zero_is_the_unconditional_model() -> None:
    x, t = randn(2, 3, 4, 2, 2), torch.tensor(500.0)
    got = S.guided(counting([]), SD, "v", COND, UNCOND, 0.0)(x, t)
    torch.testing.assert_close(got, D.denoiser(counting([]), SD, "v", UNCOND)(x, t))


def test_guidance_can_differ_from_frame_to_frame() -> None:
    x, t = randn(2, 3, 4, 2, 2), torch.tensor(500.0)
    scale = torch.linspace(1, 3, 4)
    got = S.guided(counting([]), SD, "v", COND, UNCOND, scale)(x, t)
    for frame, g in enumerate(scale.tolist()):
        one = S.guided(counting([]), SD, "v", COND, UNCOND, g)(x, t)
        torch.testing.assert_close(got[:, :, frame], one[:, :, frame])


def test_conditions_of_different_names_are_refused() -> None:
    with pytest.raises(VgenError, match="fps"):
        S.guided(counting([]), SD, "v", COND | {"fps": torch.ones(2)}, UNCOND, 2.0)


def test_dynamic_guidance_curve() -> None:
    got = [S.guidance_curve(6.0, u) for u in (0, 0.5, 0.8, 1)]
    assert got == pytest.approx([1.0, 1.0144, 2.454, 7.0], abs=5e-4)
    times = D.cogvideox().times(50)
    scale = S.dynamic_guidance(6.0, times)
    assert [scale(times[i]) for i in (0, 25, 40)] == pytest.approx(got[:3])


def test_dynamic_guidance_as_released() -> None:
    times = D.cogvideox().times(50)
    scale = S.dynamic_guidance_quirk(6.0, 50)
    released = [1 + 6 * ((1 - math.cos(math.pi * ((50 - t) / 50) ** 5.0)) / 2) for t in times.tolist()]
    assert [scale(t) for t in times] == released
    assert sorted(released) != released


# --- noise --------------------------------------------------------------------------------------------------------


def test_noise_of_a_clip_is_its_own() -> None:
    together, alone = S.clip_noise((2, 3, 4, 4), [5, 6, 7]), S.clip_noise((2, 3, 4, 4), [6])
    for _ in range(3):
        torch.testing.assert_close(together()[1:2], alone(), rtol=0, atol=0)
    assert not torch.equal(alone(), alone())
    assert together().shape == (3, 2, 3, 4, 4)


def test_a_sampled_clip_does_not_depend_on_its_batch() -> None:
    process = D.cogvideox()
    denoise = D.denoiser(lambda x, t, cond: torch.sin(x), process, "v", {})

    def sample(seeds: list[int]) -> Tensor:
        noise = S.clip_noise((2, 3, 4, 4), seeds)
        return S.dpmpp_2m_sde(denoise, noise(), process.times(10), process, noise=noise)

    torch.testing.assert_close(sample([1, 2, 3])[1:2], sample([2]), rtol=1e-6, atol=1e-6)


# --- windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "size", "stride"), [(17, 8, 4), (16, 8, 8), (9, 4, 3), (5, 5, 2), (3, 8, 4), (7, 1, 1)]
)
def test_window_weights_sum_to_one(length: int, size: int, stride: int) -> None:
    weights = S.window_weights(length, size, stride)
    torch.testing.assert_close(weights.sum(0), torch.ones(length, dtype=torch.float64))
    assert (weights >= 0).all()
    assert len(weights) == len(S.window_starts(length, size, stride))


def test_window_starts() -> None:
    assert S.window_starts(16, 8, 4) == [0, 4, 8]
    assert S.window_starts(17, 8, 4) == [0, 4, 8, 9]
    assert S.window_starts(8, 8, 4) == [0]
    assert S.window_starts(80, 16, 14) == [0, 14, 28, 42, 56, 64]


@pytest.mark.parametrize("dim", [2, -3, 4])
def test_windows_do_nothing_to_a_pointwise_network(dim: int) -> None:
    x = randn(2, 3, 17, 4, 11)
    got = S.windowed(lambda x, t: torch.sin(x), 8, 5, dim)(x, torch.tensor(0.0))
    torch.testing.assert_close(got, torch.sin(x))


def test_a_window_over_all_is_the_plain_network() -> None:
    def mix(x: Tensor, t: Tensor) -> Tensor:
        return x.mean(2, keepdim=True) + 0 * x

    x = randn(1, 2, 8, 2, 2)
    for size in (8, 20):
        torch.testing.assert_close(S.windowed(mix, size, 4)(x, torch.tensor(0.0)), mix(x, torch.tensor(0.0)))
    assert not torch.allclose(S.windowed(mix, 4, 2)(x, torch.tensor(0.0)), mix(x, torch.tensor(0.0)))


def test_windows_see_their_own_frames_only() -> None:
    sizes: list[int] = []

    def mean(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(x.shape[2])
        return x.mean(2, keepdim=True).expand_as(x)

    x = torch.arange(6.0).reshape(1, 1, 6, 1, 1)
    got = S.windowed(mean, 4, 2)(x, torch.tensor(0.0)).flatten()
    assert sizes == [4, 4]
    # the hat is 1 2 2 1: frames 0-1 belong to the first window, 4-5 to the second, 2-3 are shared 2:1 and 1:2
    assert got.tolist() == pytest.approx([1.5, 1.5, (2 * 1.5 + 3.5) / 3, (1.5 + 2 * 3.5) / 3, 3.5, 3.5])


def test_windows_with_gaps_are_refused() -> None:
    with pytest.raises(VgenError, match="gaps"):
        S.windowed(lambda x, t: x, 4, 5)

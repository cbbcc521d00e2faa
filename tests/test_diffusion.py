"""Noise processes, parameterisations and the loss, held against published numbers and identities."""

import math
from typing import get_args

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler, EulerDiscreteScheduler

from vgen import diffusion as D
from vgen.errors import UsageError, VgenError

KINDS = get_args(D.Kind)
PROCESSES = {
    "sd": D.Discrete(D.scaled_linear(), "leading", 1),
    "cogvideox": D.cogvideox(),
    "edm": D.EDM(),
    "cosine": D.Cosine(),
    "flow": D.Flow(),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussians(*shape: int, count: int = 2) -> list[torch.Tensor]:
    g = generator()
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(count)]


# --- schedules ----------------------------------------------------------------------------------------------------


def test_stable_diffusion_schedule() -> None:
    a, s = D.Discrete(D.scaled_linear()).level(torch.tensor([0.0, 999.0]))
    assert a[0].item() ** 2 == pytest.approx(0.99915, abs=1e-7)
    assert a[1].item() ** 2 == pytest.approx(0.00466010, abs=1e-7)
    assert a[1].item() == pytest.approx(0.0682649, abs=1e-6)
    assert (s / a).tolist() == pytest.approx([0.029167, 14.6146], rel=2e-5)


def test_linear_schedule() -> None:
    assert D.linear()[-1].item() == pytest.approx(4.04e-5, abs=5e-8)


@pytest.mark.parametrize(
    ("k", "abar"), [(1, [0.99915, 0.652457, 0.242359, 0.032799, 0]), (3, [0.997454, 0.389054, 0.095970, 0.010839, 0])]
)
def test_cogvideox_schedule(k: float, abar: list[float]) -> None:
    process = D.cogvideox(k)
    assert process.abar.dtype == torch.float64
    assert process.abar[[0, 250, 499, 750, 999]].tolist() == pytest.approx(abar, abs=6e-7)
    assert process.abar[999] == 0
    assert process.abar[0].item() == pytest.approx(D.snr_shift(D.scaled_linear(), k)[0].item(), abs=1e-15)


def test_snr_shift_divides_every_snr() -> None:
    abar = D.scaled_linear()
    shifted = D.snr_shift(abar, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), abar / (1 - abar) / 3)


def test_cosine_log_snr() -> None:
    t = torch.tensor([0, 0.25, 0.5, 0.75, 1])
    process = D.Cosine()
    assert process.log_snr(t).tolist() == pytest.approx([20, 1.7626, 0, -1.7626, -20], abs=5e-5)
    a, s = process.level(t)
    torch.testing.assert_close((a**2 / s**2).log(), process.log_snr(t))
    torch.testing.assert_close(a**2 + s**2, torch.ones_like(a))


def test_edm_sampling_sigmas() -> None:
    sigma = D.EDM().times(25)
    assert sigma[:6].tolist() == pytest.approx([700, 545.7292, 421.5691, 322.4537, 244.0231, 182.5471], abs=5e-5)
    assert sigma[-3:].tolist() == pytest.approx([0.0248, 0.0079, 0.002], abs=5e-5)
    assert len(sigma) == 25


@pytest.mark.parametrize(("mean", "median"), [(-1.2, 0.3012), (0, 1), (0.5, 1.6487), (0.7, 2.0138), (1, 2.7183)])
def test_edm_training_sigmas(mean: float, median: float) -> None:
    process = D.EDM(P_mean=mean, P_std=1.4)
    assert process.training_time(torch.tensor(0.5)).item() == pytest.approx(median, abs=1e-4)
    logs = D.sample_times(process, 4000, generator()).log()
    assert logs.mean().item() == pytest.approx(mean, abs=0.01)
    assert logs.std().item() == pytest.approx(1.4, abs=0.02)


def test_edm_tells_the_network() -> None:
    t = torch.tensor([0.5, 2.0])
    assert D.EDM().network_time(t).tolist() == pytest.approx([0.25 * math.log(0.5), 0.25 * math.log(2)])
    assert D.EDM().input_scale(t).tolist() == pytest.approx([1.25**-0.5, 5**-0.5])


# --- sampling times -----------------------------------------------------------------------------------------------


def test_trailing_and_leading_times() -> None:
    assert D.cogvideox().times(50).tolist() == list(range(999, 0, -20))
    assert D.Discrete(D.scaled_linear(), "leading", 1).times(50).tolist() == list(range(981, 0, -20))


@pytest.mark.parametrize("spacing", get_args(D.Spacing))
@pytest.mark.parametrize("steps", [1, 3, 8, 30, 50, 999])
def test_times_are_those_of_diffusers(spacing: D.Spacing, steps: int) -> None:
    theirs = DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert D.Discrete(D.linear(), spacing).times(steps).tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("process", [D.Cosine(), D.Flow()])
def test_continuous_times_are_even(process: D.Process) -> None:
    assert process.times(4).tolist() == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("name", PROCESSES)
def test_no_steps_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="0 steps"):
        PROCESSES[name].times(0)


def test_more_steps_than_the_schedule_has_are_refused() -> None:
    with pytest.raises(UsageError, match="1001 steps"):
        D.cogvideox().times(1001)
    with pytest.raises(UsageError) as caught:
        D.Discrete(D.linear(), "leading", 1).times(1000)
    assert "between 1 and 500" in caught.value.do
    assert D.Discrete(D.linear(), "leading", 1).times(500)[0] == 999


# --- what the output means ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_target_stands_for_the_data(name: str, kind: D.Kind) -> None:
    process = PROCESSES[name]
    x0, e = gaussians(6, 2, 3, 4, 4)
    t = process.training_time(torch.linspace(0.05, 0.95, 6, dtype=torch.float64))
    a, s = D.levels(process, t, x0)
    z = D.add_noise(process, x0, e, t)
    torch.testing.assert_close(D.to_x0(D.target(kind, x0, e, a, s), kind, z, a, s), x0)
    torch.testing.assert_close(D.to_eps(z, x0, a, s), e)


def test_v_identities() -> None:
    x0, e = gaussians(5, 4)
    a, s = D.levels(D.Cosine(), torch.linspace(0.1, 0.9, 5), x0)
    z, v = a * x0 + s * e, D.target("v", x0, e, a, s)
    torch.testing.assert_close(a * z - s * v, x0)
    torch.testing.assert_close(s * z + a * v, e)
    torch.testing.assert_close((z - s * e) / a, x0)


def test_v_is_the_velocity_on_the_circle() -> None:
    x0, e = gaussians(1, 8)
    phi = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    _, v = torch.autograd.functional.jvp(lambda p: p.cos() * x0 + p.sin() * e, phi, torch.ones_like(phi))
    torch.testing.assert_close(D.target("v", x0, e, phi.cos(), phi.sin()), v)


def test_v_of_edm_is_the_preconditioning_of_svd() -> None:
    x, output = gaussians(5, 8)
    sigma = torch.tensor([0.002, 0.3, 1, 20, 700], dtype=torch.float64)[:, None]
    c_skip, c_out, weight = 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1).sqrt(), (1 + sigma**2) / sigma**2
    one = torch.ones_like(sigma)
    torch.testing.assert_close(D.to_x0(output, "v", x, one, sigma), c_skip * x + c_out * output)
    torch.testing.assert_close(weight * c_out**2, one)


def test_edm_v_is_variance_preserving_v() -> None:
    x, output = gaussians(3, 8)
    sigma = torch.tensor([0.1, 1, 30], dtype=torch.float64)[:, None]
    a, s = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    edm = D.to_x0(output, "v", x, torch.ones_like(sigma), sigma)
    torch.testing.assert_close(edm, D.to_x0(output, "v", a * x, a, s))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_v_is_finite_at_both_ends_of_zero_terminal_snr(dtype: torch.dtype) -> None:
    x0, e = (x.to(dtype) for x in gaussians(2, 3))
    process, t = D.cogvideox(), torch.tensor([0.0, 999.0])
    a, s = D.levels(process, t, x0)
    z, v = D.add_noise(process, x0, e, t), D.target("v", x0, e, a, s)
    torch.testing.assert_close(z[1], e[1].to(z.dtype), rtol=0, atol=0)
    torch.testing.assert_close(v[1], -x0[1].to(v.dtype), rtol=0, atol=0)
    torch.testing.assert_close(D.to_x0(v, "v", z, a, s), x0.to(z.dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_prediction_is_refused_where_sampling_starts_without_signal(name: str) -> None:
    if name in ("cogvideox", "flow"):
        with pytest.raises(VgenError, match="zero signal"):
            D.denoiser(lambda x, t, cond: x, PROCESSES[name], "eps", {})
    else:
        assert D.denoiser(lambda x, t, cond: x, PROCESSES[name], "eps", {})


# --- the seam -----------------------------------------------------------------------------------------------------


def test_denoiser_feeds_the_network_and_reads_its_output() -> None:
    seen = {}

    def predict(x: torch.Tensor, t: torch.Tensor, cond: D.Conditions) -> torch.Tensor:
        seen.update(x=x, t=t, cond=cond)
        return torch.zeros_like(x)

    x = torch.ones(2, 1, 3, 2, 2)
    x0 = D.denoiser(predict, D.EDM(), "v", {"fps": torch.ones(2)})(x, torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(seen["x"], x / math.sqrt(10))
    torch.testing.assert_close(seen["t"], torch.full((2,), 0.25 * math.log(3)))
    assert seen["cond"]["fps"].tolist() == [1, 1]
    torch.testing.assert_close(x0, x / 10)


def test_half_precision_data_are_noised_in_single() -> None:
    x0, e = (x.bfloat16() for x in gaussians(2, 3))
    assert D.add_noise(D.cogvideox(), x0, e, torch.tensor([10.0, 900.0])).dtype == torch.float32


@pytest.mark.parametrize("name", PROCESSES)
def test_initial_noise_is_as_wide_as_noisy_data(name: str) -> None:
    process = PROCESSES[name]
    x0, e = gaussians(50_000)
    t = process.times(10)[0]
    noisy = D.add_noise(process, x0, e, t)
    assert D.initial(process, t, e).std().item() == pytest.approx(noisy.std().item(), rel=0.02)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROCESSES)
def test_a_network_that_knows_the_answer_has_no_loss(name: str, kind: D.Kind) -> None:
    process, (x0,) = PROCESSES[name], gaussians(4, 2, 3, 4, 4, count=1)
    times = D.sample_times(process, 4, generator(7))  # the draw that loss will make
    a, s = D.levels(process, times, x0)

    def predict(x: torch.Tensor, t: torch.Tensor, cond: D.Conditions) -> torch.Tensor:
        z = x / process.input_scale(times).reshape(4, 1, 1, 1, 1)
        return D.target(kind, x0, D.to_eps(z, x0, a, s), a, s)

    assert D.loss(predict, process, kind, x0, {}, generator(7)).item() < 1e-8


def test_v_loss_is_the_weighted_loss_of_cogvideox() -> None:
    process, (x0, output) = D.cogvideox(), gaussians(4, 2, 3, 4, 4)
    v_loss = D.loss(lambda x, t, cond: output, process, "v", x0, {}, generator(3))
    g = generator(3)
    t = D.sample_times(process, 4, g)
    e = torch.randn(x0.shape, generator=g)
    a, s = D.levels(process, t, x0)
    guess = D.to_x0(output, "v", a * x0 + s * e, a, s)
    w = 1 / (1 - a**2)
    torch.testing.assert_close(v_loss, (w * (guess - x0) ** 2).mean())
    torch.testing.assert_close(w, 1 + a**2 / s**2)


def test_edm_v_loss_is_the_weighted_loss_of_svd() -> None:
    process, (x0, output) = D.EDM(), gaussians(4, 2, 3, 4, 4)
    v_loss = D.loss(lambda x, t, cond: output, process, "v", x0, {}, generator(3))
    g = generator(3)
    sigma = D.sample_times(process, 4, g).reshape(4, 1, 1, 1, 1)
    z = x0 + sigma * torch.randn(x0.shape, generator=g)
    guess = z / (sigma**2 + 1) - sigma / (sigma**2 + 1).sqrt() * output
    torch.testing.assert_close(v_loss, ((1 + sigma**2) / sigma**2 * (guess - x0) ** 2).mean())


def test_loss_repeats_and_follows_its_generator() -> None:
    (x0,) = gaussians(4, 2, 3, 4, 4, count=1)
    losses = [D.loss(lambda x, t, cond: x, D.cogvideox(), "v", x0, {}, generator(s)).item() for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_weight_map_counts_each_element() -> None:
    (x0,) = gaussians(2, 2, 3, 4, 4, count=1)
    mask = torch.zeros(2, 1, 1, 4, 4)
    mask[..., :2] = 1

    def weighted(weight: torch.Tensor | None) -> float:
        return D.loss(lambda x, t, cond: x, D.Flow(), "flow", x0, {}, generator(5), weight=weight).item()

    assert weighted(torch.ones(1)) == pytest.approx(weighted(None), rel=1e-12)
    assert weighted(mask) + weighted(1 - mask) == pytest.approx(weighted(None), rel=1e-9)
    assert 0 < weighted(mask) < weighted(None)


def test_loss_reaches_the_network() -> None:
    torch.manual_seed(0)
    net = torch.nn.Conv3d(2, 2, 1)
    x0 = torch.randn(2, 2, 3, 4, 4)
    D.loss(lambda x, t, cond: net(x), D.cogvideox(), "v", x0, {}, generator()).backward()
    assert net.weight.grad is not None
    assert net.weight.grad.abs().sum() > 0


def test_times_cover_each_stratum_once() -> None:
    t = D.sample_times(D.cogvideox(), 100, generator())
    assert sorted((t // 10).tolist()) == list(range(100))
    assert t.tolist() != sorted(t.tolist())


def test_times_of_all_ranks_cover_each_stratum_once() -> None:
    draws = [D.sample_times(D.cogvideox(), 5, generator(r), (r, 20)) for r in range(20)]
    for r, t in enumerate(draws):
        assert ((t >= r * 50) & (t < (r + 1) * 50)).all()
    assert sorted((torch.cat(draws) // 10).tolist()) == list(range(100))


def test_a_single_time_is_uniform() -> None:
    g = generator()
    t = torch.cat([D.sample_times(D.cogvideox(), 1, g) for _ in range(4000)])
    counts = torch.bincount((t // 100).long(), minlength=10)
    assert len(counts) == 10
    assert ((counts - 400).abs() < 5 * math.sqrt(360)).all()


# --- scheduler_config.json ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        CogVideoXDDIMScheduler(
            rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False
        ),
        CogVideoXDPMScheduler(
            rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing", clip_sample=False
        ),
        DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="linspace"),
        EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_process_of_a_scheduler_config(scheduler: DDIMScheduler) -> None:
    process = D.from_scheduler_config(scheduler.config)
    torch.testing.assert_close(process.abar, scheduler.alphas_cumprod.double(), rtol=0, atol=2e-6)
    scheduler.set_timesteps(50)
    ours = process.times(50).tolist()
    assert ours == pytest.approx(scheduler.timesteps.tolist(), abs=0.5)  # Euler's are not rounded


def test_settings_that_cannot_be_followed_are_refused() -> None:
    config = dict(DDIMScheduler(clip_sample=False).config)
    for key, value in {
        "beta_schedule": "squaredcos_cap_v2",
        "timestep_spacing": "random",
        "clip_sample": True,
        "use_karras_sigmas": True,
        "trained_betas": [0.1],
    }.items():
        with pytest.raises(VgenError):
            D.from_scheduler_config(config | {key: value})
    del config["beta_start"]
    with pytest.raises(VgenError, match="beta_start"):
        D.from_scheduler_config(config)


def test_spacing_of_an_old_config_is_its_class_default() -> None:
    config = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear", "num_train_timesteps": 1000}
    assert D.from_scheduler_config(config | {"_class_name": "EulerDiscreteScheduler"}).spacing == "linspace"
    assert D.from_scheduler_config(config | {"_class_name": "PNDMScheduler", "steps_offset": 1}).times(50)[0] == 981


def test_kind_of_a_scheduler_config() -> None:
    assert D.kind_of_scheduler_config({"prediction_type": "v_prediction"}) == "v"
    assert D.kind_of_scheduler_config({}) == "eps"
    with pytest.raises(VgenError, match="flow_prediction"):
        D.kind_of_scheduler_config({"prediction_type": "flow_prediction"})

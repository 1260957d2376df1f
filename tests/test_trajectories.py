"""Samplers on any trajectory: exact solutions for VP, flow and EDM, and diffusers' own solvers for each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from minireuse.samplers import (
    SAMPLERS,
    Denoise,
    Prediction,
    ddim,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s,
    from_sigma_denoiser,
    from_v,
    from_velocity,
    from_x0,
    guided,
    timesteps_for,
)
from minireuse.schedule import EDM, END, Flow, Point, Schedule, ScheduleConfig, Trajectory, point

VP = Schedule.from_config()
ZERO_SNR = Schedule.from_config(ScheduleConfig(zero_snr=True, spacing="trailing"))
TRAJECTORIES: dict[str, Trajectory] = {"vp": VP, "flow": Flow(), "edm": EDM()}


def last(steps: Any) -> Any:
    *_, step = steps
    return step


def latents(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Mixture:
    """Data of two normals on a line: the exact model, and the exact solution of its flow.

    The flow keeps the order of points, so that each stays at its quantile: x_s = F_s^-1(F_t(x_t)).
    """

    def __init__(self, trajectory: Trajectory, means: Sequence[float], std: float) -> None:
        self.trajectory, self.std = trajectory, std
        self.means = torch.tensor(means, dtype=torch.float64)

    def spread(self, at: Point) -> float:
        return math.hypot(at.alpha * self.std, at.sigma)

    def predict(self, x: Tensor, t: float, call: int = 0) -> Prediction:
        at = self.trajectory.at(t)
        away = x[:, None] - at.alpha * self.means
        weights = torch.softmax(-away.square() / (2 * self.spread(at) ** 2), dim=1)
        eps = (weights * away).sum(1) * at.sigma / self.spread(at) ** 2
        x_0 = (weights * (self.means + at.alpha * self.std**2 / self.spread(at) ** 2 * away)).sum(1)
        return Prediction(x_0, eps)

    def eps(self, x: Tensor, t: float, call: int = 0) -> Tensor:
        return self.predict(x, t).eps

    def quantile(self, x: Tensor, at: Point) -> Tensor:
        return torch.special.ndtr((x[:, None] - at.alpha * self.means) / self.spread(at)).mean(1)

    def solution(self, x: Tensor, start: float, stop: float) -> Tensor:
        now, then = self.trajectory.at(start), self.trajectory.at(stop)
        wanted, low, high = self.quantile(x, now), torch.full_like(x, -200.0), torch.full_like(x, 200.0)
        for _ in range(100):
            middle = (low + high) / 2
            below = self.quantile(middle, then) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def smooth(trajectory: Trajectory, n: int, start: float, stop: float) -> list[float]:
    """n timesteps from start, equally far apart in lambda, of a grid that ends at stop."""
    a, b = trajectory.at(start).lambda_, trajectory.at(stop).lambda_
    return [start, *(trajectory.t_of_lambda(a + (b - a) * i / n) for i in range(1, n))]


# Fixed ends, at which neither alpha nor sigma is 0.
ENDS = {"vp": (900.0, 20.0), "flow": (0.95, 0.05), "edm": (20.0, 0.05)}
ORDERS = {"ddim": 1, "plms": 2, "dpmpp_2m": 2, "dpm_solver_2": 2, "dpmpp_2s": 2, "dpm_solver_3": 3}


@pytest.mark.parametrize("means", [(0.7, 0.7), (-0.8, 0.9)], ids=["gaussian", "two"])
@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str, trajectory: str, means: tuple[float, float]) -> None:
    path, (start, stop) = TRAJECTORIES[trajectory], ENDS[trajectory]
    problem = Mixture(path, means, std=0.4)
    x = problem.spread(path.at(start)) * latents(32)
    exact, errors = problem.solution(x, start, stop), []
    for n in (160, 320):
        step = last(SAMPLERS[name](problem.eps, x, path, smooth(path, n, start, stop), end=stop))
        errors.append((step.x - exact).abs().mean().item())
    observed = math.log2(errors[0] / errors[1])
    assert 0.8 * ORDERS[name] <= observed <= ORDERS[name] + 0.6, observed


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", [ZERO_SNR, Flow(), Flow(3.0)], ids=["zero-snr", "flow", "shifted"])
def test_every_sampler_starts_where_nothing_of_the_data_is_left(name: str, path: Any) -> None:
    """alpha is 0 at the first timestep, and for flow sigma at the end."""
    problem = Mixture(path, (-1.0, 1.0), std=0.1)
    timesteps = path.timesteps(40)
    assert path.at(timesteps[0]).alpha == 0
    x = latents(64)
    generator = torch.Generator().manual_seed(1)
    noise = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    found = last(SAMPLERS[name](problem.predict, x, path, timesteps, noise=noise)).x
    assert ((found.abs() - 1).abs() < 0.45).double().mean() > 0.85  # at one of the two, give or take their spread
    with pytest.raises(ValueError, match=r"alpha is 0 at t = .* use from_v, from_velocity or from_x0"):
        last(SAMPLERS[name](problem.eps, x, path, timesteps, noise=noise))


def test_what_models_predict_is_the_same_thing() -> None:
    """One problem told as eps, v, x_0, velocity and k-diffusion's denoiser: the same trajectories."""
    for path, start in ((VP, 900.0), (Flow(), 0.95), (EDM(), 20.0)):
        problem = Mixture(path, (-0.8, 0.9), std=0.4)
        x, stop = problem.spread(path.at(start)) * latents(8), ENDS["vp"][1] if path is VP else 0.05

        def v(x: Tensor, t: float, call: int, problem: Mixture = problem, path: Trajectory = path) -> Tensor:
            p, at = problem.predict(x, t), path.at(t)
            return at.alpha * p.eps - at.sigma * p.x_0

        def velocity(x: Tensor, t: float, call: int, problem: Mixture = problem) -> Tensor:
            p = problem.predict(x, t)
            return p.eps - p.x_0

        def sigma_denoiser(x: Tensor, sigma: Tensor, problem: Mixture = problem, path: Trajectory = path) -> Tensor:
            at = path.at(path.t_of_lambda(-math.log(sigma[0].item())))
            return problem.predict(x * at.alpha, at.t).x_0

        told: list[Denoise] = [problem.eps, problem.predict]
        told += [from_x0(lambda x, t, call, problem=problem: problem.predict(x, t).x_0, path)]
        told += [from_sigma_denoiser(sigma_denoiser, path)]
        told += [from_v(v, path)] if path is VP else [from_velocity(velocity, path)] if isinstance(path, Flow) else []
        timesteps = smooth(path, 10, start, stop)
        ends = [last(dpmpp_2m(denoise, x, path, timesteps, end=stop)).x for denoise in told]
        for end in ends[1:]:
            torch.testing.assert_close(end, ends[0], rtol=1e-8, atol=1e-8)


def test_guidance_of_any_two_callables() -> None:
    a, b = (Mixture(VP, means, std=0.4) for means in ((0.0, 0.0), (0.5, 0.5)))
    x, t = latents(8), 500.0
    free, bound = a.eps(x, t), b.eps(x, t)
    eps = guided(b.eps, a.eps, 3.0)(x, t, 0)
    assert isinstance(eps, Tensor)
    torch.testing.assert_close(eps, free + 3 * (bound - free))
    both = guided(b.predict, a.predict, 3.0)(x, t, 0)
    assert isinstance(both, Prediction)
    torch.testing.assert_close(VP.alpha(t) * both.x_0 + VP.sigma(t) * both.eps, x)
    alone = guided(b.eps, lambda *_: pytest.fail("asked for what is not needed"), 1.0)(x, t, 0)
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(alone, bound)
    with pytest.raises(ValueError, match="give two of the same kind"):
        guided(b.predict, a.eps, 3.0)(x, t, 0)


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_2", "dpm_solver_3", "dpmpp_2s"])
def test_segments_are_the_whole(name: str) -> None:
    """Solvers without a past may stop anywhere and go on from there."""
    problem, x = Mixture(VP, (-0.8, 0.9), std=0.4), latents(8)
    timesteps = VP.timesteps(10)
    whole = last(SAMPLERS[name](problem.eps, x, VP, timesteps)).x
    half = last(SAMPLERS[name](problem.eps, x, VP, timesteps[:4], end=timesteps[4])).x
    torch.testing.assert_close(last(SAMPLERS[name](problem.eps, half, VP, timesteps[4:])).x, whole)


def test_inversion_and_back() -> None:
    """Along rising timesteps DDIM leads from the data to noise; from sigma 0, too, where eps is what is asked for."""
    for path, low, high in ((VP, 1.0, 981.0), (Flow(), 0.0, 0.95)):
        problem = Mixture(path, (-0.8, 0.9), std=0.4)
        x = problem.means[0] + 0.4 * latents(16)
        rising = [low + (high - low) * i / 400 for i in range(400)]
        noise = last(ddim(problem.predict, x, path, rising, end=high)).x
        torch.testing.assert_close(noise, problem.solution(x, low, high), rtol=0, atol=0.02)
        back = last(ddim(problem.predict, noise, path, [high, *reversed(rising[1:])], end=low)).x
        torch.testing.assert_close(back, x, rtol=0, atol=0.02)


def test_ten_lines_make_a_trajectory_of_ones_own() -> None:
    class Cosine:
        end = 0.0

        def at(self, t: float) -> Point:
            return point(t, math.cos(t * math.pi / 2), math.sin(t * math.pi / 2))

        def t_of_lambda(self, lambda_: float) -> float:
            return math.atan(math.exp(-lambda_)) * 2 / math.pi

    path = Cosine()
    problem = Mixture(path, (-0.8, 0.9), std=0.4)
    x = latents(8)
    timesteps = [0.99 - 0.0099 * i for i in range(100)]
    found = last(dpmpp_2m(problem.eps, x, path, timesteps)).x
    torch.testing.assert_close(found, problem.solution(x, 0.99, 0.0), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("n", [4, 10, 20])
def test_a_step_much_longer_than_the_one_before_is_not_extrapolated(name: str, n: int) -> None:
    """Stable Diffusion's own grid ends at t = 1, and the step to there spans nearly all of lambda that is left.

    diffusers extrapolates over it on the same timesteps; its own scheduler avoids them by a grid of its own.
    """
    problem, x = Mixture(VP, (0.0, 0.0), std=1.0), latents(4000)
    options = {"eta": 0.0} if name.endswith("sde") else {}
    for spacing in ("leading", "linspace"):
        timesteps = VP.timesteps(n, spacing)
        exact = problem.solution(x, timesteps[0], END).std().item()
        ours = last(SAMPLERS[name](problem.eps, x, VP, timesteps, **options)).x.std().item()
        first_order = last(ddim(problem.eps, x, VP, timesteps)).x.std().item()
        assert abs(ours / exact - 1) <= abs(first_order / exact - 1)


class Modes:
    """Independent numbers of very different size, as the modes of an image are: each of two normals, of its own."""

    def __init__(self, count: int, largest: float) -> None:
        sizes = 0.05 * (largest / 0.05) ** torch.linspace(0, 1, count, dtype=torch.float64)
        self.each = [Mixture(VP, (-size, size), 0.3 * size) for size in sizes.tolist()]

    def eps(self, x: Tensor, t: float, call: int = 0) -> Tensor:
        return torch.stack([mode.eps(row, t) for mode, row in zip(self.each, x, strict=True)])

    def solution(self, x: Tensor, start: float, stop: float) -> Tensor:
        return torch.stack([mode.solution(row, start, stop) for mode, row in zip(self.each, x, strict=True)])


@pytest.mark.parametrize("n", [4, 6, 10, 20])
def test_two_calls_a_step_keep_up_with_one_where_they_begin_alike(n: int) -> None:
    """On Stable Diffusion's own grid n / 2 timesteps begin so low that not even the exact solution from there does."""
    problem, x = Modes(24, 15.0), latents(24, 16)
    reference = last(ddim(problem.eps, x, VP, VP.timesteps(200))).x
    first_order = last(ddim(problem.eps, x, VP, VP.timesteps(n))).x

    def loss(found: Tensor) -> float:
        """How many dB worse than DDIM with as many calls."""
        return 10 * math.log10((found - reference).square().mean() / (first_order - reference).square().mean())

    assert loss(last(dpmpp_2s(problem.eps, x, VP, timesteps_for(dpmpp_2s, VP, n))).x) <= 0.5
    assert loss(problem.solution(x, VP.timesteps(n // 2)[0], END)) > 0.5


# --- diffusers --------------------------------------------------------------------------------------------------------


def eps_of(x: Tensor, t: float) -> Tensor:
    """Not the eps of any data, but smooth, bounded and far from linear."""
    return torch.tanh(x * (1 + t / 1000))


def follow(scheduler: Any, x: Tensor, output: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(output(x, t), t, x).prev_sample
    return x


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("n", [5, 20])
def test_dpmpp_2m_on_grids_in_sigma(spacing: str, n: int) -> None:
    """Their timesteps are rounded to whole ones and their sigmas are not; ours are called at the fraction."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        use_karras_sigmas=spacing == "karras",
        use_exponential_sigmas=spacing == "exponential",
        euler_at_final=True,
    )
    scheduler.set_timesteps(n)
    timesteps = VP.timesteps(n, spacing)
    ratio = [math.exp(-VP.lambda_(t)) for t in timesteps]
    torch.testing.assert_close(torch.tensor(ratio, dtype=torch.float32), scheduler.sigmas[:-1], rtol=1e-3, atol=1e-4)
    # The same model for both: one that does not look at t.
    one = Schedule(VP.alphas_cumprod, 1.0)
    ours = last(dpmpp_2m(lambda x, t, call: eps_of(x, 0.0), latents(4, 3), one, timesteps)).x
    assert_close(ours, follow(scheduler, latents(4, 3).float(), lambda x, t: eps_of(x, 0.0)), 2e-3)


def test_euler_on_flow() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    timesteps = scheduler.sigmas[:-1].tolist()
    velocity = lambda x, t, call: eps_of(x, 1000 * t)  # noqa: E731
    ours = last(ddim(from_velocity(velocity, Flow()), latents(4, 3), Flow(), timesteps)).x
    assert_close(ours, follow(scheduler, latents(4, 3), lambda x, t: eps_of(x, t.item())))


def test_dpmpp_2m_on_flow() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, euler_at_final=True
    )
    scheduler.set_timesteps(12)
    timesteps = scheduler.sigmas[:-1].double().tolist()
    velocity = lambda x, t, call: eps_of(x, 0.0)  # noqa: E731
    ours = last(dpmpp_2m(from_velocity(velocity, Flow()), latents(4, 3), Flow(), timesteps)).x
    assert_close(ours, follow(scheduler, latents(4, 3), lambda x, t: eps_of(x, 0.0)), 1e-4)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("EDMEulerScheduler", ddim), ("EDMDPMSolverMultistepScheduler", dpmpp_2m)]
)
def test_edm(theirs: str, ours: Any) -> None:
    """Their network sees x / sqrt(sigma^2 + s^2) and gives part of x_0 (arXiv 2206.00364 table 1)."""
    options = {"euler_at_final": True} if "DPM" in theirs else {}
    scheduler = getattr(diffusers, theirs)(sigma_min=0.02, sigma_max=50.0, sigma_data=0.5, **options)
    scheduler.set_timesteps(12)
    path = EDM(0.02, 50.0)
    assert path.timesteps(12) == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-5)

    def network(x: Tensor) -> Tensor:
        return torch.tanh(3 * x)

    def x_0(x: Tensor, t: float, call: int) -> Tensor:
        skip, out = 0.25 / (t**2 + 0.25), 0.5 * t / math.sqrt(t**2 + 0.25)
        return skip * x + out * network(x / math.sqrt(t**2 + 0.25))

    x = 50 * latents(4, 3)
    reference = x.clone()
    for t in scheduler.timesteps:
        reference = scheduler.step(network(scheduler.scale_model_input(reference, t)), t, reference).prev_sample
    timesteps = scheduler.sigmas[:-1].double().tolist()
    assert_close(last(ours(from_x0(x_0, path), x, path, timesteps)).x, reference, 1e-4)


def test_zero_snr_tables_and_steps() -> None:
    options = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    }
    scheduler = diffusers.DDIMScheduler(
        **options,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    torch.testing.assert_close(ZERO_SNR.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)
    scheduler.set_timesteps(10)
    v = lambda x, t, call=0: eps_of(x, float(t))  # noqa: E731
    ours = last(ddim(from_v(v, ZERO_SNR), latents(4, 3), ZERO_SNR, ZERO_SNR.timesteps(10))).x
    assert_close(ours, follow(scheduler, latents(4, 3), v), 1e-4)


def test_grids_in_lambda() -> None:
    assert VP.timesteps(10, "ays") == [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    sdxl = Schedule(VP.alphas_cumprod, VP.last_alpha_cumprod, family="sdxl")
    assert sdxl.timesteps(10, "ays") == [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]
    doubled = VP.timesteps(20, "ays")  # every second is one of the ten; the others lie half-way in lambda
    assert doubled[::2] == pytest.approx(VP.timesteps(10, "ays"), abs=1e-6)
    halves = [(VP.lambda_(a) + VP.lambda_(b)) / 2 for a, b in zip(doubled[::2], [*doubled[2::2], 0], strict=True)]
    assert [VP.lambda_(t) for t in doubled[1::2]] == pytest.approx(halves, abs=1e-9)
    for spacing in ("karras", "exponential"):
        assert [VP.timesteps(2, spacing), VP.timesteps(1, spacing)] == [[999, 0], [999]]
        timesteps = VP.timesteps(30, spacing)
        assert timesteps[0] == 999
        assert timesteps[-1] == 0
        assert timesteps == sorted(timesteps, reverse=True)
        with pytest.raises(ValueError, match=f"{spacing} needs a largest sigma / alpha"):
            ZERO_SNR.timesteps(5, spacing)
    even = [VP.lambda_(t) for t in VP.timesteps(9, "exponential")]
    gaps = [b - a for a, b in itertools.pairwise(even)]
    assert gaps == pytest.approx([gaps[0]] * 8)
    # arXiv 2206.00364 eq. 5, written out.
    top, low = (math.exp(-VP.lambda_(t)) ** (1 / 7) for t in (999, 0))
    wanted = [(top + i / 4 * (low - top)) ** 7 for i in range(5)]
    assert [math.exp(-VP.lambda_(t)) for t in VP.timesteps(5, "karras")] == pytest.approx(wanted)
    assert Flow(3.0).timesteps(4) == pytest.approx([1.0, 0.9, 0.75, 0.5])


def test_on_the_way_to_alpha_0_timesteps_between_are_in_order() -> None:
    between = [ZERO_SNR.alpha(998 + i / 10) for i in range(11)]
    assert between == sorted(between, reverse=True)
    assert between[-1] == 0
    for i in range(10):
        assert ZERO_SNR.t_of_lambda(ZERO_SNR.lambda_(998 + i / 10)) == pytest.approx(998 + i / 10, abs=1e-6)


def test_noise_of_ddim_is_the_formula_of_its_paper_where_variance_is_preserved() -> None:
    now, then = VP.at(500), VP.at(400)
    zero, nothing = (lambda x, t, call: torch.zeros_like(x)), torch.zeros(1, dtype=torch.float64)
    step = last(ddim(zero, nothing, VP, [500], end=400, noise=torch.ones_like, eta=0.7))
    wanted = 0.7 * then.sigma / now.sigma * math.sqrt(1 - (now.alpha / then.alpha) ** 2)  # eq. 16
    assert step.x.item() == pytest.approx(wanted)


def test_sde_with_eta_0_is_dpmpp_2m() -> None:
    problem, x = Mixture(Flow(), (-0.8, 0.9), std=0.4), latents(8)
    timesteps = Flow().timesteps(12)
    plain = last(dpmpp_2m(problem.predict, x, Flow(), timesteps)).x
    torch.testing.assert_close(last(dpmpp_2m_sde(problem.predict, x, Flow(), timesteps, eta=0.0)).x, plain)

"""The samplers against exact solutions and against diffusers' schedulers."""

from __future__ import annotations

import inspect
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from minireuse.samplers import SAMPLERS, Step, call_timesteps, count_calls, timesteps_for
from minireuse.schedule import END, SPACINGS, Schedule, ScheduleConfig

# numpy's, about how diffusers reads its tables
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ENDS_AT_ONE = {one: Schedule.from_config(ScheduleConfig(last_alpha_one=one)) for one in (False, True)}
SD = ENDS_AT_ONE[False]
TAKES_ETA = frozenset(name for name, f in SAMPLERS.items() if "eta" in inspect.signature(f).parameters)
SINGLESTEP_CALLS = {"dpm_solver_2": 2, "dpm_solver_3": 3, "dpmpp_2s": 2}


def linear_in_lambda(entries: int, most: float = 2.0) -> Schedule:
    """lambda falls linearly from `most` to -`most`, so that equal steps in t are equal steps in lambda."""
    table = torch.sigmoid(2 * torch.linspace(most, -most, entries, dtype=torch.float64))
    return Schedule(table, table[0].item())


def latents(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def last(steps: Any) -> Step:
    *_, step = steps
    return step


# --- exact solutions ------------------------------------------------------------------------------------------------


class Gaussian:
    """Data of N(mu, s^2): the exact model, and the exact solution of its probability-flow ODE."""

    def __init__(self, schedule: Schedule, mu: float, s: float) -> None:
        self.schedule, self.mu, self.s = schedule, mu, s

    def std(self, t: float) -> float:
        return math.hypot(self.schedule.alpha(t) * self.s, self.schedule.sigma(t))

    def denoise(self, x: Tensor, t: float, call: int = 0) -> Tensor:
        return self.schedule.sigma(t) * (x - self.schedule.alpha(t) * self.mu) / self.std(t) ** 2

    def solution(self, x: Tensor, start: float, stop: float) -> Tensor:
        scaled = (x - self.schedule.alpha(start) * self.mu) / self.std(start)
        return self.schedule.alpha(stop) * self.mu + self.std(stop) * scaled


def order(name: str, timesteps: Callable[[int], Sequence[float]], n: int) -> float:
    """The observed order of convergence: log2 of what halving the steps does to the error at the end."""
    schedule = linear_in_lambda(101)
    problem = Gaussian(schedule, mu=0.7, s=0.3)
    x_T = latents(16)
    errors = []
    for steps in (n, 2 * n):
        step = last(SAMPLERS[name](problem.denoise, x_T, schedule, timesteps(steps)))
        errors.append((step.x - problem.solution(x_T, 100, END)).abs().max().item())
    return math.log2(errors[0] / errors[1])


# One first-order step among n costs O(h^2) once: the first and last steps of dpmpp_2m do not spoil its order.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddim", 1),
        ("euler", 1),
        ("plms", 2),
        ("dpmpp_2m", 2),
        ("dpm_solver_2", 2),
        ("dpmpp_2s", 2),
        ("dpm_solver_3", 3),
    ],
)
def test_order_of_convergence(name: str, expected: int) -> None:
    observed = order(name, lambda n: [100 * (1 - i / n) for i in range(n)], n=64)
    assert expected - 0.1 * expected <= observed <= expected + 0.5, observed


def test_plms_gains_in_order_where_steps_are_equal_in_sigma_over_alpha() -> None:
    """The grid its weights are made for: fourth order but for the first steps, whose share (third) is small here."""

    def timesteps(n: int) -> list[float]:
        schedule = linear_in_lambda(101)
        most, least = (math.exp(-schedule.lambda_(t)) for t in (100, END))
        return [schedule.t_of_lambda(-math.log(most + (least - most) * i / n)) for i in range(n)]

    assert order("plms", timesteps, n=512) >= 2.7


@pytest.mark.parametrize("ends_at_one", [True, False])
@pytest.mark.parametrize("timesteps", [[999], [0], [999, 500], [500, 0], [999.0, 0.5], [900, 600, 300, 0]])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_single_image_as_the_data_is_found_in_any_number_of_steps(
    name: str, timesteps: list[float], ends_at_one: bool
) -> None:
    """With all data at mu, eps and x_0 are constant along the ODE: every deterministic sampler is exact."""
    schedule, mu = ENDS_AT_ONE[ends_at_one], 0.7
    x_T = schedule.alpha(timesteps[0]) * mu + schedule.sigma(timesteps[0]) * latents(8)

    def denoise(x: Tensor, t: float, call: int) -> Tensor:
        return (x - schedule.alpha(t) * mu) / schedule.sigma(t)

    steps = list(SAMPLERS[name](denoise, x_T, schedule, timesteps))
    assert [step.t for step in steps] == timesteps
    eps = denoise(x_T, timesteps[0], 0)
    for step, t in zip(steps, [*timesteps[1:], END], strict=True):
        torch.testing.assert_close(step.x_0, torch.full_like(x_T, mu))
        if name not in TAKES_ETA or name in ("ddim", "euler"):  # whose eta is 0 unless given
            torch.testing.assert_close(step.x, schedule.alpha(t) * mu + schedule.sigma(t) * eps)
        else:  # the noise is another one, of the same size
            assert ((step.x - schedule.alpha(t) * mu).abs() <= 6 * schedule.sigma(t) + 1e-12).all()


@pytest.mark.parametrize("name", sorted(TAKES_ETA))
def test_stochastic_samplers_have_the_mean_and_variance_of_the_data(name: str) -> None:
    """Found without drawing: on Gaussian data all is linear, so the variance is the sum of squared responses.

    Image 0 gets no noise and gives the mean. Image i > 0 gets a unit of it in step i alone; the last one starts one
    standard deviation off.
    """
    schedule, n = ENDS_AT_ONE[True], 1000
    problem = Gaussian(schedule, mu=0.7, s=0.5)
    x_T = torch.full((n + 1,), schedule.alpha(999) * problem.mu, dtype=torch.float64)
    x_T[n] += problem.std(999)
    units = iter(torch.eye(n + 1, dtype=torch.float64)[1:n])  # n - 1: the last step, to sigma 0, adds none
    timesteps = schedule.timesteps(n)
    step = last(SAMPLERS[name](problem.denoise, x_T, schedule, timesteps, noise=lambda x: next(units), eta=1.0))
    assert next(units, None) is None
    mean, responses = step.x[0].item(), step.x[1:] - step.x[0]
    assert mean == pytest.approx(problem.mu, rel=1e-9)
    assert responses.square().sum().sqrt().item() == pytest.approx(problem.s, rel=1e-2)
    # What remains of x_T is the slope of E[x_0 | x_T]; the ODE would carry all of it on.
    slope = schedule.alpha(999) * problem.s**2 / problem.std(999) ** 2
    assert responses[-1].item() == pytest.approx(slope * problem.std(999), rel=1e-9)


def test_noise_is_standard_normal_unless_given() -> None:
    problem = Gaussian(SD, mu=0.7, s=0.5)
    for name in TAKES_ETA:
        ends = []
        for options in ({}, {"noise": torch.randn_like}):
            torch.manual_seed(3)
            ends.append(last(SAMPLERS[name](problem.denoise, latents(4), SD, [999, 500], eta=1.0, **options)).x)
        assert torch.equal(*ends)


# --- diffusers ------------------------------------------------------------------------------------------------------
# Its tables are float32. They are replaced by ours (test_schedule compares the two), to compare the solvers closely.


def eps_of(x: Tensor, t: float, call: int = 0) -> Tensor:
    """Not the eps of any data, but smooth, bounded and far from linear."""
    return torch.tanh(x * (1 + t / 1000))


def model_output(x: Tensor, t: float, schedule: Schedule, prediction_type: str) -> Tensor:
    """What a model of that prediction type gives where its eps is `eps_of`."""
    eps = eps_of(x, t)
    if prediction_type == "epsilon":
        return eps
    x_0 = (x - schedule.sigma(t) * eps) / schedule.alpha(t)
    return schedule.alpha(t) * eps - schedule.sigma(t) * x_0


def theirs(scheduler_class: Any, schedule: Schedule, **config: Any) -> Any:
    betas = 1 - schedule.alphas_cumprod / torch.cat([torch.ones(1), schedule.alphas_cumprod[:-1]])
    scheduler = scheduler_class(trained_betas=betas.tolist(), num_train_timesteps=len(betas), **config)
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(schedule.last_alpha_cumprod, dtype=torch.float64)
    return scheduler


def run_theirs(scheduler: Any, x: Tensor, schedule: Schedule, noises: list[Tensor] | None = None) -> list[Tensor]:
    """The latents after each step; `noises` None leaves the noise, if any, to the scheduler."""
    trajectory = []
    for i, t in enumerate(scheduler.timesteps):
        output = model_output(x, t.item(), schedule, scheduler.config.prediction_type)
        x = scheduler.step(output, t, x, **({} if noises is None else {"variance_noise": noises[i]})).prev_sample
        trajectory.append(x)
    return trajectory


def run_ours(name: str, x: Tensor, schedule: Schedule, timesteps: Sequence[float], **options: Any) -> list[Tensor]:
    return [step.x for step in SAMPLERS[name](eps_of, x, schedule, timesteps, **options)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    """To a tolerance relative to the largest value of the latents."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * b.abs().max().item())


both_ends = pytest.mark.parametrize("schedule", ENDS_AT_ONE.values(), ids=["last-alpha-table", "last-alpha-one"])
both_predictions = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])


@both_ends
@both_predictions
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim(schedule: Schedule, prediction_type: str, eta: float) -> None:
    # Their step goes to t - T // n, ours to the next timestep: the same where n divides T.
    x, noises = latents(4, 3), list(latents(20, 4, 3).neg())
    scheduler = theirs(diffusers.DDIMScheduler, schedule, steps_offset=1, clip_sample=False)
    scheduler.register_to_config(prediction_type=prediction_type)
    scheduler.set_timesteps(20)
    expected = []
    reference = x
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        output = model_output(reference, t.item(), schedule, prediction_type)
        reference = scheduler.step(output, t, reference, eta=eta, variance_noise=noise).prev_sample
        expected.append(reference)
    draw = iter(noises)
    ours = run_ours("ddim", x, schedule, schedule.timesteps(20), eta=eta, noise=lambda x: next(draw))
    assert_same(ours, expected, 1e-12)


def test_ddim_with_their_own_tables_in_single_precision() -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    scheduler.set_timesteps(50)
    x = latents(4, 3, dtype=torch.float32)
    assert_same(run_ours("ddim", x, SD, SD.timesteps(50)), run_theirs(scheduler, x, SD), 1e-5)


@both_ends
@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_plms(schedule: Schedule, n: int) -> None:
    # Not with v_prediction: they combine the model's outputs, we (as CompVis) the eps.
    scheduler = theirs(diffusers.PNDMScheduler, schedule, steps_offset=1, skip_prk_steps=True)
    if n == 3:  # 3 does not divide 1000; see test_ddim
        scheduler.config.num_train_timesteps = 999
    scheduler.set_timesteps(n)
    x = latents(4, 3)
    expected = run_theirs(scheduler, x, schedule)
    expected = expected[:1] if n == 1 else expected[1:]  # the first call of two ends no step
    assert_same(run_ours("plms", x, schedule, schedule.timesteps(n)), expected, 1e-12)


@both_ends
@both_predictions
@pytest.mark.parametrize("n", [1, 2, 3, 20])
@pytest.mark.parametrize(
    ("name", "options", "algorithm"),
    [
        ("dpmpp_2m", {}, "dpmsolver++"),
        ("dpmpp_2m_sde", {"eta": 0.0}, "dpmsolver++"),
        ("dpmpp_2m_sde", {}, "sde-dpmsolver++"),
    ],
)
def test_multistep(
    name: str, options: dict[str, float], algorithm: str, n: int, prediction_type: str, schedule: Schedule
) -> None:
    scheduler = theirs(
        diffusers.DPMSolverMultistepScheduler,
        schedule,
        algorithm_type=algorithm,
        prediction_type=prediction_type,
        final_sigmas_type="zero" if schedule.last_alpha_cumprod == 1 else "sigma_min",
        euler_at_final=True,  # a last step of first order whatever n
    )
    # trailing: on Stable Diffusion's own grid (leading) the last step but one is not extrapolated here; see below.
    timesteps = schedule.timesteps(n, "trailing")
    scheduler.set_timesteps(timesteps=timesteps)
    x, noises = latents(4, 3, dtype=torch.float32), list(latents(n, 4, 3, dtype=torch.float32).neg())
    draw = iter(noises)
    ours = run_ours(name, x, schedule, timesteps, noise=lambda x: next(draw), **options)
    assert_same(ours, run_theirs(scheduler, x, schedule, noises), 1e-5)


@both_predictions
@pytest.mark.parametrize(
    ("name", "algorithm", "solver_types"),
    [
        ("dpm_solver_2", "dpmsolver", ["midpoint"] * 2),
        ("dpmpp_2s", "dpmsolver++", ["midpoint"] * 2),
        # Algorithm 2 of the paper is their "heun" at its second node and their "midpoint" at its end.
        ("dpm_solver_3", "dpmsolver", ["midpoint", "heun", "midpoint"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*dpmsolver.*:FutureWarning")
def test_singlestep(name: str, algorithm: str, solver_types: list[str], prediction_type: str) -> None:
    # Their inner nodes are timesteps of the list. Where lambda is linear in t, ours fall on the same integers.
    schedule, nodes = linear_in_lambda(49), len(solver_types)
    outer = [48, 36, 24, 12]
    scheduler = theirs(
        diffusers.DPMSolverSinglestepScheduler,
        schedule,
        solver_order=nodes,
        algorithm_type=algorithm,
        prediction_type=prediction_type,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(timesteps=[t - 12 * i // nodes for t in outer for i in range(nodes)])
    x = reference = latents(4, 3, dtype=torch.float32)
    expected = []
    for t, solver_type in zip(scheduler.timesteps, itertools.cycle(solver_types)):
        scheduler.register_to_config(solver_type=solver_type)
        output = model_output(reference, t.item(), schedule, prediction_type)
        reference = scheduler.step(output, t, reference).prev_sample
        expected.append(reference)
    assert_same(run_ours(name, x, schedule, outer), expected[nodes - 1 :: nodes], 1e-5)


def in_sigma_space(scheduler: Any, x: Tensor, schedule: Schedule, generator: torch.Generator) -> list[Tensor]:
    """Run an Euler scheduler of theirs, whose latents are x / alpha, and give back x."""
    y = x / schedule.alpha(scheduler.timesteps[0].item())
    trajectory = []
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[1:], strict=True):
        output = model_output(scheduler.scale_model_input(y, t), t.item(), schedule, scheduler.config.prediction_type)
        y = scheduler.step(output, t, y, generator=generator).prev_sample
        trajectory.append(y / (1 + sigma**2) ** 0.5)
    return trajectory


@both_ends
@both_predictions
@pytest.mark.parametrize("n", [1, 2, 20])
def test_euler(schedule: Schedule, prediction_type: str, n: int) -> None:
    scheduler = theirs(
        diffusers.EulerDiscreteScheduler,
        schedule,
        prediction_type=prediction_type,
        final_sigmas_type="zero" if schedule.last_alpha_cumprod == 1 else "sigma_min",
    )
    timesteps = schedule.timesteps(n)
    scheduler.set_timesteps(timesteps=timesteps)
    x = latents(4, 3, dtype=torch.float32)
    expected = in_sigma_space(scheduler, x, schedule, torch.Generator())
    assert_same(run_ours("euler", x, schedule, timesteps), expected, 1e-5)


@both_predictions
@pytest.mark.parametrize("n", [1, 2, 20])
def test_euler_a(prediction_type: str, n: int) -> None:
    schedule = ENDS_AT_ONE[True]  # the only end they know
    scheduler = theirs(
        diffusers.EulerAncestralDiscreteScheduler,
        schedule,
        prediction_type=prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
    )
    scheduler.set_timesteps(n)
    x = latents(4, 3, dtype=torch.float32)
    expected = in_sigma_space(scheduler, x, schedule, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    ours = run_ours(
        "euler_a", x, schedule, schedule.timesteps(n), noise=lambda x: torch.randn(x.shape, generator=generator)
    )
    assert_same(ours, expected, 1e-5)


@both_ends
@pytest.mark.parametrize("eta", [0.0, 0.5, 3.0])
def test_euler_a_in_the_variables_of_k_diffusion(schedule: Schedule, eta: float) -> None:
    timesteps, noises = schedule.timesteps(5), latents(5, 6).neg()
    sigmas = [schedule.sigma(t) / schedule.alpha(t) for t in [*timesteps, END]]
    x = latents(6)
    y = x / schedule.alpha(timesteps[0])
    for t, noise, (s, s_next) in zip(timesteps, noises, itertools.pairwise(sigmas), strict=True):
        sigma_up = min(s_next, eta * math.sqrt(s_next**2 * (s**2 - s_next**2) / s**2))
        sigma_down = math.sqrt(s_next**2 - sigma_up**2)
        y = y + (sigma_down - s) * eps_of(y / math.sqrt(1 + s**2), t) + sigma_up * noise
    draw = iter(noises)
    ours = run_ours("euler_a", x, schedule, timesteps, eta=eta, noise=lambda x: next(draw))
    torch.testing.assert_close(ours[-1], schedule.alpha(END) * y)


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends_at_one", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_are_numbered_and_counted(name: str, n: int, ends_at_one: bool) -> None:
    schedule = ENDS_AT_ONE[ends_at_one]
    timesteps = schedule.timesteps(n)
    per_step = SINGLESTEP_CALLS.get(name, 1)
    expected = n * per_step
    if name == "plms" and n > 1:
        expected = n + 1
    if name in SINGLESTEP_CALLS and ends_at_one:
        expected = (n - 1) * per_step + 1  # no half-way in lambda to where sigma is 0
    seen: list[int] = []

    def denoise(x: Tensor, t: float, call: int) -> Tensor:
        seen.append(call)
        return eps_of(x, t)

    so_far = []
    for step in SAMPLERS[name](denoise, latents(2), schedule, timesteps):
        assert step.call == seen[-1]
        so_far.append(step.call)
    assert seen == list(range(expected))
    assert len(so_far) == n
    assert count_calls(SAMPLERS[name], schedule, timesteps) == expected


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_for_a_number_of_calls_are_every_kth_of_as_many(name: str, spacing: str) -> None:
    sampler, per_step = SAMPLERS[name], SINGLESTEP_CALLS.get(name, 1)
    timesteps = timesteps_for(sampler, SD, 12, spacing)
    assert timesteps == SD.timesteps(11 if name == "plms" else 12, spacing)[::per_step]
    assert count_calls(sampler, SD, timesteps) == 12


def test_a_number_of_calls_that_a_sampler_cannot_make_is_an_error() -> None:
    for name, calls in (("dpmpp_2s", 5), ("dpm_solver_3", 4), ("dpm_solver_2", 1)):
        with pytest.raises(ValueError, match=f"cannot make {calls} calls on this grid: choose another"):
            timesteps_for(SAMPLERS[name], SD, calls, "leading")
    assert timesteps_for(SAMPLERS["plms"], SD, 1, "trailing") == [999]
    assert timesteps_for(SAMPLERS["dpmpp_2s"], ENDS_AT_ONE[True], 5, "trailing") == [999, 599, 199]


def test_counting_calls_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    count_calls(SAMPLERS["euler_a"], SD, SD.timesteps(5))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    def run(seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise(x: Tensor) -> Tensor:
            return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])

        x_T = noise(torch.empty(len(seeds), 3))
        return last(SAMPLERS[name](eps_of, x_T, SD, SD.timesteps(6), noise=noise)).x

    torch.testing.assert_close(run([7, 8]), torch.cat([run([7]), run([8])]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_keep_their_dtype_and_x_T_its_values(name: str, dtype: torch.dtype) -> None:
    x_T = latents(5, dtype=dtype)
    before = x_T.clone()
    for step in SAMPLERS[name](eps_of, x_T, SD, SD.timesteps(6)):
        assert step.x.dtype == step.x_0.dtype == dtype
    assert torch.equal(x_T, before)


@pytest.mark.parametrize("timesteps", [[], [5, 5], [1, 500], [500, -1]])
@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_that_do_not_fall_are_refused(name: str, timesteps: list[float]) -> None:
    with pytest.raises(ValueError, match="expected to fall strictly"):
        next(SAMPLERS[name](eps_of, latents(2), SD, timesteps))


def test_which_samplers_take_eta() -> None:
    stochastic = {"ddim", "dpmpp_2m_sde", "euler", "euler_a"}
    assert stochastic == TAKES_ETA
    assert {"plms", "dpm_solver_2", "dpm_solver_3", "dpmpp_2s", "dpmpp_2m"} | stochastic == set(SAMPLERS)


def test_importing_the_samplers_costs_torch_alone() -> None:
    code = "import sys, minireuse.samplers; print(*{m.partition('.')[0] for m in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in modules
    assert not {"transformers", "safetensors", "diffusers", "einops", "PIL"} & set(modules)


def test_the_timestep_of_every_call_is_told() -> None:
    schedule = Schedule.from_config()
    times = schedule.timesteps(4)  # 751, 501, 251, 1
    assert call_timesteps(SAMPLERS["ddim"], schedule, times) == times
    assert call_timesteps(SAMPLERS["plms"], schedule, times) == [751, 501, 501, 251, 1]
    for sampler in SAMPLERS.values():
        told = call_timesteps(sampler, schedule, times)
        assert len(told) == count_calls(sampler, schedule, times)
        assert set(times) <= set(told)
        assert told == sorted(told, reverse=True)

"""The schedule against diffusers' tables and timestep lists, and against lists written out."""

from __future__ import annotations

import dataclasses
import math

import diffusers
import pytest
import torch

from minireuse.schedule import END, Schedule, ScheduleConfig

SD = Schedule.from_config()
GOLDEN = {
    ("leading", 1): [1],
    ("leading", 4): [751, 501, 251, 1],
    ("leading", 30): [958 - 33 * i for i in range(30)],
    ("leading", 50): [981 - 20 * i for i in range(50)],
    ("leading", 1000): list(range(999, -1, -1)),  # offset 1 would ask for entry 1000
    ("trailing", 1): [999],
    ("trailing", 4): [999, 749, 499, 249],
    ("trailing", 7): [999, 856, 713, 570, 428, 285, 142],
    ("trailing", 1000): list(range(999, -1, -1)),
    ("linspace", 1): [0],
    ("linspace", 4): [999, 666, 333, 0],
    ("linspace", 7): [999, 832, 666, 500, 333, 166, 0],
    ("linspace", 1000): list(range(999, -1, -1)),
}


@pytest.mark.parametrize(("spacing", "n"), GOLDEN)
def test_timesteps_are_the_lists_written_out(spacing: str, n: int) -> None:
    assert SD.timesteps(n, spacing) == GOLDEN[spacing, n]
    assert dataclasses.replace(SD, spacing=spacing).timesteps(n) == GOLDEN[spacing, n]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 13, 15, 20, 30, 48, 50, 99, 100, 333, 500, 501, 999])
def test_timesteps_are_those_of_diffusers(spacing: str, n: int) -> None:
    for offset in (0, 1):
        theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
        theirs.set_timesteps(n)
        assert dataclasses.replace(SD, offset=offset).timesteps(n, spacing) == theirs.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_number_of_steps_gives_that_many_inside_the_table(spacing: str) -> None:
    for n in range(1, 1001):
        timesteps = SD.timesteps(n, spacing)
        assert len(set(timesteps)) == n
        assert sorted(timesteps, reverse=True) == timesteps
        assert 0 <= timesteps[-1] <= timesteps[0] <= 999


@pytest.mark.parametrize("n", [0, -1, 1001, 20.0])
def test_an_impossible_number_of_steps_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"steps is {n}, expected a whole number from 1 to 1000"):
        SD.timesteps(n)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="spacing is 'middle', expected one of leading, trailing, linspace"):
        SD.timesteps(10, "middle")
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        Schedule.from_config(ScheduleConfig(prediction_type="sample"))
    with pytest.raises(ValueError, match="beta_schedule is 'cosine'"):
        Schedule.from_config(ScheduleConfig(beta_schedule="cosine"))


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_table_is_that_of_diffusers(beta_schedule: str) -> None:
    config = ScheduleConfig(beta_schedule=beta_schedule)
    theirs = diffusers.DDIMScheduler(beta_schedule=beta_schedule, beta_start=0.00085, beta_end=0.012).alphas_cumprod
    ours = Schedule.from_config(config).alphas_cumprod
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-5, atol=0)  # theirs is a product of 1000 float32


def test_alpha_sigma_and_lambda_follow_from_the_table() -> None:
    for t in (0, 1, 500, 999):
        a = SD.alphas_cumprod[t]
        given = torch.tensor([SD.alpha(t), SD.sigma(t), SD.lambda_(t)], dtype=torch.float64)
        torch.testing.assert_close(given, torch.stack([a.sqrt(), (1 - a).sqrt(), 0.5 * torch.logit(a)]))
        assert SD.at(t) == (t, SD.alpha(t), SD.sigma(t), SD.lambda_(t))


def test_between_entries_lambda_is_linear() -> None:
    quarter = 0.75 * SD.lambda_(10) + 0.25 * SD.lambda_(11)
    assert SD.lambda_(10.25) == pytest.approx(quarter, abs=1e-14)
    assert math.log(SD.alpha(10.25) / SD.sigma(10.25)) == pytest.approx(quarter, abs=1e-12)
    assert SD.alpha(10.25) ** 2 + SD.sigma(10.25) ** 2 == pytest.approx(1)


def test_t_of_lambda_inverts_lambda_and_stops_at_the_ends() -> None:
    for t in (0, 0.5, 1, 3.25, 499.999, 998.5, 999):
        assert SD.t_of_lambda(SD.lambda_(t)) == pytest.approx(t, abs=1e-9)
    assert SD.t_of_lambda(SD.lambda_(0) + 1) == SD.t_of_lambda(math.inf) == 0
    assert SD.t_of_lambda(SD.lambda_(999) - 1) == SD.t_of_lambda(-math.inf) == 999


def test_past_the_table_is_refused() -> None:
    for t in (999.5, 1000):
        with pytest.raises(ValueError, match=f"t is {t}, expected at most 999"):
            SD.at(t)


def test_both_conventions_for_the_last_alpha() -> None:
    theirs = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    one = Schedule.from_config(ScheduleConfig(last_alpha_one=True))
    assert one.at(END) == (END, 1, 0, math.inf)
    assert one.last_alpha_cumprod == theirs.final_alpha_cumprod.item()
    assert SD.at(END)[1:] == SD.at(0)[1:]
    theirs = diffusers.DDIMScheduler(**theirs.config | {"set_alpha_to_one": False})
    assert SD.last_alpha_cumprod == pytest.approx(theirs.final_alpha_cumprod.item(), rel=1e-6)


def test_a_schedule_cannot_be_changed_or_built_from_nonsense() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SD.offset = 0  # type: ignore[misc]
    table = SD.alphas_cumprod
    for wrong, message in [(table.float(), "float32"), (table.flip(0), "strictly"), (table * 2, "leaves")]:
        with pytest.raises(ValueError, match=message):
            Schedule(wrong, 1.0)
    with pytest.raises(ValueError, match=r"last_alpha_cumprod is 0\.5"):
        Schedule(table, 0.5)

"""Choosing what may reuse within an amount of memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minireuse
from minireuse.common.options import parse_bytes
from minireuse.plan import ReusePlan, Site
from minireuse.policies import hurry, select
from minireuse.sample import command as sample
from minireuse.sample import memory
from minireuse.sample.memory import Share, choose, restrict, weigh
from minireuse.search.budget import groups_of
from minireuse.search.costs import Costs

SITES = tuple(Site(name, "map") for name in ("a.attn1", "b.attn1", "c.attn2", "d.attn2"))
PLAN = ReusePlan(np.array([[0, 0, 0, 0], [1, 0, 1, 1], [0, 1, 1, 1]], dtype=bool), SITES, (True, True, False))
BYTES = dict(zip(SITES, (100, 50, 30, 1), strict=True))


def peak(plan: ReusePlan) -> int:
    return sum(BYTES[site] for site in plan.sites)


def test_restricted_plans_keep_the_rows_of_their_sites() -> None:
    part = restrict(PLAN, (SITES[3], SITES[0]))
    assert part.sites == (SITES[0], SITES[3])
    assert (part.mask == PLAN.mask[:, [0, 3]]).all()
    assert part.guided == PLAN.guided
    assert restrict(PLAN, ()).sites == ()


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (200, {"cheap", "large", "middle"}),
        (135, {"cheap", "large"}),  # after `cheap`, `large` does less damage for its time than `middle`
        (110, {"cheap", "middle"}),  # `large` does not fit beside it, the next one does
        (29, set()),
    ],
)
def test_least_damage_for_the_time_saved_comes_first(budget: int, expected: set[str]) -> None:
    shares = {
        "large": Share(SITES[:1], damage=4.0, saved=2.0),
        "middle": Share(SITES[1:2], damage=3.0, saved=1.0),
        "cheap": Share(SITES[2:3], damage=0.1, saved=1.0),
        "useless": Share(SITES[3:], damage=0.0, saved=-1.0),
    }
    plan, names = choose(PLAN, shares, peak, budget)
    assert set(names) == expected
    assert peak(plan) <= budget
    assert set(plan.sites) == {site for name in expected for site in shares[name].sites}


def test_shares_are_those_of_each_group_alone(pipeline: minireuse.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = hurry(4, select(pipeline.sites), k=2)
    groups = groups_of(plan.sites, 3)
    known = Costs(1.0, (), (0.0,) * len(groups), tuple(-0.1 * i for i in range(len(groups))))
    monkeypatch.setattr(memory, "measure", lambda *given, **settings: known)
    render = lambda p: pipeline.generate("a lake", seeds=3, steps=4, plan=p).images  # noqa: E731
    shares = weigh(pipeline, plan, groups, render, size=(8, 8), cache_dtype=torch.float16)
    assert [share.saved for share in shares.values()] == pytest.approx([0.1 * i for i in range(len(groups))])
    assert {site for share in shares.values() for site in share.sites} == set(plan.sites)
    full = pipeline.generate("a lake", seeds=3, steps=4).images.astype(float)
    for share in shares.values():
        image = pipeline.generate("a lake", seeds=3, steps=4, plan=restrict(plan, share.sites)).images
        assert share.damage == pytest.approx(np.square(image - full).mean())


def test_the_cache_stays_within_its_budget(
    smallest_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every group is said to save the same time, so the least damage decides."""
    monkeypatch.setattr(memory, "measure", lambda _, groups, **s: Costs(1.0, (), (), (-0.1,) * len(groups)))
    Image.new("RGB", (16, 16), "red").save(tmp_path / "init.png")
    run = ["--prompt", "a lake", "--steps", "6", "--policy", "hurry", "--model", str(smallest_folder), "--json"]

    def peak_of(*more: str) -> tuple[int, str]:
        assert sample.main([*run, "--out", str(tmp_path / "a.png"), "--overwrite", *more]) == 0
        out, err = capsys.readouterr()
        return json.loads(out)["cache_peak_bytes"], err

    whole, _ = peak_of()
    same, said = peak_of("--cache-budget", "1GiB")
    assert (same, said) == (whole, "")
    less, said = peak_of("--cache-budget", f"{whole // 2}B")
    assert 0 < less <= whole // 2
    assert "reuses: it changes the first image by a squared error of" in said
    assert (
        "map of self attention at resolution 0 computes: it alone is larger than the budget"
        in peak_of("--cache-budget", "9kB")[1]
    )
    other = ("--init-image", str(tmp_path / "init.png"), "--strength", "0.5", "--guidance-scale", "1")
    assert 0 < peak_of("--cache-budget", "80000B", *other)[0] <= 80000
    assert sample.main([*run, "--cache-budget", "1MiB", "--dry-run"]) == 2
    assert "does not read them; leave out one" in capsys.readouterr().err
    assert sample.main([*run, "--cache-budget", "plenty", "--out", str(tmp_path / "b.png")]) == 2
    assert "'plenty' is no amount of memory" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "number"), [("512MiB", 2**29), ("1.5 GB", 1_500_000_000), ("2gib", 2**31), ("7B", 7)])
def test_amounts_of_memory(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "5", "MiB", "-5MiB", "5 parsecs", "nanMiB"])
def test_other_words_are_no_amounts(text: str) -> None:
    with pytest.raises(ValueError, match="512MiB"):
        parse_bytes(text)

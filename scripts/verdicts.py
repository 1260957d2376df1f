"""When a claim holds: the thresholds of the reproduction, apart from what is measured.

Each function takes numbers and answers `holds`, `does not hold` or `unclear`. Intervals are (low, high), of a mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

Interval = tuple[float, float]


def verdict(holds: bool, fails: bool) -> str:
    return "holds" if holds else "does not hold" if fails else "unclear"


def redundant(cosine: float, change: float) -> str:
    """cosine: of neighbouring maps. change: since the call before, as a share of the change since the first call."""
    return verdict(cosine > 0.9 and change < 0.5, cosine < 0.5)


def falls(correlation: float) -> str:
    """correlation: Spearman's, of a call's number with the damage it does."""
    return verdict(correlation < -0.8, correlation > 0)


def grows(exponents: Collection[Interval]) -> str:
    """exponents: of growth per call, by the call that was perturbed."""
    return verdict(all(low > 0 for low, _ in exponents), all(high < 0 for _, high in exponents))


def late_is_best(share: float, psnr: Mapping[str, float]) -> str:
    """share: of random plans below HURRY. psnr: of `hurry`, `early` and `interval`."""
    return verdict(share > 0.9 and psnr["hurry"] > max(psnr["early"], psnr["interval"]), share < 0.5)


def carries_over(gains: Collection[Interval]) -> str:
    """gains: over HURRY, dB, in each setting that the plan was not searched for."""
    above = [low > 0 for low, _ in gains]
    return verdict(all(above), not any(above))


def small_caches_do(psnr: Collection[float]) -> str:
    """psnr: of caches in fewer bits, to the image with a full one."""
    return verdict(min(psnr) > 45, min(psnr) < 30)


def above(gains: Collection[Interval], comparable: bool = True) -> str:
    """gains: of ours over each rival, dB. comparable: whether every rival is as fast; without one nothing is above."""
    return verdict(bool(gains) and comparable and all(low > 0 for low, _ in gains), any(high < 0 for _, high in gains))


def keeps_to_prompts(drops: Collection[Interval]) -> str:
    """drops: in the share of prompts followed, of each row that is close to the full sampler."""
    return verdict(bool(drops) and all(high < 0.03 for _, high in drops), any(low > 0.03 for low, _ in drops))

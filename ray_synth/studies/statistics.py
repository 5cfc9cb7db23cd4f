"""What a few seeds say: means with intervals, and differences between arms, paired by seed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values, in their unit.
        half: half the width of the mean's 95% interval by Student's t; NaN with a single seed.
        p: of the two-sided t-test that the mean is 0; NaN where there is nothing to test.
        num_seeds: how many values.
    """

    mean: float
    half: float
    p: float
    num_seeds: int

    def shown(self, *, signed: bool = False) -> str:
        """`+1.5 ± 0.4`; without an interval where there is none."""
        mean = f"{self.mean:+.1f}" if signed else f"{self.mean:.1f}"
        return mean if np.isnan(self.half) else f"{mean} ± {self.half:.1f}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of a few values, its interval, and a test that it is 0.

    Raises:
        ValueError: no value.
    """
    from scipy import stats

    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        raise ValueError("no value to average")
    mean, n = float(found.mean()), len(found)
    if n < 2:
        return Estimate(mean, float("nan"), float("nan"), n)
    error = float(found.std(ddof=1)) / n**0.5
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * error
    if error == 0:
        return Estimate(mean, half, 1.0 if mean == 0 else 0.0, n)
    return Estimate(mean, half, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


def paired(after: dict[int, float], before: dict[int, float]) -> Estimate:
    """The mean difference of two arms over the seeds that both have (a paired t-test).

    Raises:
        ValueError: they have no seed in common.
    """
    seeds = sorted(set(after) & set(before))
    if not seeds:
        raise ValueError("the two arms have no seed in common")
    return estimate([after[seed] - before[seed] for seed in seeds])


def false_discovery_rates(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p of each test, among all of a table's; NaN stays NaN."""
    from scipy import stats

    found = np.asarray(p_values, dtype=np.float64)
    known = ~np.isnan(found)
    if known.any():
        found[known] = stats.false_discovery_control(found[known])
    return found.tolist()


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN with fewer than 3 pairs or where one side is constant."""
    from scipy import stats

    if len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1:
        return float("nan")
    return float(stats.spearmanr(one, other).statistic)

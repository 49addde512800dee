"""Intervals, tests and the three-valued decision of a gate.

Each end of an interval is a one-sided 95 % bound unless said otherwise. A `drop` is baseline minus candidate: positive is
worse. The bounds keep what they promise: a candidate whose true drop is exactly the margin passes in at most about 5 %
of runs (tests/measure/test_statistics.py enumerates it). Nothing here draws random numbers; the bootstraps are in
`bootstrap.py`, sample sizes in `power.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mpdeploy.errors import DataError

Decision = Literal["pass", "fail", "inconclusive"]
Bounds = tuple[float, float]
FloatArray = NDArray[np.float64]

CONFIDENCE = 0.95
"""Of each bound that a gate decides by."""
EXACT_MCNEMAR_BELOW = 25
"""Discordant pairs below which McNemar's test is the exact one."""
MIN_SAMPLES_P99 = 299
"""Fewest samples whose maximum bounds the 99th percentile with 95 % confidence: 0.99^299 < 0.05."""

_NORMAL = NormalDist()


def normal_quantile(probability: float) -> float:
    """The standard normal's value below which `probability` lies, in (0, 1)."""
    return _NORMAL.inv_cdf(probability)


def normal_cdf(value: float) -> float:
    """Probability that a standard normal number lies below `value`."""
    return _NORMAL.cdf(value)


def decide_at_most(bounds: Bounds, limit: float) -> Decision:
    """`pass` where all of the interval lies below `limit`, `fail` where all of it lies above, else `inconclusive`.

    A bound that is NaN fails: what could not be measured has not been shown to be good.
    """
    low, high = bounds
    if math.isnan(low) or math.isnan(high) or math.isnan(limit):
        return "fail"
    if high < limit:
        return "pass"
    return "fail" if low > limit else "inconclusive"


# -- shares ------------------------------------------------------------------------------------------------------------


def clopper_pearson(count: int, num_samples: int, confidence: float = CONFIDENCE) -> Bounds:
    """Exact bounds of a share of which `count` of `num_samples` were seen, each one-sided at `confidence`.

    Zero of n gives an upper bound of 1 - 0.05^(1/n), about 3/n. Clopper and Pearson, Biometrika 26 (1934).
    """
    from scipy.special import betaincinv

    if num_samples < 1:
        return 0.0, 1.0
    low = 0.0 if count == 0 else float(betaincinv(count, num_samples - count + 1, 1.0 - confidence))
    high = 1.0 if count == num_samples else float(betaincinv(count + 1, num_samples - count, confidence))
    return low, high


@dataclass(frozen=True, slots=True)
class PairedCounts:
    """Of `num_samples` paired 0/1 scores, `lost` are 1 in the baseline alone, `gained` in the candidate alone."""

    num_samples: int
    lost: int
    gained: int

    @classmethod
    def of(cls, baseline: FloatArray, candidate: FloatArray) -> PairedCounts:
        """Count two arrays of 0/1 scores."""
        return cls(
            len(baseline),
            int(((baseline == 1) & (candidate == 0)).sum()),
            int(((baseline == 0) & (candidate == 1)).sum()),
        )

    @property
    def drop(self) -> float:
        """Share of right answers in the baseline minus that in the candidate."""
        return (self.lost - self.gained) / self.num_samples if self.num_samples else math.nan

    @property
    def num_discordant(self) -> int:
        """Samples that one of the two has right and the other wrong."""
        return self.lost + self.gained


def tango_statistic(
    lost: FloatArray | float, gained: FloatArray | float, num_samples: int, drop: FloatArray | float
) -> FloatArray:
    """Tango's score statistic for the hypothesis that the true drop is `drop`; falls as `drop` rises.

    (lost - gained - n drop) over its standard deviation where the share of `gained` is the one that is most likely
    under the hypothesis. Vectorised over its arguments. Tango, Statistics in Medicine 17 (1998) 891-908, equations 6 to
    8.
    """
    n = float(num_samples)
    lost, gained, drop = (np.asarray(value, dtype=np.float64) for value in (lost, gained, drop))
    linear = (2.0 * n - lost + gained) * drop - lost - gained
    product = -gained * drop * (1.0 - drop)
    share_gained = (np.sqrt(np.maximum(linear * linear - 8.0 * n * product, 0.0)) - linear) / (4.0 * n)
    variance = n * (2.0 * share_gained + drop * (1.0 - drop))
    numerator = lost - gained - n * drop
    # No variance is left at a drop of 0 without discordance, and at the ends -1 and 1.
    with np.errstate(divide="ignore", invalid="ignore"):
        limit = np.where(numerator == 0.0, 0.0, np.copysign(np.inf, numerator))
        return np.where(variance > 0.0, numerator / np.sqrt(np.maximum(variance, 0.0)), limit)


def tango_bounds(
    lost: FloatArray | float, gained: FloatArray | float, num_samples: int, confidence: float = CONFIDENCE
) -> tuple[FloatArray, FloatArray]:
    """Tango's score bounds of the drop, each one-sided at `confidence`; vectorised over the counts.

    The statistic is monotone in the drop, so bisection always finds its root, to the last bit.
    """
    z = normal_quantile(confidence)
    lost, gained = np.broadcast_arrays(np.asarray(lost, dtype=np.float64), np.asarray(gained, dtype=np.float64))
    estimate = (lost - gained) / num_samples

    def root(left: FloatArray, right: FloatArray, target: float) -> FloatArray:
        for _ in range(64):
            middle = 0.5 * (left + right)
            above = tango_statistic(lost, gained, num_samples, middle) > target
            left, right = np.where(above, middle, left), np.where(above, right, middle)
        return 0.5 * (left + right)

    return root(np.full_like(estimate, -1.0), estimate, z), root(estimate, np.full_like(estimate, 1.0), -z)


def paired_binary_bounds(counts: PairedCounts, confidence: float = CONFIDENCE) -> Bounds:
    """Bounds of the drop between paired 0/1 scores: Tango's, and exact ones where all discordance points one way.

    Where nothing was gained, the drop cannot exceed the share that is lost, whose Clopper-Pearson bound is exact; the
    score bound alone would let up to 7 % of runs pass at the margin there. Zero flips in n bound the drop by 1 -
    0.05^(1/n), about 3/n.
    """
    if counts.num_samples < 1:
        return math.nan, math.nan
    low, high = (float(bound) for bound in tango_bounds(counts.lost, counts.gained, counts.num_samples, confidence))
    if counts.gained == 0:
        high = max(high, clopper_pearson(counts.lost, counts.num_samples, confidence)[1])
    if counts.lost == 0:
        low = min(low, -clopper_pearson(counts.gained, counts.num_samples, confidence)[1])
    return low, high


def mcnemar_p_value(counts: PairedCounts) -> float:
    """Two-sided p-value of "as many lost as gained": exact below 25 discordant pairs, else corrected chi-squared."""
    total, smaller = counts.num_discordant, min(counts.lost, counts.gained)
    if total == 0:
        return 1.0
    if total < EXACT_MCNEMAR_BELOW:
        return min(1.0, 2.0 * sum(math.comb(total, k) for k in range(smaller + 1)) / 2.0**total)
    chi_squared = max(abs(counts.lost - counts.gained) - 1, 0) ** 2 / total
    return math.erfc(math.sqrt(chi_squared / 2.0))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: claiming all that lie below 0.05 is wrong about any of them in at most 5 % of runs.

    Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.
    """
    ordered = sorted(p_values, key=lambda name: (p_values[name], name))
    adjusted: dict[str, float] = {}
    largest = 0.0
    for position, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - position) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


# -- quantiles ---------------------------------------------------------------------------------------------------------


def quantile(samples: FloatArray, share: float) -> float:
    """The smallest sample that `share` of all do not exceed; the median is the mean of the middle two."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    if not len(ordered):
        raise DataError("There is no quantile of no samples.")
    if share == 0.5:
        return float(0.5 * (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]))
    return float(ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))])


def quantile_bounds(
    samples: FloatArray, share: float, confidence: float = CONFIDENCE
) -> tuple[float | None, float | None]:
    """Distribution-free bounds of a quantile: two of the samples, by the binomial distribution of how many lie below.

    Each end is one-sided at `confidence`, and None where there are too few samples for one (an upper bound of the 99th
    percentile needs 299). Assumes that the samples are independent; David and Nagaraja, Order Statistics, section 7.1.
    """
    from scipy.special import bdtr

    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    n = len(ordered)
    if n == 0:
        return None, None
    # P(X_(k) >= q) = P(at most k - 1 samples lie below q) = bdtr(k - 1, n, share)
    at_most = np.asarray(bdtr(np.arange(n, dtype=np.float64), n, share), dtype=np.float64)
    below = np.flatnonzero(at_most <= 1.0 - confidence)  # k - 1 such that X_(k) <= q with enough confidence
    above = np.flatnonzero(at_most >= confidence)  # k - 1 such that X_(k) >= q with enough confidence
    low = float(ordered[below[-1]]) if len(below) else None
    high = float(ordered[above[0]]) if len(above) else None
    return low, high

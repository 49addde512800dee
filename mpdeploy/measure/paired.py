"""Is a candidate no worse than its baseline by more than a margin? Answered from scores of the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpdeploy.errors import DataError
from mpdeploy.measure.bootstrap import bootstrap_mean
from mpdeploy.measure.power import samples_to_decide_binary, samples_to_decide_mean
from mpdeploy.measure.statistics import (
    Bounds,
    Decision,
    FloatArray,
    PairedCounts,
    clopper_pearson,
    decide_at_most,
    normal_cdf,
    paired_binary_bounds,
    tango_statistic,
)

MIN_CHANGED = 20
"""Fewer samples (or clusters) that differ at all are too few to resample: see `_cautious`."""


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """A non-inferiority decision from paired scores, higher being better.

    Attributes:
        drop: mean of baseline minus candidate; positive is worse, NaN where a score is.
        bounds: of the drop, each one-sided at 95 %.
        decision: `pass` if the upper bound is below the margin, `fail` if the lower one is above it, else
            `inconclusive`.
        num_samples: paired samples.
        method: `tango`, `bca`, `bca-clusters`, or `none` where a score is NaN or there are no samples.
        num_lost: samples that scored lower than in the baseline.
        num_gained: samples that scored higher.
        p_value_fail: one-sided, of "the drop is at most the margin".
        samples_to_decide: how many would decide with 80 % probability; only where inconclusive.
    """

    drop: float
    bounds: Bounds
    decision: Decision
    num_samples: int
    method: str
    num_lost: int
    num_gained: int
    p_value_fail: float | None
    samples_to_decide: int | None


def is_binary(scores: FloatArray) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(((scores == 0) | (scores == 1)).all())


def compare_paired(
    baseline: FloatArray,
    candidate: FloatArray,
    *,
    margin: float,
    clusters: NDArray[np.generic] | None = None,
    seed: int = 0,
) -> PairedComparison:
    """Compare scores of the same samples, in the same order.

    Tango's score interval where both are 0 or 1 throughout, else a BCa bootstrap; of clusters where samples come in
    groups.

    Args:
        baseline: [n], higher is better.
        candidate: [n].
        margin: the largest drop allowed.
        clusters: [n] or None: samples with equal numbers are not independent (frames of one video, seeds).
        seed: of the cluster bootstrap.

    Raises:
        DataError: the two do not hold the same number of scores.
    """
    baseline, candidate = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if baseline.shape != candidate.shape or baseline.ndim != 1:
        raise DataError(
            f"Paired scores must be two arrays of one length, found shapes {baseline.shape} and {candidate.shape}."
        )
    n = len(baseline)
    if clusters is not None and len(np.unique(clusters)) == n:
        clusters = None  # each sample is alone in its cluster: they are independent
    with np.errstate(invalid="ignore"):
        drops = baseline - candidate
    num_lost, num_gained = int((drops > 0).sum()), int((drops < 0).sum())
    if n == 0 or not np.isfinite(drops).all():
        return PairedComparison(math.nan, (math.nan, math.nan), "fail", n, "none", num_lost, num_gained, None, None)
    if clusters is None and is_binary(baseline) and is_binary(candidate):
        counts = PairedCounts(n, num_lost, num_gained)
        bounds = paired_binary_bounds(counts)
        drop, method = counts.drop, "tango"
        p_value = 1.0 - normal_cdf(float(tango_statistic(num_lost, num_gained, n, margin)))
        needed = samples_to_decide_binary(counts, margin)
    else:
        bootstrap = bootstrap_mean(drops, clusters=clusters, seed=seed)
        bounds = _cautious(drops, baseline, candidate, bootstrap.bounds, clusters)
        drop, method = bootstrap.mean, "bca" if clusters is None else "bca-clusters"
        p_value = bootstrap.p_value_above(margin)
        # The bounds' own width knows about clusters; so many times more samples narrow it by the root of that.
        deviation = (
            float(bounds[1] - bounds[0]) / (2 * 1.6449) * math.sqrt(n)
            if math.isfinite(bounds[1] - bounds[0])
            else math.inf
        )
        needed = samples_to_decide_mean(drop, deviation, margin)
    decision = decide_at_most(bounds, margin)
    return PairedComparison(
        drop, bounds, decision, n, method, num_lost, num_gained, p_value, needed if decision == "inconclusive" else None
    )


def _cautious(
    drops: FloatArray, baseline: FloatArray, candidate: FloatArray, bounds: Bounds, clusters: NDArray[np.generic] | None
) -> Bounds:
    """Widen bounds where hardly a sample changed: resampling what never changed gives [0, 0], at any number of samples.

    The share of samples that lose is at most its Clopper-Pearson bound (3/n where none was seen), and each loses at
    most what the scores span.
    """
    changed = drops != 0
    lost, gained, units = int((drops > 0).sum()), int((drops < 0).sum()), len(drops)
    num_changed = lost + gained
    if clusters is not None:
        lost, gained = len(np.unique(clusters[drops > 0])), len(np.unique(clusters[drops < 0]))
        num_changed, units = len(np.unique(clusters[changed])), len(np.unique(clusters))
    if num_changed >= MIN_CHANGED:
        return bounds
    both = np.concatenate([baseline, candidate])
    span = max(float(np.ptp(both)), float(np.abs(both).max())) or math.inf
    low, high = bounds
    high = max(high, clopper_pearson(lost, units)[1] * span)
    if num_changed == 0:
        low = min(low, -clopper_pearson(gained, units)[1] * span)
    return low, high

"""Corpus metrics: one number over all samples (F1, BLEU, mAP), resampled for an interval since it is no mean of scores.

The metric is computed on resamples of the samples, the same ones on both sides, where the models' answers are at hand;
what it gave is evidence, so that the gate can be decided again without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Array
from mpdeploy.errors import DataError
from mpdeploy.measure.bootstrap import draw_indices, widening_of
from mpdeploy.measure.statistics import (
    CONFIDENCE,
    Bounds,
    FloatArray,
    clopper_pearson,
    normal_cdf,
    normal_quantile,
    quantile,
)

_WORTH = 6.0
"""A changed sample is taken to be worth so many standard deviations of one sample's influence (one of a rare class is)."""

CorpusMetric = Callable[[Mapping[str, Array], Array | None], float]


@dataclass(frozen=True, slots=True)
class CorpusDraws:
    """A corpus metric of one model: on all samples, and on resamples of them.

    Attributes:
        value: on all samples.
        draws: [num_resamples].
        num_units: samples, or clusters of samples, that were drawn.
    """

    value: float
    draws: FloatArray
    num_units: int


@dataclass(frozen=True, slots=True)
class CorpusDrop:
    """The drop of a corpus metric, baseline minus candidate.

    Attributes:
        drop: on all samples.
        bounds: each one-sided at 95 %.
        deviation: standard deviation of the drop.
    """

    drop: float
    bounds: Bounds
    deviation: float

    def p_value_above(self, limit: float) -> float:
        """One-sided, of 'the drop is at most the limit', from the normal approximation; exact 0 or 1 where nothing varies."""
        if self.deviation == 0.0:
            return 0.0 if self.bounds[0] > limit else 1.0
        return 1.0 - normal_cdf((self.drop - limit) / self.deviation)


def corpus_draws(
    metric: CorpusMetric,
    outputs: Mapping[str, Array],
    labels: Array | None,
    *,
    clusters: NDArray[np.generic] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> CorpusDraws:
    """The metric on all samples and on resamples; equal arguments but `outputs` give the same resamples.

    Args:
        metric: (outputs, labels) -> one number, higher is better.
        outputs: name -> [n, ...].
        labels: [n, ...] or None.
        clusters: [n] or None: whole clusters are drawn.
        num_resamples: how many.
        seed: fixes the draws.

    Raises:
        DataError: there are no samples, or the metric gave no number.
    """
    n = len(next(iter(outputs.values()), ()))
    if n == 0:
        raise DataError("There is no sample to compute a corpus metric on.")
    groups: list[NDArray[np.int64]] = []
    if clusters is not None:
        _, position = np.unique(clusters, return_inverse=True)
        groups = [np.flatnonzero(position == number) for number in range(position.max() + 1)]
    num_units = n if clusters is None else len(groups)

    def on(rows: NDArray[np.int64] | slice) -> float:
        found = metric({name: array[rows] for name, array in outputs.items()}, None if labels is None else labels[rows])
        try:
            return float(found)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"The corpus metric returned {type(found).__name__}, expected one number over all samples.",
                hint="a metric with one number a sample is validation.metric",
            ) from error

    def resampled(number: int) -> float:
        chosen = draw_indices((seed, number), (1, num_units), num_units)[0]
        return on(chosen if clusters is None else np.concatenate([groups[unit] for unit in chosen]))

    draws = np.array([resampled(number) for number in range(num_resamples)], dtype=np.float64)
    return CorpusDraws(on(slice(None)), draws, num_units)


def corpus_bounds(
    baseline: float, candidate: float, baseline_draws: FloatArray, draws: FloatArray, *, num_units: int
) -> CorpusDrop:
    """Bias-corrected percentile bounds of the drop, widened by Student's t as `bootstrap_mean`'s are.

    Efron, JASA 82 (1987) 171-185, without acceleration: the jackknife would call the metric once a sample.

    Raises:
        DataError: a value or a resample is not a number, or there are no resamples.
    """
    drop = baseline - candidate
    drops = np.asarray(baseline_draws, dtype=np.float64) - np.asarray(draws, dtype=np.float64)
    if not math.isfinite(drop) or not len(drops) or not np.isfinite(drops).all():
        raise DataError(
            f"The corpus metric is not a number on {int((~np.isfinite(drops)).sum())} of {len(drops)} resamples."
        )
    if num_units < 2:
        return CorpusDrop(drop, (-math.inf, math.inf), math.inf)
    below = float((drops < drop).mean() + 0.5 * (drops == drop).mean())
    bias = normal_quantile(min(max(below, 1e-3), 1.0 - 1e-3))
    z = widening_of(num_units, CONFIDENCE) * normal_quantile(CONFIDENCE)
    low, high = (quantile(drops, min(max(normal_cdf(2.0 * bias + side), 1e-6), 1.0)) for side in (-z, z))
    worth = max(
        max(abs(baseline), abs(candidate)) / num_units, _WORTH * float(np.std(baseline_draws)) / math.sqrt(num_units)
    )
    slack = _slack(drops, num_units, worth)
    if slack > 0.0:
        low, high = min(low, drop - slack), max(high, drop + slack)
    return CorpusDrop(drop, (low, high), float(drops.std()))


def _slack(drops: FloatArray, num_units: int, worth: float) -> float:
    """What must be allowed for beside the drop where hardly a sample changed: resampling does not know the unseen ones.

    A resample holds none of k changed samples with probability exp(-k), and its drop is then exactly zero: so many zeros
    tell k. Clopper-Pearson's bound says how many might change elsewhere, the draws' deviation what each is
    worth, and where that is too few to tell, `worth`.
    """
    share_zero = float((np.abs(drops) <= 1e-12 * worth * num_units).mean())
    if share_zero == 1.0:  # nothing changed: 3/n of the samples might
        return clopper_pearson(0, num_units)[1] * num_units * worth
    if share_zero == 0.0:
        return 0.0
    num_changed = max(1, round(-math.log(share_zero)))
    possible = clopper_pearson(min(num_changed, num_units), num_units)[1] * num_units
    each = max(float(drops.std()) / math.sqrt(num_changed), worth if num_changed < 3 else 0.0)
    return (possible - num_changed) * each

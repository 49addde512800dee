"""Corpus metrics: one number over all samples (F1, BLEU, mAP), resampled for an interval since it is no mean of scores.

The metric is computed where the models' answers are at hand, on four kinds of samples: all of them, resamples of them
(the same ones on both sides), all but one group at a time, and all with one answer exchanged. What it gave is evidence,
so that the gate can be decided again without answers, labels or the metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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

NUM_GROUPS = 100
"""Groups of samples that are left out one at a time, for the skewness of the drop (the acceleration of BCa)."""
NUM_PROBES = 128
"""Samples whose answer is exchanged, to see what one changed sample is worth."""
_NUDGE = 1e-3  # relative; a metric that notices it in one sample needs no bound for changes that were not seen

CorpusMetric = Callable[[Mapping[str, Array], Array | None], float]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CorpusDraws:
    """A corpus metric of one model.

    Attributes:
        value: on all samples.
        draws: [num_resamples], on resamples of the samples.
        left_out: [num_groups], on all samples but one group's.
        num_units: samples, or clusters of samples, that were drawn.
    """

    value: float
    draws: FloatArray
    left_out: FloatArray
    num_units: int


@dataclass(frozen=True, slots=True)
class Worth:
    """What one changed sample (or cluster) is worth, from exchanging the answers of `NUM_PROBES` of them, one at a time.

    Attributes:
        largest: change of the metric at the sample that matters most (one of a rare class).
        typical: the median over those that matter at all.
        is_smooth: the metric notices even a relative change of 0.1 % in most samples (an error, a correlation), so that
            resamples know all there is to know; a count of right answers does not.
    """

    largest: float
    typical: float
    is_smooth: bool


@dataclass(frozen=True, slots=True)
class CorpusDrop:
    """The drop of a corpus metric, baseline minus candidate.

    Attributes:
        drop: on all samples.
        bounds: each one-sided at 95 %.
        deviation: standard deviation of the drop.
        num_changed: how many samples seem to have changed, where they are so few that it can be told; else None.
        p_value_above: of a limit, one-sided: "the drop is at most the limit".
    """

    drop: float
    bounds: Bounds
    deviation: float
    num_changed: int | None
    p_value_above: Callable[[float], float]


class _Sampled:
    """A metric bound to its samples, by unit: a sample, or a cluster of samples."""

    def __init__(
        self,
        metric: CorpusMetric,
        outputs: Mapping[str, Array],
        labels: Array | None,
        clusters: NDArray[np.generic] | None,
    ) -> None:
        self.metric, self.outputs, self.labels = metric, outputs, labels
        self.num_samples = len(next(iter(outputs.values()), ()))
        if self.num_samples == 0:
            raise DataError("There is no sample to compute a corpus metric on.")
        if clusters is None:
            self.units: list[Rows] | None = None
            self.num_units = self.num_samples
        else:
            _, position = np.unique(clusters, return_inverse=True)
            self.units = np.split(np.argsort(position, kind="stable"), np.cumsum(np.bincount(position))[:-1])
            self.num_units = len(self.units)

    def rows(self, units: Rows) -> Rows:
        """The samples of these units, one after another."""
        return units if self.units is None else np.concatenate([self.units[unit] for unit in units])

    def on(self, rows: Rows | slice, outputs: Mapping[str, Array] | None = None) -> float:
        """The metric on these samples."""
        chosen = {name: array[rows] for name, array in (outputs or self.outputs).items()}
        found = self.metric(chosen, None if self.labels is None else self.labels[rows])
        try:
            return float(found)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"The corpus metric returned {type(found).__name__}, expected one number over all samples.",
                hint="a metric with one number a sample is validation.metric",
            ) from error


def corpus_draws(
    metric: CorpusMetric,
    outputs: Mapping[str, Array],
    labels: Array | None,
    *,
    clusters: NDArray[np.generic] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> CorpusDraws:
    """The metric on all samples, on resamples, and without each group; equal arguments but `outputs` give the same ones.

    Args:
        metric: (outputs, labels) -> one number, higher is better.
        outputs: name -> [n, ...].
        labels: [n, ...] or None.
        clusters: [n] or None: whole clusters are drawn and left out.
        num_resamples: how many.
        seed: fixes the draws.

    Raises:
        DataError: there are no samples, or the metric gave no number.
    """
    sampled = _Sampled(metric, outputs, labels, clusters)
    n = sampled.num_units
    draws = [sampled.on(sampled.rows(draw_indices((seed, number), (1, n), n)[0])) for number in range(num_resamples)]
    left_out = [sampled.on(sampled.rows(rest)) for rest in all_but_one_group(n, seed)]
    return CorpusDraws(sampled.on(slice(None)), np.array(draws), np.array(left_out), n)


def all_but_one_group(num_units: int, seed: int = 0) -> Iterator[Rows]:
    """The units without each of up to `NUM_GROUPS` groups in turn; units are dealt to groups at random."""
    if num_units < 2:
        return
    group = np.empty(num_units, dtype=np.int64)
    group[_shuffled(num_units, seed)] = np.arange(num_units) % min(NUM_GROUPS, num_units)
    for number in range(min(NUM_GROUPS, num_units)):
        yield np.flatnonzero(group != number)


def corpus_worth(
    metric: CorpusMetric,
    outputs: Mapping[str, Array],
    labels: Array | None,
    *,
    clusters: NDArray[np.generic] | None = None,
    seed: int = 0,
) -> Worth:
    """What one changed answer is worth to the metric: each probe takes the answer of a sample with another label.

    Probes are spread over the labels, the rarest first, where labels are class numbers: one sample of a rare class is
    worth most to an average over classes.

    Args:
        metric: see `corpus_draws`.
        outputs: of the baseline.
        labels: see `corpus_draws`.
        clusters: see `corpus_draws`; a whole cluster is then exchanged.
        seed: fixes which samples are probed.

    Raises:
        DataError: see `corpus_draws`.
    """
    sampled = _Sampled(metric, outputs, labels, clusters)
    classes = labels if labels is not None and labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer) else None
    order = _shuffled(sampled.num_units, seed)
    partner = _partners(sampled.num_samples, classes, seed)
    of_unit = None if classes is None else np.array([classes[sampled.rows(np.array([unit]))[0]] for unit in order])
    whole = sampled.on(slice(None))
    worth, num_noticed, probes = [], 0, order if of_unit is None else order[_rarest_first(of_unit)]
    for unit in probes[:NUM_PROBES]:
        rows = sampled.rows(np.array([unit]))
        worth.append(abs(whole - sampled.on(slice(None), _with(outputs, rows, lambda a, r: a[partner[r]]))))
        nudged = sampled.on(slice(None), _with(outputs, rows, _nudged))
        num_noticed += not math.isclose(nudged, whole, rel_tol=1e-13, abs_tol=0.0)
    noticed = [value for value in worth if value > 0.0 and math.isfinite(value)]
    return Worth(
        max(noticed, default=math.inf), float(np.median(noticed)) if noticed else math.inf, 2 * num_noticed > len(worth)
    )


def corpus_bounds(baseline: CorpusDraws, candidate: CorpusDraws, worth: Worth) -> CorpusDrop:
    """BCa bounds of the drop, and beside them what samples that did not change here may be worth elsewhere.

    Efron, JASA 82 (1987) 171-185; the acceleration is a grouped jackknife's; the quantile is widened by Student's t as
    `bootstrap_mean`'s is, and by half of what a sample is worth, since a count moves in steps.

    Resampling does not know what it has not seen, such as a rare class of which nothing was lost here. Where hardly a
    sample changed, as many more as Clopper-Pearson's bound allows (3 of n where none did) may change, each worth as much
    as the one that matters most. Where many did, only samples that are worth more than the typical one may have gone
    unseen: they are added as an independent part is, in squares (Zou and Donner, Statistics in Medicine 27 (2008)
    1693-1702). tests/measure/test_corpus.py simulates the coverage.

    Raises:
        DataError: a value or a resample is not a number, or there are no resamples.
    """
    drop = baseline.value - candidate.value
    drops = np.asarray(baseline.draws, dtype=np.float64) - np.asarray(candidate.draws, dtype=np.float64)
    left_out = np.asarray(baseline.left_out, dtype=np.float64) - np.asarray(candidate.left_out, dtype=np.float64)
    if not math.isfinite(drop) or not len(drops) or not np.isfinite(drops).all() or not np.isfinite(left_out).all():
        raise DataError(
            f"The corpus metric is not a number on {int((~np.isfinite(drops)).sum())} of {len(drops)} resamples."
        )
    num_units = candidate.num_units
    if num_units < 2:
        return CorpusDrop(drop, (-math.inf, math.inf), math.inf, None, lambda limit: 1.0)
    bias = normal_quantile(_share_below(drops, drop))
    acceleration, widening = _acceleration(left_out), widening_of(num_units, CONFIDENCE)
    z = widening * normal_quantile(CONFIDENCE)
    low, high = (
        quantile(drops, min(max(normal_cdf(bias + (bias + side) / (1.0 - acceleration * (bias + side))), 1e-6), 1.0))
        for side in (-z, z)
    )
    num_changed, unseen = _unseen(drops, num_units, worth)
    combined = max if num_changed is not None else math.hypot
    step = 0.0 if worth.is_smooth else worth.typical / 2.0
    bounds = (
        drop - combined(max(drop - low, 0.0) + step, unseen),
        drop + combined(max(high - drop, 0.0) + step, unseen),
    )

    def p_value(limit: float) -> float:
        distance = drop - limit
        if distance <= unseen:
            return 1.0
        if num_changed is None:  # where the lower bound without what went unseen would have to lie
            distance = math.sqrt(distance**2 - unseen**2)
        shifted = normal_quantile(_share_below(drops, drop - distance + step)) - bias
        return normal_cdf((shifted / (1.0 + acceleration * shifted) - bias) / widening)

    return CorpusDrop(drop, bounds, float(drops.std()), num_changed, p_value)


def _unseen(drops: FloatArray, num_units: int, worth: Worth) -> tuple[int | None, float]:
    """How many samples changed, where that can be told, and what more of them may be worth.

    A resample holds none of k changed samples with probability exp(-k), and its drop is then exactly zero.
    """
    share_zero = float((np.abs(drops) <= 1e-9 * min(worth.typical, 1.0)).mean())
    if share_zero == 0.0:
        if worth.is_smooth:
            return None, 0.0
        most = clopper_pearson(0, num_units)[1] * num_units
        return None, most * math.sqrt(worth.largest**2 - worth.typical**2)
    num_changed = min(num_units, round(-math.log(share_zero)))
    possible = clopper_pearson(num_changed, num_units)[1] * num_units
    return num_changed, (possible - num_changed) * worth.largest


def _acceleration(left_out: FloatArray) -> float:
    influence = left_out.mean() - left_out if len(left_out) else np.zeros(1)
    squares = math.fsum(influence**2)
    return 0.0 if squares <= 1e-300 else math.fsum(influence**3) / (6.0 * squares**1.5)


def _share_below(drops: FloatArray, value: float) -> float:
    """Share of resamples below a value, counting half of those that equal it, and never quite 0 or 1."""
    share = float((drops < value).mean() + 0.5 * (drops == value).mean())
    return min(max(share, 0.5 / len(drops)), 1.0 - 0.5 / len(drops))


# -- exchanging answers ------------------------------------------------------------------------------------------------


def _shuffled(count: int, seed: int) -> Rows:
    raw = np.random.PCG64(np.random.SeedSequence((seed, count))).random_raw(count)
    return np.argsort(np.asarray(raw), kind="stable").astype(np.int64)


def _partners(num_samples: int, classes: Array | None, seed: int) -> Rows:
    """For each sample another one, of the next class where there are classes."""
    order = _shuffled(num_samples, seed + 1)
    if classes is not None:
        order = order[np.argsort(classes[order], kind="stable")]
    largest = 1 if classes is None else int(np.unique(classes, return_counts=True)[1].max())
    partner = np.empty(num_samples, dtype=np.int64)
    partner[order] = np.roll(order, -largest)  # a step as long as the largest class leaves every class
    return partner


def _rarest_first(classes: Array) -> Rows:
    """Positions in rounds: one of each class a round, the rarest class first."""
    _, position, counts = np.unique(classes, return_inverse=True, return_counts=True)
    turn = np.empty(len(classes), dtype=np.int64)
    for number, count in enumerate(counts):
        turn[position == number] = np.arange(count)
    return np.lexsort((counts[position], turn)).astype(np.int64)


def _with(outputs: Mapping[str, Array], rows: Rows, change: Callable[[Array, Rows], Array]) -> Mapping[str, Array]:
    changed = {name: array.copy() for name, array in outputs.items()}
    for name, array in changed.items():
        array[rows] = change(outputs[name], rows)
    return changed


def _nudged(array: Array, rows: Rows) -> Array:
    return array[rows] * array.dtype.type(1.0 + _NUDGE) if np.issubdtype(array.dtype, np.floating) else array[rows]

"""Are two ways to train equal? Answered from paired runs of several seeds, on the same held-out samples.

Numbers come as arrays of shape [num_seeds, num_samples]: both vary, and every seed answers every sample. A mean over all of them errs
in two ways, by which seeds were drawn and by which samples were, and few seeds cannot be resampled: of three seed means a bootstrap
never reaches beyond the largest, which lies below the truth in one run of eight (measured: a nominal 95 % bound from a bootstrap of
three clusters misses in 15 to 45 % of runs). So the bounds here put two parts together, as the root of the sum of squares: Student's t
over seed means, and over samples the wider of Student's t and a BCa bootstrap of per-sample means (Zou and Donner's recovery of
variance estimates, Statistics in Medicine 27 (2008) 1693-1702). Noise within a seed is counted in both, so the bounds are a little
wide, never narrow; tests/measure/test_equivalence.py measures their level with seeded repeats.

"No significant difference" is never an answer: equality is what must be shown, by two one-sided tests (TOST) against a margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpdeploy.errors import DataError
from mpdeploy.measure.bootstrap import bootstrap_mean
from mpdeploy.measure.paired import MIN_CHANGED
from mpdeploy.measure.statistics import CONFIDENCE, Bounds, Decision, FloatArray, clopper_pearson, decide_at_most

_ROOT_STEPS = 40
"""Halvings of an interval in which a bound is looked for."""
_P_VALUE_STEPS = 14
"""The same for a p-value, on a logarithmic scale: to one part in a thousand."""


@dataclass(frozen=True, slots=True)
class Equivalence:
    """What was found at one look.

    Attributes:
        measured: the difference, candidate minus reference: of means, or as a share of the reference's mean.
        bounds: of `measured`, each one-sided at `confidence`.
        decision: `pass` where the bounds lie within the margin, `fail` where they lie outside of it, else `inconclusive`.
        confidence: of each bound; above 95 % where there are several looks.
        num_seeds, num_samples: what it rests on.
        method: how the bounds were made, in a word.
    """

    measured: float
    bounds: Bounds
    decision: Decision
    confidence: float
    num_seeds: int
    num_samples: int
    method: str = "seeds x samples"


def crossed_bounds(
    seed_values: FloatArray,
    sample_values: FloatArray,
    *,
    confidence: float = CONFIDENCE,
    clusters: NDArray[np.generic] | None = None,
) -> Bounds:
    """Bounds of a mean over seeds and samples, each one-sided at `confidence`; infinite below two seeds.

    Args:
        seed_values: [num_seeds], the mean of each seed (or its jackknife pseudo-value).
        sample_values: [num_samples], the mean of each sample over seeds.
        confidence: of each bound.
        clusters: [num_samples] or None: samples with equal numbers are not independent.
    """
    from scipy.special import stdtrit

    num_seeds = len(seed_values)
    if num_seeds < 2:
        return -math.inf, math.inf
    mean = math.fsum(seed_values) / num_seeds
    by_seed = float(stdtrit(num_seeds - 1, confidence)) * float(np.std(seed_values, ddof=1)) / math.sqrt(num_seeds)
    centre = math.fsum(sample_values) / len(sample_values)
    low, high = bootstrap_mean(sample_values, clusters=clusters, confidence=confidence).bounds
    down, up = centre - low, high - centre
    if clusters is None:
        spread = float(np.std(sample_values, ddof=1)) / math.sqrt(len(sample_values)) if len(sample_values) > 1 else 0.0
        half = float(stdtrit(max(len(sample_values) - 1, 1), confidence)) * spread
        down, up = max(down, half), max(up, half)
    return mean - math.hypot(by_seed, down), mean + math.hypot(by_seed, up)


def equivalence(
    reference: FloatArray,
    candidate: FloatArray,
    *,
    margin: float,
    relative: bool = False,
    confidence: float = CONFIDENCE,
    clusters: NDArray[np.generic] | None = None,
) -> Equivalence:
    """Two one-sided tests of "the means differ by less than the margin", on paired numbers of the same seeds and samples.

    Args:
        reference: [num_seeds, num_samples].
        candidate: the same.
        margin: the largest difference that counts as equal, in the numbers' own unit; or, if `relative`, as a share of the
            reference's mean. That mean is itself uncertain, and the bounds know it (Fieller: a ratio r is possible where the mean of
            candidate - (1 + r) reference can be 0).
        relative: see `margin`.
        confidence: of each test; 1 - 0.05 / K at each of K looks.
        clusters: [num_samples] or None.

    Raises:
        DataError: the arrays do not fit each other, or hold no numbers.
    """
    reference, candidate = _checked(reference, candidate)
    num_seeds, num_samples = reference.shape
    if not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
        return Equivalence(math.nan, (math.nan, math.nan), "fail", confidence, num_seeds, num_samples)

    def bounds_of(values: FloatArray) -> Bounds:
        return crossed_bounds(values.mean(axis=1), values.mean(axis=0), confidence=confidence, clusters=clusters)

    difference = candidate - reference
    measured, bounds = float(difference.mean()), bounds_of(difference)
    reach = _unseen(difference, reference, candidate, confidence)
    if reach:
        bounds = (min(bounds[0], measured - reach), max(bounds[1], measured + reach))
    if relative:
        level = float(reference.mean())
        if level <= 0.0:
            return Equivalence(math.nan, (math.nan, math.nan), "fail", confidence, num_seeds, num_samples)
        measured /= level
        low, high = (
            _ratio_bound(reference, candidate, bounds_of, measured, side)
            if math.isfinite(bounds[0])
            else side * math.inf
            for side in (-1, 1)
        )
        bounds = (min(low, measured - reach / level), max(high, measured + reach / level))
    return Equivalence(measured, bounds, _decision(bounds, margin), confidence, num_seeds, num_samples)


def p_value_apart(
    reference: FloatArray,
    candidate: FloatArray,
    *,
    margin: float,
    relative: bool = False,
    clusters: NDArray[np.generic] | None = None,
) -> float:
    """One-sided p-value of "the means differ by at most the margin": small where they are shown to lie further apart.

    Arguments and errors as for `equivalence`.
    """
    reference, candidate = _checked(reference, candidate)
    if not math.isfinite(margin):
        return 1.0
    high, low = (
        ((1.0 + margin) * reference, (1.0 - margin) * reference)
        if relative
        else (reference + margin, reference - margin)
    )
    return min(_p_value_above_zero(candidate - high, clusters), _p_value_above_zero(low - candidate, clusters))


def p_value_drop(
    reference: FloatArray, candidate: FloatArray, *, margin: float, clusters: NDArray[np.generic] | None = None
) -> float:
    """One-sided p-value of "the candidate's mean is lower by at most the margin"."""
    reference, candidate = _checked(reference, candidate)
    return _p_value_above_zero(reference - candidate - margin, clusters)


def _p_value_above_zero(values: FloatArray, clusters: NDArray[np.generic] | None) -> float:
    """The smallest error at which the lower bound of the mean lies above 0; 1 where it does not lie there at any below a half."""
    by_seed, by_sample = values.mean(axis=1), values.mean(axis=0)

    def shown(log_error: float) -> bool:
        bounds = crossed_bounds(by_seed, by_sample, confidence=1.0 - 10.0**log_error, clusters=clusters)
        return bounds[0] > 0.0

    weak, strong = math.log10(0.499), -6.0
    if not np.isfinite(values).all() or not shown(weak):
        return 1.0
    if shown(strong):
        return float(10.0**strong)
    for _ in range(_P_VALUE_STEPS):
        middle = 0.5 * (weak + strong)
        weak, strong = (middle, strong) if shown(middle) else (weak, middle)
    return float(10.0**weak)


def _decision(bounds: Bounds, margin: float) -> Decision:
    low, high = bounds
    if -margin < low and high < margin:
        return "pass"
    return "fail" if low > margin or high < -margin else "inconclusive"


def _checked(reference: FloatArray, candidate: FloatArray) -> tuple[FloatArray, FloatArray]:
    reference, candidate = np.asarray(reference, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if reference.shape != candidate.shape or reference.ndim != 2 or not reference.size:
        raise DataError(
            f"Paired seeds need two arrays [seeds, samples] of one shape, found {reference.shape} and {candidate.shape}."
        )
    return reference, candidate


def _unseen(difference: FloatArray, reference: FloatArray, candidate: FloatArray, confidence: float) -> float:
    """How far the mean may lie off where hardly a sample differs: what never changed cannot be resampled (3/n of samples may)."""
    num_changed, num_samples = int((difference != 0).any(axis=0).sum()), difference.shape[1]
    if num_changed >= MIN_CHANGED:
        return 0.0
    span = max(float(np.ptp(reference)), float(np.ptp(candidate)), float(np.abs(difference).max()))
    return clopper_pearson(num_changed, num_samples, confidence)[1] * span


def _ratio_bound(
    reference: FloatArray, candidate: FloatArray, bounds_of: Callable[[FloatArray], Bounds], start: float, side: int
) -> float:
    """The r beyond which, to one side, the mean of candidate - (1 + r) reference cannot be 0; infinite where there is none."""

    def excluded(ratio: float) -> bool:
        low, high = bounds_of(candidate - (1.0 + ratio) * reference)
        return high < 0.0 if side > 0 else low > 0.0

    step = 0.01
    while not excluded(start + side * step):
        step *= 2.0
        if step > 1e3:
            return side * math.inf
    inside, outside = start, start + side * step
    for _ in range(_ROOT_STEPS):
        middle = 0.5 * (inside + outside)
        inside, outside = (inside, middle) if excluded(middle) else (middle, outside)
        if abs(outside - inside) <= 1e-5 * max(abs(outside), 1e-3):
            break
    return outside


def non_inferiority(
    reference: FloatArray,
    candidate: FloatArray,
    *,
    margin: float,
    confidence: float = CONFIDENCE,
    clusters: NDArray[np.generic] | None = None,
) -> Equivalence:
    """Is the candidate's mean score lower than the reference's by less than the margin? `measured` is the drop, positive is worse.

    Arguments and errors as for `equivalence`.
    """
    found = equivalence(candidate, reference, margin=math.inf, confidence=confidence, clusters=clusters)
    return replace(found, decision=decide_at_most(found.bounds, margin))


@dataclass(frozen=True, slots=True)
class Churn:
    """How many predictions differ between two ways to train, beside how many differ between two seeds of one.

    Attributes:
        pairs: share that differs within pairs of the same seed.
        seeds: share that differs between two seeds of the reference, over all pairs of seeds; NaN with one seed.
        excess: `pairs` - `seeds`.
        bounds: of `excess`, each one-sided at `confidence`.
        num_flips: predictions that differ within pairs, of all seeds.
        flip_bound: upper bound of the share of samples on which any pair differs; none seen in n leaves about 3/n.
        decision: whether the excess is shown to lie below the margin.
    """

    pairs: float
    seeds: float
    excess: float
    bounds: Bounds
    num_flips: int
    flip_bound: float
    decision: Decision


def churn(
    reference: NDArray[np.integer],
    candidate: NDArray[np.integer],
    *,
    margin: float,
    confidence: float = CONFIDENCE,
    clusters: NDArray[np.generic] | None = None,
) -> Churn:
    """Compare predictions [num_seeds, num_samples] of paired runs. Over seeds by jackknife: a pair of seeds belongs to both.

    Raises:
        DataError: the arrays do not fit each other.
    """
    if reference.shape != candidate.shape or reference.ndim != 2 or not reference.size:
        raise DataError(f"Predictions of shapes {reference.shape} and {candidate.shape} cannot be paired.")
    num_seeds, num_samples = reference.shape
    flips = (reference != candidate) | (candidate < 0)  # -1 stands for an answer with a NaN in it: it equals nothing
    flipped = int(flips.any(axis=0).sum())
    pairs, flip_bound = float(flips.mean()), clopper_pearson(flipped, num_samples, confidence)[1]
    if num_seeds < 2:
        decision = decide_at_most((-math.inf, math.inf), margin)
        return Churn(pairs, math.nan, math.nan, (-math.inf, math.inf), int(flips.sum()), flip_bound, decision)
    between = np.array([[(one != other).mean() for other in reference] for one in reference])
    per_sample = np.mean(
        [reference[one] != reference[other] for one in range(num_seeds) for other in range(one)], axis=0
    )
    seeds = float(between.sum()) / (num_seeds * (num_seeds - 1))
    pseudo = flips.mean(axis=1) - _pseudo_values(between)
    low, high = crossed_bounds(pseudo, flips.mean(axis=0) - per_sample, confidence=confidence, clusters=clusters)
    excess = pairs - seeds
    shift = excess - float(pseudo.mean())
    low, high = max(-1.0, low + shift), min(1.0, high + shift)
    if flipped < MIN_CHANGED:
        high = max(high, flip_bound)
    return Churn(pairs, seeds, excess, (low, high), int(flips.sum()), flip_bound, decide_at_most((low, high), margin))


def _pseudo_values(between: FloatArray) -> FloatArray:
    """Jackknife pseudo-values of the mean over pairs of seeds, from the matrix of pairs; with two seeds the mean itself."""
    n = len(between)
    whole = between.sum() / (n * (n - 1))
    if n < 3:
        return np.full(n, whole)
    without = (between.sum() - 2.0 * between.sum(axis=1)) / ((n - 1) * (n - 2))
    return np.asarray(n * whole - (n - 1) * without)


def confidence_of_looks(num_looks: int) -> float:
    """Of each bound, where data is looked at so many times: the error of 5 % is split evenly (Bonferroni)."""
    return 1.0 - (1.0 - CONFIDENCE) / num_looks


def looked_at(planned: Sequence[int], available: int) -> list[int]:
    """How many seeds are looked at, one look after the other: those planned, as far as so many were trained.

    A plan of 3, 5 and 10 seeds looks at the first 3 again when there are 5: the first look that decides is the answer.
    """
    return [count for count in planned if count <= available] or [available]

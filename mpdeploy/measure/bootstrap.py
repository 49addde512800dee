"""Bootstraps whose answer is the same on every machine and in every run.

The mean of independent samples needs no random numbers: the distribution of a resample's sum is the n-fold convolution
of the samples' own distribution, which one Fourier transform gives exactly, as if infinitely many resamples were drawn
(50,000 samples take 50 ms). Clusters and medians are resampled with indices from raw PCG64 output, a stream that numpy
promises never to change, and with sums of integers that float64 holds exactly, so that no library's order of adding
matters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpdeploy.errors import DataError
from mpdeploy.measure.statistics import CONFIDENCE, Bounds, FloatArray, normal_cdf, normal_quantile

NUM_RESAMPLES = 10_000
_LATTICE_STEP = 0.032
"""Largest step, in standard deviations of one sample, that values are rounded to: it widens an interval by 0.004 %."""
_LATTICE_HALF_WIDTH = 16.0
"""In standard deviations of the sum. What lies beyond (1e-10 at the worst skewness) wraps around."""
_SMALLEST_SHARE = 1e-9  # a tail that neither the transform nor resampling resolves any better
_CHUNK_DRAWS = 1 << 20  # indices drawn at a time: 8 MiB, and the unit of work of a thread


@dataclass(frozen=True)
class BootstrapMean:
    """A mean with its bootstrap distribution.

    Attributes:
        mean: of all values.
        bounds: BCa bounds, each one-sided at the confidence asked for.
        num_units: what was resampled: samples, or clusters.
        values: the means that resamples can have, rising.
        cumulative: the share of resamples up to each of `values`.
        bias: z0, the normal quantile of the share of resamples below the mean.
        acceleration: a, a sixth of the jackknife's skewness.
        widening: see `widening_of`.
    """

    mean: float
    bounds: Bounds
    num_units: int
    values: FloatArray
    cumulative: FloatArray
    bias: float
    acceleration: float
    widening: float

    def p_value_above(self, value: float) -> float:
        """One-sided p-value of "the true mean is at most `value`": small where the mean is shown to lie above it."""
        if self.num_units < 2:
            return 1.0
        shifted = normal_quantile(_share_below(self.values, self.cumulative, value)) - self.bias
        return normal_cdf((shifted / (1.0 + self.acceleration * shifted) - self.bias) / self.widening)


def bootstrap_mean(
    values: FloatArray,
    *,
    clusters: NDArray[np.generic] | None = None,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> BootstrapMean:
    """BCa bootstrap of a mean: of independent values, or of values that come in `clusters` (these are then resampled).

    Efron, JASA 82 (1987) 171-185; the quantile is widened by Student's t and sqrt(n / (n - 1)) so that few samples do
    not look like many (Hesterberg, The American Statistician 69 (2015) 371-386, section 5.3).

    Args:
        values: [n], finite.
        clusters: [n] or None: values with equal numbers belong together.
        confidence: of each bound.
        num_resamples: how many resamples of clusters are drawn; independent values need none.
        seed: fixes those draws.

    Raises:
        DataError: no values, one that is not finite, or clusters of another length.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise DataError(f"A bootstrap needs finite values in one dimension, found shape {values.shape}.")
    mean = math.fsum(values) / len(values)
    if clusters is None:
        sums, sizes = values, np.ones_like(values)
    else:
        if len(clusters) != len(values):
            raise DataError(f"There are {len(values)} values and {len(clusters)} cluster numbers.")
        _, position = np.unique(clusters, return_inverse=True)
        sums, sizes = (
            np.asarray(np.bincount(position, each), dtype=np.float64) for each in (values, np.ones_like(values))
        )
    num_units = len(sums)
    if num_units < 2:
        return BootstrapMean(mean, (-math.inf, math.inf), num_units, np.full(1, mean), np.ones(1), 0.0, 0.0, 1.0)
    influence = sums - mean * sizes  # the jackknife's, up to a factor that cancels
    squares, cubes = math.fsum(influence**2), math.fsum(influence**3)
    if squares == 0.0 or math.isclose(float(np.ptp(influence)), 0.0, abs_tol=1e-300):
        return BootstrapMean(mean, (mean, mean), num_units, np.full(1, mean), np.ones(1), 0.0, 0.0, 1.0)
    if clusters is None:
        means, cumulative = _convolved(values, mean)
    else:
        means, cumulative = _resampled(sums, sizes, num_resamples, seed)
    acceleration = cubes / (6.0 * squares**1.5)
    bias, widening = normal_quantile(_share_below(means, cumulative, mean)), widening_of(num_units, confidence)
    z = widening * normal_quantile(confidence)
    low, high = (normal_cdf(bias + (bias + side) / (1.0 - acceleration * (bias + side))) for side in (-z, z))
    bounds = (
        float(means[max(0, int(np.searchsorted(cumulative, low, "right")) - 1)]),
        float(means[min(len(means) - 1, int(np.searchsorted(cumulative, high, "left")))]),
    )
    return BootstrapMean(mean, bounds, num_units, means, cumulative, bias, acceleration, widening)


def widening_of(num_units: int, confidence: float) -> float:
    """How much wider than a normal quantile a bound from `num_units` must be: Student's t times sqrt(n / (n - 1))."""
    from scipy.special import stdtrit

    t = float(stdtrit(num_units - 1, confidence))
    return math.sqrt(num_units / (num_units - 1)) * t / normal_quantile(confidence)


def _share_below(values: FloatArray, cumulative: FloatArray, value: float) -> float:
    """Share of resamples below `value`, counting half of those that equal it, and never quite 0 or 1."""

    def up_to(side: str) -> float:
        position = int(np.searchsorted(values, value, side))  # type: ignore[call-overload]
        return float(cumulative[position - 1]) if position else 0.0

    return min(1.0 - _SMALLEST_SHARE, max(_SMALLEST_SHARE, 0.5 * (up_to("left") + up_to("right"))))


def _convolved(values: FloatArray, mean: float) -> tuple[FloatArray, FloatArray]:
    """The exact bootstrap distribution of a mean: (means, cumulative shares).

    Each value's weight is split between its two neighbours on a lattice, which keeps the mean; the characteristic
    function of the sum of n draws is the n-th power of that of one.
    """
    n = len(values)
    centred = values - mean
    spread = math.sqrt(math.fsum(centred**2) / n)
    width = 2.0 * _LATTICE_HALF_WIDTH * math.sqrt(n)
    num_points = 1 << math.ceil(math.log2(width / _LATTICE_STEP))
    step = spread * width / num_points
    whole = np.floor(centred / step)
    rest = centred / step - whole
    position = np.mod(whole, num_points).astype(np.int64)
    weights = np.bincount(position, 1.0 - rest, num_points)
    weights += np.bincount((position + 1) % num_points, rest, num_points)
    shares = np.fft.irfft(np.power(np.fft.rfft(weights / n), n), num_points)
    shares = np.maximum(np.fft.fftshift(shares), 0.0)
    keep = slice(int(np.argmax(shares > 1e-14)), num_points - int(np.argmax(shares[::-1] > 1e-14)))
    cumulative = np.cumsum(shares[keep])
    offsets = np.arange(num_points, dtype=np.float64)[keep] - num_points // 2
    return mean + offsets * step / n, cumulative / cumulative[-1]


def _resampled(sums: FloatArray, sizes: FloatArray, num_resamples: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """The bootstrap distribution of a mean over clusters with these sums and sizes: (means, cumulative shares)."""
    num_units = len(sums)
    # As integers of so many bits that the sum of num_units of them is exact in float64's 53.
    scale = 2.0 ** (50 - math.frexp(float(np.abs(sums).max()))[1] - math.ceil(math.log2(num_units)))
    whole = np.rint(sums * scale)
    rows = max(1, _CHUNK_DRAWS // num_units)

    def chunk(number: int) -> FloatArray:
        index = draw_indices((seed, number), (min(rows, num_resamples - number * rows), num_units), num_units)
        return np.asarray(whole.take(index).sum(axis=1) / (scale * sizes.take(index).sum(axis=1)), dtype=np.float64)

    means = np.sort(np.concatenate(_in_threads(chunk, math.ceil(num_resamples / rows))))
    return means, np.arange(1.0, num_resamples + 1.0) / num_resamples


def draw_indices(seed: tuple[int, ...], shape: tuple[int, int], below: int) -> NDArray[np.int64]:
    """Indices in [0, below), uniform to 1 in 2^32 / below, from PCG64's raw output."""
    count = shape[0] * shape[1]
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw((count + 1) // 2)
    index = np.asarray(raw, dtype="<u8").view("<u4")[:count].astype(np.uint64)
    index *= np.uint64(below)
    index >>= np.uint64(32)
    return index.view(np.int64).reshape(shape)


def _in_threads(chunk: Callable[[int], FloatArray], count: int) -> list[FloatArray]:
    """The chunks in order. Each has a random stream of its own: the number of threads changes nothing but the time."""
    if count == 1:
        return [chunk(0)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        return list(threads.map(chunk, range(count)))


@dataclass(frozen=True)
class MedianRatio:
    """The ratio of two medians, b / a, with bounds from resampled blocks (`resampled`: sorted ratios)."""

    ratio: float
    bounds: Bounds
    num_blocks: int
    resampled: FloatArray

    def p_value_above(self, value: float) -> float:
        """One-sided p-value of "the true ratio is at most `value`"."""
        if self.num_blocks < 2:
            return 1.0
        return (int(np.searchsorted(self.resampled, value, "right")) + 1) / (len(self.resampled) + 1)


def median_ratio(
    a: FloatArray,
    b: FloatArray,
    *,
    block_size: int,
    confidence: float = 0.975,
    num_resamples: int = 5_000,
    seed: int = 0,
) -> MedianRatio:
    """Ratio of medians b / a with block-bootstrap bounds, together a two-sided 95 % interval by default.

    Block i of `a` and block i of `b` were measured next to each other, so they are resampled together: what slows the
    machine for a while slows both. Percentile bounds of the log ratio are those of the ratio, since resampled values
    are not interpolated.

    Raises:
        DataError: the two do not hold the same whole number of blocks, or values that are not positive and finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or block_size < 1 or len(a) % block_size or not len(a):
        raise DataError(
            f"Latencies of shapes {a.shape} and {b.shape} do not hold the same number of blocks of {block_size}."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b > 0).all()):
        raise DataError("Latencies must be positive and finite.")
    num_blocks = len(a) // block_size
    ratio = float(np.median(b) / np.median(a))
    if num_blocks < 2:
        return MedianRatio(ratio, (0.0, math.inf), num_blocks, np.full(1, ratio))
    blocks_a, blocks_b = a.reshape(num_blocks, block_size), b.reshape(num_blocks, block_size)
    rows = max(1, _CHUNK_DRAWS // len(a))

    def chunk(number: int) -> FloatArray:
        count = min(rows, num_resamples - number * rows)
        index = draw_indices((seed, number), (count, num_blocks), num_blocks)
        over, under = (np.median(blocks[index].reshape(count, -1), axis=1) for blocks in (blocks_b, blocks_a))
        return np.asarray(over / under, dtype=np.float64)

    resampled = np.sort(np.concatenate(_in_threads(chunk, math.ceil(num_resamples / rows))))
    share = normal_cdf(widening_of(num_blocks, confidence) * normal_quantile(confidence))
    low = resampled[max(0, math.floor((1.0 - share) * (num_resamples + 1)) - 1)]
    high = resampled[min(num_resamples - 1, math.ceil(share * (num_resamples + 1)) - 1)]
    return MedianRatio(ratio, (float(low), float(high)), num_blocks, resampled)

"""Streamed statistics per tensor: what the values of a model are like on real samples, in bounded memory.

The collector is handed a function that runs the model with chosen intermediate tensors as outputs. It asks for them in chunks, so
that what is held at once is the model and one chunk of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Array, Feeds
from mpdeploy.precision.formats import HalfFormat

EXPONENT_BIAS = 127
TAIL_SAMPLES = 10_000
"""The tail is extrapolated to this many feeds."""

CHUNK_BYTES = 256 << 20
MAX_CHUNK = 64

Infer = Callable[[Feeds], Mapping[str, Array]]
OpenModel = Callable[[Sequence[str]], AbstractContextManager[Infer]]
"""Given names of intermediate tensors, a context in which feeds are answered with those tensors."""


@dataclass
class TensorStats:
    """What was seen of one tensor.

    Attributes:
        amax: largest finite magnitude.
        amin: smallest non-zero magnitude; infinity while none was seen.
        count: values seen, zeros among them.
        num_zero, num_nan, num_inf: how many of them.
        sum_squares: of the finite values, in float64.
        exponents: [256] how many values have each float32 exponent field (0: zero or float32-subnormal).
        feed_amax: the largest magnitude of each feed, for the tail.
        nan_feed: number of the first feed with a NaN, or None.
        source: `calibration`, or `training` where it was handed over and only `amax` is known.
        module: where training recorded it.
        calibration_amax: what calibration saw before a larger range was handed over.
    """

    amax: float = 0.0
    amin: float = math.inf
    count: int = 0
    num_zero: int = 0
    num_nan: int = 0
    num_inf: int = 0
    sum_squares: float = 0.0
    exponents: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    feed_amax: list[float] = field(default_factory=list)
    nan_feed: int | None = None
    source: str = "calibration"
    module: str = ""
    calibration_amax: float | None = None
    _last_feed: int | None = None

    def add(self, array: NDArray[np.float32], feed: int) -> None:
        """Take in one feed's tensor."""
        flat = np.ascontiguousarray(array, dtype=np.float32).reshape(-1)
        if flat.size == 0:
            return
        magnitude_bits = flat.view(np.uint32) & np.uint32(0x7FFFFFFF)
        exponent = (magnitude_bits >> np.uint32(23)).astype(np.uint8)
        counts = np.bincount(exponent, minlength=256)
        self.exponents += counts
        self.count += flat.size
        finite = flat
        if counts[255]:
            finite_mask = magnitude_bits < np.uint32(0x7F800000)
            nans = int(np.count_nonzero(magnitude_bits > np.uint32(0x7F800000)))
            self.num_nan += nans
            self.num_inf += int(counts[255]) - nans
            if nans and self.nan_feed is None:
                self.nan_feed = feed
            finite = flat[finite_mask]
            magnitude_bits = magnitude_bits[finite_mask]
        largest = float(magnitude_bits.max(initial=0).astype(np.uint32).view(np.float32))
        # float32 dot products of long vectors lose digits, and squares leave its range
        short = finite.size < 1 << 16 and 1e-10 < largest < 1e15
        self.sum_squares += float(np.dot(finite, finite)) if short else _sum_squares(finite)
        if feed == self._last_feed:  # a body runs many times a feed
            self.feed_amax[-1] = max(self.feed_amax[-1], largest)
        else:
            self.feed_amax.append(largest)
        self._last_feed = feed
        self.amax = max(self.amax, largest)
        zeros = int(np.count_nonzero(magnitude_bits == 0)) if counts[0] else 0
        self.num_zero += zeros
        if zeros < magnitude_bits.size:
            nonzero = magnitude_bits[magnitude_bits != 0] if zeros else magnitude_bits
            self.amin = min(self.amin, float(nonzero.min().astype(np.uint32).view(np.float32)))

    def merge_amax(self, amax: float, source: str, module: str = "") -> None:
        """Take in a range that was recorded elsewhere (training, at a module), where it is larger."""
        if math.isfinite(amax) and amax > self.amax:
            self.calibration_amax = self.amax if self.count else None
            self.amax = amax
            self.source, self.module = source, module

    @property
    def rms(self) -> float:
        """Root mean square of the finite values."""
        return math.sqrt(self.sum_squares / self.count) if self.count else 0.0

    @property
    def tail_factor(self) -> float:
        """How much larger the maximum may be over `TAIL_SAMPLES` feeds than over those seen.

        The maxima of the feeds are taken as Gumbel distributed (the limit law of maxima): each further factor e of feeds adds one
        scale parameter. Between 1.25 and 4; 2 where fewer than 4 feeds were seen.
        """
        if len(self.feed_amax) < 4 or self.amax <= 0:
            return 2.0
        scale = float(np.std(self.feed_amax)) * math.sqrt(6) / math.pi
        growth = scale * math.log(max(TAIL_SAMPLES / len(self.feed_amax), math.e))
        return min(max(1.0 + growth / self.amax, 1.25), 4.0)

    def rounding_loss(self, half: HalfFormat) -> float:
        """Expected relative L2 error of rounding this tensor to `half`, from its exponents: normal rounding left out.

        A value with exponent e below the format's smallest normal one is rounded to a grid of `min_subnormal`: its squared error is
        that of a uniform error on the grid, and all of the value once it lies below half a grid step.
        """
        energy = error = 0.0
        for exponent_field in np.flatnonzero(self.exponents[:255]):
            if exponent_field == 0:
                continue
            n = float(self.exponents[exponent_field])
            exponent = int(exponent_field) - EXPONENT_BIAS
            square = 7.0 / 3.0 * math.ldexp(1.0, 2 * exponent)  # mean of x^2 over [2^e, 2^(e+1))
            energy += n * square
            if math.ldexp(1.0, exponent + 1) <= half.min_subnormal / 2:
                error += n * square
            elif exponent < half.min_exponent:
                error += n * min(square, half.min_subnormal**2 / 12.0)
        return math.sqrt(error / energy) if energy > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """A summary for reports; the histogram as {exponent: count}."""
        return {
            "amax": self.amax,
            "amin": self.amin if math.isfinite(self.amin) else 0.0,
            "count": self.count,
            "num_zero": self.num_zero,
            "num_nan": self.num_nan,
            "num_inf": self.num_inf,
            "rms": self.rms,
            "tail_factor": self.tail_factor,
            "source": self.source,
            "module": self.module,
            "calibration_amax": self.calibration_amax,
            "exponents": {str(int(i) - EXPONENT_BIAS): int(self.exponents[i]) for i in np.flatnonzero(self.exponents)},
        }


def _sum_squares(values: NDArray[np.float32]) -> float:
    """In float64, block by block."""
    blocks = (values[i : i + 65536].astype(np.float64) for i in range(0, values.size, 65536))
    return float(sum(np.dot(block, block) for block in blocks))


@dataclass
class Ranges:
    """Statistics by tensor name, and what they rest on.

    Attributes:
        tensors: tensor name -> statistics.
        num_feeds, num_samples: how much data they come from.
        synthetic: whether the data was made up; then every reader is told.
        warnings: what could not be measured, and why.
        sums: output of a matrix product or convolution -> the largest sums on the way to it, where they could leave the range.
    """

    tensors: dict[str, TensorStats] = field(default_factory=dict)
    num_feeds: int = 0
    num_samples: int = 0
    synthetic: bool = False
    warnings: list[str] = field(default_factory=list)
    sums: dict[str, TensorStats] = field(default_factory=dict)

    @property
    def nan_tensors(self) -> dict[str, int]:
        """Tensors in which the FP32 model itself gave NaN -> the first feed that did it."""
        return {name: stats.nan_feed for name, stats in self.tensors.items() if stats.nan_feed is not None}


def collect_ranges(
    open_model: OpenModel,
    names: Sequence[str],
    feeds: Callable[[], Iterable[Feeds]],
    *,
    values_of: Mapping[str, int] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    max_chunk: int = MAX_CHUNK,
    num_samples: int = 0,
) -> Ranges:
    """Run the model over all feeds, chunk of tensors by chunk, and take statistics.

    Args:
        open_model: runs the model with the named tensors as outputs.
        names: the tensors.
        feeds: makes an iterator over the feeds, anew for each chunk.
        values_of: tensor name -> values a feed, where known; decides the chunks.
        chunk_bytes: how much of outputs to hold at once.
        max_chunk: tensors in a chunk whose sizes are not known.
        num_samples: for the record.
    """
    ranges = Ranges({name: TensorStats() for name in names}, num_samples=num_samples)
    for chunk in chunks(names, values_of or {}, chunk_bytes, max_chunk):
        with open_model(chunk) as infer:
            ranges.num_feeds = 0
            for number, feed in enumerate(feeds()):
                ranges.num_feeds += 1
                for name, array in infer(feed).items():
                    ranges.tensors[name].add(array, number)
    return ranges


def chunks(
    names: Sequence[str], values_of: Mapping[str, int], chunk_bytes: int = CHUNK_BYTES, max_chunk: int = MAX_CHUNK
) -> Iterable[Sequence[str]]:
    """Tensors in lots of at most `chunk_bytes` of FP32 values, those of unknown size counted so that `max_chunk` of them make a lot."""
    chunk: list[str] = []
    held = 0
    for name in names:
        size = 4 * values_of[name] if name in values_of else chunk_bytes // max_chunk
        if chunk and held + size > chunk_bytes:
            yield chunk
            chunk, held = [], 0
        chunk.append(name)
        held += size
    if chunk:
        yield chunk

"""Latency of one runner, or of two interleaved: raw samples, distribution-free intervals, and a ratio.

Two runners are timed in blocks in the order A B B A A B B A ..., so that a machine that warms up or is busy for a while
slows both. Nothing is clipped: what a user would have waited for counts. Every number says what it includes
(`Runner.includes`: host-to-device copies or not, Python or not), and what the machine did meanwhile (`conditions`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, Feeds, Runner
from mpdeploy.errors import ConfigError, StageFailedError
from mpdeploy.measure.bootstrap import MedianRatio, median_ratio
from mpdeploy.measure.conditions import Watch
from mpdeploy.measure.pinning import pinning
from mpdeploy.measure.statistics import MIN_SAMPLES_P99, FloatArray, quantile, quantile_bounds

BLOCK_SIZE = 10
"""Timed calls before the other runner has its turn."""
COPY_SAMPLES = 20
"""Timed copies to and from a device, where a runner's times leave them out."""
STABLE_WITHIN = 0.03
"""A warm-up has ended when three successive blocks have medians this close."""


@dataclass(frozen=True)
class Warmup:
    """How a runner was warmed up: how many calls, how long, and whether its latency had settled by then."""

    iterations: int
    seconds: float
    is_stable: bool


@dataclass(frozen=True)
class LatencySamples:
    """Raw latencies of one runner, in the order they were measured.

    Attributes:
        samples_ms: [num_samples].
        includes: what each sample includes, in words.
        device: where it ran.
        batch: samples in one call (the first axis of the first input).
        warmup: what came before.
        cpu_ms: [num_blocks], CPU time of this process (all its threads) for one call, mean of each block; wall time is `samples_ms`.
        copies_ms: `to_device` and `to_host`, where the runner leaves copies out of its times and can measure them apart.
        conditions: what the machine did meanwhile (`measure.conditions`), and which threads were pinned.
    """

    samples_ms: FloatArray
    includes: str
    device: str
    batch: int
    warmup: Warmup
    cpu_ms: FloatArray | None = None
    copies_ms: Mapping[str, FloatArray] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median_ms(self) -> float:
        """The middle sample."""
        return quantile(self.samples_ms, 0.5)

    @property
    def p90_ms(self) -> float:
        """Nine of ten calls take no longer."""
        return quantile(self.samples_ms, 0.9)

    @property
    def p99_ms(self) -> float | None:
        """99 of 100 calls take no longer; None with fewer than 299 samples, which cannot bound it."""
        return quantile(self.samples_ms, 0.99) if len(self.samples_ms) >= MIN_SAMPLES_P99 else None

    @property
    def throughput_per_s(self) -> float:
        """Samples a second of one caller that waits for each answer."""
        return self.batch * len(self.samples_ms) * 1e3 / float(self.samples_ms.sum())

    def to_json(self) -> dict[str, Any]:
        """The summary of `bench --json`; each end of an interval is a one-sided 95 % bound."""
        return {
            "median_ms": self.median_ms,
            "median_interval_ms": list(quantile_bounds(self.samples_ms, 0.5)),
            "p90_ms": self.p90_ms,
            "p90_interval_ms": list(quantile_bounds(self.samples_ms, 0.9)),
            "p99_ms": self.p99_ms,
            "p99_interval_ms": None if self.p99_ms is None else list(quantile_bounds(self.samples_ms, 0.99)),
            "throughput_per_s": self.throughput_per_s,
            "num_samples": len(self.samples_ms),
            "cpu_ms_per_call": None if self.cpu_ms is None else quantile(self.cpu_ms, 0.5),
            "copies_ms": {name: quantile(times, 0.5) for name, times in self.copies_ms.items()} or None,
            "batch": self.batch,
            "includes": self.includes,
            "device": self.device,
            "warmup": {"iterations": self.warmup.iterations, "is_stable": self.warmup.is_stable},
            "conditions": dict(self.conditions),
        }


@dataclass(frozen=True)
class LatencyReport:
    """Two runners measured side by side: `a`, what is compared with, and `b`.

    Attributes:
        a: the baseline's samples.
        b: the candidate's, as many.
        block_size: samples in a row from one runner; block i of `a` was measured next to block i of `b`.
        seed: of the bootstrap.
    """

    a: LatencySamples
    b: LatencySamples
    block_size: int
    seed: int = 0

    @property
    def ratio(self) -> MedianRatio:
        """Median of b over median of a, with a two-sided 95 % interval."""
        return median_ratio(self.a.samples_ms, self.b.samples_ms, block_size=self.block_size, seed=self.seed)

    @property
    def warning(self) -> str | None:
        """Why the ratio is not to be taken at face value, or None."""
        if self.a.includes != self.b.includes:
            return f"the two latencies include different things: '{self.a.includes}' and '{self.b.includes}'"
        unstable = [name for name, side in (("A", self.a), ("B", self.b)) if not side.warmup.is_stable]
        return f"the latency of {' and '.join(unstable)} had not settled when the warm-up ended" if unstable else None

    def to_json(self) -> dict[str, Any]:
        """What `bench --json` prints."""
        ratio = self.ratio
        return {
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "ratio": {"median": ratio.ratio, "interval": list(ratio.bounds), "confidence": 0.95},
            "block_size": self.block_size,
            "warning": self.warning,
        }

    def arrays(self) -> dict[str, Array]:
        """The raw samples under the names that evidence files use."""
        return {"latency_a_ms": self.a.samples_ms, "latency_b_ms": self.b.samples_ms}

    def facts(self) -> dict[str, Any]:
        """What a gate must know beside the raw samples."""
        return {
            "latency_block_size": self.block_size,
            "latency_includes_a": self.a.includes,
            "latency_includes_b": self.b.includes,
            "latency_batch": self.b.batch,
            "latency_cpu_ms_a": None if self.a.cpu_ms is None else quantile(self.a.cpu_ms, 0.5),
            "latency_cpu_ms_b": None if self.b.cpu_ms is None else quantile(self.b.cpu_ms, 0.5),
            "latency_conditions": dict(self.b.conditions),
        }


def measure_one(
    runner: Runner,
    feeds: Feeds,
    num_samples: int = 300,
    *,
    block_size: int = BLOCK_SIZE,
    max_warmup_s: float = 5.0,
    pin: bool = True,
) -> LatencySamples:
    """Warm a runner up and time `num_samples` calls; the runner has been entered.

    Args:
        runner: what is timed.
        feeds: what it is given.
        num_samples: timed calls, in blocks of `block_size`.
        block_size: calls in a row.
        max_warmup_s: longest warm-up.
        pin: tie the runner's busy threads to cores of their own, on a CPU.

    Raises:
        ConfigError: no samples asked for.
        StageFailedError: the runner gave times that are not positive numbers.
    """
    _check(num_samples, block_size)
    with pinning(wanted=pin, device=_device(runner)) as pins:
        with pins.watching():
            warmup = warm_up(runner, feeds, block_size=block_size, max_seconds=max_warmup_s)
        watch, taken = Watch(_device(runner)), _Taken(runner, feeds)
        for done in range(0, num_samples, block_size):
            taken.block(min(block_size, num_samples - done))
        return taken.samples(warmup, watch.read() | {"threads": pins.to_json()})


def measure_pair(
    runner_a: Runner,
    runner_b: Runner,
    feeds: Feeds,
    num_samples: int = 300,
    *,
    feeds_b: Feeds | None = None,
    block_size: int = BLOCK_SIZE,
    max_warmup_s: float = 5.0,
    seed: int = 0,
    pin: bool = True,
) -> LatencyReport:
    """Time two runners in turns, block by block in the order A B B A; both have been entered.

    Args:
        runner_a: what is compared with.
        runner_b: the candidate.
        feeds: what both are given.
        num_samples: timed calls of each, rounded up to whole blocks.
        feeds_b: what `runner_b` is given where its inputs differ (half inputs, other names).
        block_size: calls in a row.
        max_warmup_s: longest warm-up of each.
        seed: of the ratio's bootstrap.
        pin: tie each runner's busy threads to cores of their own, where both run on the CPU.

    Raises:
        ConfigError: fewer than two blocks asked for.
        StageFailedError: a runner gave times that are not positive numbers.
    """
    _check(num_samples, block_size)
    num_blocks = -(-num_samples // block_size)
    if num_blocks < 2:
        raise ConfigError(
            f"{num_samples} latency samples are a single block of {block_size}: nothing can be said of their spread.",
            hint=f"take at least {2 * block_size}; 300 allow a 99th percentile",
        )
    sides = (_Taken(runner_a, feeds), _Taken(runner_b, feeds if feeds_b is None else feeds_b))
    device = next((found for side in sides if (found := _device(side.runner)) != "cpu"), "cpu")
    warmups = []
    with pinning(wanted=pin, device=device) as pins:
        for side in sides:
            with pins.watching():
                warmups.append(warm_up(side.runner, side.feeds, block_size=block_size, max_seconds=max_warmup_s))
        watch = Watch(device)
        for block in range(num_blocks):
            for side in sides if block % 2 == 0 else sides[::-1]:
                side.block(block_size)
        conditions = watch.read() | {"threads": pins.to_json()}
        a, b = (side.samples(warmup, conditions) for side, warmup in zip(sides, warmups, strict=True))
    return LatencyReport(a, b, block_size, seed)


def warm_up(
    runner: Runner,
    feeds: Feeds,
    *,
    block_size: int = BLOCK_SIZE,
    max_seconds: float = 5.0,
    max_blocks: int = 50,
    stable_within: float = STABLE_WITHIN,
) -> Warmup:
    """Run until three successive blocks have medians within `stable_within` of each other, or a cap is reached."""
    started = time.perf_counter()
    medians: list[float] = []
    stable = False
    while not stable and len(medians) < max_blocks and (not medians or time.perf_counter() - started < max_seconds):
        medians.append(float(np.median(_checked(runner, runner.time_ms(feeds, block_size), block_size))))
        last = medians[-3:]
        stable = len(last) == 3 and max(last) - min(last) <= stable_within * min(last)
    return Warmup(len(medians) * block_size, round(time.perf_counter() - started, 3), stable)


def _checked(runner: Runner, times: list[float], iterations: int) -> list[float]:
    if len(times) != iterations or not all(0.0 < item < math.inf for item in times):
        raise StageFailedError(
            f"{type(runner).__name__}.time_ms was asked for {iterations} times and gave {times[:5]}.",
            hint="each must be a positive number of milliseconds",
        )
    return times


class _Taken:
    """What was measured of one runner so far."""

    def __init__(self, runner: Runner, feeds: Feeds) -> None:
        self.runner, self.feeds = runner, feeds
        self.times: list[float] = []
        self.cpu_ms: list[float] = []

    def block(self, iterations: int) -> None:
        """Time some calls in a row; the CPU's time beside the wall's."""
        begin = time.process_time_ns()
        taken = self.runner.time_ms(self.feeds, iterations)
        self.cpu_ms.append((time.process_time_ns() - begin) / 1e6 / iterations)
        self.times.extend(_checked(self.runner, taken, iterations))

    def samples(self, warmup: Warmup, conditions: Mapping[str, Any]) -> LatencySamples:
        """Everything that was measured, and the copies that the times left out."""
        first = next(iter(self.feeds.values()), None)
        copies = getattr(self.runner, "copies_ms", None)
        apart = copies(self.feeds, COPY_SAMPLES) if copies is not None else {}
        return LatencySamples(
            samples_ms=np.asarray(self.times, dtype=np.float64),
            includes=str(getattr(self.runner, "includes", "not stated by the runner")),
            device=_device(self.runner),
            batch=first.shape[0] if first is not None and first.ndim else 1,
            warmup=warmup,
            cpu_ms=np.asarray(self.cpu_ms, dtype=np.float64),
            copies_ms={name: np.asarray(times, dtype=np.float64) for name, times in apart.items()},
            conditions=conditions,
        )


def _device(runner: Runner) -> str:
    return str(getattr(runner, "device", "cpu"))


def _check(num_samples: int, block_size: int) -> None:
    if num_samples < 1 or block_size < 1:
        raise ConfigError(f"There is no latency of {num_samples} samples in blocks of {block_size}.")

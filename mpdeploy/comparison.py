"""Two models or engines side by side: how far their answers lie apart, and how long each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.building import describe_model, find_engine, fitted, is_engine, open_runner
from mpdeploy.data_files import FeedSet, load_feeds
from mpdeploy.emulated_runs import tensors_of
from mpdeploy.errors import UsageError
from mpdeploy.measure.drift import DriftMeter, DriftReport
from mpdeploy.measure.latency import LatencyReport, LatencySamples, measure_one, measure_pair

BLIND = (
    "ONNX Runtime's CPU provider computes FP16 and BF16 nodes in FP32 and drops the casts between them: overflow and "
    "underflow do not show. This number is not to be believed; use --emulate."
)


@dataclass(frozen=True)
class Comparison:
    """Drift of a candidate against a reference, and what a reader must know about it."""

    drift: DriftReport
    num_samples: int
    precision: str = "fp32"
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `compare --json` prints."""
        return self.drift.to_json() | {"num_samples": self.num_samples, "warnings": list(self.warnings)}


def compare(
    reference: Path,
    candidate: Path,
    *,
    data: str | FeedSet,
    emulate: bool = False,
    half_sums: bool = False,
    engine: str | None = None,
) -> Comparison:
    """Drift of `candidate` against `reference` on the samples of `data`.

    Args:
        reference: an ONNX file (run in ONNX Runtime), a built engine, or a program of torch.export (`.pt2`).
        candidate: likewise.
        data: see `data_files`.
        emulate: round the candidate's half tensors as half hardware would.
        half_sums: with `emulate`: hold sums inside means, norms and products in half too, the worst an engine may do.
        engine: run the candidate, an ONNX file, in this engine; with `emulate`: emulate what this engine takes apart.

    Raises:
        ModelError, DataError, UnavailableError, BuildError.
    """
    if half_sums and not emulate:
        raise UsageError("--half-sums goes with --emulate.", hint="add --emulate")
    warnings: list[str] = []
    precision = _precision_of(candidate)
    if candidate.suffix == ".onnx" and not is_engine(candidate) and not emulate and engine in (None, "onnxruntime"):
        half = precision
        if half != "fp32":
            from mpdeploy.engines.onnxruntime import loads_cuda

            if engine is None or loads_cuda() is not None:
                warnings.append(f"{candidate.name} is a {half} model. {BLIND}")
    meter, count = DriftMeter(), 0
    with (
        open_runner(reference) as golden,
        open_runner(candidate, engine=engine, emulate=emulate, half_sums=half_sums) as found,
    ):
        feeds = data if isinstance(data, FeedSet) else load_feeds(data, golden.inputs, where=str(reference))
        for feed in feeds:
            expected = tensors_of(golden.infer(feed))
            answers = tensors_of(found.infer(fitted(feed, found.inputs)))
            samples = feeds.samples_in(feed)
            split = bool(feeds.batched) and all(array.ndim and len(array) == samples for array in expected.values())
            meter.add(expected, answers, split=split)
            count += samples
    return Comparison(meter.report(), count, precision, tuple(warnings))


def _precision_of(path: Path) -> str:
    if is_engine(path):
        return find_engine(path).precision
    return "fp32" if path.suffix == ".pt2" else describe_model(path).precision


def bench(
    a: Path,
    b: Path | None = None,
    *,
    data: str,
    engine: str | None = None,
    num_samples: int = 300,
    pin: bool = True,
) -> LatencySamples | LatencyReport:
    """Latency of `a` on the first feed of `data`; with `b`, both interleaved, as a ratio b / a.

    Args:
        a: an ONNX file, a built engine, or a program of torch.export (`.pt2`).
        b: likewise; or None.
        data: see `data_files`.
        engine: run ONNX files in this engine instead of ONNX Runtime; with `b`, only `b`.
        num_samples: timed calls of each.
        pin: tie the busy threads to cores of their own while it lasts, on a CPU.
    """
    if b is None:
        with open_runner(a, engine=engine) as runner:
            feeds = load_feeds(data, runner.inputs, where=str(a))
            return measure_one(runner, feeds.feeds[0], num_samples, pin=pin)
    with open_runner(a) as first, open_runner(b, engine=engine) as second:
        feed = load_feeds(data, first.inputs, where=str(a)).feeds[0]
        return measure_pair(first, second, feed, num_samples, feeds_b=fitted(feed, second.inputs), pin=pin)


def sweep(
    path: Path, batches: Sequence[int], *, data: str, engine: str | None = None, num_samples: int = 50
) -> list[dict[str, Any]]:
    """Latency and throughput over batch sizes: the samples of `data` are repeated up to each size.

    Raises:
        UsageError: no input has a symbolic first axis.
    """
    found = []
    with open_runner(path, engine=engine) as runner:
        feeds = load_feeds(data, runner.inputs, where=str(path))
        if not feeds.batched:
            raise UsageError(f"{path} has no symbolic first axis: its batch cannot vary.", hint="leave --batches away")
        for batch in batches:
            whole = {
                name: np.concatenate([feed[name] for feed in feeds]) if name in feeds.batched else feeds.feeds[0][name]
                for name in feeds.feeds[0]
            }
            sized = {
                name: np.resize(a, (batch, *a.shape[1:])) if name in feeds.batched else a for name, a in whole.items()
            }
            samples = measure_one(runner, sized, num_samples)
            median_ms = float(np.median(samples.samples_ms))
            found.append({"batch": batch, "median_ms": median_ms, "samples_per_s": 1e3 * batch / median_ms})
    return found

"""Running FP32 and emulated models over samples: ranges of every tensor, drift of a mixed model, tensors to lay blame with.

The rewriter runs nothing itself; this is the way to run a model that it is handed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mpdeploy.artifact import Array, Feeds
from mpdeploy.data_files import FeedSet
from mpdeploy.engines import onnxruntime as ort_engine
from mpdeploy.measure.drift import DriftMeter, DriftReport
from mpdeploy.precision.emulate import emulate
from mpdeploy.precision.flow import float_values, shape_size
from mpdeploy.precision.formats import HALF_TYPES
from mpdeploy.precision.model_io import write_model
from mpdeploy.precision.ranges import Ranges, TensorStats, collect_ranges
from mpdeploy.precision.rewrite import Prepared


def measure_ranges(prepared: Prepared, feeds: FeedSet, folder: Path) -> Ranges:
    """Statistics of every computed float tensor, and of the float inputs, over all feeds."""
    values = float_values(prepared.index)
    samples = max((feeds.samples_in(feed) for feed in feeds), default=1)
    sizes = {
        value.name or "": int(shape_size(value)) * (samples if value.shape is not None else 1)
        for value in values
        if value.shape is not None
    }
    ranges = collect_ranges(
        opener(prepared.model, folder, "ranges"),
        [value.name or "" for value in values],
        lambda: iter(feeds),
        values_of=sizes,
        num_samples=feeds.num_samples,
    )
    for spec in feeds.inputs:
        if spec.dtype == "float32":
            stats = ranges.tensors.setdefault(spec.name, TensorStats())
            for number, feed in enumerate(feeds):
                stats.add(np.asarray(feed[spec.name], dtype=np.float32), number)
    return ranges


def opener(
    model: ir.Model, folder: Path, stem: str
) -> Callable[[Sequence[str]], contextlib.AbstractContextManager[Any]]:
    """A function that opens a model with chosen tensors as outputs; its weights are written once and shared."""
    base = folder / f"{stem}.onnx"
    if not base.exists():
        ir.save(model, base, external_data=f"{stem}.weights")
    shared = ir.load(base)
    by_name = {value.name: value for node in shared.graph for value in node.outputs}
    by_name |= {value.name: value for value in shared.graph.inputs}
    originals = list(shared.graph.outputs)

    @contextlib.contextmanager
    def open_model(names: Sequence[str]) -> Iterator[Callable[[Feeds], dict[str, Array]]]:
        shared.graph.outputs.clear()
        shared.graph.outputs.extend(originals)
        present = {value.name for value in originals}
        for name in names:
            if name not in present:
                shared.graph.outputs.append(by_name[name])
        path = folder / f"{stem}.chunk.onnx"
        ir.save(shared, path)
        with ort_engine.run_tensors(path, names) as infer:
            yield infer

    return open_model


def emulated_drift(reference: ir.Model, mixed: ir.Model, feeds: FeedSet, folder: Path) -> DriftReport:
    """Drift of a mixed model, as half hardware would show it, against the FP32 model.

    Raises:
        StageFailedError: the runtime does not keep the rounding (see `engines.onnxruntime.prove_pairs_are_kept`).
    """
    for dtype in _half_types(mixed):
        ort_engine.prove_pairs_are_kept(dtype)
    split = all(
        value.shape is None or not value.shape.dims or not isinstance(value.shape[0], int)
        for value in reference.graph.outputs
    )
    fp32_path = folder / "reference.onnx"
    if not fp32_path.exists():
        write_model(reference, folder, fp32_path.name)
    emulated_path = write_model(emulate(mixed), folder, "emulated.onnx")
    meter = DriftMeter()
    with ort_engine.OrtRunner(fp32_path) as fp32, ort_engine.OrtRunner(emulated_path) as half:
        for feed in feeds:
            golden = fp32.infer(feed)
            meter.add(
                golden, half.infer(feed), split=split and bool(feeds.batched) and _same_batch(golden, feeds, feed)
            )
    return meter.report()


def _same_batch(golden: Mapping[str, Array], feeds: FeedSet, feed: Mapping[str, Array]) -> bool:
    return all(array.ndim and len(array) == feeds.samples_in(feed) for array in golden.values())


def _half_types(model: ir.Model) -> set[ir.DataType]:
    return {
        value.dtype
        for node in model.graph.all_nodes()
        for value in node.outputs
        if value.dtype is not None and value.dtype in HALF_TYPES
    }


def feed_of_worst_sample(drift: DriftReport, feeds: FeedSet) -> Mapping[str, Array]:
    """The feed that holds the worst sample."""
    worst = max(drift.outputs.values(), key=lambda output: output.rel_l2).worst_sample if drift.outputs else 0
    count = 0
    for feed in feeds:
        count += feeds.samples_in(feed)
        if worst < count:
            return feed
    return feeds.feeds[-1]

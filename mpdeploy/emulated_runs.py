"""Running FP32 and emulated models over samples: ranges of every tensor, drift of a mixed model, tensors to lay blame with.

The rewriter runs nothing itself; this is the way to run a model that it is handed.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mpdeploy.artifact import Array, Feeds
from mpdeploy.body_ranges import measure_body_ranges
from mpdeploy.data_files import FeedSet
from mpdeploy.engines import onnxruntime as ort_engine
from mpdeploy.errors import BuildError
from mpdeploy.measure.drift import DriftMeter, DriftReport
from mpdeploy.precision.chain import Chain
from mpdeploy.precision.dot_products import add_largest_sum, could_leave
from mpdeploy.precision.emulate import emulate, run_at_opset_21
from mpdeploy.precision.engine_forms import USUAL
from mpdeploy.precision.flow import float_values, shape_size
from mpdeploy.precision.formats import FLOAT, HALF_TYPES, HalfFormat
from mpdeploy.precision.model_io import SCRATCH_EXTERNAL_FROM_BYTES, load_model, write_model
from mpdeploy.precision.passes.name_values import NameValuesPass
from mpdeploy.precision.ranges import Ranges, TensorStats, collect_ranges
from mpdeploy.precision.rewrite import Prepared


def measure_ranges(prepared: Prepared, feeds: FeedSet, folder: Path, half: HalfFormat) -> Ranges:
    """Statistics of every computed float tensor, in bodies too, and of the float inputs, over all feeds.

    Of matrix products and convolutions whose largest inputs could leave the range of `half`, the sums inside are measured too.
    """
    values = float_values(prepared.index)
    samples = max((feeds.samples_in(feed) for feed in feeds), default=1)
    sizes = {
        value.name or "": int(shape_size(value)) * (samples if value.shape is not None else 1)
        for value in values
        if value.shape is not None
    }
    open_model = opener(prepared.model, folder, "ranges")
    ranges = collect_ranges(
        open_model,
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
    _measure_sums(prepared, feeds, folder, half, ranges)
    if prepared.index.owner:
        ranges.warnings += measure_body_ranges(prepared.index, ranges, open_model, lambda: iter(feeds), folder)
    return ranges


def _measure_sums(prepared: Prepared, feeds: FeedSet, folder: Path, half: HalfFormat, ranges: Ranges) -> None:
    """Statistics of the largest sums inside dot products of the main graph, where they could matter."""
    suspects = {
        node.outputs[0].name for node in prepared.model.graph if could_leave(prepared.index, node, ranges, half)
    }
    if not suspects:
        return
    made: dict[str, str] = {}  # name of the tensor with the sums -> name of what comes out

    def add_sums(model: ir.Model) -> None:
        for node in [node for node in model.graph if node.outputs[0].name in suspects]:
            chain = Chain(node)
            largest = add_largest_sum(chain, FLOAT)
            largest.type, largest.shape = ir.TensorType(FLOAT), node.outputs[0].shape
            model.graph.insert_after(node, chain.nodes)
            made[largest.name or ""] = node.outputs[0].name or ""

    open_model = opener(prepared.model, folder, "ranges", change=add_sums)
    sizes = {sums: ranges.tensors[name].count // max(ranges.num_feeds, 1) for sums, name in made.items()}
    found = collect_ranges(open_model, list(made), lambda: iter(feeds), values_of=sizes)
    ranges.sums = {name: found.tensors[sums] for sums, name in made.items()}


def opener(
    model: ir.Model, folder: Path, stem: str, *, change: Callable[[ir.Model], None] | None = None
) -> Callable[[Sequence[str]], contextlib.AbstractContextManager[Any]]:
    """A function that opens a model with chosen tensors as outputs; its weights are written once and shared.

    With `change` it is a copy that was changed; a model of the same stem, folder and weights may have been opened before.
    """
    base = folder / f"{stem}.onnx"
    if not base.exists():
        ir.save(model, base, external_data=f"{stem}.weights")
    shared = ir.load(base)
    run_at_opset_21(shared)
    if change is not None:
        change(shared)
    by_name = {value.name: value for node in shared.graph for value in node.outputs}
    by_name |= {value.name: value for value in shared.graph.inputs}
    originals = list(shared.graph.outputs)
    float_inputs = {value.name for value in shared.graph.inputs if value.dtype == ir.DataType.FLOAT}

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
            yield lambda feed: infer(_widened(feed, float_inputs))

    return open_model


@contextlib.contextmanager
def emulated_runner(
    mixed: ir.Model,
    *,
    half_sums: bool = False,
    engine: str = USUAL,
    options: ort_engine.OrtOptions | None = None,
) -> Iterator[ort_engine.OrtRunner]:
    """A mixed model, running as half-precision hardware would under an engine; with `half_sums` as the worst of it (see `emulate`).

    Raises:
        StageFailedError: the runtime does not keep the rounding (see `engines.onnxruntime.prove_pairs_are_kept`).
        UsageError: there is no such engine.
    """
    for dtype in _half_types(mixed):
        ort_engine.prove_pairs_are_kept(dtype)
    with tempfile.TemporaryDirectory(prefix="mpdeploy-") as name:
        scratch = SCRATCH_EXTERNAL_FROM_BYTES
        emulated = emulate(mixed, half_sums=half_sums, engine=engine)
        path = write_model(emulated, Path(name), "emulated.onnx", external_from_bytes=scratch)
        with ort_engine.OrtRunner(path, options=options) as runner:
            yield runner


def emulated_drift(reference: Path, mixed: ir.Model, feeds: FeedSet, engine: str = USUAL) -> DriftReport:
    """Drift of a mixed model, as half hardware would show it under an engine, against the FP32 model at `reference`."""
    meter = DriftMeter()
    with reference_runner(reference) as fp32, emulated_runner(mixed, engine=engine) as half:
        for feed in feeds:
            golden, found = tensors_of(fp32.infer(feed)), emulated_answers(half, feed)
            meter.add(golden, found, split=bool(feeds.batched) and _same_batch(golden, feeds, feed))
    return meter.report()


def emulated_answers(runner: ort_engine.OrtRunner, feed: Feeds) -> dict[str, Array]:
    """The tensors that an emulated model answers; what it takes in FP32 may be given in half."""
    float_inputs = {spec.name for spec in runner.inputs if spec.dtype == "float32"}
    return tensors_of(runner.infer(_widened(feed, float_inputs)))


def answers_of_both(
    reference: Path, mixed: ir.Model, feeds: FeedSet, engine: str = USUAL
) -> tuple[dict[str, Array], dict[str, Array]]:
    """All answers of the FP32 model and of the mixed one, emulated: output name -> [num_samples, ...]."""
    parts: tuple[dict[str, list[Array]], dict[str, list[Array]]] = ({}, {})
    with reference_runner(reference) as fp32, emulated_runner(mixed, engine=engine) as half:
        for feed in feeds:
            both = (tensors_of(fp32.infer(feed)), emulated_answers(half, feed))
            for collected, answers in zip(parts, both, strict=True):
                for name, array in answers.items():
                    collected.setdefault(name, []).append(array)
    golden, found = ({name: np.concatenate(arrays) for name, arrays in collected.items()} for collected in parts)
    return golden, found


@contextlib.contextmanager
def reference_runner(path: Path) -> Iterator[ort_engine.OrtRunner]:
    """The FP32 model as it is; where node names repeat (valid ONNX, which ONNX Runtime refuses), with numbers behind them."""
    with contextlib.ExitStack() as stack:
        try:
            runner = stack.enter_context(ort_engine.OrtRunner(path))
        except BuildError:
            model = load_model(path)
            if not NameValuesPass()(model).modified:
                raise
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpdeploy-")))
            runner = stack.enter_context(ort_engine.OrtRunner(write_model(model, folder, "reference.onnx")))
        yield runner


def _widened(feed: Feeds, float_inputs: Collection[str | None]) -> dict[str, Array]:
    """A model's half inputs are FP32 in the emulated one."""
    return {name: array.astype(np.float32) if name in float_inputs else array for name, array in feed.items()}


def tensors_of(answers: Mapping[str, Any]) -> dict[str, Array]:
    """The answers that are tensors of numbers: a sequence, an absent optional or a text has no drift."""
    return {
        name: value
        for name, value in answers.items()
        if isinstance(value, np.ndarray) and value.dtype.kind not in "OSU"
    }


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

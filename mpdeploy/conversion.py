"""Conversion as a whole: an FP32 ONNX file becomes a mixed one that is proven, measured, and written only if it may be.

This joins the rewriter (which runs nothing) with a runtime that runs the FP32 and the emulated model.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mpdeploy.data_files import FeedSet, load_feeds, load_labels
from mpdeploy.emulated_runs import answers_of_both, emulated_drift, feed_of_worst_sample, measure_ranges, opener
from mpdeploy.errors import GateFailedError, UsageError
from mpdeploy.files import write_json
from mpdeploy.measure.accuracy import metric_name, score
from mpdeploy.measure.drift import DriftReport
from mpdeploy.precision import formats
from mpdeploy.precision.blame import Blame, blame_nodes
from mpdeploy.precision.engine_forms import USUAL, forms_of
from mpdeploy.precision.keep_list import match_keep_list
from mpdeploy.precision.model_io import float_io_names, input_specs, load_model
from mpdeploy.precision.plan import PrecisionPlan, make_plan
from mpdeploy.precision.range_rules import RANGE_RULES
from mpdeploy.precision.ranges import Ranges, TensorStats
from mpdeploy.precision.rewrite import PrecisionCount, count_precisions, prepare, rewrite_indexed
from mpdeploy.precision.search.keep_file import float_io_in, patterns_for
from mpdeploy.precision.verify import check_strict_types
from mpdeploy.proving import prove_and_write

LOST_REL_L2 = 0.5
"""Above this relative L2 drift an output is lost, and no gate is needed to say so."""

Progress = Callable[[str], None]
Accept = Callable[[DriftReport | None, str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        output: the file that was written, or None where none was asked for.
        plan: node -> precision, with reasons.
        counts: of the mixed model.
        drift: emulated drift against the FP32 model on all samples, or None without data.
        warnings: what a user should know.
        ranges: the statistics the plan rests on, or None.
        seconds: time it took.
        engine: whose forms were emulated.
        evaluations: passes of the emulated model over all samples.
        blame: nodes by the drift they add, where that was asked for.
        search: what a search for the keep-list found, or None.
    """

    output: Path | None
    plan: PrecisionPlan
    counts: PrecisionCount
    drift: DriftReport | None
    warnings: tuple[str, ...] = ()
    ranges: Ranges | None = None
    seconds: float = 0.0
    engine: str = USUAL
    evaluations: float = 0
    blame: tuple[Blame, ...] = field(default_factory=tuple)
    search: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """What `mpdeploy convert --json` prints."""
        return {
            "output": None if self.output is None else str(self.output),
            "precision": self.plan.half.name,
            "nodes": self.counts.nodes,
            "half_nodes": self.counts.half_nodes,
            "kept": [
                {"node": node, "op": self.plan.ops[node], "reason": "; ".join(map(str, reasons))}
                for node, reasons in self.plan.kept.items()
            ],
            "casts": self.counts.casts,
            "drift": None if self.drift is None else self.drift.to_json()["outputs"],
            "emulated_engine": None if self.drift is None else self.engine,
            "notes": list(self.plan.notes),
            "warnings": list(self.warnings),
            "ranges_from": self.plan.ranges_from,
            "evaluations": self.evaluations,
            "seconds": round(self.seconds, 3),
        } | ({} if self.search is None else {"search": dict(self.search)})


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """Pause garbage collection: looking again and again through a graph's many small, living objects takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collection_paused()
def convert(
    model: Path,
    *,
    data: str | FeedSet | None = None,
    keep: Sequence[str] = (),
    precision: formats.HalfName = "fp16",
    keep_io: bool = False,
    keep_io_names: Collection[str] = (),
    output: Path | None = None,
    max_drift: float | None = None,
    metric: str | Callable[..., Any] | None = None,
    labels: Path | None = None,
    max_drop: float | None = None,
    engine: str = USUAL,
    amax: Mapping[str, float] | None = None,
    amax_modules: Mapping[str, str] | None = None,
    progress: Progress = lambda _: None,
    disabled_rules: Collection[str] = (),
    use_ranges: bool = True,
    accept: Accept = lambda drift, precision, facts: None,
) -> Conversion:
    """Convert an FP32 ONNX model into a strictly typed mixed one.

    Args:
        model: the FP32 model.
        data: samples (see `data_files`); without them rules alone decide and no drift is measured.
        keep: the user's keep-list: names, globs, `op:TYPE`, `scope:MODULE`, `@FILE`.
        precision: `fp16` or `bf16`.
        keep_io: all inputs and outputs stay FP32.
        keep_io_names: these inputs and outputs stay FP32.
        output: where to write; None writes nothing.
        max_drift: largest relative L2 drift of the worst output; the lost-signal limit always applies.
        metric: a row of `measure.accuracy.METRICS`, or a function of (outputs, labels); its mean may fall by `max_drop`.
        labels: an `.npz` with one array, for the metric.
        max_drop: see `metric`.
        engine: the one the model is for: drift is emulated with what it takes apart (see `precision.engine_forms`).
        amax: tensor name -> largest magnitude recorded in training.
        amax_modules: tensor name -> the module where that was recorded, for the reasons.
        progress: told what is being done.
        disabled_rules: range rules to leave out (to show what each is for).
        use_ranges: whether ranges are taken from the data (else it only serves to measure drift).
        accept: asked before anything is written, with the drift (or None), the precision and `num_kept`; raises to refuse.

    Raises:
        ModelError, DataError, KeepListError: bad input.
        ConversionError: the result did not prove valid.
        GateFailedError: an output is lost, or `max_drift` is not met; nothing is written.
    """
    begin = time.perf_counter()
    half = formats.FORMATS[precision]
    progress("reading")
    _refuse_unknown_rules(disabled_rules)
    forms_of(engine)
    if (metric is None) != (max_drop is None) or (labels is not None and metric is None):
        raise UsageError(
            "--metric, --max-drop and --labels go together.", hint="--labels y.npz --metric top1 --max-drop 0.2pt"
        )
    loaded = load_model(model)
    refuse_to_overwrite(model, output)
    warnings: list[str] = []
    feeds = None
    if data is not None:
        feeds = data if isinstance(data, FeedSet) else load_feeds(data, input_specs(loaded), where=str(model))
    else:
        warnings.append("no --data: rules alone decided, ranges and drift were not measured")
    float_io = float_io_names(loaded, keep_io, [*keep_io_names, *float_io_in(keep)])
    prepared = prepare(loaded, half, shapes=feeds is not None)
    kept = match_keep_list(prepared.index, patterns_for(prepared.index, keep), model_name=str(model))
    ranges = None
    with tempfile.TemporaryDirectory(prefix="mpdeploy-") as name:
        folder = Path(name)
        if feeds is not None and use_ranges:
            progress("taking ranges")
            ranges = measure_ranges(prepared, feeds, folder, half)
            warnings += ranges.warnings
            warnings += [
                f"the FP32 model itself gives NaN in '{tensor}' on feed {feed}"
                for tensor, feed in list(ranges.nan_tensors.items())[:3]
            ]
        if amax:
            ranges = ranges or Ranges()
            known = {value.name for value, dtype in prepared.index.dtypes.items() if dtype == formats.FLOAT}
            for tensor, largest in amax.items():
                if tensor in known:
                    ranges.tensors.setdefault(tensor, TensorStats()).merge_amax(
                        largest, "training", (amax_modules or {}).get(tensor, "")
                    )
        progress("planning")
        plan = make_plan(
            prepared.index,
            half,
            keep=kept,
            ranges=ranges,
            float_io=float_io,
            notes=prepared.notes,
            disabled_rules=disabled_rules,
            infer_shapes=prepared.infer_shapes,
        )
        progress("rewriting")
        mixed_index = rewrite_indexed(prepared, plan, consume=feeds is None)
        mixed = mixed_index.model
        check_strict_types(mixed_index)
        counts = count_precisions(mixed_index)
        drift, evaluations = None, 0
        blame: tuple[Blame, ...] = ()
        if feeds is not None:
            progress("measuring emulated drift")
            drift = emulated_drift(model, mixed, feeds, engine)
            evaluations = 1
            limit = LOST_REL_L2 if max_drift is None else max_drift
            if not drift.rel_l2 <= limit:
                blame = tuple(
                    blame_nodes(
                        prepared.model,
                        mixed,
                        feed_of_worst_sample(drift, feeds),
                        lambda shown, stem: opener(shown, folder, stem),
                        engine,
                    )
                )
                raise _drift_error(drift, limit, blame, max_drift is not None)
            if metric is not None:
                _check_metric(model, mixed, feeds, engine, metric, labels, max_drop)
        elif max_drift is not None:
            raise UsageError("--max-drift needs --data to measure drift on.", hint="add --data calib.npz")
        accept(drift, precision, {"num_kept": len(plan.kept)})
        if output is not None:
            progress("proving and writing")
            warnings += prove_and_write(model, output, plan, mixed_index, folder)
    return Conversion(
        output=output,
        plan=plan,
        counts=counts,
        drift=drift,
        warnings=tuple(warnings),
        ranges=ranges,
        seconds=time.perf_counter() - begin,
        engine=engine,
        evaluations=evaluations,
        blame=blame,
    )


def _check_metric(
    model: Path,
    mixed: ir.Model,
    feeds: FeedSet,
    engine: str,
    metric: str | Callable[..., Any],
    labels: Path | None,
    max_drop: float | None,
) -> None:
    known = None if labels is None else load_labels(labels)
    golden, found = (score(metric, outputs, known) for outputs in answers_of_both(model, mixed, feeds, engine))
    drop = float(golden.mean() - found.mean())
    if not drop <= (max_drop or 0.0):
        raise GateFailedError(
            f"{metric_name(metric)} falls by {drop:.4g} (from {golden.mean():.4g} to {found.mean():.4g}), "
            f"the limit is {max_drop:g}. Nothing was written.",
            hint="let --search find the smallest keep-list, or try --precision bf16",
        )


def _refuse_unknown_rules(names: Collection[str]) -> None:
    known = [rule.name for rule in RANGE_RULES]
    for name in names:
        if name not in known:
            raise UsageError(f"There is no range rule '{name}'.", hint=f"the rules are {', '.join(known)}")


def refuse_to_overwrite(model: Path, output: Path | None) -> None:
    """The model that is converted is not written over.

    Raises:
        UsageError: the output is the model.
    """
    if output is not None and output.exists() and model.exists() and output.samefile(model):
        raise UsageError(f"The output {output} is the input model itself.", hint="give another --output")


def _drift_error(drift: DriftReport, limit: float, blame: Sequence[Blame], asked: bool) -> GateFailedError:
    name, worst = max(drift.outputs.items(), key=lambda item: item[1].rel_l2)
    what = (
        f"{int(worst.num_nonfinite.sum())} values are not finite"
        if worst.num_nonfinite.any()
        else f"relative L2 drift {worst.rel_l2:.3g}"
    )
    lines = "\n".join(f"  {item}" for item in blame[:8])
    return GateFailedError(
        f"Output '{name}' {'drifts too far' if asked else 'is lost'} in half precision: {what}, "
        f"the limit is {limit:.3g}. Nothing was written."
        + (f"\n\nThese nodes did it (drift of what goes in -> of what comes out):\n{lines}" if lines else ""),
        hint="keep them in FP32 with --keep, let --search find the smallest keep-list, or try --precision bf16",
    )


def write_plan(path: Path, conversion: Conversion) -> None:
    """Write `plan.json`: every kept node and why. `--keep @plan.json` takes it back."""
    measured = {"drift": conversion.to_json()["drift"], "casts": conversion.counts.casts}
    write_json(path, conversion.plan.to_json() | measured | {"ranges": _deciding_ranges(conversion)})


def _deciding_ranges(conversion: Conversion, count: int = 24) -> dict[str, Any]:
    """Statistics of the tensors that reasons name: the ones that decided."""
    tensors = conversion.ranges.tensors if conversion.ranges is not None else {}
    words = (
        word.strip(",:;()'")
        for reasons in conversion.plan.kept.values()
        for reason in reasons
        if reason.kind in ("range", "inner")
        for word in reason.text.split()
    )
    named = [name for name in dict.fromkeys(words) if name in tensors]
    return {name: tensors[name].to_json() for name in named[:count]}


def record_conversion(path: Path, model: Path, conversion: Conversion) -> None:
    """Keep a conversion in a run directory, as the stage 30-convert: its record, its plan, and the source's digest."""
    from mpdeploy.artifact import FileArtifact, OnnxModel
    from mpdeploy.files import sha256_of_file
    from mpdeploy.precision.model_io import output_specs
    from mpdeploy.run_dir import RunDir, StageRecord

    assert conversion.output is not None
    precision = conversion.plan.half.name
    with RunDir.create(path) as run:
        folder = run.folder("30-convert")
        plan_path = folder / f"plan.{precision}.json"
        write_plan(plan_path, conversion)
        kept: dict[str, FileArtifact] = {f"plan.{precision}": FileArtifact.of(plan_path)}
        if conversion.output.resolve().is_relative_to(run.path.resolve()):
            written = load_model(conversion.output)
            kept[precision] = OnnxModel.of(
                run.path / conversion.output.resolve().relative_to(run.path.resolve()),
                inputs=input_specs(written), outputs=output_specs(written), sidecar={"precision": precision},
            )  # fmt: skip
        report: dict[str, Any] = {
            precision: {key: value for key, value in conversion.to_json().items() if key != "output"}
        }
        key = {"source": str(model), "source_sha256": sha256_of_file(model)}
        run.put(StageRecord("30-convert", "done", key, kept, report, conversion.seconds))

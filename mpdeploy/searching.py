"""The search on a real model: joins `precision.search`, which runs nothing, with ONNX Runtime and the data.

found = search_model(Path("model.onnx"), data="calib.npz", max_drift=1e-3)
found.plan                      what `rewrite` carries out
found.write_keep_list(path)     what `--keep @path` takes back
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mpdeploy.artifact import Array
from mpdeploy.data_files import FeedSet, load_feeds, load_labels
from mpdeploy.emulated_runs import emulated_drift, emulated_runner, opener
from mpdeploy.engines import onnxruntime as ort_engine
from mpdeploy.errors import ConfigError, DataError, UsageError, closest_names
from mpdeploy.files import digest_of_json, sha256_of_file, write_json
from mpdeploy.measure.accuracy import Metric, metric_name, resolve, score
from mpdeploy.measure.drift import DriftReport
from mpdeploy.precision import formats
from mpdeploy.precision.flow import build_flow, shape_size
from mpdeploy.precision.graph_index import CONTROL_FLOW, GraphIndex
from mpdeploy.precision.keep_list import match_keep_list, read_patterns
from mpdeploy.precision.model_io import SCRATCH_EXTERNAL_FROM_BYTES, input_specs, load_model, write_model
from mpdeploy.precision.plan import PrecisionPlan, Reason, _reasons_of_op
from mpdeploy.precision.ranges import Ranges, collect_ranges
from mpdeploy.precision.rewrite import Prepared, prepare, rewrite
from mpdeploy.precision.search import SearchAnswer, search
from mpdeploy.precision.search_cost import CostKind, FlowCosts, make_costs
from mpdeploy.precision.search_file import entry_of, keep_list_json
from mpdeploy.precision.search_graph import Switch, build_switch_graph
from mpdeploy.precision.search_reasons import dominating, explain, groups_of
from mpdeploy.precision.search_types import OnProgress
from mpdeploy.searching_problem import (
    Batch,
    Model,
    ModelLandscape,
    ModelProblem,
    Scorer,
    held_out_samples,
    make_batches,
    measure_injected,
    output_weights,
)

Progress = Callable[[str], None]
HURT = 1e-6
"""Relative squared error of a rounding beyond the usual: (2**-10)**2."""
PROOF_EVALUATIONS = 48.0


@dataclass(frozen=True)
class ModelSearch:
    """What a search on a model found.

    Attributes:
        answer: what was measured; its `kept` are node ids, `input:NAME` and `output:NAME`.
        plan: node -> precision with reasons: rules, what the search keeps, and what lies between.
        confirmed: drift of the really rewritten and emulated model on all samples.
        confirmed_measured: what the gate looks at, of that model: its drift, or the drop of the metric.
        limit, gate: the gate, as a number and in words.
        met: whether the rewritten model meets it.
        switched_drift: what the switchable emulation says of the same plan; it differs from `confirmed` by how a runtime orders sums.
        held_out_drift: drift on the samples that no probe saw; None with fewer than 8 samples.
        seen_drift: drift on the other ones.
        groups: kept units that stand or fall together.
        dominating: (rounding, drift it makes alone), largest first.
        advice: what would be needed, where the gate cannot be met.
        num_free: units that might have become half.
        entries: the keep-list.
        seconds: all in all.
    """

    answer: SearchAnswer
    plan: PrecisionPlan
    confirmed: DriftReport
    confirmed_measured: float
    limit: float
    gate: str
    met: bool
    switched_drift: float
    held_out_drift: float | None
    seen_drift: float | None
    groups: tuple[tuple[str, ...], ...]
    dominating: tuple[tuple[str, float], ...]
    advice: tuple[str, ...]
    num_free: int
    entries: tuple[Mapping[str, Any], ...]
    float_io: tuple[str, ...]
    seconds: float
    prepared: Prepared = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """What `convert --search --json` shows under `search`."""
        answer = self.answer
        return {
            "met": self.met,
            "gate": self.gate,
            "measured": self.confirmed_measured,
            "limit": self.limit,
            "all_half": answer.all_half.drift,
            "kept": len(answer.kept),
            "hard": list(answer.hard),
            "minimal": answer.is_minimal,
            "groups": [list(group) for group in self.groups],
            "evaluations": round(answer.evaluations, 2),
            "by_phase": {phase: round(count, 2) for phase, count in answer.by_phase.items()},
            "drift_searched": answer.evaluation.drift,
            "drift_switched": self.switched_drift,
            "drift_rewritten": self.confirmed.rel_l2,
            "drift_held_out": self.held_out_drift,
            "drift_seen": self.seen_drift,
            "pareto": [point.to_json() for point in answer.pareto],
            "dominating": [{"rounding": name, "drift": drift} for name, drift in self.dominating],
            "advice": list(self.advice),
            "stopped": answer.stopped,
            "seconds": round(self.seconds, 2),
        }

    def write_keep_list(self, path: Path) -> None:
        """Write the keep-list; `--keep @FILE` takes it back, edited or not."""
        write_json(path, keep_list_json(self.entries, self.float_io, self.to_json()))


def search_model(
    model: Path,
    *,
    data: str | FeedSet,
    keep: Sequence[str] = (),
    precision: formats.HalfName = "fp16",
    keep_io: bool = False,
    keep_io_names: Collection[str] = (),
    max_drift: float | None = None,
    metric: Metric | None = None,
    labels: Path | Array | None = None,
    max_drop: float | None = None,
    cost: CostKind | Mapping[str, float] = "traffic",
    seed: int = 0,
    folder: Path | None = None,
    max_evaluations: float = math.inf,
    max_seconds: float = math.inf,
    proof_evaluations: float = PROOF_EVALUATIONS,
    progress: Progress = lambda _: None,
    on_progress: OnProgress = lambda _: None,
) -> ModelSearch:
    """Find the smallest (or cheapest) FP32 keep-list with which a model meets a gate.

    Args:
        model: the FP32 model.
        data: samples; a quarter of them is held out from every choice and only counts in pass or fail.
        keep: what stays FP32 in any case.
        precision: `fp16` or `bf16`.
        keep_io: all inputs and outputs stay FP32.
        keep_io_names: these do.
        max_drift: the gate, as relative L2 drift of the worst output.
        metric: or a metric by name, or a function of (outputs, labels) that gives one score a sample.
        labels: for the metric.
        max_drop: the gate with a metric: how much its mean may fall.
        cost: `nodes`, `traffic`, or a profile {node: microseconds}.
        seed: the same one takes the same steps.
        folder: where the log and the best answer so far are kept; the same call goes on from there.
        max_evaluations: passes over all samples, after which the best answer so far is given.
        max_seconds: the same in time.
        proof_evaluations: what the proof of 1-minimality may cost; infinity measures every kept unit on all samples.
        progress: told what is being done.
        on_progress: told the numbers, after every measurement.

    Raises:
        ModelError, DataError, KeepListError, UsageError: bad input.
    """
    begin = time.perf_counter()
    half = formats.FORMATS[precision]
    limit, gate = _gate(max_drift, metric, labels, max_drop)
    progress("reading")
    loaded = load_model(model)
    feeds = data if isinstance(data, FeedSet) else load_feeds(data, input_specs(loaded), where=str(model))
    float_io = _io_names(loaded, keep_io, keep_io_names)
    prepared = prepare(loaded, half)
    user = match_keep_list(prepared.index, read_patterns(keep), model_name=str(model))
    fixed = _fixed_reasons(prepared.index, half, user)
    scorer = None if metric is None else _scorer(metric, labels, feeds.num_samples)
    ort_engine.prove_pairs_are_kept(half.onnx)
    flow = build_flow(
        prepared.index,
        half,
        is_fixed=lambda node_id: bool(fixed.get(node_id)),
        float_io=lambda name: name in float_io,
        size_of=shape_size,
    )
    priced = cost if isinstance(cost, str) else dict(cost)
    sources = [sha256_of_file(model), feeds.digest, sorted(fixed), sorted(float_io)]
    digest = digest_of_json([*sources, precision, gate, priced])
    with tempfile.TemporaryDirectory(prefix="mpdeploy-search-") as name:
        scratch = Path(name)
        progress("building the switchable emulation")
        graph = build_switch_graph(prepared.model, half, flow)
        if not graph.switches:
            raise UsageError("There is nothing to search: no node of this model can be half.", hint="mpdeploy inspect")
        with ort_engine.OrtRunner(model) as fp32:
            batches = make_batches(feeds, fp32.infer)
        progress("measuring what each rounding injects")
        open_model = opener(prepared.model, scratch, "injected")
        injected = _injected(prepared, batches, half, graph.switches, open_model)
        flow_costs = FlowCosts(flow, graph.switches, make_costs(prepared.index, flow, cost, shape_size))
        with ort_engine.OrtRunner(_written(graph.model, scratch)) as runner:
            running = Model(runner.infer, graph, flow_costs, batches, feeds.batched, injected)
            held_out = held_out_samples(running.num_samples, seed)
            seen = [sample for sample in range(running.num_samples) if sample not in held_out]
            really: dict[frozenset[str], tuple[DriftReport, float]] = {}

            def confirm(half_keys: frozenset[str]) -> tuple[DriftReport, float]:
                if half_keys not in really:
                    progress("confirming on the rewritten model")
                    bare = PrecisionPlan(half, half_keys, {}, {})
                    really[half_keys] = _confirm(model, prepared, bare, feeds, scorer, batches)
                return really[half_keys]

            problem = ModelProblem(
                running,
                limit=limit,
                scorer=scorer,
                digest=digest,
                confirm=lambda kept: confirm(flow_costs.planned_half_keys(kept))[1],
            )
            progress("searching")
            answer = search(
                problem,
                ModelLandscape(running, seen, output_weights(running)),
                seed=seed,
                log=None if folder is None else folder / "search.jsonl",
                max_evaluations=max_evaluations,
                max_seconds=max_seconds,
                on_progress=on_progress,
                num_samples=running.num_samples,
                charged=1.0,
                proof_evaluations=proof_evaluations,
            )
            ranges = _ranges_around(prepared, feeds, answer, injected, open_model)
            plan = make_search_plan(prepared, half, flow_costs, answer, fixed, ranges, float_io)
            confirmed, measured = confirm(plan.half_keys)
            met = measured <= limit * (1 + 1e-9) and math.isfinite(confirmed.rel_l2)
            switched = problem.measure(graph.flags(plan.half_keys), until="lost").drift
            parts = [
                None if not samples else problem.evaluate(answer.kept, samples, until="lost").drift
                for samples in (held_out, seen)
            ]
    found = ModelSearch(
        answer=answer,
        plan=plan,
        confirmed=confirmed,
        confirmed_measured=measured,
        limit=limit,
        gate=gate,
        met=met,
        switched_drift=switched,
        held_out_drift=parts[0],
        seen_drift=parts[1],
        groups=tuple(tuple(g) for g in groups_of(answer.kept, graph.switches, problem.units)),
        dominating=tuple(dominating(answer.energies, graph.switches)),
        advice=() if met else tuple(_advice(answer, problem, half, limit)),
        num_free=len(problem.units),
        entries=tuple(
            entry_of(prepared.index, unit, plan.kept.get(unit, ()), answer)
            for unit in problem.units
            if unit in answer.kept
        ),
        float_io=tuple(sorted({unit.split(":", 1)[1] for unit in answer.kept if unit not in prepared.index.nodes})),
        seconds=time.perf_counter() - begin,
        prepared=prepared,
    )  # fmt: skip
    if folder is not None:
        found.write_keep_list(folder / "keep.json")
    return found


def _io_names(model: ir.Model, keep_io: bool, names: Collection[str]) -> set[str]:
    known = [value.name or "" for value in (*model.graph.inputs, *model.graph.outputs)]
    for name in names:
        if name not in known:
            raise UsageError(
                f"The model has no input or output '{name}'.", hint=f"closest names: {closest_names(name, known)}"
            )
    return set(known) if keep_io else set(names)


def _written(model: ir.Model, scratch: Path) -> Path:
    return write_model(model, scratch, "switched.onnx", external_from_bytes=SCRATCH_EXTERNAL_FROM_BYTES)


def parse_drop(text: str) -> float:
    """`0.2pt` -> 0.002; a bare number is taken in the metric's own unit.

    Raises:
        UsageError: no number.
    """
    number, is_points = (text[:-2], True) if text.strip().endswith("pt") else (text, False)
    try:
        value = float(number)
    except ValueError as error:
        raise UsageError(f"--max-drop {text} is no number.", hint="give 0.2pt (points), or 0.002") from error
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"--max-drop {text} must not be negative.", hint="give how much the metric may fall")
    return value / 100 if is_points else value


def _gate(
    max_drift: float | None, metric: Metric | None, labels: Path | Array | None, max_drop: float | None
) -> tuple[float, str]:
    if metric is None:
        if max_drop is not None or labels is not None:
            raise UsageError("--labels and --max-drop need a --metric.", hint="add --metric top1")
        if max_drift is None or not max_drift > 0:
            raise UsageError(
                "The search needs a gate.",
                hint="give --max-drift 1e-3, or --labels FILE --metric top1 --max-drop 0.2pt",
            )
        return max_drift, f"drift at most {max_drift:g}"
    if max_drift is not None:
        raise UsageError("Give one gate: --max-drift, or --metric with --max-drop.", hint="drop one of them")
    if max_drop is None:
        raise UsageError(f"The metric '{metric_name(metric)}' needs a --max-drop.", hint="add --max-drop 0.2pt")
    if isinstance(metric, str):
        resolve(metric)
        if labels is None:
            raise UsageError(f"The metric '{metric}' needs --labels.", hint="add --labels FILE.npz with one array")
    elif not callable(metric):
        raise ConfigError("A metric is a name, or a function of (outputs, labels).", hint="metric='top1'")
    return max_drop, f"{metric_name(metric)} falls by at most {max_drop:g}"


def _scorer(metric: Metric, labels: Path | Array | None, num_samples: int) -> Scorer:
    known = load_labels(labels) if isinstance(labels, Path) else labels
    if known is not None and len(known) != num_samples:
        raise DataError(
            f"There are {num_samples} samples and {len(known)} labels.", hint="one label a sample, in the same order"
        )

    def scores(outputs: Mapping[str, Array], samples: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return score(metric, outputs, None if known is None else known[list(samples)])

    return scores


def _fixed_reasons(index: GraphIndex, half: formats.HalfFormat, user: Mapping[str, Any]) -> dict[str, list[Reason]]:
    """What no search may change: schemas, op rules, the user's keeps. Ranges and constants are left to measurement."""
    reasons: dict[str, list[Reason]] = {}
    for node_id, node in index.nodes.items():
        if node.op_type in ("Constant", *CONTROL_FLOW):
            continue
        found = list(_reasons_of_op(index, node, half))
        if node_id in user:
            found.append(Reason("user", f"kept by '{user[node_id].pattern}'"))
        if found:
            reasons[node_id] = found
    return reasons


def _injected(
    prepared: Prepared, batches: Sequence[Batch], half: formats.HalfFormat, switches: Sequence[Switch], open_model: Any
) -> dict[str, float]:
    in_main = {value.name for node in prepared.model.graph for value in node.outputs}
    in_main |= {value.name for value in prepared.model.graph.inputs}
    names = [n for n in dict.fromkeys(s.tensor for s in switches if s.tensor is not None) if n in in_main]
    by_tensor = measure_injected(names, batches[:1], half, open_model)
    usual = (
        half.unit_roundoff**2 / 3
    )  # tensors inside bodies cannot be looked at: what rounding does to ordinary values
    return {s.name: s.injected if s.injected is not None else by_tensor.get(s.tensor or "", usual) for s in switches}


def _ranges_around(
    prepared: Prepared, feeds: FeedSet, answer: SearchAnswer, injected: Mapping[str, float], open_model: Any
) -> Ranges | None:
    """Statistics of the tensors around hard causes, and of those that rounding hurts: enough to name what went wrong."""
    index = prepared.index
    lost = {proof.unit for proof in answer.proofs if not math.isfinite(proof.drift_without)} | set(answer.hard)
    hurt = {name.split(" -> ")[0] for name, error in injected.items() if error > HURT}
    around = {
        value
        for node_id in answer.kept
        if (node := index.nodes.get(node_id)) is not None
        for value in (*node.inputs, *node.outputs)
        if value is not None and index.is_float(value) and (node_id in lost or value.name in hurt)
    }
    in_main = {v for node in prepared.model.graph for v in node.outputs} | set(prepared.model.graph.inputs)
    names = sorted(value.name or "" for value in around if value in in_main and not index.is_constant(value))
    if not names:
        return None
    return collect_ranges(open_model, names, lambda: iter(feeds), num_samples=feeds.num_samples)


def make_search_plan(
    prepared: Prepared,
    half: formats.HalfFormat,
    costs: FlowCosts,
    answer: SearchAnswer,
    fixed: Mapping[str, Sequence[Reason]],
    ranges: Ranges | None,
    float_io: Collection[str],
) -> PrecisionPlan:
    """The plan of an answer: what rules keep, what the search keeps and why, and what casts would cost too much between them."""
    index = prepared.index
    half_keys = costs.planned_half_keys(answer.kept)
    why = explain(index, half, ranges, answer.kept, answer.hard, answer.proofs, answer.evaluation.drift)
    kept: dict[str, tuple[Reason, ...]] = {}
    ops: dict[str, str] = {}
    for unit in costs.flow.units:
        if unit.node is None or unit.key not in index.nodes:
            continue
        ops[unit.key] = index.nodes[unit.key].op_type
        if unit.key in fixed:
            kept[unit.key] = tuple(fixed[unit.key])
        elif unit.key in why:
            kept[unit.key] = why[unit.key]
        elif unit.key not in half_keys:
            kept[unit.key] = (Reason("border", "half precision here would cost more in casts than it saves"),)
    named = {unit.split(":", 1)[1] for unit in answer.kept if unit not in index.nodes}
    return PrecisionPlan(
        half=half,
        half_keys=half_keys,
        kept=kept,
        ops=ops,
        notes=tuple(prepared.notes),
        ranges_from=f"search, {ranges.num_samples} samples" if ranges is not None else "search",
        float_io=frozenset(float_io) | named,
    )


def _confirm(
    model: Path,
    prepared: Prepared,
    plan: PrecisionPlan,
    feeds: FeedSet,
    scorer: Scorer | None,
    batches: Sequence[Batch],
) -> tuple[DriftReport, float]:
    """Drift of the really rewritten model, emulated, on all samples; and what the gate looks at."""
    mixed = rewrite(prepared, plan)
    drift = emulated_drift(model, mixed, feeds)
    if scorer is None:
        return drift, drift.rel_l2
    reference = np.concatenate([scorer(batch.golden, batch.samples) for batch in batches])
    with emulated_runner(mixed) as runner:
        found = np.concatenate([scorer(runner.infer(batch.feeds), batch.samples) for batch in batches])
    return drift, float(np.nan_to_num(reference, nan=0.0).mean() - np.nan_to_num(found, nan=0.0).mean())


def _advice(answer: SearchAnswer, problem: ModelProblem, half: formats.HalfFormat, limit: float) -> list[str]:
    """What would be needed to meet a gate that could not be met."""
    lines = [f"the best reached is {answer.evaluation.measured:.3g}, the limit is {limit:.3g}"]
    if answer.stopped:
        return [*lines, f"the search was stopped: {answer.stopped}; run the same command again to go on"]
    rules = sorted(key for key in problem.model.costs.rule_fixed if key.startswith(("input:", "output:")))
    lines.append(
        "even with every node in FP32 the gate is not met: "
        + ("the gate is below what FP32 itself repeats" if rules else "inputs or outputs in half are what is left")
    )
    if half.name == "fp16" and answer.hard:
        lines.append(f"{len(answer.hard)} nodes leave FP16's range: BF16 has FP32's range (--precision bf16)")
    return lines

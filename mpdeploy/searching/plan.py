"""From a model to what a search may decide, and from its answer to a plan with reasons and advice."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from mpdeploy.data_files import FeedSet
from mpdeploy.emulated_runs import emulated_answers, emulated_runner
from mpdeploy.measure.drift import DriftMeter, DriftReport
from mpdeploy.precision import formats
from mpdeploy.precision.graph_index import CONTROL_FLOW, GraphIndex
from mpdeploy.precision.plan import PrecisionPlan, Reason, _reasons_of_op
from mpdeploy.precision.ranges import Ranges, collect_ranges
from mpdeploy.precision.rewrite import Prepared
from mpdeploy.precision.search.cost import FlowCosts
from mpdeploy.precision.search.driver import SearchAnswer
from mpdeploy.precision.search.islands import rewrite_with_islands
from mpdeploy.precision.search.switch_graph import Switch
from mpdeploy.searching.problem import Batch, Scorer, drop, measure_injected, scores_of

NUM_LOOKED_AT = 4
"""Batches from which injected errors are taken."""
HURT = 1e-6
"""Relative squared error of a rounding beyond the usual: (2**-10)**2."""


def fixed_reasons(index: GraphIndex, half: formats.HalfFormat, user: Mapping[str, Any]) -> dict[str, list[Reason]]:
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


def injected_errors(
    prepared: Prepared, batches: Sequence[Batch], half: formats.HalfFormat, switches: Sequence[Switch], open_model: Any
) -> dict[str, float]:
    """Switch -> relative squared error that it puts in, on some batches from all over the data."""
    in_main = {value.name for node in prepared.model.graph for value in node.outputs}
    in_main |= {value.name for value in prepared.model.graph.inputs}
    names = [n for n in dict.fromkeys(s.tensor for s in switches if s.tensor is not None) if n in in_main]
    some = [batches[place] for place in sorted({i * len(batches) // NUM_LOOKED_AT for i in range(NUM_LOOKED_AT)})]
    by_tensor = measure_injected(names, some, half, open_model)
    # what rounding does to ordinary values: tensors inside bodies cannot be looked at, and masked ones may be 0 in these batches
    usual = half.unit_roundoff**2 / 3
    return {s.name: s.injected if s.injected is not None else by_tensor.get(s.tensor or "", usual) for s in switches}


def ranges_around(
    prepared: Prepared, feeds: FeedSet, answer: SearchAnswer, injected: Mapping[str, float], open_model: Any
) -> Ranges | None:
    """Statistics of the tensors around hard causes, and of those that rounding hurts: enough to name what went wrong."""
    index = prepared.index
    lost = {proof.unit for proof in answer.proofs if not math.isfinite(proof.drift_without)} | set(answer.hard)
    hurt = {name.split(" -> ")[0] for name, error in injected.items() if error > HURT}
    graph = prepared.model.graph
    io = {f"input:{value.name}": value for value in graph.inputs} | {f"output:{v.name}": v for v in graph.outputs}
    around = {
        value
        for unit in answer.kept
        for value in (_around(index.nodes[unit]) if unit in index.nodes else [io[unit]] if unit in io else ())
        if index.is_float(value) and (unit in lost or value.name in hurt)
    }
    in_main = {v for node in graph for v in node.outputs} | set(graph.inputs)
    names = sorted(value.name or "" for value in around if value in in_main and not index.is_constant(value))
    if not names:
        return None
    return collect_ranges(open_model, names, lambda: iter(feeds), num_samples=feeds.num_samples)


def _around(node: ir.Node) -> list[ir.Value]:
    return [value for value in (*node.inputs, *node.outputs) if value is not None]


def make_search_plan(
    prepared: Prepared,
    half: formats.HalfFormat,
    costs: FlowCosts,
    answer: SearchAnswer,
    fixed: Mapping[str, Sequence[Reason]],
    ranges: Ranges | None,
    float_io: Collection[str],
    why: Mapping[str, tuple[Reason, ...]],
) -> PrecisionPlan:
    """The plan of an answer: what rules keep, what the search keeps and why, and what casts would cost too much between them."""
    index = prepared.index
    half_keys = costs.planned_half_keys(answer.kept)
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
    io = {unit: reasons for unit, reasons in why.items() if unit not in index.nodes}
    notes = [
        f"the {unit.replace(':', ' ', 1)} stays FP32: {'; '.join(map(str, reasons))}" for unit, reasons in io.items()
    ]
    return PrecisionPlan(
        half=half,
        half_keys=half_keys,
        kept=kept,
        ops=ops,
        notes=(*prepared.notes, *notes),
        ranges_from=f"search, {ranges.num_samples} samples" if ranges is not None else "search",
        float_io=frozenset(float_io) | {unit.split(":", 1)[1] for unit in io},
    )


def really_measured(
    prepared: Prepared,
    plan: PrecisionPlan,
    engine: str,
    scorer: Scorer | None,
    reference: float,
    batches: Sequence[Batch],
) -> tuple[DriftReport, float]:
    """Drift of the really rewritten model, emulated, on all samples; and what the gate looks at."""
    mixed = rewrite_with_islands(prepared, plan).model
    meter, answers = DriftMeter(), []
    with emulated_runner(mixed, engine=engine) as runner:
        for batch in batches:
            found = emulated_answers(runner, batch.feeds)
            meter.add(batch.golden, found, split=batch.split)
            answers.append({} if scorer is None else found)
    drift = meter.report()
    return drift, drift.rel_l2 if scorer is None else drop(reference, scores_of(scorer, answers, batches))

"""From a model to what a search may decide, and from its answer to a plan with reasons and advice."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.data_files import FeedSet
from mpdeploy.emulated_runs import emulated_drift, emulated_runner
from mpdeploy.measure.drift import DriftReport
from mpdeploy.precision import formats
from mpdeploy.precision.graph_index import CONTROL_FLOW, GraphIndex
from mpdeploy.precision.plan import PrecisionPlan, Reason, _reasons_of_op
from mpdeploy.precision.ranges import Ranges, collect_ranges
from mpdeploy.precision.rewrite import Prepared, rewrite
from mpdeploy.precision.search import SearchAnswer
from mpdeploy.precision.search_cost import FlowCosts
from mpdeploy.precision.search_graph import Switch
from mpdeploy.precision.search_reasons import explain
from mpdeploy.searching_problem import SUSPICIOUS, Batch, ModelProblem, Scorer, measure_injected

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
    """Switch -> relative squared error that it puts in, on the first batch."""
    in_main = {value.name for node in prepared.model.graph for value in node.outputs}
    in_main |= {value.name for value in prepared.model.graph.inputs}
    names = [n for n in dict.fromkeys(s.tensor for s in switches if s.tensor is not None) if n in in_main]
    by_tensor = measure_injected(names, batches[:1], half, open_model)
    usual = (
        half.unit_roundoff**2 / 3
    )  # tensors inside bodies cannot be looked at: what rounding does to ordinary values
    return {s.name: s.injected if s.injected is not None else by_tensor.get(s.tensor or "", usual) for s in switches}


def ranges_around(
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


def really_measured(
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


def advice_on(answer: SearchAnswer, problem: ModelProblem, half: formats.HalfFormat) -> list[str]:
    """What would be needed to meet a gate that could not be met."""
    reached = "an output is lost" if answer.evaluation.lost else f"{answer.evaluation.measured:.3g}"
    lines = [f"the best reached is {reached}, the limit is {problem.limit:.3g}"]
    if answer.stopped:
        return [*lines, f"the search was stopped: {answer.stopped}; run the same command again to go on"]
    model = problem.model
    still_half = model.costs.half_keys(answer.kept)
    thrown = [s for s in model.graph.switches if any(key in still_half for key in s.needs)]
    thrown.sort(key=lambda s: -answer.energies.get(s.name, 0.0))
    left = sum(answer.energies.get(s.name, 0.0) for s in thrown)
    out_of_range: list[str] = []
    imprecise: list[str] = []
    for switch in thrown:
        if left <= problem.limit**2:
            break
        left -= answer.energies.get(switch.name, 0.0)
        names = out_of_range if model.injected[switch.name] >= SUSPICIOUS and half.name == "fp16" else imprecise
        names += [key for key in switch.needs if key in still_half and key not in out_of_range + imprecise]
    if out_of_range:
        lines.append(
            f"BF16, which has FP32's range, or FP32 for {_listed(out_of_range)}: FP16 cannot hold what is there"
        )
    if imprecise:
        lines.append(f"FP32 for {_listed(imprecise)}: rounding alone adds that much there")
    if not thrown:
        lines.append("everything is FP32 already: the gate is below what two runs of FP32 differ by")
    return lines


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

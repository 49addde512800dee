"""What kind of thing a tensor is that half cannot hold: a long reduction, or an attention mask. For the reasons of a keep-list."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from mpdeploy.precision.formats import HalfFormat
from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.plan import Reason
from mpdeploy.precision.range_rules import UNDERFLOW_LIMIT
from mpdeploy.precision.ranges import EXPONENT_BIAS, Ranges, TensorStats
from mpdeploy.precision.search.switch_graph import MOVES

REDUCTIONS = frozenset(
    ["ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2", "GlobalAveragePool", "AveragePool"]
)
"""Ops that add up values of one tensor."""
GAP_OCTAVES = 3
"""A sentinel stands alone: so many powers of two below it hold no value."""
_TO_SOFTMAX = MOVES | {"Add", "Sub", "Where", "Cast", "Concat", "Min"}
_SOFTMAX = frozenset(["Softmax", "LogSoftmax", "Exp"])


def cause_of(index: GraphIndex, half: HalfFormat, ranges: Ranges, unit: str) -> list[Reason]:
    """The reduction or mask, if it is one, that a unit makes (or else takes) and that leaves the range of half."""
    node = index.nodes.get(unit)
    if node is not None:
        values = [value for value in (*node.outputs, *node.inputs) if value is not None]
    else:
        name = unit.split(":", 1)[-1]
        graph = index.model.graph
        values = [value for value in (*graph.inputs, *graph.outputs) if value.name == name]
    for value in dict.fromkeys(values):
        stats = ranges.tensors.get(value.name or "")
        if stats is not None and stats.count and not index.is_constant(value):
            found = _of_tensor(half, ranges, value, stats)
            if found:
                return found
    return []


def _of_tensor(half: HalfFormat, ranges: Ranges, value: ir.Value, stats: TensorStats) -> list[Reason]:
    if stats.amax < half.overflow_from and stats.rounding_loss(half) <= UNDERFLOW_LIMIT:
        return []
    if stats.amax >= half.overflow_from and _is_sentinel(half, stats) and _reaches_softmax(value):
        return [
            Reason(
                "mask",
                f"{value.name} is, or holds, an attention mask: its sentinel, near {stats.amax:.3g}, becomes infinite, "
                "and a row that is masked as a whole NaN",
            )
        ]
    producer = value.producer()
    if producer is None or producer.op_type not in REDUCTIONS:
        return []
    summed = ranges.tensors.get((producer.inputs[0].name or "") if producer.inputs[0] is not None else "")
    count = round(summed.count / stats.count) if summed is not None and summed.count else 0
    over = f"over {count:,} values" if count else "over many values"
    return [
        Reason(
            "reduction", f"{value.name} is a reduction {over}: it lies between {stats.amin:.3g} and {stats.amax:.4g}"
        )
    ]


def _is_sentinel(half: HalfFormat, stats: TensorStats) -> bool:
    """Whether what half cannot hold is one value, or nearly, far above all others."""
    first = int(math.log2(half.overflow_from)) + EXPONENT_BIAS
    held = np.flatnonzero(stats.exponents[first:255]) + first
    if not held.size or held[-1] - held[0] > 1:
        return False
    lowest = int(held[0])
    return not stats.exponents[max(lowest - GAP_OCTAVES, 1) : lowest].any()


def _reaches_softmax(value: ir.Value) -> bool:
    seen: set[ir.Value] = set()
    queue = [value]
    while queue:
        each = queue.pop()
        if each in seen:
            continue
        seen.add(each)
        for node, _ in each.uses():
            if node.op_type in _SOFTMAX:
                return True
            if node.op_type in _TO_SOFTMAX and node.domain in ("", "ai.onnx"):
                queue += node.outputs
    return False

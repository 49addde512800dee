"""Rules over ranges: one row a rule. Each looks at what tensors held on real samples, and names nodes that must stay FP32.

A tensor that half cannot hold must be neither made nor taken in half, so both its producer and its consumers are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from mpdeploy.precision.dot_products import is_dot_product
from mpdeploy.precision.flow import border_key, half_ports
from mpdeploy.precision.formats import FLOAT, HalfFormat
from mpdeploy.precision.graph_index import CONTROL_FLOW, GraphIndex
from mpdeploy.precision.ranges import Ranges, TensorStats

CANCELLATION_LIMIT = 16.0
"""A sum may be this much smaller than what is added: more, and their rounding is 16 unit roundoffs of it."""
ANGLE_LIMIT = 2.0**-5
"""Radians by which rounding may move an angle."""
UNDERFLOW_LIMIT = 2.0**-9
"""Relative L2 error a tensor may suffer from FP16's range, beside its normal rounding: four unit roundoffs."""


@dataclass(frozen=True, slots=True)
class RangeVerdict:
    """Nodes (by id), outputs of Ifs (by border key), and graph inputs or outputs (by name) that must be FP32, and why."""

    nodes: tuple[str, ...]
    text: str
    io: tuple[str, ...] = ()


class Tensors:
    """What a rule sees: the model, the format, and the statistics of each float tensor."""

    def __init__(self, index: GraphIndex, half: HalfFormat, ranges: Ranges) -> None:
        self.index = index
        self.half = half
        self.ranges = ranges
        self._io = {*index.model.graph.inputs, *index.model.graph.outputs}

    def each(self) -> Iterator[tuple[ir.Value, TensorStats]]:
        """Float tensors with their statistics."""
        for value, dtype in self.index.dtypes.items():
            stats = self.ranges.tensors.get(value.name or "")
            if dtype == FLOAT and stats is not None and stats.count + stats.amax > 0:
                yield value, stats

    def stats(self, value: ir.Value | None) -> TensorStats | None:
        """Statistics of a tensor, where there are any."""
        return None if value is None else self.ranges.tensors.get(value.name or "")

    def around(self, value: ir.Value, text: str) -> RangeVerdict:
        """Producer and half-taking consumers of a tensor that half cannot hold."""
        nodes = []
        producer = value.producer()
        if producer is not None and producer.op_type in CONTROL_FLOW:
            nodes.append(border_key(self.index.id_of[producer], producer.outputs.index(value)))
        elif producer is not None:
            nodes.append(self.index.id_of[producer])
        for node, position in value.uses():
            if position in half_ports(self.index, node, self.half)[0]:
                nodes.append(self.index.id_of[node])
        io = (value.name or "",) if value in self._io else ()
        return RangeVerdict(tuple(dict.fromkeys(nodes)), text, io)


@dataclass(frozen=True, slots=True)
class RangeRule:
    """One row.

    Attributes:
        name: to name it in a report or leave it out.
        kind: the kind of the reasons it gives.
        find: yields what must be FP32.
        reason: what goes wrong without it.
    """

    name: str
    kind: str
    find: Callable[[Tensors], Iterator[RangeVerdict]]
    reason: str


def _overflow(tensors: Tensors) -> Iterator[RangeVerdict]:
    for value, stats in tensors.each():
        if stats.amax * stats.tail_factor >= tensors.half.overflow_from:
            seen = (
                _seen_in_training(stats)
                if stats.source == "training"
                else f"seen, x{stats.tail_factor:.2g} for the tail"
            )
            yield tensors.around(
                value, f"{value.name} reaches {stats.amax:.4g} ({seen}); half holds {tensors.half.max:.6g}"
            )


def _seen_in_training(stats: TensorStats) -> str:
    where = f"in training at module '{stats.module}'" if stats.module else "in training"
    return where if stats.calibration_amax is None else f"{where}, {stats.calibration_amax:.4g} in calibration"


def _underflow(tensors: Tensors) -> Iterator[RangeVerdict]:
    for value, stats in tensors.each():
        loss = stats.rounding_loss(tensors.half)
        if loss > UNDERFLOW_LIMIT:
            yield tensors.around(
                value,
                f"{value.name} lies near {stats.rms:.2g}: rounding loses {100 * loss:.2g} % of it "
                f"(half is exact above {tensors.half.min_normal:.2g})",
            )


def _small_divisor(tensors: Tensors) -> Iterator[RangeVerdict]:
    """1/x, log x and the like magnify what happens to the smallest values, whatever the tensor's energy."""
    for node_id, node in tensors.index.nodes.items():
        position = _SENSITIVE.get(node.op_type)
        if position is None or position >= len(node.inputs):
            continue
        divisor = node.inputs[position]
        stats = tensors.stats(divisor)
        if stats is None or divisor is None or stats.count == 0 or not math.isfinite(stats.amin):
            continue
        if stats.amin < tensors.half.min_normal:
            yield RangeVerdict(
                (*tensors.around(divisor, "").nodes, node_id),
                f"{node.op_type} of {divisor.name}, which comes down to {stats.amin:.2g} "
                f"(half is exact above {tensors.half.min_normal:.2g})",
            )


_SENSITIVE = {"Div": 1, "Reciprocal": 0, "Log": 0, "Sign": 0}


def _cancellation(tensors: Tensors) -> Iterator[RangeVerdict]:
    """The difference of two large tensors is made of their rounding: u |a| / |a - b| of it."""
    for node_id, node in tensors.index.nodes.items():
        if node.op_type not in ("Add", "Sub"):
            continue
        made = tensors.stats(node.outputs[0])
        if made is None or not made.rms > 0:
            continue
        for taken in node.inputs:
            stats = tensors.stats(taken)
            if taken is not None and stats is not None and stats.rms > CANCELLATION_LIMIT * made.rms:
                around = tensors.around(taken, "")
                yield RangeVerdict(
                    tuple(dict.fromkeys((*around.nodes, node_id))),
                    f"{taken.name}, near {stats.rms:.2g}, cancels in {node.op_type} to {made.rms:.2g}: "
                    f"its rounding is {100 * tensors.half.unit_roundoff * stats.rms / made.rms:.2g} % of that",
                    around.io,
                )


def _large_angle(tensors: Tensors) -> Iterator[RangeVerdict]:
    """Sin and Cos see the absolute error of their input, which grows with it (positions in rotary embeddings)."""
    for node_id, node in tensors.index.nodes.items():
        angle = node.inputs[0] if node.op_type in ("Sin", "Cos") else None
        stats = tensors.stats(angle)
        if angle is None or stats is None:
            continue
        error = stats.amax * stats.tail_factor * tensors.half.unit_roundoff
        if error > ANGLE_LIMIT:
            around = tensors.around(angle, "")
            yield RangeVerdict(
                tuple(dict.fromkeys((*around.nodes, node_id))),
                f"{node.op_type} of {angle.name}, which reaches {stats.amax:.4g}: rounding moves it by {error:.2g} rad",
                around.io,
            )


def _inner_sum(tensors: Tensors) -> Iterator[RangeVerdict]:
    """A sum or a sum of squares inside a reduction can leave the range although what goes in and comes out does not."""
    limit = tensors.half.overflow_from
    for node_id, node in tensors.index.nodes.items():
        bound = _INNER.get(node.op_type)
        source = node.inputs[0] if node.inputs else None
        stats = tensors.stats(source)
        if bound is None or source is None or stats is None or not stats.count:
            continue
        inner = bound(tensors, node, stats)
        if inner is not None and inner * stats.tail_factor >= limit:
            yield RangeVerdict(
                (node_id,),
                f"inside {node.op_type} a sum over {source.name} reaches about {inner:.3g}; half holds {tensors.half.max:.6g}",
            )


def _sum_of_mean(tensors: Tensors, node: ir.Node, stats: TensorStats) -> float | None:
    mean = tensors.stats(node.outputs[0])
    if mean is None or not mean.count:
        return None
    return mean.amax * stats.count / mean.count


def _sum_of_squares_of_norm(tensors: Tensors, node: ir.Node, _: TensorStats) -> float | None:
    norm = tensors.stats(node.outputs[0])
    return None if norm is None else norm.amax**2


def _largest_square(tensors: Tensors, node: ir.Node, stats: TensorStats) -> float | None:
    return stats.amax**2


_INNER: dict[str, Callable[[Tensors, ir.Node, TensorStats], float | None]] = {
    "ReduceMean": _sum_of_mean,
    "GlobalAveragePool": _sum_of_mean,
    "ReduceL2": _sum_of_squares_of_norm,
    "LayerNormalization": _largest_square,
    "InstanceNormalization": _largest_square,
    "GroupNormalization": _largest_square,
    "RMSNormalization": _largest_square,
    "ReduceSumSquare": _largest_square,
}


def _long_dot_product(tensors: Tensors) -> Iterator[RangeVerdict]:
    """Terms that cancel may build up before they do, beyond what comes out."""
    for node_id, node in tensors.index.nodes.items():
        stats = tensors.ranges.sums.get(node.outputs[0].name or "") if is_dot_product(node) else None
        if stats is not None and stats.amax * stats.tail_factor >= tensors.half.overflow_from:
            yield RangeVerdict(
                (node_id,),
                f"inside {node.op_type} sums build up to {stats.amax:.4g} (seen, x{stats.tail_factor:.2g} for the tail) "
                f"before they cancel; half holds {tensors.half.max:.6g}",
            )


RANGE_RULES: tuple[RangeRule, ...] = (
    RangeRule("overflow", "range", _overflow, "a value above the largest one held becomes infinite, and NaN after it"),
    RangeRule("underflow", "range", _underflow, "values below the smallest normal one are lost: the signal with them"),
    RangeRule("small-divisor", "range", _small_divisor, "a divisor rounded to zero gives infinity"),
    RangeRule("cancellation", "range", _cancellation, "a difference of large values is made of their rounding"),
    RangeRule("large-angle", "range", _large_angle, "sine and cosine of a coarsely rounded angle are those of another"),
    RangeRule("inner-sum", "inner", _inner_sum, "a sum inside an op overflows where the engine sums in half"),
    RangeRule("long-dot-product", "inner", _long_dot_product, "a kernel that accumulates in half overflows on the way"),
)

"""Clamp the sentinels of additive attention masks to what half can hold, where the graph proves that this changes nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mpdeploy.precision.formats import FLOAT, HalfFormat
from mpdeploy.precision.graph_index import all_graphs, constant_tensor

CLAMPED = {"fp16": -30000.0, "bf16": -1e38}
"""A little less than half of the format's range: twice of it, the widest margin for the tail, is still held, so what it is added to need
not stay FP32 (where a wholly masked row would tell it from -3.4e38); and scores of up to 35,000 do not bring FP16's to minus infinity.
"""

# Ops through which a sentinel may flow on its way to a Softmax without becoming anything but "very negative".
_MOVES = frozenset(
    [
        "Expand",
        "Unsqueeze",
        "Squeeze",
        "Reshape",
        "Transpose",
        "Slice",
        "Identity",
        "Concat",
        "Tile",
        "Gather",
        "GatherND",
        "ScatterND",
        "Trilu",
        "Flatten",
        "Where",
        "Cast",
        "CastLike",
        "Min",
        "Max",
    ]
)
_ADDS = frozenset({"Add", "Sub", "Mul"})


class ClampMasksPass(ir.passes.InPlacePass):
    """Replace finite mask constants that half cannot hold by `CLAMPED`.

    A constant is replaced when
      1. it is float32, its smallest value is finite and rounds to minus infinity in half;
      2. all its other values are 0, 1 or at least as negative as the format's range (a mask, not data);
      3. every path from it runs through ops that move, add or select values, and ends in Softmax or LogSoftmax.
    exp(-30000 - max) is zero as exp(-3.4e38 - max) is; a row that is masked as a whole stays uniform instead of becoming NaN.
    (It stays uniform where the masked scores are stored in half. An engine that adds in FP32 sees the scores through -30000 there.)
    BF16 has nearly the range of FP32: only the lowest float itself, -3.4e38, is beyond it.
    """

    def __init__(self, half: HalfFormat) -> None:
        super().__init__()
        self._half = half
        self.clamped: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the constants and list them in `clamped`."""
        for graph in all_graphs(model.graph):
            for value in list(graph.initializers.values()):
                if not value.is_graph_input():
                    self._visit(value)
            for node in list(graph):
                if node.op_type == "Constant":
                    self._visit(node.outputs[0])
        return ir.passes.PassResult(model, modified=bool(self.clamped))

    def _visit(self, value: ir.Value) -> None:
        tensor = constant_tensor(value)
        if tensor is None or tensor.dtype != FLOAT or tensor.size == 0 or not value.uses():
            return
        if tensor.size > 1 << 24:
            return
        array = tensor.numpy()
        low = float(array.min())
        if not (np.isfinite(low) and low <= -self._half.overflow_from):
            return
        masked = array <= -self._half.overflow_from
        if not np.isin(array[~masked], (0.0, 1.0)).all() or not _ends_in_softmax(value):
            return
        sentinel = CLAMPED[self._half.name]
        clamped = np.where(masked, np.float32(sentinel), array).astype(np.float32)
        self.clamped.append(f"{value.name}: {low:.3g} clamped to {sentinel:.6g} (an additive mask before Softmax)")
        replace_constant(value, ir.tensor(clamped, name=value.name))


def replace_constant(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Give an initialiser, or the output of a Constant node, other content."""
    node = value.producer()
    value.const_value = tensor if node is None else value.const_value
    if node is not None:
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", tensor)
        value.const_value = tensor


def _ends_in_softmax(value: ir.Value) -> bool:
    seen: set[ir.Value] = set()
    queue = [value]
    found = False
    while queue:
        each = queue.pop()
        if each in seen:
            continue
        seen.add(each)
        if each.is_graph_output():
            return False
        for node, position in each.uses():
            if node.domain not in ("", "ai.onnx"):
                return False
            if node.op_type in ("Softmax", "LogSoftmax"):
                found = True
            elif node.op_type == "Where" and position == 0:
                return False
            elif node.op_type == "Sub" and position != 0:
                return False  # minus a sentinel is very positive
            elif node.op_type in _MOVES or node.op_type in _ADDS:
                queue += node.outputs
            else:
                return False
    return found

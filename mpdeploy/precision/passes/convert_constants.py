"""Give half nodes their constants in half precision, one copy a precision and only where it is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from mpdeploy.precision.formats import FLOAT, HalfFormat
from mpdeploy.precision.graph_index import constant_tensor
from mpdeploy.precision.passes.assignment import Assignment


class ConvertConstantsPass(ir.passes.InPlacePass):
    """Convert initialisers and Constant nodes.

    1. A constant that only half nodes use is converted in place and keeps its name.
    2. One that both kinds use gets a second, half copy.
    3. One that no half node uses is left alone, and so is one that is a graph output.
    4. An initialiser that is a graph input too is a constant in IR version 3, which lists all of them there; from version 4 on it
       is a default that callers may override, and is treated as the input it is.
    Content is converted when it is written, tensor by tensor: nothing is held twice.
    """

    def __init__(self, assignment: Assignment) -> None:
        super().__init__()
        self._assignment = assignment
        self.num_values = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert."""
        modified = False
        for graph in self._assignment.index.graphs:
            for value in list(graph.initializers.values()):
                if self._assignment.index.is_constant(value):
                    modified |= self._convert(value, graph, None)
            for node in list(graph):
                if node.op_type == "Constant":
                    modified |= self._convert(node.outputs[0], graph, node)
        return ir.passes.PassResult(model, modified=modified)

    def _convert(self, value: ir.Value, graph: ir.Graph, node: ir.Node | None) -> bool:
        tensor = constant_tensor(value)
        if tensor is None or tensor.dtype != FLOAT:
            return False
        uses = value.uses()
        half_uses = [use for use in uses if self._assignment.wants_half(*use)]
        if not half_uses:
            return False
        half = self._assignment.half
        if len(half_uses) == len(uses) and not value.is_graph_output():
            converted = half_tensor(tensor, half, value.name)
            if node is None:
                value.const_value = converted
            else:
                _set_constant(node, converted)
            value.type = ir.TensorType(half.onnx)  # a clone shares type objects: never change one in place
            return True
        fresh = self._assignment.fresh_name
        name = fresh(f"{value.name}_{half.onnx.name.lower()}")
        if node is None:
            copy = ir.Value(
                name=name,
                shape=tensor.shape,  # type: ignore[arg-type]
                type=ir.TensorType(half.onnx),
                const_value=half_tensor(tensor, half, name),
            )
            graph.register_initializer(copy)
        else:
            twin = ir.node("Constant", [], name=fresh(f"{node.name}_{half.onnx.name.lower()}") if node.name else None)
            _set_constant(twin, half_tensor(tensor, half, name))
            copy = twin.outputs[0]
            copy.name, copy.type = name, ir.TensorType(half.onnx)
            graph.insert_after(node, twin)
        for user, position in half_uses:
            user.replace_input_with(position, copy)
        return True


def _set_constant(node: ir.Node, tensor: ir.TensorProtocol) -> None:
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", tensor)
    node.outputs[0].const_value = tensor


def half_tensor(tensor: ir.TensorProtocol, half: HalfFormat, name: str | None) -> ir.TensorProtocol:
    """The tensor in half precision, rounded to nearest even; converted when it is read. A bound that overflows saturates."""

    def rounded() -> np.ndarray[Any, Any]:
        array = np.asarray(tensor.numpy(), dtype=np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = array.astype(half.numpy)
        if array.size and max(array.max(), -array.min()) < half.overflow_from:  # not so where any value is NaN
            return narrow
        lost = np.isfinite(array) & ~np.isfinite(narrow)
        if lost.any():  # only constants the plan found harmless get here (a bound of Clip)
            narrow = np.where(lost, np.copysign(half.max, array), array).astype(half.numpy)
        return narrow

    def convert() -> ir.TensorProtocol:
        made = ir.Tensor(rounded(), dtype=half.onnx, name=name)
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()  # mapped pages count as memory until they are let go
        return made

    if tensor.nbytes <= 1024:
        return convert()
    return ir.LazyTensor(convert, dtype=half.onnx, shape=tensor.shape, name=name)  # type: ignore[arg-type]

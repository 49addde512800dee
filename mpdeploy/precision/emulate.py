"""Emulation: a mixed model becomes an FP32 model that rounds where, and as, half-precision hardware does.

ONNX Runtime's CPU provider computes FP16 nodes in FP32 and drops the casts between them, so a model that overflows in FP16 looks
fine there. It does keep an explicit Cast(FP32 -> half) -> Cast(half -> FP32) pair. So every tensor that is half in the mixed model is
FP32 here and goes through such a pair: storage in half, sums in FP32, which is what tensor cores do. Rounding is to nearest even,
with IEEE subnormals and overflow to infinity. `canary` builds the graph that proves a runtime keeps the pairs.

What ops copy, or compute exactly, is not rounded again.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from mpdeploy.precision.engine_forms import USUAL, hold_sums_in_half, take_apart
from mpdeploy.precision.flow import is_exact
from mpdeploy.precision.formats import FLOAT, HALF_TYPES
from mpdeploy.precision.graph_index import TYPE_ATTRIBUTES, GraphIndex, all_graphs, bodies, constant_tensor


def emulate(model: ir.Model, *, half_sums: bool = False, engine: str = USUAL) -> ir.Model:
    """A new FP32 model that answers as the mixed model would on half-precision hardware.

    Inputs and outputs that are half in the mixed model are FP32 here; their values are rounded to half. Ops that the engine takes
    apart are taken apart here too (see `engine_forms`).

    Args:
        model: the mixed model.
        half_sums: hold the sums inside means, norms and products in half as well: the worst an engine may do.
        engine: `tensorrt`, `tensorrt-rtx`, `openvino` or `onnxruntime`.

    Raises:
        UsageError: there is no such engine.
    """
    emulated = model.clone()
    inner = take_apart(emulated, engine).inner
    if half_sums:
        hold_sums_in_half(emulated)
    _Emulation(emulated, inner).run()
    return emulated


class _Emulation:
    def __init__(self, model: ir.Model, inner: Collection[ir.Value]) -> None:
        self.model = model
        self.inner = inner
        self.index = GraphIndex.of(model)
        self.half = {value: dtype for value, dtype in self.index.dtypes.items() if dtype in HALF_TYPES}
        self.pairs = 0

    def run(self) -> None:
        for node in self.index.nodes.values():
            self._widen_attributes(node)
        for graph in all_graphs(self.model.graph):
            for value in list(graph.initializers.values()):
                if value.const_value is not None and value.const_value.dtype in HALF_TYPES:
                    value.const_value = _widened(value.const_value)
        for value, dtype in self.half.items():
            value.type = ir.TensorType(FLOAT)
            if self._is_rounded_here(value):
                self._round(value, dtype)
        run_at_opset_21(self.model)

    def _widen_attributes(self, node: ir.Node) -> None:
        """Types named in attributes become FP32; a Cast to half becomes one to FP32, and its output is rounded like any other."""
        if node.op_type in ("Constant", "ConstantOfShape"):
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALF_TYPES:
                    tensor = _widened(attribute.as_tensor())
                    node.attributes[name] = ir.AttrTensor(name, tensor)
                    if node.op_type == "Constant":
                        node.outputs[0].const_value = tensor
        elif node.op_type in TYPE_ATTRIBUTES:
            name = TYPE_ATTRIBUTES[node.op_type][0]
            named = node.attributes.get(name)
            if named is not None and named.as_int() in (int(dtype) for dtype in HALF_TYPES):
                node.attributes[name] = ir.AttrInt64(name, int(FLOAT))

    def _is_rounded_here(self, value: ir.Value) -> bool:
        if constant_tensor(value) is not None or not value.name:  # a nameless output is one that nobody asked for
            return False
        if value in self.inner:
            return False
        node = value.producer()
        if node is None:
            return value.graph is self.model.graph  # a body's inputs were rounded where they came from
        if node.op_type in ("If", "Loop", "Scan"):
            return False
        if not is_exact(node):
            return True
        # exact ops give back what went in: round only where something wider went in
        return any(v is not None and self.index.dtypes.get(v) == FLOAT for v in node.inputs) and not any(
            v in self.half for v in node.inputs if v is not None
        )

    def _round(self, value: ir.Value, dtype: ir.DataType) -> None:
        self.pairs += 1
        uses = value.uses()
        narrow = ir.node("Cast", [value], {"to": int(dtype)}, name=f"round_{self.pairs}_narrow")
        wide = ir.node("Cast", [narrow.outputs[0]], {"to": int(FLOAT)}, name=f"round_{self.pairs}_wide")
        narrow.outputs[0].name, narrow.outputs[0].type = f"{value.name}.narrow", ir.TensorType(dtype)
        rounded = wide.outputs[0]
        rounded.name, rounded.type, rounded.shape = f"{value.name}.rounded", ir.TensorType(FLOAT), value.shape
        producer = value.producer()
        if producer is not None:
            assert producer.graph is not None
            producer.graph.insert_after(producer, (narrow, wide))
        else:
            graph = self.model.graph
            first = next(iter(graph), None)
            if first is None:
                graph.extend((narrow, wide))
            else:
                graph.insert_before(first, (narrow, wide))
        for node, position in uses:
            node.replace_input_with(position, rounded)
        self._rename_outputs(value, rounded)

    def _rename_outputs(self, value: ir.Value, rounded: ir.Value) -> None:
        """A graph output keeps its name: the rounded tensor takes it. An input that is an output too is given back as it was fed."""
        if value.is_graph_input():
            return
        graphs = [graph for graph in self._graphs_of(value) if value in graph.outputs]
        for graph in graphs:
            for position, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[position] = rounded
        if graphs:
            value.name, rounded.name = f"{value.name}.wide", value.name

    def _graphs_of(self, value: ir.Value) -> list[ir.Graph]:
        if not value.is_graph_output():
            return []
        home = value.graph
        assert home is not None
        # a body may name a tensor of an outer graph as its output
        return [home, *(body for node in self.index.nodes.values() for _, body in bodies(node) if body is not home)]


def run_at_opset_21(model: ir.Model) -> None:
    """Relabel an FP32 model of opset 22, which only widened type constraints (BF16): ONNX Runtime lacks kernels of some ops there."""
    if model.graph.opset_imports.get("") == 22:
        model.graph.opset_imports[""] = 21


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    def convert() -> ir.TensorProtocol:
        return ir.Tensor(np.asarray(tensor.numpy()).astype(np.float32), name=tensor.name)

    if tensor.nbytes <= 1024:
        return convert()
    return ir.LazyTensor(convert, dtype=FLOAT, shape=tensor.shape, name=tensor.name)  # type: ignore[arg-type]


def canary(dtype: ir.DataType) -> ir.Model:
    """A model whose answer tells whether a runtime keeps the pairs: y = round(x) * 1 per element, nothing else.

    On `CANARY_INPUT`, a runtime that rounds as FP16 (BF16) hardware does answers `canary_answer(dtype)`.
    """
    x = ir.val("x", dtype=FLOAT, shape=[len(CANARY_INPUT)])
    narrow = ir.node("Cast", [x], {"to": int(dtype)}, name="narrow")
    wide = ir.node("Cast", narrow.outputs, {"to": int(FLOAT)}, name="wide")
    y = wide.outputs[0]
    narrow.outputs[0].name, y.name, y.type, y.shape = "n", "y", ir.TensorType(FLOAT), x.shape
    graph = ir.Graph([x], [y], nodes=[narrow, wide], opset_imports={"": 20}, name="canary")
    return ir.Model(graph, ir_version=10)


CANARY_INPUT = np.array(
    # overflow, largest FP16, subnormals (one of them a tie), below half of the smallest, ties to even, an ordinary value
    [70000.0, 65504.0, 6.1e-5, 3.0e-8, 2.0e-8, 2049.0, 2051.0, 1.00048828125, 0.1, -1e-9, 3.3e38, 1e-40],
    dtype=np.float32,
)


def canary_answer(dtype: ir.DataType) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """`CANARY_INPUT` rounded by numpy (FP16) or ml_dtypes (BF16)."""
    import ml_dtypes

    with np.errstate(over="ignore"):
        narrow = CANARY_INPUT.astype(np.float16 if dtype == ir.DataType.FLOAT16 else ml_dtypes.bfloat16)
    return narrow.astype(np.float32)

"""Put a Cast wherever a float tensor passes between half and FP32: one a tensor and direction, beside its producer."""

from __future__ import annotations

import onnx_ir as ir

from mpdeploy.precision.formats import FLOAT
from mpdeploy.precision.passes.assignment import Assignment
from mpdeploy.precision.passes.convert_constants import half_tensor


class InsertCastsPass(ir.passes.InPlacePass):
    """Insert the casts of a plan.

    1. A tensor that comes out as half and is wanted as FP32 (or the reverse) gets one Cast, right after its producer, shared by
       all consumers that need it, those in bodies too.
    2. A graph output that is wanted in the other type keeps its name: the Cast makes it, and the tensor before it is renamed.
    3. A graph input that becomes half is retyped.
    Constants are not touched: they have copies (see `convert_constants`).
    """

    def __init__(self, assignment: Assignment) -> None:
        super().__init__()
        self._assignment = assignment
        self.num_casts = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert."""
        index = self._assignment.index
        modified = False
        outputs = {(graph, position): value for graph in index.graphs for position, value in enumerate(graph.outputs)}
        wanted_by_outputs: dict[ir.Value, list[tuple[ir.Graph, int]]] = {}
        for place, value in outputs.items():
            wanted_by_outputs.setdefault(value, []).append(place)
        for value, dtype in list(index.dtypes.items()):
            if dtype == FLOAT and not index.is_constant(value):
                modified |= self._visit(value, wanted_by_outputs.get(value, []))
            elif dtype == FLOAT and value in wanted_by_outputs:
                modified |= self._constant_output(value, wanted_by_outputs[value])
        return ir.passes.PassResult(model, modified=modified)

    def _visit(self, value: ir.Value, places: list[tuple[ir.Graph, int]]) -> bool:
        ask = self._assignment
        is_half = ask.gives_half(value)
        retyped = is_half and value.dtype != ask.half.onnx
        if retyped:
            value.type = ir.TensorType(ask.half.onnx)  # a clone shares type objects: never change one in place
            if value.const_value is not None and value.is_graph_input():  # an input's default follows its type
                value.const_value = half_tensor(value.const_value, ask.half, value.name)
        # nodes that the index does not know are the casts of an earlier call
        uses = [use for use in value.uses() if use[0] in ask.index.id_of and ask.wants_half(*use) != is_half]
        # a graph input that is a graph output too has no node that could be retyped: it is cast like any other
        crossing = [(graph, p) for graph, p in places if ask.graph_output_wants_half(graph, p) != is_half]
        if not uses and not crossing:
            return retyped
        cast = self._cast(value, ask.half.onnx if not is_half else FLOAT)
        for node, position in uses:
            node.replace_input_with(position, cast.outputs[0])
        by_graph: dict[ir.Graph, list[int]] = {}
        for graph, position in crossing:
            by_graph.setdefault(graph, []).append(position)
        self._replace_outputs(value, cast, by_graph)
        return True

    def _replace_outputs(self, value: ir.Value, cast: ir.Node, by_graph: dict[ir.Graph, list[int]]) -> None:
        for graph, positions in by_graph.items():
            for position in positions:
                graph.outputs[position] = cast.outputs[0]
        if by_graph and not value.is_graph_input() and not value.is_graph_output():
            name = value.name
            value.name = self._assignment.fresh_name(f"{name}_before_cast")
            cast.outputs[0].name = name

    def _constant_output(self, value: ir.Value, places: list[tuple[ir.Graph, int]]) -> bool:
        crossing = [(graph, p) for graph, p in places if self._assignment.graph_output_wants_half(graph, p)]
        if not crossing or value.dtype != FLOAT:
            return False
        cast = self._cast(value, self._assignment.half.onnx)
        for graph, position in crossing:
            graph.outputs[position] = cast.outputs[0]
        return True

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Node:
        self.num_casts += 1
        label = f"{value.name}_to_{dtype.name.lower()}"
        cast = ir.node("Cast", [value], {"to": int(dtype)}, name=self._assignment.fresh_name(f"Cast_{label}"))
        made = cast.outputs[0]
        made.name, made.type, made.shape = self._assignment.fresh_name(label), ir.TensorType(dtype), value.shape
        producer = value.producer()
        if producer is not None:
            graph = producer.graph
            assert graph is not None
            graph.insert_after(producer, cast)
        else:
            graph = value.graph
            assert graph is not None
            first = next(iter(graph), None)
            if first is None:
                graph.append(cast)
            else:
                graph.insert_before(first, cast)
        return cast

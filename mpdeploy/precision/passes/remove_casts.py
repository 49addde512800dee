"""Remove casts that do nothing."""

from __future__ import annotations

import onnx_ir as ir

from mpdeploy.precision.formats import HALF_TYPES
from mpdeploy.precision.graph_index import GraphIndex, all_graphs


class RemoveNoOpCastsPass(ir.passes.InPlacePass):
    """Remove casts that change no value.

    1. A Cast to the type its input already has.
    2. The second Cast of half -> FP32 -> the same half: widening is exact, so the pair gives back what went in.
    A pair FP32 -> half -> FP32 rounds, and stays. A Cast that makes a graph output stays (its name is the output's).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove."""
        if not any(node.op_type == "Cast" for graph in all_graphs(model.graph) for node in graph):
            return ir.passes.PassResult(model, modified=False)
        index = GraphIndex.of(model)
        removed: list[ir.Node] = []
        for node in index.nodes.values():
            if node.op_type != "Cast" or node.domain not in ("", "ai.onnx"):
                continue
            source, made = node.inputs[0], node.outputs[0]
            if source is None or made.is_graph_output():
                continue
            if index.dtypes.get(source) != index.dtypes.get(made):
                before = source.producer()
                if before is None or before.op_type != "Cast" or index.dtypes.get(made) not in HALF_TYPES:
                    continue
                origin = before.inputs[0]
                if origin is None or index.dtypes.get(origin) != index.dtypes.get(made):
                    continue
                if index.dtypes.get(source) not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
                    continue  # half -> int -> half truncates
                source = origin
            before = source.producer()
            takes_its_place = before is not None and before.op_type == "Cast" and len(source.uses()) == 1
            made.replace_all_uses_with(source)
            if before is not None and takes_its_place and source is node.inputs[0] and not source.is_graph_output():
                before.name, source.name = node.name, made.name  # the names of the file that was given survive
            removed.append(node)
        widened = {node.inputs[0].producer() for node in removed if node.inputs[0] is not None}
        for node in removed:
            assert node.graph is not None
            node.graph.remove(node, safe=True)
        for before in widened:
            if before is not None and before.op_type == "Cast" and before.graph is not None and _is_unused(before):
                before.graph.remove(before, safe=True)
        return ir.passes.PassResult(model, modified=bool(removed))


def _is_unused(node: ir.Node) -> bool:
    return not any(value.uses() or value.is_graph_output() for value in node.outputs)

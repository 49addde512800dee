"""Give every value a name of its own, and every node: statistics, casts and plans refer to them by name."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from mpdeploy.precision.graph_index import all_graphs


class NameValuesPass(ir.passes.InPlacePass):
    """Name unnamed values, and rename in bodies what hides a name of an outer graph.

    1. A value without a name that is used gets one. (An unused optional output keeps its empty name: it means "not asked for".)
    2. Values of different bodies may share a name (both branches of an If do); ids by name would confuse them, so the later ones
       are renamed. Graph inputs and outputs of the main graph, and its tensors, keep their names.
    3. A node whose name another node has gets a number behind it (ONNX Runtime refuses a graph with two nodes of one name);
       the first keeps its name, and unnamed nodes stay unnamed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Name."""
        graphs = list(all_graphs(model.graph))
        modified = _number_duplicates(graphs)
        taken: dict[str, ir.Value] = {}
        counter = 0
        for graph in graphs:
            values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
            for value in dict.fromkeys(values):
                if not value.name:
                    if value.uses() or value.is_graph_output():
                        while f"unnamed_{counter}" in taken:
                            counter += 1
                        value.name = f"unnamed_{counter}"
                        modified = True
                    else:
                        continue
                assert value.name is not None
                if taken.get(value.name, value) is not value:
                    base, count = value.name, 2
                    while f"{base}#{count}" in taken:
                        count += 1
                    _rename(graph, value, f"{base}#{count}")
                    modified = True
                taken[value.name] = value
        return ir.passes.PassResult(model, modified=modified)


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if value.is_initializer():
        graph.initializers.pop(value.name or "")
        value.name = name
        graph.register_initializer(value)
    else:
        value.name = name


def _number_duplicates(graphs: Sequence[ir.Graph]) -> bool:
    named = [node.name for graph in graphs for node in graph if node.name]
    names = set(named)
    if len(names) == len(named):
        return False
    seen: set[str] = set()
    modified = False
    for graph in graphs:
        for node in graph:
            if not node.name:
                continue
            if node.name in seen:
                base, count = node.name, 2
                while f"{base}#{count}" in names:
                    count += 1
                node.name = f"{base}#{count}"
                names.add(node.name)
                modified = True
            seen.add(node.name)
    return modified

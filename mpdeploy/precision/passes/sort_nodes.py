"""Put nodes into execution order: some exporters do not."""

from __future__ import annotations

import onnx_ir as ir

from mpdeploy.errors import ModelError
from mpdeploy.precision.graph_index import all_graphs, may_hold_bodies


def sort_nodes(model: ir.Model) -> None:
    """Put every graph's nodes into execution order (some exporters do not).

    Raises:
        ModelError: a cycle.
    """
    for graph in all_graphs(model.graph):
        if _is_sorted(graph):
            continue
        try:
            graph.sort()
        except ValueError as error:
            raise ModelError(
                f"The graph '{graph.name}' has a cycle: {error}.", hint="onnx.checker.check_model names the nodes"
            ) from error


def _is_sorted(graph: ir.Graph) -> bool:
    """Whether every value is made before it is used; not said of a graph whose nodes have bodies, which use values too."""
    made: set[ir.Node] = set()
    for node in graph:
        if may_hold_bodies(node):
            return False
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in made and producer.graph is graph:
                return False
        made.add(node)
    return True

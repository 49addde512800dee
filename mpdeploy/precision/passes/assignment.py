"""What the passes after the plan share: who wants half and who gives it."""

from __future__ import annotations

from functools import cached_property

import onnx_ir as ir

from mpdeploy.precision.flow import border_key, half_ports
from mpdeploy.precision.graph_index import CONTROL_FLOW, GraphIndex
from mpdeploy.precision.plan import PrecisionPlan


class Assignment:
    """The plan, asked by node and position. It describes the model as it was indexed; passes change the model only."""

    def __init__(self, index: GraphIndex, plan: PrecisionPlan) -> None:
        self.index = index
        self.plan = plan
        self.half = plan.half

    @cached_property
    def half_nodes(self) -> dict[ir.Node, tuple[frozenset[int], frozenset[int]]]:
        """Half nodes -> positions of the inputs and outputs that are half there."""
        return {
            node: half_ports(self.index, node, self.half)
            for node_id, node in self.index.nodes.items()
            if node_id in self.plan.half_keys
        }

    @cached_property
    def _taken(self) -> set[str | None]:
        taken: set[str | None] = set()
        for graph in self.index.graphs:
            taken.update(value.name for value in graph.inputs)
            taken.update(graph.initializers)
            for node in graph:
                taken.add(node.name)
                taken.update(value.name for value in node.outputs)
        return taken

    def fresh_name(self, base: str) -> str:
        """`base`, or `base#2` and so on where a node or tensor of the model has that name; it is taken from then on."""
        name, count = base, 2
        while name in self._taken:
            name, count = f"{base}#{count}", count + 1
        self._taken.add(name)
        return name

    def wants_half(self, node: ir.Node, position: int) -> bool:
        """Whether a node takes an input, float in the FP32 model, as half."""
        ports = self.half_nodes.get(node)
        return ports is not None and position in ports[0]

    def gives_half(self, value: ir.Value) -> bool:
        """Whether a computed tensor or graph input, float in the FP32 model, comes out as half."""
        node = value.producer()
        if node is None:
            return f"input:{value.name}" in self.plan.half_keys and value.graph is self.index.model.graph
        if node.op_type in CONTROL_FLOW:
            return border_key(self.index.id_of[node], value.index() or 0) in self.plan.half_keys
        ports = self.half_nodes.get(node)
        return ports is not None and (value.index() or 0) in ports[1]

    def graph_output_wants_half(self, graph: ir.Graph, position: int) -> bool:
        """Whether a graph's output is to be half: for the main graph by the plan, for a body by its owner's border."""
        owner = self.index.owner.get(graph)
        if owner is None:
            return f"output:{graph.outputs[position].name}" in self.plan.half_keys
        return owner.op_type == "If" and border_key(self.index.id_of[owner], position) in self.plan.half_keys

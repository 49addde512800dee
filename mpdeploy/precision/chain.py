"""Nodes that take the place of one, or come after it."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

Attributes = Mapping[str, ir.Attr]


class Chain:
    """New nodes around one, each with one output, which is named after what that one makes; its type follows from what goes in."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.nodes: list[ir.Node] = []

    def add(self, op: str, inputs: list[ir.Value | None], attributes: Attributes | None = None) -> ir.Value:
        """Append a node and return its output."""
        stem = f"{self.node.outputs[0].name}.{len(self.nodes)}"
        made = ir.node(op, inputs, dict(attributes or {}), name=f"{stem}.{op}")
        made.outputs[0].name = stem
        self.nodes.append(made)
        return made.outputs[0]

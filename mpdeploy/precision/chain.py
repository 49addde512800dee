"""Nodes that take the place of one, or come after it."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

Attributes = Mapping[str, ir.Attr]


class Chain:
    """New nodes around one, each with one output, which is named after what that one makes; its type follows from what goes in."""

    def __init__(self, node: ir.Node, opset: int = 0) -> None:
        self.node = node
        self.opset = opset
        self.nodes: list[ir.Node] = []

    def add(self, op: str, inputs: list[ir.Value | None], attributes: Attributes | None = None) -> ir.Value:
        """Append a node and return its output."""
        stem = f"{self.node.outputs[0].name}.{len(self.nodes)}"
        made = ir.node(op, inputs, dict(attributes or {}), name=f"{stem}.{op}")
        made.outputs[0].name = stem
        self.nodes.append(made)
        return made.outputs[0]

    def reduce(self, op: str, value: ir.Value, axis: int) -> ir.Value:
        """Append a reduction over one axis, which stays with size 1, in the form of the opset."""
        kept = {"keepdims": ir.AttrInt64("keepdims", 1)}
        if self.opset < 18:
            return self.add(op, [value], {**kept, "axes": ir.AttrInt64s("axes", [axis])})
        return self.add(
            op, [value, self.add("Constant", [], {"value_ints": ir.AttrInt64s("value_ints", [axis])})], kept
        )

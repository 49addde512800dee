"""Give half nodes whose output type is an attribute (Cast, ConstantOfShape, ...) the half type there."""

from __future__ import annotations

import onnx_ir as ir

from mpdeploy.precision.graph_index import TYPE_ATTRIBUTES
from mpdeploy.precision.passes.assignment import Assignment


class RetypeAttributesPass(ir.passes.InPlacePass):
    """Change the type attribute of half nodes.

    1. An op of `TYPE_ATTRIBUTES` whose output becomes half gets the half type in its attribute.
    2. ConstantOfShape gets its fill value in half.
    An output that is not float32 in the FP32 model is left alone.
    """

    def __init__(self, assignment: Assignment) -> None:
        super().__init__()
        self._assignment = assignment

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Retype."""
        modified = False
        half = self._assignment.half
        for node, (_, outputs) in self._assignment.half_nodes.items():
            if not outputs:
                continue
            if node.op_type == "ConstantOfShape":
                before = node.attributes.get("value")
                if before is not None and before.as_tensor().dtype == half.onnx:
                    continue
                fill = 0.0 if before is None else float(before.as_tensor().numpy().reshape(-1)[0])
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor([fill], dtype=half.onnx))
            elif node.op_type in TYPE_ATTRIBUTES and self._has_own_type(node):
                name = TYPE_ATTRIBUTES[node.op_type][0]
                if node.attributes.get_int(name, 0) == int(half.onnx):
                    continue
                node.attributes[name] = ir.AttrInt64(name, int(half.onnx))
            else:
                continue
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    def _has_own_type(self, node: ir.Node) -> bool:
        """EyeLike and the like take their input's type where the attribute is absent."""
        name, default = TYPE_ATTRIBUTES[node.op_type]
        return name in node.attributes or default is not None or not self._assignment.half_nodes[node][0]

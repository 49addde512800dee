"""Write down, for every tensor, the type it really has: value_info that went stale makes runtimes refuse a file."""

from __future__ import annotations

import onnx_ir as ir

from mpdeploy.precision.graph_index import GraphIndex


class DeclareTypesPass(ir.passes.InPlacePass):
    """Set each value's declared type.

    1. The type is inferred anew from schemas, attributes and bodies.
    2. A declared type that differs is replaced; the shape is kept.
    3. A value that holds a sequence or an optional, or comes out of an unknown op, is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Declare."""
        return ir.passes.PassResult(model, modified=declare_types(GraphIndex.of(model)))


def declare_types(index: GraphIndex) -> bool:
    """The pass's work, on a model that is indexed already; returns whether a type changed."""
    modified = False
    for value, dtype in index.dtypes.items():
        if not isinstance(value.type, ir.TensorType) or value.type.dtype != dtype:
            value.type = ir.TensorType(dtype)
            modified = True
    return modified

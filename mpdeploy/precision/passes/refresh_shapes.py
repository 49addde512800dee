"""Replace shapes that a file declares for its inner tensors by those that ONNX infers: declared ones may be stale or missing."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from mpdeploy.precision.graph_index import all_graphs
from mpdeploy.precision.schema import signature


class RefreshShapesPass(ir.passes.InPlacePass):
    """Forget the declared shapes of inner tensors, then infer.

    1. Shapes of outputs of ops that ONNX knows are forgotten; those of unknown ops cannot be inferred and stay.
    2. ONNX's shape inference fills in what it can. Where it fails as a whole, the shapes stay unknown.
    Graph inputs and outputs are the model's contract and are never touched.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Refresh."""
        outputs = set(model.graph.outputs)
        declared = {value: value.shape for value in outputs}
        for graph in all_graphs(model.graph):
            for node in graph:
                domain = "" if node.domain == "ai.onnx" else node.domain
                if signature(domain, node.op_type, model.graph.opset_imports.get(node.domain, 1)) is None:
                    continue
                for value in node.outputs:
                    if value not in outputs:
                        value.shape = None
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
        for value, shape in declared.items():
            value.shape = shape
        return ir.passes.PassResult(model, modified=True)

"""Replace shapes that a file declares for its inner tensors by those that ONNX infers: declared ones may be stale or missing."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from mpdeploy.precision.graph_index import all_graphs, bodies
from mpdeploy.precision.schema import signature

SMALL_BYTES = 1024
"""Constants up to this size may be shapes or axes that inference needs."""


class RefreshShapesPass(ir.passes.InPlacePass):
    """Forget the declared shapes of inner tensors, then infer.

    1. Shapes of outputs of ops that ONNX knows are forgotten; those of unknown ops cannot be inferred and stay.
    2. ONNX's shape inference fills in what it can. Where it fails as a whole, the shapes stay unknown.
    Graph inputs and outputs are the model's contract and are never touched.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Refresh."""
        outputs = set(model.graph.outputs)
        before: dict[ir.Value, ir.Shape | None] = {}
        for graph in all_graphs(model.graph):
            for node in graph:
                domain = "" if node.domain == "ai.onnx" else node.domain
                known = signature(domain, node.op_type, model.graph.opset_imports.get(node.domain, 1)) is not None
                for value in node.outputs:
                    before[value] = value.shape
                    if known and value not in outputs:
                        value.shape = None
        inferred = _inferred(model)
        if inferred is not None:
            _take(model.graph, inferred.graph, outputs, before, {})
        return ir.passes.PassResult(model, modified=any(value.shape is not shape for value, shape in before.items()))


Axes = list[int | str | None]


def _take(
    graph: ir.Graph,
    inferred: onnx.GraphProto,
    outputs: set[ir.Value],
    before: dict[ir.Value, ir.Shape | None],
    read: dict[bytes, Axes],
) -> None:
    """Take over what was inferred, body by body: nodes stand in the same order in both. `read` holds the shapes read so far."""
    found = {info.name: info.type for info in (*inferred.value_info, *inferred.output)}
    for node, proto in zip(graph, inferred.node, strict=True):
        for value in node.outputs:
            match = found.get(value.name or "")
            if match is None or value in outputs:
                continue
            if match.HasField("tensor_type"):
                value.shape = (
                    _shape(match.tensor_type, before[value], read) if match.tensor_type.HasField("shape") else None
                )
                if value.type is None and match.tensor_type.elem_type:
                    value.type = ir.TensorType(ir.DataType(match.tensor_type.elem_type))
            else:
                value.shape = None
                value.type = ir.serde.deserialize_type_proto_for_type(match)
        inner = bodies(node)
        if inner:
            protos = [item.g for item in proto.attribute if item.type == onnx.AttributeProto.GRAPH]
            for (_, body), body_proto in zip(inner, protos, strict=False):
                _take(body, body_proto, outputs, before, read)


def _shape(tensor: onnx.TypeProto.Tensor, before: ir.Shape | None, read: dict[bytes, Axes]) -> ir.Shape:
    """The inferred shape; the declared one itself where that was right."""
    key = tensor.shape.SerializeToString()
    axes = read.get(key)
    if axes is None:
        axes = read[key] = [
            axis.dim_value if axis.HasField("dim_value") else (axis.dim_param or None) for axis in tensor.shape.dim
        ]
    if before is not None and axes == [axis if isinstance(axis, int) else axis.value for axis in before]:
        return before
    return ir.Shape(axes)


def _inferred(model: ir.Model) -> onnx.ModelProto | None:
    """The model as ONNX's inference sees it; None where inference fails as a whole."""
    try:
        return onnx.shape_inference.infer_shapes(_outline(model), check_type=False, strict_mode=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return None  # shapes only weigh casts against gains: without them every tensor weighs the same


def _outline(model: ir.Model) -> onnx.ModelProto:
    """What inference needs: nodes, inputs, outputs, and the constants that may be shapes.

    Weights of more than a shape's size stand as inputs of their type and shape (they may not fit protobuf); declared types and
    shapes of inner tensors are left out.
    """
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.graph.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    graph = proto.graph
    graph.name = model.graph.name or "graph"
    for value in model.graph.inputs:
        ir.serde.serialize_value_into(graph.input.add(), value)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.nbytes <= SMALL_BYTES:
            ir.serde.serialize_tensor_into(graph.initializer.add(), tensor)
            graph.initializer[-1].name = name
        elif not value.is_graph_input():
            dims = [axis if isinstance(axis, int) else None for axis in tensor.shape]
            graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), dims))
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or bodies(node):
            ir.serde.serialize_node_into(graph.node.add(), node)
            continue
        made = graph.node.add(op_type=node.op_type, domain=node.domain)
        made.input.extend("" if value is None else value.name or "" for value in node.inputs)
        made.output.extend(value.name or "" for value in node.outputs)
        for attribute in node.attributes.values():
            ir.serde.serialize_attribute_into(made.attribute.add(), attribute)
    for value in model.graph.outputs:
        ir.serde.serialize_value_into(graph.output.add(), value)
    return proto

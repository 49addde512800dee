"""Proof before a file is written: every op's ports agree in type, and ONNX's own checker accepts the file."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from mpdeploy.errors import ConversionError
from mpdeploy.precision.graph_index import GraphIndex, Kind, constant_tensor


def check_strict_types(index: GraphIndex) -> None:
    """Prove that ports which share a type variable hold one type, that the schema admits it, and that outputs are as declared.

    Raises:
        ConversionError: naming the node, its ports and their types.
    """
    proven: set[Kind] = set()
    for node_id, node in index.nodes.items():
        form = index.signature(node)
        if form is None or form.heterogeneous or index.kind(node) in proven:
            continue
        bound: dict[str, tuple[str, ir.DataType]] = {}
        ports = [("input", i, v, form.input_type(i)) for i, v in enumerate(node.inputs)]
        ports += [("output", i, v, form.output_type(i)) for i, v in enumerate(node.outputs)]
        for side, position, value, wanted in ports:
            if value is None or wanted is None or value not in index.dtypes:
                continue
            dtype = index.dtypes[value]
            label = f"{side} {position} ({value.name}: {dtype.name})"
            if dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16) and not form.admits(
                wanted, dtype
            ):
                raise ConversionError(
                    f"{node.op_type} '{node_id}' does not admit {label} at opset {form.since_version}.", hint=_REPORT
                )
            if wanted in form.admitted:
                before = bound.setdefault(wanted, (label, dtype))
                if before[1] != dtype:
                    raise ConversionError(
                        f"{node.op_type} '{node_id}' mixes types: {before[0]} and {label} must be the same.",
                        hint=_REPORT,
                    )
        proven.add(index.kind(node))


_REPORT = "this is a fault of the rewriter: please report it with the model; `--keep` the node to go on"


def check_file(path: Path) -> None:
    """Run ONNX's full checker (types and shapes too) on a written file.

    Raises:
        ConversionError: what it says.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError) as error:
        raise ConversionError(f"The rewritten model is not valid ONNX: {error}", hint=_REPORT) from error


def one_of_each_kind(index: GraphIndex) -> ir.Model | None:
    """A model that holds one node of each kind: op, types that go in and come out, attributes that name types.

    A runtime that loads it has a kernel for every node of the whole model. ONNX Runtime's start-up grows with the square of the
    number of nodes, so large graphs are tried this way. None where the model has bodies or functions: those are tried whole.
    """
    if index.owner or index.model.functions:
        return None
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(index.model.graph.opset_imports), name="one_of_each_kind")
    seen: set[tuple[object, ...]] = set()
    for node in index.nodes.values():
        types = tuple(index.dtypes.get(v) if v is not None else None for v in (*node.inputs, *node.outputs))
        named = tuple((name, a.value) for name, a in node.attributes.items() if a.type == ir.AttributeType.INT)
        kind = (node.domain, node.op_type, types, named)
        if kind in seen or node.op_type == "Constant":
            continue
        seen.add(kind)
        twin_inputs = [
            None if v is None else _twin(index, graph, v, f"k{len(seen)}_{i}") for i, v in enumerate(node.inputs)
        ]
        twin = ir.node(
            node.op_type,
            twin_inputs,
            dict(node.attributes),
            domain=node.domain,
            num_outputs=len(node.outputs),
            name=f"k{len(seen)}",
        )
        for number, (value, made) in enumerate(zip(node.outputs, twin.outputs, strict=True)):
            made.name = f"k{len(seen)}_out{number}" if value.name else ""
            if value.name:
                made.type = value.type
                graph.outputs.append(made)
        graph.append(twin)
    return ir.Model(graph, ir_version=index.model.ir_version)


def _twin(index: GraphIndex, graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    tensor = constant_tensor(value)
    made = ir.Value(name=name, type=value.type, shape=value.shape)
    if tensor is not None:
        made.const_value = tensor
        made.type, made.shape = ir.TensorType(tensor.dtype), tensor.shape  # type: ignore[assignment]
        graph.register_initializer(made)
    else:
        graph.inputs.append(made)
    return made

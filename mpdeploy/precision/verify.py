"""Proof before a file is written: every op's ports agree in type, and ONNX's own checker accepts the file."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from mpdeploy.errors import ConversionError
from mpdeploy.precision.graph_index import GraphIndex


def check_strict_types(model: ir.Model) -> None:
    """Prove that ports which share a type variable hold one type, that the schema admits it, and that outputs are as declared.

    Raises:
        ConversionError: naming the node, its ports and their types.
    """
    index = GraphIndex.of(model)
    for node_id, node in index.nodes.items():
        form = index.signature(node)
        if form is None or form.heterogeneous:
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

"""Small graphs for the TensorRT tests, written as ONNX text: a value in `<...>` becomes a random weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import helper, numpy_helper

from mpdeploy.artifact import OnnxModel, TensorSpec
from mpdeploy.engines.base import ShapeRange

MLP = """
<ir_version: 10, opset_import: ["" : 20]>
mlp (float[batch, 8] x) => (float[batch, 4] y) <float[8, 16] w0, float[16, 4] w1> {
  [first] h = MatMul(x, w0)
  [act] r = Relu(h)
  [second] y = MatMul(r, w1)
}"""

# FP16 with FP32 inputs and outputs, and a softmax that is kept in FP32: what `convert` makes.
MIXED = """
<ir_version: 10, opset_import: ["" : 20]>
mixed (float[batch, 8] x) => (float[batch, 4] y) <float16[8, 16] w0, float16[16, 4] w1, float16[4] b1> {
  [to_half] xh = Cast <to = 10> (x)
  [first] h = MatMul(xh, w0)
  [act] r = Relu(h)
  [second] g = Gemm(r, w1, b1)
  [to_full] gf = Cast <to = 1> (g)
  [kept] y = Softmax(gf)
}"""

MISTYPED = """
<ir_version: 10, opset_import: ["" : 20]>
mistyped (float[batch, 8] x) => (float[batch, 8] y) {
  [to_half] h = Cast <to = 10> (x)
  [mix] z = Add(h, x)
  [act] y = Relu(z)
}"""

UNKNOWN_OPERATOR = """
<ir_version: 10, opset_import: ["" : 20]>
unknown (float[batch, 8] x) => (float[batch, 8] y) {
  [strange] y = NoSuchOperator(x)
}"""

SHAPE_INPUT = """
<ir_version: 10, opset_import: ["" : 20]>
reshape (float[batch, 8] x, int64[2] shape) => (float[n, m] y) {
  [resize] y = Reshape(x, shape)
}"""

DOUBLE = """
<ir_version: 10, opset_import: ["" : 20]>
double (double[batch, 8] x, int64[batch, 8] k) => (double[batch, 8] y, int64[batch, 8] q) {
  [twice] y = Add(x, x)
  [more] q = Add(k, k)
}"""

DATA_DEPENDENT = """
<ir_version: 10, opset_import: ["" : 20]>
positive (float[batch, 8] x) => (int64[rank, found] where) {
  [find] where = NonZero(x)
}"""

PROFILE = {"x": ShapeRange((1, 8), (4, 8), (16, 8))}


def onnx_model(text: str, path: Path, *, precision: str = "fp32", seed: int = 0, external: bool = False) -> OnnxModel:
    """Write the graph to `path` and describe it as the earlier stages do."""
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(seed)
    for info in list(proto.graph.value_info):
        kind = info.type.tensor_type
        shape = [axis.dim_value for axis in kind.shape.dim]
        weight = random.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
        proto.graph.initializer.append(numpy_helper.from_array(weight, info.name))
        proto.graph.value_info.remove(info)
    onnx.save(proto, path, save_as_external_data=external, size_threshold=0)
    return OnnxModel.of(
        path,
        inputs=[_spec(value) for value in proto.graph.input],
        outputs=[_spec(value) for value in proto.graph.output],
        sidecar={"precision": precision},
    )


def weights(model: OnnxModel) -> dict[str, np.ndarray]:
    """The model's weights by name."""
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(model.path).graph.initializer}


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return TensorSpec(value.name, str(dtype), tuple(axis.dim_param or axis.dim_value for axis in kind.shape.dim))

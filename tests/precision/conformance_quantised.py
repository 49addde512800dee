"""Models that hold quantised parts: QuantizeLinear, DequantizeLinear, integer arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .conformance_base import FLOAT16, case, floats, graph_model, normal, weight

X = normal(3, 8, seed="x")
W = weight(8, 8)
S = np.array(0.03125, np.float32)
Z = np.array(0, np.int8)
W8 = np.clip(np.round(W / 0.01), -127, 127).astype(np.int8)
ROWS = np.full(8, 0.01, np.float32) * np.arange(1, 9, dtype=np.float32) / 4
CONV8 = np.clip(np.round(normal(4, 2, 3, 3, scale=0.3) / 0.01), -127, 127).astype(np.int8)

_ACTIVATIONS = """g (float[N, 8] x) => (float[N, 8] y) {
  q = QuantizeLinear(x, s, z)
  d = DequantizeLinear(q, s, z)
  h = MatMul(d, w)
  r = Relu(h)
  q2 = QuantizeLinear(r, s, z)
  y = DequantizeLinear(q2, s, z)
}"""

_WEIGHTS = """g (float[N, 8] x) => (float[N, 8] y) {
  k = DequantizeLinear(w8, s)
  h = MatMul(x, k)
  y = Tanh(h)
}"""

_PER_CHANNEL = """g (float[N, 2, 6, 6] x) => (float[N, 4, 4, 4] y) {
  k = DequantizeLinear<axis = 0>(w8, s, z)
  h = Conv<kernel_shape = [3, 3]>(x, k)
  y = Relu(h)
}"""

_SHARED_SCALE = """g (float[N, 8] x) => (float[N, 8] y) {
  q = QuantizeLinear(x, s, z)
  d = DequantizeLinear(q, s, z)
  h = MatMul(d, w)
  y = Mul(h, s)
}"""

_TINY_SCALE = """g (float[N, 8] x) => (float[N, 8] y) {
  k = DequantizeLinear(w8, s)
  h = MatMul(x, k)
  y = Mul(h, back)
}"""

_DYNAMIC = """g (float[N, 8] x) => (float[N, 8] y) {
  q, s, z = DynamicQuantizeLinear(x)
  i = MatMulInteger(q, w8, z, wz)
  f = Cast<to = 1>(i)
  t = Mul(s, ws)
  h = Mul(f, t)
  y = Relu(h)
}"""

_INTEGER_ONLY = """g (float[N, 8] x) => (float[N, 8] y) {
  q = QuantizeLinear(x, s, z)
  p = QLinearMatMul(q, s, z, w8, s, z, so, z)
  d = DequantizeLinear(p, so, z)
  y = MatMul(d, w)
}"""

_COMPUTED_SCALE = """g (float[N, 8] x) => (float[N, 8] y) {
  a = Abs(x)
  m = ReduceMax<keepdims = 0>(a)
  s = Div(m, top)
  q = QuantizeLinear(x, s, z)
  d = DequantizeLinear(q, s, z)
  y = MatMul(d, w)
}"""


def _blocked() -> onnx.ModelProto:
    """Opset 21: one scale for each block of four rows."""
    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "s"], ["k"], axis=0, block_size=4),
        helper.make_node("MatMul", ["x", "k"], ["y"]),
    ]
    weights = {"w8": W8, "s": np.abs(normal(2, 8, scale=0.002, shift=0.01))}
    return graph_model(nodes, [floats("x", "N", 8)], [floats("y", "N", 8)], weights, opset=21)


def _int4() -> onnx.ModelProto:
    nodes = [
        helper.make_node("DequantizeLinear", ["w4", "s"], ["k"], axis=1),
        helper.make_node("MatMul", ["x", "k"], ["y"]),
    ]
    model = graph_model(nodes, [floats("x", "N", 8)], [floats("y", "N", 8)], {"s": ROWS * 10}, opset=21)
    values = np.clip(np.round(W * 8), -8, 7).astype(int)
    model.graph.initializer.append(helper.make_tensor("w4", onnx.TensorProto.INT4, [8, 8], values.flatten()))
    return model


def _half_scale() -> onnx.ModelProto:
    """Opset 19: the scale is half already, and decides the output's type."""
    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "s"], ["k16"]),
        helper.make_node("Cast", ["k16"], ["k"], to=onnx.TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "k"], ["y"]),
    ]
    model = graph_model(nodes, [floats("x", "N", 8)], [floats("y", "N", 8)], {"w8": W8}, opset=19)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.01, np.float16), "s"))
    assert model.graph.initializer[-1].data_type == FLOAT16
    return model


_QDQ = {"w": W, "s": S, "z": Z}

_FUSED = (
    "ORT's optimiser makes a MatMulNBits of this, which moves the FP32 answer itself by 4e-3: switch it off to compare"
)

CASES = [
    case("qdq/activations", _ACTIVATIONS, {"x": X}, weights=_QDQ),
    case("qdq/activations_opset_13", _ACTIVATIONS, {"x": X}, opset=13, weights=_QDQ),
    case("qdq/activations_opset_10", _ACTIVATIONS, {"x": X}, opset=10, weights=_QDQ),
    case("qdq/activations_opset_21", _ACTIVATIONS, {"x": X}, opset=21, weights=_QDQ),
    case("qdq/activations_opset_23", _ACTIVATIONS, {"x": X}, opset=23, weights=_QDQ),
    case(
        "qdq/weights_without_zero_point",
        _WEIGHTS,
        {"x": X},
        weights={"w8": W8, "s": np.array(0.01, np.float32)},
        notes=_FUSED,
    ),
    case(
        "qdq/weights_per_channel_conv",
        _PER_CHANNEL,
        {"x": normal(2, 2, 6, 6)},
        weights={"w8": CONV8, "s": np.full(4, 0.01, np.float32), "z": np.zeros(4, np.int8)},
    ),
    case(
        "qdq/scale_shared_with_mul",
        _SHARED_SCALE,
        {"x": X},
        weights=_QDQ,
        notes="the scale stays float32 for QuantizeLinear while Mul is half",
    ),
    case(
        "qdq/scale_below_half_range",
        _TINY_SCALE,
        {"x": X},
        weights={"w8": W8, "s": np.array(1e-9, np.float32), "back": np.array(1e7, np.float32)},
        hostile=True,
        notes="a scale of 1e-9 is zero in half",
    ),
    case(
        "qdq/dynamic",
        _DYNAMIC,
        {"x": np.abs(X)},
        weights={"w8": np.abs(np.clip(W8, -31, 31)) * np.int8(4), "wz": Z, "ws": np.array(0.01, np.float32)},
        notes="DynamicQuantizeLinear takes and gives float32 only; the int32 sums pass 65504 before they are scaled",
        hostile=True,
    ),
    case("qdq/integer_only", _INTEGER_ONLY, {"x": X}, weights={**_QDQ, "w8": W8, "so": np.array(0.5, np.float32)}),
    case("qdq/computed_scale", _COMPUTED_SCALE, {"x": X}, weights={"z": Z, "w": W, "top": np.array(127.0, np.float32)}),
    case("qdq/blocked_opset_21", _blocked, {"x": X}),
    case("qdq/int4_opset_21", _int4, {"x": X}, notes=_FUSED),
    case("qdq/half_scale_opset_19", _half_scale, {"x": X}),
]

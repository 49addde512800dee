"""Element types: casts, constants, operators with a dtype of their own, islands of other types."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .conformance_base import Case, case, floats, graph_model, normal, weight

X = normal(3, 8, seed="x")
W = weight(8, 8)
B = normal(8, seed="b", scale=0.1)
W16 = W.astype(np.float16)
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]] * 3)
ZERO = np.array(0.0, np.float32)


def _x_to_y(name: str, body: str, weights: dict[str, np.ndarray] | None = None, **more: object) -> Case:
    """A case with one float input [N, 8] and one float output [N, 8]."""
    text = f"g (float[N, 8] x) => (float[N, 8] y) {{ {body} }}"
    return case(name, text, {"x": X}, weights=weights, **more)


_SHAPE_CAST = """
  h = MatMul(x, w)  s = Shape(x)  last = Constant<value_int = 1>()  n = Gather<axis = 0>(s, last)
  f = Cast<to = 1>(n)  root = Sqrt(f)  y = Div(h, root)"""

INT_TO_FLOAT = [
    case(
        "int_to_float_cast/ids",
        "g (int64[N, 8] i) => (float[N, 8] y) { f = Cast<to = 1>(i)  s = Mul(f, k)  y = MatMul(s, w) }",
        {"i": IDS},
        weights={"k": np.array(0.125, np.float32), "w": W},
    ),
    case(
        "int_to_float_cast/additive_mask",
        """g (float[N, 8] x, int64[N, 8] m) => (float[N, 8] y) {
          f = Cast<to = 1>(m)  inverse = Sub(one, f)  mask = Mul(inverse, low)  h = MatMul(x, w)  s = Add(h, mask)
          y = Softmax(s) }""",
        {"x": X, "m": np.array([[1] * 8, [1] * 5 + [0] * 3, [1] + [0] * 7])},
        weights={"one": np.array(1.0, np.float32), "low": np.array(-1e4, np.float32), "w": W},
    ),
    case(
        "int_to_float_cast/bool",
        "g (float[N, 8] x, bool[N, 8] m) => (float[N, 8] y) { f = Cast<to = 1>(m)  h = MatMul(x, w)  y = Mul(h, f) }",
        {"x": X, "m": X[::-1] > 0},
        weights={"w": W},
    ),
    _x_to_y("int_to_float_cast/shape", _SHAPE_CAST, {"w": W}),
    case(
        "int_to_float_cast/large_ids",
        "g (int64[N] i) => (float[N] y, float[N, 8] z) { f = Cast<to = 1>(i)  y = Mul(f, k)  z = Gather(t, i) }",
        {"i": np.array([70001, 65537, 99999, 12])},
        weights={"k": np.array(1e-5, np.float32), "t": normal(100_000, 8)},
        hostile=True,
        notes="integers above 65504 become inf, and above 2048 are no longer exact",
    ),
    case(
        "int_to_float_cast/straight_to_output",
        "g (int64[N, 8] i, float[N, 8] x) => (float[N, 8] f, float[N, 8] y) { f = Cast<to = 1>(i)  y = MatMul(x, w) }",
        {"i": IDS, "x": X},
        weights={"w": W},
    ),
]

CAST_CHAINS = [
    _x_to_y("cast_chain/double", "h = MatMul(x, w) d = Cast<to = 11>(h) f = Cast<to = 1>(d) y = Relu(f)", {"w": W}),
    _x_to_y("cast_chain/half_and_back", "h = MatMul(x, w) d = Cast<to = 10>(h) y = Cast<to = 1>(d)", {"w": W}),
    _x_to_y(
        "cast_chain/half_double_half",
        "a = Cast<to = 10>(x) b = Cast<to = 11>(a) c = Cast<to = 10>(b) d = Cast<to = 1>(c) y = MatMul(d, w)",
        {"w": W},
    ),
    _x_to_y(
        "cast_chain/truncation",
        "h = MatMul(x, w) s = Mul(h, k) i = Cast<to = 7>(s) f = Cast<to = 1>(i) y = Add(f, x)",
        {"w": W, "k": np.array(2.0, np.float32)},
        notes="float -> int64 -> float is not a no-op",
    ),
    _x_to_y("cast_chain/to_float_of_float", "h = Cast<to = 1>(x) g = MatMul(h, w) y = Cast<to = 1>(g)", {"w": W}),
    _x_to_y("cast_chain/bool", "h = MatMul(x, w) r = Relu(h) b = Cast<to = 9>(r) y = Cast<to = 1>(b)", {"w": W}),
    _x_to_y(
        "cast_chain/string",
        "h = MatMul(x, w) r = Round(h) b = Cast<to = 8>(r) f = Cast<to = 1>(b) y = Add(f, x)",
        {"w": W},
        notes="the text of a float16 is another text",
    ),
    case(
        "cast_chain/only_casts",
        "g (int64[N, 8] i) => (float[N, 8] y) { d = Cast<to = 11>(i)  y = Cast<to = 1>(d) }",
        {"i": IDS},
        convertible=False,
    ),
]

ALREADY_HALF = [
    _x_to_y("partly_half/island", "a = Cast<to = 10>(x) h = MatMul(a, w) b = Cast<to = 1>(h) y = Relu(b)", {"w": W16}),
    _x_to_y("partly_half/stored_half", "k = Cast<to = 1>(w) h = MatMul(x, k) y = Relu(h)", {"w": W16}),
    case(
        "partly_half/half_input_and_output",
        """g (float16[N, 8] x, float[N, 8] u) => (float16[N, 8] y, float[N, 8] z) {
          y = MatMul(x, w)  f = Cast<to = 1>(y)  s = Add(f, u)  z = Tanh(s) }""",
        {"x": X.astype(np.float16), "u": -X},
        weights={"w": W16},
    ),
    case(
        "partly_half/wholly_half",
        "g (float16[N, 8] x) => (float16[N, 8] y) { h = MatMul(x, w)  y = Relu(h) }",
        {"x": X.astype(np.float16)},
        weights={"w": W16},
    ),
    _x_to_y(
        "partly_half/fp32_softmax_island",
        """a = Cast<to = 10>(x) h = MatMul(a, w) f = Cast<to = 1>(h) s = Softmax(f) c = Cast<to = 10>(s)
        m = MatMul(c, w) y = Cast<to = 1>(m)""",
        {"w": W16},
    ),
    _x_to_y(
        "partly_half/bfloat16_island",
        "h = MatMul(x, w) a = Cast<to = 16>(h) b = Cast<to = 1>(a) y = Relu(b)",
        {"w": W},
        notes="a bfloat16 rounding that the user asked for is part of the model",
    ),
    _x_to_y(
        "partly_half/half_weight_two_users",
        "k = Cast<to = 1>(w) h = MatMul(x, k) a = Cast<to = 10>(h) m = MatMul(a, w) y = Cast<to = 1>(m)",
        {"w": W16},
    ),
]

CAST_LIKE = [
    case(
        "cast_like/int_like_float",
        "g (int64[N, 8] i, float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w) f = CastLike(i, h) y = Add(f, h) }",
        {"i": IDS, "x": X},
        weights={"w": W},
    ),
    case(
        "cast_like/float_like_int",
        """g (float[N, 8] x, int64[1] i) => (int64[N, 8] j, float[N, 8] y) {
          h = MatMul(x, w)  s = Mul(h, k)  j = CastLike(s, i)  y = Relu(h) }""",
        {"x": X, "i": np.array([0])},
        weights={"w": W, "k": np.array(2.0, np.float32)},
    ),
    _x_to_y(
        "cast_like/like_graph_input",
        "h = MatMul(x, w) c = CastLike(one, x) y = Add(h, c)",
        {"w": W, "one": np.array(1)},
    ),
    _x_to_y("cast_like/like_initialiser", "h = MatMul(x, w) c = CastLike(h, w) y = Relu(c)", {"w": W}, opset=19),
]

DTYPE_ATTRIBUTES = [
    case("eye_like/default_dtype", "g (float[N, 8] x) => (float[N, 8] y) { e = EyeLike(x)  y = Add(e, x) }", {"x": X}),
    case(
        "eye_like/of_integers",
        "g (int64[N, 8] i, float[N, 8] x) => (float[N, 8] y) { e = EyeLike<dtype = 1, k = 1>(i)  y = Mul(e, x) }",
        {"i": IDS, "x": X},
    ),
    case(
        "eye_like/float_shape_int_type",
        """g (float[N, 8] x) => (int64[N, 8] e, float[N, 8] y) {
          h = MatMul(x, w) e = EyeLike<dtype = 7>(h) y = Relu(h) }""",
        {"x": X},
        weights={"w": W},
    ),
    _x_to_y(
        "constant_of_shape/default_dtype",
        "h = MatMul(x, w) s = Shape(h) z = ConstantOfShape(s) y = Max(h, z)",
        {"w": W},
        notes="without `value` the output is float32, whatever the rest of the graph became",
    ),
    _x_to_y(
        "constant_of_shape/float_value",
        "h = MatMul(x, w) s = Shape(h) z = ConstantOfShape<value = float[1] {0.5}>(s) y = Mul(h, z)",
        {"w": W},
    ),
    _x_to_y(
        "constant_of_shape/int_value",
        """h = MatMul(x, w) s = Shape(h) z = ConstantOfShape<value = int64[1] {1}>(s) f = Cast<to = 1>(z)
        y = Sub(h, f)""",
        {"w": W},
    ),
    case(
        "constant_of_shape/straight_to_output",
        """g (float[N, 8] x) => (float[N, 8] z, float[N, 8] y) {
          s = Shape(x)  z0 = ConstantOfShape(s)  z = Cos(z0)  y = MatMul(x, w) }""",
        {"x": X},
        weights={"w": W},
    ),
    *[
        _x_to_y(
            f"random/{label}", f"h = MatMul(x, w) r = {call} n = Mul(r, zero) y = Add(h, n)", {"w": W, "zero": ZERO}
        )
        for label, call in {
            "normal_like": "RandomNormalLike<seed = 1.0>(h)",
            "normal_like_dtype": "RandomNormalLike<seed = 1.0, dtype = 1>(h)",
            "uniform_like": "RandomUniformLike<seed = 1.0>(x)",
            "normal": "RandomNormal<seed = 1.0, shape = [3, 8]>()",
            "uniform_dtype": "RandomUniform<dtype = 1, seed = 1.0, shape = [1, 8]>()",
        }.items()
    ],
    _x_to_y(
        "random/bernoulli",
        "p = Sigmoid(x) r = Bernoulli<seed = 1.0>(p) n = Mul(r, zero) h = MatMul(x, w) y = Add(h, n)",
        {"w": W, "zero": ZERO},
    ),
    _x_to_y(
        "random/normal_like_opset_9",
        "h = MatMul(x, w) r = RandomNormalLike<seed = 1.0>(h) n = Mul(r, zero) y = Add(h, n)",
        {"w": W, "zero": ZERO},
        opset=9,
    ),
    case(
        "range_float/constant_bounds",
        """g (float[N, 8] x) => (float[N, 8] y) <float a = {0.0}, float b = {2.0}, float d = {0.25}> { r =
        Range(a, b, d)  y = Add(x, r) }""",
        {"x": X},
        notes="ONNX Range has no float16: it must stay float32",
    ),
    case(
        "range_float/computed_bounds",
        """g (float[N, 8] x) => (float[N, 8] y) <float a = {0.0}, float d = {1.0}, int64 one = {1}> {
          s = Shape(x)  n = Gather(s, one)  b = Cast<to = 1>(n)  r = Range(a, b, d)  t = Div(r, b)  h = MatMul(x, w)
          y = Mul(h, t) }""",
        {"x": X},
        weights={"w": W},
    ),
]


def _sparse_constant() -> onnx.ModelProto:
    values = numpy_helper.from_array(np.array([1.5, -2.0, 0.5], np.float32), "sparse")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 9, 18]), "i"), [8, 8])
    nodes = [
        helper.make_node("Constant", [], ["k"], sparse_value=sparse),
        helper.make_node("MatMul", ["x", "k"], ["y"]),
    ]
    return graph_model(nodes, [floats("x", "N", 8)], [floats("y", "N", 8)])


_CONSTANTS = {
    "value": "c = Constant<value = float[8] {0.5, 1.0, 1.5, 2.0, -0.5, -1.0, -1.5, -2.0}>() y = Mul(x, c)",
    "value_float": "c = Constant<value_float = 0.3>() y = Mul(x, c)",
    "value_floats": "c = Constant<value_floats = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]>() y = Add(x, c)",
    "value_int": "c = Constant<value_int = 3>() f = Cast<to = 1>(c) y = Mul(x, f)",
    "value_ints": "c = Constant<value_ints = [7, 6, 5, 4, 3, 2, 1, 0]>() t = Gather<axis = 1>(x, c) y = Relu(t)",
    "value_string": 'c = Constant<value_string = "0.5">() f = Cast<to = 1>(c) y = Mul(x, f)',
    "value_strings": """c = Constant<value_strings = ["0.5", "2.0"]>() f = Cast<to = 1>(c)
      m = ReduceMax(f) y = Add(x, m)""",
    "shared_by_two_types": """c = Constant<value_float = 2.0>() h = Mul(x, c) i = Cast<to = 7>(c)
      f = Cast<to = 1>(i) y = Add(h, f)""",
}

CONSTANTS = [
    *[_x_to_y(f"constant_forms/{label}", body) for label, body in _CONSTANTS.items()],
    case("constant_forms/sparse_value", _sparse_constant, {"x": X}),
    _x_to_y("constant_forms/opset_9", _CONSTANTS["value"], opset=9),
    case(
        "constant_forms/straight_to_output",
        """g (float[N, 8] x) => (float[2] c, float[N, 8] y) {
          c = Constant<value_floats = [0.1, 70000.0]>()  y = MatMul(x, w) }""",
        {"x": X},
        weights={"w": W},
        hostile=True,
    ),
]

FLOAT64 = [
    _x_to_y(
        "float64_island/matmul",
        "a = Cast<to = 11>(x) h = MatMul(a, w) b = Cast<to = 1>(h) y = MatMul(b, v)",
        {"w": W.astype(np.float64), "v": W},
        notes="float64 stays float64",
    ),
    case(
        "float64_island/graph_input",
        """g (double[N, 8] x) => (double[N, 8] z, float[N, 8] y) {
          z = Add(x, x)  f = Cast<to = 1>(z)  y = MatMul(f, w) }""",
        {"x": X.astype(np.float64)},
        weights={"w": W},
    ),
    _x_to_y(
        "float64_island/constant",
        "c = Constant<value = double {0.25}>() f = Cast<to = 1>(c) h = MatMul(x, w) y = Mul(h, f)",
        {"w": W},
    ),
]

CASES = [
    *INT_TO_FLOAT,
    *CAST_CHAINS,
    *ALREADY_HALF,
    *CAST_LIKE,
    *DTYPE_ATTRIBUTES,
    *CONSTANTS,
    *FLOAT64,
]

"""The graph itself: who shares an initialiser, names, annotations, inputs that are outputs, other domains."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .conformance_base import Case, case, floats, graph_model, normal, parsed, weight

X = normal(3, 8, seed="x")
W = weight(8, 8)
B = normal(8, seed="b", scale=0.1)
TWICE = np.array([1, 1, 2, 2], np.float32)


def _x_to_y(name: str, body: str, weights: dict[str, np.ndarray] | None = None, **more: object) -> Case:
    text = f"g (float[N, 8] x) => (float[N, 8] y) {{ {body} }}"
    return case(name, text, {"x": X}, weights=weights, **more)


def _nodes_model(nodes: list[onnx.NodeProto], outputs: list[str] | None = None, **more: object) -> onnx.ModelProto:
    """x [N, 8] through `nodes` to the outputs, with the weights `w` and `b` at hand."""
    weights = more.pop("weights", {"w": W, "b": B})
    return graph_model(nodes, [floats("x", "N", 8)], [floats(o, "N", 8) for o in outputs or ["y"]], weights, **more)


SHARED = [
    case(
        "shared_initialiser/mul_and_resize_scales",
        """g (float[N, 2, 4, 4] x, float[N, 4] u) => (float[N, 2, 8, 8] y, float[N, 4] z) {
          h = Relu(x)  y = Resize<mode = "nearest">(h, , s)  z = Mul(u, s) }""",
        {"x": normal(1, 2, 4, 4), "u": normal(2, 4)},
        weights={"s": TWICE},
        notes="`s` is needed once in half and once in float32",
    ),
    _x_to_y(
        "shared_initialiser/matmul_and_kept_range",
        "lo = Constant<value_float = 0.0>() r = Range(lo, top, step) h = Mul(x, step) a = Add(h, r) y = MatMul(a, w)",
        {"top": np.float32(1.0), "step": np.float32(0.125), "w": W},
    ),
    _x_to_y(
        "shared_initialiser/layer_norm_and_mul",
        "h = MatMul(x, w) n = LayerNormalization(h, s, b) y = Mul(n, s)",
        {"w": W, "s": normal(8, scale=0.1, shift=1.0), "b": B},
    ),
    _x_to_y(
        "shared_initialiser/two_matmuls_and_transpose",
        "h = MatMul(x, w) t = Transpose<perm = [1, 0]>(w) y = MatMul(h, t)",
        {"w": W},
    ),
    _x_to_y(
        "shared_initialiser/integer_cast",
        "h = MatMul(x, w) i = Cast<to = 7>(w) f = Cast<to = 1>(i) y = MatMul(h, f)",
        {"w": W * 3},
    ),
    case(
        "shared_initialiser/with_subgraph",
        """g (float[N, 8] x, bool c) => (float[N, 8] y) {
          h = MatMul(x, w)
          y = If(c) <
            then_branch = t () => (float[N, 8] a) { a = MatMul(h, w) },
            else_branch = e () => (float[N, 8] z) { z = Identity(h) }
          >
        }""",
        {"x": X, "c": np.array(True)},
        weights={"w": W},
    ),
    _x_to_y(
        "shared_initialiser/custom_domain_and_matmul",
        "n = com.microsoft.Gelu(b) h = MatMul(x, w) a = Add(h, n) y = Add(a, b)",
        {"w": W, "b": B},
        domains={"com.microsoft": 1},
    ),
]


def _unnamed() -> onnx.ModelProto:
    model = _nodes_model([helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])])
    assert not any(node.name for node in model.graph.node)
    return model


def _duplicate_names() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="op"),
        helper.make_node("Add", ["h", "b"], ["i"], name="op"),
        helper.make_node("Relu", ["i"], ["y"], name="op"),
    ]
    return _nodes_model(nodes)


def _taken_names() -> onnx.ModelProto:
    """The names a rewriter likes to invent are in use already."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["x_fp16"], name="Cast_0"),
        helper.make_node("Relu", ["x_fp16"], ["x_cast"], name="x_cast"),
        helper.make_node("Add", ["x_cast", "w_fp16"], ["y_cast"], name="Cast_1"),
        helper.make_node("Sigmoid", ["y_cast"], ["x_float16"], name="y_cast"),
        helper.make_node("Tanh", ["x_float16"], ["y"], name="val_0"),
    ]
    return _nodes_model(nodes, weights={"w": W, "w_fp16": B})


def _punctuated_names() -> onnx.ModelProto:
    nodes = [
        helper.make_node(
            "MatMul", ["x", "layer.0/w:0"], ["/model/layer.0/MatMul_output_0"], name="/model/layer.0/MatMul"
        ),
        helper.make_node("Relu", ["/model/layer.0/MatMul_output_0"], ["häuser [ß]*"], name="relu (1) ?"),
        helper.make_node("Add", ["häuser [ß]*", "b"], ["y"], name=" "),
    ]
    return _nodes_model(nodes, weights={"layer.0/w:0": W, "b": B})


def _duplicate_across_bodies() -> onnx.ModelProto:
    def branch(op: str, output: str) -> onnx.GraphProto:
        inner = [
            helper.make_node("MatMul", ["h", "w"], ["m"], name="op"),
            helper.make_node(op, ["m"], [output], name="act"),
        ]
        return helper.make_graph(inner, "same", [], [floats(output, "N", 8)])

    nodes = [
        helper.make_node("Relu", ["x"], ["h"], name="op"),
        helper.make_node(
            "If", ["c"], ["y"], name="act", then_branch=branch("Tanh", "o"), else_branch=branch("Neg", "o")
        ),
    ]
    model = _nodes_model(nodes, weights={"w": W})
    model.graph.input.append(helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    return model


NAMES = [
    case("node_names/unnamed", _unnamed, {"x": X}),
    case(
        "node_names/duplicate",
        _duplicate_names,
        {"x": X},
        refused_by_ort=True,
        notes="valid ONNX: names need not be unique; ORT refuses it until they are",
    ),
    case("node_names/duplicate_across_bodies", _duplicate_across_bodies, {"x": X, "c": np.array(True)}),
    case("node_names/taken", _taken_names, {"x": X}),
    case("node_names/punctuated", _punctuated_names, {"x": X}),
]


def _initialiser_only() -> onnx.ModelProto:
    """The output `w` is an initialiser and nothing else; `y` uses it."""
    model = _nodes_model([helper.make_node("MatMul", ["x", "w"], ["y"])], weights={"w": W})
    model.graph.output.append(floats("w", 8, 8))
    return model


def _old_style_inputs() -> onnx.ModelProto:
    """IR version 3: every initialiser is a graph input too."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    model = _nodes_model(nodes, opset=9, ir_version=3)
    model.graph.input.extend([floats("w", 8, 8), floats("b", 8)])
    return model


def _overridden_initialiser() -> onnx.ModelProto:
    """A default that the caller may override: its declared type is part of the interface."""
    model = _nodes_model(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Mul", ["h", "scale"], ["y"])]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(1.0, np.float32), "scale"))
    model.graph.input.append(floats("scale"))
    return model


OUTPUTS = [
    case("initialiser_as_output/used_elsewhere", _initialiser_only, {"x": X}),
    _x_to_y(
        "initialiser_as_output/through_identity", "h = MatMul(x, w) i = Identity(b) y = Add(h, i)", {"w": W, "b": B}
    ),
    case("initialiser_is_input/ir_version_3", _old_style_inputs, {"x": X}),
    case("initialiser_is_input/overridden", _overridden_initialiser, {"x": X, "scale": np.array(0.5, np.float32)}),
    case("initialiser_is_input/left_at_default", _overridden_initialiser, {"x": X}),
    case(
        "input_as_output/float",
        "g (float[N, 8] x) => (float[N, 8] x, float[N, 8] y) { y = MatMul(x, w) }",
        {"x": X},
        weights={"w": W},
    ),
    case(
        "input_as_output/unused_inside",
        "g (float[N, 8] x, float[N] u, int64[N] i) => (float[N, 8] y, float[N] u, int64[N] i) { y = MatMul(x, w) }",
        {"x": X, "u": normal(3), "i": np.arange(3)},
        weights={"w": W},
    ),
    case(
        "input_as_output/nothing_else",
        "g (float[N, 8] x) => (float[N, 8] x) { }",
        {"x": X},
        convertible=False,
    ),
    case(
        "output_used_inside/chain",
        """g (float[N, 8] x) => (float[N, 8] h, float[N, 8] r, float[N, 8] y) {
          h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }""",
        {"x": X},
        weights={"w": W},
    ),
    case(
        "output_used_inside/half_and_kept_users",
        """g (float[N, 8] x) => (float[N, 8] h, int64[N, 8] i, float[N, 8] y) {
          h = MatMul(x, w)  k = Mul(h, two)  i = Cast<to = 7>(h)  y = Relu(k) }""",
        {"x": X},
        weights={"w": W, "two": np.float32(2.0)},
    ),
    case(
        "dead_code/unused_node_and_initialiser",
        "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  never = Exp(b)  y = Relu(h) }",
        {"x": X},
        weights={"w": W, "b": B, "unused": np.array([1e30], np.float32)},
    ),
    case(
        "nothing_to_convert/integers",
        "g (int64[N] i) => (int64[N] j) { k = Add(i, i)  j = Mul(k, i) }",
        {"i": np.arange(5)},
        convertible=False,
    ),
]


def _stale(kind: str) -> onnx.ModelProto:
    model = parsed(
        "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }", 17, {"w": W}
    )
    if kind == "shape":
        model.graph.value_info.extend([floats("h", 7, 9), floats("r", 1)])
    elif kind == "gone":
        model.graph.value_info.extend([floats("gone", 3, 3), floats("x", "N", 8)])
    else:
        model.graph.value_info.append(helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT16, ["N", 8]))
    return model


VALUE_INFO = [
    case("stale_value_info/wrong_shape", lambda: _stale("shape"), {"x": X}, stale_value_info=True),
    case("stale_value_info/unknown_tensor", lambda: _stale("gone"), {"x": X}),
    case(
        "missing_value_info/no_output_shape",
        "g (float[N, 8] x) => (float y) { h = MatMul(x, w)  r = ReduceSum<keepdims = 0>(h)  y = Relu(r) }",
        {"x": X},
        weights={"w": W},
    ),
    case(
        "missing_value_info/after_unknown_operator",
        """g (float[N, 8] x) => (float[N, 8] y) {
          h = com.microsoft.Gelu(x)  r = MatMul(h, w)  s = com.microsoft.QuickGelu(r)  y = Add(s, r) }""",
        {"x": X},
        weights={"w": W},
        domains={"com.microsoft": 1},
        notes="ONNX shape inference knows nothing past the first node",
    ),
    case(
        "missing_value_info/unranked_reshape",
        "g (float[N, 8] x, int64[K] s) => (float[A, B] y) { h = MatMul(x, w)  r = Reshape(h, s)  y = Tanh(r) }",
        {"x": X, "s": np.array([4, -1])},
        weights={"w": W},
    ),
]

EMPTY = [
    case(
        "empty_tensor/empty_batch",
        "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  y = Add(h, b) }",
        {"x": np.zeros((0, 8), np.float32)},
        weights={"w": W, "b": B},
    ),
    _x_to_y(
        "empty_tensor/concat_initialiser",
        "h = Relu(x) c = Concat<axis = 0>(h, e) y = MatMul(c, w)",
        {"e": np.zeros((0, 8), np.float32), "w": W},
    ),
    _x_to_y(
        "empty_tensor/constant",
        "e = Constant<value = float[0] {}>() m = ReduceSum<keepdims = 0>(e) h = MatMul(x, w) y = Add(h, m)",
        {"w": W},
    ),
    case(
        "scalar/weights_and_input",
        """g (float[N, 8] x, float a) => (float[N, 8] y, float z) {
          h = MatMul(x, w)  m = Mul(h, a)  y = Add(m, k)  z = Mul(a, k) }""",
        {"x": X, "a": np.array(0.5, np.float32)},
        weights={"w": W, "k": np.array(0.25, np.float32)},
    ),
    case(
        "scalar/reduced_and_expanded",
        """g (float[N, 8] x) => (float[N, 8] y) {
          m = ReduceMax<keepdims = 0>(x)  s = Shape(x)  e = Expand(m, s)  y = Sub(x, e) }""",
        {"x": X},
    ),
]


def _metadata() -> onnx.ModelProto:
    model = parsed("g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w) y = Relu(h) }", 20, {"w": W}, ir_version=10)
    helper.set_model_props(model, {"author": "someone", "classes": "[1, 2]"})
    model.producer_name, model.doc_string, model.graph.doc_string = "by hand", "a model", "a graph"
    for node in model.graph.node:
        node.doc_string = f"what {node.op_type} is for"
        entry = node.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", f"['', '{node.op_type.lower()}']"
    return model


OTHER = [
    case("metadata/props_and_doc_strings", _metadata, {"x": X}),
    _x_to_y(
        "external_data/weights", "h = MatMul(x, w) a = Add(h, b) y = MatMul(a, w)", {"w": W, "b": B}, external_data=True
    ),
    case(
        "external_data/in_branches",
        """g (float[N, 8] x, bool c) => (float[N, 8] y) {
          y = If(c) <
            then_branch = t () => (float[N, 8] a) <float[8] k = {1, 2, 3, 4, 5, 6, 7, 8}> { a = Mul(x, k) },
            else_branch = e () => (float[N, 8] z) { z = MatMul(x, w) }
          >
        }""",
        {"x": X, "c": np.array(True)},
        weights={"w": W},
        external_data=True,
    ),
    _x_to_y(
        "custom_domain/fused_matmul",
        "h = com.microsoft.FusedMatMul<alpha = 0.5, transB = 1>(x, w) y = com.microsoft.BiasGelu(h, b)",
        {"w": W, "b": B},
        domains={"com.microsoft": 1},
        convertible=False,
    ),
    case(
        "custom_domain/skip_layer_norm",
        """g (float[N, 4, 8] x, float[N, 4, 8] u) => (float[N, 4, 8] y) {
          h = MatMul(x, w)  n = com.microsoft.SkipLayerNormalization<epsilon = 1e-5>(h, u, s, b)  y = MatMul(n, w) }""",
        {"x": normal(2, 4, 8), "u": normal(2, 4, 8, seed="u")},
        weights={"w": W, "s": normal(8, scale=0.1, shift=1.0), "b": B},
        domains={"com.microsoft": 1},
        notes="an operator of a domain without a schema here keeps its float32 inputs",
    ),
    _x_to_y(
        "ai_onnx_ml/scaler",
        "h = MatMul(x, w) s = ai.onnx.ml.Scaler<offset = [0.5], scale = [2.0]>(h) y = Relu(s)",
        {"w": W},
        domains={"ai.onnx.ml": 3},
    ),
    case(
        "ai_onnx_ml/linear_regressor",
        """g (float[N, 8] x) => (float[N, 1] y) {
          h = MatMul(x, w)
          r = ai.onnx.ml.LinearRegressor<coefficients = [0.5, -0.5, 1.0, 0.25, 2.0, -1.0, 0.1, 0.3], targets = 1>(h)
          y = Sigmoid(r) }""",
        {"x": X},
        weights={"w": W},
        domains={"ai.onnx.ml": 3},
    ),
    case(
        "ai_onnx_ml/normalizer_and_labels",
        """g (int64[N] i, float[N, 8] x) => (float[N, 8] y) {
          l = ai.onnx.ml.LabelEncoder<keys_int64s = [0, 1, 2], values_floats = [0.5, 1.5, 2.5]>(i)
          n = ai.onnx.ml.Normalizer<norm = "L2">(x)
          m = ReduceMean<keepdims = 0>(l)  h = MatMul(n, w)  y = Mul(h, m) }""",
        {"i": np.arange(3), "x": X},
        weights={"w": W},
        domains={"ai.onnx.ml": 3},
    ),
]

CASES = [*SHARED, *NAMES, *OUTPUTS, *VALUE_INFO, *EMPTY, *OTHER]

"""Local functions, sequences and optionals."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from .conformance_base import Case, case, floats, graph_model, normal, parsed, weight

X = normal(3, 8, seed="x")
W = weight(8, 8)
B = normal(8, seed="b", scale=0.1)
LOCAL = {"local": 1}
SCORES = np.array([0.9, 0.1, 0.4, 0.7], np.float32)


def function(text: str, imports: str = '"" : 17') -> str:
    """A function of domain `local`, written after the main graph."""
    return f'\n<domain: "local", opset_import: [{imports}]>\n{text}'


_SIMPLE = """g (float[N, 8] x) => (float[N, 8] y) {
  h = MatMul(x, w)
  y = local.silu(h)
}""" + function("silu (a) => (o) { s = Sigmoid(a)  o = Mul(a, s) }")

_CALLED_TWICE = """g (float[N, 8] x) => (float[N, 8] y) {
  h = local.linear(x, w, b)
  r = Relu(h)
  y = local.linear(r, w, b)
}""" + function("linear (a, k, c) => (o) { m = MatMul(a, k)  o = Add(m, c) }")

_TWO_DTYPES = """g (float[N, 8] x, int64[N, 8] i) => (float[N, 8] y, int64[N, 8] j) {
  h = MatMul(x, w)
  y = local.twice(h)
  j = local.twice(i)
}""" + function("twice (a) => (o) { s = Add(a, a)  o = Mul(s, a) }")

_NESTED = (
    """g (float[N, 8] x) => (float[N, 8] y) {
  h = local.block(x, w)
  y = local.block(h, w)
}"""
    + function("block (a, k) => (o) { m = MatMul(a, k)  g = local.silu(m)  o = Add(g, a) }", '"" : 17, "local" : 1')
    + function("silu (a) => (o) { s = Sigmoid(a)  o = Mul(a, s) }")
)

_ATTRIBUTES = """g (float[N, 8] x) => (float[N, 8] y) {
  h = local.leaky<slope = 0.25, axis = 1>(x)
  y = local.leaky<slope = 0.5, axis = 0>(h)
}""" + function(
    "leaky <slope, axis> (a) => (o) { l = LeakyRelu<alpha : float = @slope>(a)  o = Softmax<axis : int = @axis>(l) }"
)

_ATTRIBUTE_DEFAULT = """g (float[N, 8] x) => (float[N, 8] y) {
  h = local.leaky(x)
  y = local.leaky<slope = 0.5>(h)
}""" + function("leaky <slope : float = 0.125> (a) => (o) { o = LeakyRelu<alpha : float = @slope>(a) }")

_ATTRIBUTE_IS_DTYPE = """g (float[N, 8] x) => (float[N, 8] y, int64[N, 8] j) {
  h = MatMul(x, w)
  y = local.scaled<to = 1>(h)
  j = local.scaled<to = 7>(h)
}""" + function(
    "scaled <to> (a) => (o) { c = Constant<value_float = 4.0>()  m = Mul(a, c)  o = Cast<to : int = @to>(m) }"
)

_ATTRIBUTE_CONSTANT = """g (float[N, 8] x) => (float[N, 8] y) {
  h = local.shift<by = 0.5>(x)
  y = local.shift<by = -2.0>(h)
}""" + function(
    "shift <by> (a) => (o) { c = Constant<value_float : float = @by>()  d = CastLike(c, a)  o = Add(a, d) }"
)

_WITH_IF = """g (float[N, 8] x, bool c) => (float[N, 8] y) {
  h = MatMul(x, w)
  y = local.choose(h, c)
}""" + function("""choose (a, c) => (o) {
  s = Sigmoid(a)
  o = If(c) <
    then_branch = t () => (p) { p = Mul(a, s) },
    else_branch = e () => (q) { q = Neg(a) }
  >
}""")

_NEWER_OPSET = """g (float[N, 8] x) => (float[N, 8] y) {
  h = MatMul(x, w)
  y = local.norm(h)
}""" + function(
    """norm (a) => (o) {
  axes = Constant<value_ints = [-1]>()
  m = ReduceMean(a, axes)
  o = Sub(a, m)
}""",
    '"" : 18',
)

_UNUSED = """g (float[N, 8] x) => (float[N, 8] y) {
  y = MatMul(x, w)
}""" + function("never (a) => (o) { c = Constant<value_float = 1.0>()  o = Add(a, c) }")


def _optional_input() -> onnx.ModelProto:
    """`bounded` passes its own missing input on to Clip; ONNX text cannot write the empty argument of a call."""
    nodes = [
        helper.make_node("Constant", [], ["low"], value_float=-0.5),
        helper.make_node("Constant", [], ["high"], value_float=0.75),
        helper.make_node("bounded", ["x", "low"], ["h"], domain="local"),
        helper.make_node("bounded", ["h", "", "high"], ["y"], domain="local"),
    ]
    body = [helper.make_node("Clip", ["a", "low", "high"], ["o"])]
    model = graph_model(nodes, [floats("x", "N", 8)], [floats("y", "N", 8)], ir_version=8)
    model.opset_import.append(helper.make_opsetid("local", 1))
    imports = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("local", "bounded", ["a", "low", "high"], ["o"], body, imports))
    return model


def _overloads() -> onnx.ModelProto:
    """Two functions of one name, told apart by `overload` (IR version 10)."""
    text = """g (float[N, 8] x) => (float[N, 8] y) {
      h = local.act(x)
      y = local.act(h)
    }"""
    model = parsed(text, 17, domains=LOCAL, ir_version=10)
    imports = [helper.make_opsetid("", 17)]
    for overload, op, node in zip(("soft", "hard"), ("Softplus", "HardSigmoid"), model.graph.node, strict=True):
        node.overload = overload
        body = [helper.make_node(op, ["a"], ["o"])]
        model.functions.append(helper.make_function("local", "act", ["a"], ["o"], body, imports, overload=overload))
    return model


_SEQUENCE_AT = """g (float[N, 8] x, float[N, 8] u) => (float[N, 8] y) <int64 one = {1}> {
  h = MatMul(x, w)
  s = SequenceConstruct(x, h, u)
  p = SequenceAt(s, one)
  y = Relu(p)
}"""

_SEQUENCE_SPLIT = """g (float[4, 8] x) => (float[4, 8] y) <int64[2] sizes = {1, 3}> {
  h = MatMul(x, w)
  s = SplitToSequence<axis = 0>(h, sizes)
  c = ConcatFromSequence<axis = 0>(s)
  y = Tanh(c)
}"""

_SEQUENCE_EMPTY = """g (float[N, 8] x) => (float[M, 8] y, int64 n) <int64 zero = {0}> {
  e = SequenceEmpty()
  h = MatMul(x, w)
  s1 = SequenceInsert(e, h)
  s2 = SequenceInsert(s1, x, zero)
  s3 = SequenceInsert(s2, x)
  s4 = SequenceErase(s3, zero)
  n = SequenceLength(s4)
  y = ConcatFromSequence<axis = 0>(s4)
}"""

_SEQUENCE_IO = """g (seq(float[2, 8]) xs) => (float[4, 8] y, seq(float[M, 8]) ys) <int64 zero = {0}> {
  y0 = ConcatFromSequence<axis = 0>(xs)
  y = MatMul(y0, w)
  first = SequenceAt(xs, zero)
  h = Relu(first)
  ys = SequenceInsert(xs, h)
}"""

_SEQUENCE_STATE = """g (float[2, 8] x) => (float[M, 8] y) <int64 trips = {3}, bool go = {1}> {
  e = SequenceEmpty<dtype = 1>()
  s, last = Loop(trips, go, e, x) <body = l (int64 i, bool ci, seq(float[2, 8]) si, float[2, 8] h)
      => (bool co, seq(float[2, 8]) so, float[2, 8] ho) {
    co = Identity(ci)
    m = MatMul(h, w)
    ho = Tanh(m)
    so = SequenceInsert(si, ho)
  }>
  y = ConcatFromSequence<axis = 0>(s)
}"""

_SEQUENCE_MAP = """g (float[4, 8] x) => (float[4, 8] y) {
  s = SplitToSequence<axis = 0, keepdims = 1>(x)
  t = SequenceMap(s) <body = b (float[M, 8] e) => (float[M, 8] o) { m = MatMul(e, w)  o = Relu(m) }>
  y = ConcatFromSequence<axis = 0>(t)
}"""

_SEQUENCE_MAP_TENSOR = """g (float[4, 8] x, float[8] u) => (float[4, 8] y) {
  s = SplitToSequence<axis = 0, keepdims = 1>(x)
  t = SequenceMap(s, u) <body = b (float[M, 8] e, float[8] v) => (float[M, 8] o) { m = Mul(e, v)  o = Sigmoid(m) }>
  y = ConcatFromSequence<axis = 0>(t)
}"""

_OPTIONAL_GET = """g (float[N, 8] x) => (float[N, 8] y) {
  h = MatMul(x, w)
  maybe = Optional(h)
  v = OptionalGetElement(maybe)
  y = Relu(v)
}"""

_OPTIONAL_HAS = """g (float[N, 8] x) => (float[N, 8] y) {
  h = MatMul(x, w)
  maybe = Optional(h)
  there = OptionalHasElement(maybe)
  y = If(there) <
    then_branch = t () => (float[N, 8] a) { v = OptionalGetElement(maybe)  a = Relu(v) },
    else_branch = e () => (float[N, 8] z) { z = Neg(x) }
  >
}"""

_OPTIONAL_INPUT_TYPE = """g (optional(float[N, 8]) x, float[N, 8] u) => (float[N, 8] y) {
  there = OptionalHasElement(x)
  h = If(there) <
    then_branch = t () => (float[N, 8] a) { v = OptionalGetElement(x)  a = MatMul(v, w) },
    else_branch = e () => (float[N, 8] z) { z = MatMul(u, w) }
  >
  y = Relu(h)
}"""

_OPTIONAL_OF_SEQUENCE = """g (float[N, 8] x) => (float[N, 8] y) <int64 one = {1}> {
  h = MatMul(x, w)
  s = SequenceConstruct(x, h)
  maybe = Optional(s)
  t = OptionalGetElement(maybe)
  y = SequenceAt(t, one)
}"""


def _skipped(node: onnx.NodeProto, x: list[int], y: list[int], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    return graph_model([node], [floats("x", *x)], [floats("y", *y)], weights)


def _clip_without_min() -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Clip", ["h", "", "high"], ["y"])]
    weights = {"w": W, "high": np.array(0.75, np.float32)}
    return graph_model(nodes, [floats("x", "N", 8)], [floats("y", "N", 8)], weights)


def _resize_by_sizes() -> onnx.ModelProto:
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear")
    return _skipped(node, [1, 2, 4, 4], [1, 2, 7, 9], {"sizes": np.array([1, 2, 7, 9])})


def _lstm_without_bias() -> onnx.ModelProto:
    node = helper.make_node("LSTM", ["x", "W", "R", "", "", "h0", "c0"], ["", "y", ""], hidden_size=4)
    weights = {"W": normal(1, 16, 8, scale=0.3), "R": normal(1, 16, 4, scale=0.3)}
    weights |= {"h0": normal(1, 3, 4), "c0": normal(1, 3, 4, seed="c")}
    return _skipped(node, [5, 3, 8], [1, 3, 4], weights)


def _function_case(name: str, text: str, **more: object) -> Case:
    feeds = {"x": X, **more.pop("feeds", {})}
    return case(f"local_function/{name}", text, feeds, weights={"w": W, "b": B}, domains=LOCAL, **more)


CASES = [
    _function_case("simple", _SIMPLE),
    _function_case("called_twice", _CALLED_TWICE),
    _function_case("called_with_float_and_int", _TWO_DTYPES, feeds={"i": np.arange(24).reshape(3, 8)}),
    _function_case("nested", _NESTED),
    _function_case("attribute_references", _ATTRIBUTES),
    _function_case("attribute_default", _ATTRIBUTE_DEFAULT),
    _function_case("attribute_is_a_dtype", _ATTRIBUTE_IS_DTYPE),
    _function_case("attribute_is_a_constant", _ATTRIBUTE_CONSTANT),
    _function_case("with_if", _WITH_IF, feeds={"c": np.array(True)}),
    _function_case("imports_newer_opset", _NEWER_OPSET, opset=18),
    _function_case("unused", _UNUSED),
    case("local_function/missing_argument", _optional_input, {"x": X}),
    case("local_function/overloads", _overloads, {"x": X}),
    case("sequence/construct_and_at", _SEQUENCE_AT, {"x": X, "u": X[::-1].copy()}, weights={"w": W}),
    case("sequence/split_and_concat", _SEQUENCE_SPLIT, {"x": normal(4, 8)}, weights={"w": W}),
    case(
        "sequence/empty_insert_erase",
        _SEQUENCE_EMPTY,
        {"x": X},
        weights={"w": W},
        notes="SequenceEmpty without `dtype` is float: the attribute must appear when the elements go half",
    ),
    case("sequence/graph_input_and_output", _SEQUENCE_IO, {"xs": [X[:2], X[1:]]}, weights={"w": W}),
    case("sequence/loop_state", _SEQUENCE_STATE, {"x": X[:2]}, weights={"w": W}),
    case("sequence/opset_11", _SEQUENCE_SPLIT, {"x": normal(4, 8)}, opset=11, weights={"w": W}),
    case("sequence_map/captured_weight", _SEQUENCE_MAP, {"x": normal(4, 8)}, weights={"w": W}),
    case("sequence_map/tensor_argument", _SEQUENCE_MAP_TENSOR, {"x": normal(4, 8), "u": normal(8)}),
    case("optional/get_element", _OPTIONAL_GET, {"x": X}, opset=18, weights={"w": W}),
    case("optional/has_element", _OPTIONAL_HAS, {"x": X}, opset=18, weights={"w": W}),
    case("optional/graph_input_given", _OPTIONAL_INPUT_TYPE, {"x": X, "u": -X}, opset=18, weights={"w": W}),
    case("optional/graph_input_absent", _OPTIONAL_INPUT_TYPE, {"x": None, "u": -X}, opset=18, weights={"w": W}),
    case("optional/of_sequence", _OPTIONAL_OF_SEQUENCE, {"x": X}, opset=18, weights={"w": W}),
    case("skipped_input/clip_without_min", _clip_without_min, {"x": X}),
    case("skipped_input/resize_by_sizes", _resize_by_sizes, {"x": normal(1, 2, 4, 4)}),
    case("skipped_input/lstm_without_bias", _lstm_without_bias, {"x": normal(5, 3, 8)}),
]

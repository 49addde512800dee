"""If, Loop and Scan: bodies, captured values, float state."""

from __future__ import annotations

import numpy as np

from .conformance_base import case, normal, weight

X = normal(3, 8, seed="x")
W = weight(8, 8)
B = normal(8, seed="b", scale=0.1)
YES = np.array(True)
NO = np.array(False)

_IF_MATMUL = """g (float[N, 8] x, bool c) => (float[N, 8] y) {
  h = Relu(x)
  r = If(c) <
    then_branch = t () => (float[N, 8] a) { p = MatMul(h, w)  a = Tanh(p) },
    else_branch = e () => (float[N, 8] z) { q = Add(h, b)  z = Sigmoid(q) }
  >
  y = MatMul(r, w)
}"""

_IF_LOCAL_INITIALISERS = """g (float[N, 4] x, bool c) => (float[N, 4] y) {
  r = If(c) <
    then_branch = t () => (float[N, 4] o) <float[4] k = {1.0, 2.0, 3.0, 4.0}> { p = Mul(x, k)  o = Relu(p) },
    else_branch = e () => (float[N, 4] o) <float[4] k = {0.5, -0.5, 0.25, 8.0}> { p = Mul(x, k)  o = Tanh(p) }
  >
  y = Add(r, x)
}"""

_NESTED_IF = """g (float[N, 8] x, bool c, bool d) => (float[N, 8] y) {
  h = MatMul(x, w)
  y = If(c) <
    then_branch = t () => (float[N, 8] a) {
      i = Add(h, b)
      a = If(d) <
        then_branch = tt () => (float[N, 8] aa) { m = MatMul(i, w)  aa = Add(m, h) },
        else_branch = te () => (float[N, 8] ae) { ae = Mul(i, h) }
      >
    },
    else_branch = e () => (float[N, 8] z) { z = Neg(h) }
  >
}"""

_LOOP_STATE = """g (float[N, 8] x) => (float[N, 8] y) <int64 trips = {3}, bool go = {1}> {
  y = Loop(trips, go, x) <body = l (int64 i, bool ci, float[N, 8] s) => (bool co, float[N, 8] so) {
    co = Identity(ci)
    m = MatMul(s, w)
    a = Add(m, b)
    so = Tanh(a)
  }>
}"""

_LOOP_SCAN_OUTPUT = """g (float[N, 8] x) => (float[N, 8] y, float[3, N, 8] ys) <int64 trips = {3}, bool go = {1}> {
  y, ys = Loop(trips, go, x) <body = l (int64 i, bool ci, float[N, 8] s)
      => (bool co, float[N, 8] so, float[N, 8] each) {
    co = Identity(ci)
    f = Cast<to = 1>(i)
    m = MatMul(s, w)
    a = Add(m, f)
    so = Tanh(a)
    each = Relu(so)
  }>
}"""

_LOOP_WHILE = """g (float[1, 8] x) => (float[1, 8] y, int64 n) <int64 trips = {10}, bool go = {1}, int64 zero = {0}> {
  y, n = Loop(trips, go, x, zero) <body = l (int64 i, bool ci, float[1, 8] s, int64 k)
      => (bool co, float[1, 8] so, int64 ko) {
    one = Constant<value = int64 {1}>()
    limit = Constant<value = float {30.0}>()
    two = Constant<value = float {2.0}>()
    ko = Add(k, one)
    so = Mul(s, two)
    square = Mul(so, so)
    total = ReduceSum<keepdims = 0>(square)
    co = Less(total, limit)
  }>
}"""

_LOOP_CARRIED_THROUGH = """g (float[N, 8] x, float[N, 8] u) => (float[N, 8] y, float[N, 8] v)
    <int64 trips = {2}, bool go = {1}> {
  y, v = Loop(trips, go, x, u) <body = l (int64 i, bool ci, float[N, 8] s, float[N, 8] p)
      => (bool co, float[N, 8] so, float[N, 8] p) {
    co = Identity(ci)
    so = Add(s, p)
  }>
}"""

_LOOP_SWAPPED = """g (float[N, 8] x, float[N, 8] u) => (float[N, 8] y, float[N, 8] v)
    <int64 trips = {3}, bool go = {1}> {
  y, v = Loop(trips, go, x, u) <body = l (int64 i, bool ci, float[N, 8] s, float[N, 8] p)
      => (bool co, float[N, 8] po, float[N, 8] so) {
    co = Identity(ci)
    po = Identity(p)
    m = MatMul(s, w)
    so = Tanh(m)
  }>
}"""

_LOOP_KEPT_STATE = """g (float[N, 8] x) => (float[N, 8] y, float total)
    <int64 trips = {4}, bool go = {1}, float zero = {0.0}> {
  y, total = Loop(trips, go, x, zero) <body = l (int64 i, bool ci, float[N, 8] s, float t)
      => (bool co, float[N, 8] so, float to) {
    co = Identity(ci)
    m = MatMul(s, w)
    so = Relu(m)
    r = ReduceSum<keepdims = 0>(so)
    to = Add(t, r)
  }>
}"""

_LOOP_WITH_IF = """g (float[N, 8] x) => (float[N, 8] y) <int64 trips = {4}, bool go = {1}> {
  h = Relu(x)
  y = Loop(trips, go, x) <body = l (int64 i, bool ci, float[N, 8] s) => (bool co, float[N, 8] so) {
    co = Identity(ci)
    two = Constant<value = int64 {2}>()
    early = Less(i, two)
    so = If(early) <
      then_branch = t () => (float[N, 8] a) { m = MatMul(s, w)  a = Add(m, h) },
      else_branch = e () => (float[N, 8] z) { z = Tanh(s) }
    >
  }>
}"""

_SCAN = """g (float[8] s0, float[5, 8] xs) => (float[8] s, float[5, 8] ys) {
  s, ys = Scan<num_scan_inputs = 1, body = body (float[8] si, float[8] xi) => (float[8] so, float[8] yo) {
    m = MatMul(si, w)
    a = Add(m, xi)
    so = Tanh(a)
    yo = Mul(so, xi)
  }>(s0, xs)
}"""

_SCAN_REVERSED = """g (float[8] s0, float[8, 5] xs) => (float[8] s, float[8, 5] ys) {
  s, ys = Scan<num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1], scan_output_axes = [1],
    scan_output_directions = [1],
    body = body (float[8] si, float[8] xi) => (float[8] so, float[8] yo) {
      a = Add(si, xi)
      so = Sigmoid(a)
      yo = MatMul(so, w)
    }>(s0, xs)
}"""

_SCAN_IN_IF = """g (float[8] s0, float[5, 8] xs, bool c) => (float[8] y) {
  y = If(c) <
    then_branch = t () => (float[8] a) {
      a, unused = Scan<num_scan_inputs = 1, body = body (float[8] si, float[8] xi) => (float[8] so, float[8] yo) {
        m = MatMul(xi, w)
        so = Add(si, m)
        yo = Identity(xi)
      }>(s0, xs)
    },
    else_branch = e () => (float[8] z) { z = Identity(s0) }
  >
}"""

_OUTER_SCOPE_ONLY = """g (float[N, 8] x, bool c) => (float[N, 8] y) {
  p = MatMul(x, w)
  q = Add(x, b)
  r = If(c) <
    then_branch = t () => (float[N, 8] a) { a = Identity(p) },
    else_branch = e () => (float[N, 8] z) { z = Identity(q) }
  >
  y = Relu(r)
}"""

_OUTER_INPUT_AND_WEIGHT = """g (float[N, 8] x, bool c) => (float[N, 8] y) {
  y = If(c) <
    then_branch = t () => (float[N, 8] a) { a = Identity(x) },
    else_branch = e () => (float[N, 8] z) { z = MatMul(x, w) }
  >
}"""

_CAPTURED_BY_TWO_DEPTHS = """g (float[N, 8] x, bool c) => (float[N, 8] y, float[N, 8] h)
    <int64 trips = {2}, bool go = {1}> {
  h = MatMul(x, w)
  k = Softmax(h)
  y = If(c) <
    then_branch = t () => (float[N, 8] a) {
      a = Loop(trips, go, h) <body = l (int64 i, bool ci, float[N, 8] s) => (bool co, float[N, 8] so) {
        co = Identity(ci)
        m = MatMul(s, w)
        so = Add(m, k)
      }>
    },
    else_branch = e () => (float[N, 8] z) { z = Mul(h, k) }
  >
}"""

_CONDITION_FROM_FLOATS = """g (float[N, 8] x) => (float[N, 8] y) <float zero = {0.0}> {
  h = MatMul(x, w)
  total = ReduceMean<keepdims = 0>(x)
  c = Greater(total, zero)
  y = If(c) <
    then_branch = t () => (float[N, 8] a) { a = Relu(h) },
    else_branch = e () => (float[N, 8] z) { z = Neg(h) }
  >
}"""

_UNKNOWN_RANK = """g (float[N, 8] x, bool c) => (float y) {
  h = MatMul(x, w)
  r = If(c) <
    then_branch = t () => (float[N, 8] a) { a = Relu(h) },
    else_branch = e () => (float[M] z) { z = ReduceSum<keepdims = 0>(h, axis) }
  >
  y = ReduceMax<keepdims = 0>(r)
}"""

WB = {"w": W, "b": B}

CASES = [
    case("if_body/then", _IF_MATMUL, {"x": X, "c": YES}, weights=WB),
    case("if_body/else", _IF_MATMUL, {"x": X, "c": NO}, weights=WB),
    case("if_body/nested", _NESTED_IF, {"x": X, "c": YES, "d": YES}, weights=WB),
    case("if_body/condition_from_floats", _CONDITION_FROM_FLOATS, {"x": np.abs(X)}, weights={"w": W}),
    case("if_body/branches_of_two_ranks", _UNKNOWN_RANK, {"x": X, "c": NO}, weights={"w": W, "axis": np.array([0])}),
    case("if_body/opset_11", _IF_MATMUL, {"x": X, "c": YES}, opset=11, weights=WB),
    case("if_body/opset_21", _IF_MATMUL, {"x": X, "c": YES}, opset=21, weights=WB),
    case(
        "branch_initialisers/same_name_then",
        _IF_LOCAL_INITIALISERS,
        {"x": X[:, :4], "c": YES},
        notes="`k`, `p` and `o` exist once in each branch with different values",
    ),
    case("branch_initialisers/same_name_else", _IF_LOCAL_INITIALISERS, {"x": X[:, :4], "c": NO}),
    case("outer_scope/identity_branches", _OUTER_SCOPE_ONLY, {"x": X, "c": YES}, weights=WB),
    case("outer_scope/identity_of_graph_input", _OUTER_INPUT_AND_WEIGHT, {"x": X, "c": YES}, weights={"w": W}),
    case(
        "outer_scope/captured_at_two_depths",
        _CAPTURED_BY_TWO_DEPTHS,
        {"x": X, "c": YES},
        weights={"w": W},
        notes="`h` is a graph output, an If capture and a Loop's initial state",
    ),
    case("loop_body/float_state", _LOOP_STATE, {"x": X}, weights=WB),
    case("loop_body/float_state_opset_11", _LOOP_STATE, {"x": X}, opset=11, weights=WB),
    case("loop_body/scan_output_and_int_cast", _LOOP_SCAN_OUTPUT, {"x": X}, weights={"w": W}),
    case("loop_body/while", _LOOP_WHILE, {"x": np.full((1, 8), 0.1, np.float32)}),
    case(
        "loop_body/state_returned_untouched",
        _LOOP_CARRIED_THROUGH,
        {"x": X, "u": X[::-1].copy()},
        notes="a body input is a body output: a cast cannot sit on one of the two alone",
    ),
    case(
        "loop_body/states_swapped",
        _LOOP_SWAPPED,
        {"x": X, "u": X[::-1].copy()},
        weights={"w": W},
        notes="both states must agree on a dtype though only one is computed on",
    ),
    case("loop_body/scalar_accumulator", _LOOP_KEPT_STATE, {"x": X}, weights={"w": W}),
    case("loop_body/if_inside", _LOOP_WITH_IF, {"x": X}, weights={"w": W}),
    case("scan_body/float_state", _SCAN, {"s0": X[0], "xs": normal(5, 8)}, weights={"w": W}),
    case("scan_body/reversed_axes", _SCAN_REVERSED, {"s0": X[0], "xs": normal(8, 5)}, weights={"w": W}),
    case("scan_body/inside_if", _SCAN_IN_IF, {"s0": X[0], "xs": normal(5, 8), "c": YES}, weights={"w": W}),
    case("scan_body/opset_9", _SCAN, {"s0": X[0], "xs": normal(5, 8)}, opset=9, weights={"w": W}),
]

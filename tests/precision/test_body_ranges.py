"""Ranges inside If, Loop and Scan: those of numpy on the same values, and what a plan makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mpdeploy.body_ranges import measure_body_ranges
from mpdeploy.conversion import convert
from mpdeploy.data_files import FeedSet
from mpdeploy.emulated_runs import measure_ranges
from mpdeploy.errors import GateFailedError
from mpdeploy.precision.model_io import input_specs
from mpdeploy.precision.ranges import Ranges
from mpdeploy.precision.rewrite import prepare
from tests.precision.conformance import CASES
from tests.precision.conformance_base import normal, weight
from tests.precision.visible import FP16, graph

X = normal(3, 8, seed="body")
W = weight(8, 8)


def feed_set(model: ir.Model, *feeds: Mapping[str, Any]) -> FeedSet:
    return FeedSet(feeds, input_specs(model), frozenset())


def ranges_of(model: ir.Model, folder: Path, *feeds: Mapping[str, Any]) -> Ranges:
    found = measure_ranges(prepare(model, FP16), feed_set(model, *feeds), folder, FP16)
    assert not found.warnings
    return found


def assert_saw(ranges: Ranges, name: str, *arrays: np.ndarray) -> None:
    """A tensor held these arrays, over all turns and feeds."""
    stats, seen = ranges.tensors[name], np.concatenate([array.reshape(-1) for array in arrays])
    assert stats.count == seen.size
    assert stats.amax == pytest.approx(np.abs(seen).max(), rel=1e-5)
    assert stats.rms == pytest.approx(np.sqrt(np.mean(seen.astype(np.float64) ** 2)), rel=1e-5)


IF = """g (float[N, 8] x, bool c) => (float[N, 8] y) {
  h = MatMul(x, w)
  r = If(c) <
    then_branch = t () => (float[N, 8] a) { p = Mul(h, h)  a = Neg(p) },
    else_branch = e () => (float[N, 8] z) { q = Exp(h)  z = Add(q, x) }
  >
  y = Add(r, x)
}"""


def test_of_an_if_the_branch_that_each_feed_takes(tmp_path: Path) -> None:
    first, second = X, 2 * X
    then, other = {"x": first, "c": np.array(True)}, {"x": second, "c": np.array(False)}
    ranges = ranges_of(graph(IF, w=W), tmp_path, then, other)
    assert_saw(ranges, "p", (first @ W) ** 2)
    assert_saw(ranges, "a", -((first @ W) ** 2))
    assert_saw(ranges, "q", np.exp(second @ W))
    assert_saw(ranges, "z", np.exp(second @ W) + second)


def test_a_branch_that_no_feed_took_has_no_ranges(tmp_path: Path) -> None:
    ranges = ranges_of(graph(IF, w=W), tmp_path, {"x": X, "c": np.array(True)})
    assert "p" in ranges.tensors
    assert "q" not in ranges.tensors


LOOP = """g (float[N, 8] x, int64 trips) => (float[N, 8] y, float[K, N, 8] ys) <bool go = {1}> {
  h = Relu(x)
  y, ys = Loop(trips, go, x) <body = l (int64 i, bool ci, float[N, 8] s) => (bool co, float[N, 8] so, float[N, 8] each) {
    co = Identity(ci)
    f = Cast<to = 1>(i)
    m = MatMul(s, w)
    g = Add(m, h)
    so = Tanh(g)
    each = Mul(g, f)
  }>
}"""


def test_of_a_loop_every_turn(tmp_path: Path) -> None:
    feeds = [{"x": X, "trips": np.array(4)}, {"x": 3 * X[:2], "trips": np.array(2)}]
    sums, states, each, counters = [], [], [], []
    for feed in feeds:
        state = feed["x"]
        for turn in range(int(feed["trips"])):
            states.append(state)
            sums.append(state @ W + np.maximum(feed["x"], 0))
            state = np.tanh(sums[-1])
            each.append(sums[-1] * np.float32(turn))
            counters.append(np.array([turn], np.float32))
    ranges = ranges_of(graph(LOOP, w=W), tmp_path, *feeds)
    assert_saw(ranges, "g", *sums)
    assert_saw(ranges, "s", *states)
    assert_saw(ranges, "each", *each)
    assert_saw(ranges, "f", *counters)
    assert len(ranges.tensors["g"].feed_amax) == 2, "one largest value a feed, however many turns"


def test_a_while_loop_ends_where_its_condition_says(tmp_path: Path) -> None:
    text = """g (float[1, 8] x, bool go) => (float[1, 8] y) <float limit = {100.0}> {
      y = Loop(, go, x) <body = l (int64 i, bool ci, float[1, 8] s) => (bool co, float[1, 8] so) {
        so = Add(s, s)
        top = ReduceMax<keepdims = 0>(so)
        co = Less(top, limit)
      }>
    }"""
    ranges = ranges_of(graph(text), tmp_path, {"x": np.ones((1, 8), np.float32), "go": np.array(True)})
    assert ranges.tensors["so"].amax == 128
    assert ranges.tensors["so"].count == 7 * 8
    none = ranges_of(graph(text), tmp_path, {"x": np.ones((1, 8), np.float32), "go": np.array(False)})
    assert "so" not in none.tensors


SCAN = """g (float[8] z, float[8, 5] x, float[3, 8] v) => (float[8] y, float[3, 8] ys) {
  y, ys = Scan<num_scan_inputs = 2, scan_input_axes = [1, 0], scan_input_directions = [1, 0],
               body = body (float[8] si, float[8] xi, float[8] vi) => (float[8] so, float[8] yo) {
    t = Mul(xi, vi)
    so = Add(si, t)
    yo = Neg(so)
  }>(z, x, v)
}"""


def test_of_a_scan_every_slice_along_its_axis_and_backwards_where_it_says(tmp_path: Path) -> None:
    z, x, v = normal(8, seed="z"), normal(8, 3, seed="xs"), normal(3, 8, seed="v")
    products = [x[:, 2 - turn] * v[turn] for turn in range(3)]
    text = SCAN.replace("float[8, 5] x", "float[8, 3] x")
    ranges = ranges_of(graph(text), tmp_path, {"z": z, "x": x, "v": v})
    assert_saw(ranges, "t", *products)
    assert_saw(ranges, "so", *(z + sum(products[: turn + 1]) for turn in range(3)))
    assert_saw(ranges, "si", *(z + sum(products[:turn], np.zeros(8, np.float32)) for turn in range(3)))


def test_bodies_in_bodies_and_what_they_take_from_every_depth(tmp_path: Path) -> None:
    text = """g (float[2, 8] x) => (float[2, 8] y) <int64 trips = {3}, bool go = {1}, int64 one = {1}> {
      h = MatMul(x, w)
      y = Loop(trips, go, x) <body = l (int64 i, bool ci, float[2, 8] s) => (bool co, float[2, 8] so) {
        co = Identity(ci)
        k = Add(s, h)
        last = Greater(i, one)
        so = If(last) <
          then_branch = t () => (float[2, 8] a) { deep = Mul(k, h)  a = Add(deep, x) },
          else_branch = e () => (float[2, 8] z) { z = Mul(k, k) }
        >
      }>
    }"""
    x, h = X[:2], X[:2] @ W
    first = (x + h) ** 2
    second = (first + h) ** 2
    ranges = ranges_of(graph(text, w=W), tmp_path, {"x": x})
    assert_saw(ranges, "z", first, second)
    assert_saw(ranges, "deep", (second + h) * h)
    assert_saw(ranges, "a", (second + h) * h + x)


def test_a_loop_over_a_sequence(tmp_path: Path) -> None:
    text = """g (float[2, 8] x) => (float[M, 8] y) <int64 trips = {3}, bool go = {1}> {
      none = SequenceEmpty()
      all, end = Loop(trips, go, none, x) <body = l (int64 i, bool ci, seq(float[2, 8]) si, float[2, 8] h)
          => (bool co, seq(float[2, 8]) so, float[2, 8] ho) {
        co = Identity(ci)
        ho = Add(h, h)
        so = SequenceInsert(si, ho)
      }>
      y = ConcatFromSequence<axis = 0>(all)
    }"""
    x = X[:2]
    assert_saw(ranges_of(graph(text), tmp_path, {"x": x}), "ho", 2 * x, 4 * x, 8 * x)


def _with_bodies() -> list[str]:
    found = []
    for case in CASES.values():
        if any(attribute.HasField("g") for node in case.model.graph.node for attribute in node.attribute):
            fed = all(isinstance(array, np.ndarray) for array in case.feeds.values())
            found += [case.name] if fed and not case.refused_by_ort else []
    return found


@pytest.mark.parametrize("name", _with_bodies())
def test_every_conformance_graph_with_a_body_is_walked(name: str, tmp_path: Path) -> None:
    """Each body that ran left ranges of all its float tensors, and each owner ran one."""
    case = CASES[name]
    prepared = prepare(ir.from_proto(case.model), FP16)
    ranges = measure_ranges(prepared, feed_set(prepared.model, case.feeds), tmp_path, FP16)
    assert not ranges.warnings
    ran = 0
    for body in prepared.index.owner:
        made = [v for node in body for v in node.outputs if v.name and prepared.index.is_float(v)]
        made = [v for v in made if v.producer().op_type != "Constant"]
        seen = [v for v in made if v.name in ranges.tensors and ranges.tensors[v.name].count]
        assert len(seen) in (0, len(made))
        ran += bool(seen)
    assert ran


# -- what a plan makes of them ----------------------------------------------------------------------------------------------

BOOMS = """g (float[N, 8] x) => (float[N, 8] y) <int64 trips = {3}, bool go = {1}, float[1] big = {4096.0}, float[1] small = {0.00024414}> {
  y = Loop(trips, go, x) <body = l (int64 i, bool ci, float[N, 8] s) => (bool co, float[N, 8] so) {
    co = Identity(ci)
    wide = Mul(s, big)
    square = Mul(wide, wide)
    root = Sqrt(square)
    m = MatMul(root, w)
    t = Mul(m, small)
    so = Tanh(t)
  }>
}"""


def test_what_overflows_in_a_loop_stays_fp32_with_data_and_is_lost_without(tmp_path: Path) -> None:
    model = graph(BOOMS, w=W)
    ir.save(model, tmp_path / "m.onnx")
    done = convert(tmp_path / "m.onnx", data=feed_set(model, {"x": X}), output=tmp_path / "half.onnx")
    kept = {done.plan.ops[node_id]: str(why) for node_id, why in done.plan.kept.items()}
    assert "square reaches" in kept["Sqrt"]
    assert done.drift is not None
    assert done.drift.rel_l2 < 5e-3
    assert "MatMul" not in kept
    with pytest.raises(GateFailedError):
        convert(tmp_path / "m.onnx", data=feed_set(model, {"x": X}), use_ranges=False)


BRANCH = """g (float[N, 8] x, bool c) => (float[N, 8] y) <float[1] big = {100000.0}, float[1] small = {0.0001}> {
  h = MatMul(x, w)
  r = If(c) <
    then_branch = t () => (float[N, 8] a) { a = Mul(h, big) },
    else_branch = e () => (float[N, 8] z) { z = Neg(h) }
  >
  q = Mul(r, small)
  y = MatMul(q, w)
}"""


def test_the_output_of_an_if_that_overflows_is_fp32(tmp_path: Path) -> None:
    model = graph(BRANCH.replace("100000.0", "60000.0"), w=W)  # a constant that half holds: only ranges can tell
    ir.save(model, tmp_path / "m.onnx")
    x = np.abs(X) + 2
    done = convert(tmp_path / "m.onnx", data=feed_set(model, {"x": x, "c": np.array(True)}), output=tmp_path / "h.onnx")
    assert done.drift is not None
    assert done.drift.rel_l2 < 5e-3
    written = ir.load(tmp_path / "h.onnx")
    owner = next(node for node in written.graph if node.op_type == "If")
    assert {done.plan.ops[node_id] for node_id in done.plan.half_nodes} >= {"MatMul"}
    assert all(graph.as_graph().outputs[0].dtype == ir.DataType.FLOAT for graph in owner.attributes.values())


def test_what_cannot_be_walked_is_said_and_the_rest_is_measured(tmp_path: Path) -> None:
    """What an op of somebody's own does with its bodies is not known; the If beside it is walked."""
    text = """g (float[N, 8] x, bool c) => (float[N, 8] y, float[N, 8] z) {
      y = If(c) < then_branch = t () => (float[N, 8] a) { a = Exp(x) }, else_branch = e () => (float[N, 8] b) { b = Neg(x) } >
      z = If(c) < then_branch = t () => (float[N, 8] d) { k = Exp(x)  d = Neg(k) }, else_branch = e () => (float[N, 8] f) { f = Neg(x) } >
    }"""
    model = graph(text)
    prepared = prepare(model, FP16)
    odd = next(iter(prepared.model.graph))
    odd.op_type = "Odd"
    odd.domain = "com.example"
    feeds = feed_set(prepared.model, {"x": X, "c": np.array(True)})
    ranges = Ranges()
    warnings = measure_body_ranges(prepared.index, ranges, lambda names: None, lambda: iter(feeds), tmp_path)  # type: ignore[arg-type,return-value]
    assert len(warnings) == 1
    assert "com.example:Odd" in warnings[0]
    assert set(ranges.tensors) == {"k", "d"}

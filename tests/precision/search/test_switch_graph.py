"""The switchable emulation answers as the really rewritten and emulated model does, whatever is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mpdeploy.engines.onnxruntime import OrtRunner
from mpdeploy.precision.emulate import emulate
from mpdeploy.precision.engine_forms import FORMS
from mpdeploy.precision.flow import build_flow, shape_size
from mpdeploy.precision.plan import PrecisionPlan
from mpdeploy.precision.rewrite import prepare, rewrite
from mpdeploy.precision.search.switch_graph import FLAGS, build_switch_graph
from tests.precision.conformance_base import normal, weight
from tests.precision.visible import FP16, graph, named

X = normal(3, 8, seed="x")
GRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "a chain with moves": (
        "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  t = Transpose(h)  r = Transpose(t)  e = Exp(r)  y = MatMul(e, w) }",
        {"w": weight(8, 8)},
    ),
    "a residual stream": (
        "g (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, w)  b = Add(x, a)  m = ReduceMean <axes = [1]> (b)  c = Sub(b, m) "
        " d = Mul(c, c)  f = Add(d, k)  y = Add(b, f) }",
        {"w": weight(8, 8), "k": np.array([0.1], np.float32)},
    ),
    "a weight that is shared": (
        "g (float[N, 8] x) => (float[N, 8] y, float[N, 8] z) { y = MatMul(x, w)  z = MatMul(y, w) }",
        {"w": weight(8, 8)},
    ),
    "a tensor that is an output and goes on": (
        "g (float[N, 8] x) => (float[N, 8] h, float[N, 8] y) { h = MatMul(x, w)  y = Exp(h) }",
        {"w": weight(8, 8)},
    ),
    "a table that is looked up": (
        "g (float[N, 8] x, int64[M] i) => (float[M, 8] y) { g1 = Gather(w, i)  s = ReduceSum <keepdims = 1> (x)  y = Mul(g1, s) }",
        {"w": weight(8, 8)},
    ),
    "an If": (
        "g (float[N, 8] x, bool c) => (float[N, 8] y) { h = MatMul(x, w)"
        " o = If (c) <then_branch = t () => (float[N, 8] a) { a = Exp(h) }, else_branch = e () => (float[N, 8] b) { b = Mul(h, h) }>"
        " y = Add(o, x) }",
        {"w": weight(8, 8)},
    ),
}
WHOLE = "e = Exp(h) y = MatMul(e, w) }"
TAKEN_APART: dict[str, tuple[str, int, dict[str, Any]]] = {
    "a LayerNormalization": (
        "g (float[N, 8] x) => (float[N, 8] y) { h = LayerNormalization(x, s, b)  " + WHOLE,
        17,
        {"w": weight(8, 8), "s": normal(8, seed="s"), "b": normal(8, seed="b")},
    ),
    "one without a bias, whose pieces meet an output": (
        "g (float[N, 8] x) => (float[N, 8] h) { a = MatMul(x, w)  h = LayerNormalization(a, s) }",
        17,
        {"w": weight(8, 8), "s": normal(8, seed="s")},
    ),
    "one in a body": (
        "g (float[N, 8] x, bool c) => (float[N, 8] y) { o = If (c)"
        " <then_branch = t () => (float[N, 8] a) { a = LayerNormalization(x, s, b) }, else_branch = e () => (float[N, 8] q) { q = Mul(x, x) }>"
        " y = Add(o, x) }",
        17,
        {"s": normal(8, seed="s"), "b": normal(8, seed="b")},
    ),
    "an RMSNormalization": (
        "g (float[N, 8] x) => (float[N, 8] y) { h = RMSNormalization(x, s)  " + WHOLE,
        23,
        {"w": weight(8, 8), "s": normal(8, seed="s")},
    ),
    "a LogSoftmax": ("g (float[N, 8] x) => (float[N, 8] y) { h = LogSoftmax(x)  " + WHOLE, 17, {"w": weight(8, 8)}),
    "sums": (
        "g (float[N, 8] x) => (float[N, 1] y) { q = ReduceSumSquare(x, axes)  l = ReduceLogSumExp(x, axes)  y = Mul(q, l) }",
        18,
        {"axes": np.array([1])},
    ),
    "a Mish": ("g (float[N, 8] x) => (float[N, 8] y) { h = Mish(x)  " + WHOLE, 20, {"w": weight(8, 8)}),
}
FEEDS = {"x": X, "i": np.array([0, 3, 5]), "c": np.array(True)}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_switched_plan_is_the_rewritten_plan(name: str, tmp_path: Path) -> None:
    text, weights = GRAPHS[name]
    prepared = prepare(named(graph(text, **weights)), FP16)
    flow = build_flow(prepared.index, FP16, is_fixed=lambda _: False, float_io=lambda _: False, size_of=shape_size)
    switched = build_switch_graph(prepared.model, FP16, flow)
    ir.save(switched.model, tmp_path / "switched.onnx")
    feeds = {value.name: FEEDS[value.name] for value in prepared.model.graph.inputs}
    free = [unit.key for unit in flow.units if not unit.fixed]
    rng = np.random.default_rng(0)
    with OrtRunner(tmp_path / "switched.onnx", optimise=False) as runner:
        for trial in range(16):
            half = frozenset(free if trial == 0 else [] if trial == 1 else [k for k in free if rng.random() < 0.5])
            plan = PrecisionPlan(FP16, half, {}, {})
            ir.save(emulate(rewrite(prepared, plan)), tmp_path / "emulated.onnx")
            with OrtRunner(tmp_path / "emulated.onnx", optimise=False) as emulated:
                expected = emulated.infer(feeds)
            found = runner.infer({**feeds, FLAGS: switched.flags(half)})
            for output, array in expected.items():
                np.testing.assert_array_equal(found[output], array, err_msg=f"{sorted(half)}")


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        (name, engine)
        for name, (text, _, _) in TAKEN_APART.items()
        for engine, forms in FORMS.items()
        if all(form.holds_in_fp32 for op, form in forms.items() if f"{op}(" in text)
    ],
)
def test_what_an_engine_takes_apart_is_switched_as_a_whole(name: str, engine: str, tmp_path: Path) -> None:
    """Bit for bit where the op is half; kept in FP32 its pieces may differ in the last bit, which may turn a rounding behind it."""
    text, opset, weights = TAKEN_APART[name]
    prepared = prepare(named(graph(text, opset, **weights)), FP16)
    flow = build_flow(prepared.index, FP16, is_fixed=lambda _: False, float_io=lambda _: False, size_of=shape_size)
    switched = build_switch_graph(prepared.model, FP16, flow, engine)
    ir.save(switched.model, tmp_path / "switched.onnx")
    feeds = {value.name: FEEDS[value.name] for value in prepared.model.graph.inputs}
    free = [unit.key for unit in flow.units if not unit.fixed]
    apart = {key for key, node in prepared.index.nodes.items() if node.op_type in FORMS[engine]}
    assert {key for switch in switched.switches for key in switch.needs} <= set(free)
    assert len({switch.name for switch in switched.switches}) == len(switched.switches)
    with OrtRunner(tmp_path / "switched.onnx", optimise=False) as runner:
        for kept in (set(), *({key} for key in free), set(free)):
            half = frozenset(free) - kept
            ir.save(emulate(rewrite(prepared, PrecisionPlan(FP16, half, {}, {})), engine=engine), tmp_path / "e.onnx")
            with OrtRunner(tmp_path / "e.onnx", optimise=False) as emulated:
                expected = emulated.infer(feeds)
            found = runner.infer({**feeds, FLAGS: switched.flags(half)})
            for output, array in expected.items():
                if apart <= half:
                    np.testing.assert_array_equal(found[output], array, err_msg=f"{kept}")
                else:
                    np.testing.assert_allclose(found[output], array, rtol=2**-10, err_msg=f"{kept}")


def test_the_model_given_stays_as_it_is() -> None:
    text, weights = GRAPHS["a residual stream"]
    prepared = prepare(named(graph(text, **weights)), FP16)
    before = ir.to_proto(prepared.model).SerializeToString()
    flow = build_flow(prepared.index, FP16, is_fixed=lambda _: False, float_io=lambda _: False, size_of=shape_size)
    build_switch_graph(prepared.model, FP16, flow)
    assert ir.to_proto(prepared.model).SerializeToString() == before


def test_a_switch_says_which_units_it_needs() -> None:
    text, weights = GRAPHS["a chain with moves"]
    prepared = prepare(named(graph(text, **weights)), FP16)
    flow = build_flow(prepared.index, FP16, is_fixed=lambda _: False, float_io=lambda _: False, size_of=shape_size)
    switches = {s.name: set(s.needs) for s in build_switch_graph(prepared.model, FP16, flow).switches}
    assert switches["r -> e"] == {"h", "t", "r", "e"}
    assert switches["e -> y"] == {"e", "y"}
    assert switches["constants of h"] == {"h"}
    assert switches["y -> output y"] == {"y", "output:y"}

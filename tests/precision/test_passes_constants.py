"""The passes that touch constants: clamped masks, half constants, type attributes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mpdeploy.precision.emulate import emulate
from mpdeploy.precision.passes.clamp_masks import CLAMPED, ClampMasksPass
from mpdeploy.precision.passes.convert_constants import ConvertConstantsPass, half_tensor
from mpdeploy.precision.passes.retype_attributes import RetypeAttributesPass
from tests.precision.visible import (
    BF16,
    FLOAT16,
    FP16,
    W,
    X,
    assigned,
    converted,
    graph,
    rel_l2,
    run,
    snapshot,
)  # fmt: skip

LOWEST = np.float32(-3.4028235e38)
MASKED = "g (float[N, 8] x, bool[N, 8] keep) => (float[N, 8] y) { s = Where(keep, x, low)  y = Softmax(s) }"
ROWS = np.array([[True] * 8, [True] * 5 + [False] * 3, [False] * 8])


# ---- ClampMasksPass


@pytest.mark.parametrize("low", [LOWEST, np.float32(-1e9), np.float32(-70000)])
def test_a_mask_constant_before_softmax_is_clamped_and_listed(low: np.float32) -> None:
    model = graph(MASKED, low=low)
    clamp = ClampMasksPass(FP16)
    clamp(model)
    assert model.graph.initializers["low"].const_value.numpy() == CLAMPED["fp16"]
    assert clamp.clamped == [f"low: {float(low):.3g} clamped to -30000 (an additive mask before Softmax)"]


def test_a_mask_made_by_a_constant_node_and_added_is_clamped() -> None:
    model = graph(
        """g (float[N, 8] x, float[N, 8] pad) => (float[N, 8] y) {
          low = Constant<value = float {-3.4e38}>()  m = Mul(pad, low)  s = Add(x, m)  y = Softmax(s) }"""
    )
    assert ClampMasksPass(FP16)(model).modified
    assert model.graph[0].attributes["value"].as_tensor().numpy() == CLAMPED["fp16"]


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N, 8] x, bool[N, 8] keep) => (float[N, 8] y) { y = Where(keep, x, low) }",
        "g (float[N, 8] x, bool[N, 8] keep) => (float[N, 8] y) { s = Where(keep, x, low)  y = Relu(s) }",
        "g (float[N, 8] x, bool[N, 8] keep) => (float[N, 8] y, float[N, 8] s) { s = Where(keep, x, low)  y = Softmax(s) }",
        "g (float[N, 8] x) => (float[N, 8] y) { s = Sub(x, low)  y = Softmax(s) }",
    ],
    ids=["to an output", "to Relu", "to Softmax and an output", "subtracted"],
)
def test_a_constant_that_is_no_mask_keeps_its_value(text: str) -> None:
    model = graph(text, low=LOWEST)
    before = snapshot(model)
    assert not ClampMasksPass(FP16)(model).modified
    assert snapshot(model) == before


def test_data_beside_the_sentinels_is_never_clamped() -> None:
    model = graph(MASKED, low=np.array([LOWEST, -7.5, 0, 0, 0, 0, 0, 0], np.float32))
    assert not ClampMasksPass(FP16)(model).modified


def test_bf16_holds_every_mask_but_the_lowest_float_itself() -> None:
    assert not ClampMasksPass(BF16)(graph(MASKED, low=np.float32(-1e30))).modified
    model = graph(MASKED, low=LOWEST)
    assert ClampMasksPass(BF16)(model).modified
    assert model.graph.initializers["low"].const_value.numpy() == np.float32(CLAMPED["bf16"])


def test_clamping_twice_equals_once_and_the_second_time_modifies_nothing() -> None:
    model = graph(MASKED, low=LOWEST)
    assert ClampMasksPass(FP16)(model).modified
    once = snapshot(model)
    assert not ClampMasksPass(FP16)(model).modified
    assert snapshot(model) == once


def test_clamping_changes_no_answer_even_where_a_whole_row_is_masked() -> None:
    feeds = {"x": 50 * X, "keep": ROWS}
    expected = run(graph(MASKED, low=LOWEST), feeds)[0]
    model = graph(MASKED, low=LOWEST)
    ClampMasksPass(FP16)(model)
    np.testing.assert_array_equal(run(model, feeds)[0], expected)
    np.testing.assert_array_equal(expected[2], np.full(8, 0.125, np.float32))


def test_without_the_clamp_half_precision_gives_nan_there() -> None:
    """The positive control: this is what the pass is for."""
    naive = graph(
        "g (float16[N, 8] x, bool[N, 8] keep) => (float16[N, 8] y) { s = Where(keep, x, low)  y = Softmax(s) }",
        low=np.array(-np.inf, np.float16),
    )
    answer = run(emulate(naive), {"x": X, "keep": ROWS})[0]
    assert np.isnan(answer[2]).all()
    done = converted(graph(MASKED, low=LOWEST))
    assert np.isfinite(done.emulated({"x": X, "keep": ROWS})[0]).all()
    assert "y" not in done.plan.kept


# ---- ConvertConstantsPass

SHARED = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  c = CumSum(w, axis)  y = MatMul(h, c) }"


def test_a_constant_that_only_half_nodes_use_is_converted_in_place() -> None:
    model, ask = assigned(graph("g (float[N, 8] x) => (float[N, 8] y) { y = MatMul(x, w) }", w=W))
    assert ConvertConstantsPass(ask)(model).modified
    assert list(model.graph.initializers) == ["w"]
    assert model.graph.initializers["w"].const_value.dtype == FLOAT16


def test_a_constant_that_both_precisions_use_gets_one_copy_more() -> None:
    model, ask = assigned(graph(SHARED, w=W, axis=np.int64(0)))
    assert ConvertConstantsPass(ask)(model).modified
    held = {name: value.const_value.dtype.name for name, value in model.graph.initializers.items()}
    assert held == {"w": "FLOAT", "axis": "INT64", "w_float16": "FLOAT16"}
    assert [v.name for v in model.graph[0].inputs] == ["x", "w_float16"]
    assert [v.name for v in model.graph[1].inputs] == ["w", "axis"]


def test_a_shared_constant_node_gets_a_twin() -> None:
    model, ask = assigned(
        graph(
            """g (float[N, 8] x) => (float[N, 8] y) {
              k = Constant<value = float[1] {0.5}>()  h = Mul(x, k)  r = CumSum(k, axis)  y = Mul(h, r) }""",
            axis=np.int64(0),
        ),
    )  # fmt: skip
    assert ConvertConstantsPass(ask)(model).modified
    twins = [node.outputs[0].name for node in model.graph if node.op_type == "Constant"]
    assert twins == ["k", "k_float16"]


def test_a_constant_that_no_half_node_uses_is_left_alone() -> None:
    model, ask = assigned(graph("g (float[N, 8] x) => (float[N, 8] y) { y = MatMul(x, w) }", w=W), keep=["op:MatMul"])
    before = snapshot(model)
    assert not ConvertConstantsPass(ask)(model).modified
    assert snapshot(model) == before


def test_a_constant_that_is_a_graph_output_stays_as_it_is_declared() -> None:
    model, ask = assigned(graph("g (float[N, 8] x) => (float[N, 8] y, float[8, 8] w) { y = MatMul(x, w) }", w=W))
    ConvertConstantsPass(ask)(model)
    assert model.graph.initializers["w"].const_value.dtype == ir.DataType.FLOAT


def test_converting_constants_twice_equals_once() -> None:
    model, ask = assigned(graph(SHARED, w=W, axis=np.int64(0)))
    assert ConvertConstantsPass(ask)(model).modified
    once = snapshot(model)
    assert not ConvertConstantsPass(ask)(model).modified
    assert snapshot(model) == once


def test_constants_round_to_nearest_even_and_lose_at_most_half_a_unit() -> None:
    values = np.linspace(-4, 4, 4001, dtype=np.float32)
    made = half_tensor(ir.tensor(values), FP16, "w").numpy()
    np.testing.assert_array_equal(made, values.astype(np.float16))
    nonzero = np.abs(values) > FP16.min_normal
    error = np.abs(made.astype(np.float64) - values)[nonzero] / np.abs(values[nonzero])
    assert error.max() <= 2.0**-11
    assert error.max() > 2.0**-12, "a truncating or an exact conversion would pass the limit above as well"


def test_a_clip_bound_beyond_the_range_saturates_and_keeps_its_sign() -> None:
    made = half_tensor(ir.tensor(np.array([3e38, -3e38, 1.5], np.float32)), FP16, "bound").numpy()
    assert made.tolist() == [65504.0, -65504.0, 1.5]


# ---- RetypeAttributesPass


def _retyped(text: str, node: str, **weights: object) -> ir.Node:
    model, ask = assigned(graph(text, **weights))
    assert RetypeAttributesPass(ask)(model).modified
    return next(each for each in model.graph if each.outputs[0].name == node)


def test_a_cast_from_integers_makes_half() -> None:
    text = "g (int64[N, 8] i) => (float[N, 8] y) { f = Cast<to = 1>(i)  y = MatMul(f, w) }"
    assert _retyped(text, "f", w=W).attributes.get_int("to") == int(FLOAT16)


def test_constant_of_shape_fills_with_half_also_where_the_fill_is_the_default() -> None:
    text = (
        "g (float[N, 8] x) => (float[N, 8] y) { s = Shape(x)  z = ConstantOfShape(s)  a = Add(x, z)  y = MatMul(a, w) }"
    )
    fill = _retyped(text, "z", w=W).attributes["value"].as_tensor()
    assert (fill.dtype, fill.numpy().tolist()) == (FLOAT16, [0.0])


def test_a_cast_to_integers_keeps_its_attribute() -> None:
    model, ask = assigned(graph("g (float[N, 8] x) => (int64[N, 8] i) { h = MatMul(x, w)  i = Cast<to = 7>(h) }", w=W))
    assert not RetypeAttributesPass(ask)(model).modified
    assert model.graph[1].attributes.get_int("to") == 7


def test_a_kept_cast_keeps_its_attribute() -> None:
    text = "g (int64[N, 8] i) => (float[N, 8] y) { f = Cast<to = 1>(i)  y = Tanh(f) }"
    model, ask = assigned(graph(text), keep=["op:*"])
    before = snapshot(model)
    assert not RetypeAttributesPass(ask)(model).modified
    assert snapshot(model) == before


def test_retyping_twice_equals_once_and_the_second_time_modifies_nothing() -> None:
    text = "g (int64[N, 8] i, int64[K] s) => (float[N, 8] y) { f = Cast<to = 1>(i)  z = ConstantOfShape(s)  a = Add(f, z)  y = MatMul(a, w) }"
    model, ask = assigned(graph(text, w=W))
    assert RetypeAttributesPass(ask)(model).modified
    once = snapshot(model)
    assert not RetypeAttributesPass(ask)(model).modified
    assert snapshot(model) == once


def test_integers_cast_to_half_answer_as_before_up_to_half_rounding() -> None:
    text = "g (int64[N, 8] i) => (float[N, 8] y) { f = Cast<to = 1>(i)  y = MatMul(f, w) }"
    feeds = {"i": np.arange(24).reshape(3, 8)}
    expected = run(graph(text, w=W), feeds)[0]
    found = converted(graph(text, w=W), keep_io=True).emulated(feeds)[0]
    assert 1e-6 < rel_l2(found, expected) < 1e-3

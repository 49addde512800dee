"""The passes that touch types, names and casts."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.passes.declare_types import DeclareTypesPass
from mpdeploy.precision.passes.insert_casts import InsertCastsPass
from mpdeploy.precision.passes.name_values import NameValuesPass
from mpdeploy.precision.passes.raise_opset import RaiseOpsetPass, needs_raise
from mpdeploy.precision.passes.refresh_shapes import RefreshShapesPass
from mpdeploy.precision.passes.remove_casts import RemoveNoOpCastsPass
from tests.precision.conformance_base import floats, graph_model, normal
from tests.precision.visible import (
    BF16,
    CHAIN,
    FLOAT,
    FLOAT16,
    FP16,
    W,
    X,
    assigned,
    converted,
    graph,
    lines,
    named,
    rel_l2,
    run,
    snapshot,
)  # fmt: skip

# ---- InsertCastsPass


def test_a_tensor_that_crosses_into_a_kept_node_is_cast_once_and_back_once() -> None:
    model, ask = assigned(named(graph(CHAIN, w=W)), keep=["e"])
    assert InsertCastsPass(ask)(model).modified
    assert lines(model) == [
        "h = MatMul(x, w)",
        "h_to_float = Cast<FLOAT>(h)",
        "e = Exp(h_to_float)",
        "e_to_float16 = Cast<FLOAT16>(e)",
        "y = MatMul(e_to_float16, w)",
    ]


def test_three_kept_consumers_share_one_cast() -> None:
    text = """g (float[N, 8] x) => (float[N, 8] y) {
      h = MatMul(x, w)  a = Exp(h)  b = Tanh(h)  c = Add(a, b)  d = Mul(c, h)  y = MatMul(d, w) }"""
    model, ask = assigned(named(graph(text, w=W)), keep=["a", "b", "c", "d"])
    InsertCastsPass(ask)(model)
    assert [line for line in lines(model) if "Cast" in line and "(h)" in line] == ["h_to_float = Cast<FLOAT>(h)"]


def test_a_body_shares_the_cast_of_the_outer_tensor_it_captures() -> None:
    text = """g (float[N, 8] x, bool c) => (float[N, 8] y) {
      h = MatMul(x, w)
      t = Exp(h)
      i = If(c) < then_branch = a () => (float[N, 8] p) { p = Exp(h) }, else_branch = b () => (float[N, 8] q) { q = Tanh(h) } >
      s = Add(t, i)
      y = MatMul(s, w)
    }"""
    model, ask = assigned(graph(text, w=W), keep=["op:Exp", "op:Tanh"])
    InsertCastsPass(ask)(model)
    made = [line for line in lines(model) if "Cast<FLOAT>(h)" in line]
    assert made == ["h_to_float = Cast<FLOAT>(h)"], lines(model)


def test_an_output_kept_in_fp32_keeps_its_name_and_the_tensor_before_it_is_renamed() -> None:
    model, ask = assigned(graph(CHAIN, w=W), float_io=["y"])
    InsertCastsPass(ask)(model)
    assert lines(model)[-2:] == ["y_before_cast = MatMul(e, w)", "y = Cast<FLOAT>(y_before_cast)"]
    assert [(v.name, v.dtype) for v in model.graph.outputs] == [("y", FLOAT)]


def test_an_input_that_becomes_half_is_retyped_without_a_cast() -> None:
    model, ask = assigned(graph(CHAIN, w=W))
    assert InsertCastsPass(ask)(model).modified
    assert model.graph.inputs[0].dtype == FLOAT16
    assert not any("Cast" in line for line in lines(model))


def test_where_nothing_is_half_no_cast_is_inserted() -> None:
    model, ask = assigned(graph(CHAIN, w=W), keep=["*"])
    before = snapshot(model)
    assert not InsertCastsPass(ask)(model).modified
    assert snapshot(model) == before


def test_inserting_twice_equals_once_and_the_second_time_modifies_nothing() -> None:
    model, ask = assigned(named(graph(CHAIN, w=W)), keep=["e"], float_io=["x", "y"])
    assert InsertCastsPass(ask)(model).modified
    once = snapshot(model)
    assert not InsertCastsPass(ask)(model).modified
    assert snapshot(model) == once


def test_casts_change_the_answer_by_half_rounding_and_no_more() -> None:
    expected = run(graph(CHAIN, w=W), {"x": X})[0]
    found = converted(named(graph(CHAIN, w=W)), keep=["e"], keep_io=True).emulated({"x": X})[0]
    assert 1e-5 < rel_l2(found, expected) < 2e-3


def test_names_a_cast_would_take_may_be_taken() -> None:
    text = """g (float[N, 8] x) => (float[N, 8] y) {
      h = MatMul(x, w)  h_to_float = Exp(h)  e_to_float16 = MatMul(h_to_float, w)  y = Exp(e_to_float16) }"""
    model = named(graph(text, w=W))
    expected = run(model, {"x": 0.1 * X})[0]
    done = converted(model, keep=["h_to_float", "y"], keep_io=True)
    made = [v.name for node in done.model.graph for v in node.outputs]
    assert len(made) == len(set(made)), made
    nodes = [node.name for node in done.model.graph if node.name]
    assert len(nodes) == len(set(nodes)), nodes
    assert rel_l2(done.emulated({"x": 0.1 * X})[0], expected) < 5e-3


# ---- RemoveNoOpCastsPass


@pytest.mark.parametrize(
    ("text", "after"),
    [
        (
            "g (float[N, 8] x) => (float[N, 8] y) { a = Cast<to = 1>(x)  y = Relu(a) }",
            ["y = Relu(x)"],
        ),
        (
            "g (float16[N, 8] x) => (float16[N, 8] y) { a = Cast<to = 1>(x)  b = Cast<to = 10>(a)  y = Relu(b) }",
            ["y = Relu(x)"],
        ),
        (
            "g (bfloat16[N, 8] x) => (bfloat16[N, 8] y) { a = Cast<to = 11>(x)  b = Cast<to = 16>(a)  y = Neg(b) }",
            ["y = Neg(x)"],
        ),
        (
            """g (float16[N, 8] x) => (float16[N, 8] y, float[N, 8] z) {
              a = Cast<to = 1>(x)  b = Cast<to = 10>(a)  y = Relu(b)  z = Relu(a) }""",
            ["a = Cast<FLOAT>(x)", "y = Relu(x)", "z = Relu(a)"],
        ),
    ],
    ids=["to its own type", "there and back", "there and back, bf16 over double", "the first is used elsewhere"],
)
def test_a_cast_that_changes_no_value_is_removed(text: str, after: list[str]) -> None:
    model = graph(text)
    assert RemoveNoOpCastsPass()(model).modified
    assert lines(model) == after


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N, 8] x) => (float[N, 8] y) { a = Cast<to = 10>(x)  b = Cast<to = 1>(a)  y = Relu(b) }",
        "g (float16[N, 8] x) => (bfloat16[N, 8] y) { a = Cast<to = 1>(x)  b = Cast<to = 16>(a)  y = Neg(b) }",
        "g (float16[N, 8] x) => (float16[N, 8] y) { a = Cast<to = 7>(x)  b = Cast<to = 10>(a)  y = Relu(b) }",
        "g (float[N, 8] x) => (float[N, 8] y) { a = Relu(x)  y = Cast<to = 1>(a) }",
        "g (float[N, 8] x) => (float[N, 8] y) { y = Relu(x) }",
    ],
    ids=["it rounds", "other half", "it truncates", "it makes an output", "no cast"],
)
def test_a_cast_that_does_something_stays(text: str) -> None:
    model = graph(text)
    before = snapshot(model)
    assert not RemoveNoOpCastsPass()(model).modified
    assert snapshot(model) == before


def test_removing_twice_equals_once() -> None:
    text = "g (float16[N, 8] x) => (float16[N, 8] y) { a = Cast<to = 1>(x)  b = Cast<to = 10>(a)  y = Relu(b) }"
    model = graph(text)
    RemoveNoOpCastsPass()(model)
    once = snapshot(model)
    assert not RemoveNoOpCastsPass()(model).modified
    assert snapshot(model) == once


def test_removing_casts_changes_no_bit_of_the_answer() -> None:
    text = """g (float[N, 8] x) => (float[N, 8] y) { h = Cast<to = 10>(x)
      a = Cast<to = 1>(h)  b = Cast<to = 10>(a)  r = Relu(b)  c = Cast<to = 1>(r)  y = Mul(c, c) }"""
    model = graph(text)
    before = ReferenceEvaluator(ir.to_proto(model))  # ONNX Runtime's CPU provider would drop casts of its own accord
    RemoveNoOpCastsPass()(model)
    after = ReferenceEvaluator(ir.to_proto(model))
    (expected,), (found,) = before.run(None, {"x": 100 * X}), after.run(None, {"x": 100 * X})
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, np.maximum(100 * X, 0) ** 2), "the rounding is still there"


# ---- DeclareTypesPass


def _stale() -> ir.Model:
    model = graph(CHAIN, w=W)
    model.graph[0].outputs[0].type = ir.TensorType(FLOAT16)
    model.graph[1].outputs[0].type = None
    return model


def test_a_declared_type_that_is_stale_or_missing_is_replaced() -> None:
    model = _stale()
    assert DeclareTypesPass()(model).modified
    assert [node.outputs[0].dtype for node in model.graph] == [FLOAT] * 3


def test_right_declarations_and_containers_are_left_alone() -> None:
    model = graph(
        """g (float[N, 8] x) => (float[N, 8] y) <seq(float[N, 8]) s, float[N, 8] h> {
          s = SequenceConstruct(x, x)  h = SequenceAt(s, zero)  y = Relu(h) }""",
        zero=np.int64(0),
    )
    before = snapshot(model)
    assert not DeclareTypesPass()(model).modified
    assert snapshot(model) == before


def test_declaring_twice_equals_once() -> None:
    model = _stale()
    DeclareTypesPass()(model)
    once = snapshot(model)
    assert not DeclareTypesPass()(model).modified
    assert snapshot(model) == once


def test_a_file_that_ort_refuses_for_its_declared_types_runs_after_they_are_redone() -> None:
    stale = _stale()
    with pytest.raises(Exception, match="Type"):
        run(stale, {"x": X})
    DeclareTypesPass()(stale)
    np.testing.assert_array_equal(run(stale, {"x": X})[0], run(graph(CHAIN, w=W), {"x": X})[0])


# ---- NameValuesPass


def _nameless() -> ir.Model:
    model = graph(CHAIN, w=W)
    model.graph[0].outputs[0].name = None
    return model


def test_a_used_value_without_a_name_gets_one() -> None:
    model = _nameless()
    assert NameValuesPass()(model).modified
    assert lines(model)[:2] == ["unnamed_0 = MatMul(x, w)", "e = Exp(unnamed_0)"]


def test_branches_that_share_a_name_get_two() -> None:
    model = graph(
        """g (float[N, 8] x, bool c) => (float[N, 8] y) { y = If(c) <
          then_branch = a () => (float[N, 8] o) { o = Exp(x) }, else_branch = b () => (float[N, 8] o) { o = Tanh(x) } > }"""
    )
    assert NameValuesPass()(model).modified
    assert lines(model) == ["y = If(c)", "  o = Exp(x)", "  o#2 = Tanh(x)"]


def test_the_second_node_of_a_name_gets_a_number_and_unnamed_ones_stay_unnamed() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="op"),
        helper.make_node("Relu", ["a"], ["b"], name="op"),
        helper.make_node("Relu", ["b"], ["c"], name="op#2"),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    model = ir.from_proto(graph_model(nodes, [floats("x", "N", 8)], [floats("y", "N", 8)]))
    assert NameValuesPass()(model).modified
    assert [node.name or "" for node in model.graph] == ["op", "op#3", "op#2", ""]


def test_unique_names_and_an_optional_output_that_nobody_asked_for_are_left_alone() -> None:
    model = graph("g (float[N, 8] x) => (int64[N, 1] i) { , i = TopK(x, k) }", k=np.array([1]))
    before = snapshot(model)
    assert not NameValuesPass()(model).modified
    assert snapshot(model) == before


def test_naming_twice_equals_once() -> None:
    model = _nameless()
    NameValuesPass()(model)
    once = snapshot(model)
    assert not NameValuesPass()(model).modified
    assert snapshot(model) == once


def test_naming_changes_no_answer() -> None:
    model = _nameless()
    NameValuesPass()(model)
    np.testing.assert_array_equal(run(model, {"x": X})[0], run(graph(CHAIN, w=W), {"x": X})[0])


# ---- RaiseOpsetPass

CONV = "g (float[N, 3, 6, 6] x) => (float[N, 4, 2, 2] y) { h = Conv(x, w)  y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(h) }"
KERNEL = normal(4, 3, 3, 3, scale=0.2)
IMAGES = normal(2, 3, 6, 6)


def test_conv_admits_bf16_from_opset_22_only_and_the_model_is_raised() -> None:
    model = graph(CONV, 17, w=KERNEL)
    assert needs_raise(GraphIndex.of(model), BF16) == ["Conv", "MaxPool"]
    assert RaiseOpsetPass()(model).modified
    assert model.graph.opset_imports[""] == 22
    assert needs_raise(GraphIndex.of(model), BF16) == []


def test_the_opset_is_raised_only_where_it_must_be() -> None:
    assert needs_raise(GraphIndex.of(graph(CONV, 17, w=KERNEL)), FP16) == []
    assert needs_raise(GraphIndex.of(graph(CHAIN, 17, w=W)), BF16) == []
    assert converted(graph(CHAIN, 17, w=W), BF16).model.graph.opset_imports[""] == 17
    assert converted(graph(CONV, 9, w=KERNEL), FP16).model.graph.opset_imports[""] == 9


def test_a_raise_is_said() -> None:
    done = converted(graph(CONV, 17, w=KERNEL), BF16)
    assert done.plan.notes == ("opset raised from 17 to 22: Conv, MaxPool admit bf16 there",)
    assert len(done.half) == 2


def test_raising_twice_equals_once() -> None:
    model = graph(CONV, 17, w=KERNEL)
    RaiseOpsetPass()(model)
    once = snapshot(model)
    assert not RaiseOpsetPass()(model).modified
    assert snapshot(model) == once


def test_raising_changes_no_answer() -> None:
    model = graph(CONV, 17, w=KERNEL)
    RaiseOpsetPass()(model)
    model.graph.opset_imports[""] = 21  # ONNX Runtime's kernels; 22 widened type constraints only
    np.testing.assert_allclose(
        run(model, {"x": IMAGES})[0], run(graph(CONV, 17, w=KERNEL), {"x": IMAGES})[0], rtol=1e-6
    )


# ---- RefreshShapesPass


def _wrong_shape() -> ir.Model:
    model = graph(CHAIN, w=W)
    model.graph[0].outputs[0].shape = ir.Shape([7, 9])
    return model


def test_a_stale_shape_is_replaced_by_the_inferred_one() -> None:
    model = _wrong_shape()
    assert RefreshShapesPass()(model).modified
    assert [str(node.outputs[0].shape) for node in model.graph] == ["[N,8]"] * 3


def test_shapes_in_bodies_are_inferred_too() -> None:
    model = graph(
        """g (float[N, 8] x, bool c) => (float[N, 8] y) { y = If(c) <
          then_branch = a () => (float[N, 8] o) { i = Exp(x) o = Neg(i) }, else_branch = b () => (float[N, 8] p) { p = Tanh(x) } > }"""
    )
    RefreshShapesPass()(model)
    body = model.graph[0].attributes["then_branch"].as_graph()
    assert str(body[0].outputs[0].shape) == "[N,8]"


def test_what_an_unknown_op_declares_and_what_the_caller_sees_is_left_alone() -> None:
    model = graph(
        "g (float[N, 8] x) => (float[M, 8] y) <float[3, 8] h> { h = com.example.Odd(x)  y = Relu(h) }",
        domains={"com.example": 1},
    )
    RefreshShapesPass()(model)
    assert str(model.graph[0].outputs[0].shape) == "[3,8]"
    assert str(model.graph.outputs[0].shape) == "[M,8]"


def test_refreshing_twice_equals_once_and_the_second_time_modifies_nothing() -> None:
    model = _wrong_shape()
    assert RefreshShapesPass()(model).modified
    once = snapshot(model)
    assert not RefreshShapesPass()(model).modified
    assert snapshot(model) == once


def test_refreshing_keeps_big_constants_and_changes_no_answer() -> None:
    model = graph(CHAIN, w=W)
    model.graph[0].outputs[0].shape = ir.Shape([None, 8])
    big = normal(8, 64 * 8)
    wide = graph("g (float[N, 8] x) => (float[N, 512] y) { y = MatMul(x, w) }", w=big)
    RefreshShapesPass()(wide)
    assert list(wide.graph.initializers) == ["w"]
    assert [v.name for v in wide.graph.inputs] == ["x"]
    np.testing.assert_array_equal(run(wide, {"x": X})[0], X @ big)

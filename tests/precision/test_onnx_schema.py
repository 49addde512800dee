"""What the ONNX schemas admit, read from onnx.defs."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from mpdeploy.precision.flow import half_ports
from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.schema import signature
from tests.precision.visible import BF16, BFLOAT16, FLOAT16, FP16, graph


def test_an_op_that_onnx_does_not_define_has_no_signature() -> None:
    assert signature("com.microsoft", "BiasGelu", 1) is None
    assert signature("", "Gelu", 13) is None
    assert signature("", "Gelu", 20) is not None


def test_the_form_of_an_op_is_the_one_of_its_opset() -> None:
    assert [signature("", "Resize", opset).since_version for opset in (10, 12, 17, 18, 20)] == [10, 11, 13, 18, 19]


@pytest.mark.parametrize(
    ("op", "opset", "dtype", "admitted"),
    [
        ("Conv", 17, FLOAT16, True),
        ("Conv", 17, BFLOAT16, False),
        ("Conv", 22, BFLOAT16, True),
        ("MatMul", 12, BFLOAT16, False),
        ("MatMul", 13, BFLOAT16, True),
        ("Softmax", 17, ir.DataType.FLOAT, True),
    ],
)
def test_which_half_an_op_admits_depends_on_its_opset(op: str, opset: int, dtype: ir.DataType, admitted: bool) -> None:
    form = signature("", op, opset)
    assert form.admits("T", dtype) is admitted


def test_a_variadic_port_stands_for_all_that_follow_and_a_fixed_one_ends() -> None:
    concat = signature("", "Concat", 17)
    assert [concat.input_type(i) for i in (0, 1, 9)] == ["T", "T", "T"]
    relu = signature("", "Relu", 17)
    assert [relu.input_type(i) for i in (0, 1)] == ["T", None]


def test_members_of_a_loop_may_differ_in_type_and_those_of_a_concat_may_not() -> None:
    assert signature("", "Loop", 17).heterogeneous
    assert not signature("", "Concat", 17).heterogeneous


def _ports(text: str, opset: int = 17, half: object = FP16) -> tuple[list[int], list[int]]:
    index = GraphIndex.of(graph(text, opset))
    node = next(iter(index.nodes.values()))
    inputs, outputs = half_ports(index, node, half)  # type: ignore[arg-type]
    return sorted(inputs), sorted(outputs)


@pytest.mark.parametrize(
    ("text", "opset", "ports"),
    [
        ("g (float[N, 8] x, float[8, 8] w) => (float[N, 8] y) { y = MatMul(x, w) }", 17, ([0, 1], [0])),
        ("g (float[1, 1, 4, 4] x, float[8] r, float[4] s) => (float[A, B, C, D] y) { y = Resize(x, r, s) }", 17, ([0], [0])),
        ("g (float[1, 1, 4, 4] x, float[4] s) => (float[A, B, C, D] y) { y = Resize(x, s) }", 10, ([0], [0])),
        ("g (float[1, 1, 4, 4] x, float[4] s) => (float[A, B, C, D] y) { y = Upsample(x, s) }", 9, ([0], [0])),
        ("g (float[8] x, int64[1] k) => (float[1] y, int64[1] i) { y, i = TopK(x, k) }", 17, ([0], [0])),
        ("g (bool[8] c, float[8] x, float[8] z) => (float[8] y) { y = Where(c, x, z) }", 17, ([1, 2], [0])),
        ("g (float[8] x) => (int64[1] y) { y = Shape(x) }", 17, ([0], [])),
        ("g (int64[8] i) => (float[8] y) { y = Cast<to = 1>(i) }", 17, ([], [0])),
        ("g (float[8] x) => (int64[8] y) { y = Cast<to = 7>(x) }", 17, ([0], [])),
        ("g (float[1,4,4] b, float[1,1,4] s) => (int64[N, 3] y) { y = NonMaxSuppression(b, s) }", 17, ([], [])),
        ("g (float[2,8] x, float[8] w) => (float[2,8] y, float[2,1] m) { y, m = LayerNormalization(x, w) }", 17, ([0, 1], [0])),
        ("g (float[2,3,4] x, float[3] s, float[3] b, float[3] m, float[3] v) => (float[2,3,4] y) { y = BatchNormalization(x, s, b, m, v) }", 17, ([0, 1, 2, 3, 4], [0])),
        ("g (int64[3] i, int64 d, float[2] v) => (float[3, K] y) { y = OneHot(i, d, v) }", 17, ([2], [0])),
    ],
    ids=["MatMul", "Resize-13", "Resize-10", "Upsample-9", "TopK", "Where", "Shape", "int to float", "float to int",
         "NonMaxSuppression", "LayerNorm's mean", "BatchNorm-15", "OneHot"],
)  # fmt: skip
def test_only_ports_that_may_be_half_are(text: str, opset: int, ports: tuple[list[int], list[int]]) -> None:
    assert _ports(text, opset) == ports


def test_a_type_variable_one_of_whose_members_has_no_known_type_ties_the_others_to_fp32() -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { o = com.example.Odd(x)  y = Add(x, o) }"
    index = GraphIndex.of(graph(text, domains={"com.example": 1}))
    assert half_ports(index, index.nodes["Add_1"], FP16) == (frozenset(), frozenset())


def test_conv_has_bf16_ports_from_opset_22_on() -> None:
    text = "g (float[1, 1, 4, 4] x, float[1, 1, 3, 3] w) => (float[1, 1, 2, 2] y) { y = Conv(x, w) }"
    assert _ports(text, 21, BF16) == ([], [])
    assert _ports(text, 22, BF16) == ([0, 1], [0])

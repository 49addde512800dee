"""Nothing that mixes types leaves the rewriter."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from mpdeploy.errors import ConversionError
from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.verify import check_file, check_strict_types, one_of_each_kind
from tests.precision.conformance import CASES
from tests.precision.visible import CHAIN, FLOAT16, W, converted, graph, lines, named, run


def _check(text: str, opset: int = 17, **weights: object) -> None:
    check_strict_types(GraphIndex.of(named(graph(text, opset, **weights))))


@pytest.mark.parametrize(
    ("text", "opset", "message"),
    [
        (
            "g (float16[N, 8] x, float[N, 8] z) => (float16[N, 8] y) { y = Add(x, z) }",
            17,
            r"Add 'y' mixes types: input 0 \(x: FLOAT16\) and input 1 \(z: FLOAT\) must be the same",
        ),
        (
            "g (bool[N] c, float16[N] x, float[N] z) => (float[N] y) { k = Relu(x)  y = Where(c, k, z) }",
            17,
            r"Where 'y' mixes types: input 1 \(k: FLOAT16\) and input 2 \(z: FLOAT\)",
        ),
        (
            "g (float[N] x) => (float16[N] y) { y = Relu(x) }",
            17,
            None,  # the declared output is stale: its type follows the graph
        ),
        (
            "g (bfloat16[1, 1, 4, 4] x, bfloat16[1, 1, 3, 3] w) => (bfloat16[1, 1, 2, 2] y) { y = Conv(x, w) }",
            17,
            r"Conv 'y' does not admit input 0 \(x: BFLOAT16\) at opset 11",
        ),
        (
            "g (float16[1, 1, 4, 4] x, float16[4] s) => (float16[1, 1, 8, 8] y) { y = Resize(x, , s) }",
            17,
            r"Resize 'y' does not admit input 2 \(s: FLOAT16\)",
        ),
    ],
    ids=["Add", "Where", "stale output", "Conv in bf16", "Resize scales"],
)
def test_a_graph_of_mixed_types_is_refused_naming_node_ports_and_types(
    text: str, opset: int, message: str | None
) -> None:
    if message is None:
        _check(text, opset)
        return
    with pytest.raises(ConversionError, match=message):
        _check(text, opset)


def test_a_mixed_node_in_a_body_is_refused_too() -> None:
    text = """g (float16[N, 8] x, float[N, 8] z, bool c) => (float16[N, 8] y) { y = If(c) <
      then_branch = t () => (float16[N, 8] a) { a = Mul(x, z) }, else_branch = e () => (float16[N, 8] b) { b = Neg(x) } > }"""
    with pytest.raises(ConversionError, match="Mul 'a' mixes types"):
        _check(text)


def test_a_well_typed_mixed_graph_passes() -> None:
    check_strict_types(GraphIndex.of(converted(named(graph(CHAIN, w=W)), keep=["e"]).model))


def test_the_full_checker_refuses_a_file_that_is_no_valid_onnx(tmp_path: Path) -> None:
    good, bad = graph(CHAIN, w=W), graph("g (float[N, 8] x) => (float[N, 8] y) { y = Nonsense(x) }")
    ir.save(good, tmp_path / "good.onnx")
    ir.save(bad, tmp_path / "bad.onnx")
    check_file(tmp_path / "good.onnx")
    with pytest.raises(ConversionError, match="Nonsense"):
        check_file(tmp_path / "bad.onnx")


def test_one_of_each_kind_holds_every_kind_once_and_loads() -> None:
    model = named(
        graph(
            "g (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, w) b = Relu(a) c = MatMul(b, w) d = Relu(c) e = Exp(d) y = MatMul(e, w) }",
            w=W,
        )
    )
    done = converted(model, keep=["e"])
    kinds = one_of_each_kind(GraphIndex.of(done.model))
    assert [line.split(" = ")[1].split("(")[0] for line in lines(kinds)] == [
        "MatMul", "Relu", "Cast<FLOAT>", "Exp", "Cast<FLOAT16>",
    ]  # fmt: skip
    assert kinds.graph.inputs[0].dtype == FLOAT16
    with pytest.raises(Exception, match="Required inputs"):
        run(kinds, {})


def test_a_model_with_bodies_is_tried_whole() -> None:
    case = next(case for name, case in CASES.items() if name.startswith("if"))
    assert one_of_each_kind(GraphIndex.of(ir.from_proto(case.model))) is None

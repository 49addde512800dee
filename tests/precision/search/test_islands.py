"""BF16 nodes in an FP16 model: direct casts, each tensor rounded to its own type, valid for the checker and for strict typing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mpdeploy.engines.onnxruntime import OrtRunner
from mpdeploy.precision.emulate import emulate
from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.plan import PrecisionPlan, Reason
from mpdeploy.precision.rewrite import prepare
from mpdeploy.precision.search.islands import rewrite_with_islands
from mpdeploy.precision.verify import check_strict_types
from tests.precision.conformance_base import normal, weight
from tests.precision.visible import BFLOAT16, FLOAT, FLOAT16, FP16, graph, lines, named

CHAIN = "g (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, w)  b = Mul(a, k)  c = Relu(b)  d = Div(c, k)  y = MatMul(d, w) }"
CONV = (
    "g (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y) "
    "{ a = Conv <pads = [1, 1, 1, 1]> (x, w)  b = Conv <pads = [1, 1, 1, 1]> (a, w)  y = Tanh(b) }"
)
K = np.array([300.0], np.float32)


def _rewritten(model: ir.Model, bf16: Collection[str], fp32: Collection[str] = ()) -> GraphIndex:
    prepared = prepare(model, FP16)
    reason = (Reason("range", "test"),)
    half = frozenset(name for name in prepared.index.nodes if name not in {*bf16, *fp32})
    io = {f"input:{value.name}" for value in prepared.model.graph.inputs}
    io |= {f"output:{value.name}" for value in prepared.model.graph.outputs}
    ops = {name: node.op_type for name, node in prepared.index.nodes.items()}
    plan = PrecisionPlan(FP16, half | io, dict.fromkeys(fp32, reason), ops, bf16=dict.fromkeys(bf16, reason))
    return rewrite_with_islands(prepared, plan)


def _types(index: GraphIndex) -> dict[str, ir.DataType]:
    return {value.name or "": dtype for value, dtype in index.dtypes.items()}


def test_a_tensor_goes_from_fp16_to_bf16_through_one_cast() -> None:
    index = _rewritten(named(graph(CHAIN, w=weight(8, 8), k=K)), ["b", "c", "d"])
    assert lines(index.model) == [
        "a = MatMul(x, w)",
        "a_to_bfloat16 = Cast<BFLOAT16>(a)",
        "b = Mul(a_to_bfloat16, k)",
        "c = Relu(b)",
        "d = Div(c, k)",
        "d_to_float16 = Cast<FLOAT16>(d)",
        "y = MatMul(d_to_float16, w)",
    ]
    check_strict_types(index)
    types = _types(index)
    assert [types[name] for name in ("x", "a", "b", "c", "d", "y", "k")] == [
        FLOAT16, FLOAT16, BFLOAT16, BFLOAT16, BFLOAT16, FLOAT16, BFLOAT16,
    ]  # fmt: skip


def test_all_three_precisions_share_a_constant_and_a_tensor() -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { a = Mul(x, k)  b = Mul(a, k)  c = Mul(a, k)  y = Add(b, c) }"
    index = _rewritten(named(graph(text, k=K)), ["b"], ["c"])
    check_strict_types(index)
    types = _types(index)
    assert (types["a"], types["b"], types["c"], types["y"]) == (FLOAT16, BFLOAT16, FLOAT, FLOAT16)
    held = {
        value.const_value.dtype for value in index.model.graph.initializers.values() if value.const_value is not None
    }
    assert held == {FLOAT16, BFLOAT16, FLOAT}


def test_each_tensor_is_rounded_to_its_own_type(tmp_path: Path) -> None:
    """Against numpy, step by step: FP16 products, BF16 in the middle, where values leave FP16's range."""
    text = "g (float[N, 8] x) => (float[N, 8] y) { a = Mul(x, k)  b = Mul(a, k)  c = Relu(b)  d = Div(c, k)  y = Div(d, k) }"
    index = _rewritten(named(graph(text, k=K)), ["b", "c", "d"])
    ir.save(emulate(index.model), tmp_path / "emulated.onnx")
    x = np.abs(normal(16, 8, seed="x")) + np.float32(1)
    with OrtRunner(tmp_path / "emulated.onnx") as runner:
        found = runner.infer({"x": x})["y"]

    def fp16(array: np.ndarray) -> np.ndarray:
        return array.astype(np.float16).astype(np.float32)

    def bf16(array: np.ndarray) -> np.ndarray:
        return array.astype(ml_dtypes.bfloat16).astype(np.float32)

    a = fp16(fp16(x) * K)
    b = bf16(bf16(a) * bf16(K))
    assert b.max() > 65504
    expected = fp16(fp16(bf16(b / bf16(K))) / K)
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(expected, fp16(fp16(x))), "the control: BF16 in the middle is seen"


def test_an_op_that_admits_bf16_only_later_raises_the_opset() -> None:
    model = named(graph(CONV, w=normal(2, 2, 3, 3, seed="w")))
    index = _rewritten(model, ["b"])
    assert index.model.opset_imports[""] == 22
    check_strict_types(index)
    types = _types(index)
    assert (types["a"], types["b"]) == (FLOAT16, BFLOAT16)
    assert _rewritten(named(graph(CONV, w=normal(2, 2, 3, 3, seed="w"))), []).model.opset_imports[""] == 17


@pytest.mark.parametrize(("text", "bf16"), [(CHAIN, ["b", "c", "d"]), (CONV, ["b"]), (CHAIN, ["y"]), (CHAIN, ["a"])])
def test_the_checker_a_session_and_tensorrt_rtx_take_the_file(text: str, bf16: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    from mpdeploy.engines.tensorrt.parse import rtx_refusal

    weights = {"w": normal(2, 2, 3, 3, seed="w")} if text is CONV else {"w": weight(8, 8), "k": K}
    index = _rewritten(named(graph(text, **weights)), bf16)
    ir.save(index.model, tmp_path / "mixed.onnx")
    onnx.checker.check_model(tmp_path / "mixed.onnx", full_check=True)
    assert rtx_refusal(tmp_path / "mixed.onnx") is None
    ir.save(emulate(index.model), tmp_path / "emulated.onnx")
    shape = (3, 2, 4, 4) if text is CONV else (3, 8)
    with OrtRunner(tmp_path / "emulated.onnx") as runner:
        assert np.isfinite(runner.infer({"x": normal(*shape, seed="x")})["y"]).all()


def test_nodes_without_a_name_are_found_again() -> None:
    model = graph(CHAIN, w=weight(8, 8), k=K)
    for node in model.graph:
        node.name = ""
    prepared = prepare(model, FP16)
    names = list(prepared.index.nodes)
    index = _rewritten(model, names[1:4])
    types = _types(index)
    assert (types["a"], types["b"], types["d"], types["y"]) == (FLOAT16, BFLOAT16, BFLOAT16, FLOAT16)

"""Ops that engines take apart: what TensorRT's parser really makes of them, and what the emulation then says."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from mpdeploy.engines import ENGINES
from mpdeploy.engines.tensorrt.library import RTX_FAMILY, import_library, library_problem
from mpdeploy.errors import UsageError
from mpdeploy.precision.emulate import emulate
from mpdeploy.precision.engine_forms import FORMS, MEANS, NORMS, OPENVINO, TENSORRT
from tests.precision.openvino_judge import answers_as_typed, skip_where_it_cannot_judge
from tests.precision.visible import FLOAT16, W, X, converted, graph, lines, named, ranges_of, rel_l2, run

needs_rtx = pytest.mark.skipif(library_problem(RTX_FAMILY) is not None, reason="TensorRT-RTX is not installed")

OPSET = {"Mish": 20}
WIDE = X * 30


def _half(op: str, attributes: str = "", more: str = "") -> ir.Model:
    text = f"g (float16[N, 8] x) => (float16[N, M] y) {{ y = {op}{attributes}(x{more}) }}"
    axes = {"axes": np.array([1])} if more else {}
    return graph(text, OPSET.get(op, 18), **axes)


HALF = {
    "LogSoftmax": _half("LogSoftmax"),
    "ReduceSumSquare": _half("ReduceSumSquare", more=", axes"),
    "ReduceLogSumExp": _half("ReduceLogSumExp", more=", axes"),
    "Mish": _half("Mish"),
}


def _network_of(model: ir.Model) -> list[tuple[str, list[str]]]:
    """Layers of the network that TensorRT-RTX's parser makes: kind, and the types of what comes out."""
    trt = import_library(RTX_FAMILY)
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(ir.to_proto(model).SerializeToString())
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return [(each.type.name, [each.get_output(i).dtype.name for i in range(each.num_outputs)]) for each in layers]


def test_every_split_is_tested() -> None:
    assert set(HALF) == set(TENSORRT)


@needs_rtx
@pytest.mark.parametrize("op", TENSORRT)
def test_tensorrt_takes_it_apart_and_stores_what_is_between_in_half(op: str) -> None:
    found = _network_of(HALF[op])
    computing = [kind for kind, types in found if kind in ("SOFTMAX", "UNARY", "ELEMENTWISE", "REDUCE", "ACTIVATION") and types == ["HALF"]]  # fmt: skip
    assert len(computing) > 1, found
    assert all(types != ["FLOAT"] for _, types in found), found


@needs_rtx
@pytest.mark.parametrize("op", ["ReduceL2", "ReduceLogSum"])
def test_tensorrt_computes_these_in_fp32_itself(op: str) -> None:
    """Then there is nothing to take apart: the emulation rounds what comes out, once."""
    types = [types for _, types in _network_of(_half(op, more=", axes"))]
    assert types[0] == ["FLOAT"]
    assert types[-1] == ["HALF"]


@pytest.mark.parametrize("op", TENSORRT)
@pytest.mark.parametrize("keepdims", [0, 1])
def test_taken_apart_it_computes_the_same(op: str, keepdims: int) -> None:
    if op.startswith("Reduce"):
        model = _half(op, f"<keepdims = {keepdims}>", ", axes")
        if not keepdims:
            model = graph(
                f"g (float16[N, 8] x) => (float16[M] y) {{ y = {op}<keepdims = 0>(x, axes) }}", 18, axes=np.array([1])
            )
    else:
        model = HALF[op].clone()
    (found,) = run(emulate(model), {"x": X})
    wide = ir.from_proto(ir.to_proto(model))
    for value in (*wide.graph.inputs, *wide.graph.outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    (expected,) = run(wide, {"x": X.astype(np.float16).astype(np.float32)})
    assert found.shape == expected.shape
    assert 0 < rel_l2(found, expected) < 2e-3


def test_log_softmax_in_half_is_minus_infinity_where_the_softmax_is_lost() -> None:
    (found,) = run(emulate(HALF["LogSoftmax"]), {"x": WIDE})
    assert np.isneginf(found).any()
    (kept,) = converted(named(graph("g (float[N, 8] x) => (float[N, 8] y) { y = LogSoftmax(x) }"))).emulated(
        {"x": WIDE}
    )
    assert np.isfinite(kept).all()


def test_a_sum_of_squares_overflows_in_its_squares() -> None:
    (found,) = run(emulate(HALF["ReduceSumSquare"]), {"x": X * 300})
    assert np.isinf(found).any()


def test_what_follows_and_the_outputs_names_stay() -> None:
    text = "g (float16[N, 8] x) => (float16[N, 8] y, float16[N, 8] z) { y = LogSoftmax(x) z = Neg(y) }"
    model = graph(text, 18)
    before = lines(model)
    emulated = emulate(model)
    assert lines(model) == before, "the model given is not changed"
    assert [value.name for value in emulated.graph.outputs] == ["y", "z"]
    y, z = run(emulated, {"x": X})
    np.testing.assert_array_equal(y, -z)


# ---- OpenVINO


WIDTH = 384
ROWS = np.random.default_rng(0).normal(0, 2, (64, WIDTH)).astype(np.float32)
SCALE = np.random.default_rng(1).random(WIDTH).astype(np.float32) + 0.5
BIAS = np.random.default_rng(2).normal(0, 0.3, WIDTH).astype(np.float32)
CAST = {"fp16": 10, "bf16": 16}
BY_OPENVINO = {
    "LayerNormalization": ("LayerNormalization(h, s, b)", 22, {"s": SCALE, "b": BIAS}),
    "RMSNormalization": ("RMSNormalization(h, s)", 23, {"s": SCALE}),
    "LogSoftmax": ("LogSoftmax(h)", 22, {}),
    "ReduceSumSquare": ("ReduceSumSquare(h, axes)", 22, {"axes": np.array([1])}),
    "ReduceLogSumExp": ("ReduceLogSumExp(h, axes)", 22, {"axes": np.array([1])}),
}


def test_each_engine_has_its_forms_and_another_one_is_refused() -> None:
    assert set(FORMS) == set(ENGINES)
    with pytest.raises(UsageError, match="no engine 'openvini'"):
        emulate(HALF["Mish"], engine="openvini")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("op", OPENVINO)
def test_openvino_answers_these_very_bits(op: str, precision: str, tmp_path: Path) -> None:
    """Of 64 or more values all but one in a thousand are the emulator's, and without its form of the op they are not."""
    skip_where_it_cannot_judge(precision)
    call, opset, weights = BY_OPENVINO[op]
    half = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}[precision]
    typed = {name: array.astype(half) if array.dtype == np.float32 else array for name, array in weights.items()}
    text = f"g (float[64, {WIDTH}] x) => (float[N, M] y) {{ h = Cast<to = {CAST[precision]}>(x) o = {call} y = Cast<to = 1>(o) }}"
    model = named(graph(text, opset, **typed))
    ir.save(model, tmp_path / "half.onnx")
    (real,) = answers_as_typed(tmp_path / "half.onnx", {"x": ROWS})
    (apart,) = run(emulate(model, engine="openvino"), {"x": ROWS})
    (whole,) = run(emulate(model, engine="onnxruntime"), {"x": ROWS})
    assert np.mean(apart == real) > 0.999
    assert np.mean(whole == real) < 0.99


def test_a_norm_whose_scale_is_computed_or_whose_mean_is_asked_for_stays_whole() -> None:
    computed = "g (float16[N, 8] x, float16[M] s) => (float16[N, 8] y) { y = LayerNormalization(x, s) }"
    asked = "g (float16[N, 8] x) => (float16[N, 8] y, float[N, 1] z) { y, m = LayerNormalization(x, s) z = Neg(m) }"
    scale = {"s": np.ones(8, np.float16)}
    for model in (graph(computed, 17), graph(asked, 17, **scale)):
        ops = [node.op_type for node in emulate(model, engine="openvino").graph]
        assert "Mul" not in ops
    plain = graph("g (float16[N, 8] x) => (float16[N, 8] y) { y = LayerNormalization(x, s) }", 17, **scale)
    assert "Mul" in [node.op_type for node in emulate(plain, engine="openvino").graph]


# ---- sums stored in half


LONG = np.abs(np.random.default_rng(0).normal(8, 1, (2, 16384))).astype(np.float32)


def _mean(op: str) -> ir.Model:
    if op == "ReduceMean":
        return named(
            graph(
                "g (float[N, 16384] x) => (float[N, 1] y) { h = Relu(x) y = ReduceMean(h, axes) }",
                18,
                axes=np.array([1]),
            )
        )
    return named(
        graph(
            "g (float[N, 16384] x) => (float[N, 1, 1, 1] y) { r = Reshape(x, s) h = Relu(r) y = GlobalAveragePool(h) }",
            s=np.array([0, 1, 128, 128]),
        )
    )


@pytest.mark.parametrize("op", sorted(MEANS))
def test_a_mean_over_many_overflows_inside_where_its_sum_is_half(op: str) -> None:
    """Engines that sum in FP32 lose nothing; the rule `inner-sum` is for those that do not say."""
    model = _mean(op)
    (expected,) = run(model, {"x": LONG})
    without = converted(_mean(op))
    assert without.plan.kept == {}
    assert rel_l2(run(emulate(without.model), {"x": LONG})[0], expected) < 1e-3
    assert np.isinf(run(emulate(without.model, half_sums=True), {"x": LONG})[0]).all()
    model = _mean(op)
    with_it = converted(model, ranges=ranges_of(model, {"x": LONG}))
    assert "a sum over h reaches about" in with_it.why("y")
    assert rel_l2(run(emulate(with_it.model, half_sums=True), {"x": LONG})[0], expected) < 1e-3


@pytest.mark.parametrize("op", sorted(NORMS))
def test_a_norm_is_lost_where_its_squares_are_half(op: str) -> None:
    body = {
        "LayerNormalization": "y = LayerNormalization(h, s)",
        "RMSNormalization": "y = RMSNormalization(h, s)",
        "InstanceNormalization": "r = Reshape(h, three) n = InstanceNormalization(r, c, c) y = Reshape(n, back)",
        "GroupNormalization": "r = Reshape(h, three) n = GroupNormalization<num_groups = 2>(r, c, c) y = Reshape(n, back)",
        "ReduceL2": "y = ReduceL2(h, axes)",
    }[op]
    weights = {"s": np.ones(8, np.float32), "c": np.ones(4, np.float32), "three": np.array([0, 4, 2]), "back": np.array([0, 8]), "axes": np.array([1])}  # fmt: skip
    used = {name: value for name, value in weights.items() if f" {name}" in body}
    text = f"g (float[N, 8] x) => (float[N, M] y) {{ h = MatMul(x, w) {body} }}"
    opset = {"RMSNormalization": 23, "GroupNormalization": 21}.get(op, 18)
    build = lambda: named(graph(text, opset, w=W, **used))  # noqa: E731
    feeds = {"x": X * 800}
    (expected,) = run(build(), feeds)
    half_node = converted(build())
    assert half_node.plan.kept == {}
    assert rel_l2(run(emulate(half_node.model), feeds)[0], expected) < 5e-3
    assert not np.isfinite(run(emulate(half_node.model, half_sums=True), feeds)[0]).all()


def test_an_ordinary_model_is_the_same_either_way() -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w) y = LayerNormalization(h, s) }"
    done = converted(named(graph(text, w=W, s=np.ones(8, np.float32))))
    one, other = (run(emulate(done.model, half_sums=half), {"x": X})[0] for half in (False, True))
    np.testing.assert_array_equal(one, other)


def test_the_types_between_are_half() -> None:
    emulated = emulate(HALF["LogSoftmax"])
    casts = [n for n in emulated.graph if n.op_type == "Cast" and ir.DataType(n.attributes.get_int("to")) == FLOAT16]
    assert len(casts) == 3, "the input, the Softmax, and what comes out"

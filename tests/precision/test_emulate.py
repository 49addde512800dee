"""The emulator rounds where, and as, half-precision hardware does."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from mpdeploy.engines.onnxruntime import prove_pairs_are_kept
from mpdeploy.errors import StageFailedError
from mpdeploy.precision import emulate as emulation
from mpdeploy.precision.emulate import CANARY_INPUT, canary, canary_answer, emulate
from tests.precision.conformance_base import normal
from tests.precision.visible import (
    BF16,
    BFLOAT16,
    CHAIN,
    FLOAT,
    FLOAT16,
    FP16,
    W,
    X,
    converted,
    graph,
    lines,
    named,
    run,
    snapshot,
    types_of,
)  # fmt: skip


def _half(text: str, **weights: object) -> ir.Model:
    """A model as a hand-written half one, emulated."""
    return emulate(graph(text, **weights))


# ---- the canary


@pytest.mark.parametrize("optimise", [False, True], ids=["as written", "optimised"])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_the_canary_proves_that_this_runtime_keeps_the_pairs(dtype: ir.DataType, optimise: bool) -> None:
    prove_pairs_are_kept(dtype)
    np.testing.assert_array_equal(run(canary(dtype), {"x": CANARY_INPUT}, optimise=optimise)[0], canary_answer(dtype))


def test_the_canary_would_notice_a_runtime_that_drops_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpdeploy.engines import onnxruntime as engine

    engine._prove.cache_clear()
    monkeypatch.setattr(
        emulation, "canary", lambda dtype: named(graph("g (float[K] x) => (float[K] y) { y = Identity(x) }"))
    )
    with pytest.raises(StageFailedError, match="does not round as FLOAT16 hardware does"):
        prove_pairs_are_kept(FLOAT16)
    engine._prove.cache_clear()


def test_the_canary_holds_every_hard_case() -> None:
    answer = canary_answer(FLOAT16)
    assert np.isinf(answer[0]), "70000 overflows"
    assert answer[1] == 65504.0
    assert 0 < answer[2] < 2**-14, "a subnormal is held"
    assert answer[3] == 2**-24
    assert answer[4] == 0.0, "below half of the smallest"
    assert answer[5] == 2048.0, "a tie goes to even"
    assert answer[6] == 2052.0


# ---- where pairs go


def test_every_half_tensor_goes_through_one_pair() -> None:
    model = _half("g (float16[N, 8] x) => (float16[N, 8] y) { h = MatMul(x, w)  y = Exp(h) }", w=W.astype(np.float16))
    assert lines(model) == [
        "x.narrow = Cast<FLOAT16>(x)",
        "x.rounded = Cast<FLOAT>(x.narrow)",
        "h = MatMul(x.rounded, w)",
        "h.narrow = Cast<FLOAT16>(h)",
        "h.rounded = Cast<FLOAT>(h.narrow)",
        "y.wide = Exp(h.rounded)",
        "y.narrow = Cast<FLOAT16>(y.wide)",
        "y = Cast<FLOAT>(y.narrow)",
    ]
    assert model.graph.initializers["w"].const_value.dtype == FLOAT
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [FLOAT, FLOAT]


@pytest.mark.parametrize(
    "op",
    ["Relu(h)", "Neg(h)", "Transpose(h)", "Reshape(h, s)", "Slice(h, z, o)", "Max(h, h)", "Concat<axis = 0>(h, h)"],
)
def test_what_an_op_copies_is_not_rounded_twice(op: str) -> None:
    text = f"g (float16[8, 8] x) => (float16[A, B] y) {{ h = MatMul(x, x)  c = {op}  y = MatMul(c, c) }}"
    model = _half(text, s=np.array([8, 8]), z=np.array([0]), o=np.array([8]))
    assert not any("(c)" in line and "Cast" in line for line in lines(model))
    assert any(line.startswith("c = ") and "h.rounded" in line for line in lines(model))


def test_a_copy_of_something_wider_is_rounded() -> None:
    model = _half("g (float[N, 8] x) => (float16[N, 8] y) { y = Cast<to = 10>(x) }")
    assert lines(model) == ["y.wide = Cast<FLOAT>(x)", "y.narrow = Cast<FLOAT16>(y.wide)", "y = Cast<FLOAT>(y.narrow)"]


def test_kept_nodes_are_not_rounded() -> None:
    done = converted(named(graph(CHAIN, w=W)), keep=["e"], keep_io=True)
    made = lines(emulate(done.model))
    assert [line.split(" = ")[0] for line in made if ".narrow = " in line] == [
        "x_to_float16.narrow",
        "h.narrow",
        "e_to_float16.narrow",
        "y_before_cast.narrow",
    ]
    assert not any(line.startswith("e.narrow") for line in made)


def test_an_fp32_model_is_left_as_it_is() -> None:
    model = graph(CHAIN, w=W)
    assert snapshot(emulate(model)) == snapshot(model)


def test_emulating_does_not_change_the_mixed_model() -> None:
    done = converted(named(graph(CHAIN, w=W)), keep=["e"])
    before = snapshot(done.model)
    emulate(done.model)
    assert snapshot(done.model) == before


def test_nothing_half_is_left_but_inside_the_pairs() -> None:
    text = """g (float16[N, 8] x, int64[N, 8] i) => (float16[N, 8] y) {
      f = Cast<to = 10>(i)  s = Shape(x)  k = Constant<value = float16[1] {14336}>()
      z = ConstantOfShape<value = float16[1] {15360}>(s)  a = Add(f, z)  m = Mul(a, k)  y = Add(x, m) }"""
    model = _half(text)
    halves = {name for name, kind in types_of(model).items() if kind == "FLOAT16"}
    assert halves
    assert all(name.endswith(".narrow") for name in halves)
    np.testing.assert_array_equal(run(model, {"x": X[:1], "i": np.ones((1, 8), np.int64)})[0], _f16(_f16(X[:1]) + 1))


# ---- what comes out


def _f16(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return array.astype(np.float16).astype(np.float32)


def test_overflow_becomes_infinity_as_on_hardware_where_the_cpu_provider_shows_nothing() -> None:
    text = "g (float16[N] x) => (float16[N] y) { u = Mul(x, k)  y = Div(u, k) }"
    half = graph(text, k=np.float16(1000))
    assert np.isinf(run(emulate(half), {"x": np.array([100, -100], np.float32)})[0]).all()
    assert run(half, {"x": np.array([100, -100], np.float16)})[0].tolist() == [100, -100], "blind, as facts.md says"


def test_subnormals_are_held_and_what_lies_below_them_is_lost() -> None:
    text = "g (float16[N] x) => (float16[N] y) { y = Mul(x, k) }"
    answer = run(_half(text, k=np.float16(2.0**-14)), {"x": np.array([1, 2**-5, 2**-10, 2**-12], np.float32)})[0]
    assert answer.tolist() == [2.0**-14, 2.0**-19, 2.0**-24, 0.0]


def test_sums_are_fp32_inside_an_op_and_rounded_once() -> None:
    """4096 ones and a half: in FP16 sums the half would be lost, and 2049 could not even be counted."""
    x = np.concatenate([np.ones(4096), [0.5]]).astype(np.float32)[None]
    model = _half("g (float16[N, K] x) => (float16[N, M] y) { y = MatMul(x, w) }", w=np.ones((4097, 1), np.float16))
    assert run(model, {"x": x})[0].item() == 4096.0
    model = _half(
        "g (float16[N, K] x) => (float16[N, M] y) { s = MatMul(x, w)  y = Sub(s, c) }",
        w=np.ones((4097, 1), np.float16),
        c=np.float16(4096),
    )
    assert run(model, {"x": x})[0].item() == 0.0


def test_fp16_equals_numpy_step_by_step() -> None:
    w = (W * 3).astype(np.float16)
    model = _half(
        "g (float16[N, 8] x) => (float16[N, 8] y) { a = Mul(x, x)  b = Add(a, x)  y = Div(b, k) }", k=np.float16(3), w=w
    )
    a = _f16(_f16(X) * _f16(X))
    np.testing.assert_array_equal(run(model, {"x": X})[0], _f16(_f16(a + _f16(X)) / np.float32(3)))


def test_bf16_equals_ml_dtypes_step_by_step() -> None:
    def b16(array: np.ndarray) -> np.ndarray:
        return array.astype(ml_dtypes.bfloat16).astype(np.float32)

    model = named(graph("g (float[N, 8] x) => (float[N, 8] y) { a = Mul(x, x)  y = Add(a, x) }"))
    found = converted(model, BF16).emulated({"x": X})[0]
    np.testing.assert_array_equal(found, b16(b16(b16(X) * b16(X)) + b16(X)))
    assert not np.array_equal(found, _f16(_f16(_f16(X) * _f16(X)) + _f16(X)))


def test_bf16_has_the_range_of_fp32() -> None:
    model = named(graph("g (float[N, 8] x) => (float[N, 8] y) { a = Mul(x, x)  y = Sqrt(a) }"))
    assert np.isfinite(converted(model, BF16).emulated({"x": X * 1e9})[0]).all()
    assert np.isinf(converted(model, FP16).emulated({"x": np.abs(X) * 1e4})[0]).any()


def test_inputs_that_are_half_are_rounded_too() -> None:
    model = _half("g (float16[N] x) => (float16[N] y) { y = Identity(x) }")
    assert run(model, {"x": np.array([2049.0, 1e-9], np.float32)})[0].tolist() == [2048.0, 0.0]


# ---- bodies

BRANCH = """g (float[N, 8] x, bool c) => (float[N, 8] y) {
  h = MatMul(x, w)
  i = If(c) < then_branch = t () => (float[N, 8] p) { u = Mul(h, k)  p = Mul(u, d) }, else_branch = e () => (float[N, 8] q) { q = Neg(h) } >
  y = MatMul(i, w) }"""


def test_tensors_in_a_branch_are_rounded_where_they_are_made() -> None:
    model = named(graph(BRANCH, w=W, k=np.float32(6e4), d=np.float32(2.0**-16)))
    done = converted(model)
    assert {"u", "p", "q"} <= set(done.half)
    taken = done.emulated({"x": 10 * X, "c": np.array(True)})[0]
    other = done.emulated({"x": 10 * X, "c": np.array(False)})[0]
    assert not np.isfinite(taken).all(), "h * 6e4 overflows inside the branch"
    assert np.isfinite(other).all()


def test_a_loop_carries_fp32_and_rounds_what_its_body_computes_in_half() -> None:
    text = """g (float[N, 8] x, int64 n, bool c) => (float[N, 8] y) {
      y = Loop(n, c, x) < body = b (int64 i, bool d, float[N, 8] p) => (bool e, float[N, 8] q) {
        e = Identity(d)  m = MatMul(p, w)  q = Tanh(m) } > }"""
    model = named(graph(text, w=W))
    feeds = {"x": X, "n": np.array(3), "c": np.array(True)}
    expected = run(model, feeds)[0]
    done = converted(model, keep_io=True)
    state = X
    for _ in range(3):
        state = _f16(np.tanh(_f16(_f16(state) @ _f16(W)))) if "q" in done.half else np.tanh(_f16(_f16(state) @ _f16(W)))
    found = done.emulated(feeds)[0]
    np.testing.assert_allclose(found, state, rtol=2e-3, atol=1e-4)
    assert not np.array_equal(found, expected)


def test_a_name_of_the_output_survives() -> None:
    assert [v.name for v in emulate(converted(named(graph(CHAIN, w=W))).model).graph.outputs] == ["y"]


@pytest.mark.parametrize("seed", range(4))
def test_drift_of_a_random_chain_is_that_of_torch_in_half(seed: int) -> None:
    """An independent truth: torch's own float16 kernels (FP32 sums, half storage)."""
    torch = pytest.importorskip("torch")
    text = "g (float[N, 64] x) => (float[N, 64] y) { a = MatMul(x, w1)  b = Tanh(a)  c = MatMul(b, w2)  d = Sigmoid(c)  y = MatMul(d, w1) }"
    w1, w2 = (normal(64, 64, seed=(seed, i), scale=0.125) for i in (1, 2))
    x = normal(64, 64, seed=seed)
    model = named(graph(text, w1=w1, w2=w2))
    expected = run(model, {"x": x})[0].astype(np.float64)
    found = converted(model).emulated({"x": x})[0]
    t, u, v = (torch.from_numpy(array).half() for array in (x, w1, w2))
    real = (torch.sigmoid(torch.tanh(t @ u) @ v) @ u).float().numpy()
    ratio = np.linalg.norm(found - expected) / np.linalg.norm(real - expected)
    assert 0.9 < ratio < 1.1

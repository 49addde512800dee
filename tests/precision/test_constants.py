"""What rounding does to a constant, and what the plan makes of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mpdeploy.precision.constants import examine
from tests.precision.visible import BF16, FP16, W, X, converted, graph, named, plan_of, ranges_of, rel_l2, run


def _fault(values: object, half: object = FP16) -> tuple[str, str] | None:
    fault = examine(ir.tensor(np.asarray(values, np.float32)), half)  # type: ignore[arg-type]
    return None if fault is None else (fault.kind, fault.text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, None),
        (0.0, None),
        (65519.0, None),
        (-np.inf, None),
        (65520.0, ("overflow", "|6.552e+04| is above the largest value held, 65504")),
        (-3.4e38, ("overflow", "|3.4e+38| is above the largest value held, 65504")),
        (1e-12, ("underflow", "1e-12 becomes 0 (smallest value held is 5.96e-08)")),
        (-1e-9, ("underflow", "-1e-09 becomes 0 (smallest value held is 5.96e-08)")),
        (1e-7, ("underflow", "1e-07 becomes 1.192e-07 (below the smallest normal value, 6.1e-05)")),
        (2.0**-24, None),
        (2.0**-20, None),
    ],
)
def test_a_single_value_is_judged_by_itself(value: float, expected: tuple[str, str] | None) -> None:
    assert _fault(value) == expected


@pytest.mark.parametrize("value", [1e-12, -1e-9, 65520.0, 3e38])
def test_bf16_holds_them_all(value: float) -> None:
    assert _fault(value, BF16) is None


def test_bf16_overflows_too_above_its_largest_value() -> None:
    assert _fault(3.4028e38, BF16) == ("overflow", "|3.403e+38| is above the largest value held, 3.38953e+38")


def test_a_weight_matrix_is_judged_by_its_energy() -> None:
    rng = np.random.default_rng(0)
    ordinary = rng.standard_normal(1000) * 0.02
    assert _fault(ordinary) is None
    assert _fault(np.concatenate([ordinary, [1e-12] * 100])) is None, "a few lost crumbs beside a weight do not matter"
    kind, text = _fault(ordinary * 1e-6)
    assert kind == "underflow"
    assert text.startswith("rounding loses ")
    assert _fault(np.concatenate([ordinary, [1e6]]))[0] == "overflow"


def test_infinities_and_nan_in_a_constant_pass_as_they_are() -> None:
    assert _fault([np.inf, np.nan, 1.0]) is None
    assert _fault([np.inf] * 20 + [1e6])[0] == "overflow"


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_a_value_that_is_not_finite_does_not_outweigh_what_is_lost_beside_it(special: float) -> None:
    lost = np.random.default_rng(0).standard_normal(1000) * 1e-9
    kind, text = _fault(np.concatenate([lost, [special]]))
    assert kind == "underflow"
    assert text.startswith("rounding loses ")
    assert _fault([np.nan] * 20 + [2.0]) is None


def test_no_values_are_no_fault() -> None:
    assert _fault(np.zeros(0)) is None


def test_a_node_whose_constant_would_vanish_stays_fp32_with_the_value_in_its_reason() -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  d = Add(h, eps)  y = MatMul(d, w) }"
    prepared, plan = plan_of(named(graph(text, w=W, eps=np.float32(1e-12))))
    assert plan.half_nodes == ["h", "y"]
    assert str(plan.kept["d"][0]) == "constant: eps: 1e-12 becomes 0 (smallest value held is 5.96e-08)"
    assert prepared.model.graph.initializers["eps"].const_value.numpy() == np.float32(1e-12)


def test_an_epsilon_that_is_rounded_coarsely_is_kept_only_where_a_sum_could_tell() -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { h = Mul(x, x)  d = Add(h, eps)  s = Sqrt(d)  y = MatMul(s, w) }"
    model = named(graph(text, w=W, eps=np.float32(1e-7)))
    large = ranges_of(model, {"x": X + 10})
    small = ranges_of(model, {"x": X * 1e-3})
    assert "d" in plan_of(model)[1].kept, "nothing known: kept"
    assert "d" not in plan_of(model, ranges=large)[1].kept
    assert "d" in plan_of(model, ranges=small, disabled_rules=["underflow", "overflow"])[1].kept


def test_a_clip_to_the_largest_float_is_no_reason_to_stay() -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  c = Clip(h, zero, top)  y = MatMul(c, w) }"
    model = named(graph(text, w=W, zero=np.float32(0), top=np.float32(3.4e38)))
    expected = run(model, {"x": X})[0]
    done = converted(model, keep_io=True)
    assert "c" in done.half
    assert done.model.graph.initializers["top"].const_value.numpy() == np.float16(65504)
    assert rel_l2(done.emulated({"x": X})[0], expected) < 2e-3


def test_a_huge_fill_value_keeps_constant_of_shape() -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { s = Shape(x)  f = ConstantOfShape<value = float[1] {1e6}>(s)  y = Add(x, f) }"
    assert (
        plan_of(named(graph(text)))[1].kept["f"][0].text
        == "its fill value: |1e+06| is above the largest value held, 65504"
    )


def test_a_constant_that_stays_fp32_is_never_changed_in_the_file() -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  d = Mul(h, tiny)  y = Mul(d, huge) }"
    done = converted(named(graph(text, w=W, tiny=np.float32(-1e-9), huge=np.float32(1e9))), keep_io=True)
    held = {name: v.const_value.numpy() for name, v in done.model.graph.initializers.items()}
    assert held["tiny"] == np.float32(-1e-9)
    assert held["huge"] == np.float32(1e9)

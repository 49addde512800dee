"""Each range rule on a graph that needs it and on one that does not."""

from __future__ import annotations

import numpy as np
import pytest

from mpdeploy.precision.range_rules import RANGE_RULES
from tests.precision.visible import (
    BF16,
    CHAIN,
    FP16,
    W,
    X,
    converted,
    graph,
    named,
    plan_of,
    ranges_of,
    rel_l2,
    run,
    stats_of,
)  # fmt: skip

SCALED = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  s = Mul(h, up)  r = Relu(s)  d = Mul(r, down)  y = MatMul(d, w) }"


def _scaled(up: float, down: float):
    return named(graph(SCALED, w=W, up=np.float32(up), down=np.float32(down)))


def test_the_rules_are_a_list_one_can_read() -> None:
    assert [rule.name for rule in RANGE_RULES] == [
        "overflow", "underflow", "small-divisor", "cancellation", "large-angle", "inner-sum", "long-dot-product",
    ]  # fmt: skip
    assert all(rule.reason for rule in RANGE_RULES)


# ---- overflow


def test_overflow_keeps_the_producer_and_the_consumers_of_a_tensor_half_cannot_hold() -> None:
    model = _scaled(6e4, 1 / 6e4)
    done = converted(model, ranges=ranges_of(model, {"x": X}))
    assert set(done.plan.kept) == {"s", "r", "d"}
    assert done.why("r").startswith("range: s reaches ")
    assert "half holds 65504" in done.why("r")


def test_overflow_leaves_a_tensor_within_reach_alone() -> None:
    model = _scaled(1e3, 1e-3)
    assert plan_of(model, ranges=ranges_of(model, {"x": X}))[1].kept == {}


def test_overflow_counts_what_the_tail_may_reach() -> None:
    """40,000 fits into half; twice as much, which unseen samples may reach after one feed, does not."""
    model = named(graph(CHAIN, w=W))
    ranges = ranges_of(model, {"x": X})
    ranges.tensors["e"] = stats_of([40_000.0])
    reason = str(plan_of(model, ranges=ranges)[1].kept["e"][0])
    assert reason == "range: e reaches 4e+04 (seen, x2 for the tail); half holds 65504"
    ranges.tensors["e"] = stats_of(*[[40_000.0]] * 8)
    assert "e" not in plan_of(model, ranges=ranges)[1].kept, "steady over 8 feeds: 1.25 x 40,000 fits"


def test_overflow_of_an_input_or_output_keeps_it_fp32_too() -> None:
    model = _scaled(1.0, 1.0)
    plan = plan_of(model, ranges=ranges_of(model, {"x": X * 1e5}))[1]
    assert plan.float_io >= {"x", "y"}


def test_a_range_from_training_counts_and_says_so() -> None:
    model = named(graph(CHAIN, w=W))
    ranges = ranges_of(model, {"x": X * 0.1})
    assert "e" not in plan_of(model, ranges=ranges)[1].kept
    ranges.tensors["e"].merge_amax(1e6, "training")
    assert "in training" in str(plan_of(model, ranges=ranges)[1].kept["e"][0])


def test_overflow_of_fp16_is_none_of_bf16() -> None:
    model = _scaled(6e4, 1 / 6e4)
    assert plan_of(model, BF16, ranges=ranges_of(model, {"x": X}))[1].kept == {}


def test_without_overflow_the_output_is_lost() -> None:
    model = _scaled(6e4, 1 / 6e4)
    expected, ranges = run(model, {"x": X})[0], ranges_of(model, {"x": X})
    without = converted(_scaled(6e4, 1 / 6e4), ranges=ranges, disabled_rules=["overflow"], keep_io=True)
    assert not np.isfinite(without.emulated({"x": X})[0]).all()
    with_it = converted(model, ranges=ranges, keep_io=True)
    assert rel_l2(with_it.emulated({"x": X})[0], expected) < 2e-3


# ---- underflow


def test_underflow_keeps_what_lies_below_half_and_says_how_much_is_lost() -> None:
    model = named(
        graph(
            "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  s = Mul(h, h)  t = Mul(s, s)  r = Sqrt(t)  q = Sqrt(r)  y = MatMul(q, w) }",
            w=W,
        )
    )
    plan = plan_of(model, ranges=ranges_of(model, {"x": X * 1e-2}))[1]
    assert set(plan.kept) >= {"t", "r"}
    assert "lies near" in str(plan.kept["t"][0])
    assert "% of it" in str(plan.kept["t"][0])


def test_underflow_leaves_small_but_exact_tensors_alone() -> None:
    model = _scaled(1e-2, 1e2)
    assert plan_of(model, ranges=ranges_of(model, {"x": X}))[1].kept == {}


def test_a_few_tiny_values_beside_large_ones_are_no_underflow() -> None:
    model = named(graph("g (float[N, 8] x) => (float[N, 8] y) { s = Softmax(x)  y = MatMul(s, w) }", w=W))
    assert plan_of(model, ranges=ranges_of(model, {"x": X * 20}))[1].kept == {}


def test_without_underflow_the_output_drifts() -> None:
    def build():
        text = (
            "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  s = Mul(h, h)  t = Mul(s, up)  y = MatMul(t, w) }"
        )
        return named(graph(text, w=W, up=np.float32(1e4)))

    feeds = {"x": X * 5e-4}
    expected, ranges = run(build(), feeds)[0], ranges_of(build(), feeds)
    without = converted(build(), ranges=ranges, disabled_rules=["underflow"], keep_io=True)
    with_it = converted(build(), ranges=ranges, keep_io=True)
    assert rel_l2(without.emulated(feeds)[0], expected) > 0.02
    assert rel_l2(with_it.emulated(feeds)[0], expected) < 2e-3


# ---- small-divisor

DIVIDED = "g (float[N, 8] x, float[N, 8] d) => (float[N, 8] y) { h = MatMul(x, w)  p = Mul(d, d)  q = {op}  y = MatMul(q, w) }"


@pytest.mark.parametrize("op", ["Div(h, p)", "Reciprocal(p)", "Log(p)"])
def test_small_divisor_keeps_what_magnifies_the_smallest_values(op: str) -> None:
    model = named(graph(DIVIDED.replace("{op}", op), w=W))
    d = np.full((3, 8), 1.0, np.float32)
    d[0, 0] = 1e-4  # its square, 1e-8, is zero in half; the tensor's energy does not notice
    plan = plan_of(model, ranges=ranges_of(model, {"x": X, "d": d}), disabled_rules=["overflow"])[1]
    assert set(plan.kept) >= {"p", "q"}
    assert str(plan.kept["q"][0]).startswith(f"range: {op.split('(')[0]} of p, which comes down to 1e-08")


def test_small_divisor_leaves_divisors_that_half_holds_alone() -> None:
    model = named(graph(DIVIDED.replace("{op}", "Div(h, p)"), w=W))
    d = np.full((3, 8), 0.5, np.float32)
    assert plan_of(model, ranges=ranges_of(model, {"x": X, "d": d}))[1].kept == {}


def test_a_small_dividend_is_no_small_divisor() -> None:
    model = named(graph(DIVIDED.replace("{op}", "Div(p, h)"), w=W))
    d = np.full((3, 8), 1.0, np.float32)
    d[0, 0] = 1e-4
    assert "q" not in plan_of(model, ranges=ranges_of(model, {"x": X + 9, "d": d}))[1].kept


def test_without_small_divisor_the_output_is_infinite() -> None:
    def build():
        return named(graph(DIVIDED.replace("{op}", "Div(p, p)"), w=W))

    d = np.full((3, 8), 1.0, np.float32)
    d[0, 0] = 1e-4
    feeds = {"x": X, "d": d}
    ranges, expected = ranges_of(build(), feeds), run(build(), feeds)[0]
    without = converted(build(), ranges=ranges, disabled_rules=["small-divisor"], keep_io=True)
    assert np.isnan(without.emulated(feeds)[0]).any()
    with_it = converted(build(), ranges=ranges, keep_io=True)
    assert rel_l2(with_it.emulated(feeds)[0], expected) < 2e-3


@pytest.mark.parametrize("smallest", [0.0, 1e-9])
def test_the_sign_of_a_value_below_half_is_looked_at_in_fp32(smallest: float) -> None:
    model = named(
        graph(
            "g (float[N, 8] x, float[N, 8] d) => (float[N, 8] y) { p = Mul(x, d)  q = Sign(p)  y = MatMul(q, w) }", w=W
        )
    )
    d = np.ones((3, 8), np.float32)
    d[0, 0] = smallest
    assert ("q" in plan_of(model, ranges=ranges_of(model, {"x": X, "d": d}))[1].kept) is (smallest > 0)


# ---- cancellation

DIFFERENCE = "g (float[N, 8] x) => (float[N, 8] y) { a = Add(x, big)  d = Sub(a, big)  y = MatMul(d, w) }"


def _difference(big: float):
    return named(graph(DIFFERENCE, w=W, big=np.float32(big)))


def test_cancellation_keeps_a_difference_of_large_tensors_and_what_makes_them() -> None:
    plan = plan_of(_difference(3000), ranges=ranges_of(_difference(3000), {"x": X}))[1]
    assert set(plan.kept) == {"a", "d"}
    assert str(plan.kept["d"][0]).startswith("range: a, near 3e+03, cancels in Sub to ")


def test_cancellation_leaves_an_ordinary_difference_and_a_residual_sum_alone() -> None:
    assert plan_of(_difference(8), ranges=ranges_of(_difference(8), {"x": X}))[1].kept == {}


def test_without_cancellation_the_output_is_noise() -> None:
    expected, ranges = run(_difference(3000), {"x": X})[0], ranges_of(_difference(3000), {"x": X})
    without = converted(_difference(3000), ranges=ranges, disabled_rules=["cancellation"], keep_io=True)
    with_it = converted(_difference(3000), ranges=ranges, keep_io=True)
    assert rel_l2(without.emulated({"x": X})[0], expected) > 0.2
    assert rel_l2(with_it.emulated({"x": X})[0], expected) < 2e-3


# ---- large-angle

ROTARY = "g (float[N, 8] x) => (float[N, 8] y) { p = Mul(x, rate)  c = Cos(p)  y = MatMul(c, w) }"


def _rotary():
    return named(graph(ROTARY, w=W, rate=np.geomspace(1, 1e-3, 8, dtype=np.float32)))


@pytest.mark.parametrize(("positions", "kept"), [(16, set()), (1000, {"p", "c"})])
def test_large_angle_keeps_what_would_turn_by_too_much(positions: int, kept: set[str]) -> None:
    x = np.repeat(np.arange(positions, dtype=np.float32)[:, None], 8, 1)
    plan = plan_of(_rotary(), ranges=ranges_of(_rotary(), {"x": x}), float_io=["x"])[1]
    assert set(plan.kept) == kept
    if kept:
        assert str(plan.kept["c"][0]) == "range: Cos of p, which reaches 999: rounding moves it by 0.98 rad"


def test_without_large_angle_the_output_drifts() -> None:
    x = np.repeat(np.arange(1000, dtype=np.float32)[:, None], 8, 1)
    expected, ranges = run(_rotary(), {"x": x})[0], ranges_of(_rotary(), {"x": x})
    without = converted(_rotary(), ranges=ranges, disabled_rules=["large-angle"], keep_io=True)
    with_it = converted(_rotary(), ranges=ranges, keep_io=True)
    assert rel_l2(without.emulated({"x": x})[0], expected) > 0.02
    assert rel_l2(with_it.emulated({"x": x})[0], expected) < 2e-3


# ---- inner-sum

MEAN = "g (float[N, K] x) => (float[N, 1] y) { m = ReduceMean<axes = [1]>(x)  y = Tanh(m) }"


def test_inner_sum_keeps_a_mean_over_so_many_values_that_their_sum_overflows() -> None:
    model = named(graph(MEAN, opset=13))
    wide = np.full((2, 20_000), 3.0, np.float32)
    plan = plan_of(model, ranges=ranges_of(model, {"x": wide}))[1]
    assert str(plan.kept["m"][0]) == "inner: inside ReduceMean a sum over x reaches about 6e+04; half holds 65504"


def test_inner_sum_leaves_a_short_mean_alone() -> None:
    model = named(graph(MEAN, opset=13))
    assert plan_of(model, ranges=ranges_of(model, {"x": np.full((2, 100), 3.0, np.float32)}))[1].kept == {}


@pytest.mark.parametrize("scale", [1.0, 400.0])
def test_inner_sum_looks_at_the_squares_inside_layer_norm(scale: float) -> None:
    model = named(
        graph(
            "g (float[N, 8] x) => (float[N, 8] y) { n = LayerNormalization(x, s)  y = MatMul(n, w) }",
            w=W,
            s=np.ones(8, np.float32),
        )
    )
    plan = plan_of(model, ranges=ranges_of(model, {"x": X * scale}))[1]
    assert ("n" in plan.kept) is (scale > 1)


# ---- NaN, rules left out


def test_one_nan_in_the_statistics_turns_no_rule_off() -> None:
    model = _scaled(6e4, 1 / 6e4)
    clean = ranges_of(model, {"x": X})
    x = np.concatenate([X, np.full((1, 8), np.nan, np.float32)])
    dirty = ranges_of(model, {"x": x})
    assert set(dirty.nan_tensors) >= {"x", "h", "s"}
    assert set(plan_of(model, ranges=clean)[1].kept) == set(plan_of(model, ranges=dirty)[1].kept) == {"s", "r", "d"}


def test_an_infinity_in_the_statistics_turns_no_rule_off() -> None:
    model = _scaled(6e4, 1 / 6e4)
    x = np.concatenate([X, np.full((1, 8), np.inf, np.float32)])
    with np.errstate(invalid="ignore"):
        assert set(plan_of(model, ranges=ranges_of(model, {"x": x}))[1].kept) >= {"s", "r", "d"}


def test_a_rule_that_is_left_out_keeps_nothing() -> None:
    model = _scaled(6e4, 2.0**-16)
    plan = plan_of(model, FP16, ranges=ranges_of(model, {"x": X}), disabled_rules=["overflow"])[1]
    assert plan.kept == {}

"""Constants and arithmetic that half precision cannot hold: masks, tiny epsilons, long sums, squares."""

from __future__ import annotations

import numpy as np

from .conformance_base import Case, case, normal, weight

LOWEST = np.float32(-3.4028235e38)
X = normal(3, 8, seed="x")
W = weight(8, 8)
CAUSAL = np.tril(np.ones((5, 5), bool))
SCORES = normal(2, 5, 5, seed="scores")
ROW_MASKED = np.stack([CAUSAL, CAUSAL & (np.arange(5)[:, None] != 3)])


def _masked(name: str, body: str, mask: np.ndarray, weights: dict[str, np.ndarray], **more: object) -> Case:
    text = f"g (float[2, 5, 5] x, bool[2, 5, 5] keep) => (float[2, 5, 5] y) {{ {body} }}"
    return case(name, text, {"x": SCORES, "keep": np.broadcast_to(mask, (2, 5, 5)).copy()}, weights=weights, **more)


def _wide(name: str, body: str, weights: dict[str, object], x: np.ndarray, **more: object) -> Case:
    """One input [N, K], one output of rank 2."""
    text = f"g (float[N, K] x) => (float[A, C] y) {{ {body} }}"
    more.setdefault("hostile", True)
    return case(name, text, {"x": x}, weights={k: np.asarray(v) for k, v in weights.items()}, **more)


_WHERE = "z = Mul(x, one) s = Where(keep, z, low) y = Softmax(s)"
_ADD = "f = Cast<to = 1>(keep) i = Sub(one, f) m = Mul(i, low) s = Add(x, m) y = Softmax(s)"
ONE = np.float32(1)

MASKS = [
    _masked("mask_constant/where_minus_infinity", _WHERE, CAUSAL, {"one": ONE, "low": np.float32(-np.inf)}),
    _masked(
        "mask_constant/where_lowest",
        _WHERE,
        CAUSAL,
        {"one": ONE, "low": LOWEST},
        notes="-inf in half does no harm: no row is masked wholly",
    ),
    _masked(
        "mask_constant/where_lowest_row_masked",
        _WHERE,
        ROW_MASKED,
        {"one": ONE, "low": LOWEST},
        hostile=True,
        notes="a wholly masked row: uniform in float32, NaN once the constant is -inf",
    ),
    _masked(
        "mask_constant/add_lowest", _ADD, CAUSAL, {"one": ONE, "low": LOWEST}, hostile=True, notes="0 * -inf is NaN"
    ),
    _masked("mask_constant/add_lowest_row_masked", _ADD, ROW_MASKED, {"one": ONE, "low": LOWEST}, hostile=True),
    _masked("mask_constant/add_minus_1e9", _ADD, ROW_MASKED, {"one": ONE, "low": np.float32(-1e9)}, hostile=True),
    _masked(
        "mask_constant/constant_of_shape",
        """sh = Shape(x) low = ConstantOfShape<value = float[1] {-3.4e38}>(sh)
            z = Mul(x, one) s = Where(keep, z, low) y = Softmax(s)""",
        ROW_MASKED,
        {"one": ONE},
        hostile=True,
    ),
    _masked(
        "mask_constant/added_matrix",
        "z = Mul(x, one) s = Add(z, m) y = Softmax(s)",
        CAUSAL,
        {"one": ONE, "m": np.where(CAUSAL, np.float32(0), LOWEST)},
        notes="adding -inf is harmless here, adding two such masks in float32 gives -inf as well",
    ),
    _masked(
        "mask_constant/added_twice",
        "a = Add(x, m) s = Add(a, m) y = Softmax(s)",
        CAUSAL,
        {"m": np.where(CAUSAL, np.float32(0), LOWEST)},
        notes="the sum of two masks is -inf in float32 already",
    ),
    _masked(
        "mask_constant/lowest_times_zero",
        "f = Cast<to = 1>(keep) m = Mul(f, low) z = Mul(m, zero) y = Add(x, z)",
        CAUSAL,
        {"low": LOWEST, "zero": np.float32(0)},
        hostile=True,
    ),
    _masked(
        "mask_constant/max_of_lowest",
        "s = Where(keep, x, low) m = ReduceMax<axes = [2]>(s) y = Sub(x, m)",
        CAUSAL,
        {"low": LOWEST},
    ),
    _masked(
        "mask_constant/output_holds_the_mask",
        "z = Mul(x, one) y = Where(keep, z, low)",
        CAUSAL,
        {"one": ONE, "low": LOWEST},
        hostile=True,
        notes="the sentinel itself is the answer",
    ),
]

_ROWS = normal(4, 64, seed="rows")

ARITHMETIC = [
    _wide("hostile_arithmetic/overflow_and_back", "a = Mul(x, big) y = Div(a, big)", {"big": np.float32(1e5)}, _ROWS),
    _wide(
        "hostile_arithmetic/underflow_and_back", "a = Mul(x, tiny) y = Div(a, tiny)", {"tiny": np.float32(1e-9)}, _ROWS
    ),
    _wide(
        "hostile_arithmetic/overflow_between_harmless_constants",
        "a = Mul(x, k) b = Mul(a, k) c = Mul(b, r) y = Mul(c, r)",
        {"k": np.float32(1000), "r": np.float32(0.001)},
        _ROWS,
        notes="every constant is in range, the product is not",
    ),
    _wide(
        "hostile_arithmetic/epsilon_in_division",
        "n = Abs(x) s = Mul(n, tiny) d = Add(s, eps) y = Div(s, d)",
        {"tiny": np.float32(1e-8), "eps": np.float32(1e-8)},
        _ROWS,
        notes="x / (y + eps) with both below 6e-8",
    ),
    _wide(
        "hostile_arithmetic/zero_over_epsilon",
        "r = Relu(x) d = Add(r, eps) y = Div(r, d)",
        {"eps": np.float32(1e-9)},
        _ROWS,
        notes="0 / (0 + 1e-9) is 0, and NaN when eps is rounded to zero",
    ),
    _wide(
        "hostile_arithmetic/negative_tiny_constant",
        "r = Relu(x) s = Sub(eps, r) g = Sign(s) a = Add(g, x) y = Identity(a)",
        {"eps": np.float32(-1e-9)},
        _ROWS,
        notes="-1e-9 must not become +6e-8, nor 0",
    ),
    _wide(
        "hostile_arithmetic/pow_to_mean",
        "a = Mul(x, big) p = Pow(a, two) m = ReduceMean<axes = [1]>(p) r = Sqrt(m) y = Div(a, r)",
        {"big": np.float32(400), "two": np.float32(2)},
        _ROWS,
    ),
    _wide(
        "hostile_arithmetic/square_underflows",
        "a = Mul(x, s) p = Mul(a, a) m = ReduceMean<axes = [1]>(p) r = Sqrt(m) y = Div(a, r)",
        {"s": np.float32(1e-4)},
        _ROWS,
    ),
    _wide(
        "hostile_arithmetic/exp_to_sum",
        "a = Mul(x, five) e = Exp(a) s = ReduceSum(e, axis) y = Div(e, s)",
        {"five": np.float32(5), "axis": np.array([1])},
        _ROWS,
    ),
    _wide(
        "hostile_arithmetic/long_sum",
        "a = Abs(x) s = ReduceSum(a, axis) l = Mul(s, r) y = Add(l, one)",
        {"r": np.float32(1e-5), "axis": np.array([1]), "one": np.float32(0)},
        normal(2, 100_000, seed="long"),
    ),
    _wide(
        "hostile_arithmetic/long_dot_product",
        "a = Abs(x) h = MatMul(a, w) y = Mul(h, r)",
        {"w": np.abs(normal(4096, 3, seed="wide")) * 40, "r": np.float32(1e-4)},
        normal(2, 4096, seed="wide"),
    ),
    _wide(
        "hostile_arithmetic/softplus_by_hand",
        "a = Mul(x, five) e = Exp(a) p = Add(e, one) l = Log(p) y = Mul(l, five)",
        {"five": np.float32(6), "one": np.float32(1)},
        _ROWS,
    ),
    _wide(
        "hostile_arithmetic/rsqrt_of_small_sum",
        "p = Mul(x, s) q = Mul(p, p) m = ReduceSum(q, axis) r = Sqrt(m) i = Reciprocal(r) y = Mul(p, i)",
        {"s": np.float32(1e-5), "axis": np.array([1])},
        _ROWS,
    ),
    _wide(
        "hostile_arithmetic/l2_norm_of_large",
        "a = Mul(x, big) n = ReduceL2<axes = [1]>(a) y = Div(a, n)",
        {"big": np.float32(1e4)},
        _ROWS,
    ),
    _wide(
        "hostile_arithmetic/weight_beyond_half",
        "h = MatMul(x, w) y = Mul(h, r)",
        {"w": weight(64, 8) * np.float32(1e6), "r": np.float32(1e-6)},
        _ROWS,
    ),
    _wide(
        "hostile_arithmetic/weight_below_half",
        "h = MatMul(x, w) y = Mul(h, r)",
        {"w": weight(64, 8) * np.float32(1e-8), "r": np.float32(1e8)},
        _ROWS,
    ),
    _wide(
        "hostile_arithmetic/positions_above_2048",
        "c = CumSum(o, axis) t = Sub(c, base) z = Mul(t, x) y = Slice(z, start, end, axis)",
        {
            "o": np.ones((1, 3000), np.float32),
            "axis": np.array([1]),
            "start": np.array([-16]),
            "end": np.array([3000]),
            "base": np.float32(2990),
        },
        normal(2, 3000),
        notes="integers above 2048 are not exact in half",
    ),
    _wide("hostile_arithmetic/sine_of_large", "p = Mul(x, big) y = Sin(p)", {"big": np.float32(1000)}, _ROWS),
    _wide("hostile_arithmetic/cancellation", "a = Add(x, big) y = Sub(a, big)", {"big": np.float32(3000)}, _ROWS),
]

CASES = [*MASKS, *ARITHMETIC]

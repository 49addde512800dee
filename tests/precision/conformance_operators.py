"""Operators with inputs, outputs or attributes that have no half form, and those whose form changed between opsets."""

from __future__ import annotations

import numpy as np

from .conformance_base import Case, case, normal, weight

X = normal(3, 8, seed="x")
W = weight(8, 8)
IMAGE = normal(1, 2, 4, 4, seed="image")
TWICE = np.array([1, 1, 2, 2], np.float32)


def _image(name: str, body: str, weights: dict[str, np.ndarray], opset: int, **more: object) -> Case:
    """A case with one image [N, 2, 4, 4] and one output [N, 2, H, V]."""
    text = f"g (float[N, 2, 4, 4] x) => (float[N, C, H, V] y) {{ h = Relu(x) {body} }}"
    return case(name, text, {"x": IMAGE}, opset=opset, weights=weights, **more)


def _x_to_y(name: str, body: str, weights: dict[str, np.ndarray] | None = None, **more: object) -> Case:
    text = f"g (float[N, 8] x) => (float[N, 8] y) {{ {body} }}"
    return case(name, text, {"x": X}, weights=weights, **more)


_LINEAR = 'mode = "linear", coordinate_transformation_mode = "half_pixel"'
_ROI = np.array([0, 0, 0.2, 0.2, 1, 1, 0.8, 0.8], np.float32)
_NO_ROI = np.array([], np.float32)

RESIZE = [
    _image("resize/opset_10_nearest", 'y = Resize<mode = "nearest">(h, s)', {"s": TWICE}, 10),
    _image("resize/opset_10_linear", 'y = Resize<mode = "linear">(h, s)', {"s": TWICE}, 10),
    _image("resize/opset_11_empty_roi", f"y = Resize<{_LINEAR}>(h, roi, s)", {"s": TWICE, "roi": _NO_ROI}, 11),
    _image(
        "resize/opset_11_empty_scales",
        f"y = Resize<{_LINEAR}>(h, none, none, sizes)",
        {"none": _NO_ROI, "sizes": np.array([1, 2, 7, 5])},
        11,
        notes="one empty float32 tensor serves as roi and as scales",
    ),
    _image(
        "resize/opset_11_crop",
        'y = Resize<mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize">(h, roi, s)',
        {"s": TWICE, "roi": _ROI},
        11,
    ),
    _image("resize/opset_13_cubic", 'y = Resize<mode = "cubic">(h, , s)', {"s": TWICE}, 13),
    _image(
        "resize/opset_18_antialias",
        f"y = Resize<{_LINEAR}, antialias = 1>(h, , s)",
        {"s": np.array([1, 1, 0.5, 0.5], np.float32)},
        18,
    ),
    _image("resize/opset_19_linear", f"y = Resize<{_LINEAR}>(h, , s)", {"s": TWICE}, 19),
    _image(
        "resize/opset_19_axes",
        'y = Resize<mode = "nearest", axes = [2, 3], keep_aspect_ratio_policy = "not_larger">(h, , , sizes)',
        {"sizes": np.array([7, 5])},
        19,
    ),
    _image(
        "resize/computed_scales",
        """shape = Shape(h) float_shape = Cast<to = 1>(shape) doubled = Mul(float_shape, s)
        scales = Div(doubled, float_shape) r = Resize<mode = "nearest">(h, , scales) y = Relu(r)""",
        {"s": TWICE},
        13,
        notes="shape arithmetic in float: the scales must arrive in float32",
    ),
    _image(
        "resize/sizes_through_float",
        """shape = Shape(h) f = Cast<to = 1>(shape) m = Mul(f, s) r = Floor(m) sizes = Cast<to = 7>(r)
        y = Resize<mode = "nearest">(h, , , sizes)""",
        {"s": np.array([1, 1, 1.75, 1.3], np.float32)},
        13,
    ),
    _image("upsample/opset_9_nearest", 'y = Upsample<mode = "nearest">(h, s)', {"s": TWICE}, 9),
    _image("upsample/opset_9_linear", 'y = Upsample<mode = "linear">(h, s)', {"s": TWICE}, 9),
]

CLIP = [
    _x_to_y("clip/opset_9_attributes", "h = MatMul(x, w) y = Clip<min = -0.5, max = 0.75>(h)", {"w": W}, opset=9),
    _x_to_y("clip/opset_10_default_bounds", "h = MatMul(x, w) y = Clip<min = 0.0>(h)", {"w": W}, opset=10),
    _x_to_y(
        "clip/opset_11_inputs",
        "h = MatMul(x, w) y = Clip(h, low, high)",
        {"w": W, "low": np.array(-0.5, np.float32), "high": np.array(0.75, np.float32)},
        opset=11,
    ),
    _x_to_y(
        "clip/bounds_beyond_half",
        "h = MatMul(x, w) y = Clip(h, low, high)",
        {"w": W, "low": np.array(-0.5, np.float32), "high": np.array(3.4028235e38, np.float32)},
        notes="an infinite upper bound would do here: say so, or keep it",
    ),
    _x_to_y(
        "clip/constant_node_bounds",
        """h = MatMul(x, w) low = Constant<value_float = -65520.0>() high = Constant<value_float = 1.0>()
        y = Clip(h, low, high)""",
        {"w": W},
    ),
    _x_to_y(
        "clip/tiny_lower_bound",
        "h = Relu(x) c = Clip(h, low, ) l = Log(c) y = Mul(l, k)",
        {"low": np.array(1e-12, np.float32), "k": np.array(0.125, np.float32)},
        hostile=True,
        notes="log(max(h, 1e-12)): the bound is zero in half, the logarithm -inf",
    ),
    _x_to_y(
        "clip/bounds_shared_with_add",
        "h = MatMul(x, w) c = Clip(h, , high) y = Add(c, high)",
        {"w": W, "high": np.array(0.75, np.float32)},
    ),
    _x_to_y("clip/computed_bound", "h = MatMul(x, w) m = ReduceMean<keepdims = 0>(x) y = Clip(h, m, )", {"w": W}),
    case(
        "clip/integers",
        """g (int64[N, 8] i, float[N, 8] x) => (float[N, 8] y) <int64 low = {1}, int64 high = {4}> {
          c = Clip(i, low, high)  f = Cast<to = 1>(c)  y = Mul(f, x) }""",
        {"i": np.arange(24).reshape(3, 8) % 7, "x": X},
    ),
]

_RANKED = (np.random.default_rng(5).permuted(np.tile(np.arange(8.0), (3, 1)), axis=1) / 4 - 1).astype(np.float32)
_BOXES = np.array([[[0, 0, 1, 1], [0, 0.1, 1, 1.1], [0, 10, 1, 11], [0, 10.1, 1, 11.2], [0, 100, 1, 101]]], np.float32)

_TOPK = """g (float[N, 8] x) => (float[N, 3] y, int64[N, 3] i) {{
  h = Mul(x, two)
  y, i = TopK{}
}}"""

_NMS = """g (float[1, 5, 4] boxes, float[1, 1, 5] scores) => (int64[M, 3] picked, float[1, 5, 4] y) {
  b = Mul(boxes, one)
  s = Sigmoid(scores)
  picked = NonMaxSuppression(b, s, count, iou, low)
  y = Mul(b, iou)
}"""

SELECTION = [
    case(
        "top_k/opset_9_attribute", _TOPK.format("<k = 3>(h)"), {"x": _RANKED}, opset=9, weights={"two": np.float32(2)}
    ),
    case(
        "top_k/opset_10_input",
        _TOPK.format("(h, k)"),
        {"x": _RANKED},
        opset=10,
        weights={"two": np.float32(2), "k": np.array([3])},
    ),
    case(
        "top_k/opset_17",
        _TOPK.format("<largest = 0>(h, k)"),
        {"x": _RANKED},
        weights={"two": np.float32(2), "k": np.array([3])},
    ),
    case(
        "top_k/computed_k",
        """g (float[N, 8] x) => (float[N, K] y, int64[N, K] i) <int64[1] one = {1}, float r = {0.5}> {
          h = Relu(x)  s = Shape(h)  n = Gather(s, one)  f = Cast<to = 1>(n)  m = Mul(f, r)  k = Cast<to = 7>(m)
          y, i = TopK(h, k) }""",
        {"x": np.abs(_RANKED) + _RANKED / 10},
    ),
    case(
        "non_max_suppression/shared_threshold",
        _NMS,
        {"boxes": _BOXES, "scores": np.array([[[0.9, 0.75, 0.6, 0.95, 0.5]]], np.float32)},
        weights={
            "one": np.float32(1),
            "count": np.array([3]),
            "iou": np.array([0.5], np.float32),
            "low": np.array([0.3], np.float32),
        },
        notes="boxes, scores and thresholds are float32 by the schema; `iou` also feeds a Mul",
    ),
    case(
        "arg_and_compare/arg_max",
        """g (float[N, 8] x) => (int64[N] i, float[N, 8] y) {
          h = MatMul(x, e) i = ArgMax<axis = 1, keepdims = 0>(h) y = Softmax(h) }""",
        {"x": _RANKED},
        weights={"e": np.eye(8, dtype=np.float32)},
    ),
    case(
        "arg_and_compare/comparisons",
        """g (float[N, 8] x) => (bool[N, 8] a, bool[N, 8] b, float[N, 8] y) <float c = {0.3}> {
          h = Relu(x)  a = Greater(h, c)  e = Less(h, c)  n = Not(e)  b = And(a, n)  y = Where(a, h, x) }""",
        {"x": _RANKED},
    ),
    case(
        "arg_and_compare/is_nan_is_inf",
        """g (float[N, 8] x) => (bool[N, 8] a, bool[N, 8] b, float[N, 8] y) {
          h = Relu(x)  a = IsNaN(h)  b = IsInf(h)  s = Sign(x)  y = Mul(s, h) }""",
        {"x": _RANKED},
        opset=20,
    ),
    case(
        "arg_and_compare/non_zero",
        "g (float[N, 8] x) => (int64[2, M] i, float[N, 8] y) { h = Relu(x)  i = NonZero(h)  y = Add(h, x) }",
        {"x": _RANKED},
    ),
    case(
        "arg_and_compare/one_hot_floats",
        """g (int64[N] i, float[3, 8] x) => (float[N, 8] y) <int64 depth = {8}, float[2] values = {-0.5, 0.75}> {
          o = OneHot(i, depth, values)  y = Add(o, x) }""",
        {"i": np.array([1, 7, 3]), "x": X},
    ),
    case(
        "arg_and_compare/equal_and_where",
        """g (float[N, 8] x, float[N, 8] u) => (float[N, 8] y) {
          a = GreaterOrEqual(x, u)  h = MatMul(x, w)  y = Where(a, h, u) }""",
        {"x": _RANKED, "u": _RANKED[::-1].copy()},
        weights={"w": W},
        opset=16,
    ),
]

INDEXING = [
    case(
        "gather_scatter/embedding",
        "g (int64[N] i) => (float[N, 8] y) { e = Gather(t, i)  y = MatMul(e, w) }",
        {"i": np.array([0, 5, 2])},
        weights={"t": normal(10, 8), "w": W},
    ),
    _x_to_y(
        "gather_scatter/scatter_elements_and_nd",
        "s = ScatterElements<axis = 1>(x, i, u) n = ScatterND(s, j, v) y = MatMul(n, w)",
        {"i": np.array([[0, 3]]), "u": normal(1, 2), "j": np.array([[2]]), "v": normal(1, 8), "w": W},
    ),
    _x_to_y("gather_scatter/pad_value", "h = Relu(x) y = Pad(h, p, v)", {"p": np.zeros(4, int), "v": np.float32(0.1)}),
    case(
        "gather_scatter/pad_opset_9",
        "g (float[N, 8] x) => (float[N, 10] y) { h = Relu(x) y = Pad<pads = [0, 1, 0, 1], value = 0.25>(h) }",
        {"x": X},
        opset=9,
    ),
    _x_to_y("gather_scatter/trilu", "h = Relu(x) t = Trilu(h, k) y = Add(t, x)", {"k": np.array(1)}),
    _x_to_y(
        "gather_scatter/expand_and_tile",
        "e = Expand(b, s) t = Tile(b, r) a = Add(e, t) y = Mul(a, x)",
        {"b": normal(1, 8), "s": np.array([3, 8]), "r": np.array([3, 1])},
    ),
    case(
        "cumsum/opset_11",
        "g (float[N, 8] x) => (float[N, 8] y) { h = Relu(x)  c = CumSum(h, axis)  y = Tanh(c) }",
        {"x": X},
        opset=11,
        weights={"axis": np.array(1)},
        notes="CumSum has no float16 below opset 14",
    ),
    case(
        "cumsum/opset_14_exclusive",
        "g (float[N, 8] x) => (float[N, 8] y) { h = Relu(x)  y = CumSum<exclusive = 1, reverse = 1>(h, axis) }",
        {"x": X},
        opset=14,
        weights={"axis": np.array(1)},
    ),
    case(
        "cumsum/positions",
        "g (int64[N, 8] m, float[N, 8] x) => (float[N, 8] y) { c = CumSum(m, axis) f = Cast<to = 1>(c) y = Mul(f, x) }",
        {"m": np.ones((3, 8), int), "x": X},
        weights={"axis": np.array(1)},
    ),
    case(
        "einsum/attention_scores",
        """g (float[N, 4, 8] q, float[N, 4, 8] k) => (float[N, 4, 4] y) {
          s = Einsum<equation = "bid,bjd->bij">(q, k)  y = Softmax(s) }""",
        {"q": normal(2, 4, 8), "k": normal(2, 4, 8, seed="k")},
    ),
    case(
        "einsum/three_operands_opset_12",
        'g (float[N, 8] x) => (float[N, 8] y) { y = Einsum<equation = "ni,ij,jk->nk">(x, w, w) }',
        {"x": X},
        opset=12,
        weights={"w": W},
    ),
    *[
        case(
            f"split/{label}",
            f"""g (float[N, 8] x) => (float[N, 8] y) {{
              h = MatMul(x, w) {call} t = Tanh(a) s = Sigmoid(b) y = Concat<axis = 1>(t, s) }}""",
            {"x": X},
            opset=opset,
            weights={"w": W, "parts": np.array([3, 5])},
        )
        for label, opset, call in [
            ("opset_9_attribute", 9, "a, b = Split<axis = 1, split = [3, 5]>(h)"),
            ("opset_11_even", 11, "a, b = Split<axis = 1>(h)"),
            ("opset_13_input", 13, "a, b = Split<axis = 1>(h, parts)"),
            ("opset_18_num_outputs", 18, "a, b = Split<axis = 1, num_outputs = 2>(h)"),
        ]
    ],
    _x_to_y(
        "identity_dropout/opset_9", "i = Identity(x) d, m = Dropout<ratio = 0.5>(i) y = MatMul(d, w)", {"w": W}, opset=9
    ),
    _x_to_y(
        "identity_dropout/opset_13_ratio_input",
        "h = MatMul(x, w) d, m = Dropout(h, ratio, off) i = Identity(d) y = Relu(i)",
        {"w": W, "ratio": np.float32(0.5), "off": np.array(False)},
        opset=13,
        notes="the ratio has a type of its own (T1)",
    ),
    _x_to_y(
        "identity_dropout/ratio_shared_with_mul",
        "h = MatMul(x, w) d = Dropout(h, ratio) y = Mul(d, ratio)",
        {"w": W, "ratio": np.float32(0.5)},
        opset=13,
    ),
    _x_to_y("identity_dropout/identity_of_initialiser", "k = Identity(w) h = MatMul(x, k) y = MatMul(h, k)", {"w": W}),
]

CASES = [*RESIZE, *CLIP, *SELECTION, *INDEXING]

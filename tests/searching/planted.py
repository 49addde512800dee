"""A trained classifier with traps for half precision planted in it, one or several of five kinds, as ONNX text.

Each trap leaves the FP32 predictions as they are. `PLANTED` says which units must be FP32: tests compare with it, and prove it by making
every single unit half; nothing of it reaches the search.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from tests import zoo
from tests.precision.visible import graph, named

# kind -> the lines it adds; {x} is the tensor before, the last line makes `KIND_y`. Constants are written k_KIND_NAME.
_LINES = {
    # 300 * 300 * x leaves the range inside the block; 300 itself is harmless
    "overflow": "overflow_a = Mul({x}, k_300)  overflow_b = Mul(overflow_a, k_300)  overflow_c = Relu(overflow_b) "
    " overflow_d = Div(overflow_c, k_300)  overflow_y = Div(overflow_d, k_300)",
    # x * (x / (x + eps)): where ReLU gave 0 this is 0 / eps, and 0 / 0 once eps is 0
    "epsilon": "epsilon_a = Add({x}, k_eps)  epsilon_b = Div({x}, epsilon_a)  epsilon_y = Mul({x}, epsilon_b)",
    # only the constant is beyond the range: what goes in and what comes out is not
    "constant": "constant_a = Div({x}, k_128)  constant_b = Mul(constant_a, k_huge)  constant_y = Div(constant_b, k_1024)",
    # a sum over 8192 values near 14 leaves the range, their mean does not; logits are divided by 1 + mean / 64 > 0
    "reduction": "reduction_v = Flatten(images)  reduction_a = Tile(reduction_v, k_repeats)  reduction_b = Mul(reduction_a, reduction_a)  reduction_c = Mul(reduction_b, k_16) "
    " reduction_d = ReduceSum(reduction_c, k_axes)  reduction_e = Div(reduction_d, k_4096)  reduction_f = Div(reduction_e, k_128) "
    " reduction_g = Add(reduction_f, k_1)  reduction_y = Div({x}, reduction_g)",
    # attention pooling with an additive mask that is fed: -3.4e38 becomes -inf, and a row that is masked as a whole NaN;
    # logits are multiplied by 1 + mean of the pooled values > 0
    "mask": "mask_a = Flatten(images)  mask_s = MatMul(mask_a, k_queries)  mask_s2 = Reshape(mask_s, k_score_shape) "
    " mask_b = Unsqueeze(mask, k_mask_axis)  mask_c = Add(mask_s2, mask_b)  mask_d = Softmax <axis = -1> (mask_c) "
    " mask_e = ReduceMax <keepdims = 0> (mask_d, k_mask_axes)  mask_g = Add(mask_e, k_1) "
    " mask_y = Mul({x}, mask_g)",
}
KINDS = tuple(_LINES)
PLANTED = {
    "overflow": {"overflow_b", "overflow_c", "overflow_d"},
    "epsilon": {"epsilon_a", "epsilon_b"},
    "constant": {"constant_b"},
    "reduction": {"reduction_d", "reduction_e"},
    "mask": {"input:mask", "mask_b", "mask_c", "mask_d"},
}
"""Kind -> the units that cannot be half: those around the tensor that leaves the range, or that hold the constant."""
_WHERE = {"overflow": "first", "epsilon": "second", "constant": "hidden", "reduction": "logits", "mask": "logits"}
_CONSTANTS: dict[str, Any] = {
    "k_300": 300.0, "k_eps": 2e-8, "k_128": 128.0, "k_huge": 131072.0, "k_1024": 1024.0, "k_16": 16.0, "k_4096": 4096.0, "k_1": 1.0,
}  # fmt: skip
_BODY = (
    ("first", "c1 = Conv <pads = [1, 1, 1, 1]> (images, w1, b1)  r1 = Relu(c1)  p1 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r1)", "p1"),
    ("second", "c2 = Conv <pads = [1, 1, 1, 1]> ({x}, w2, b2)  r2 = Relu(c2)  p2 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r2)", "p2"),
    ("hidden", "v = Flatten({x})  l1 = Gemm <transB = 1> (v, w3, b3)  r3 = Relu(l1)", "r3"),
    ("logits", "l2 = Gemm <transB = 1> ({x}, w4, b4)", "l2"),
)  # fmt: skip
_WEIGHTS = {
    "w1": "model.first.0.weight", "b1": "model.first.0.bias", "w2": "model.second.0.weight", "b2": "model.second.0.bias",
    "w3": "model.head.0.weight", "b3": "model.head.0.bias", "w4": "model.head.2.weight", "b4": "model.head.2.bias",
}  # fmt: skip


def planted_classifier(folder: Path, kinds: Collection[str]) -> ir.Model:
    """The digits classifier, trained, with these traps; each node is named after what it makes."""
    lines, made = [], "images"
    for place, text, last in _BODY:
        lines.append(text.format(x=made))
        made = last
        for kind in KINDS:
            if kind in kinds and _WHERE[kind] == place:
                lines.append(_LINES[kind].format(x=made))
                made = f"{kind}_y"
    lines.append(f"scores = Identity({made})")
    inputs = "float[N, 1, 8, 8] images" + (", float[N, 4] mask" if "mask" in kinds else "")
    text = f"g ({inputs}) => (float[N, 10] scores) {{ {'  '.join(lines)} }}"
    trained = ir.load(zoo.trained_digits_cnn(folder, "none").path).graph.initializers
    weights: dict[str, Any] = {name: trained[known].const_value.numpy() for name, known in _WEIGHTS.items()}  # type: ignore[union-attr]
    words = set(re.findall(r"k_\w+", text))
    weights |= {name: np.array(value, np.float32) for name, value in _CONSTANTS.items() if name in words}
    shapes = {
        "k_repeats": [1, 128], "k_axes": [1], "k_score_shape": [-1, 1, 4], "k_mask_axis": [1], "k_mask_axes": [2],
    }  # fmt: skip
    weights |= {name: np.array(value, np.int64) for name, value in shapes.items() if name in words}
    if "mask" in kinds:
        weights["k_queries"] = (np.random.default_rng(0).normal(size=(64, 4)) / 8).astype(np.float32)
    return named(graph(text, opset=18, **weights))


def planted_feeds(folder: Path, kinds: Collection[str], num_samples: int = 32) -> dict[str, np.ndarray]:
    """Held-out images; every fourth row of the mask hides everything, as padding does."""
    feeds = zoo.trained_digits_cnn(folder, "none").feeds(num_samples)
    if "mask" in kinds:
        hidden = np.random.default_rng(1).random((num_samples, 4)) < 0.4
        hidden[::4] = True
        feeds["mask"] = np.where(hidden, np.finfo(np.float32).min, 0.0).astype(np.float32)
    return feeds

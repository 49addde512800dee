"""How large the sums inside a matrix product or convolution can become before their terms cancel.

Whatever the order in which an engine adds the terms of a dot product, no sum on the way exceeds the sum of the positive terms or that
of the negative ones, and the larger of the two is (sum of magnitudes + |result|) / 2: both are known once the same op has run on
magnitudes. A kernel that accumulates in FP32 does not mind; one that accumulates in half gives infinity.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from mpdeploy.precision.chain import Chain
from mpdeploy.precision.formats import HalfFormat
from mpdeploy.precision.graph_index import GraphIndex, constant_tensor
from mpdeploy.precision.ranges import Ranges

DOT_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"})


def is_dot_product(node: ir.Node) -> bool:
    """Whether each value that comes out is a sum of products."""
    return node.op_type in DOT_PRODUCTS and node.domain in ("", "ai.onnx")


def add_largest_sum(chain: Chain, dtype: ir.DataType) -> ir.Value:
    """Compute, for each value that comes out of a dot product, the largest sum that can arise on the way.

    Args:
        chain: of the product, to add nodes to.
        dtype: element type of what goes in and comes out.
    """
    node, add = chain.node, chain.add
    half = add("Constant", [], {"value": ir.AttrTensor("value", ir.tensor(np.array(0.5, dtype.numpy()), dtype=dtype))})

    def magnitude(value: ir.Value, *, halved: bool) -> ir.Value:
        absolute = add("Abs", [value])
        return add("Mul", [absolute, half]) if halved else absolute

    # Each term is halved once: at its first factor, or where it is a bias.
    once = (0,) if node.op_type == "Einsum" else (0, 2)
    taken: list[ir.Value | None] = [
        None if value is None else magnitude(value, halved=position in once)
        for position, value in enumerate(node.inputs)
    ]
    attributes = dict(node.attributes)
    for name in ("alpha", "beta"):
        if name in attributes:
            attributes[name] = ir.AttrFloat32(name, abs(attributes[name].as_float()))
    terms = add(node.op_type, taken, attributes)
    return add("Add", [terms, magnitude(node.outputs[0], halved=True)])


def could_leave(index: GraphIndex, node: ir.Node, ranges: Ranges, half: HalfFormat) -> bool:
    """Whether the largest values that go in, in every term, would leave the range: only then is it worth measuring."""
    factors = [value for value in node.inputs[:2] if value is not None]
    made = ranges.tensors.get(node.outputs[0].name or "")
    if not is_dot_product(node) or made is None or not made.count:
        return False
    largest, sizes = 1.0, []
    for value in factors:
        tensor = constant_tensor(value) if index.is_constant(value) else None
        stats = ranges.tensors.get(value.name or "")
        if tensor is not None:
            weights = tensor.numpy()
            largest *= float(np.abs(weights).max(initial=0))
            sizes.append(float(weights.size))
        elif stats is not None and stats.count:
            largest *= stats.amax * stats.tail_factor
            sizes.append(stats.count / max(ranges.num_feeds, 1))
        else:
            return True
    return largest * _terms(index, node, sizes, made.count / max(ranges.num_feeds, 1)) >= half.overflow_from


def _terms(index: GraphIndex, node: ir.Node, sizes: list[float], made: float) -> float:
    """At least the number of terms in a sum."""
    if node.op_type in ("Conv", "ConvTranspose"):
        weights = constant_tensor(node.inputs[1]) if node.inputs[1] is not None else None
        return sizes[1] / weights.numpy().shape[0] if weights is not None and node.op_type == "Conv" else sizes[1]
    if node.op_type == "Einsum":
        return math.prod(sizes) / max(made, 1.0)
    return math.sqrt(math.prod(sizes) / max(made, 1.0))  # MK * KN / MN = K^2; K^2 B where both have a batch

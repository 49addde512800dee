"""What engines make of an op that ONNX calls one: several, with tensors between them that are stored in half as well.

`take_apart` replaces ops by what an engine makes of them: TensorRT's parser (11.4 and RTX 1.7, read from the networks that it makes)
and OpenVINO (2026, told from the bits of its BF16 answers); tests look again. ONNX Runtime has one kernel for each of these ops.
`hold_sums_in_half` goes further: it holds the sums inside reductions, norms and dot products in half, which is the worst that an
engine may do where its documentation does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from mpdeploy.errors import UsageError, closest_names
from mpdeploy.precision.chain import Attributes, Chain
from mpdeploy.precision.dot_products import DOT_PRODUCTS, add_largest_sum
from mpdeploy.precision.formats import FLOAT, HALF_TYPES
from mpdeploy.precision.graph_index import GraphIndex

Inner = list[ir.Value]
"""Tensors between the pieces that are never stored: one kernel computes both sides."""


@dataclass(frozen=True, slots=True)
class Form:
    """How an engine takes an op apart.

    Attributes:
        split: adds the pieces to a chain; returns the tensors between them that stay in FP32.
        holds_in_fp32: in FP32, too, the pieces compute what the op does.
    """

    split: Callable[[Chain, Attributes], Inner]
    holds_in_fp32: bool = True


def _log_of_softmax(chain: Chain, attributes: Attributes) -> Inner:
    chain.add("Log", [chain.add("Softmax", [chain.node.inputs[0]], attributes)])
    return []


def _log_softmax(chain: Chain, attributes: Attributes) -> Inner:
    if chain.opset < 13:
        return []  # there it is over all axes from one on
    axis = attributes["axis"].as_int() if "axis" in attributes else -1
    taken = chain.node.inputs[0]
    assert taken is not None
    shifted = chain.add("Sub", [taken, chain.reduce("ReduceMax", taken, axis)])
    total = chain.reduce("ReduceL1", chain.add("Exp", [shifted]), axis)
    chain.add("Sub", [shifted, chain.add("Log", [total])])
    return [total]


def _sum_of_squares(chain: Chain, attributes: Attributes) -> Inner:
    taken = chain.node.inputs[0]
    square = chain.add("Mul", [taken, taken])
    chain.add("ReduceL1", [square, *chain.node.inputs[1:]], attributes)  # a sum, in the same form at every opset
    return []


def _log_sum_exp(chain: Chain, attributes: Attributes) -> Inner:
    taken, axes = chain.node.inputs[0], list(chain.node.inputs[1:])
    kept = {**attributes, "keepdims": ir.AttrInt64("keepdims", 1)}
    shifted = chain.add("Sub", [taken, chain.add("ReduceMax", [taken, *axes], kept)])
    total = chain.add("ReduceL1", [chain.add("Exp", [shifted]), *axes], attributes)
    largest = chain.add("ReduceMax", [taken, *axes], attributes)
    chain.add("Add", [chain.add("Log", [total]), largest])
    return [total]


def _log_sum_exp_all_stored(chain: Chain, attributes: Attributes) -> Inner:
    _log_sum_exp(chain, attributes)
    return []


def _mish(chain: Chain, attributes: Attributes) -> Inner:
    taken = chain.node.inputs[0]
    chain.add("Mul", [taken, chain.add("Tanh", [chain.add("Softplus", [taken])])])
    return []


def _norm_then_affine(chain: Chain, attributes: Attributes) -> Inner:
    """What is normalised is stored; scale and bias are one kernel. A scale whose size is not known leaves the op whole."""
    node = chain.node
    scale, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    dtype = scale.dtype if scale is not None else None
    shape = scale.shape if scale is not None else None
    if dtype is None or shape is None or not shape.is_static() or any(output.uses() for output in node.outputs[1:]):
        return []
    ones = ir.tensor(np.ones(shape.numpy(), dtype.numpy()))
    one = chain.add("Constant", [], {"value": ir.AttrTensor("value", ones)})
    scaled = chain.add("Mul", [chain.add(node.op_type, [node.inputs[0], one], attributes), scale])
    if bias is None:
        return []
    chain.add("Add", [scaled, bias])
    return [scaled]


TENSORRT: Mapping[str, Form] = {
    "LogSoftmax": Form(_log_of_softmax, holds_in_fp32=False),
    "ReduceSumSquare": Form(_sum_of_squares),
    "ReduceLogSumExp": Form(_log_sum_exp_all_stored),
    "Mish": Form(_mish),
}
OPENVINO: Mapping[str, Form] = {
    "LayerNormalization": Form(_norm_then_affine),
    "RMSNormalization": Form(_norm_then_affine),
    "LogSoftmax": Form(_log_softmax),
    "ReduceSumSquare": Form(_sum_of_squares),
    "ReduceLogSumExp": Form(_log_sum_exp),
}
FORMS: Mapping[str, Mapping[str, Form]] = {
    "tensorrt": TENSORRT,
    "tensorrt-rtx": TENSORRT,
    "openvino": OPENVINO,
    "onnxruntime": {},
}
"""Engine -> the ops that it takes apart."""
USUAL = "tensorrt"
"""Whose forms are emulated where nobody says."""


@dataclass
class TakenApart:
    """What `take_apart` did.

    Attributes:
        node_of: name of a new node -> that of the node that it is a piece of.
        inner: the tensors between pieces that are never stored.
    """

    node_of: dict[str, str] = field(default_factory=dict)
    inner: set[ir.Value] = field(default_factory=set)


def forms_of(engine: str) -> Mapping[str, Form]:
    """The ops that an engine takes apart.

    Raises:
        UsageError: there is no such engine.
    """
    if engine not in FORMS:
        raise UsageError(f"There is no engine '{engine}'.", hint=f"closest names: {closest_names(engine, FORMS)}")
    return FORMS[engine]


def take_apart(model: ir.Model, engine: str = USUAL, *, in_fp32: bool = False) -> TakenApart:
    """Replace half nodes, in every body, by what an engine makes of them.

    Args:
        model: it is changed.
        engine: a row of `FORMS`.
        in_fp32: replace FP32 nodes instead, where that computes the same.

    Raises:
        UsageError: there is no such engine.
    """
    forms, index, done = forms_of(engine), GraphIndex.of(model), TakenApart()
    opset = model.graph.opset_imports.get("", 0)
    for node in list(index.nodes.values()):
        form = forms.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        dtype = index.dtypes.get(node.outputs[0]) if form is not None else None
        if form is None or (dtype != FLOAT or not form.holds_in_fp32 if in_fp32 else dtype not in HALF_TYPES):
            continue
        chain = Chain(node, opset)
        made, users = node.outputs[0], list(node.outputs[0].uses())
        inner = form.split(chain, dict(node.attributes))
        if not chain.nodes:
            continue
        done.inner.update(inner)
        done.node_of.update((piece.name or "", index.id_of[node]) for piece in chain.nodes)
        _continue_with(index, chain, users)
        made.name = f"{made.name}.whole"
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    return done


def _continue_with(index: GraphIndex, chain: Chain, users: Sequence[tuple[ir.Node, int]]) -> None:
    """The chain's last output takes the name and the users of the node's."""
    made, last = chain.node.outputs[0], chain.nodes[-1].outputs[0]
    assert chain.node.graph is not None
    chain.node.graph.insert_after(chain.node, chain.nodes)
    for user, position in users:
        user.replace_input_with(position, last)
    for graph in index.graphs:
        for position, output in enumerate(graph.outputs):
            if output is made:
                graph.outputs[position] = last
    last.shape, last.type = made.shape, made.type
    made.name, last.name = f"{made.name}.before", made.name


MEANS = frozenset({"ReduceMean", "GlobalAveragePool"})
NORMS = frozenset({"LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "ReduceL2"})


def hold_sums_in_half(model: ir.Model) -> None:
    """Hold the sums inside half means and dot products, and the squares inside half norms, in half: what overflows there is lost.

    Of a dot product it is the largest sum that any order of its terms can give (see `dot_products`).
    """
    index = GraphIndex.of(model)
    for node in list(index.nodes.values()):
        dtype = index.dtypes.get(node.outputs[0])
        if node.domain not in ("", "ai.onnx") or dtype not in HALF_TYPES:
            continue
        if node.op_type not in MEANS | NORMS | DOT_PRODUCTS:
            continue
        chain = Chain(node)
        made, users = node.outputs[0], list(node.outputs[0].uses())
        if node.op_type in MEANS:
            count = _ratio_of_sizes(chain, node.inputs[0], made)
            chain.add("Div", [chain.add("Mul", [made, count]), count])
        elif node.op_type in DOT_PRODUCTS:
            largest = add_largest_sum(chain, dtype)
            chain.add("Add", [made, chain.add("Sub", [largest, largest])])  # zero, or NaN
        else:
            squares = chain.add("Mul", [node.inputs[0], node.inputs[0]])
            lost = chain.add("Sub", [squares, squares])  # zero, or NaN where a square is infinite
            worst = chain.add("ReduceMax", [lost], {"keepdims": ir.AttrInt64("keepdims", 0)})
            chain.add("Add", [made, worst])
        _continue_with(index, chain, users)


def _ratio_of_sizes(chain: Chain, taken: ir.Value | None, made: ir.Value) -> ir.Value:
    sizes: list[ir.Value | None] = [chain.add("Size", [value]) for value in (taken, made)]
    return chain.add("Cast", [chain.add("Div", sizes)], {"to": ir.AttrInt64("to", int(ir.DataType.FLOAT))})

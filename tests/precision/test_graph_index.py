"""The index: ids, bodies, and the type of every tensor."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from mpdeploy.errors import ModelError
from mpdeploy.precision.graph_index import GraphIndex, all_graphs, constant_tensor
from mpdeploy.precision.passes.sort_nodes import sort_nodes
from tests.precision.conformance_base import floats, graph_model
from tests.precision.visible import CHAIN, FLOAT, FLOAT16, W, graph, named, snapshot, types_of

IF = """g (float[N, 8] x, bool c) => (float[N, 8] y) {
  y = If(c) <
    then_branch = t () => (float[N, 8] a) { a = Exp(x) },
    else_branch = e () => (float[N, 8] b) { i = Tanh(x)  b = Neg(i) }
  > }"""


def _of_nodes(*nodes: object) -> ir.Model:
    return ir.from_proto(graph_model(nodes, [floats("x", "N", 8)], [floats("y", "N", 8)]))  # type: ignore[arg-type]


def test_a_named_node_is_known_by_its_name() -> None:
    assert list(GraphIndex.of(named(graph(CHAIN, w=W))).nodes) == ["h", "e", "y"]


def test_an_unnamed_node_is_known_by_op_and_position() -> None:
    assert list(GraphIndex.of(graph(CHAIN, w=W)).nodes) == ["MatMul_0", "Exp_1", "MatMul_2"]


def test_a_made_up_id_avoids_a_name_that_is_taken() -> None:
    model = _of_nodes(
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Exp", ["a"], ["b"], name="Relu_0"),
        helper.make_node("Exp", ["b"], ["y"], name="Relu_0"),
    )
    assert list(GraphIndex.of(model).nodes) == ["Relu_0#2", "Relu_0", "Relu_0#3"]


def test_the_nodes_of_a_body_carry_their_owner_and_branch_in_their_ids() -> None:
    index = GraphIndex.of(graph(IF))
    assert list(index.nodes) == [
        "If_0",
        "If_0/then_branch/Exp_0",
        "If_0/else_branch/Tanh_0",
        "If_0/else_branch/Neg_1",
    ]
    owner = index.nodes["If_0"]
    assert [index.owner[body] for body in list(all_graphs(index.model.graph))[1:]] == [owner, owner]


def test_every_node_has_one_id_and_every_id_one_node() -> None:
    index = GraphIndex.of(graph(IF))
    assert {index.id_of[node]: node for node in index.nodes.values()} == index.nodes


def test_indexing_changes_nothing() -> None:
    model = graph(IF)
    before = snapshot(model)
    GraphIndex.of(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("body", "opset", "types"),
    [
        ("y = Cast<to = 10>(x)", 17, {"y": "FLOAT16"}),
        ("s = Shape(x)  y = ConstantOfShape(s)", 17, {"s": "INT64", "y": "FLOAT"}),
        ("s = Shape(x)  y = ConstantOfShape<value = int32[1] {7}>(s)", 17, {"y": "INT32"}),
        ("y = RandomNormal<shape = [2]>()", 17, {"y": "FLOAT"}),
        ("y = RandomNormalLike<dtype = 11>(x)", 17, {"y": "DOUBLE"}),
        ("y = RandomNormalLike(x)", 17, {"y": "FLOAT"}),
        ("y = EyeLike(x)", 17, {"y": "FLOAT"}),
        ("y = HannWindow<output_datatype = 10>(n)", 17, {"y": "FLOAT16"}),
        ("y = QuantizeLinear(x, one)", 17, {"y": "UINT8"}),
        ("q = QuantizeLinear(x, one)  y = DequantizeLinear(q, one)", 17, {"y": "FLOAT"}),
        ("d = Cast<to = 11>(x)  y = CastLike(x, d)", 17, {"y": "DOUBLE"}),
        ("y = Constant<value_float = 1.0>()", 17, {"y": "FLOAT"}),
        ("y = Constant<value_ints = [1]>()", 17, {"y": "INT64"}),
        ("s = SequenceConstruct(x, x)  y = SequenceAt(s, n)", 17, {"y": "FLOAT"}),
        ("s = SequenceEmpty<dtype = 10>()  y = ConcatFromSequence<axis = 0>(s)", 17, {"y": "FLOAT16"}),
        ("s = SplitToSequence<axis = 1>(x)  y = SequenceAt(s, n)", 17, {"y": "FLOAT"}),
        ("o = Optional(x)  y = OptionalGetElement(o)", 17, {"y": "FLOAT"}),
        ("y, m, d = LayerNormalization(x, w)", 17, {"y": "FLOAT", "m": "FLOAT", "d": "FLOAT"}),
        ("y = com.example.Odd(x)", 17, {}),
        ("v, y = TopK(x, k)", 17, {"v": "FLOAT", "y": "INT64"}),
    ],
)  # fmt: skip
def test_the_type_of_an_output_is_inferred_from_schema_attribute_or_content(
    body: str, opset: int, types: dict[str, str]
) -> None:
    weights = {"one": np.float32(1), "n": np.int64(0), "w": np.ones(8, np.float32), "k": np.array([1])}
    text = f"g (float[N, 8] x) => (float[N, 8] x2) {{ x2 = Identity(x)  {body} }}"
    found = types_of(graph(text, opset, {"com.example": 1}, **weights))
    made = {name: kind for name, kind in found.items() if name not in ("x", "x2", *weights)}
    assert {name: made.get(name) for name in types} == types
    if "Odd" in body:
        assert made == {}


def test_containers_are_no_tensors_and_their_elements_are_known() -> None:
    index = GraphIndex.of(
        graph(
            "g (float16[N, 8] x) => (float16[N, 8] y) { s = SequenceConstruct(x)  n = SequenceLength(s)  y = Neg(x) }"
        )
    )
    (s,) = (value for value in index.containers if value.name == "s")
    assert s not in index.dtypes
    assert index.elements[s] == FLOAT16


def test_an_if_has_the_type_of_its_branches_and_a_loop_of_its_body() -> None:
    assert types_of(graph(IF))["y"] == "FLOAT"
    loop = """g (float16[N, 8] x, int64 n, bool c) => (float16[N, 8] y, float[K, N, 8] s) {
      y, s = Loop(n, c, x) < body = b (int64 i, bool d, float16[N, 8] p) => (bool e, float16[N, 8] q, float[N, 8] r) {
        e = Identity(d)  q = Neg(p)  r = Cast<to = 1>(q) } > }"""
    found = types_of(graph(loop))
    assert (found["y"], found["s"]) == ("FLOAT16", "FLOAT")


def test_an_overridable_initialiser_is_no_constant_but_one_of_ir_version_3_is() -> None:
    model = graph("g (float[N, 8] x, float[8, 8] w) => (float[N, 8] y) { y = MatMul(x, w) }", w=W)
    value = model.graph.initializers["w"]
    assert not GraphIndex.of(model).is_constant(value)
    model.ir_version = 3
    assert GraphIndex.of(model).is_constant(value)


def test_the_content_of_constants_is_found_wherever_it_lies() -> None:
    model = graph(
        """g (float[N, 8] x) => (float[N, 8] y) {
          a = Constant<value_float = 0.5>()  b = Constant<value_floats = [1.0, 2.0]>()
          c = Constant<value = float {3.0}>()  i = Constant<value_int = 4>()  y = MatMul(x, w) }""",
        w=W,
    )
    found = [constant_tensor(node.outputs[0]) for node in model.graph][:4]
    assert [None if tensor is None else tensor.numpy().tolist() for tensor in found] == [0.5, [1.0, 2.0], 3.0, None]
    assert constant_tensor(model.graph.inputs[0]) is None


def test_nodes_out_of_order_are_sorted_and_a_cycle_is_refused() -> None:
    model = _of_nodes(helper.make_node("Exp", ["a"], ["y"]), helper.make_node("Relu", ["x"], ["a"]))
    sort_nodes(model)
    assert [node.op_type for node in model.graph] == ["Relu", "Exp"]
    cyclic = _of_nodes(helper.make_node("Add", ["x", "y"], ["a"]), helper.make_node("Relu", ["a"], ["y"]))
    with pytest.raises(ModelError, match="The graph 'g' has a cycle"):
        sort_nodes(cyclic)


def test_a_float_tensor_is_told_from_others() -> None:
    index = GraphIndex.of(graph("g (float[N] x, float16[N] z) => (float[N] y, float16[N] u) { y = Neg(x) u = Neg(z) }"))
    assert [index.is_float(v) for v in index.model.graph.inputs] == [True, False]
    assert not index.is_float(None)
    assert index.dtypes[index.model.graph.outputs[0]] == FLOAT

"""The user's keep-list and the reasons in a plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mpdeploy.errors import KeepListError
from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.keep_list import KeepEntry, match_keep_list, read_patterns, scopes_of
from mpdeploy.precision.plan import make_plan
from tests.precision.visible import BF16, CHAIN, FP16, W, X, graph, named, plan_of, ranges_of

NET = """g (float[N, 8] x, bool c) => (float[N, 8] y) {
  enc0 = MatMul(x, w)  enc1 = Softmax(enc0)  dec0 = MatMul(enc1, w)
  y = If(c) < then_branch = t () => (float[N, 8] a) { a = Softmax(dec0) }, else_branch = e () => (float[N, 8] b) { b = Neg(dec0) } > }"""


def _match(*patterns: str, model: object = None) -> list[str]:
    index = GraphIndex.of(model or named(graph(NET, w=W)))  # type: ignore[arg-type]
    return list(match_keep_list(index, read_patterns(patterns), model_name="net.onnx"))


@pytest.mark.parametrize(
    ("pattern", "nodes"),
    [
        ("enc1", ["enc1"]),
        ("enc*", ["enc0", "enc1"]),
        ("*0", ["enc0", "dec0"]),
        ("enc?", ["enc0", "enc1"]),
        ("[ed]*0", ["enc0", "dec0"]),
        ("op:Softmax", ["enc1", "a"]),
        ("op:*Mul", ["enc0", "dec0"]),
        ("y", ["y", "a", "b"]),
        ("a", ["a"]),
        ("*", ["enc0", "enc1", "dec0", "y", "a", "b"]),
    ],
    ids=["name", "glob", "suffix", "one letter", "set", "op type", "op glob", "an If with its bodies", "inside", "all"],
)
def test_a_pattern_names_nodes(pattern: str, nodes: list[str]) -> None:
    assert _match(pattern) == nodes


def test_a_name_with_glob_characters_is_taken_as_it_is_first() -> None:
    model = named(graph(CHAIN, w=W))
    model.graph[0].name = "layer[0]*"
    assert _match("layer[0]*", model=model) == ["layer[0]*"]


def test_a_duplicate_name_names_them_all() -> None:
    model = named(graph(CHAIN, w=W))
    model.graph[2].name = "h"
    assert _match("h", model=model) == ["h"], "the first has the name as its id"
    assert _match("h*", model=model) == ["h", "h#2"]


def test_a_scope_names_what_came_from_a_module_and_from_below_it() -> None:
    model = named(graph(CHAIN, w=W))
    for node, scopes in zip(model.graph, ("['', 'encoder', 'encoder.0', 'x']", "['', 'encoder', 'encoder.1', 'x']", "['', 'decoder', 'x']"), strict=True):  # fmt: skip
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    assert scopes_of(model.graph[0]) == ["encoder", "encoder.0", "x"]
    assert _match("scope:encoder", model=model) == ["h", "e"]
    assert _match("scope:encoder.1", model=model) == ["e"]
    assert _match("scope:*coder", model=model) == ["h", "e", "y"]
    with pytest.raises(KeepListError, match="'scope:enc' matches no node"):
        _match("scope:enc", model=model)


def test_a_pattern_that_matches_nothing_is_an_error_with_the_closest_names() -> None:
    with pytest.raises(KeepListError, match=r"Keep-list pattern 'enk1' matches no node in net.onnx") as raised:
        _match("enk1")
    assert "closest names: enc1" in str(raised.value)
    assert raised.value.exit_code == 2


def test_all_patterns_that_match_nothing_are_named_at_once() -> None:
    with pytest.raises(KeepListError, match="patterns 'nope', 'op:Gelu' match no node"):
        _match("enc*", "nope", "op:Gelu")


def test_a_text_file_holds_a_pattern_a_line_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "keep.txt"
    file.write_text("# the encoder\nenc1   # a softmax\n\n  op:Neg\n")
    assert read_patterns([f"@{file}", "dec0"]) == [("enc1", "a softmax"), ("op:Neg", ""), ("dec0", "")]


def test_a_plan_is_taken_back_as_a_keep_list(tmp_path: Path) -> None:
    model = named(graph(CHAIN, w=W))
    first = plan_of(model, keep=["e"])[1]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(first.to_json()))
    again = plan_of(named(graph(CHAIN, w=W)), keep=[f"@{file}"])[1]
    assert set(again.kept) == set(first.kept) == {"e"}
    assert str(again.kept["e"][0]) == "user: kept by 'e' (user: kept by 'e')"


def test_json_may_list_bare_names(tmp_path: Path) -> None:
    file = tmp_path / "keep.json"
    file.write_text('{"keep": ["e", {"node": "h", "reason": "why"}]}')
    assert read_patterns([f"@{file}"]) == [("e", ""), ("h", "why")]


@pytest.mark.parametrize(
    "content", [None, "{", '{"other": []}', '{"keep": [{"name": "e"}]}', '{"keep": [3]}', "\xff\xfe"]
)
def test_an_unreadable_file_is_an_error_that_names_it(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "keep.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(KeepListError, match=r"Cannot read the keep-list .*keep.json"):
        read_patterns([f"@{file}"])


def test_the_first_pattern_that_matches_gives_the_reason() -> None:
    index = GraphIndex.of(named(graph(NET, w=W)))
    kept = match_keep_list(index, [("enc1", "mine"), ("op:Softmax", "")], model_name="m")
    assert kept["enc1"] == KeepEntry("enc1", "mine")
    assert kept["a"] == KeepEntry("op:Softmax")


# ---- reasons in the plan


@pytest.mark.parametrize(
    ("body", "node", "reason"),
    [
        ("k = com.example.Odd(x)  y = Relu(x)", "k", "schema: com.example:Odd is no ONNX op: its types are not known"),
        ("o = com.example.Odd(x)  k = Add(o, x)  y = Relu(x)", "k", "schema: the type of 'o' is not known: it comes out of an op that ONNX does not define"),
        ("k = SequenceConstruct(x)  y = Relu(x)", "k", "schema: it handles a sequence or an optional, whose element type is fixed"),
        ("k = CumSum(x, axis)  y = Relu(k)", "k", "op: each value is a running sum: rounding adds up along the axis"),
        ("k = RandomNormal<shape = [3, 8]>()  y = Add(k, x)", "k", "op: no half kernel in ONNX Runtime"),
        ("k = Mul(x, tiny)  y = Relu(k)", "k", "constant: tiny: 1e-10 becomes 0 (smallest value held is 5.96e-08)"),
    ],
    ids=["unknown op", "after an unknown op", "sequence", "op rule", "random", "constant"],
)  # fmt: skip
def test_every_kept_node_says_why(body: str, node: str, reason: str) -> None:
    text = f"g (float[N, 8] x) => (float[N, 8] y) {{ {body} }}"
    model = named(graph(text, domains={"com.example": 1}, axis=np.int64(0), tiny=np.float32(1e-10)))
    assert str(plan_of(model)[1].kept[node][0]) == reason


def test_an_op_without_a_half_form_at_its_opset_says_so() -> None:
    text = "g (float[1, 1, 4, 4] x, float[1, 1, 3, 3] w) => (float[1, 1, 2, 2] y) { y = Conv(x, w) }"
    index = GraphIndex.of(named(graph(text, 17)))
    assert str(make_plan(index, BF16).kept["y"][0]) == "schema: Conv-11 has no BFLOAT16 form in ONNX"


BUCKETS = """g (float[N, 8] x, int64[N] i) => (float[N, 8] y) {
  f = Cast<to = 1>(i)  d = Div(f, six)  l = Log(d)  m = Mul(l, six)  b = Cast<to = 7>(m)
  e = Gather(table, b)  h = MatMul(x, w)  s = Add(h, e)  k = Cast<to = 7>(s)  r = Cast<to = 1>(k)  y = Add(s, r) }"""


def test_arithmetic_on_positions_that_ends_in_integers_stays_fp32() -> None:
    """The buckets of relative positions: a rounded logarithm looks another row up."""
    table = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    model = named(graph(BUCKETS, w=W, six=np.float32(6.3), table=table))
    plan = plan_of(model)[1]
    assert set(plan.kept) == {"f", "d", "l", "m", "b"}
    assert (
        str(plan.kept["l"][0]) == "op: arithmetic on positions that ends in integers: rounding would give another index"
    )


def test_data_that_becomes_integers_is_no_position_arithmetic() -> None:
    text = "g (float[N, 8] x) => (int64[N, 8] y) { h = MatMul(x, w)  s = Mul(h, h)  y = Cast<to = 7>(s) }"
    assert plan_of(named(graph(text, w=W)))[1].kept == {}


def test_every_node_with_floats_is_half_or_kept_with_a_reason() -> None:
    model = named(graph(NET, w=W))
    plan = plan_of(model, keep=["enc1"])[1]
    assert set(plan.ops) == set(plan.half_nodes) | set(plan.kept)
    assert all(reasons for reasons in plan.kept.values())
    assert not set(plan.half_nodes) & set(plan.kept)


def test_several_reasons_are_all_said_and_none_twice() -> None:
    model = named(graph(CHAIN, w=W))
    ranges = ranges_of(model, {"x": X})
    ranges.tensors["e"].merge_amax(1e6, "training")
    reasons = [str(reason) for reason in plan_of(model, keep=["e"], ranges=ranges)[1].kept["e"]]
    assert len(reasons) == len(set(reasons)) == 2
    assert reasons[0] == "user: kept by 'e'"


def test_a_plan_says_what_its_ranges_rest_on() -> None:
    model = named(graph(CHAIN, w=W))
    ranges = ranges_of(model, {"x": X}, {"x": X})
    assert plan_of(model)[1].ranges_from == "none"
    assert plan_of(model, ranges=ranges)[1].ranges_from == "calibration, 2 samples"
    ranges.synthetic = True
    assert plan_of(model, ranges=ranges)[1].ranges_from == "synthetic data, 2 samples"


def test_the_format_is_the_one_that_was_asked_for() -> None:
    assert plan_of(named(graph(CHAIN, w=W)), FP16)[1].to_json()["precision"] == "fp16"
    assert plan_of(named(graph(CHAIN, w=W)), BF16)[1].to_json()["precision"] == "bf16"

"""The precision map: blocks and nodes by what is planned and what really runs, and the tensors that decided."""

import onnx
import pytest
from onnx import parser

from mpdeploy.report.graph import Node, block_of_name, block_of_scopes, coarser, feeders, outline_of
from mpdeploy.report.precision_map import fp32_engines, precision_maps
from mpdeploy.run_dir import RunDir, StageRecord

GRAPH = [
    Node("a", "MatMul", "encoder.0", ("x",), ("t1",)),
    Node("b", "Softmax", "encoder.0", ("t1",), ("t2",)),
    Node("s", "Shape", "encoder.0", ("x",), ("n",)),
    Node("c", "MatMul", "head", ("t2", "n"), ("y",)),
]
PLAN = {
    "precision": "fp16",
    "half": ["a", "c"],
    "keep": [{"node": "b", "op": "Softmax", "reason": "exp(x) exceeds 65504", "contribution": 0.25}],
}


def _states(picture):
    return {cell["title"].split(" ")[0]: cell["css"] for block in picture["blocks"] for cell in block["cells"]}


@pytest.fixture
def built(tmp_path):
    run = RunDir.create(tmp_path / "run")

    def make(name, precision="fp16", **audit):
        audit = {"source": "inspector", "realised": True, "layers": {precision: 3}, **audit}
        run.put(StageRecord(f"40-build/{name}", "done", {}, report={"precision": precision, "audit": audit}))
        return run

    return make


def test_nodes_stand_in_their_block_in_the_order_of_the_graph():
    (found,) = precision_maps({"fp16": PLAN}, GRAPH)
    (planned,) = found["pictures"]
    assert [block["name"] for block in planned["blocks"]] == ["encoder.0", "head"]
    assert _states(planned) == {"a": "half", "b": "kept", "s": "other", "c": "half"}
    assert [block["reads"] for block in planned["blocks"]] == ["", "encoder.0"]
    assert found["kept"] == [{"node": "b", "op": "Softmax", "reason": "exp(x) exceeds 65504", "contribution": "0.25"}]


def test_what_an_engine_really_runs_is_drawn_beside_the_plan(built):
    run = built("tensorrt", nodes={"a": "fp32", "b": "fp16"})
    pictures = precision_maps({"fp16": PLAN}, GRAPH, run)[0]["pictures"]
    assert _states(pictures[1]) == {"a": "slow", "b": "fault", "s": "other", "c": "unknown"}
    assert "2 nodes differ from the plan" in pictures[1]["note"]


def test_an_older_record_without_nodes_is_drawn_from_what_differs(built):
    run = built("tensorrt", kept_in_half=["b"], half_in_fp32=[])
    pictures = precision_maps({"fp16": PLAN}, GRAPH, run)[0]["pictures"]
    assert _states(pictures[1]) == {"a": "half", "b": "fault", "s": "other", "c": "half"}


def test_an_audit_that_repeats_the_file_is_not_drawn_as_realised(built):
    run = built("tensorrt-rtx", realised=False, source="network", nodes={"a": "fp16"})
    picture = precision_maps({"fp16": PLAN}, GRAPH, run)[0]["pictures"][1]
    assert picture["blocks"] == []
    assert "not known yet" in picture["note"]


def test_an_engine_of_another_precision_is_not_drawn_on_this_plan(built):
    run = built("openvino", precision="fp32")
    assert len(precision_maps({"fp16": PLAN}, GRAPH, run)[0]["pictures"]) == 1
    assert fp32_engines(run) == ["openvino takes the FP32 model here; its layers: 3 fp32."]


def test_a_plan_without_its_graph_is_drawn_from_its_lists():
    plan = {"half": ["encoder/l0/a", "encoder/l0/b"], "keep": [{"node": "head/x/c", "op": "Exp", "reason": "r"}]}
    for graph in (None, GRAPH):  # GRAPH is another model's
        (found,) = precision_maps({"fp16": plan}, graph)
        assert [block["name"] for block in found["pictures"][0]["blocks"]] == ["encoder/l0", "head/x"]


def test_the_tensors_that_decided_are_drawn_with_what_half_does_to_them():
    exponents = {"-30": 5, "-20": 50, "0": 1000, "16": 3, "-127": 9}
    plan = {**PLAN, "ranges": {"t1": {"amax": 1e5, "exponents": exponents}, "broken": {"amax": 1.0}}}
    (card,) = precision_maps({"fp16": plan}, GRAPH)[0]["histograms"]
    assert card["tensor"] == "t1"
    assert card["caption"].startswith("read by b (Softmax); largest magnitude 1")
    assert [card["chart"].count(f'class="{css}"') for css in ("x-lost", "x-weak", "x-good")] == [2, 1, 1]
    (bf16,) = precision_maps({"bf16": {**plan, "precision": "bf16"}}, GRAPH)[0]["histograms"]
    assert [bf16["chart"].count(f'class="{css}"') for css in ("x-lost", "x-weak", "x-good")] == [0, 0, 4]


def test_a_plan_without_ranges_has_no_histogram():
    assert precision_maps({"fp16": PLAN}, GRAPH)[0]["histograms"] == []


def test_a_large_network_stays_small_on_the_page():
    nodes = [Node(f"n{i}", "Add", f"b.{i // 100}") for i in range(10_000)]
    (found,) = precision_maps({"fp16": {"half": [node.name for node in nodes], "keep": []}}, nodes)
    (picture,) = found["pictures"]
    assert sum(len(block["cells"]) for block in picture["blocks"]) == 2500
    assert picture["more"] == 7500
    assert not picture["labelled"]


def test_an_onnx_file_gives_nodes_blocks_and_tensors(tmp_path):
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { t = Exp(x) y = Neg(t) }'
    )
    for node, scope in zip(model.graph.node, ("encoder.layer.0.act", "head"), strict=True):
        node.name = f"node_{node.op_type}"
        entry = node.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", f"['', '{scope}', 'op']"
    onnx.save(model, tmp_path / "m.onnx")
    assert outline_of(tmp_path / "m.onnx") == [
        Node("node_Exp", "Exp", "encoder.layer.0", ("x",), ("t",)),
        Node("node_Neg", "Neg", "head", ("t",), ("y",)),
    ]
    (tmp_path / "no.onnx").write_bytes(b"this is no model")
    assert outline_of(tmp_path / "no.onnx") is None
    assert outline_of(tmp_path / "missing.onnx") is None


@pytest.mark.parametrize(
    ("scopes", "block"),
    [
        (["", "encoder", "encoder.layer", "encoder.layer.0", "encoder.layer.0.attn", "add"], "encoder.layer.0"),
        (["", "features", "features.3", "conv"], "features.3"),
        (["", "add"], "(top level)"),
    ],
)
def test_a_module_path_names_the_block(scopes, block):
    assert block_of_scopes(scopes) == block


@pytest.mark.parametrize(
    ("name", "block"), [("/encoder/l0/Add", "encoder/l0"), ("head/MatMul", "head"), ("Add_3", "(top level)")]
)
def test_a_node_name_names_the_block(name, block):
    assert block_of_name(name) == block


def test_blocks_of_one_node_each_are_joined():
    nodes = [Node(f"n{i}", "Relu", f"features.{i}") for i in range(8)] + [Node("h", "Gemm", "head.1")]
    assert [node.block for node in coarser(nodes)] == ["features"] * 8 + ["head"]
    assert coarser(GRAPH) is GRAPH
    assert feeders(GRAPH) == {"head": ["encoder.0"]}

"""`convert` as a whole: what is promised about its file, its numbers, and what it leaves behind when it fails."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from mpdeploy import proving
from mpdeploy.conversion import convert, write_plan
from mpdeploy.engines.onnxruntime import OrtRunner
from mpdeploy.errors import ConversionError, DataError, GateFailedError, KeepListError, ModelError, UsageError
from mpdeploy.precision.model_io import load_model
from mpdeploy.precision.rewrite import rewrite
from tests.precision.conformance import CASES
from tests.precision.conformance_base import floats, graph_model, normal, parsed, weight
from tests.precision.visible import CHAIN, FLOAT, FLOAT16, W, X, graph, lines, named, plan_of, rel_l2, run, snapshot

DEEP = """g (float[N, 8] x) => (float[N, 8] y, float[N, 8] z) {
  h = MatMul(x, w)  r = Relu(h)  s = Softmax(r)  m = MatMul(s, w)  t = Tanh(m)  y = Add(t, h)  z = MatMul(y, w) }"""
OVERFLOWS = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  q = Mul(h, k)  s = Mul(q, q)  r = Sqrt(s)  y = MatMul(r, w) }"


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    ir.save(named(graph(DEEP, w=W)), tmp_path / "deep.onnx")
    return tmp_path / "deep.onnx"


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    ir.save(named(graph(OVERFLOWS, w=W, k=np.float32(1000))), tmp_path / "o.onnx")
    return tmp_path / "o.onnx"


@pytest.fixture
def data(tmp_path: Path) -> str:
    np.savez(tmp_path / "x.npz", x=normal(64, 8))
    return str(tmp_path / "x.npz")


@contextlib.contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """The folder holds after the block what it held before."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- what is written


def test_an_empty_half_set_gives_a_bit_identical_model(deep: Path) -> None:
    done = convert(deep, keep=["*"], keep_io=True, output=deep.with_name("out.onnx"))
    assert deep.with_name("out.onnx").read_bytes() == deep.read_bytes()
    assert (done.counts.half_nodes, done.counts.casts) == (0, 0)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.convertible or c.external_data])
def test_where_nothing_can_be_or_is_half_the_file_is_bit_identical_weights_too(name: str, tmp_path: Path) -> None:
    source = CASES[name].save(tmp_path)
    output = tmp_path / "out" / "model.onnx"
    done = convert(source, keep=["*"] if len(CASES[name].model.graph.node) else [], keep_io=True, output=output)
    assert done.counts.half_nodes == 0
    assert output.read_bytes() == source.read_bytes()
    onnx.checker.check_model(output, full_check=True)
    for beside in tmp_path.glob("*.data"):
        assert (output.parent / beside.name).read_bytes() == beside.read_bytes()


def test_converting_is_deterministic(deep: Path) -> None:
    for name in ("a", "b"):
        convert(deep, keep=["op:Softmax"], output=deep.with_name(f"{name}.onnx"))
    assert deep.with_name("a.onnx").read_bytes() == deep.with_name("b.onnx").read_bytes()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("keep_io", [True, False])
def test_converting_twice_equals_once(deep: Path, precision: Any, keep_io: bool) -> None:
    once, twice = deep.with_name("once.onnx"), deep.with_name("twice.onnx")
    keep = ["s", "t"]
    first = convert(deep, keep=keep, keep_io=keep_io, precision=precision, output=once)
    second = convert(once, keep=keep, keep_io=keep_io, precision=precision, output=twice)
    assert second.counts == first.counts
    assert lines(load_model(twice)) == lines(load_model(once))


def test_the_names_of_nodes_and_tensors_survive(deep: Path) -> None:
    convert(deep, keep=["s"], keep_io=True, output=deep.with_name("out.onnx"))
    before, after = load_model(deep), load_model(deep.with_name("out.onnx"))
    names = {node.name for node in after.graph}
    assert {node.name for node in before.graph} <= names
    assert [v.name for v in after.graph.inputs] == ["x"]
    assert [v.name for v in after.graph.outputs] == ["y", "z"]
    made = {v.name for node in after.graph for v in node.outputs}
    assert {"h", "r", "s", "m", "t", "y", "z"} <= made


def test_rewriting_leaves_the_prepared_model_as_it_is_and_can_be_done_again() -> None:
    prepared, plan = plan_of(named(graph(DEEP, w=W)), keep=["s"])
    before = snapshot(prepared.model)
    first = rewrite(prepared, plan)
    assert snapshot(prepared.model) == before
    assert snapshot(rewrite(prepared, plan)) == snapshot(first)
    assert prepared.model.graph.inputs[0].dtype == FLOAT
    assert first.graph.inputs[0].dtype == FLOAT16


@pytest.mark.parametrize(
    ("io", "types"),
    [
        ({}, ["FLOAT16"] * 3),
        ({"keep_io": True}, ["FLOAT"] * 3),
        ({"keep_io_names": ["x"]}, ["FLOAT", "FLOAT16", "FLOAT16"]),
        ({"keep_io_names": ["z"]}, ["FLOAT16", "FLOAT16", "FLOAT"]),
    ],
    ids=["none", "all", "an input", "an output"],
)
def test_inputs_and_outputs_stay_fp32_where_asked(deep: Path, io: dict[str, Any], types: list[str]) -> None:
    convert(deep, output=deep.with_name("out.onnx"), **io)
    model = load_model(deep.with_name("out.onnx"))
    assert [v.dtype.name for v in (*model.graph.inputs, *model.graph.outputs)] == types


def test_the_file_says_why_a_node_is_kept(deep: Path) -> None:
    from mpdeploy.inspection import inspect

    convert(deep, keep=["s"], output=deep.with_name("out.onnx"))
    found = inspect(deep.with_name("out.onnx"))
    assert found["kept"] == [{"node": "s", "op": "Softmax", "reason": "user: kept by 's'"}]
    assert found["precision"] == "fp16"
    assert found["casts"] == 2
    assert found["ops"]["Softmax"] == {"float32": 1}
    assert found["ops"]["MatMul"] == {"float16": 3}


def test_constants_that_are_not_converted_leave_the_external_data_too(tmp_path: Path) -> None:
    """torch.onnx.export writes every initialiser beside the model, integers too: the file that is written must stand alone."""
    text = "g (float[N, 8] x) => (float[N, 2] y) { h = MatMul(x, w) k = Mul(h, tiny) s = Gather<axis = 1>(k, i) y = Relu(s) }"
    weights = {"w": weight(8, 8), "i": np.array([0, 3]), "tiny": np.float32(1e-12)}
    folder = tmp_path / "source"
    folder.mkdir()
    onnx.save(
        parsed(text, 17, weights), folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    done = convert(folder / "m.onnx", output=tmp_path / "out.onnx")
    assert "Mul_1" in done.plan.kept
    shutil.rmtree(folder)
    with OrtRunner(tmp_path / "out.onnx") as runner:
        assert next(iter(runner.infer({"x": np.ones((3, 8), np.float16)}).values())).shape == (3, 2)


def test_external_weights_are_converted_and_the_source_is_untouched(tmp_path: Path) -> None:
    source = CASES["external_data/weights"].save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    convert(source, keep_io=True, output=tmp_path / "out.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "out.onnx"} == before
    model = load_model(tmp_path / "out.onnx")
    assert {v.const_value.dtype.name for v in model.graph.initializers.values()} == {"FLOAT16"}


def test_the_answers_of_the_written_file_are_the_measured_ones(deep: Path, data: str) -> None:
    done = convert(deep, data=data, keep_io=True, output=deep.with_name("out.onnx"))
    from mpdeploy.comparison import compare

    again = compare(deep, deep.with_name("out.onnx"), data=data, emulate=True)
    assert again.drift.rel_l2 == pytest.approx(done.drift.rel_l2, rel=1e-6)
    assert 1e-5 < done.drift.rel_l2 < 2e-3


# ---- the record


def test_the_record_holds_what_the_contract_promises(deep: Path, data: str) -> None:
    document = convert(deep, data=data, keep=["s"], output=deep.with_name("out.onnx")).to_json()
    assert set(document) >= {"output", "nodes", "half_nodes", "kept", "casts", "drift", "evaluations", "seconds"}
    assert document["kept"] == [{"node": "s", "op": "Softmax", "reason": "user: kept by 's'"}]
    assert set(document["drift"]) == {"y", "z"}
    assert document["ranges_from"] == "calibration, 64 samples"
    json.dumps(document)


def test_without_data_there_is_a_warning_and_no_drift(deep: Path) -> None:
    done = convert(deep)
    assert done.drift is None
    assert done.to_json()["drift"] is None
    assert any("ranges and drift were not measured" in warning for warning in done.warnings)
    assert done.plan.ranges_from == "none"


def test_a_plan_given_back_gives_the_same_model(overflowing: Path, data: str, tmp_path: Path) -> None:
    first = convert(overflowing, data=data, keep_io=True, output=tmp_path / "a.onnx")
    assert first.plan.kept
    write_plan(tmp_path / "plan.json", first)
    second = convert(overflowing, keep=[f"@{tmp_path / 'plan.json'}"], keep_io=True, output=tmp_path / "b.onnx")
    assert lines(load_model(tmp_path / "a.onnx")) == lines(load_model(tmp_path / "b.onnx"))
    assert second.plan.half_keys == first.plan.half_keys


# ---- ranges


def test_ranges_keep_what_overflows_and_forcing_it_to_half_is_refused(overflowing: Path, data: str) -> None:
    kept = convert(overflowing, data=data, keep_io=True)
    assert set(kept.plan.kept) >= {"s", "r"}
    assert kept.drift.rel_l2 < 2e-3
    with pytest.raises(GateFailedError, match="Output 'y' is lost"):
        convert(overflowing, data=data, keep_io=True, use_ranges=False)


def test_a_single_rule_can_be_left_out(overflowing: Path, data: str) -> None:
    with pytest.raises(GateFailedError):
        convert(overflowing, data=data, keep_io=True, disabled_rules=["overflow"])


def test_ranges_recorded_in_training_are_merged_with_those_seen(deep: Path, data: str) -> None:
    assert "t" not in convert(deep, data=data).plan.kept
    done = convert(deep, data=data, amax={"t": 1e6, "no_such_tensor": 1e9})
    assert "in training" in str(done.plan.kept["t"][0])


def test_ranges_recorded_in_training_count_without_data_too(deep: Path) -> None:
    done = convert(deep, amax={"t": 1e6})
    assert "t reaches 1e+06 (in training)" in str(done.plan.kept["t"][0])
    assert done.plan.ranges_from == "training"


def test_nan_of_the_model_itself_is_a_warning_and_turns_no_rule_off(tmp_path: Path) -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  l = Log(h)  q = Mul(h, k)  s = Mul(q, q)  r = Sqrt(s)  a = Add(l, r)  y = Relu(a) }"
    ir.save(named(graph(text, w=W, k=np.float32(1000))), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=X)
    done = convert(tmp_path / "m.onnx", data=str(tmp_path / "x.npz"), keep_io=True)
    assert any("the FP32 model itself gives NaN in 'l' on feed 0" in warning for warning in done.warnings)
    assert set(done.plan.kept) >= {"s", "r"}


# ---- failing


@pytest.mark.parametrize("max_drift", [1e-9, 1e-5])
def test_a_drift_above_the_limit_leaves_no_file(deep: Path, data: str, max_drift: float) -> None:
    with nothing_left(deep.parent), pytest.raises(GateFailedError, match="drifts too far") as raised:
        convert(deep, data=data, max_drift=max_drift, output=deep.with_name("out.onnx"))
    assert raised.value.exit_code == 10
    assert f"the limit is {max_drift:.3g}" in raised.value.message


def test_a_refused_model_leaves_the_file_of_before(deep: Path, data: str) -> None:
    convert(deep, data=data, output=deep.with_name("out.onnx"))
    with nothing_left(deep.parent), pytest.raises(GateFailedError):
        convert(deep, data=data, max_drift=1e-9, output=deep.with_name("out.onnx"))


@pytest.mark.parametrize("error", [ConversionError("no"), KeyboardInterrupt(), MemoryError()])
def test_a_check_that_fails_or_an_interrupt_leaves_nothing(
    deep: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(path: Path) -> None:
        assert path.exists()
        raise error

    monkeypatch.setattr(proving, "check_file", fail)
    with nothing_left(deep.parent), pytest.raises(type(error)):
        convert(deep, output=deep.with_name("out.onnx"))


def test_a_model_that_ort_refuses_after_rewriting_leaves_nothing(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpdeploy.errors import BuildError

    class Refuses:
        def __init__(self, *args: object, **more: object) -> None: ...

        def __enter__(self) -> None:
            raise BuildError("no kernel for node 'h'")

        def __exit__(self, *exc: object) -> None: ...

    monkeypatch.setattr(proving.ort_engine, "OrtRunner", Refuses)
    with nothing_left(deep.parent), pytest.raises(ConversionError, match="no kernel for node 'h'"):
        convert(deep, output=deep.with_name("out.onnx"))


def test_the_input_is_never_the_output(deep: Path) -> None:
    with nothing_left(deep.parent), pytest.raises(UsageError, match="is the input model itself"):
        convert(deep, output=deep)
    link = deep.with_name("link.onnx")
    link.symlink_to(deep)
    with pytest.raises(UsageError, match="is the input model itself"):
        convert(deep, output=link)


def test_a_limit_without_data_is_wrong_usage(deep: Path) -> None:
    with nothing_left(deep.parent), pytest.raises(UsageError, match="--max-drift needs --data"):
        convert(deep, max_drift=0.1, output=deep.with_name("out.onnx"))


def test_an_unknown_input_to_keep_is_an_error_with_the_closest_names(deep: Path) -> None:
    with pytest.raises(UsageError, match="no input or output 'zz'") as raised:
        convert(deep, keep_io_names=["zz"])
    assert "closest names: z" in str(raised.value)


def test_an_unknown_rule_to_leave_out_is_an_error(deep: Path) -> None:
    with pytest.raises(UsageError, match="no range rule 'overflw'"):
        convert(deep, disabled_rules=["overflw"])


def test_bad_input_is_named_before_anything_is_done(deep: Path, tmp_path: Path) -> None:
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (KeepListError, "matches no node", {"keep": ["nope*"]}),
        (DataError, "There is no data", {"data": "none.npz"}),
    ]
    np.savez(tmp_path / "wrong.npz", y=X)
    cases.append((DataError, "has no input named 'y'", {"data": str(tmp_path / "wrong.npz")}))
    np.savez(tmp_path / "shape.npz", x=X[:, :5])
    cases.append((DataError, "the shapes do not fit", {"data": str(tmp_path / "shape.npz")}))
    np.savez(tmp_path / "nan.npz", x=np.where(X > 1, np.nan, X))
    cases.append((DataError, "holds NaN, first in sample", {"data": str(tmp_path / "nan.npz")}))
    for error, message, more in cases:
        with nothing_left(tmp_path), pytest.raises(error, match=message):
            convert(deep, output=tmp_path / "out.onnx", **more)


def test_a_cyclic_graph_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "y"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    onnx.save(graph_model(nodes, [floats("x", "N", 8)], [floats("y", "N", 8)]), tmp_path / "m.onnx")
    with nothing_left(tmp_path), pytest.raises(ModelError, match="cycle"):
        convert(tmp_path / "m.onnx", output=tmp_path / "out.onnx")


def test_a_model_whose_node_names_repeat_can_be_measured(tmp_path: Path) -> None:
    ir.save(named(graph(CHAIN, w=W)), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    for node in model.graph.node:
        node.name = "op"
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=X)
    done = convert(tmp_path / "m.onnx", data=str(tmp_path / "x.npz"), output=tmp_path / "out.onnx")
    assert done.drift.rel_l2 < 1e-2
    assert (
        rel_l2(
            run(load_model(tmp_path / "out.onnx"), {"x": X.astype(np.float16)})[0],
            run(named(graph(CHAIN, w=W)), {"x": X})[0],
        )
        < 1e-2
    )


def test_a_searched_keep_list_survives_a_re_export_that_renumbers_its_nodes(tmp_path: Path) -> None:
    """The file names a node that the new export calls otherwise; op, scope and neighbours find it."""
    import json

    from mpdeploy.precision.formats import FORMATS
    from mpdeploy.precision.rewrite import prepare
    from mpdeploy.precision.search.keep_file import FORMAT, place_of

    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> {
        [matmul_1] a = MatMul(x, w)
        [tanh_SUFFIX] b = Tanh(a)
        [matmul_2] y = MatMul(b, w)
    }"""
    index = prepare(ir.from_onnx_text(text.replace("SUFFIX", "3")), FORMATS["fp16"]).index
    entry = {"node": "tanh_3", "op": "Tanh", "reason": "search", "place": place_of(index, index.nodes["tanh_3"])}
    (tmp_path / "keep.json").write_text(json.dumps({"format": FORMAT, "keep": [entry]}))
    ir.save(ir.from_onnx_text(text.replace("SUFFIX", "17")), tmp_path / "again.onnx")

    done = convert(tmp_path / "again.onnx", keep=[f"@{tmp_path / 'keep.json'}"])

    assert list(done.plan.kept) == ["tanh_17"]
    assert "was tanh_3" in str(done.plan.kept["tanh_17"][0])

"""What plain `convert` takes, the search takes; and what it measures and proves is the model that is written."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from mpdeploy.conversion import convert
from mpdeploy.data_files import FeedSet, load_feeds
from mpdeploy.errors import DataError, GateFailedError, UsageError
from mpdeploy.files import sha256_of_file
from mpdeploy.precision.formats import FORMATS
from mpdeploy.precision.model_io import input_specs, load_model
from mpdeploy.precision.rewrite import prepare
from mpdeploy.precision.search.driver import search
from mpdeploy.searching import search_model
from mpdeploy.searching.conversion import convert_searched
from mpdeploy.searching.open import open_search
from mpdeploy.searching.plan import fixed_reasons
from tests.precision.test_conformance import CASES, MEASURABLE
from tests.searching.test_greedy import greedy

OVERFLOWS = (
    "g (float[N,16] x) => (float[N,8] y) { a=MatMul(x,w1) b=Tanh(a) c=MatMul(b,w2) d=Mul(c,big) e=Relu(d) f=Div(e,big) "
    "h=MatMul(f,w3) y=Softmax(h) }"
)
"""Of it `d`, `e` and `f` must be FP32."""


def _weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"w1": (16, 16), "w2": (16, 16), "w3": (16, 8)}
    return {name: (rng.normal(size=size) / 4).astype(np.float32) for name, size in sizes.items()} | {
        "big": np.array(1e5, np.float32)
    }


def _model(path: Path, text: str, *, opset: int = 17, ir_version: int = 8, **weights: Any) -> Path:
    """Written with each node named after its first output."""
    model = parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n{text}')
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, dtype=np.asarray(array).dtype), name))
    for node in model.graph.node:
        node.name = next(name for name in node.output if name)
    onnx.save(model, path)
    return path


def _data(path: Path, num_samples: int = 32, **more: np.ndarray) -> str:
    x = np.random.default_rng(1).normal(size=(num_samples, 16)).astype(np.float32)
    np.savez(path, x=x, **more)  # type: ignore[arg-type]
    return str(path)


def _external(folder: Path) -> Path:
    path = _model(folder / "m.onnx", OVERFLOWS, **_weights())
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="m.bin", size_threshold=0)
    return path


def _of_ir_version_3(folder: Path) -> Path:
    path = _model(folder / "m.onnx", OVERFLOWS, opset=9, ir_version=3, **_weights())
    model = onnx.load(path)
    for tensor in model.graph.initializer:  # at that version each is an input, too
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, path)
    return path


def _with_repeated_names(folder: Path) -> Path:
    path = _model(folder / "m.onnx", OVERFLOWS, **_weights())
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = "same"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("make", [_external, _of_ir_version_3, _with_repeated_names])
def test_three_nodes_are_kept_however_the_model_is_written(make: Any, tmp_path: Path) -> None:
    path = make(tmp_path)
    found = search_model(path, data=_data(tmp_path / "x.npz"), max_drift=5e-3, cost="nodes")
    assert found.met
    assert found.answer.is_minimal
    outputs = {found.prepared.index.nodes[unit].outputs[0].name for unit in found.answer.kept}
    assert outputs == {"d", "e", "f"}


def test_outputs_that_are_left_out_stay_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = _model(
        tmp_path / "m.onnx",
        "g (float[S,N,16] x) => (float[1,N,8] h) { , h = LSTM <hidden_size=8> (x, w, r) }",
        w=(rng.normal(size=(1, 32, 16)) / 4).astype(np.float32),
        r=(rng.normal(size=(1, 32, 8)) / 4).astype(np.float32),
    )
    x = rng.normal(size=(6, 32, 16)).astype(np.float32)
    feeds = FeedSet(({"x": x},), input_specs(load_model(path)), frozenset())
    assert search_model(path, data=feeds, max_drift=1e-2).met


def test_a_graph_without_nodes_has_nothing_to_search(tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 16])
    graph = onnx.helper.make_graph([], "g", [x], [x])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=opsets), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="nothing to search"):
        search_model(tmp_path / "m.onnx", data=_data(tmp_path / "x.npz"), max_drift=1e-3)


def test_the_model_is_not_written_over(tmp_path: Path) -> None:
    path = _model(tmp_path / "m.onnx", OVERFLOWS, **_weights())
    before = sha256_of_file(path)
    with pytest.raises(UsageError, match="is the input model itself"):
        convert_searched(path, data=_data(tmp_path / "x.npz"), max_drift=1e-2, output=path)
    assert sha256_of_file(path) == before


def test_it_says_where_the_keep_list_is_and_takes_no_file_for_its_folder(tmp_path: Path) -> None:
    path = _model(tmp_path / "m.onnx", OVERFLOWS, **_weights())
    command = [
        sys.executable,
        "-m",
        "mpdeploy",
        "convert",
        "m.onnx",
        "--data",
        _data(tmp_path / "x.npz"),
        "--search",
        "--max-drift",
        "5e-3",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    named = re.search(r"keep-list: (\S+);", done.stdout)
    assert named is not None, done.stdout
    again = convert(path, data=str(tmp_path / "x.npz"), keep=[f"@{tmp_path / named[1]}"], max_drift=5e-3)
    assert {"d", "e", "f"} <= set(again.plan.kept)
    shutil.rmtree(tmp_path / "m.fp16.search")
    (tmp_path / "m.fp16.search").touch()
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "m.fp16.search, where the search keeps its log, is a file" in refused.stderr


def test_weights_beside_the_model_belong_to_the_log(tmp_path: Path) -> None:
    path = _external(tmp_path)
    data, log = _data(tmp_path / "x.npz"), tmp_path / "log"
    first = search_model(path, data=data, max_drift=5e-3, folder=log)
    weights = np.fromfile(tmp_path / "m.bin", np.float32)
    weights[weights == 1e5] = 1.0  # nothing overflows any more
    weights.tofile(tmp_path / "m.bin")
    second = search_model(path, data=data, max_drift=5e-3, folder=log)
    assert len(first.answer.kept) == 3
    assert second.answer.replayed == 0
    assert not second.answer.kept


def test_a_search_that_was_cut_short_goes_on_to_the_same_log_with_many_batches(tmp_path: Path) -> None:
    path = _model(tmp_path / "m.onnx", OVERFLOWS, **_weights())
    data = _data(tmp_path / "x.npz", num_samples=96)
    search_model(path, data=data, max_drift=3e-4, cost="nodes", folder=tmp_path / "whole")
    whole = (tmp_path / "whole" / "search.jsonl").read_text().splitlines()
    for count in range(1, len(whole), max(1, len(whole) // 7)):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "search.jsonl").write_text("\n".join(whole[:count]) + "\n")
        search_model(path, data=data, max_drift=3e-4, cost="nodes", folder=folder)
        assert (folder / "search.jsonl").read_text().splitlines() == whole


IF = (
    "g (float[N,16] x, bool c) => (float[N,16] y) { a=MatMul(x,w1) f=If(c)<then_branch=t() => (float[N,16] u) {u=Mul(a,big)}, "
    "else_branch=e() => (float[N,16] v) {v=Mul(a,big)}> b=Div(f,big) h=MatMul(b,w2) y=Softmax(h) }"
)


@pytest.mark.parametrize("cost", ["nodes", "traffic"])
def test_what_an_if_gives_back_is_as_its_neighbours_are(cost: str, tmp_path: Path) -> None:
    weights = _weights()
    del weights["w3"]
    path = _model(tmp_path / "m.onnx", IF, **weights)
    data = _data(tmp_path / "x.npz", c=np.array(True))
    found = search_model(path, data=data, max_drift=5e-3, cost=cost)
    assert found.met
    assert found.answer.is_minimal
    assert {"b"} < found.answer.kept, "what divides again"
    assert not {"a", "h"} & found.answer.kept, "and nothing beside it"


@pytest.mark.parametrize("share", [0.5, 0.4, 0.25])
def test_with_casts_counted_it_is_the_written_model_that_is_measured(share: float, tmp_path: Path) -> None:
    path = _model(
        tmp_path / "m.onnx", OVERFLOWS.replace("Mul(c,big)", "Exp(c)").replace("Div(e,big)", "Tanh(e)"), **_weights()
    )
    data = _data(tmp_path / "x.npz")
    half = convert(path, data=data)
    assert half.drift is not None
    found = search_model(path, data=data, max_drift=share * half.drift.rel_l2)
    assert found.met
    assert found.answer.is_minimal
    assert found.confirmed.rel_l2 == pytest.approx(found.answer.evaluation.drift, rel=0.02, abs=2e-7)


def _chain(seed: int, folder: Path) -> tuple[Path, str]:
    """Seven nodes of mixed kinds in a row, with a branch: casts between them cost more than most of them save."""
    rng = np.random.default_rng(seed)
    ops = ["MatMul({0},w1)", "Tanh({0})", "Add({0},x)", "MatMul({0},w2)", "Softmax({0})", "Mul({0},k)"]
    lines, last = [], "x"
    for number in range(6):
        lines.append(f"v{number}=" + ops[int(rng.integers(len(ops)))].format(last))
        last = f"v{number}"
    weights = {name: array for name, array in _weights(seed).items() if name in ("w1", "w2")}
    text = f"g (float[N,16] x) => (float[N,16] {last}) {{ {' '.join(lines)} }}"
    used = {name: array for name, array in {**weights, "k": np.array(3.3, np.float32)}.items() if f",{name})" in text}
    return _model(folder / "m.onnx", text, **used), _data(folder / "x.npz")


@pytest.mark.parametrize("cost", ["nodes", "traffic"])
@pytest.mark.parametrize("seed", range(6))
def test_of_a_handful_of_nodes_none_of_all_keep_lists_is_cheaper(seed: int, cost: Any, tmp_path: Path) -> None:
    path, data = _chain(seed, tmp_path)
    prepared = prepare(load_model(path), FORMATS["fp16"])
    feeds = load_feeds(data, input_specs(prepared.model), where="test")
    fixed = fixed_reasons(prepared.index, FORMATS["fp16"], {})

    def opened(limit: float) -> Any:
        return open_search(path, prepared, feeds, FORMATS["fp16"], gate="", limit=limit, cost=cost, fixed=fixed)

    with opened(1.0) as all_half:
        limit = 0.5 * all_half.problem.evaluate(frozenset(), until="lost").drift
    with opened(limit) as problem_of:
        problem = problem_of.problem
        answer = search(problem, problem_of.landscape, num_samples=problem_of.model.num_samples)
        assert answer.met
        every = [
            frozenset(kept)
            for count in range(len(problem.units) + 1)
            for kept in itertools.combinations(problem.units, count)
        ]
        passing = {problem.cost(kept) for kept in every if problem.evaluate(problem.canonical(kept)).passes}
        assert answer.cost <= min(passing) * (1 + 1e-9)


def test_what_is_masked_in_the_first_samples_is_not_taken_for_harmless(tmp_path: Path) -> None:
    """Half of the samples are 0 in one branch, those that are probed first among them."""
    rng = np.random.default_rng(0)
    weights = {f"w{n}": (rng.normal(size=(16, 16)) / 4).astype(np.float32) for n in range(12)}
    left = " ".join(f"c{n}=MatMul({f'c{n - 1}' if n else 'x'},w{n})" for n in range(6))
    right = " ".join(f"e{n}=MatMul({f'e{n - 1}' if n else 'g'},w{n + 6})" for n in range(6))
    text = f"g (float[N,16] x, float[N,1] m) => (float[N,16] y) {{ g=Mul(x,m) {left} {right} s=Mul(c5,k) y=Add(s,e5) }}"
    path = _model(tmp_path / "m.onnx", text, k=np.array(0.3, np.float32), **weights)
    mask = np.zeros((64, 1), np.float32)
    mask[32:] = rng.uniform(0.5, 2, size=(32, 1))
    data = _data(tmp_path / "x.npz", num_samples=64, m=mask)
    limit, kept, _, evaluations = greedy(path, data, 0.5, "nodes")
    found = search_model(path, data=data, max_drift=limit, cost="nodes")
    assert found.met
    assert len(found.answer.kept) <= len(kept)
    assert found.answer.evaluations < evaluations


def _labels(path: Path, count: int) -> Path:
    np.savez(path, y=np.arange(count) % 8)
    return path


def test_labels_belong_to_the_rows_of_answers(tmp_path: Path) -> None:
    """One output is of the whole batch, so samples cannot be taken apart; the labels can."""
    text = OVERFLOWS.replace("(float[N,8] y)", "(float[N,8] y, float[1,8] m)").replace(
        "y=Softmax(h)", "y=Softmax(h) m=ReduceMean<axes=[0]>(h)"
    )
    path = _model(tmp_path / "m.onnx", text, **_weights())
    data = _data(tmp_path / "x.npz")
    labels = _labels(tmp_path / "y.npz", 32)
    found = search_model(path, data=data, metric="top1", labels=labels, max_drop=0.05)
    assert found.met
    with pytest.raises(DataError, match="32 answers and 31 labels"):
        search_model(path, data=data, metric="top1", labels=_labels(tmp_path / "y31.npz", 31), max_drop=0.05)
    with pytest.raises(DataError, match="a single value"):
        search_model(path, data=data, metric="top1", labels=np.array(3), max_drop=0.05)


def test_a_metric_that_is_not_finite_never_passes(tmp_path: Path) -> None:
    path = _model(tmp_path / "m.onnx", OVERFLOWS, **_weights())
    data = _data(tmp_path / "x.npz")

    def nan(outputs: Any, labels: Any) -> np.ndarray:
        return np.full(len(outputs["y"]), np.nan)

    with pytest.raises(DataError, match="not finite on 32 samples"):
        search_model(path, data=data, metric=nan, max_drop=0.01)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_model_of_the_conformance_table_is_searched(tmp_path: Path) -> None:
    """A gate is met by what is written, or plain `convert` does not meet it with everything kept either."""
    searched = nothing = 0
    for name in MEASURABLE:
        case = CASES[name]
        if any(array.dtype.kind in "OU" or not array.size for array in case.feeds.values()):
            continue
        folder = tmp_path / name
        folder.mkdir(parents=True)
        path = case.save(folder)
        specs = input_specs(load_model(path))
        feed = {spec.name: case.feeds[spec.name] for spec in specs if spec.name in case.feeds}
        if len(feed) != len(specs):
            continue
        feeds = FeedSet((feed,), specs, frozenset())
        try:
            done = convert_searched(path, data=feeds, max_drift=3e-4, output=folder / "out.onnx")
        except UsageError:
            nothing += 1
        except GateFailedError:
            kept = convert(path, data=feeds, keep=["op:*"])
            assert kept.drift is not None, name
            assert not kept.drift.rel_l2 <= 3e-4, f"{name}: everything in FP32 meets the gate"
        else:
            searched += 1
            assert done.drift is not None, name
            assert done.drift.rel_l2 <= 3e-4 * (1 + 1e-9), name
            assert done.search is not None, name
            assert done.search["drift_searched"] == pytest.approx(done.search["drift_switched"], rel=1e-6, abs=1e-9), (
                name
            )
            stand_in = abs(done.search["drift_switched"] - done.search["drift_rewritten"])
            # ONNX Runtime may compute a quantised product with integers in one of the two and not in the other
            assert done.search["minimal"] or (stand_in > 1e-3 and name.startswith("qdq/")), name
    assert searched > 200
    assert nothing < 10, "models of which no node can be half"

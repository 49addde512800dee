"""The search on real models: exact minimal sets with the right reasons, gates of both kinds, kill and resume."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mpdeploy.conversion import convert
from mpdeploy.data_files import FeedSet, load_feeds
from mpdeploy.emulated_runs import emulated_drift
from mpdeploy.errors import ConfigError, DataError, UsageError
from mpdeploy.precision.formats import FORMATS
from mpdeploy.precision.model_io import input_specs, load_model
from mpdeploy.precision.plan import PrecisionPlan
from mpdeploy.precision.rewrite import prepare, rewrite
from mpdeploy.searching import ModelSearch, parse_drop, search_model
from tests import zoo
from tests.precision.visible import graph

REASONS = {
    "overflow": {"Mul": "reaches", "Relu": "reaches", "Div": "above the largest value held"},
    "underflow": {"Mul": "lies near", "Relu": "lies near", "Div": "becomes 0"},
    "epsilon": {"Add": "2e-08 becomes 0", "Div": "comes down to 2e-08"},
    "exp_to_sum": {"Exp": "exp reaches", "ReduceSum": "sum_1 reaches", "Div": "reaches"},
    "pow_to_mean": {"Pow": "reaches", "ReduceMean": "inside ReduceMean", "Add": "reaches", "Sqrt": "reaches"},
    "tiny_weights": {"Gemm": "rounding loses", "Mul": "above the largest value held"},
}
"""Trap -> what must be kept (and nothing else), and the words that name why."""


def feed_set(model: Path, data: str) -> FeedSet:
    return load_feeds(data, input_specs(load_model(model)), where="test")


def _data(path: Path, feeds: dict[str, np.ndarray]) -> str:
    np.savez(path, **feeds)
    return str(path)


@pytest.mark.parametrize("trap", REASONS)
def test_a_planted_trap_is_found_exactly_and_named(trap: str, zoo_folder: Path, tmp_path: Path) -> None:
    model = zoo.trained_digits_cnn(zoo_folder, trap)
    data = _data(tmp_path / "x.npz", model.feeds(32))
    found = search_model(model.path, data=data, max_drift=1e-2, cost="nodes")
    assert found.met
    assert found.answer.is_minimal
    assert {entry["op"] for entry in found.entries} == set(REASONS[trap])
    for entry in found.entries:
        assert REASONS[trap][entry["op"]] in entry["reason"]
        assert entry["drift_without"] > 1e-2
    assert found.answer.kept == _needed(model.path, data, 1e-2), "any keep-list must hold these, so none is smaller"


def _needed(path: Path, data: str, limit: float) -> frozenset[str]:
    """Units that fail the gate when they alone are half: every keep-list that meets it holds them."""
    prepared = prepare(load_model(path), FORMATS["fp16"])
    feeds = feed_set(path, data)
    needed = set()
    for node_id in prepared.index.nodes:
        mixed = rewrite(prepared, PrecisionPlan(FORMATS["fp16"], frozenset({node_id}), {}, {}))
        if not emulated_drift(path, mixed, feeds).rel_l2 <= limit:
            needed.add(node_id)
    return frozenset(needed)


def test_an_additive_gate_is_met_minimal_and_confirmed_on_the_rewritten_model(zoo_folder: Path, tmp_path: Path) -> None:
    model = zoo.trained_digits_cnn(zoo_folder, "none")
    data = _data(tmp_path / "x.npz", model.feeds(32))
    found = search_model(model.path, data=data, max_drift=2e-4, cost="nodes")
    assert found.met
    assert found.answer.is_minimal
    assert 0 < len(found.answer.kept) < found.num_free
    mixed = rewrite(prepare(load_model(model.path), FORMATS["fp16"]), found.plan)
    assert emulated_drift(model.path, mixed, feed_set(model.path, data)).rel_l2 == found.confirmed.rel_l2 <= 2e-4
    assert found.switched_drift == pytest.approx(found.confirmed.rel_l2, rel=0.05)
    assert found.held_out_drift == pytest.approx(found.seen_drift, rel=0.5)
    assert found.held_out_drift != found.seen_drift


def test_the_keep_list_file_goes_back_into_convert(zoo_folder: Path, tmp_path: Path) -> None:
    model = zoo.trained_digits_cnn(zoo_folder, "overflow")
    data = _data(tmp_path / "x.npz", model.feeds(32))
    found = search_model(model.path, data=data, max_drift=1e-2)
    found.write_keep_list(tmp_path / "keep.json")
    document = json.loads((tmp_path / "keep.json").read_text())
    assert [entry["op"] for entry in document["keep"]] == ["Mul", "Relu", "Div"]
    assert document["search"]["gate"] == "drift at most 0.01"
    done = convert(
        model.path, data=data, keep=[f"@{tmp_path / 'keep.json'}"], use_ranges=False, max_drift=1e-2, output=None
    )
    assert done.drift is not None
    assert done.drift.rel_l2 <= 1e-2


def test_the_same_seed_gives_the_same_answer_and_a_log_replays(zoo_folder: Path, tmp_path: Path) -> None:
    model = zoo.trained_digits_cnn(zoo_folder, "none")
    data = _data(tmp_path / "x.npz", model.feeds(32))

    def run(name: str) -> ModelSearch:
        return search_model(model.path, data=data, max_drift=2e-4, seed=3, folder=tmp_path / name)

    first, second, again = run("a"), run("b"), run("a")
    assert first.answer.kept == second.answer.kept == again.answer.kept
    assert (tmp_path / "a" / "search.jsonl").read_text() == (tmp_path / "b" / "search.jsonl").read_text()
    assert again.answer.replayed > 10
    assert again.answer.evaluations == pytest.approx(first.answer.evaluations)


def test_another_gate_begins_a_new_log_and_keeps_the_old_one(zoo_folder: Path, tmp_path: Path) -> None:
    model = zoo.trained_digits_cnn(zoo_folder, "none")
    data = _data(tmp_path / "x.npz", model.feeds(32))
    logs = []
    for max_drift in (1e-2, 2e-3, 1e-2):
        search_model(model.path, data=data, max_drift=max_drift, folder=tmp_path / "state")
        logs.append((tmp_path / "state" / "search.jsonl").read_text())
    assert logs[0] == logs[2] != logs[1]
    assert (tmp_path / "state" / "search.1.jsonl").read_text() == logs[0]
    assert (tmp_path / "state" / "search.2.jsonl").read_text() == logs[1]


# ---- gates on a metric


def test_a_metric_gate_keeps_what_accuracy_needs(zoo_folder: Path, tmp_path: Path) -> None:
    model = zoo.trained_digits_cnn(zoo_folder, "overflow")
    data = _data(tmp_path / "x.npz", {"images": model.images[:64]})
    found = search_model(model.path, data=data, metric="top1", labels=model.labels[:64], max_drop=0.0)
    assert found.met
    assert {entry["op"] for entry in found.entries} == {"Mul", "Relu", "Div"}
    assert found.confirmed_measured <= 0.0


def test_a_users_function_gates(zoo_folder: Path, tmp_path: Path) -> None:
    model = zoo.trained_digits_cnn(zoo_folder, "none")
    data = _data(tmp_path / "x.npz", {"images": model.images[:32]})
    calls = []

    def closeness(outputs: dict[str, np.ndarray], labels: np.ndarray | None) -> np.ndarray:
        """1 where every score has its FP32 value to 1e-3: all half fails it, something in between does not."""
        calls.append(labels)
        scores = outputs["scores"]
        return np.round(scores.max(axis=1), 2)

    found = search_model(model.path, data=data, metric=closeness, max_drop=1e-3)
    assert found.met
    assert calls
    assert "closeness falls by at most 0.001" in found.gate


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, UsageError, "needs a gate"),
        ({"max_drift": -1.0}, UsageError, "no drift above 0"),
        ({"metric": "top1", "max_drop": 0.1}, UsageError, "needs --labels"),
        ({"metric": "top1", "labels": np.zeros(32, int)}, UsageError, "needs a --max-drop"),
        ({"metric": "top1", "labels": np.zeros(32, int), "max_drop": 0.1, "max_drift": 0.1}, UsageError, "one gate"),
        ({"max_drift": 0.1, "max_drop": 0.1}, UsageError, "need a --metric"),
        ({"metric": "top2", "labels": np.zeros(32, int), "max_drop": 0.1}, ConfigError, "top2"),
        ({"metric": "top1", "labels": np.zeros(31, int), "max_drop": 0.1}, DataError, "31 labels"),
        ({"max_drift": 0.1, "cost": {}}, UsageError, "profile is empty"),
    ],
)
def test_half_a_gate_is_refused(
    options: dict[str, object], error: type[Exception], words: str, zoo_folder: Path, tmp_path: Path
) -> None:
    model = zoo.trained_digits_cnn(zoo_folder, "none")
    data = _data(tmp_path / "x.npz", {"images": model.images[:32]})
    with pytest.raises(error, match=words):
        search_model(model.path, data=data, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "value"), [("0.2pt", 0.002), ("0.002", 0.002), ("1 pt", 0.01)])
def test_drops_are_points_or_plain_numbers(text: str, value: float) -> None:
    assert parse_drop(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "pt", "-1pt", "nan", "a lot"])
def test_a_drop_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_drop(text)


# ---- costs


def test_a_measured_profile_decides_what_is_cheap(zoo_folder: Path, tmp_path: Path) -> None:
    """Two chains of equal error: the one that the profile says is dear stays half."""
    rng = np.random.default_rng(0)
    text = "g (float[N, 16] x) => (float[N, 16] y) { a = MatMul(x, w)  a2 = Tanh(a)  b = MatMul(x, v)  b2 = Tanh(b)  y = Add(a2, b2) }"
    model = graph(text, w=(rng.normal(size=(16, 16)) / 4).astype("f"), v=(rng.normal(size=(16, 16)) / 4).astype("f"))
    ir.save(model, tmp_path / "m.onnx")
    data = _data(tmp_path / "x.npz", {"x": rng.normal(size=(32, 16)).astype("f")})
    prepared = prepare(load_model(tmp_path / "m.onnx"), FORMATS["fp16"])
    made_by = {node.outputs[0].name: node_id for node_id, node in prepared.index.nodes.items()}
    all_half = search_model(tmp_path / "m.onnx", data=data, max_drift=1.0).answer.all_half.drift
    kept = {}
    for dear in "ab":
        profile = {made_by[name]: 100.0 if name.startswith(dear) else 1.0 for name in made_by}
        kept[dear] = search_model(tmp_path / "m.onnx", data=data, max_drift=0.85 * all_half, cost=profile).answer.kept
    assert not {made_by["a"], made_by["a2"]} & kept["a"]
    assert not {made_by["b"], made_by["b2"]} & kept["b"]


# ---- ends before the end


def test_an_unreachable_gate_ends_with_the_best_reached_and_what_would_be_needed(
    zoo_folder: Path, tmp_path: Path
) -> None:
    """The user wants the convolutions in half, come what may, and a drift that half convolutions cannot give."""
    model = zoo.trained_digits_cnn(zoo_folder, "none")
    data = _data(tmp_path / "x.npz", model.feeds(32))
    found = search_model(model.path, data=data, max_drift=2e-5, must_half=["op:Conv"])
    assert not found.met
    assert found.answer.evaluation.drift > 2e-5
    assert found.answer.evaluation.drift < found.answer.all_half.drift
    assert all("Conv" not in entry["op"] for entry in found.entries)
    named = found.advice[-2]
    assert named.startswith("FP32 for ")
    assert found.advice[-1].startswith("measured with FP32 there: ")
    assert found.advice[-1].endswith("which meets the gate")
    assert "node_Conv_" in named
    assert any("Conv" in name for name, _ in found.dominating[:3])


def test_what_must_be_half_and_leaves_the_range_is_advised_bf16(zoo_folder: Path, tmp_path: Path) -> None:
    model = zoo.trained_digits_cnn(zoo_folder, "overflow")
    data = _data(tmp_path / "x.npz", model.feeds(32))
    found = search_model(model.path, data=data, max_drift=1e-2, must_half=["op:Mul"])
    assert not found.met
    assert "the best reached is an output lost" in found.advice[0]
    assert any(line.startswith("BF16") and "node_mul_11" in line for line in found.advice)


def test_evaluations_that_run_out_leave_a_valid_keep_list(zoo_folder: Path, tmp_path: Path) -> None:
    model = zoo.trained_digits_cnn(zoo_folder, "overflow")
    data = _data(tmp_path / "x.npz", model.feeds(32))
    found = search_model(model.path, data=data, max_drift=1e-2, max_evaluations=2.5, folder=tmp_path)
    assert found.answer.stopped
    assert not found.answer.is_minimal
    assert found.met
    assert found.confirmed.rel_l2 <= 1e-2


SLOW = """
import sys, time
from pathlib import Path
import mpdeploy.searching.problem as problem
measure = problem.ModelProblem.measure
def slow(*a, **k):
    time.sleep(0.2)
    return measure(*a, **k)
problem.ModelProblem.measure = slow
from mpdeploy.searching import search_model
search_model(Path(sys.argv[1]), data=sys.argv[2], max_drift=2e-4, cost="nodes", folder=Path(sys.argv[3]))
"""


def test_a_killed_process_leaves_its_best_answer_and_is_resumed(zoo_folder: Path, tmp_path: Path) -> None:
    model = zoo.trained_digits_cnn(zoo_folder, "none")
    data = _data(tmp_path / "x.npz", model.feeds(32))
    state = tmp_path / "state"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(model.path), data, str(state)])
    deadline = time.monotonic() + 60
    while not (state / "keep.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    best = json.loads((state / "keep.json").read_text())
    assert best["search"]["finished"] is False
    assert best["search"]["passes"] is True
    measured = len((state / "search.jsonl").read_text().splitlines())
    found = search_model(model.path, data=data, max_drift=2e-4, cost="nodes", folder=state)
    assert found.answer.replayed > 0
    assert found.answer.replayed >= measured - 3
    assert found.met
    assert len(found.answer.kept) <= len(best["keep"]) + len(best["float_io"])
    assert json.loads((state / "keep.json").read_text())["search"]["finished"] is True


# ---- large models


def _quarter(name: str, zoo_folder: Path, tmp_path: Path) -> ModelSearch:
    model = zoo.export(name, zoo_folder)
    if model is None:
        pytest.skip("its weights are not installed")
    data = _data(tmp_path / "x.npz", model.feeds(32, 1))
    all_half = search_model(model.path, data=data, max_drift=1.0).answer.all_half.drift
    return search_model(model.path, data=data, max_drift=all_half / 4, cost="nodes")


@pytest.mark.slow
def test_minilm_meets_a_quarter_of_its_drift(zoo_folder: Path, tmp_path: Path) -> None:
    found = _quarter("minilm", zoo_folder, tmp_path)
    assert found.met
    assert len(found.answer.kept) < 0.65 * found.num_free
    assert math.isfinite(found.answer.evaluation.drift)


@pytest.mark.slow
def test_convnext_meets_a_quarter_of_its_drift(zoo_folder: Path, tmp_path: Path) -> None:
    found = _quarter("convnext", zoo_folder, tmp_path)
    assert found.met
    assert len(found.answer.kept) < found.num_free
    assert found.seconds < 180

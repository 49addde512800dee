"""What looks on: the shadow comparison raises the alarm when answers drift, the recorder writes what `convert --data` reads."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from served import FLOAT, checksum_model, make_run, mlp_model, model_of, wait_for

from mpdeploy.artifact import OnnxModel
from mpdeploy.building import describe_model
from mpdeploy.data_files import load_feeds
from mpdeploy.errors import ArtifactChangedError
from mpdeploy.serve.manager import ModelManager
from mpdeploy.serve.messages import InferRequest
from mpdeploy.serve.metrics import exposition
from mpdeploy.serve.options import ModelOptions, ServerOptions
from mpdeploy.serve.shared import Shared
from mpdeploy.serve.watching import Recorder, Shadow


def samples(count: int, rows: int = 1):
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((rows, 16)).astype(np.float32)} for _ in range(count)]


@pytest.fixture
def reference(tmp_path) -> OnnxModel:
    path = tmp_path / "reference.onnx"
    onnx.save(mlp_model((16, 32, 4)), path)
    return describe_model(path)


def answers(model: OnnxModel, feeds):
    from mpdeploy.engines.onnxruntime import OrtRunner

    with OrtRunner(model.path) as runner:
        return [runner.infer(feed) for feed in feeds]


@pytest.mark.parametrize(("error", "alert"), [(1e-4, False), (0.05, True)])
def test_drift_is_measured_as_the_gates_measure_it_and_raises_the_alert(reference, error, alert, caplog):
    feeds = samples(40)
    good = answers(reference, feeds)
    shadow = Shadow(reference, rate=1.0, limit=1e-2, name="half")
    for feed, answer in zip(feeds, good, strict=True):
        before = shadow.compared
        shadow.offer(feed, {"y": answer["y"] * np.float32(1 + error)}, 1)
        wait_for(lambda before=before: shadow.compared > before)
    shadow.close()
    assert shadow.rel_l2 == pytest.approx(error, rel=0.02)
    assert shadow.alert is alert
    figures = shadow.figures()
    assert figures["shadow/compared"] == 40
    assert figures["gauge/max/shadow/alert"] == float(alert)
    assert ("drift alert" in caplog.text) is alert


def test_a_value_that_one_of_the_two_lost_is_infinitely_far(reference):
    feed = samples(1)[0]
    wrong = answers(reference, [feed])[0]["y"].copy()
    wrong[0, 0] = np.nan
    shadow = Shadow(reference, rate=1.0, limit=1e-2, name="half")
    shadow.offer(feed, {"y": wrong}, 1)
    wait_for(lambda: shadow.compared == 1)
    shadow.close()
    assert shadow.alert


def test_what_it_has_no_time_for_is_dropped_and_counted(reference):
    shadow = Shadow(reference, rate=1.0, limit=1e-2, name="half")
    shadow._begun = True  # no thread: nothing is ever worked off
    begin = time.perf_counter()
    for feed in samples(100):
        shadow.offer(feed, {"y": np.zeros((1, 4), np.float32)}, 1)
    assert time.perf_counter() - begin < 10
    assert shadow.dropped == 84


def test_a_rate_is_a_share_of_the_requests(tmp_path):
    recorder = Recorder(tmp_path, rate=0.1, most=10**6)
    taken = []
    recorder._begun, recorder._queue.put_nowait = True, taken.append  # type: ignore[method-assign]
    for feed in samples(1) * 5000:
        recorder.offer(feed, {}, 1)
    assert 400 < len(taken) < 600


def test_recorded_requests_calibrate_a_conversion(tmp_path):
    recorder = Recorder(tmp_path / "recorded", rate=1.0, most=50)
    feeds = samples(60)
    feeds[3]["x"][0, 0] = np.nan
    for feed in feeds:
        before = recorder._queue.qsize()
        recorder.offer(feed, {}, 1)
        wait_for(lambda before=before: recorder._queue.qsize() <= before)
    wait_for(lambda: recorder._queue.empty())
    recorder.close()
    assert recorder.written == 50
    assert recorder.with_nan == 1
    path = tmp_path / "model.onnx"
    onnx.save(checksum_model(), path)
    read = load_feeds(str(tmp_path / "recorded"), describe_model(path).inputs, where="model")
    assert read.num_samples == 50
    found = np.concatenate([feed["x"] for feed in read])
    assert {row.tobytes() for row in found} <= {feed["x"].tobytes() for feed in feeds}


def test_a_server_compares_and_records(tmp_path: Path):
    run = make_run(tmp_path / "run", checksum_model())
    options = ModelOptions(threads=1, shadow_rate=1.0, record=tmp_path / "recorded", record_rate=1.0)

    async def main():
        manager = ModelManager(ServerOptions(run=run, model=options))
        await manager.start()
        for feed in samples(20, rows=2):
            await manager.infer(InferRequest("model", None, feed))
            await asyncio.sleep(0.01)
        watchers = manager.versions()[0].watchers
        await manager.stop()
        return watchers, manager.counts()

    (shadow, recorder), counts = asyncio.run(main())
    assert shadow.compared + shadow.dropped == 20
    assert shadow.compared > 0
    assert shadow.rel_l2 < 1e-6
    assert recorder.written > 0
    assert counts["model/model/1/shadow/compared"] == shadow.compared
    assert sorted((tmp_path / "recorded").glob("*.npz"))


def test_a_shadow_needs_the_fp32_model(tmp_path):
    from mpdeploy.errors import UsageError
    from mpdeploy.serve.selection import select
    from mpdeploy.serve.watching import watchers_of

    selection = select(make_run(tmp_path / "run", checksum_model()))
    without = replace(selection, model=None)
    with pytest.raises(UsageError, match="no FP32 model"):
        watchers_of(without, selection.candidates[0], ModelOptions(shadow_rate=0.1))


def centred_model():
    """x [n, 4] -> y = x less the mean over all of the request: samples must not share a batch."""
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["mean"]), helper.make_node("Sub", ["x", "mean"], ["y"])]
    axes = {"axes": np.array([0], np.int64)}
    return model_of(nodes, {"x": (FLOAT, ["n", 4])}, {"y": (FLOAT, ["n", 4])}, axes)


def fixed_model():
    """x [6, 4] -> y, a softmax along the first axis."""
    node = helper.make_node("Softmax", ["x"], ["y"], axis=0)
    return model_of([node], {"x": (FLOAT, [6, 4])}, {"y": (FLOAT, [6, 4])})


@pytest.mark.parametrize("model", [centred_model, fixed_model])
def test_a_request_that_shares_no_batch_is_compared_and_recorded_whole(tmp_path, model):
    run = make_run(tmp_path / "run", model(), samples={"x": np.eye(6, 4, dtype=np.float32)})
    recorded = tmp_path / "recorded"
    options = ModelOptions(threads=1, shadow_rate=1.0, record=recorded, record_rate=1.0)
    feeds = [{"x": np.random.default_rng(seed).standard_normal((6, 4)).astype(np.float32)} for seed in range(5)]

    async def main():
        manager = ModelManager(ServerOptions(run=run, model=options))
        await manager.start()
        assert not manager.versions()[0].contract.batched
        for feed in feeds:
            await manager.infer(InferRequest("model", None, feed))
        watchers = manager.versions()[0].watchers
        await manager.stop()
        return watchers

    shadow, recorder = asyncio.run(main())
    wait_for(lambda: shadow.compared + shadow.failed == recorder.written == 5, 60)
    assert shadow.failed == 0
    assert shadow.rel_l2 < 1e-6
    files = [dict(np.load(path)) for path in sorted(recorded.glob("*.npz"))]
    assert len(files) == len(feeds)
    for file, feed in zip(files, feeds, strict=True):
        np.testing.assert_array_equal(file["x"], feed["x"])


def test_a_shadow_compares_with_no_other_model_than_the_run_recorded(tmp_path):
    run = make_run(tmp_path / "run", checksum_model())
    with (run / "20-export" / "model.fp32.onnx").open("ab") as file:
        file.write(b"\0")
    manager = ModelManager(ServerOptions(run=run, model=ModelOptions(threads=1, shadow_rate=0.1)))
    with pytest.raises(ArtifactChangedError, match=r"model\.fp32\.onnx"):
        asyncio.run(manager.start())


def test_metrics_say_that_a_fault_has_ended_the_shadow(tmp_path, monkeypatch):
    def fails(*_arguments):
        raise RuntimeError("a fault")

    def up(manager: ModelManager) -> bytes:
        lines = exposition(manager.all_counts(), [])[1].splitlines()
        return next(line for line in lines if line.startswith(b"mpdeploy_shadow_up{"))

    monkeypatch.setattr(Shadow, "_compare", fails)
    run = make_run(tmp_path / "run", checksum_model())

    async def main():
        manager = ModelManager(ServerOptions(run=run, model=ModelOptions(threads=1, shadow_rate=1.0)))
        await manager.start()
        before = up(manager)
        await manager.infer(InferRequest("model", None, samples(1)[0]))
        deadline = time.monotonic() + 60
        while up(manager) == before and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        after = up(manager)
        await manager.stop()
        return before, after

    label = b'mpdeploy_shadow_up{model="model",version="1"}'
    assert asyncio.run(main()) == (label + b" 1.0", label + b" 0.0")


def test_a_shadow_that_ended_in_one_process_is_down(tmp_path):
    key = "gauge/min/model/m/1/shadow/up"
    (tmp_path / f"counts-{os.getppid()}.json").write_text(json.dumps({key: 0.0}))
    assert Shared(tmp_path).sum_counts({key: 1.0})[key] == 0.0


def test_versions_of_a_process_share_the_limit_of_samples(tmp_path):
    recorders = [Recorder(tmp_path, rate=1.0, most=5) for _ in range(3)]
    for recorder in recorders:
        for feed in samples(4):
            recorder.offer(feed, {}, 1)
        wait_for(recorder._queue.empty, 60)
        recorder.close()
        wait_for(lambda recorder=recorder: not recorder._thread.is_alive(), 60)
    assert [recorder.written for recorder in recorders] == [4, 1, 0]
    assert sum(len(np.load(path)["x"]) for path in tmp_path.glob("*.npz")) == 5

"""Where numbers go: a line a step, TensorBoard, Weights & Biases without an account, and a trace."""

from __future__ import annotations

import json
import math

import pytest
from small_training import BATCH, NUM_TRAIN, choice_of

from mpdeploy.config.training import MonitorConfig
from mpdeploy.train.monitoring import StepLog, Trace, monitors
from mpdeploy.train.readings import Reading

STEPS_AN_EPOCH = NUM_TRAIN // BATCH


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_has_a_line_for_each_step(fit, tmp_path):
    run = fit("fp16", epochs=2, loss_scale={"initial": 2.0**30, "growth_interval": 2})
    found = lines(tmp_path / "log.jsonl")
    assert [row["step"] for row in found] == list(range(1, 2 * STEPS_AN_EPOCH + 1))
    assert [row["epoch"] for row in found] == [1] * STEPS_AN_EPOCH + [2] * STEPS_AN_EPOCH
    assert [row["step_ms"] for row in found] == run.step_ms
    assert [row["skipped"] for row in found] == [row["step"] in run.skipped_steps for row in found]
    assert all(row["skipped"] or 0 < row["gradient_norm"] < 100 for row in found)
    assert {row["precision"] for row in found} == {"fp16"}
    changes = dict(run.loss_scales)
    scale = changes[0]
    for row in found:
        scale = changes.get(row["step"] - 1, scale)
        assert row["loss_scale"] == scale
    mean = sum(row["loss"] for row in found[:STEPS_AN_EPOCH]) / STEPS_AN_EPOCH
    assert mean == pytest.approx(run.history[0]["loss"])


def test_each_run_in_a_folder_has_a_log_of_its_own(fit, tmp_path):
    fit(state="state.amp.pt", epochs=1)
    fit(state="state.fp32.pt", epochs=1)
    assert {path.name for path in tmp_path.glob("log*")} == {"log.amp.jsonl", "log.fp32.jsonl"}


def test_no_log_is_written_where_none_is_wanted(fit, tmp_path):
    fit(monitor={"step_log": False}, epochs=1)
    assert not list(tmp_path.glob("log*"))


def test_a_log_that_is_gone_on_with_drops_what_was_not_saved_and_what_was_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    log = StepLog(path, 0)
    for step in (1, 2, 3):
        log.step({"step": step, "loss": math.nan if step == 2 else 1.0})
    log.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')
    log = StepLog(path, 2)
    log.step({"step": 3, "loss": 5.0})
    log.close()
    assert lines(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": 5.0}]
    StepLog(path, 0).close()
    assert lines(path) == [], "a run that starts over starts a log of its own"


def test_tensorboard_events_hold_what_the_log_holds(fit, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(monitor={"tensorboard": True}, epochs=2)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run"))
    events.Reload()
    logged = lines(tmp_path / "log.jsonl")
    assert [(item.step, item.value) for item in events.Scalars("step/loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in logged
    ]
    assert [(item.step, item.value) for item in events.Scalars("epoch/early_stopping_loss")] == [
        (STEPS_AN_EPOCH * epoch["epoch"], pytest.approx(epoch["early_stopping_loss"])) for epoch in run.history
    ]


@pytest.mark.slow
def test_weights_and_biases_writes_offline_without_an_account(fit, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    fit(monitor={"wandb": "offline"}, epochs=1)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert next(run.glob("*.wandb")).stat().st_size > 0


def test_a_trace_shows_the_steps_that_were_asked_for(fit, tmp_path):
    fit(monitor={"profile_steps": 2}, epochs=3)
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert any("addmm" in name for name in names)


def test_a_trace_of_more_steps_than_there_are_is_written_all_the_same(tmp_path):
    trace = Trace(tmp_path / "trace.json", 50, "cpu")
    for _ in range(8):
        trace.step({})
    trace.close()
    assert (tmp_path / "trace.json").stat().st_size > 0


def test_by_default_there_is_a_log_and_nothing_else(tmp_path):
    (log,) = monitors(MonitorConfig(), tmp_path / "state.pt", "cpu", 0)
    assert isinstance(log, StepLog)
    log.close()


def test_a_reading_has_its_scalars_and_its_time():
    import torch

    reading = Reading(choice_of("fp32").device)
    reading.take([torch.tensor(1.5), torch.tensor(True)])
    assert reading.values() == [1.5, 1.0]
    assert 0 < reading.milliseconds < 60_000

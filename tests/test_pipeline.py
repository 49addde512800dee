"""Running stages: what is skipped, why something runs again, what is kept when a stage fails or is interrupted."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mpdeploy.artifact import FileArtifact
from mpdeploy.config import DataConfig, Pipeline, TrainConfig
from mpdeploy.errors import ArtifactChangedError, BuildError, ConfigError, StageFailedError, UsageError
from mpdeploy.pipeline import Context, Outcome, RunSummary, Silent, TerminatedError, run_stages, termination_raises
from mpdeploy.run_dir import RunDir


@dataclass
class Fake:
    """A stage that writes one file; `act` is called first."""

    name: str
    isolated: bool = False
    content: str = "1"
    decides: dict[str, Any] = field(default_factory=lambda: {"epochs": 3})
    act: Callable[[], None] = lambda: None
    ran: int = 0

    def key(self, context: Context) -> dict[str, Any]:
        return dict(self.decides)

    def run(self, context: Context) -> Outcome:
        self.ran += 1
        path = context.run.folder(self.name) / "made"
        path.write_text(self.content)
        self.act()
        return Outcome({"made": FileArtifact.of(path)}, {"loss": 0.5})


class Recorder(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def stage_started(self, name: str) -> None:
        self.told.append(f"{name} starts")

    def stage_ended(self, record, *, cached: bool) -> None:
        self.told.append(f"{record.name} {'kept' if cached else record.status}")

    def message(self, text: str) -> None:
        self.told.append(text)


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


PIPELINE = Pipeline(name="fake", data=DataConfig(load=len), train=TrainConfig(model=len))


class Flow:
    """The stages 10-train, 20-export, 40-build/a, 40-build/b and 50-validate over one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages = {
            name: Fake(name, isolated="/" in name)
            for name in ("10-train", "20-export", "40-build/a", "40-build/b", "50-validate")
        }
        self.told: list[str] = []

    def __getitem__(self, name: str) -> Fake:
        return self.stages[name]

    def go(self, **options: str) -> RunSummary:
        recorder = Recorder()
        self.told = recorder.told
        for stage in self.stages.values():
            stage.ran = 0
        with RunDir.create(self.path) as run:
            return run_stages(list(self.stages.values()), Context(run, PIPELINE, recorder), **options)

    @property
    def ran(self) -> list[str]:
        return [name for name, stage in self.stages.items() if stage.ran]

    def status(self, name: str) -> str | None:
        record = RunDir.open(self.path).record(name)
        return None if record is None else record.status


@pytest.fixture
def flow(tmp_path):
    return Flow(tmp_path / "run")


def test_the_first_run_runs_every_stage_in_order(flow):
    summary = flow.go()
    assert summary == RunSummary((), {})
    assert flow.told == [f"{name} {what}" for name in flow.stages for what in ("starts", "done")]


def test_a_finished_run_skips_every_stage(flow):
    flow.go()
    summary = flow.go()
    assert flow.ran == []
    assert summary.cached == tuple(flow.stages)
    assert flow.told == [f"{name} kept" for name in flow.stages]


def test_a_stage_whose_key_changed_runs_again_alone_and_says_why(flow):
    flow.go()
    flow["20-export"].decides = {"epochs": 5, "opset": 20}
    flow.go()
    assert flow.ran == ["20-export"]
    assert "20-export: runs again: epochs changed (3 -> 5); opset is new" in flow.told


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a.b changed (1 -> 2)"),
        ({"a": {"b": 1}}, {"a": {}}, "a.b is gone"),
        ({"a": 1}, {"a": {"b": 1}}, "a changed (1 -> {'b': 1})"),
        ({"a": [1, 2]}, {"a": [2, 1]}, "a changed ([1, 2] -> [2, 1])"),
        ({"a": "x" * 50}, {"a": "y" * 50}, "a changed"),
        ({"a": True}, {"a": None}, "a changed (True -> None)"),
    ],
)
def test_the_reason_names_the_part_that_changed(flow, before, after, reason):
    flow["10-train"].decides = before
    flow.go()
    flow["10-train"].decides = after
    flow.go()
    assert [line for line in flow.told if "again" in line] == [f"10-train: runs again: {reason}"]


def test_many_reasons_are_cut_to_three(flow):
    flow["10-train"].decides = {str(i): 0 for i in range(5)}
    flow.go()
    flow["10-train"].decides = {str(i): 1 for i in range(5)}
    flow.go()
    again = next(line for line in flow.told if "again" in line)
    assert again.count("changed") == 3
    assert again.endswith("; ...")


@pytest.mark.parametrize(
    "key",
    [{"path": Path("a/b")}, {"shape": (1, 2)}, {"nan": float("nan")}, {3: "int key"}, {"deep": {"x": (None, 1.5)}}],
)
def test_a_key_that_json_writes_in_another_form_is_no_change(flow, key):
    flow["10-train"].decides = key
    flow.go()
    flow.go()
    assert flow.ran == []


def test_from_runs_that_stage_and_those_after_it_even_where_their_records_hold(flow):
    flow.go()
    summary = flow.go(start="40-build/b")
    assert flow.ran == ["40-build/b", "50-validate"]
    assert summary.cached == ("10-train", "20-export", "40-build/a")


def test_from_a_group_starts_with_its_first(flow):
    flow.go()
    flow.go(start="40-build")
    assert flow.ran == ["40-build/a", "40-build/b", "50-validate"]


def test_from_takes_earlier_stages_as_they_are_even_where_their_keys_changed(flow):
    flow.go()
    flow["10-train"].decides = {"epochs": 99}
    flow.go(start="50-validate")
    assert flow.ran == ["50-validate"]


def test_until_stops_after_that_stage(flow):
    flow.go(until="20-export")
    assert flow.ran == ["10-train", "20-export"]
    assert flow.status("40-build/a") is None


def test_until_a_group_includes_all_of_it(flow):
    flow.go(until="40-build")
    assert flow.ran[-1] == "40-build/b"
    assert flow.status("50-validate") is None


def test_from_and_until_the_same_stage_runs_it_alone(flow):
    flow.go()
    flow.go(start="20-export", until="20-export")
    assert flow.ran == ["20-export"]


def test_from_after_until_is_refused(flow):
    flow.go()
    with pytest.raises(ConfigError, match="--from 50-validate comes after --until 20-export"):
        flow.go(start="50-validate", until="20-export")


@pytest.mark.parametrize(("option", "shown"), [("start", "--from"), ("until", "--until")])
def test_a_stage_that_does_not_exist_gets_a_suggestion_and_nothing_runs(flow, option, shown):
    with pytest.raises(ConfigError, match=f"{shown} 20-exprot: there is no such stage") as caught:
        flow.go(**{option: "20-exprot"})
    assert "20-export" in (caught.value.hint or "")
    assert flow.ran == []


def test_from_needs_what_comes_before_it(flow):
    with pytest.raises(StageFailedError, match="--from 50-validate needs a finished 10-train") as caught:
        flow.go(start="50-validate")
    assert "--from 10-train" in (caught.value.hint or "")
    assert flow.ran == []


def test_from_takes_an_engine_that_failed_as_it_is(flow):
    flow["40-build/a"].act = raising(BuildError("no"))
    flow.go()
    flow.go(start="50-validate")
    assert flow.ran == ["50-validate"]


@pytest.mark.parametrize("damage", ["changed", "missing"])
@pytest.mark.parametrize("options", [{}, {"start": "50-validate"}])
def test_an_artifact_that_changed_behind_our_back_stops_the_run(flow, damage, options):
    flow.go()
    path = flow.path / "20-export" / "made"
    path.write_text("other") if damage == "changed" else path.unlink()
    with pytest.raises(ArtifactChangedError, match="20-export/made") as caught:
        flow.go(**options)
    assert caught.value.exit_code == 20
    assert "--from 20-export" in (caught.value.hint or "")
    assert flow.ran == []


def test_an_artifact_that_changed_is_made_again_with_the_hinted_from(flow):
    flow.go()
    (flow.path / "20-export" / "made").write_text("other")
    flow.go(start="20-export")
    assert (flow.path / "20-export" / "made").read_text() == "1"


def test_a_stage_that_failed_stops_the_run_and_earlier_ones_are_kept(flow):
    flow["20-export"].act = raising(StageFailedError("no trace", hint="try this"))
    with pytest.raises(StageFailedError, match="no trace"):
        flow.go()
    record = RunDir.open(flow.path).record("20-export")
    assert record is not None
    assert (record.status, record.message, record.hint, record.artifacts) == ("failed", "no trace", "try this", {})
    assert (flow.status("10-train"), flow.status("40-build/a")) == ("done", None)
    flow["20-export"].act = lambda: None
    flow.go()
    assert flow.ran == ["20-export", "40-build/a", "40-build/b", "50-validate"]


def test_an_isolated_stage_that_failed_lets_the_others_go_on(flow):
    error = BuildError("unsupported op")
    flow["40-build/a"].act = raising(error)
    summary = flow.go()
    assert summary.failures == {"40-build/a": error}
    assert flow.ran == list(flow.stages)
    assert [flow.status(name) for name in ("40-build/a", "40-build/b")] == ["failed", "done"]


def test_only_the_engine_that_failed_is_built_again(flow):
    flow["40-build/a"].act = raising(BuildError("no"))
    flow.go()
    flow["40-build/a"].act = lambda: None
    assert flow.go().failures == {}
    assert flow.ran == ["40-build/a"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, TerminatedError])
@pytest.mark.parametrize("name", ["10-train", "40-build/a"])
def test_an_interrupted_stage_is_recorded_and_goes_on_with_the_same_command(flow, stop, name):
    flow[name].act = raising(stop())
    with pytest.raises(stop):
        flow.go()
    record = RunDir.open(flow.path).record(name)
    assert record is not None
    assert (record.status, record.artifacts) == ("interrupted", {})
    flow[name].act = lambda: None
    flow.go()
    assert flow.ran == list(flow.stages)[list(flow.stages).index(name) :]


def test_a_finished_stage_that_is_interrupted_when_it_runs_again_is_finished_no_more(flow):
    flow.go()
    flow["10-train"].act = raising(KeyboardInterrupt())
    flow["10-train"].decides = {"epochs": 4}
    with pytest.raises(KeyboardInterrupt):
        flow.go()
    flow["10-train"].act = lambda: None
    flow["10-train"].decides = {"epochs": 3}
    flow.go()
    assert flow.ran == ["10-train"]


def test_a_process_that_was_killed_leaves_no_record_and_the_stage_runs_again(flow):
    """Nothing is written when a stage starts: a process that is killed cannot write, and the old record must not hold."""
    flow.go()
    flow["10-train"].decides = {"epochs": 4}
    pid = os.fork()
    if pid == 0:
        flow["10-train"].content = "half"
        flow["10-train"].act = lambda: os.kill(os.getpid(), signal.SIGKILL)
        flow.go()
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    flow.go()
    assert flow.ran == ["10-train"]
    assert (flow.path / "10-train" / "made").read_text() == "1"


def test_a_bug_in_a_stage_is_recorded_and_comes_out_as_it_is(flow):
    flow["20-export"].act = raising(AttributeError("oops"))
    with pytest.raises(AttributeError, match="oops"):
        flow.go()
    record = RunDir.open(flow.path).record("20-export")
    assert record is not None
    assert (record.status, record.message) == ("failed", "AttributeError: oops")
    assert "report" in (record.hint or "")


def test_a_full_disk_within_a_stage_is_a_failed_stage_with_a_hint(flow):
    flow["20-export"].act = raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(StageFailedError, match="No space left on device") as caught:
        flow.go()
    assert "free some space" in (caught.value.hint or "")
    assert flow.status("20-export") == "failed"


def test_seconds_and_start_are_recorded(flow):
    flow.go()
    record = RunDir.open(flow.path).record("10-train")
    assert record is not None
    assert record.seconds >= 0
    assert record.started.endswith("Z")


def test_sigterm_becomes_an_exception_within_the_block_and_its_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TerminatedError), termination_raises():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_usage_error_in_a_stage_keeps_its_exit_code(flow):
    flow["10-train"].act = raising(UsageError("no"))
    with pytest.raises(UsageError) as caught:
        flow.go()
    assert caught.value.exit_code == 2

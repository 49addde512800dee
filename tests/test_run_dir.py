"""A run directory: what it refuses to touch, what it notices, and that two processes never share it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpdeploy.artifact import Checkpoint, Engine, FileArtifact, OnnxModel, TensorSpec
from mpdeploy.errors import ArtifactChangedError, RunDirError
from mpdeploy.run_dir import MANIFEST, SCHEMA_VERSION, RunDir, StageRecord


def finished(run: RunDir, stage: str = "10-train", content: str = "weights") -> StageRecord:
    """Put a finished stage with one artifact into a run."""
    path = run.folder(stage) / "model.bin"
    path.write_text(content)
    spec = TensorSpec("x", "float32", ("batch", 8))
    model = OnnxModel.of(path, inputs=[spec], outputs=[spec], sidecar={"precision": "fp16"})
    record = StageRecord(stage, "done", {"epochs": 3}, {"model": model}, {"loss": 0.5}, 1.2345, "now")
    run.put(record)
    return record


def test_a_record_reads_back_as_it_was_put(tmp_path):
    with RunDir.create(tmp_path / "run") as run:
        record = finished(run)
    read = RunDir.open(tmp_path / "run").record("10-train")
    assert read == dataclasses.replace(record, seconds=1.234)


@pytest.mark.parametrize("kind", [Checkpoint, OnnxModel, Engine, FileArtifact])
def test_an_artifact_keeps_its_kind(tmp_path, kind):
    with RunDir.create(tmp_path) as run:
        path = run.folder("s") / "file"
        path.write_text("x")
        run.put(StageRecord("s", "done", {}, {"a": kind.of(path)}))
    assert type(RunDir.open(tmp_path).artifact("s", "a")) is kind


def test_a_run_that_was_moved_finds_its_artifacts(tmp_path):
    with RunDir.create(tmp_path / "here") as run:
        finished(run)
    (tmp_path / "here").rename(tmp_path / "there")
    found = RunDir.open(tmp_path / "there").artifact("10-train", "model")
    assert found.path == tmp_path / "there" / "10-train" / "model.bin"


def test_a_missing_run_is_named_and_the_hint_says_what_makes_one(tmp_path):
    with pytest.raises(RunDirError, match=r"is no run directory: it holds no run\.json") as caught:
        RunDir.open(tmp_path / "nothing")
    assert "train-and-export" in (caught.value.hint or "")
    assert not (tmp_path / "nothing").exists()


def test_a_foreign_folder_is_refused_and_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RunDirError, match=r"not empty and holds no run.json: thesis.tex") as caught:
        RunDir.create(tmp_path)
    assert caught.value.exit_code == 2
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_that_was_killed_before_its_first_manifest_is_not_foreign(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / f".{MANIFEST}.a1b2.partial").write_text("{")
    with RunDir.create(tmp_path) as run:
        run.set_header(pipeline="tiny")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == [MANIFEST]


def test_a_file_in_the_place_of_the_run_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunDirError, match="Cannot make the run directory"):
        RunDir.create(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "x"


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(RunDirError, match="cannot be written") as caught:
        RunDir.create(tmp_path)
    assert "permissions" in (caught.value.hint or "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(RunDirError, match="cannot be written"):
        RunDir.create(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"schema": 1}',
        '{"schema": 1, "stages": []}',
        '{"schema": 1, "stages": {"10-train": {"status": "done"}}}',
        '{"schema": 1, "stages": {"10-train": "done"}}',
        "\xff\xfe",
    ],
)
@pytest.mark.parametrize("entry", [RunDir.open, RunDir.create])
def test_a_corrupt_manifest_is_a_fault_and_stays_as_it_is(tmp_path, content, entry):
    path = tmp_path / MANIFEST
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RunDirError, match=r"run\.json is corrupt"):
        entry(tmp_path)
    assert path.read_bytes() == content.encode("latin-1")


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.9, 0.99])
def test_a_manifest_that_was_cut_short_is_a_fault(tmp_path, cut):
    with RunDir.create(tmp_path) as run:
        finished(run)
    whole = (tmp_path / MANIFEST).read_bytes()
    (tmp_path / MANIFEST).write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(RunDirError, match="corrupt"):
        RunDir.open(tmp_path)


@pytest.mark.parametrize("stages", [{}, {"10-train": {"written": "in another form"}}])
def test_another_schema_names_both_versions(tmp_path, stages):
    (tmp_path / MANIFEST).write_text(json.dumps({"schema": SCHEMA_VERSION + 1, "stages": stages}))
    with pytest.raises(
        RunDirError, match=f"has schema {SCHEMA_VERSION + 1}; this mpdeploy reads schema {SCHEMA_VERSION}"
    ):
        RunDir.open(tmp_path)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_an_artifact_that_is_not_the_recorded_one_is_never_handed_out(tmp_path, damage):
    with RunDir.create(tmp_path) as run:
        finished(run, "40-build/openvino")
    path = tmp_path / "40-build" / "openvino" / "model.bin"
    path.write_text("other weights") if damage == "changed" else path.unlink()
    run = RunDir.open(tmp_path)
    with pytest.raises(ArtifactChangedError, match="has digest" if damage == "changed" else "is missing") as caught:
        run.artifact("40-build/openvino", "model")
    assert caught.value.exit_code == 20
    assert "--from 40-build" in (caught.value.hint or "")


@pytest.mark.parametrize("status", ["failed", "interrupted", "unavailable"])
def test_a_stage_that_did_not_finish_has_no_artifacts(tmp_path, status):
    with RunDir.create(tmp_path) as run:
        run.put(StageRecord("10-train", status, {}))
        with pytest.raises(RunDirError, match="no finished 10-train with 'model'"):
            run.artifact("10-train", "model")


def test_records_keep_the_order_they_were_first_written_in(tmp_path):
    with RunDir.create(tmp_path) as run:
        for name in ("10-train", "20-export", "10-train"):
            run.put(StageRecord(name, "done", {}))
    assert list(RunDir.open(tmp_path).records()) == ["10-train", "20-export"]


def test_a_dropped_stage_is_forgotten(tmp_path):
    with RunDir.create(tmp_path) as run:
        run.put(StageRecord("40-build/openvino", "done", {}))
        run.drop("40-build/openvino")
        run.drop("40-build/never-there")
    assert RunDir.open(tmp_path).records() == {}


HOLD = """
import sys, time
from pathlib import Path
from mpdeploy.run_dir import RunDir, StageRecord
with RunDir.create(Path(sys.argv[1])) as run:
    run.put(StageRecord("10-train", "done", {"by": "the other"}))
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the run directory until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_run_in_use_by_another_process_is_refused_at_once(holder, tmp_path):
    with pytest.raises(RunDirError, match="in use by another process") as caught:
        RunDir.create(tmp_path / "run").__enter__()
    assert caught.value.exit_code == 2
    assert "--run" in (caught.value.hint or "")


def test_a_run_in_use_can_be_read(holder, tmp_path):
    record = RunDir.open(tmp_path / "run").record("10-train")
    assert record is not None
    assert record.key == {"by": "the other"}


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_a_run_can_be_claimed_when_its_holder(holder, tmp_path, how):
    if how == "ends":
        holder.stdin.close()  # it reads to the end of its stdin
    else:
        holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=30)
    with RunDir.create(tmp_path / "run") as run:
        assert run.record("10-train") is not None


def test_claiming_a_run_reads_what_another_process_finished_since_it_was_opened(tmp_path):
    early = RunDir.create(tmp_path)
    with RunDir.create(tmp_path) as other:
        other.put(StageRecord("10-train", "done", {}))
    with early:
        early.put(StageRecord("20-export", "done", {}))
    assert list(RunDir.open(tmp_path).records()) == ["10-train", "20-export"]


def test_an_exception_gives_the_lock_back(tmp_path):
    with pytest.raises(ZeroDivisionError), RunDir.create(tmp_path):
        raise ZeroDivisionError
    with RunDir.create(tmp_path) as run:
        assert run.records() == {}


def test_claiming_a_run_sweeps_what_a_killed_process_left_half_written(tmp_path):
    with RunDir.create(tmp_path) as run:
        finished(run)
    (tmp_path / "10-train" / ".model.bin.x.partial").write_text("half")
    with RunDir.create(tmp_path):
        assert [path.name for path in (tmp_path / "10-train").iterdir()] == ["model.bin"]


def test_a_manifest_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    from mpdeploy.errors import StageFailedError

    with RunDir.create(tmp_path) as run:
        finished(run)
        monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StageFailedError, match="No space left"):
            run.put(StageRecord("20-export", "done", {}))
    assert list(RunDir.open(tmp_path).records()) == ["10-train"]


def test_the_manifest_is_json_for_every_reader(tmp_path):
    with RunDir.create(tmp_path) as run:
        run.put(StageRecord("10-train", "done", {}, report={"loss": float("nan"), "scale": float("inf")}))
    text = (tmp_path / MANIFEST).read_text()
    assert json.loads(text, parse_constant=pytest.fail)["stages"]["10-train"]["report"] == {
        "loss": "nan",
        "scale": "inf",
    }
    assert Path(tmp_path / MANIFEST).stat().st_mode & 0o777 == 0o644

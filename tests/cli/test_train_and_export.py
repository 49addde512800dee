"""The main job as a user runs it: exit codes, one JSON document, and what is run again."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from tiny_pipeline import TINY, mpdeploy

from mpdeploy.engines.tensorrt import TENSORRT
from mpdeploy.run_dir import RunDir

STAGES = ["10-train", "20-export", "30-convert", "40-build/onnxruntime", "40-build/openvino", "50-validate"]
ENGINES = ("--engine", "onnxruntime", "--engine", "openvino")


def arguments(run: Path, *options: object) -> tuple[object, ...]:
    """The command that made the run."""
    return ("train-and-export", run.parent / "tiny.py", "--run", run, *ENGINES, "--json", *options)


@pytest.fixture
def again(command):
    """The command that made the run, once more, within this process."""
    return lambda run, *options: command(*arguments(run, *options))


def document(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What stands on stdout: one JSON document and nothing else."""
    return json.loads(process.stdout)


def ran(process: subprocess.CompletedProcess[str]) -> list[str]:
    return [name for name, stage in document(process)["stages"].items() if not stage["cached"]]


def decided(verdicts: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The verdicts that do not depend on how busy the machine is."""
    return [(item["id"], item["at"], item["verdict"]) for item in verdicts if not item["advisory"]]


def edit(run: Path, old: str, new: str) -> None:
    """Change the pipeline file beside a run."""
    assert old in TINY, f"{old!r} is not in the pipeline: this changes nothing"
    (run.parent / "tiny.py").write_text(TINY.replace(old, new, 1))


# -- the first run -----------------------------------------------------------------------------------------------------


def test_a_run_goes_from_training_to_gated_engines(finished_run):
    found = finished_run.document
    assert finished_run.process.returncode == 0
    assert found["verdict"] == "pass"
    assert list(found["stages"]) == STAGES
    assert {stage["status"] for stage in found["stages"].values()} == {"done"}
    assert found["chosen_engine"] in ("onnxruntime", "openvino")
    assert found["failures"] == {}


def test_the_manifest_holds_a_record_of_every_stage_with_artifacts_that_lie_there(finished_run):
    run = RunDir.open(finished_run.path)
    assert list(run.records()) == STAGES
    for record in run.records().values():
        assert record.artifacts, record.name
        assert all(item.verified() for item in record.artifacts.values())
    assert run.manifest["pipeline"] == "tiny"
    assert run.manifest["environment"]["packages"]["torch"]
    assert run.manifest["chosen_engine"] == finished_run.document["chosen_engine"]


def test_it_leaves_the_files_the_design_names_and_nothing_half_written(finished_run):
    names = {path.name for path in finished_run.path.iterdir()} - {".lock"}
    stages = {name.split("/")[0] for name in STAGES} - {"50-validate"}
    assert names == {"run.json", "gate.json", "junit.xml", "summary.md", "report.html", "evidence", *stages}
    assert not list(finished_run.path.rglob("*.partial"))


def test_the_table_has_a_row_for_every_place_with_its_numbers(finished_run):
    rows = {row["artifact"]: row for row in finished_run.document["table"]}
    assert list(rows) == ["parity", "onnx", "emulated/fp16", "onnxruntime", "openvino"]
    assert {row["verdict"] for row in rows.values()} == {"pass"}
    assert 0 < rows["onnx"]["rel_l2"] < 1e-5 < rows["emulated/fp16"]["rel_l2"] < 1e-2
    assert all(rows[name]["median_ms"] > 0 for name in ("onnxruntime", "openvino"))
    assert all(row["score"] > 0.8 for row in rows.values())
    change = rows["emulated/fp16"]["score_change_pt"]
    assert change["low"] <= change["measured"] <= change["high"]


def test_junit_and_the_summary_tell_the_same_verdicts(finished_run):
    gate = json.loads((finished_run.path / "gate.json").read_text())
    suite = ET.parse(finished_run.path / "junit.xml").getroot()
    cases = list(suite.iter("testcase"))
    assert len(cases) == len(gate["verdicts"])
    assert not [case for case in cases if case.find("failure") is not None]
    summary = (finished_run.path / "summary.md").read_text()
    assert all(f"{verdict['at']}" in summary for verdict in gate["verdicts"])


def test_progress_goes_to_stderr(finished_run):
    lines = finished_run.process.stderr.splitlines()
    assert [line.split(":")[0] for line in lines if ": done in" in line] == STAGES


def test_without_json_stdout_is_a_table(command, run_copy):
    process = command("train-and-export", run_copy.parent / "tiny.py", "--run", run_copy, *ENGINES)
    assert process.returncode == 0
    for text in ("emulated/fp16", "openvino", "pass", "the fastest engine that passed here"):
        assert text in process.stdout


# -- the second run ----------------------------------------------------------------------------------------------------


def test_a_second_run_skips_every_stage_in_under_10_seconds(run_copy, finished_run):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = mpdeploy(*arguments(run_copy))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    )  # of a processor, whoever else wants it
    assert process.returncode == 0
    assert ran(process) == []
    assert seconds < 10, seconds
    assert decided(document(process)["verdicts"]) == decided(finished_run.document["verdicts"])


def test_an_edited_gate_retrains_nothing_and_decides_anew(again, run_copy):
    edit(run_copy, 'metric="rel_l2", limit=1e-2', 'metric="rel_l2", limit=1e-12')
    process = again(run_copy)
    assert process.returncode == 10
    assert ran(process) == []
    assert "rel_l2 on `emulated/fp16`" in process.stderr


def test_an_edited_model_retrains(again, run_copy):
    before = RunDir.open(run_copy).artifact("10-train", "model").sha256
    edit(run_copy, "WIDTH = 8", "WIDTH = 4")
    process = again(run_copy, "--until", "10-train")
    assert process.returncode == 0, process.stderr
    assert "10-train: runs again: train.model.source changed" in process.stderr
    assert RunDir.open(run_copy).artifact("10-train", "model").sha256 != before


def test_more_epochs_retrain(again, run_copy):
    process = again(run_copy, "--set", "train.epochs=3", "--until", "10-train")
    assert process.returncode == 0, process.stderr
    assert "10-train: runs again: train.epochs changed (2 -> 3)" in process.stderr
    trained = RunDir.open(run_copy).record("10-train")
    assert trained is not None
    assert len(trained.report["history"]) == 3


def test_an_edited_comment_in_the_model_retrains_nothing(again, run_copy):
    edit(run_copy, "WIDTH = 8", "# how wide it is\nWIDTH = 8")
    assert ran(again(run_copy)) == []


def test_from_runs_that_stage_and_those_after_it_again(again, run_copy):
    process = again(run_copy, "--from", "50-validate")
    assert process.returncode == 0
    assert ran(process) == ["50-validate"]


def test_an_engine_that_is_no_longer_asked_for_is_not_judged(command, run_copy):
    process = command(
        "train-and-export", run_copy.parent / "tiny.py", "--run", run_copy, "--engine", "openvino", "--json"
    )
    assert process.returncode == 0
    assert ran(process) == ["50-validate"]
    assert {item["at"] for item in document(process)["verdicts"] if item["at"].startswith("engine/")} == {
        "engine/openvino"
    }


def test_a_run_that_was_moved_is_still_the_same_run(again, run_copy, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.move(run_copy, tmp_path / "elsewhere" / "moved")
    shutil.move(tmp_path / "tiny.py", tmp_path / "elsewhere" / "tiny.py")
    assert ran(again(tmp_path / "elsewhere" / "moved")) == []


def test_of_the_ranks_of_torchrun_only_the_first_goes_on(command, tiny_file, tmp_path, monkeypatch):
    """The others end with 0: a failed gate must not make the launcher train again."""
    monkeypatch.setenv("RANK", "1")
    process = command("train-and-export", tiny_file, "--run", tmp_path / "run")
    assert process.returncode == 0
    assert not (tmp_path / "run").exists()


# -- exit codes --------------------------------------------------------------------------------------------------------


def test_a_gate_that_is_too_strict_exits_10_and_still_writes_its_evidence(run_copy):
    for name in ("gate.json", "junit.xml", "summary.md", "report.html"):
        (run_copy / name).unlink()
    process = mpdeploy(*arguments(run_copy, "--set", "gates.accuracy.limit=-0.5"))
    assert process.returncode == 10
    gate = json.loads((run_copy / "gate.json").read_text())
    assert (gate["verdict"], document(process)["verdict"]) == ("fail", "fail")
    failed = [item for item in gate["verdicts"] if item["verdict"] == "fail" and not item["advisory"]]
    assert {item["id"] for item in failed} == {"accuracy"}
    assert all(item["message"] in process.stderr for item in failed)
    assert (run_copy / "evidence" / "index.json").is_file()
    assert ET.parse(run_copy / "junit.xml").getroot().find(".//failure") is not None
    assert "fail" in (run_copy / "summary.md").read_text()
    assert "fail" in (run_copy / "report.html").read_text()


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--strict",), 11)])
def test_samples_that_cannot_tell_exit_0_and_11_under_strict(again, run_copy, options, code):
    process = again(run_copy, "--set", "gates.accuracy.limit=0.005", *options)
    assert process.returncode == code
    assert document(process)["verdict"] == "inconclusive"
    undecided = [item for item in document(process)["verdicts"] if item["verdict"] == "inconclusive"]
    assert all("samples would decide" in item["message"] for item in undecided)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "train.epoch=3"), "closest keys: epochs"),
        (("--set", "train.epochs=many", "--set", "nonsense=1"), "there is no 'nonsense'"),
        (("--engine", "openvin"), "There is no engine 'openvin'"),
        (("--from", "60-serve"), "--from 60-serve: there is no such stage"),
        (("--no-such-option",), "No such option"),
    ],
)
def test_wrong_usage_exits_2_with_one_json_document(command, tmp_path, tiny_file, options, message):
    process = command("train-and-export", tiny_file, "--run", tmp_path / "run", "--json", *options)
    assert process.returncode == 2
    assert message in process.stderr
    assert document(process)["error"]["exit_code"] == 2
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "run" / "10-train").exists()


def test_a_pipeline_that_is_not_there_exits_2(command, tmp_path, tiny_file):
    process = command("train-and-export", tmp_path / "tiyn.py", "--json")
    assert process.returncode == 2
    assert "tiny.py" in document(process)["error"]["message"]


def test_an_exception_in_the_pipeline_file_exits_20_with_their_traceback(tmp_path):
    (tmp_path / "mine.py").write_text("def pipeline():\n    return {}['accuracy']\n")
    process = mpdeploy("train-and-export", tmp_path / "mine.py", "--json")
    assert process.returncode == 20
    assert "mine.py, line 2, raised KeyError: 'accuracy'" in document(process)["error"]["message"]
    assert "mpdeploy/cli" not in process.stderr
    assert "this is a bug" not in process.stderr


def test_an_exception_in_the_users_data_exits_20_and_is_recorded(command, tmp_path, tiny_file):
    tiny_file.write_text(TINY.replace("return load_digits(config)", "raise FileNotFoundError('digits.npz')"))
    process = command("train-and-export", tiny_file, "--run", tmp_path / "run", "--engine", "onnxruntime")
    assert process.returncode == 20
    assert "raised FileNotFoundError: digits.npz" in process.stderr
    record = RunDir.open(tmp_path / "run").record("10-train")
    assert record is not None
    assert record.status == "failed"
    assert "tiny.py, line" in (record.message or "")


@pytest.mark.skipif(TENSORRT.available() is None, reason="TensorRT is here: asking for it is no error")
@pytest.mark.parametrize("how", [("--engine", "tensorrt"), ("--set", 'build.engines=["onnxruntime", "tensorrt"]')])
def test_an_engine_that_is_asked_for_by_name_and_missing_exits_21_before_anything_is_trained(tmp_path, tiny_file, how):
    process = mpdeploy("train-and-export", tiny_file, "--run", tmp_path / "run", "--json", *how)
    assert process.returncode == 21
    assert "The engine 'tensorrt' was asked for" in document(process)["error"]["message"]
    assert not (tmp_path / "run").exists()


def test_an_artifact_that_was_changed_exits_20_and_names_the_way_back(again, run_copy):
    (run_copy / "20-export" / "model.fp32.onnx").write_bytes(b"other")
    process = again(run_copy)
    assert process.returncode == 20
    assert "model.fp32.onnx has digest" in process.stderr
    assert "--from 20-export" in process.stderr


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda run: (run / "run.json").write_text("{"), "run.json is corrupt"),
        (lambda run: (run / "run.json").write_text('{"schema": 99, "stages": {}}'), "has schema 99"),
        (lambda run: (run / "run.json").unlink(), "is not empty and holds no run.json"),
    ],
    ids=["a corrupt manifest", "another schema", "a foreign folder"],
)
def test_a_run_directory_that_cannot_be_used_exits_2_and_is_not_touched(again, run_copy, prepare, message):
    prepare(run_copy)
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    process = again(run_copy)
    assert process.returncode == 2
    assert message in process.stderr
    assert "hint:" in process.stderr
    assert {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file() and path.name != ".lock"} == {
        path: content for path, content in before.items() if path.name != ".lock"
    }


def test_a_run_directory_in_use_exits_2(again, run_copy):
    with RunDir.open(run_copy):
        process = again(run_copy)
    assert process.returncode == 2
    assert "in use by another process" in process.stderr


def test_a_full_disk_exits_20_keeps_what_was_finished_and_goes_on_when_there_is_space(again, run_copy, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    used = sum(path.stat().st_size // 4096 * 4 + 4 for path in run_copy.rglob("*"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={used + 200}k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    try:
        run = disk / "run"
        shutil.copytree(run_copy, run)
        shutil.copy(tmp_path / "tiny.py", disk / "tiny.py")
        _fill(run / "filler")
        full = again(run, "--from", "50-validate")
        assert full.returncode == 20
        assert "No space left on device" in full.stderr
        assert "free some space" in full.stderr
        assert list(RunDir.open(run).records()) == STAGES, "the manifest is whole"
        (run / "filler").unlink()
        assert ran(again(run, "--from", "50-validate")) == ["50-validate"]
    finally:
        subprocess.run(["umount", disk], check=True)


def _fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 1024)
        except OSError:
            pass

"""Ctrl-C, SIGTERM and kill -9 at any stage: what was finished is kept, and the same command ends in the same result."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_pipeline import mpdeploy

from mpdeploy.run_dir import RunDir

STAGES = ["10-train", "20-export", "30-convert", "40-build/onnxruntime", "40-build/openvino", "50-validate"]
ENGINES = ("--engine", "onnxruntime", "--engine", "openvino")


@pytest.fixture
def before(finished_run, tmp_path):
    """`before("30-convert")`: a run that has come so far, and the command that goes on from there."""

    def make(stage: str) -> tuple[Path, tuple[object, ...]]:
        run = tmp_path / "run"
        shutil.copy(finished_run.pipeline, tmp_path / "tiny.py")
        if stage != STAGES[0]:
            shutil.copytree(finished_run.path, run)
            with RunDir.open(run) as opened:
                for name in STAGES[STAGES.index(stage) :]:
                    opened.drop(name)
                    folder = run / ("evidence" if name == "50-validate" else name)
                    shutil.rmtree(folder)
            for name in ("gate.json", "junit.xml", "summary.md", "report.html"):
                (run / name).unlink()
        return run, ("train-and-export", tmp_path / "tiny.py", "--run", run, *ENGINES, "--json")

    return make


def start(arguments: tuple[object, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mpdeploy", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], stage: str) -> None:
    """Wait until a stage says that it begins."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"{stage} ..."):
            return
    pytest.fail(f"{stage} never began")


def decided(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(item["id"], item["at"], item["verdict"]) for item in document["verdicts"] if not item["advisory"]]


def weights(run: Path) -> dict[str, str]:
    with_digests = RunDir.open(run).record("10-train")
    assert with_digests is not None
    return {name: item.sha256 for name, item in with_digests.artifacts.items()}


def assert_ends_as_if_nothing_had_happened(run, arguments, finished_run, *, kept: list[str]) -> None:
    process = mpdeploy(*arguments)
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    assert [name for name, stage in document["stages"].items() if stage["cached"]][: len(kept)] == kept
    assert weights(run) == weights(finished_run.path)
    assert decided(document) == decided(finished_run.document)
    assert not list(run.rglob("*.partial"))


CTRL_C, SIGTERM = ("SIGINT", 130, "Interrupted"), ("SIGTERM", 143, "Terminated")
QUICK = [("10-train", *CTRL_C), ("20-export", *SIGTERM), ("30-convert", *CTRL_C), ("50-validate", *SIGTERM)]
ALL = [(stage, *how) for stage in STAGES for how in (CTRL_C, SIGTERM)]


@pytest.mark.parametrize(
    ("stage", "name", "code", "word"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in ALL],
)
def test_a_signal_ends_the_run_with_its_code_and_a_record(before, stage, name, code, word):
    run, arguments = before(stage)
    with start(arguments) as process:
        wait_for(process, stage)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{word}. What finished is kept; the same command goes on from there." in err
    assert json.loads(out) == {
        "error": {"message": f"{word}. What finished is kept; the same command goes on from there.", "exit_code": code}
    }
    assert "Traceback" not in err
    opened = RunDir.open(run)
    assert {key: record.status for key, record in opened.records().items()} == {
        **dict.fromkeys(STAGES[: STAGES.index(stage)], "done"), stage: "interrupted",
    }  # fmt: skip
    assert not list(run.rglob("*.partial"))
    with opened:
        pass  # the lock was given back


def test_an_interrupted_run_goes_on_and_ends_as_if_nothing_had_happened(before, finished_run):
    run, arguments = before("30-convert")
    with start(arguments) as process:
        wait_for(process, "30-convert")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert_ends_as_if_nothing_had_happened(run, arguments, finished_run, kept=STAGES[:2])


def kill_in(stage: str, run: Path, arguments: tuple[object, ...], delay_s: float) -> None:
    with start(arguments) as process:
        wait_for(process, stage)
        time.sleep(delay_s)
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGKILL, 0), "0: it was faster than the kill"


@pytest.mark.slow
def test_kill_9_while_validating_ends_in_the_same_result_with_finished_stages_skipped(before, finished_run):
    run, arguments = before("50-validate")
    kill_in("50-validate", run, arguments, delay_s=0.1)
    assert_ends_as_if_nothing_had_happened(run, arguments, finished_run, kept=STAGES[:5])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_at_a_random_moment_of_each_stage_ends_in_the_same_result(before, finished_run, stage, seed):
    run, arguments = before(stage)
    lasts_s = {"10-train": 6.0, "20-export": 4.0}.get(stage, 1.0)
    kill_in(stage, run, arguments, delay_s=random.Random(f"{stage} {seed}").uniform(0, lasts_s))
    assert_ends_as_if_nothing_had_happened(run, arguments, finished_run, kept=STAGES[: STAGES.index(stage)])


@pytest.mark.slow
def test_kill_9_again_and_again_in_one_run_ends_in_the_same_result(before, finished_run):
    run, arguments = before("10-train")
    moments = random.Random(5)
    for stage in ("10-train", "10-train", "20-export", "30-convert", "50-validate"):
        with start(arguments) as process:
            assert process.stderr is not None
            began = next((line for line in process.stderr if line.startswith(f"{stage} ...")), None)
            time.sleep(moments.uniform(0, 2.0) if began else 0)
            process.kill()
            process.communicate(timeout=60)
    assert_ends_as_if_nothing_had_happened(run, arguments, finished_run, kept=[])


@pytest.mark.slow
def test_training_that_was_killed_goes_on_from_its_last_epoch(before, tmp_path):
    run, arguments = before("10-train")
    arguments = (*arguments, "--set", "train.epochs=400", "--until", "10-train")
    state = run / "10-train" / "state.amp.pt"
    with start(arguments) as process:
        deadline = time.monotonic() + 60
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        process.kill()
        process.communicate(timeout=60)
    from mpdeploy.train.checkpoint import load_state

    kept = load_state(state)
    assert kept is not None
    assert 1 <= kept["epoch"] < 400
    resumed = start(arguments)
    with resumed:
        wait_for(resumed, "10-train")
        deadline = time.monotonic() + 60
        while (load_state(state) or kept)["epoch"] == kept["epoch"] and time.monotonic() < deadline:
            time.sleep(0.05)
        after = load_state(state)
        resumed.kill()
        resumed.communicate(timeout=60)
    assert after is not None
    assert after["result"]["history"][: kept["epoch"]] == kept["result"]["history"], "it began again"

"""What `make demo` runs: the digits pipeline as it ships, with every engine that this machine has."""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_pipeline import mpdeploy

from mpdeploy.engines import ENGINES, backend
from mpdeploy.run_dir import RunDir

DIGITS = Path(__file__).parents[1] / "pipelines" / "digits_cnn.py"
pytestmark = pytest.mark.slow


def go(folder: Path, *options: object) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run it; the seconds are of CPU time, which is what an idle machine takes at most (other tests run beside this one)."""
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = mpdeploy("train-and-export", DIGITS, "--json", *options, cwd=folder, timeout=580)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process, end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str], float]:
    folder = tmp_path_factory.mktemp("demo")
    return folder / "runs" / "digits_cnn", *go(folder)


def document(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(process.stdout)


def test_the_demo_passes_in_under_90_seconds(demo):
    _, process, seconds = demo
    assert process.returncode == 0, process.stderr
    assert document(process)["verdict"] == "pass"
    assert seconds < 90


def test_every_stage_has_a_record_and_every_engine_a_state(demo):
    run, _, _ = demo
    records = RunDir.open(run).records()
    assert list(records) == [
        "10-train",
        "20-export",
        "30-convert",
        *(f"40-build/{name}" for name in ENGINES),
        "50-validate",
    ]
    for name in ENGINES:
        missing = backend(name).available()
        assert records[f"40-build/{name}"].status == ("done" if missing is None else "unavailable")
        assert missing is None or records[f"40-build/{name}"].message == missing.reason


def test_the_fp32_reference_knows_98_percent_of_the_gate_s_digits(demo):
    """And AMP really ran: in bf16 on a CPU, in fp16 on CUDA."""
    run, process, _ = demo
    gate = json.loads((run / "gate.json").read_text())
    assert gate["places"]["parity"]["scores"]["baseline_mean"] >= 0.98
    assert all(row["score"] >= 0.97 for row in document(process)["table"] if row["score"] is not None)
    trained = RunDir.open(run).record("10-train")
    assert trained is not None
    assert trained.report["choice"]["precision"] in ("bf16", "fp16")


def test_plans_that_cannot_run_here_are_listed_and_do_not_pass(demo):
    _, process, _ = demo
    waiting = [
        f"engine/{name}"
        for name in ENGINES
        if backend(name).available() is None and backend(name).can_run() is not None
    ]
    assert document(process)["unvalidated"] == waiting
    assert not [item for item in document(process)["verdicts"] if item["at"] in waiting and item["verdict"] == "pass"
                and item["metric"] in ("rel_l2", "score_drop", "num_nonfinite")]  # fmt: skip


def test_a_second_run_skips_everything_in_under_10_seconds(demo):
    run, _, _ = demo
    process, seconds = go(run.parents[1])
    assert process.returncode == 0
    kept = [
        name for name, stage in document(process)["stages"].items() if stage["status"] == "done" and stage["cached"]
    ]
    assert kept == [name for name, stage in document(process)["stages"].items() if stage["status"] == "done"]
    assert seconds < 10


def test_a_gate_that_is_too_strict_exits_10_and_retrains_nothing(demo):
    run, _, _ = demo
    process, _ = go(run.parents[1], "--set", "gates.drift-fp16.limit=1e-9")
    assert process.returncode == 10
    assert "rel_l2 on `emulated/fp16`" in process.stderr
    assert all(stage["cached"] for stage in document(process)["stages"].values() if stage["status"] == "done")
    assert json.loads((run / "gate.json").read_text())["verdict"] == "fail"

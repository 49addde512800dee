"""Fixtures that several rooms share: the tiny pipeline, and one finished run of it that tests copy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two workers on two cores must not fight
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: the tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from tiny_pipeline import TINY, mpdeploy


@dataclass(frozen=True)
class FinishedRun:
    """A run that went through all five stages in a process of its own, for tests to copy and never to change."""

    path: Path
    pipeline: Path
    process: subprocess.CompletedProcess[str]

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.process.stdout)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("finished")
    pipeline = folder / "tiny.py"
    pipeline.write_text(TINY)
    process = mpdeploy(
        "train-and-export", pipeline, "--run", folder / "run", "--engine", "onnxruntime", "--engine", "openvino", "--json"
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return FinishedRun(folder / "run", pipeline, process)


@pytest.fixture
def run_copy(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """The finished run, copied: a test may do to it what it likes."""
    shutil.copytree(finished_run.path, tmp_path / "run")
    shutil.copy(finished_run.pipeline, tmp_path / "tiny.py")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models of the zoo are exported to: once for all tests of a run, those of other workers too (the zoo locks each model)."""
    from tests import zoo

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "zoo"
    shared.mkdir(exist_ok=True)
    return zoo.cache_folder() or shared


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """The tiny pipeline's file, for a test to edit."""
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path

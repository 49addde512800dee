"""A build that goes wrong takes nothing with it, and says what it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpdeploy.artifact import OnnxModel
from mpdeploy.engines import ENGINES
from mpdeploy.engines.isolation import BuildRequest, build_isolated
from mpdeploy.errors import BuildError

ROOT = Path(__file__).parents[2]


def request_for(row: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> BuildRequest:
    monkeypatch.setitem(ENGINES, "crashing", ("tests.engines.crashing_backends", row))
    monkeypatch.chdir(ROOT)
    return BuildRequest("crashing", OnnxModel(folder / "m.onnx", "0" * 64), {}, {}, folder)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("SEGFAULT", "crashed (SIGSEGV)"),
        ("KILLED", "was killed (SIGKILL): most often the system ran out of memory"),
        ("EXITS", "ended with exit code 3 and no answer"),
        ("BUG", "ZeroDivisionError: a bug in the backend"),
    ],
)
def test_a_dead_child_is_a_classified_failure(row, said, tmp_path, monkeypatch):
    with pytest.raises(BuildError) as caught:
        build_isolated(request_for(row, tmp_path, monkeypatch))
    assert said in caught.value.message
    assert str(tmp_path / "build.log") in (caught.value.hint or "")


def test_the_log_of_a_crash_is_shown_and_kept(tmp_path, monkeypatch):
    with pytest.raises(BuildError, match="about to touch what is not mine"):
        build_isolated(request_for("SEGFAULT", tmp_path, monkeypatch))
    assert "about to touch" in (tmp_path / "build.log").read_text()


def test_an_error_of_the_backend_arrives_as_it_was_raised(tmp_path, monkeypatch):
    with pytest.raises(BuildError) as caught:
        build_isolated(request_for("REFUSES", tmp_path, monkeypatch))
    assert caught.value.message == "Node 'conv_7' is not supported."
    assert caught.value.hint == "keep it"


def test_the_child_dies_with_its_parent(tmp_path):
    code = (
        "import sys; from pathlib import Path; from mpdeploy.engines import ENGINES\n"
        "from mpdeploy.artifact import OnnxModel\n"
        "from mpdeploy.engines.isolation import BuildRequest, build_isolated\n"
        "ENGINES['crashing'] = ('tests.engines.crashing_backends', 'SLEEPS')\n"
        "folder = Path(sys.argv[1])\n"
        "build_isolated(BuildRequest('crashing', OnnxModel(folder / 'm.onnx', '0'), {}, {}, folder))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    pid_file = tmp_path / "pid"
    for _ in range(300):
        if pid_file.exists() and pid_file.read_text():
            break
        time.sleep(0.1)
    pid = int(pid_file.read_text())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not _alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child outlived its parent")


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False

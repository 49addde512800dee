"""Evidence copied to an empty machine, evidence that is malformed, and writers that are killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpdeploy.artifact import FileArtifact
from mpdeploy.config import DEFAULT_GATES
from mpdeploy.errors import NotComparableError
from mpdeploy.gates.evidence import Evidence
from mpdeploy.run_dir import RunDir, StageRecord

BLOCKED = (
    "torch",
    "onnxruntime",
    "openvino",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "jinja2",
    "sklearn",
    "tensorrt",
    "transformers",
)
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is not installed on this machine")
sys.meta_path.insert(0, Blocker())
from mpdeploy.cli import main
main()
"""


@pytest.fixture
def run(place, evidence, tmp_path):
    path = tmp_path / "run"
    found = evidence(
        place("onnx", precision="fp32", noise=1e-7), place("emulated/fp16"), place("engine/openvino", num_lost=3)
    )
    directory = RunDir.create(path)
    found.save(path / "evidence")
    directory.set_header(
        pipeline="digits", gates=[gate.to_json() for gate in DEFAULT_GATES if gate.metric != "excess_zero_gradients"]
    )
    directory.put(StageRecord("50-validate", "done", {}, {"evidence": FileArtifact.of(path / "evidence/index.json")}))
    return path


def _mpdeploy(*arguments, code=None, **variables):
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "mpdeploy"]
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": root, **variables},
    )  # fmt: skip


def test_an_empty_machine_decides_the_same_bytes(run, tmp_path):
    assert _mpdeploy("gate", run).returncode == 0
    first = (run / "gate.json").read_bytes()
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    shutil.copy(run / "run.json", copy)
    shutil.copytree(run / "evidence", copy / "evidence")
    done = _mpdeploy("gate", copy, code=BLOCKER, OMP_NUM_THREADS="1", PYTHONHASHSEED="7", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert (copy / "gate.json").read_bytes() == first


def test_an_empty_machine_writes_what_it_can(run):
    done = _mpdeploy("report", run, code=BLOCKER)
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.split()] == ["gate.json", "junit.xml", "summary.md"]


def test_the_blocker_blocks():
    done = _mpdeploy(code=BLOCKER.replace("from mpdeploy.cli import main\nmain()", "import onnx"))
    assert "onnx is not installed on this machine" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["places"]["onnx"].pop("file"),
        lambda index: index["places"]["onnx"].pop("precision"),
        lambda index: index["places"].update(onnx=None),
        lambda index: index["places"].update(onnx="text"),
        lambda index: index["places"]["onnx"].update(status="ok"),
        lambda index: index["places"]["onnx"].update(file=3),
        lambda index: index.update(places=[1, 2]),
        lambda index: index.update(digests=None),
        lambda index: index.pop("environment"),
        lambda index: index.pop("harness"),
    ],
)
def test_a_malformed_index_is_refused_as_not_comparable(run, change):
    path = run / "evidence/index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(NotComparableError):
        Evidence.load(path.parent)


def test_an_evidence_file_that_is_no_archive_is_refused_as_not_comparable(run):
    from mpdeploy.files import sha256_of_file

    path = run / "evidence/index.json"
    (run / "evidence/onnx.npz").write_bytes(b"PK not a zip")
    index = json.loads(path.read_text())
    index["places"]["onnx"]["sha256"] = sha256_of_file(run / "evidence/onnx.npz")
    path.write_text(json.dumps(index))
    with pytest.raises(NotComparableError, match="malformed"):
        Evidence.load(path.parent)


WRITER = """
import sys
from pathlib import Path
from mpdeploy.train_and_export import gate, report
print("ready", flush=True)
while True:
    gate(Path(sys.argv[1]))
    report(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_every_file_whole(run):
    """SIGKILL at random moments of a loop that writes: what is there afterwards is a whole file, always."""
    assert _mpdeploy("report", run).returncode == 0
    whole = {name: (run / name).read_bytes() for name in ("gate.json", "junit.xml", "summary.md", "report.html")}
    rng = random.Random(0)
    root = str(Path(__file__).parents[2])
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(run)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for name, content in whole.items():
            assert (run / name).read_bytes() == content, name

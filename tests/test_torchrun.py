"""`train-and-export` on two ranks: who trains, who leaves with which code, and what a killed rank costs."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pipeline import TINY

from mpdeploy.files import sha256_of_file
from mpdeploy.run_dir import RunDir

KILLED = TINY.replace(
    "def pipeline():",
    '''def loss(outputs, labels):
    """Cross entropy; in the first attempt the rank KILL_RANK kills itself at its step KILL_STEP."""
    import os
    import signal

    from torch import nn

    steps.append(0)
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if first and os.environ.get("KILL_RANK") == os.environ["RANK"] and len(steps) == int(os.environ["KILL_STEP"]):
        open("killed-" + os.environ["RANK"], "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.cross_entropy(outputs, labels)


steps = []


def pipeline():''',
).replace("epochs=2,", "epochs=2, loss=loss, checkpoint_every_steps=4,").replace('cpu_precision="bf16"', 'cpu_precision="fp32", reference=False')  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.py").write_text(TINY, encoding="utf-8")
    (tmp_path / "killed.py").write_text(KILLED, encoding="utf-8")
    return tmp_path


def torchrun(folder: Path, *arguments: str, restarts: int = 0, env: dict[str, str] | None = None):
    """`torchrun ... -m mpdeploy train-and-export ARGUMENTS` on two ranks."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--max-restarts", str(restarts), "-m", "--", "mpdeploy", "train-and-export", *arguments],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip


def two_ranks(folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """The same two processes without a launcher that hides their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "mpdeploy", "train-and-export", *arguments],
            cwd=folder,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Exit codes and what was written to stderr, by rank."""
    try:
        texts = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], texts


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_rank_is_started_again_and_the_run_ends_in_the_same_weights(folder, rank):
    step = str(random.Random(int(rank) + 7).randrange(6, 33))  # of 34; a state is written after every fourth
    arguments = ("killed.py", "--until", "10-train", "--run")
    whole = torchrun(folder, *arguments, "whole")
    assert whole.returncode == 0, whole.stderr
    broken = torchrun(folder, *arguments, "broken", restarts=1, env={"KILL_RANK": rank, "KILL_STEP": step})
    assert broken.returncode == 0, broken.stderr
    assert (folder / f"killed-{rank}").exists()
    blamed = re.findall(r"failed \(exitcode: (-?\d+)\) local_rank: (\d)", broken.stderr)
    assert blamed == [("-9", rank)], broken.stderr
    models = [folder / name / "10-train" / "model.safetensors" for name in ("whole", "broken")]
    assert sha256_of_file(models[0]) == sha256_of_file(models[1])
    logged = (folder / "broken" / "10-train" / "log.amp.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, 35)), "each step is logged once, by rank 0"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_failed_gate_is_rank_0s_exit_code_and_trains_once(folder):
    """torchrun makes 1 of any code and, allowed to restart, starts all ranks again: those find the training done."""
    arguments = ("tiny.py", "--run", "run", "--engine", "onnxruntime", "--set", "gates.accuracy.limit=-0.5")
    done = torchrun(folder, *arguments, restarts=1)
    assert done.returncode == 1
    assert json.loads((folder / "run" / "gate.json").read_text())["verdict"] == "fail"
    assert len(re.findall("10-train: done", done.stderr)) == 1, done.stderr
    assert len(re.findall("10-train: kept from an earlier run", done.stderr)) == 1, done.stderr
    assert set(re.findall(r"exitcode\s*: (\d+)", done.stderr)) == {"10"}
    assert set(re.findall(r"\(local_rank: (\d)\)", done.stderr)) == {"0"}, "no other rank failed"

    codes, texts = ended(two_ranks(folder, *arguments))  # nothing is left to train: all ranks know it
    assert codes == [10, 0], texts
    assert "10-train: kept" in texts[0]
    assert texts[1] == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_other_than_0_leave_with_0_when_the_training_is_done_or_failed(folder):
    codes, texts = ended(two_ranks(folder, "tiny.py", "--run", "run", "--until", "10-train"))
    assert codes == [0, 0], texts
    assert texts[1] == ""
    record = RunDir.open(folder / "run").record("10-train")
    assert record is not None
    assert record.status == "done"

    diverges = (
        "--run",
        "diverged",
        "--until",
        "10-train",
        "--set",
        "train.learning_rate=1e30",
        "--set",
        "train.max_grad_norm=null",
    )
    codes, texts = ended(two_ranks(folder, "tiny.py", *diverges))
    assert codes == [20, 0], texts
    assert "became" in texts[0]
    codes, texts = ended(two_ranks(folder, "tiny.py", "--run", "none", "--set", "data.folder=no/such/folder"))
    assert codes[1] == 0 or codes[0] == codes[1], texts


@pytest.mark.parametrize(("code", "expected"), [("None", 0), ("3", 3), ("'why'", 1)])
def test_a_rank_leaves_with_its_code_after_what_must_happen_at_the_end(code, expected):
    text = f"import atexit; atexit.register(print, 'at the end'); print('x' * 100_000); from mpdeploy.distributed import leave; leave({code})"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == expected
    assert done.stdout == "x" * 100_000 + "\nat the end\n"
    assert done.stderr == ("why\n" if expected == 1 else "")

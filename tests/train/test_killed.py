"""A run that is killed with SIGKILL, at steps and at moments drawn at random, ends in the same weights to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from killed_training import EPOCHS, STEPS_AN_EPOCH

SCRIPT = Path(__file__).with_name("killed_training.py")
TOTAL = STEPS_AN_EPOCH * EPOCHS


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_a_run_that_is_killed_at_any_step_ends_in_the_same_weights(tmp_path, seed):
    """With dropout, accumulation over uneven micro-batches, a moving average, a start in FP32, a loss scale that comes down, samples
    for health and a shadow backward; and with augmentation that draws from numpy's and Python's generators, or batches made ahead."""
    found = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, str(seed)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    results = [json.loads(line) for line in found.stdout.splitlines()]
    assert [result["kind"] for result in results] == ["global", "prefetched"]
    for result in results:
        check(result)


def check(result: dict) -> None:
    assert result["deaths"][:3] == [-signal.SIGKILL] * 3, result
    equal = {name: value for name, value in result.items() if name.endswith("_equal")}
    assert all(equal.values()), equal
    assert result["last_start"] is None or result["last_start"] > 1, "it started over instead of going on"
    assert result["skipped"], "no step was skipped: the loss scale's state was not put to the test"
    assert [event["to"] for event in result["events"]] == ["fp16"]
    assert result["logged"] == list(range(1, TOTAL + 1)), "each step is logged once"

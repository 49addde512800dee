"""A pipeline file that trains in a second, and the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TINY = '''"""A tiny classifier of digits."""

from mpdeploy.config import BuildConfig, DataConfig, ExportConfig, Gate, Pipeline, TrainConfig, ValidationConfig
from mpdeploy.train.data import load_digits
from mpdeploy.train.splits import Splits

WIDTH = 8


def network():
    from torch import nn  # here, so that a run with nothing to train need not import it

    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(WIDTH * 16, 10),
    )


def load(config):
    return load_digits(config)


def pipeline():
    return Pipeline(
        name="tiny",
        data=DataConfig(load=load),
        train=TrainConfig(model=network, epochs=2, learning_rate=1e-2, cpu_precision="bf16"),
        validation=ValidationConfig(latency_samples=20),
        gates=(
            Gate(id="finite", metric="num_nonfinite", limit=0),
            Gate(id="gradient-underflow", metric="excess_zero_gradients", limit=0.01),
            Gate(id="accuracy", metric="score_drop", limit=0.2),
            Gate(id="drift", metric="rel_l2", limit=1e-2),
            Gate(id="realised-precision", metric="kept_in_half", limit=0),
            Gate(id="latency", metric="latency_ratio", limit=1.0, at="engine/*", advisory=True),
        ),
    )
'''


def mpdeploy(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `mpdeploy ARGUMENTS` in a process of its own and wait for it."""
    return subprocess.run(
        [sys.executable, "-m", "mpdeploy", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )

"""What this machine is: hardware, drivers and versions, for records, comparability and `mpdeploy doctor`."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "mpdeploy", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "openvino", "polygraphy", "scikit-learn", "scipy",
    "tensorrt-cu13", "tensorrt-rtx-cu13-bindings", "torch", "transformers",
)  # fmt: skip


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Versions of what numbers may depend on, where installed."""
    return {name: found for name in PACKAGES if (found := package_version(name)) is not None}


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Instruction sets of the CPU, as Linux names them (`avx512_fp16`, `amx_bf16`, ...); empty elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def gpus() -> tuple[dict[str, str], ...]:
    """NVIDIA GPUs as `nvidia-smi` lists them: name, driver, memory, compute capability; empty where there are none."""
    fields = ("name", "driver_version", "memory.total", "compute_cap")
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(
        dict(zip(fields, (part.strip() for part in line.split(",")), strict=True))
        for line in answer.stdout.splitlines()
        if line.count(",") == len(fields) - 1
    )


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fingerprint() -> dict[str, Any]:
    """Hardware and versions: what a latency or an accuracy may depend on. Recorded with every run."""
    return {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": num_cores(),
        "cpu_half": sorted(cpu_flags() & {"amx_bf16", "amx_fp16", "avx512_bf16", "avx512_fp16"}),
        "gpus": [dict(gpu) for gpu in gpus()],
        "packages": package_versions(),
    }


def hardware_key(found: dict[str, Any] | None = None) -> str:
    """One line that says which hardware a number belongs to: GPUs, else the CPU and its cores."""
    found = fingerprint() if found is None else found
    if found["gpus"]:
        return " + ".join(gpu["name"] for gpu in found["gpus"])
    return f"{found['cpu']}, {found['cores']} cores"

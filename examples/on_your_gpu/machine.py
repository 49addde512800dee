"""What the numbers were measured on, how much time is left, and what could not be measured."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from mpdeploy.environment import package_versions


class OutOfTimeError(Exception):
    """The minutes that were given are over."""


class Session:
    """One run of the script: its clock, its device and its results."""

    def __init__(self, *, device: str, dry: bool, minutes: float) -> None:
        self.device = device
        self.dry = dry
        self.ends_at = time.monotonic() + 60 * minutes
        self.skipped: list[dict[str, str]] = []

    @property
    def seconds_left(self) -> float:
        """Until the script must have ended."""
        return self.ends_at - time.monotonic()

    def skip(self, what: str, why: str) -> None:
        """Something is not measured, and the report says so."""
        say(f"  skipped {what}: {why}")
        self.skipped.append({"what": what, "why": why})

    def measured(self, what: str, measure: Callable[[], Any], *, needs_s: float = 15) -> Any:
        """The measurement, or None where it failed or time is over; what comes after it goes on."""
        if self.seconds_left < needs_s:
            self.skip(what, f"{self.seconds_left:.0f} s were left")
            return None
        say(f"{what} ({self.seconds_left / 60:.1f} min left)")
        try:
            return measure()
        except Exception as error:  # a GPU machine lacks pieces in many ways, and the rest is still worth measuring
            where = traceback.extract_tb(error.__traceback__)[-1]
            first = " ".join(str(error).split())[:300]
            self.skip(what, f"{type(error).__name__}: {first} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})")
            return None
        finally:
            if self.device == "cuda":
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()


def say(text: str) -> None:
    """Progress, to stderr."""
    print(text, file=sys.stderr, flush=True)


def description(device: str) -> dict[str, Any]:
    """Hardware, driver and versions."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "compute_capability": f"SM{properties.major}{properties.minor}",
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda_of_torch": torch.version.cuda,
            "driver": _nvidia_smi("driver_version"),
            "clocks_mhz": _nvidia_smi("clocks.max.sm"),
            "power_limit_w": _nvidia_smi("power.limit"),
        }
    else:
        found["gpu"] = None
    return found


def _nvidia_smi(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

"""What the machine did while latencies were taken: other processes, clocks, temperature, throttling. What cannot be read is said.

A latency without this cannot be compared with another one: a co-tenant, a hot chip or a low clock looks like a slow engine.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path
from typing import Any

CPUS = Path("/sys/devices/system/cpu")
GPU_FIELDS = (
    "name", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "utilization.gpu",
    "clocks_throttle_reasons.active",
)  # fmt: skip
# nvmlClocksEventReasons of nvml.h
THROTTLE_REASONS = {
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


class Watch:
    """Read the machine when it is made and again when it is asked: `found` holds what was read, `absent` what could not be."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._begin_s = time.monotonic()
        self._begin, self._own_begin = _cpu_seconds(self._cores), _own_seconds()
        self._throttled = _throttle_count(self._cores)

    def shares(self) -> tuple[float, float] | None:
        """Of these cores' time since this watch was made: what other processes took, and what other virtual machines took."""
        now = _cpu_seconds(self._cores)
        if self._begin is None or now is None:
            return None
        available = max(1e-9, time.monotonic() - self._begin_s) * len(self._cores)
        others = now[0] - self._begin[0] - (_own_seconds() - self._own_begin)
        others_share, steal_share = (
            round(min(1.0, max(0.0, seconds / available)), 3) for seconds in (others, now[1] - self._begin[1])
        )
        return others_share, steal_share

    def read(self) -> dict[str, Any]:
        """What happened since this watch was made.

        Returns:
            num_cores; load_average_1m; others_cpu_share (of these cores, taken by other processes) and steal_share (by other
            virtual machines); clock_mhz, temperature_c, throttle_events; on an NVIDIA GPU `gpu` with its clocks, temperature,
            power, throttle reasons and other_processes; absent: name -> why it is not there.
        """
        found: dict[str, Any] = {"num_cores": len(self._cores) or os.cpu_count()}
        absent: dict[str, str] = {}
        shares = self.shares()
        if shares is None:
            absent["others_cpu_share"] = absent["steal_share"] = "the system does not tell the times of these cores"
        else:
            found["others_cpu_share"], found["steal_share"] = shares
        readings: dict[str, tuple[Any, str]] = {
            "load_average_1m": (_load(), "the system has no load average"),
            "clock_mhz": (_clock_mhz(self._cores), "no cpufreq in /sys: a virtual machine hides its clocks"),
            "temperature_c": (_temperature_c(), "no sensor can be read"),
            "throttle_events": (
                _difference(_throttle_count(self._cores), self._throttled), "no thermal_throttle in /sys",
            ),
        }  # fmt: skip
        if self._device.startswith("cuda"):
            readings["gpu"] = (_gpu(), "nvidia-smi does not answer")
        for name, (value, reason) in readings.items():
            if value is None:
                absent[name] = reason
            else:
                found[name] = value
        return found | {"absent": absent}


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _cpu_seconds(cores: list[int]) -> tuple[float, float] | None:
    """Seconds that these cores were busy, and that were stolen from them."""
    import psutil

    times = psutil.cpu_times(percpu=True)
    if not cores or cores[-1] >= len(times):
        return None
    chosen = [times[core] for core in cores]
    idle = sum(item.idle + getattr(item, "iowait", 0.0) for item in chosen)
    steal = sum(getattr(item, "steal", 0.0) for item in chosen)
    guests = sum(getattr(item, "guest", 0.0) + getattr(item, "guest_nice", 0.0) for item in chosen)  # in user already
    return sum(map(sum, chosen)) - idle - steal - guests, steal


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _numbers(cores: list[int], name: str) -> list[float]:
    found = []
    for core in cores:
        with contextlib.suppress(OSError, ValueError):
            found.append(float((CPUS / f"cpu{core}" / name).read_text()))
    return found


def _clock_mhz(cores: list[int]) -> dict[str, Any] | None:
    now = _numbers(cores, "cpufreq/scaling_cur_freq")
    if not now:
        return None
    highest = _numbers(cores, "cpufreq/cpuinfo_max_freq")
    governor = ""
    with contextlib.suppress(OSError):
        governor = (CPUS / f"cpu{cores[0]}" / "cpufreq/scaling_governor").read_text().strip()
    return {
        "lowest": round(min(now) / 1e3),
        "highest": round(max(now) / 1e3),
        "possible": round(max(highest) / 1e3) if highest else None,
        "governor": governor,
    }


def _throttle_count(cores: list[int]) -> float | None:
    found = _numbers(cores, "thermal_throttle/core_throttle_count")
    return sum(found) if found else None


def _difference(after: float | None, before: float | None) -> int | None:
    return None if after is None or before is None else int(after - before)


def _temperature_c() -> float | None:
    import psutil

    read = getattr(psutil, "sensors_temperatures", None)  # Linux and FreeBSD only
    sensors = read() if read is not None else {}
    found = [item.current for name in ("coretemp", "k10temp", "cpu_thermal") for item in sensors.get(name, ())]
    return max(found) if found else None


def _gpu() -> dict[str, Any] | None:
    """The first GPU, as `nvidia-smi` sees it; None where it does not answer."""
    row = _nvidia_smi(f"--query-gpu={','.join(GPU_FIELDS)}", "--id=0")
    if not row or row[0].count(",") != len(GPU_FIELDS) - 1:
        return None
    values = dict(zip(GPU_FIELDS, (part.strip() for part in row[0].split(",")), strict=True))
    pids = _nvidia_smi("--query-compute-apps=pid", "--id=0")
    return gpu_from_fields(values) | {
        "other_processes": sum(1 for pid in pids or () if pid.strip().isdigit() and int(pid) != os.getpid())
    }


def gpu_from_fields(values: dict[str, str]) -> dict[str, Any]:
    """Numbers and words of `nvidia-smi`'s fields; a field that it does not support is None."""

    def number(name: str) -> float | None:
        with contextlib.suppress(ValueError):
            return float(values[name])
        return None

    reasons = None
    with contextlib.suppress(ValueError):
        bits = int(values["clocks_throttle_reasons.active"], 16)
        reasons = [text for bit, text in THROTTLE_REASONS.items() if bits & bit]
    return {
        "name": values["name"],
        "sm_clock_mhz": number("clocks.sm"),
        "memory_clock_mhz": number("clocks.mem"),
        "possible_sm_clock_mhz": number("clocks.max.sm"),
        "temperature_c": number("temperature.gpu"),
        "power_w": number("power.draw"),
        "utilisation_percent": number("utilization.gpu"),
        "throttle_reasons": reasons,
    }


def _nvidia_smi(*arguments: str) -> list[str] | None:
    try:
        answer = subprocess.run(
            ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()

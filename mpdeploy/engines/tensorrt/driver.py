"""The NVIDIA driver and the GPU, asked through libcuda itself: without a driver the TensorRT libraries may crash."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpdeploy.engines.base import Unavailable

_HINT = "run this step on a machine with an NVIDIA GPU and its driver"
# CUdevice_attribute of cuda.h; they never changed.
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU and its driver."""

    name: str
    sm: int
    """Compute capability without its dot: 89 for 8.9, 120 for 12.0."""
    memory_bytes: int
    driver: str
    """`580.65.06`, or an empty text where the system does not tell."""
    cuda: str
    """The newest CUDA version the driver runs: `13.0`."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON, for a sidecar."""
        return {
            "name": self.name,
            "sm": self.sm,
            "memory_bytes": self.memory_bytes,
            "driver": self.driver,
            "cuda": self.cuda,
        }


def probe_gpu(ordinal: int = 0) -> Gpu | Unavailable:
    """The GPU number `ordinal` (as CUDA_VISIBLE_DEVICES orders them), or why there is none; never raises or crashes."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Unavailable("There is no NVIDIA driver here: libcuda cannot be loaded.", _HINT)
    try:
        return _ask(cuda, ordinal)
    except (_CudaError, AttributeError) as error:  # AttributeError: a stub libcuda without the function
        return Unavailable(f"The NVIDIA driver finds no usable GPU: {error}.", _HINT)


class _CudaError(Exception):
    """A call of libcuda did not return CUDA_SUCCESS."""


def _ask(cuda: ctypes.CDLL, ordinal: int) -> Gpu:
    def call(function: str, *args: Any) -> None:
        code = getattr(cuda, function)(*args)
        if code != 0:
            text = ctypes.c_char_p()
            with contextlib.suppress(AttributeError):
                cuda.cuGetErrorString(code, ctypes.byref(text))
            said = text.value.decode(errors="replace") if text.value else "unknown error"
            raise _CudaError(f"{function} says '{said}' (CUDA error {code})")

    call("cuInit", 0)
    version, count, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(version))
    call("cuDeviceGetCount", ctypes.byref(count))
    if ordinal >= count.value:
        raise _CudaError(f"{count.value} GPUs are visible, number {ordinal} was asked for")
    call("cuDeviceGet", ctypes.byref(device), ordinal)
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, len(name), device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    call("cuDeviceGetAttribute", ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    call("cuDeviceGetAttribute", ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    memory = ctypes.c_size_t()
    call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    return Gpu(
        name=name.value.decode(errors="replace"),
        sm=major.value * 10 + minor.value,
        memory_bytes=memory.value,
        driver=_driver_version(),
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def _driver_version() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else ""

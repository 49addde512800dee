"""The first bytes of a plan, read without the library, and whether a plan fits this machine.

Layout: bytes 0-3 `ftrt` (TensorRT) or `vtrt` (TensorRT-RTX), bytes 16-23 the size of the plan (little endian; seen on
TensorRT-RTX only), bytes 24-27 the version that built it. The GPU it was built for is not there: the sidecar knows it.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpdeploy.engines.tensorrt.driver import Gpu
from mpdeploy.engines.tensorrt.library import (
    RTX_FAMILY,
    TENSORRT_FAMILY,
    Family,
    Version,
    text_from_version,
    version_from_text,
)
from mpdeploy.errors import BuildError, ModelError, UnavailableError

_HEADER = struct.Struct("<4s12xQ4B")
_FAMILIES = (TENSORRT_FAMILY, RTX_FAMILY)


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """What a plan says of itself."""

    engine: str
    """`tensorrt` or `tensorrt-rtx`."""
    version: Version
    """The four numbers of the version that built it."""
    size_bytes: int
    """What the plan says its size is."""


def read_header(path: Path) -> PlanHeader:
    """Read a plan's header; no library is needed.

    Raises:
        ModelError: the file is not there, is no plan, or is truncated.
    """
    hint = "build the engine again; a plan is written whole or not at all"
    try:
        with path.open("rb") as file:
            data = file.read(_HEADER.size)
        found_bytes = path.stat().st_size
    except OSError as error:
        raise ModelError(f"Cannot read the plan {path}: {error.strerror or error}.", hint=hint) from error
    family = next((family for family in _FAMILIES if data.startswith(family.magic)), None)
    if family is None:
        raise ModelError(
            f"{path} is no TensorRT plan: it begins with {data[:4]!r}, a plan with "
            f"{' or '.join(repr(family.magic) for family in _FAMILIES)}.",
            hint="give the engine.plan that a build wrote",
        )
    if len(data) < _HEADER.size:
        raise ModelError(f"The plan {path} is truncated: {found_bytes} bytes do not hold a header.", hint=hint)
    _, size_bytes, *version = _HEADER.unpack(data)
    if found_bytes < size_bytes:
        raise ModelError(f"The plan {path} is truncated: it has {found_bytes} of {size_bytes} bytes.", hint=hint)
    return PlanHeader(family.name, tuple(version), size_bytes)


def check_fits(
    sidecar: Mapping[str, Any], header: PlanHeader | None, family: Family, library_version: str, gpu: Gpu, *, where: str
) -> None:
    """Refuse a plan that this library or this GPU cannot run, before the library sees it.

    Args:
        sidecar: what `build` wrote down: `engine`, `library_version`, `device`, `options`, `os`, `machine`.
        header: what the plan says of itself; None for a version_compatible one, whose wrapper has a header of its own.
        family: the library that shall run it.
        library_version: that library's version here.
        gpu: the GPU here.
        where: the plan's name in messages.

    Raises:
        BuildError: it is a plan of the other library.
        UnavailableError: the version, the GPU or the system differs; the message says what was built and what is here.
    """
    built_by = header.engine if header else str(sidecar["engine"])
    if built_by != family.name or sidecar["engine"] != family.name:
        raise BuildError(
            f"{where} was built by '{built_by}' and cannot be loaded by '{family.name}'.",
            hint=f"load it with the engine '{built_by}', or build it again with --engine {family.name}",
        )
    built = version_from_text(str(sidecar["library_version"]))
    if header and header.version != tuple(part % 256 for part in built):
        raise BuildError(
            f"{where} says it was built with {family.title} {text_from_version(header.version)}, its sidecar says "
            f"{sidecar['library_version']}.",
            hint="the plan and its engine.json do not belong together: build the engine again",
        )
    options = sidecar["options"]
    faults = [
        fault
        for fault in (
            _version_fault(built, version_from_text(library_version), options),
            _gpu_fault(sidecar, family, gpu),
            _system_fault(sidecar, family),
        )
        if fault
    ]
    if faults:
        raise UnavailableError(
            f"{where} was built for {_built_for(sidecar, family)} with {family.title} {sidecar['library_version']}; "
            f"this machine has SM{gpu.sm} ({gpu.name}) with {family.title} {library_version}: {'; '.join(faults)}.",
            hint="build it again on this machine (--from 40-build), or on one like it",
        )


def _built_for(sidecar: Mapping[str, Any], family: Family) -> str:
    if family.needs_gpu_to_build:
        return f"SM{sidecar['device']['sm']}"
    return ", ".join(sidecar["options"]["compute_capabilities"]) or "SM80 and later"


def _version_fault(built: Version, here: Version, options: Mapping[str, Any]) -> str | None:
    if built == here:
        return None
    if not options["version_compatible"]:
        return "a plan runs with exactly the version that built it (unless built with version_compatible)"
    if built[0] != here[0] or built > here:
        return "a version_compatible plan runs with the same or a later version of one major version"
    return None


def _gpu_fault(sidecar: Mapping[str, Any], family: Family, gpu: Gpu) -> str | None:
    options = sidecar["options"]
    if not family.needs_gpu_to_build:
        targets = [int(name.removeprefix("SM")) for name in options["compute_capabilities"]]
        if targets and gpu.sm not in targets:
            return "the GPU is not among the compute_capabilities it was built for"
        return "without compute_capabilities it runs on SM80 and later" if not targets and gpu.sm < 80 else None
    if sidecar["device"]["sm"] == gpu.sm:
        return None
    if options["hardware_compatible"] == "ampere_plus":
        return "an ampere_plus plan runs on SM80 and later" if gpu.sm < 80 else None
    return "a plan runs on the compute capability it was built on (unless built with hardware_compatible='ampere_plus')"


def _system_fault(sidecar: Mapping[str, Any], family: Family) -> str | None:
    if not family.needs_gpu_to_build:
        return None  # TensorRT-RTX plans are portable between systems
    built, here = f"{sidecar['os']} {sidecar['machine']}", f"{platform.system()} {platform.machine()}"
    return None if built == here else f"it was built on {built}, this is {here}"

"""The two libraries, TensorRT and TensorRT-RTX: what tells them apart, and how they are imported without a crash."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpdeploy.engines.base import Unavailable
from mpdeploy.errors import MissingExtraError, UnavailableError

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """What tells one library from the other; all else is the same code."""

    name: str
    """Its row in the engine table."""
    title: str
    """Its name in messages."""
    modules: tuple[str, ...]
    """Names it may be imported by, the first that works counts."""
    extra: str
    """The extra of mpdeploy that installs it."""
    magic: bytes
    """The first four bytes of its plans."""
    oldest: Version
    """The oldest version this code was written for."""
    needs_gpu_to_build: bool
    """TensorRT times kernels on the GPU while it builds; TensorRT-RTX compiles ahead of time."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Option -> why this library does not have it."""
    lacks_without_gpu: Mapping[str, str] = field(default_factory=dict)
    """Option -> why it needs a GPU at build time."""


TENSORRT_FAMILY = Family(
    name="tensorrt",
    title="TensorRT",
    modules=("tensorrt",),
    extra="gpu",
    magic=b"ftrt",
    oldest=(10, 12),
    needs_gpu_to_build=True,
    lacks={"compute_capabilities": "it builds for the GPU it runs on (see hardware_compatible)"},
)

RTX_FAMILY = Family(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    modules=("tensorrt_rtx_bindings", "tensorrt_rtx"),
    extra="rtx",
    magic=b"vtrt",
    oldest=(1, 2),
    needs_gpu_to_build=False,
    lacks={
        "version_compatible": "it ships no lean runtime",
        "hardware_compatible": "its plans are portable already (see compute_capabilities)",
        "timing_cache": "it times nothing while it builds, and a timing cache does nothing",
        "timing_cache_readonly": "it times nothing while it builds, and a timing cache does nothing",
    },
    lacks_without_gpu={
        "refit": "its builder asks the driver for refittable weights",
        "strip": "its builder asks the driver for refittable weights",
    },
)

# What this code cannot do without; a stub or a half-installed wheel lacks them.
_NEEDED = ("Builder", "OnnxParser", "Runtime", "BuilderFlag", "__version__")


def import_library(family: Family) -> Any:
    """Import the library's module.

    Raises:
        MissingExtraError: it is not installed.
        UnavailableError: it is installed but broken (a stub of PyPI without its libraries), or too old.
    """
    broken: list[str] = []
    for name in family.modules:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # the package is there, a part of it is not
                broken.append(f"{name}: {error}")
            continue
        except Exception as error:  # a half-installed stub fails in whatever its first line needs
            broken.append(f"{name}: {type(error).__name__}: {error}")
            continue
        missing = [needed for needed in _NEEDED if not hasattr(module, needed)]
        if missing:
            broken.append(f"{name}: it has no {', '.join(missing)}")
            continue
        if version_from_text(module.__version__) < family.oldest:
            oldest = ".".join(map(str, family.oldest))
            raise UnavailableError(
                f"{family.title} {module.__version__} is installed; {oldest} or newer is needed.",
                hint=f"pip install 'mpdeploy[{family.extra}]'",
            )
        return module
    if broken:
        raise UnavailableError(
            f"{family.title} is installed but cannot be used ({'; '.join(broken)}).",
            hint=f"its packages are half installed: pip install --force-reinstall 'mpdeploy[{family.extra}]'",
        )
    raise MissingExtraError.for_extra(f"{family.title} ({' or '.join(family.modules)})", family.extra)


def library_problem(family: Family) -> Unavailable | None:
    """None where the library can be imported, else why not."""
    try:
        import_library(family)
    except UnavailableError as error:
        return Unavailable(error.message, error.hint or "")
    return None


def version_from_text(text: str) -> Version:
    """`10.16.1.11` -> (10, 16, 1, 11); a suffix that is no number ends it."""
    parts: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def text_from_version(version: Version) -> str:
    """(10, 16, 1, 11) -> `10.16.1.11`."""
    return ".".join(map(str, version))

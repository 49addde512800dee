"""Every option of a TensorRT build, validated where it is declared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mpdeploy.engines.tensorrt.library import Family
from mpdeploy.errors import ConfigError, UnavailableError, closest_names

HARDWARE_LEVELS = ("none", "ampere_plus", "same_compute_capability")


@dataclass(frozen=True, slots=True)
class TensorRTOptions:
    """How a plan is built. Precision is none of these: the ONNX graph's types decide it (strong typing)."""

    workspace_bytes: int | None = None
    """The most device memory one layer may use as scratch; None leaves it to the library (all of the device)."""
    builder_level: int = 3
    """0 to 5: how long the builder searches for faster kernels."""
    tf32: bool = False
    """Let FP32 products and convolutions run in TF32: the library's own default, under which FP32 islands are none."""
    sparse_weights: bool = False
    """Use sparse tensor cores for weights that are 2:4 sparse."""
    version_compatible: bool = False
    """The plan also runs with later versions of one major version (TensorRT only; larger, and it holds host code)."""
    hardware_compatible: str = "none"
    """`none`, `ampere_plus` (any GPU from SM80 on) or `same_compute_capability` (TensorRT only; slower kernels)."""
    compute_capabilities: tuple[str, ...] = ()
    """`SM80`, `SM89`, `SM120`, ...: which GPUs the plan is for (TensorRT-RTX only); none given: SM80 and later."""
    refit: bool = False
    """Weights may be replaced later without a new build."""
    strip: bool = False
    """Leave the weights out of the plan: a runner takes them from the ONNX file when it loads the plan."""
    weight_streaming: bool = False
    """Weights that do not fit on the device are streamed from the host."""
    timing_cache: str | None = None
    """A file of kernel timings: read where it exists, written after the build (TensorRT only)."""
    timing_cache_readonly: bool = False
    """Read the timing cache only; it must exist."""
    detailed: bool = True
    """Keep each layer's types in the plan: without them the inspector's audit knows only names."""
    cuda_graph: bool = False
    """The runner captures each shape's work in a CUDA graph once and replays it."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if option.type == "bool" and not isinstance(value, bool):
                raise _bad(option.name, value, "true or false")
        if not _is_int(self.builder_level) or not 0 <= self.builder_level <= 5:
            raise _bad("builder_level", self.builder_level, "a whole number from 0 to 5")
        if self.workspace_bytes is not None and (not _is_int(self.workspace_bytes) or self.workspace_bytes <= 0):
            raise _bad("workspace_bytes", self.workspace_bytes, "a positive whole number of bytes")
        if self.hardware_compatible not in HARDWARE_LEVELS:
            raise _bad("hardware_compatible", self.hardware_compatible, f"one of {', '.join(HARDWARE_LEVELS)}")
        if not all(isinstance(item, str) and re.fullmatch(r"SM\d+", item) for item in self.compute_capabilities):
            raise _bad("compute_capabilities", list(self.compute_capabilities), "a list of names like SM89")
        if self.timing_cache is not None and not isinstance(self.timing_cache, str):
            raise _bad("timing_cache", self.timing_cache, "a path")
        if self.timing_cache_readonly and self.timing_cache is None:
            raise ConfigError(
                "timing_cache_readonly is set but there is no timing_cache to read.",
                hint="give timing_cache=FILE too, or leave timing_cache_readonly out",
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], family: Family, *, has_gpu: bool) -> TensorRTOptions:
        """Read what a pipeline file or a command line gave.

        Raises:
            ConfigError: an unknown option, a value that does not fit, or an option that the library does not have.
            UnavailableError: an option that needs a GPU at build time, and there is none.
        """
        known = [option.name for option in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"{family.title} has no build option '{name}'.", hint=f"closest names: {closest_names(name, known)}"
                )
        values = dict(options)
        if isinstance(values.get("compute_capabilities"), list):
            values["compute_capabilities"] = tuple(values["compute_capabilities"])
        if isinstance(values.get("timing_cache"), Path):
            values["timing_cache"] = str(values["timing_cache"])
        made = cls(**values)
        default = cls()
        for name, reason in family.lacks.items():
            if getattr(made, name) != getattr(default, name):
                raise ConfigError(
                    f"{family.title} has no option '{name}' (given: {getattr(made, name)!r}): {reason}.",
                    hint=f"leave {name} out for the engine '{family.name}'",
                )
        for name, reason in family.lacks_without_gpu.items():
            if not has_gpu and getattr(made, name) != getattr(default, name):
                raise UnavailableError(
                    f"{family.title} needs a GPU to build with '{name}': {reason}.",
                    hint=f"build on a machine with an NVIDIA GPU, or leave {name} out",
                )
        return made

    def to_json(self) -> dict[str, Any]:
        """As plain JSON, for a sidecar."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return values | {"compute_capabilities": list(self.compute_capabilities)}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad(name: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"The build option {name} is {value!r}.", hint=f"it takes {wanted}")

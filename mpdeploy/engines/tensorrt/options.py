"""Every option of a TensorRT build, validated where it is declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpdeploy.engines.options import BYTES, FILE, FLAG, names, one_of, option, options_to_json, read_options, whole
from mpdeploy.engines.tensorrt.library import Family
from mpdeploy.errors import ConfigError, UnavailableError

HARDWARE_LEVELS = ("none", "ampere_plus", "same_compute_capability")


@dataclass(frozen=True, slots=True)
class TensorRTOptions:
    """How a plan is built. Precision is none of these: the ONNX graph's types decide it (strong typing)."""

    workspace_bytes: int | None = option(
        None, BYTES, "The most device memory one layer may use as scratch; by default all of the device."
    )
    builder_level: int = option(3, whole(0, 5), "How long the builder searches for faster kernels.")
    tf32: bool = option(
        False, FLAG,
        "Let FP32 products and convolutions run in TF32: the library's own default, under which FP32 islands are none.",
    )  # fmt: skip
    sparse_weights: bool = option(False, FLAG, "Use sparse tensor cores for weights that are 2:4 sparse.")
    version_compatible: bool = option(
        False, FLAG, "The plan also runs with later versions of one major version (larger, and it holds host code)."
    )
    hardware_compatible: str = option(
        "none", one_of(*HARDWARE_LEVELS), "ampere_plus: any GPU from SM80 on. Slower kernels."
    )
    compute_capabilities: tuple[str, ...] = option(
        (), names(r"SM\d+", "SM89,SM120"), "Which GPUs the plan is for; by default SM80 and later."
    )
    refit: bool = option(False, FLAG, "Weights may be replaced later without a new build.")
    strip: bool = option(
        False, FLAG, "Leave the weights out of the plan: a runner takes them from the ONNX file when it loads the plan."
    )
    weight_streaming: bool = option(False, FLAG, "Weights that do not fit on the device are streamed from the host.")
    timing_cache: str | None = option(
        None, FILE, "A file of kernel timings: read where it exists, written after the build."
    )
    timing_cache_readonly: bool = option(False, FLAG, "Read the timing cache only; it must exist.")
    detailed: bool = option(
        True, FLAG, "Keep each layer's types in the plan: without them the inspector's audit knows only names."
    )
    cuda_graph: bool = option(False, FLAG, "The runner captures each shape's work in a CUDA graph once and replays it.")

    def __post_init__(self) -> None:
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
        made = read_options(cls, options, title=family.title, engine=family.name)
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
        return options_to_json(self)

"""The seam between mpdeploy and the engines: what a backend must offer. `engines/__init__.py` holds the table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from mpdeploy.artifact import Engine, OnnxModel, Runner, TensorSpec
from mpdeploy.engines.options import OptionRow
from mpdeploy.errors import DataError

Shape = tuple[int, ...]
AuditSource = Literal["network", "inspector", "runtime_model"]
LOWEST_FIRST = ("fp4", "fp8", "fp16", "bf16", "mixed", "unknown", "tf32", "fp32", "fp64")
"""Float precisions of layers; `mixed` and `unknown` stand below FP32: they may hide a half layer."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why a backend cannot be used here, and what would make it usable."""

    reason: str
    hint: str


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """Smallest, best and largest shape of one input."""

    smallest: Shape
    best: Shape
    largest: Shape
    parts: tuple[ShapeRange, ...] = ()
    """The ranges it was joined from: TensorRT builds one optimisation profile for each, other engines look at the whole."""

    def to_json(self) -> list[list[int]]:
        """Three lists."""
        return [list(self.smallest), list(self.best), list(self.largest)]

    @classmethod
    def joined(cls, parts: Sequence[ShapeRange]) -> ShapeRange:
        """One range over several; its best shape is that of the first."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            tuple(min(axes) for axes in zip(*(part.smallest for part in parts), strict=True)),
            parts[0].best,
            tuple(max(axes) for axes in zip(*(part.largest for part in parts), strict=True)),
            tuple(parts),
        )


Profile = Mapping[str, ShapeRange]
"""Input name -> its range. Inputs of fixed shape may be left out."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine, and the precision it runs in: `fp32`, `tf32`, `fp16`, `bf16`, `int8`, `int64`, ..."""

    name: str
    op: str
    precision: str
    nodes: tuple[str, ...] = ()
    """Names of the ONNX nodes it came from, where the engine tells."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON, for a sidecar."""
        return {"name": self.name, "op": self.op, "precision": self.precision, "nodes": list(self.nodes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Layer:
        """Read what `to_json` wrote."""
        return cls(value["name"], value["op"], value["precision"], tuple(value["nodes"]))


@dataclass(frozen=True)
class Audit:
    """What an engine runs in which precision.

    Attributes:
        source: `network` repeats the ONNX file as it was parsed; only `inspector` and `runtime_model` are realised precision.
        layers: in execution order.
    """

    source: AuditSource
    layers: tuple[Layer, ...] = field(default_factory=tuple)

    @property
    def realised(self) -> bool:
        """Whether this is what really runs."""
        return self.source != "network"

    def count_by_precision(self) -> dict[str, int]:
        """Precision -> number of layers."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.precision] = counts.get(layer.precision, 0) + 1
        return counts

    def of_nodes(self) -> dict[str, str]:
        """ONNX node name -> precision of the layer it became part of; of several, the lowest float precision."""

        def rank(precision: str) -> int:
            return LOWEST_FIRST.index(precision) if precision in LOWEST_FIRST else len(LOWEST_FIRST)

        found: dict[str, str] = {}
        for layer in self.layers:
            for node in layer.nodes:
                if node not in found or rank(layer.precision) < rank(found[node]):
                    found[node] = layer.precision
        return found


class EngineBackend(Protocol):
    """A row of the engine table."""

    name: str

    def option_rows(self) -> tuple[OptionRow, ...]:
        """What `build` can be told."""

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that `build` would refuse, without the library.

        Raises:
            ConfigError: an unknown option (with the closest ones), a value that does not fit, or one that this engine lacks.
            UnavailableError: an option that this machine cannot build with.
        """

    def available(self) -> Unavailable | None:
        """None where it can build here, else why not. Must not crash the process, whatever is installed."""

    def can_run(self) -> Unavailable | None:
        """None where what it builds can also run here, else why not (a TensorRT-RTX plan without a GPU)."""

    def takes(self) -> str:
        """The precision of the ONNX model it should be given on this machine: `fp32`, `fp16` or `bf16`."""

    def build(self, model: OnnxModel, profile: Profile, options: Mapping[str, Any], folder: Path) -> Engine:
        """Build `model` into `folder` (which exists) and describe what was written.

        Args:
            model: in the precision that it is to run in.
            profile: the shapes that its inputs may have.
            options: rows of `option_rows`, with values or their texts.
            folder: for `engine.*`.

        Raises:
            BuildError: with the library's own errors in the message.
        """

    def load(self, engine: Engine) -> Runner:
        """Make a runner. The engine's digest has been checked; nothing runs before `__enter__`."""

    def audit(self, engine: Engine) -> Audit:
        """Read back what the engine runs in which precision."""


def default_profile(
    inputs: tuple[TensorSpec, ...],
    batches: tuple[int, int, int],
    sample: Mapping[str, Shape],
    shortest: Mapping[str, int] | None = None,
) -> Profile:
    """A profile from batch sizes for a symbolic first axis; other symbolic axes take their length from `sample`.

    Args:
        inputs: the model's inputs.
        batches: smallest, best and largest batch.
        sample: input name -> the shape of one feed (its first axis is not looked at where it is symbolic).
        shortest: name of a symbolic axis -> the smallest length it must take; others have the sample's length throughout.

    Raises:
        DataError: a symbolic axis has no length in `sample`; the message says which profile to give.
    """
    profile: dict[str, ShapeRange] = {}
    for spec in inputs:
        if spec.shape is None or not any(not isinstance(axis, int) for axis in spec.shape):
            continue
        seen = sample.get(spec.name)
        shapes: list[Shape] = []
        for batch in batches:
            shape: list[int] = []
            for position, axis in enumerate(spec.shape):
                if isinstance(axis, int):
                    shape.append(axis)
                elif position == 0:
                    shape.append(batch)
                elif seen is not None and len(seen) == len(spec.shape):
                    floor = (shortest or {}).get(str(axis))
                    shape.append(seen[position] if floor is None or shapes else min(floor, seen[position]))
                else:
                    axes = "x".join(str(item) for item in spec.shape)
                    raise DataError(
                        f"Input '{spec}' has a symbolic axis '{axis}' whose length is not known.",
                        hint=f"give --data, or --profile {spec.name}=MIN,OPT,MAX with shapes like {axes}",
                    )
            shapes.append(tuple(shape))
        smallest, best, largest = shapes
        profile[spec.name] = ShapeRange(smallest, best, largest)
    return profile

"""The values that flow between stages: tensors' specs, samples, golden answers and files with their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mpdeploy.errors import ArtifactChangedError, DataError, closest_names
from mpdeploy.files import atomic_path, sha256_of_file

Array = NDArray[Any]
Feeds = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A model's input or output. `shape` has an int for a fixed axis, a str for a symbolic one, None for an unknown one."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    @property
    def has_symbolic_batch(self) -> bool:
        """Whether the first axis is symbolic or unknown, so that an array can be split into samples along it."""
        return bool(self.shape) and not isinstance(self.shape[0], int)  # type: ignore[index]

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON."""
        return {"name": self.name, "dtype": self.dtype, "shape": None if self.shape is None else list(self.shape)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TensorSpec:
        """Read what `to_json` wrote."""
        return cls(value["name"], value["dtype"], None if value["shape"] is None else tuple(value["shape"]))

    def __str__(self) -> str:
        axes = "?" if self.shape is None else ", ".join("?" if axis is None else str(axis) for axis in self.shape)
        return f"{self.name}: {self.dtype}[{axes}]"


@dataclass(frozen=True)
class Dataset:
    """Samples for a model: arrays by input name, each with the samples along axis 0, with ids and (maybe) labels.

    Attributes:
        inputs: input name -> array of shape [num_samples, ...].
        ids: [num_samples], what names a sample in evidence and keeps splits disjoint.
        labels: [num_samples, ...] or None.
    """

    inputs: Mapping[str, Array]
    ids: NDArray[np.int64]
    labels: Array | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(array) for name, array in self.inputs.items()} | {"ids": len(self.ids)}
        if self.labels is not None:
            lengths["labels"] = len(self.labels)
        if not self.inputs or len(set(lengths.values())) != 1:
            raise DataError(f"A dataset needs arrays of one length along axis 0, found {lengths}.")
        if len(np.unique(self.ids)) != len(self.ids):
            raise DataError("Sample ids repeat: splits could not be told apart.")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def digest(self) -> str:
        """Digest over names, dtypes, shapes and bytes of inputs, ids and labels."""
        named = {f"inputs/{name}": array for name, array in self.inputs.items()} | {"ids": self.ids}
        if self.labels is not None:
            named["labels"] = self.labels
        return digest_of_arrays(named)

    def take(self, index: slice | NDArray[Any]) -> Dataset:
        """The samples at `index` (a slice, or an array of positions)."""
        labels = None if self.labels is None else self.labels[index]
        return Dataset({name: array[index] for name, array in self.inputs.items()}, self.ids[index], labels)

    def batches(self, batch_size: int) -> Iterator[dict[str, Array]]:
        """Feeds of up to `batch_size` samples, in order."""
        for start in range(0, len(self), batch_size):
            yield {name: array[start : start + batch_size] for name, array in self.inputs.items()}


def digest_of_arrays(arrays: Mapping[str, Array]) -> str:
    """Digest over names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Golden:
    """The fixed evaluation samples and what the FP32 model answered: every later stage is compared with these answers."""

    dataset: Dataset
    outputs: Mapping[str, Array]

    def save(self, path: Path) -> None:
        """Write one `.npz`, atomically."""
        arrays: dict[str, Array] = {f"inputs/{name}": array for name, array in self.dataset.inputs.items()}
        arrays |= {f"outputs/{name}": array for name, array in self.outputs.items()}
        arrays["ids"] = self.dataset.ids
        if self.dataset.labels is not None:
            arrays["labels"] = self.dataset.labels
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as archive:
            named = {name: archive[name] for name in archive.files}
        inputs = {name.removeprefix("inputs/"): value for name, value in named.items() if name.startswith("inputs/")}
        outputs = {name.removeprefix("outputs/"): value for name, value in named.items() if name.startswith("outputs/")}
        return cls(Dataset(inputs, named["ids"], named.get("labels")), outputs)


@dataclass(frozen=True, slots=True)
class FileArtifact:
    """A file a stage made: where it lies, its digest when it was made, its tensors and what made it."""

    path: Path
    sha256: str
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    sidecar: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        path: Path,
        *,
        inputs: Sequence[TensorSpec] = (),
        outputs: Sequence[TensorSpec] = (),
        sidecar: Mapping[str, Any] | None = None,
    ) -> Self:
        """Describe a finished file, digest included."""
        return cls(path, sha256_of_file(path), tuple(inputs), tuple(outputs), dict(sidecar or {}))

    def verified(self) -> Self:
        """Return self if the file still has its digest.

        Raises:
            ArtifactChangedError: it is gone, or its bytes are not those that were recorded.
        """
        found = sha256_of_file(self.path) if self.path.is_file() else None
        if found != self.sha256:
            what = "is missing" if found is None else f"has digest {found[:12]}, recorded was {self.sha256[:12]}"
            raise ArtifactChangedError(
                f"{self.path} {what}.",
                hint="put the recorded file back, or make it again with --from and the stage that writes it",
            )
        return self


class Checkpoint(FileArtifact):
    """FP32 master weights as safetensors."""


class OnnxModel(FileArtifact):
    """An ONNX file. Its sidecar says the precision it was made in."""

    @property
    def precision(self) -> str:
        """`fp32`, `fp16` or `bf16`."""
        return str(self.sidecar.get("precision", "fp32"))


class Engine(FileArtifact):
    """What a backend built: the path is the file that is loaded; the sidecar says by what, for what and from what."""

    @property
    def backend(self) -> str:
        """The row of the engine table that built it."""
        return str(self.sidecar["engine"])

    @property
    def precision(self) -> str:
        """The precision of the ONNX model it was built from: `fp32`, `fp16` or `bf16`."""
        return str(self.sidecar.get("precision", "fp32"))


@runtime_checkable
class Runner(Protocol):
    """Something that answers feeds: a model in a runtime, an engine on a device. Used as a context manager."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it wants."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it answers."""

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Answer one feed. The arrays are the caller's own: a later call does not change them."""

    def time_ms(self, feeds: Feeds, iterations: int) -> list[float]:
        """Milliseconds of each of `iterations` runs on `feeds`; the runner's module says what they include."""

    def __enter__(self) -> Self:
        """Claim the device or runtime."""

    def __exit__(self, *exc: object) -> None:
        """Give it back; a later `infer` raises."""


def check_feeds(inputs: Sequence[TensorSpec], feeds: Feeds, *, where: str) -> None:
    """Refuse feeds whose names, dtypes or shapes are not what `inputs` declares.

    Raises:
        DataError: with the declared and the found value, and the closest names.
    """
    declared = {spec.name: spec for spec in inputs}
    for name in feeds:
        if name not in declared:
            raise DataError(
                f"{where} has no input named '{name}'.", hint=f"closest names: {closest_names(name, declared)}"
            )
    for spec in inputs:
        if spec.name not in feeds:
            raise DataError(
                f"{where} needs an array for its input '{spec}', found: {', '.join(feeds) or 'none'}.",
                hint="name the arrays after the model's inputs",
            )
        check_array(spec, feeds[spec.name], where=where)


@lru_cache(maxsize=64)
def dtype_name(dtype: np.dtype[Any]) -> str:
    """A dtype's name as `TensorSpec` writes it. numpy takes longer to spell one than a small model takes to run a layer."""
    return str(dtype)


def check_array(spec: TensorSpec, array: Array, *, where: str) -> None:
    """Refuse an array whose dtype or shape is not what `spec` declares (see `check_feeds`)."""
    if spec.dtype.startswith("seq("):
        return  # a list of arrays, which are the runtime's to check
    dtype, shape = dtype_name(array.dtype), array.shape
    if dtype != spec.dtype:
        raise DataError(
            f"Input '{spec}' of {where} was given {dtype}{list(shape)}.",
            hint=f"convert it first: array.astype('{spec.dtype}')",
        )
    if spec.shape is None or shape == spec.shape:
        return
    fits = len(shape) == len(spec.shape) and all(
        not isinstance(want, int) or want == have for want, have in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        raise DataError(
            f"Input '{spec}' of {where} was given {dtype}{list(shape)}: the shapes do not fit.",
            hint="only axes declared with a name (or ?) may vary; re-export with a dynamic axis to vary others",
        )

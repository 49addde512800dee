"""What a model takes: names, dtypes, shapes and batch sizes, against which every request is held before it is queued."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, TensorSpec
from mpdeploy.errors import ModelError, closest_names
from mpdeploy.serve.dtypes import BF16, array_from_raw, datatype_of
from mpdeploy.serve.messages import BadRequestError, InferRequest
from mpdeploy.serve.padding import Lengths, Padding

Key = tuple[tuple[int, ...], ...]
"""The shapes of a request's inputs without the batch axis: only requests of one key share a batch."""
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Input:
    """One input, prepared for the check: `fixed` and `ranges` are (axis, value) and (axis, (smallest, largest))."""

    spec: TensorSpec
    dtype: np.dtype[Any]
    rank: int | None
    fixed: tuple[tuple[int, int], ...]
    ranges: tuple[tuple[int, Range], ...]
    named: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Contract:
    """What a version of a model takes and answers.

    Attributes:
        inputs: in the engine's order.
        outputs: in the engine's order.
        batched: whether requests may be joined along axis 0.
        max_batch: the most samples in a batch, and in a request; 1 request at a time where not `batched`.
        pad_to: rising batch sizes that the engine is run with; empty: any size up to `max_batch`.
        variable: whether an axis other than the batch may vary, so that shapes decide which requests share a batch.
        padding: axes that are filled up, so that more requests share one; None: none are.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    max_batch: int
    pad_to: tuple[int, ...] = ()
    variable: bool = field(default=False)
    padding: Padding | None = None

    @classmethod
    def of(
        cls,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        batches: Sequence[int],
        batched: bool = True,
        fixed_sizes: bool = False,
        ranges: Mapping[str, Sequence[Range]] | None = None,
    ) -> Contract:
        """Prepare a contract.

        Args:
            inputs: of the engine; symbolic axes are a str or None.
            outputs: of the engine.
            batches: smallest, best and largest batch of the profile.
            batched: False where requests must not be joined, whatever the shapes say.
            fixed_sizes: whether the engine wants batches of the profile's sizes only.
            ranges: input -> (smallest, largest) of each axis, where the engine refuses others.

        Raises:
            ModelError: a dtype that the protocol does not know.
        """
        prepared = tuple(_prepared(spec, (ranges or {}).get(spec.name)) for spec in inputs)
        for spec in outputs:
            _numpy(spec)
        can = batched and bool(inputs) and all(spec.has_symbolic_batch for spec in (*inputs, *outputs))
        smallest, largest = min(batches), max(batches)
        pad_to = tuple(sorted(set(batches))) if fixed_sizes else (smallest,) if smallest > 1 else ()
        if pad_to and pad_to[-1] < largest:
            pad_to = (*range(smallest, largest + 1),)
        variable = any(
            not isinstance(axis, int) for spec in inputs for axis in (spec.shape or (None,))[1 if can else 0 :]
        )
        return cls(prepared, tuple(outputs), can, largest, pad_to if can else (), variable)

    def with_padding(self, sizes: Sequence[tuple[str, tuple[int, ...]]]) -> Contract:
        """The same, with axes that are filled up to these lengths.

        Raises:
            ModelError: there is no such axis, or the engine does not take one of the lengths.
        """
        padding = Padding.of(sizes, [item.spec for item in self.inputs], self.outputs)
        inputs = []
        for item, axes in zip(self.inputs, padding.inputs, strict=True):
            filled = {axis: padding.sizes[name] for axis, name in axes}
            ranges = []
            for axis, (low, high) in item.ranges:
                for size in filled.get(axis, ()):
                    if not low <= size <= high:
                        raise ModelError(
                            f"--pad: input '{item.spec.name}' of this engine takes {low} to {high} on axis {axis}, not {size}.",
                            hint="give lengths that lie within the profile it was built with",
                        )
                ranges.append((axis, (0 if axis in filled else low, high)))
            inputs.append(replace(item, ranges=tuple(ranges)))
        return replace(self, inputs=tuple(inputs), padding=padding)

    def admit(self, request: InferRequest) -> tuple[tuple[Array, ...], int, Key, Lengths]:
        """A request's arrays in the engine's order, how many samples they hold, the key of its batch, and the lengths of what was filled up.

        Raises:
            BadRequestError: names, dtypes or shapes are not what the model takes, or it holds too many samples.
        """
        given = request.inputs
        arrays = []
        for item in self.inputs:
            array = given.get(item.spec.name)
            if array is None:
                raise BadRequestError(
                    f"input '{item.spec.name}' is missing; found: {', '.join(map(repr, given)) or 'none'}"
                )
            if array.dtype != item.dtype:
                raise BadRequestError(
                    f"input '{item.spec.name}': datatype is {_datatype(array)}, the model takes {_datatype_of(item)}"
                )
            _check_shape(item, array.shape)
            arrays.append(array)
        if len(given) != len(self.inputs):
            self._refuse_unknown(given)
        self._check_outputs(request)
        if len(self.inputs) > 1 and (self.variable or self.batched):
            self._check_axes(arrays)
        admitted: tuple[Array, ...] = tuple(arrays)
        lengths: Lengths = ()
        if self.padding is not None:
            admitted, lengths = self.padding.pad(admitted)
        shapes = tuple([array.shape for array in admitted])
        if not self.batched:
            return admitted, 1, shapes, lengths
        rows = shapes[0][0]
        if rows > self.max_batch:
            raise BadRequestError(
                f"input '{self.inputs[0].spec.name}': {rows} samples, {self.max_batch} is the most in a request"
            )
        return admitted, rows, tuple([shape[1:] for shape in shapes]) if self.variable else (), lengths

    def input_of_raw(self, body: bytes) -> dict[str, Array]:
        """The input of a body that is one tensor and nothing else: Triton's raw binary request. One of BYTES is one element, without its length.

        Raises:
            BadRequestError: the shape cannot be told from the size, or they do not fit one another.
        """
        item = self.inputs[0] if len(self.inputs) == 1 else None
        axes = None if item is None else item.spec.shape
        if item is None or axes is None or len(axes) - len(item.fixed) > 1:
            raise BadRequestError("a body without JSON is for models with one input, of which one axis at most varies")
        where = f"input '{item.spec.name}'"
        known = math.prod(size for _, size in item.fixed)
        text = item.dtype.kind == "O"
        if text and known != 1:
            raise BadRequestError(f"{where}: a body without JSON is one element, the model takes {known}")
        varies = 1 if text else len(body) // (known * item.dtype.itemsize or 1)
        shape = [axis if isinstance(axis, int) else varies for axis in axes]
        raw = struct.pack("<I", len(body)) + body if text else body
        return {item.spec.name: array_from_raw(datatype_of(item.dtype), shape, raw, where)}

    def size_to_run(self, rows: int) -> int:
        """The batch size that the engine is run with for so many samples."""
        return next((size for size in self.pad_to if size >= rows), rows)

    def empty_answer(self) -> dict[str, Array]:
        """What a request of no samples is answered with.

        Raises:
            BadRequestError: an output's shape is not known without running the model.
        """
        answer = {}
        for spec in self.outputs:
            axes = (spec.shape or (None,))[1:]
            if spec.shape is None or not all(isinstance(axis, int) for axis in axes):
                raise BadRequestError(f"no samples, and the shape of output '{spec.name}' depends on them")
            answer[spec.name] = np.empty((0, *(int(axis) for axis in axes if axis is not None)), _numpy(spec))
        return answer

    def _check_axes(self, arrays: Sequence[Array]) -> None:
        """Axes of one name must have one length, and all batches must be equal."""
        lengths: dict[str, tuple[int, str]] = {}
        for item, array in zip(self.inputs, arrays, strict=True):
            names = ((0, "batch"), *item.named) if self.batched else item.named
            for axis, name in names:
                length = array.shape[axis]
                seen = lengths.setdefault(f"{axis == 0 and self.batched}{name}", (length, item.spec.name))
                if seen[0] != length:
                    raise BadRequestError(
                        f"input '{item.spec.name}': axis {axis} ('{name}') has length {length}, "
                        f"in input '{seen[1]}' it is {seen[0]}"
                    )

    def _refuse_unknown(self, given: Mapping[str, Array]) -> None:
        names = [item.spec.name for item in self.inputs]
        unknown = next(name for name in given if name not in names)
        raise BadRequestError(
            f"input {unknown[:80]!r} is not of this model; closest names: {closest_names(unknown[:80], names)}"
        )

    def _check_outputs(self, request: InferRequest) -> None:
        if not request.outputs:
            return
        names = [spec.name for spec in self.outputs]
        for output in request.outputs:
            if output.name not in names:
                raise BadRequestError(
                    f"output {output.name[:80]!r} is not of this model; "
                    f"closest names: {closest_names(output.name[:80], names)}"
                )


def _prepared(spec: TensorSpec, ranges: Sequence[Range] | None) -> Input:
    shape = spec.shape or ()
    free = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    return Input(
        spec=spec,
        dtype=_numpy(spec),
        rank=None if spec.shape is None else len(shape),
        fixed=tuple((axis, size) for axis, size in enumerate(shape) if isinstance(size, int)),
        ranges=tuple((axis, ranges[axis]) for axis in free if axis > 0 and ranges is not None and axis < len(ranges)),
        named=tuple((axis, str(shape[axis])) for axis in free if axis > 0 and isinstance(shape[axis], str)),
    )


def _check_shape(item: Input, shape: tuple[int, ...]) -> None:
    if item.rank is None:
        return
    fits = len(shape) == item.rank
    if fits:
        for axis, size in item.fixed:
            if shape[axis] != size:
                fits = False
    if not fits:
        wanted = ", ".join(str(axis) if isinstance(axis, int) else "-1" for axis in item.spec.shape or ())
        raise BadRequestError(f"input '{item.spec.name}': shape is {list(shape)}, the model takes [{wanted}]")
    for axis, (low, high) in item.ranges:
        if not low <= shape[axis] <= high:
            raise BadRequestError(
                f"input '{item.spec.name}': axis {axis} has length {shape[axis]}, the engine takes {low} to {high}"
            )


def _numpy(spec: TensorSpec) -> np.dtype[Any]:
    try:
        dtype = BF16 if spec.dtype == "bfloat16" else np.dtype(spec.dtype)
        datatype_of(dtype)
    except (TypeError, KeyError) as error:
        raise ModelError(
            f"'{spec}' has a dtype that the Open Inference Protocol does not know.",
            hint="cast it inside the model to one of the protocol's: FP32, INT64, ...",
        ) from error
    return dtype


def _datatype(array: Array) -> str:
    try:
        return datatype_of(array.dtype)
    except KeyError:
        return str(array.dtype)


def _datatype_of(item: Input) -> str:
    return datatype_of(item.dtype)

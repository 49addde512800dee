"""Requests of different lengths in one batch: a named axis is filled up with zeros to the next of a few lengths, and answers are cut back.

Zeros mean "not there" to models that take a mask. Whether they do to this one is tried before it serves (`warmup.prepare`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpdeploy.artifact import Array, TensorSpec
from mpdeploy.errors import ModelError, closest_names

Lengths = tuple[tuple[str, int], ...]
"""Axis and the length it had, of a request that was filled up."""
Axes = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Padding:
    """Which axes of an engine are filled up.

    Attributes:
        sizes: axis -> rising lengths that it is filled up to; what is longer than the last stays as it is.
        inputs: of each input, in the engine's order, the axes that are filled up.
        outputs: output -> the axes that are cut back.
    """

    sizes: Mapping[str, tuple[int, ...]]
    inputs: tuple[Axes, ...]
    outputs: Mapping[str, Axes]

    @classmethod
    def of(
        cls, sizes: Sequence[tuple[str, tuple[int, ...]]], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> Padding:
        """Find the axes by their names.

        Raises:
            ModelError: no input has an axis of that name, or one that has it holds text.
        """
        wanted = dict(sizes)
        names = sorted({name for spec in inputs for _, name in _named(spec)})
        for name in wanted:
            if name not in names:
                raise ModelError(
                    f"--pad {name}: no input has an axis of this name; there are: {', '.join(names) or 'none'}.",
                    hint=f"closest names: {closest_names(name, names)}" if names else "mpdeploy inspect shows the axes",
                )
        found = tuple(_of(spec, wanted) for spec in inputs)
        for spec, axes in zip(inputs, found, strict=True):
            if axes and spec.dtype == "object":
                raise ModelError(f"--pad {axes[0][1]}: input '{spec}' holds text, which has no zero to fill up with.")
        return cls(wanted, found, {spec.name: axes for spec in outputs if (axes := _of(spec, wanted))})

    def pad(self, arrays: tuple[Array, ...]) -> tuple[tuple[Array, ...], Lengths]:
        """Fill up a request's arrays, in the engine's order; the lengths are empty where nothing had to be."""
        lengths: dict[str, int] = {}
        made = []
        for array, axes in zip(arrays, self.inputs, strict=True):
            shape = list(array.shape)
            for axis, name in axes:
                length = shape[axis]
                shape[axis] = next((size for size in self.sizes[name] if size >= length), length)
                if shape[axis] != length:
                    lengths[name] = length
            if tuple(shape) != array.shape:
                larger = np.zeros(shape, array.dtype)
                larger[tuple([slice(length) for length in array.shape])] = array
                array = larger
            made.append(array)
        return tuple(made), tuple(lengths.items())

    def cut(self, outputs: Mapping[str, Array], lengths: Lengths) -> dict[str, Array]:
        """An answer to a request of these lengths."""
        had = dict(lengths)
        cut = dict(outputs)
        for name, axes in self.outputs.items():
            for axis, axis_name in axes:
                if axis_name in had:
                    cut[name] = cut[name][(slice(None),) * axis + (slice(had[axis_name]),)]
        return cut


def _named(spec: TensorSpec) -> Axes:
    return tuple((axis, size) for axis, size in enumerate(spec.shape or ()) if axis > 0 and isinstance(size, str))


def _of(spec: TensorSpec, wanted: Mapping[str, object]) -> Axes:
    return tuple((axis, name) for axis, name in _named(spec) if name in wanted)

"""Samples from outside a pipeline: `--data` and `--labels`.

DATA is an `.npz` with one array an input, a folder of such files, or `module:function`. Where an input's first axis is symbolic, the
arrays hold many samples along it and are split; else an array whose shape fits the declared one is a single feed.
"""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, TensorSpec, check_feeds, digest_of_arrays
from mpdeploy.errors import DataError

MAX_BATCH = 32
MIN_FEEDS = 8
"""Feeds to aim for: range statistics look at how the maxima of feeds vary."""


@dataclass(frozen=True)
class FeedSet:
    """Feeds that fit a model, checked.

    Attributes:
        feeds: each answers one run of the model; split along symbolic first axes.
        inputs: what they were checked against.
        batched: inputs whose first axis is symbolic, along which samples lie.
    """

    feeds: tuple[Mapping[str, Array], ...]
    inputs: tuple[TensorSpec, ...]
    batched: frozenset[str]

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        return iter(self.feeds)

    def __len__(self) -> int:
        return len(self.feeds)

    def samples_in(self, feed: Mapping[str, Array]) -> int:
        """Samples one feed holds."""
        return min((len(feed[name]) for name in self.batched), default=1)

    @property
    def num_samples(self) -> int:
        """Samples in all feeds."""
        return sum(self.samples_in(feed) for feed in self.feeds)

    @cached_property
    def digest(self) -> str:
        """Digest of all arrays, in order."""
        return digest_of_arrays(
            {f"{i}/{name}": array for i, feed in enumerate(self.feeds) for name, array in feed.items()}
        )


def load_feeds(source: str, inputs: tuple[TensorSpec, ...], *, where: str) -> FeedSet:
    """Read DATA (see the module's docstring) for a model with these inputs.

    Raises:
        DataError: nothing there, wrong names, dtypes or shapes, no samples, or a NaN (with its array and sample).
    """
    batched = frozenset(spec.name for spec in inputs if spec.has_symbolic_batch)
    feeds: list[Mapping[str, Array]] = []
    for origin, arrays in _sources(source):
        fitted = _fitted(arrays, inputs, f"{where} (data {origin})")
        _refuse_nan(fitted, origin, batched)
        feeds += _split(fitted, batched)
    if not feeds:
        raise DataError(f"{source} holds no samples.", hint="give at least one, better 32 or more")
    return FeedSet(tuple(feeds), inputs, batched)


def _sources(source: str) -> Iterator[tuple[str, Mapping[str, Array]]]:
    """(where from, arrays) pairs."""
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise DataError(
                f"The folder {path} holds no .npz file.", hint="write one with numpy.savez, one array an input"
            )
        for file in files:
            yield str(file), _read_npz(file)
    elif path.is_file():
        yield source, _read_npz(path)
    elif ":" in source:
        for number, arrays in enumerate(_call(source)):
            yield (f"{source}, entry {number}" if number else source), arrays
    else:
        raise DataError(f"There is no data at {source}.", hint="give an .npz, a folder of them, or module:function")


def _read_npz(path: Path) -> Mapping[str, Array]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} holds a bare array.", hint="numpy.savez(path, INPUT_NAME=array)")
            with archive:
                return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is not a readable .npz file: {error}", hint="write it with numpy.savez, without pickled objects"
        ) from error


def _call(source: str) -> Iterator[Mapping[str, Array]]:
    from mpdeploy.user_code import user_call

    module_name, _, function_name = source.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"Cannot import {source}: {error}.", hint="is the module in this folder or installed?"
        ) from error
    result: Any = user_call(function)
    if isinstance(result, Mapping):
        yield result
    elif isinstance(result, Iterable):
        yield from result
    else:
        raise DataError(f"{source} returned {type(result).__name__}, expected a dict of arrays or an iterable of such.")


def _fitted(arrays: Mapping[str, Array], inputs: tuple[TensorSpec, ...], where: str) -> dict[str, Array]:
    """The arrays in the declared dtypes, where that loses nothing but float precision; names and shapes checked."""
    fitted: dict[str, Array] = {}
    for spec in inputs:
        if spec.name not in arrays:
            continue
        array = np.asarray(arrays[spec.name])
        if str(array.dtype) != spec.dtype:
            array = _in_dtype(array, spec)
        fitted[spec.name] = array
    check_feeds(inputs, fitted | {name: array for name, array in arrays.items() if name not in fitted}, where=where)
    return fitted


def _in_dtype(array: Array, spec: TensorSpec) -> Array:
    try:
        wanted = np.dtype(_named_dtype(spec.dtype))
    except TypeError:
        return array
    kinds = array.dtype.kind + wanted.kind
    if kinds in ("ff", "fV", "Vf"):
        with np.errstate(over="ignore"):
            return array.astype(wanted)
    if kinds in ("ii", "iu", "ui", "uu", "bi", "bu", "ib", "ub"):
        changed = array.astype(wanted)
        if np.array_equal(changed.astype(array.dtype), array):
            return changed
    return array


def _named_dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return name


def _refuse_nan(arrays: Mapping[str, Array], where: str, batched: frozenset[str]) -> None:
    for name, array in arrays.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            position = [int(i) for i in np.argwhere(np.isnan(array))[0]]
            sample = f"sample {position[0]}" if name in batched and position else "the feed"
            raise DataError(
                f"'{name}' in {where} holds NaN, first in {sample} (index {position}).",
                hint="remove or repair that sample: a model's ranges and drift cannot be judged by it",
            )


def _split(arrays: Mapping[str, Array], batched: frozenset[str]) -> list[Mapping[str, Array]]:
    lengths = {len(arrays[name]) for name in batched}
    if len(lengths) != 1:
        return [arrays]  # no symbolic first axis, or axes of different meaning
    count = lengths.pop()
    if count == 0:
        return []
    size = min(MAX_BATCH, max(1, count // MIN_FEEDS))
    return [
        {name: array[start : start + size] if name in batched else array for name, array in arrays.items()}
        for start in range(0, count, size)
    ]


def load_labels(path: Path) -> Array:
    """Labels from an `.npz` with a single array.

    Raises:
        DataError: unreadable, or more than one array.
    """
    arrays = _read_npz(path)
    if len(arrays) != 1:
        raise DataError(f"{path} must hold one array of labels, found: {', '.join(arrays) or 'none'}.")
    return next(iter(arrays.values()))


def load_amax(path: Path) -> dict[str, dict[str, Any]]:
    """Ranges that training recorded, as `convert` takes them: `amax` (tensor -> largest magnitude) and `amax_modules`.

    Args:
        path: `20-export/amax.json` of a run, or a file of the same form: {"tensors": {NAME: number}, "modules": {NAME: module}}.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tensors = {str(name): float(value) for name, value in found["tensors"].items()}
        modules = {str(name): str(module) for name, module in found.get("modules", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} holds no ranges: {type(error).__name__}: {error}.",
            hint='give 20-export/amax.json of a run, or {"tensors": {"TENSOR": 123.0}}',
        ) from error
    return {"amax": tensors, "amax_modules": modules}

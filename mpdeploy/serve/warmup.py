"""Before a version serves: what its engine takes, every batch size run once, and whether joining requests changes their answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, Engine, Runner, TensorSpec
from mpdeploy.serve.contract import Contract
from mpdeploy.serve.padding import Padding

log = logging.getLogger("mpdeploy.serve")

DEFAULT_BATCHES = (1, 8, 32)
TENSORRT = ("tensorrt", "tensorrt-rtx")
WARM_EVERY_SIZE = ("openvino",)
"""Backends that compile something at the first batch of each size: a request must not wait for it."""
MAX_SIZES = 64
MAX_GOLDEN_BYTES = 2**29
JOINED_REL_L2 = 0.05
"""Far above rounding, far below what a model does that mixes the samples of a batch."""
PADDED_REL_L2 = 0.01
"""Above half precision's rounding, below what a token does that a model takes for one."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` learnt: the contract, and what a user should know."""

    contract: Contract
    warnings: tuple[str, ...]
    seconds: float


class Samples:
    """Feeds to warm up with: golden samples where the run has them, else zeros."""

    def __init__(self, golden: Path | None) -> None:
        self._arrays: dict[str, Array] = {}
        if golden is not None and golden.stat().st_size <= MAX_GOLDEN_BYTES:
            with np.load(golden, allow_pickle=False) as archive:
                self._arrays = {
                    name.removeprefix("inputs/"): archive[name][:64]
                    for name in archive.files
                    if name.startswith("inputs/")
                }

    def feeds(
        self, inputs: Sequence[TensorSpec], size: int, profile: Mapping[str, Any], *, start: int = 0
    ) -> dict[str, Array]:
        """Feeds of `size` samples, from sample `start` on; axes that are not known take the profile's best length, else 1."""
        return {spec.name: self._array(spec, size, profile, start) for spec in inputs}

    def _array(self, spec: TensorSpec, size: int, profile: Mapping[str, Any], start: int) -> Array:
        shape = spec.shape or ()
        golden = self._arrays.get(spec.name)
        if golden is not None and len(golden) and str(golden.dtype) == spec.dtype and spec.has_symbolic_batch:
            fits = len(shape) == golden.ndim and all(
                not isinstance(axis, int) or axis == found
                for axis, found in zip(shape[1:], golden.shape[1:], strict=True)
            )
            if fits:
                return np.ascontiguousarray(golden[(start + np.arange(size)) % len(golden)])
        best = (profile.get(spec.name) or [[], [], []])[1]
        lengths = [
            axis if isinstance(axis, int) else size if position == 0 else (best[position] if best else 1)
            for position, axis in enumerate(shape)
        ]
        if spec.dtype == "object":
            return np.full(lengths, "", np.object_)
        dtype = spec.dtype
        if dtype == "bfloat16":
            import ml_dtypes

            return np.zeros(lengths, ml_dtypes.bfloat16)
        return np.zeros(lengths, np.dtype(dtype))


def contract_of(engine: Engine, runner: Runner, names: Mapping[str, TensorSpec], *, batched: bool = True) -> Contract:
    """What an engine takes, from its own inputs and the profile it was built with.

    Args:
        engine: its sidecar holds the profile.
        runner: entered.
        names: the exported model's inputs and outputs, whose axes have names where the engine's have none.
        batched: False where requests must not be joined.
    """
    profile = engine.sidecar.get("profile") or {}
    shapes = next(iter(profile.values()), None)
    batches = [int(shape[0]) for shape in shapes] if shapes and shapes[0] else list(DEFAULT_BATCHES)
    strict = engine.backend in TENSORRT
    ranges = {
        name: [(int(low), int(high)) for low, high in zip(item[0], item[2], strict=True)]
        for name, item in profile.items()
    }
    return Contract.of(
        [_named(spec, names) for spec in runner.inputs],
        [_named(spec, names) for spec in runner.outputs],
        batches=batches,
        batched=batched,
        fixed_sizes=bool((engine.sidecar.get("options") or {}).get("cuda_graph")),
        ranges=ranges if strict else None,
    )


def prepare(
    engine: Engine,
    runner: Runner,
    names: Mapping[str, TensorSpec],
    samples: Samples,
    *,
    limit_s: float,
    pad: Sequence[tuple[str, tuple[int, ...]]] = (),
) -> Prepared:
    """Learn the contract, run every batch size once, and see whether a batch answers as its samples do alone.

    Raises:
        ModelError: an axis that is to be filled up, `pad`, is not there, or the engine does not take its lengths.
    """
    begin = time.monotonic()
    contract = contract_of(engine, runner, names)
    profile = engine.sidecar.get("profile") or {}
    warnings: list[str] = []
    why = _joining_changes(contract, runner, samples, profile) if contract.batched else None
    if why is not None:
        warnings.append(f"requests are computed one by one: {why}")
        contract = contract_of(engine, runner, names, batched=False)
    if pad and contract.batched:
        padded = contract.with_padding(pad)
        why = _padding_changes(padded, runner, samples.feeds(runner.inputs, contract.size_to_run(1), profile))
        if why is None:
            contract = padded
        else:
            warnings.append(
                f"requests are not filled up, and share a batch with those of their own length alone: {why}"
            )
    elif pad:
        warnings.append("requests are not filled up, since they are computed one by one")
    for size in _sizes(contract, engine):
        if time.monotonic() - begin > limit_s:
            warnings.append(f"warming up was cut off after {limit_s:g} s, before batches of {size}")
            break
        for feeds in _filled(samples.feeds(runner.inputs, size, profile), contract.padding):
            runner.infer(feeds)
            runner.infer(feeds)  # lazy set-up and, on a GPU, the capture of a graph may take two runs
    return Prepared(contract, tuple(warnings), time.monotonic() - begin)


def _sizes(contract: Contract, engine: Engine) -> list[int]:
    """Batch sizes to run once: the largest first, since memory that cannot be had should be missed now."""
    if not contract.batched:
        return [1]
    if contract.pad_to:
        sizes = set(contract.pad_to)
    elif engine.backend in WARM_EVERY_SIZE and contract.max_batch <= MAX_SIZES:
        sizes = set(range(1, contract.max_batch + 1))
    else:
        shapes = next(iter((engine.sidecar.get("profile") or {}).values()), None)
        sizes = {int(shape[0]) for shape in shapes} if shapes else set(DEFAULT_BATCHES)
    return sorted(sizes, reverse=True)


def _joining_changes(contract: Contract, runner: Runner, samples: Samples, profile: Mapping[str, Any]) -> str | None:
    """Why samples must not share a batch, or None: outputs without a row a sample, or other answers than alone."""
    count = min(3, contract.max_batch)
    if count < 2:
        return None
    size = contract.size_to_run(count)
    together = runner.infer(samples.feeds(runner.inputs, size, profile))
    alone: list[dict[str, Array]] = []
    for index in range(count):
        one = contract.size_to_run(1)
        feeds = samples.feeds(runner.inputs, one, profile, start=index)
        if one > 1:  # filled up with the same sample, as a padded batch is
            feeds = {name: np.concatenate([array[:1]] * one) for name, array in feeds.items()}
        alone.append(runner.infer(feeds))
    for name, array in together.items():
        if array.ndim == 0 or len(array) != size:
            return f"output '{name}' has the shape {list(array.shape)} for a batch of {size}"
        if array.dtype.kind not in "fV":
            continue
        rows = np.concatenate([each[name][:1] for each in alone])
        if rows.shape != array[:count].shape:
            return f"output '{name}' has other shapes in a batch"
        if _distance(array[:count], rows) > JOINED_REL_L2:
            return f"in a batch, output '{name}' differs from that of the same samples alone"
    return None


def _filled(feeds: dict[str, Array], padding: Padding | None) -> list[dict[str, Array]]:
    """The feeds in each of the lengths that requests are filled up to; as they are where none are."""
    if padding is None:
        return [feeds]
    names = [name for name, _ in sorted(padding.sizes.items(), key=lambda item: -len(item[1]))]
    steps = range(len(padding.sizes[names[0]]))
    lengths = [{name: padding.sizes[name][min(step, len(padding.sizes[name]) - 1)] for name in names} for step in steps]
    return [_stretched(feeds, padding, each) for each in lengths]


def _stretched(feeds: Mapping[str, Array], padding: Padding, lengths: Mapping[str, int]) -> dict[str, Array]:
    """The feeds cut, or repeated, to such lengths."""
    made = dict(feeds)
    for (name, array), axes in zip(feeds.items(), padding.inputs, strict=True):
        for axis, axis_name in axes:
            array = np.take(array, np.arange(lengths[axis_name]), axis=axis, mode="wrap")
        made[name] = np.ascontiguousarray(array)
    return made


def _padding_changes(contract: Contract, runner: Runner, feeds: Mapping[str, Array]) -> str | None:
    """Why requests must not be filled up, or None: a sample that is filled up by one, or by much, is answered otherwise than as it was."""
    padding = contract.padding
    assert padding is not None
    for pick in (0, -1):  # by one to the shortest length, and from there to the longest
        short = {name: max(1, sizes[0] - 1) for name, sizes in padding.sizes.items()}
        plain = _stretched(feeds, padding, short)
        longer = {name: sizes[pick] for name, sizes in padding.sizes.items()}
        filled = {}
        for (name, array), axes in zip(plain.items(), padding.inputs, strict=True):
            named = dict(axes)
            width = [(0, longer[named[axis]] - size if axis in named else 0) for axis, size in enumerate(array.shape)]
            filled[name] = np.pad(array, width)
        expected, found = runner.infer(plain), padding.cut(runner.infer(filled), tuple(short.items()))
        for name, array in expected.items():
            if array.dtype.kind not in "fV":
                continue
            if array.shape != found[name].shape:
                return f"output '{name}' then has the shape {list(found[name].shape)}, not {list(array.shape)}"
            distance = _distance(found[name], array)
            if distance > PADDED_REL_L2:
                return f"output '{name}' then drifts by {distance:.2g} (rel L2)"
    return None


def _distance(found: Array, expected: Array) -> float:
    """Relative L2 distance over what is finite; infinite where only one of the two is."""
    left, right = found.astype(np.float64), expected.astype(np.float64)
    known = np.isfinite(right)
    if not np.array_equal(np.isfinite(left), known):
        return float("inf")
    left, right = np.where(known, left, 0.0), np.where(known, right, 0.0)
    return float(np.linalg.norm(left - right)) / max(float(np.linalg.norm(right)), 1e-6)


def _named(spec: TensorSpec, names: Mapping[str, TensorSpec]) -> TensorSpec:
    """The engine's spec, with the names that the exported model gives to axes the engine calls unknown."""
    other = names.get(spec.name)
    if other is None or spec.shape is None or other.shape is None or len(spec.shape) != len(other.shape):
        return spec
    shape = tuple(mine if mine is not None else theirs for mine, theirs in zip(spec.shape, other.shape, strict=True))
    return TensorSpec(
        spec.name,
        spec.dtype,
        tuple(None if i and isinstance(a, int) and spec.shape[i] is None else a for i, a in enumerate(shape)),
    )

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

log = logging.getLogger("mpdeploy.serve")

DEFAULT_BATCHES = (1, 8, 32)
TENSORRT = ("tensorrt", "tensorrt-rtx")
WARM_EVERY_SIZE = ("openvino",)
"""Backends that compile something at the first batch of each size: a request must not wait for it."""
MAX_SIZES = 64
MAX_GOLDEN_BYTES = 2**29
JOINED_REL_L2 = 0.05
"""Far above rounding, far below what a model does that mixes the samples of a batch."""


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
    engine: Engine, runner: Runner, names: Mapping[str, TensorSpec], samples: Samples, *, limit_s: float
) -> Prepared:
    """Learn the contract, run every batch size once, and see whether a batch answers as its samples do alone."""
    begin = time.monotonic()
    contract = contract_of(engine, runner, names)
    profile = engine.sidecar.get("profile") or {}
    warnings: list[str] = []
    why = _joining_changes(contract, runner, samples, profile) if contract.batched else None
    if why is not None:
        warnings.append(f"requests are computed one by one: {why}")
        contract = contract_of(engine, runner, names, batched=False)
    for size in _sizes(contract, engine):
        if time.monotonic() - begin > limit_s:
            warnings.append(f"warming up was cut off after {limit_s:g} s, before batches of {size}")
            break
        feeds = samples.feeds(runner.inputs, size, profile)
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
        rows = np.concatenate([each[name][:1] for each in alone]).astype(np.float64)
        joined = array[:count].astype(np.float64)
        if rows.shape != joined.shape:
            return f"output '{name}' has other shapes in a batch"
        known = np.isfinite(rows) & np.isfinite(joined)
        distance = float(np.linalg.norm(np.where(known, joined - rows, 0.0)))
        if distance > JOINED_REL_L2 * max(float(np.linalg.norm(np.where(known, rows, 0.0))), 1e-6):
            return f"in a batch, output '{name}' differs from that of the same samples alone"
    return None


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

"""Drift: how far a candidate's outputs lie from the golden ones, kept per sample so that it can be decided again.

`rel_l2` = ||candidate - golden|| / ||golden|| over all samples, in float64, per output. A candidate value that is not finite where
the golden one is counts as non-finite and makes rel_l2 infinite: lost is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Array
from mpdeploy.errors import DataError

SAMPLE_FIELDS = ("sq_error", "sq_golden", "sq_candidate", "dot", "max_abs", "num_nonfinite")


@dataclass(frozen=True)
class OutputDrift:
    """One output's drift, per sample: each field is a float64 array of shape [num_samples].

    Attributes:
        sq_error: sum over the sample's values of (candidate - golden)^2; NaN and infinities of the candidate are left out here.
        sq_golden: sum of golden^2.
        sq_candidate: sum of candidate^2, finite values only.
        dot: sum of candidate * golden, finite values only.
        max_abs: largest |candidate - golden|; infinity where the candidate is not finite.
        num_nonfinite: how many candidate values are NaN or infinite where the golden one is finite.
    """

    sq_error: NDArray[np.float64]
    sq_golden: NDArray[np.float64]
    sq_candidate: NDArray[np.float64]
    dot: NDArray[np.float64]
    max_abs: NDArray[np.float64]
    num_nonfinite: NDArray[np.float64]

    @property
    def rel_l2(self) -> float:
        """||candidate - golden|| / ||golden|| over all samples; infinite where a value is not finite."""
        if self.num_nonfinite.any():
            return math.inf
        error, golden = float(self.sq_error.sum()), float(self.sq_golden.sum())
        if golden == 0.0:
            return 0.0 if error == 0.0 else math.inf
        return math.sqrt(error / golden)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between all golden and all candidate values; NaN where either is all zero."""
        norm = math.sqrt(float(self.sq_golden.sum()) * float(self.sq_candidate.sum()))
        if self.num_nonfinite.any():
            return math.nan
        if norm == 0.0:
            return 1.0 if float(self.sq_error.sum()) == 0.0 else math.nan
        return float(self.dot.sum()) / norm

    @property
    def worst_sample(self) -> int:
        """Position of the sample with most non-finite values, then with the largest error."""
        return int(np.lexsort((self.sq_error, self.num_nonfinite))[-1]) if len(self.sq_error) else -1

    def to_json(self) -> dict[str, Any]:
        """The summary that `--json` and reports show."""
        return {
            "rel_l2": self.rel_l2,
            "max_abs": float(self.max_abs.max(initial=0.0)),
            "cosine": self.cosine,
            "num_nonfinite": int(self.num_nonfinite.sum()),
            "worst_sample": self.worst_sample,
        }


@dataclass(frozen=True)
class DriftReport:
    """Drift of every output."""

    outputs: Mapping[str, OutputDrift]

    @property
    def rel_l2(self) -> float:
        """Of the worst output."""
        return max((output.rel_l2 for output in self.outputs.values()), default=0.0)

    @property
    def num_nonfinite(self) -> int:
        """Over all outputs."""
        return int(sum(output.num_nonfinite.sum() for output in self.outputs.values()))

    def to_json(self) -> dict[str, Any]:
        """`{"outputs": {NAME: {"rel_l2", "max_abs", "cosine", "num_nonfinite", "worst_sample"}}}`."""
        return {"outputs": {name: output.to_json() for name, output in self.outputs.items()}}


class DriftMeter:
    """Adds up drift batch by batch, in bounded memory."""

    def __init__(self) -> None:
        self._parts: dict[str, list[NDArray[np.float64]]] = {}

    def add(self, golden: Mapping[str, Array], candidate: Mapping[str, Array], *, split: bool = True) -> None:
        """Compare one batch; axis 0 separates its samples, or the whole of it is one sample where `split` is False.

        Outputs that hold no floating-point numbers are compared as numbers too (an index that flips is drift).

        Raises:
            DataError: the two do not have the same outputs, or shapes differ.
        """
        if set(golden) != set(candidate):
            raise DataError(
                f"The two models answer different outputs: {sorted(golden)} and {sorted(candidate)}.",
                hint="compare models with the same output names",
            )
        for name, reference in golden.items():
            found = candidate[name]
            if found.shape != reference.shape:
                raise DataError(f"Output '{name}' has shape {reference.shape} in one and {found.shape} in the other.")
            self._parts.setdefault(name, []).append(per_sample(reference, found, split=split))

    def report(self) -> DriftReport:
        """What was added so far."""
        return DriftReport({name: OutputDrift(*np.concatenate(parts, axis=1)) for name, parts in self._parts.items()})


def per_sample(golden: Array, candidate: Array, *, split: bool = True) -> NDArray[np.float64]:
    """Rows of `SAMPLE_FIELDS`, one column a sample: shape [6, num_samples]."""
    num_samples = golden.shape[0] if split and golden.ndim else 1
    reference = np.asarray(golden, dtype=np.float64).reshape(num_samples, -1)
    found = np.asarray(candidate, dtype=np.float64).reshape(num_samples, -1)
    # Where the golden value itself is not finite there is nothing to compare with: equal counts as equal, else as lost.
    same = (reference == found) | (np.isnan(reference) & np.isnan(found))
    lost = ~np.isfinite(found) & ~same
    usable = np.isfinite(found) & np.isfinite(reference)
    reference, found = np.where(usable, reference, 0.0), np.where(usable, found, 0.0)
    error = found - reference
    return np.stack(
        [
            (error**2).sum(1),
            (reference**2).sum(1),
            (found**2).sum(1),
            (found * reference).sum(1),
            np.where(lost.any(1), np.inf, np.abs(error).max(1, initial=0.0)),
            lost.sum(1).astype(np.float64),
        ]
    )


def drift_of(pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> DriftReport:
    """Drift over (golden, candidate) batches."""
    meter = DriftMeter()
    for golden, candidate in pairs:
        meter.add(golden, candidate)
    return meter.report()

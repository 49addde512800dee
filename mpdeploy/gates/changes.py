"""Which samples changed most at a place: those whose predicted class flipped, then those whose answers moved furthest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Array
from mpdeploy.gates.evidence import Place
from mpdeploy.measure.statistics import FloatArray

NUM_CHANGED_SAMPLES = 12


def most_changed(place: Place, count: int = NUM_CHANGED_SAMPLES) -> NDArray[np.intp]:
    """Positions of the samples that changed most, worst first; none where no drift was kept."""
    errors = sample_errors(place)
    if errors is None:
        return np.zeros(0, dtype=np.intp)
    return np.lexsort((-np.nan_to_num(errors, nan=np.inf), ~flipped(place, len(errors))))[:count]


def sample_errors(place: Place) -> FloatArray | None:
    """Relative L2 error of each sample over all outputs; infinite where a value was lost."""
    errors = [array for key, array in place.arrays.items() if key.startswith("drift/") and key.endswith("/sq_error")]
    golden = [array for key, array in place.arrays.items() if key.startswith("drift/") and key.endswith("/sq_golden")]
    lost = [array for key, array in place.arrays.items() if key.startswith("drift/") and key.endswith("/num_nonfinite")]
    if not errors or not len(errors[0]) or len({len(array) for array in (*errors, *golden, *lost)}) != 1:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt(np.sum(errors, axis=0) / np.sum(golden, axis=0))
    ratio = np.where(np.sum(errors, axis=0) == 0.0, 0.0, ratio)
    return np.where(np.sum(lost, axis=0) > 0, np.inf, ratio) if lost else ratio


def flipped(place: Place, num_samples: int) -> Array:
    """Whether each sample's predicted class changed; all False where no classes were predicted."""
    before, after = place.arrays.get("baseline_predictions"), place.arrays.get("predictions")
    if before is None or after is None or before.shape != after.shape or len(before) != num_samples:
        return np.zeros(num_samples, dtype=bool)
    return np.asarray((before != after).reshape(len(before), -1).any(axis=1))

"""The samples that changed most, as pictures or text, with both answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpdeploy.artifact import Array, Golden
from mpdeploy.gates.evidence import Evidence, Place
from mpdeploy.gates.verdict import format_number
from mpdeploy.measure.statistics import FloatArray
from mpdeploy.report.pictures import image_input, picture_of

NUM_CHANGED_SAMPLES = 12


def changed_samples(evidence: Evidence | None, golden: Golden | None) -> dict[str, Any] | None:
    """The samples that changed most at the place with most flips, then most drift; None where no drift was kept."""
    if evidence is None:
        return None
    candidates = [
        (place, errors) for place in evidence.places.values() if (errors := _sample_errors(place)) is not None
    ]
    if not candidates:
        return None
    place, errors = max(candidates, key=lambda item: (_flipped(item[0]).sum(), float(np.nanmax(item[1], initial=0.0))))
    flipped = _flipped(place) if len(_flipped(place)) == len(errors) else np.zeros(len(errors), dtype=bool)
    order = np.lexsort((-np.nan_to_num(errors, nan=np.inf), ~flipped))[:NUM_CHANGED_SAMPLES]
    ids = place.arrays.get("ids", np.arange(len(errors)))
    positions = {} if golden is None else {int(each): index for index, each in enumerate(golden.dataset.ids)}
    cards = []
    for index in order:
        position = positions.get(int(ids[index]))
        cards.append(
            {
                "id": int(ids[index]),
                "error": format_number(float(errors[index])),
                "flipped": bool(flipped[index]),
                "before": _item(place, "baseline_predictions", index),
                "after": _item(place, "predictions", index),
                "score_before": _item(place, "baseline_scores", index),
                "score_after": _item(place, "scores", index),
                **_golden_of(golden, position),
            }
        )
    return {"at": place.at, "cards": cards, "num_flipped": int(flipped.sum()), "num_samples": len(errors)}


def _sample_errors(place: Place) -> FloatArray | None:
    """Relative L2 error of each sample over all outputs."""
    errors = [array for key, array in place.arrays.items() if key.startswith("drift/") and key.endswith("/sq_error")]
    golden = [array for key, array in place.arrays.items() if key.startswith("drift/") and key.endswith("/sq_golden")]
    lost = [array for key, array in place.arrays.items() if key.startswith("drift/") and key.endswith("/num_nonfinite")]
    if not errors or not len(errors[0]) or len({len(array) for array in (*errors, *golden, *lost)}) != 1:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt(np.sum(errors, axis=0) / np.sum(golden, axis=0))
    ratio = np.where(np.sum(errors, axis=0) == 0.0, 0.0, ratio)
    return np.where(np.sum(lost, axis=0) > 0, np.inf, ratio) if lost else ratio


def _flipped(place: Place) -> Array:
    before, after = place.arrays.get("baseline_predictions"), place.arrays.get("predictions")
    if before is None or after is None or before.shape != after.shape:
        return np.zeros(0, dtype=bool)
    return np.asarray((before != after).reshape(len(before), -1).any(axis=1))


def _item(place: Place, name: str, index: int) -> str:
    array = place.arrays.get(name)
    if array is None or len(array) <= index or array[index].ndim:
        return ""
    value = array[index]
    return "lost" if name.endswith("predictions") and value == -1 else format_number(float(value))


def _golden_of(golden: Golden | None, position: int | None) -> dict[str, Any]:
    """Picture or text, label and margin of a golden sample."""
    found: dict[str, Any] = {"picture": None, "text": "", "label": "", "margin": ""}
    if golden is None or position is None:
        return found
    inputs = golden.dataset.inputs
    name = image_input(inputs)
    if name is not None:
        found["picture"] = picture_of(inputs[name][position])
    texts = [array[position] for array in inputs.values() if array.dtype.kind in "US" and array[position].ndim == 0]
    found["text"] = str(texts[0])[:300] if texts else ""
    labels = golden.dataset.labels
    if labels is not None and labels.ndim == 1:
        found["label"] = format_number(float(labels[position])) if labels.dtype.kind in "iuf" else str(labels[position])
    output = next(iter(golden.outputs.values()), None)
    if output is not None and output.ndim == 2 and output.shape[1] > 1 and len(output) > position:
        best = np.sort(output[position].astype(np.float64))
        found["margin"] = format_number(float(best[-1] - best[-2]))
    return found

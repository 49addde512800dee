"""The samples that changed most, as pictures or text, with both answers and their margins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpdeploy.artifact import Golden
from mpdeploy.gates.changes import flipped, most_changed, sample_errors
from mpdeploy.gates.evidence import Evidence, Place
from mpdeploy.gates.verdict import format_number
from mpdeploy.report.pictures import image_input, picture_of


def changed_samples(
    evidence: Evidence | None,
    golden: Golden | None,
    *,
    texts: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
) -> dict[str, Any] | None:
    """The samples that changed most at the place with most flips, then most drift; None where no drift was kept.

    Args:
        evidence: of the run.
        golden: its samples, for pictures and labels.
        texts: sample id -> what it says.
        classes: names of the classes, in the order of their numbers.
    """
    if evidence is None:
        return None
    candidates = [(place, errors) for place in evidence.places.values() if (errors := sample_errors(place)) is not None]
    if not candidates:
        return None
    place, errors = max(
        candidates,
        key=lambda item: (flipped(item[0], len(item[1])).sum(), float(np.nanmax(item[1], initial=0.0))),
    )
    changed, ids = flipped(place, len(errors)), place.arrays.get("ids", np.arange(len(errors)))
    positions = {} if golden is None else {int(each): index for index, each in enumerate(golden.dataset.ids)}
    cards = []
    for index in most_changed(place):
        sample = int(ids[index])
        found = _golden_of(golden, positions.get(sample), classes)
        text = (texts or {}).get(str(sample)) or found["text"]
        cards.append(
            {
                **found,
                "id": sample,
                "text": text,
                "error": "lost" if np.isinf(errors[index]) else format_number(float(errors[index])),
                "flipped": bool(changed[index]),
                "before": _answer(place, "baseline_predictions", index, classes),
                "after": _answer(place, "predictions", index, classes),
                "margin_before": _item(place, "baseline_margins", index) or found["margin"],
                "margin_after": _item(place, "margins", index),
                "score_before": _item(place, "baseline_scores", index),
                "score_after": _item(place, "scores", index),
            }
        )
    return {
        "at": place.at,
        "cards": cards,
        "num_flipped": int(changed.sum()),
        "num_samples": len(errors),
        "has_texts": any(card["text"] for card in cards) and not any(card["picture"] for card in cards),
    }


def _item(place: Place, name: str, index: int) -> str:
    array = place.arrays.get(name)
    if array is None or len(array) <= index or array[index].ndim:
        return ""
    return format_number(float(array[index]))


def _answer(place: Place, name: str, index: int, classes: Sequence[str]) -> str:
    """A predicted class by its name, where there are names."""
    array = place.arrays.get(name)
    if array is None or len(array) <= index or array[index].ndim:
        return ""
    return "lost" if array[index] == -1 else _named(int(array[index]), classes)


def _named(number: int, classes: Sequence[str]) -> str:
    return classes[number] if 0 <= number < len(classes) else str(number)


def _golden_of(golden: Golden | None, position: int | None, classes: Sequence[str]) -> dict[str, Any]:
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
        label = labels[position]
        kind = labels.dtype.kind
        found["label"] = (
            _named(int(label), classes) if kind in "iu" else format_number(float(label)) if kind == "f" else str(label)
        )
    output = next(iter(golden.outputs.values()), None)
    if output is not None and output.ndim == 2 and output.shape[1] > 1 and len(output) > position:
        best = np.sort(output[position].astype(np.float64))
        found["margin"] = format_number(float(best[-1] - best[-2]))
    return found

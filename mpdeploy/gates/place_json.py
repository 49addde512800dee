"""A place's numbers in short, for renderers that have no evidence at hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mpdeploy.gates.evidence import Place
from mpdeploy.gates.metrics import METRICS
from mpdeploy.gates.sampled import paired_scores, score_name
from mpdeploy.measure.paired import is_binary
from mpdeploy.measure.statistics import MIN_SAMPLES_P99, PairedCounts, mcnemar_p_value, quantile


def place_json(place: Place) -> dict[str, Any]:
    """The entry of a place in gate.json, see `gates.schema`."""
    value: dict[str, Any] = {
        "precision": place.precision,
        "stage": place.stage,
        "baseline": place.baseline,
        "status": place.status,
        "digests": dict(place.digests),
        "notes": dict(place.notes),
        "facts": dict(place.facts),
    }
    try:
        drift = place.drift
        if drift is not None:
            value["drift"] = drift.to_json()["outputs"]
    except (KeyError, ValueError):
        value["drift"] = {}  # its gates say what is wrong with it
    value |= _scores_and_flips(place)
    slices = {name: _slice_json(place, name) for name in place.slices}
    if slices:
        value["slices"] = slices
    corpus = [place.arrays.get(name) for name in ("baseline_corpus_draws", "corpus_draws")]
    if corpus[0] is not None and corpus[1] is not None:
        value["corpus"] = {
            "metric": str(place.notes.get("corpus_metric", "corpus metric")),
            "value": place.facts.get("corpus_value", math.nan),
            "baseline_value": place.facts.get("baseline_corpus_value", math.nan),
            "num_resamples": len(corpus[1]),
        }
    a, b = (place.arrays.get(f"latency_{side}_ms") for side in "ab")
    if a is not None and b is not None and len(a) and len(b):
        value["latency"] = {
            "median_ms": float(np.median(b)),
            "baseline_median_ms": float(np.median(a)),
            "p99_ms": quantile(b, 0.99) if len(b) >= MIN_SAMPLES_P99 else None,
            "num_samples": len(b),
        }
    return value


def _scores_and_flips(place: Place) -> dict[str, Any]:
    value: dict[str, Any] = {}
    scores = paired_scores(place)
    if isinstance(scores, tuple):
        baseline, here = scores
        binary = is_binary(baseline) and is_binary(here)
        value["scores"] = {
            "metric": score_name(place),
            "mean": float(here.mean()),
            "baseline_mean": float(baseline.mean()),
            "num_samples": len(here),
            "num_lost": int((here < baseline).sum()),
            "num_gained": int((here > baseline).sum()),
            "mcnemar_p_value": mcnemar_p_value(PairedCounts.of(baseline, here)) if binary else None,
        }
    flips = METRICS["flips"].find(place, math.inf)
    if flips is not None and math.isfinite(flips.measured):
        value["flips"] = {"count": round(flips.measured * flips.num_samples), "share": flips.measured}
    return value


def _slice_json(place: Place, name: str) -> dict[str, Any]:
    part = place.sliced(name)
    num_samples = int(np.asarray(place.arrays[f"slice/{name}"]).astype(bool).sum())
    value = {"num_samples": num_samples, **_scores_and_flips(part)}
    drift = METRICS["rel_l2"].find(part, math.inf)
    return value if drift is None else value | {"rel_l2": drift.measured}

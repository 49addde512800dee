"""Metrics of AMP against FP32 over paired seeds: equal held-out loss (TOST), no lower score, no more churn than another seed makes.

The evidence, at the place `parity/seeds`: arrays [num_seeds, num_samples] `parity/SIDE_nll`, `parity/SIDE_predictions` and
`parity/SIDE_scores` for both sides, `reference` (FP32) and `candidate` (AMP), and the fact `parity_looks`: the numbers of seeds at
which it was planned to look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from mpdeploy.gates.evidence import Place
from mpdeploy.gates.finding import Finding, lost
from mpdeploy.gates.verdict import format_change, format_number
from mpdeploy.measure.equivalence import (
    Churn,
    Equivalence,
    churn,
    confidence_of_looks,
    equivalence,
    looked_at,
    non_inferiority,
    p_value_apart,
    p_value_drop,
)
from mpdeploy.measure.statistics import CONFIDENCE, FloatArray

PREFIX = "parity/"
SAME = "training ran in fp32: it is its own reference"

Found = TypeVar("Found", Churn, Equivalence)


def pair(place: Place, kind: str) -> tuple[FloatArray, FloatArray] | str | None:
    """(reference's, candidate's) numbers of a kind; a reason where they are not whole; None where the place has none."""
    sides = [place.arrays.get(f"{PREFIX}{side}_{kind}") for side in ("reference", "candidate")]
    if sides[0] is None and sides[1] is None:
        return None
    if sides[0] is None or sides[1] is None or sides[0].shape != sides[1].shape:
        return f"{kind} of the paired seeds are not whole in the evidence"
    if sides[0].ndim != 2 or not sides[0].size:
        return f"{kind} of shape {list(sides[0].shape)} are not [seeds, samples]"
    return sides[0], sides[1]


def _looks(place: Place, num_seeds: int) -> Iterator[tuple[int, float]]:
    """(seeds to look at, confidence of each bound), one look after the other."""
    planned = [int(count) for count in place.facts.get("parity_looks", [])] or [num_seeds]
    for count in looked_at(planned, num_seeds):
        yield count, confidence_of_looks(len(planned))


def _first_decided(place: Place, num_seeds: int, decide: Callable[[int, float], Found]) -> Found:
    for count, confidence in _looks(place, num_seeds):
        found = decide(count, confidence)
        if found.decision != "inconclusive":
            break
    return found


def _is_same(place: Place) -> bool:
    return place.facts.get("parity_same") is True


def nll(place: Place, limit: float) -> Finding | None:
    """Mean held-out loss of AMP against FP32's; `limit` is the margin, as a share of FP32's."""
    return _nll(place, limit, relative=True)


def nll_nats(place: Place, limit: float) -> Finding | None:
    """The same with the margin in nats (the loss's own unit)."""
    return _nll(place, limit, relative=False)


def _nll(place: Place, limit: float, *, relative: bool) -> Finding | None:
    found = pair(place, "nll")
    if found is None and _is_same(place):
        return Finding(0.0, 1, text=SAME)
    if found is None or isinstance(found, str):
        return None if found is None else lost(found)
    reference, candidate = found

    def decide(count: int, confidence: float) -> Equivalence:
        return equivalence(
            reference[:count], candidate[:count], margin=limit, relative=relative, confidence=confidence,
            clusters=place.arrays.get("clusters"),
        )  # fmt: skip

    answer = _first_decided(place, len(reference), decide)
    if math.isnan(answer.measured):
        return lost("a held-out loss is not a number, or FP32's is not above zero", answer.num_samples)
    scale, unit = (100.0, "%") if relative else (1.0, "nats")
    change, allowed = format_change(answer.measured, answer.bounds, scale=scale, unit=unit, limit=limit)
    used = reference[: answer.num_seeds]
    return Finding(
        measured=answer.measured,
        num_samples=answer.num_samples,
        name="held-out loss of AMP against FP32",
        text=f"{change} against a margin of {allowed} either way",
        detail=f"{_basis(answer)}; FP32 {format_number(float(used.mean()))} nats, "
        f"its seeds spread by {format_number(float(np.std(used.mean(axis=1), ddof=1)) if len(used) > 1 else math.nan)}",
        interval=answer.bounds,
        decision=answer.decision,
        p_value=_over_looks(
            answer,
            p_value_apart(
                used, candidate[: len(used)], margin=limit, relative=relative, clusters=place.arrays.get("clusters")
            ),
        ),
    )


def score_drop(place: Place, limit: float) -> Finding | None:
    """How much lower the task metric is under AMP, over paired seeds; `limit` is the margin."""
    found = pair(place, "scores")
    if found is None and _is_same(place):
        return Finding(0.0, 1, text=SAME)
    if found is None or isinstance(found, str):
        return None if found is None else lost(found)
    reference, candidate = found
    answer = _first_decided(
        place,
        len(reference),
        lambda count, confidence: non_inferiority(
            reference[:count], candidate[:count], margin=limit, confidence=confidence,
            clusters=place.arrays.get("clusters"),
        ),
    )  # fmt: skip
    if math.isnan(answer.measured):
        return lost("a score is not a number", answer.num_samples)
    low, high = answer.bounds
    change, allowed = format_change(-answer.measured, (-high, -low), scale=100.0, unit="pt", limit=limit)
    return Finding(
        measured=answer.measured,
        num_samples=answer.num_samples,
        name=f"{place.notes.get('metric', 'score')} of AMP against FP32",
        text=f"{change} against a margin of {allowed}",
        detail=f"{_basis(answer)}; FP32's seeds reach from {100 * reference.mean(axis=1).min():.4g} to "
        f"{100 * reference.mean(axis=1).max():.4g} %",
        interval=answer.bounds,
        decision=answer.decision,
        p_value=_over_looks(
            answer,
            p_value_drop(
                reference[: answer.num_seeds], candidate[: answer.num_seeds], margin=limit,
                clusters=place.arrays.get("clusters"),
            ),
        ),
    )  # fmt: skip


def excess_churn(place: Place, limit: float) -> Finding | None:
    """Predictions that AMP changes, beyond those that another seed changes; `limit` is the margin, as a share of samples."""
    found = pair(place, "predictions")
    if found is None and _is_same(place):
        return Finding(0.0, 1, text=SAME)
    if found is None or isinstance(found, str):
        return None if found is None else lost(found)
    reference, candidate = (np.asarray(side).astype(np.int64) for side in found)
    num_samples = reference.shape[1]
    answer = _first_decided(
        place,
        len(reference),
        lambda count, confidence: churn(
            reference[:count], candidate[:count], margin=limit, confidence=confidence,
            clusters=place.arrays.get("clusters"),
        ),
    )  # fmt: skip
    if math.isnan(answer.excess):
        return lost("churn between seeds needs two seeds", num_samples)
    change, allowed = format_change(answer.excess, answer.bounds, scale=100.0, unit="pt", limit=limit)
    none_seen = f"; no flip in {num_samples:,} samples bounds the flip rate at {100 * answer.flip_bound:.2g} %"
    return Finding(
        measured=answer.excess,
        num_samples=num_samples,
        name="predictions changed by AMP beyond those changed by another seed",
        text=f"{change} against a margin of {allowed}",
        detail=f"AMP changes {100 * answer.pairs:.3g} %, another seed {100 * answer.seeds:.3g} %"
        + ("" if answer.num_flips else none_seen),
        interval=answer.bounds,
        decision=answer.decision,
    )


def _over_looks(answer: Equivalence, p_value: float) -> float:
    """A p-value where the error was split over looks."""
    return min(1.0, p_value * (1.0 - CONFIDENCE) / (1.0 - answer.confidence))


def _basis(answer: Equivalence) -> str:
    looks = "" if answer.confidence < 0.951 else f", each bound at {100 * answer.confidence:.3g} %"
    return f"{answer.num_seeds} paired seeds x {answer.num_samples:,} samples{looks}"

"""Metrics of numbers that were sampled: their verdicts are three-valued and say how many samples would decide."""

from __future__ import annotations

import math

import numpy as np

from mpdeploy.errors import DataError
from mpdeploy.gates.evidence import Place
from mpdeploy.gates.finding import Finding, lost
from mpdeploy.gates.verdict import format_change, format_number
from mpdeploy.measure import accuracy
from mpdeploy.measure.bootstrap import median_ratio
from mpdeploy.measure.corpus import CorpusDraws, Worth, corpus_bounds
from mpdeploy.measure.latency import BLOCK_SIZE
from mpdeploy.measure.paired import PairedComparison, compare_paired, is_binary
from mpdeploy.measure.power import samples_to_decide_mean
from mpdeploy.measure.statistics import CONFIDENCE, FloatArray, clopper_pearson, decide_at_most, normal_quantile

LATENCY_FLOOR_MS = 0.02
"""A median slower by less than this does not fail, whatever its ratio: it is noise, and nobody waits for it."""


# -- the task's metric -------------------------------------------------------------------------------------------------


def paired_scores(place: Place) -> tuple[FloatArray, FloatArray] | str | None:
    """(baseline's, this place's) scores; a reason where they are not whole; None where the place has none."""
    pair = [place.arrays.get(name) for name in ("baseline_scores", "scores")]
    if pair[0] is None and pair[1] is None:
        return None
    if pair[0] is None or pair[1] is None:
        return f"{'baseline_scores' if pair[0] is None else 'scores'} are missing from the evidence"
    if pair[0].shape != pair[1].shape or pair[0].ndim != 1:
        return f"scores of shapes {list(pair[1].shape)} and {list(pair[0].shape)} cannot be paired"
    if not len(pair[0]):
        return "there are no samples"
    return np.asarray(pair[0], dtype=np.float64), np.asarray(pair[1], dtype=np.float64)


def score_name(place: Place) -> str:
    """The task metric's name, as the notes of the place give it."""
    return str(place.notes.get("metric", "score"))


def _score_unit(place: Place, scores: tuple[FloatArray, FloatArray]) -> tuple[str, float]:
    """(unit, its factor): points where a score is a share."""
    row = accuracy.METRICS.get(score_name(place))
    if row.unit == "pt" if row else all(is_binary(side) for side in scores):
        return "pt", 100.0
    return "", 1.0


def _compared(place: Place, scores: tuple[FloatArray, FloatArray], margin: float) -> PairedComparison | Finding:
    num_nan = int((~np.isfinite(scores[1])).sum()), int((~np.isfinite(scores[0])).sum())
    if any(num_nan):
        side, count = ("here", num_nan[0]) if num_nan[0] else ("in the baseline", num_nan[1])
        return lost(f"{count:,} of {len(scores[0]):,} scores {side} are not numbers", len(scores[0]))
    clusters = place.arrays.get("clusters")
    if clusters is not None and len(clusters) != len(scores[0]):
        return lost(f"{len(clusters)} cluster numbers for {len(scores[0])} scores", len(scores[0]))
    return compare_paired(*scores, margin=margin, clusters=clusters)


def score_drop(place: Place, limit: float) -> Finding | None:
    """How much lower the mean score is than the baseline's on the same samples; `limit` is the margin."""
    scores = paired_scores(place)
    if scores is None or isinstance(scores, str):
        return None if scores is None else lost(scores)
    found = _compared(place, scores, limit)
    if isinstance(found, Finding):
        return found
    unit, scale = _score_unit(place, scores)
    return _finding_of_drop(score_name(place), found, limit, 1.0, scale, unit)


def relative_score_drop(place: Place, limit: float) -> Finding | None:
    """The drop as a share of the baseline's mean score (0.01: at least 99 % of it)."""
    scores = paired_scores(place)
    if scores is None or isinstance(scores, str):
        return None if scores is None else lost(scores)
    reference = abs(math.fsum(scores[0]) / len(scores[0]))
    if not math.isfinite(reference) or reference == 0.0:
        return lost("the baseline's mean score is not a number that a share can be taken of", len(scores[0]))
    found = _compared(place, scores, limit * reference)
    if isinstance(found, Finding):
        return found
    name = f"{score_name(place)} relative to its baseline"
    return _finding_of_drop(name, found, limit, reference, 100.0, "%")


def _finding_of_drop(
    name: str, found: PairedComparison, limit: float, reference: float, scale: float, unit: str
) -> Finding:
    drop, low, high = found.drop / reference, found.bounds[0] / reference, found.bounds[1] / reference
    change, allowed = format_change(-drop, (-high, -low), scale=scale, unit=unit, limit=limit)
    return Finding(
        measured=drop,
        num_samples=found.num_samples,
        name=name,
        text=f"{change} against a margin of {allowed}",
        detail=f"{found.num_lost:,} worse and {found.num_gained:,} better of {found.num_samples:,}, {found.method}",
        interval=(low, high),
        decision=found.decision,
        samples_to_decide=found.samples_to_decide,
        p_value=found.p_value_fail,
    )


def corpus_drop(place: Place, limit: float) -> Finding | None:
    """How much lower a corpus metric (F1, BLEU, mAP: one number over all samples) is than the baseline's."""
    names = ("corpus_draws", "corpus_left_out", "baseline_corpus_draws", "baseline_corpus_left_out")
    keys = ("corpus_value", "baseline_corpus_value", "corpus_worth_largest", "corpus_worth_typical")
    arrays = [place.arrays.get(name) for name in names]
    facts = [place.facts.get(key) for key in keys]
    if all(item is None for item in (*arrays, *facts[:2])):
        return None
    here, here_left, there, there_left = arrays
    n = int(place.facts.get("corpus_num_samples", 0))
    num_units = int(place.facts.get("corpus_num_units", n))
    if here is None or there is None or here_left is None or there_left is None or None in facts:
        return lost("the corpus metric's values or resamples are not whole in the evidence", n)
    if here.shape != there.shape or here_left.shape != there_left.shape:
        return lost("the corpus metric's resamples here and in the baseline are not the same ones", n)
    try:
        value, baseline_value, largest, typical = (float(item) for item in facts if item is not None)
        found = corpus_bounds(
            CorpusDraws(baseline_value, there, there_left, num_units),
            CorpusDraws(value, here, here_left, num_units),
            Worth(largest, typical, place.facts.get("corpus_is_smooth") is True),
        )
    except (DataError, ValueError, TypeError) as error:
        return lost(str(getattr(error, "message", error)).rstrip("."), n)
    decision = decide_at_most(found.bounds, limit)
    change, allowed = format_change(-found.drop, (-found.bounds[1], -found.bounds[0]), scale=1.0, unit="", limit=limit)
    deviation = max(found.deviation, (found.bounds[1] - found.drop) / normal_quantile(CONFIDENCE))
    needed = samples_to_decide_mean(found.drop, deviation * math.sqrt(n), limit)
    detail = f"{format_number(value)} against {format_number(baseline_value)}, {len(here):,} resamples"
    if found.num_changed is not None:
        seen = f"about {found.num_changed} samples" if found.num_changed else "no sample"
        detail += f"; {seen} changed, so what unseen ones may be worth is allowed for"
    return Finding(
        measured=found.drop,
        num_samples=n,
        name=str(place.notes.get("corpus_metric", "corpus metric")),
        text=f"{change} against a margin of {allowed}",
        detail=detail,
        interval=found.bounds,
        decision=decision,
        samples_to_decide=needed if decision == "inconclusive" else None,
        p_value=found.p_value_above(limit),
    )


def flips(place: Place, limit: float) -> Finding | None:
    """Share of samples whose predicted class changed, with exact bounds: none seen in n leaves 3/n possible."""
    pair = [place.arrays.get(name) for name in ("baseline_predictions", "predictions")]
    if pair[0] is None and pair[1] is None:
        return None
    if pair[0] is None or pair[1] is None or pair[0].shape != pair[1].shape or not len(pair[0]):
        return lost("predictions here and in the baseline are not the same number of samples")
    n = len(pair[0])
    # A prediction of -1 stands for an answer with a NaN in it: it equals nothing.
    changed = (pair[0] != pair[1]) | (pair[1] == accuracy.LOST)
    count = int(changed.reshape(n, -1).any(axis=1).sum())
    share, bounds = count / n, clopper_pearson(count, n)
    clusters = place.arrays.get("clusters")
    if clusters is not None and len(clusters) == n:
        flipped = changed.reshape(n, -1).any(axis=1).astype(np.float64)
        bounds = compare_paired(flipped, np.zeros(n), margin=limit, clusters=clusters).bounds
        bounds = (max(0.0, bounds[0]), min(1.0, bounds[1]))
    decision = decide_at_most(bounds, limit)
    if count:
        needed = samples_to_decide_mean(share, math.sqrt(share * (1.0 - share)), limit)
    else:
        needed = math.ceil(math.log(0.05) / math.log1p(-limit)) if 0.0 < limit < 1.0 else None
    low, high = (100.0 * bound for bound in bounds)
    return Finding(
        measured=share,
        num_samples=n,
        text=f"{100.0 * share:.3g} % [{low:.2g}, {high:.2g}] against a limit of {100.0 * limit:g} %",
        detail=f"{count:,} of {n:,} predictions changed",
        interval=bounds,
        decision=decision,
        samples_to_decide=needed if decision == "inconclusive" else None,
    )


# -- latency -----------------------------------------------------------------------------------------------------------


def latency_ratio(place: Place, limit: float) -> Finding | None:
    """Median latency here over the baseline's; an excess below `LATENCY_FLOOR_MS` never fails."""
    pair = [place.arrays.get(name) for name in ("latency_a_ms", "latency_b_ms")]
    if pair[0] is None and pair[1] is None:
        return None
    if pair[0] is None or pair[1] is None:
        return lost(f"{'latency_a_ms' if pair[0] is None else 'latency_b_ms'} is missing from the evidence")
    n = len(pair[0])
    block_size = int(place.facts.get("latency_block_size", BLOCK_SIZE if n % BLOCK_SIZE == 0 else 1))
    try:
        found = median_ratio(pair[0], pair[1], block_size=block_size)
    except DataError as error:
        return lost(error.message.rstrip("."), n)
    median_a, median_b = float(np.median(pair[0])), float(np.median(pair[1]))
    low, high = found.bounds
    decision = decide_at_most(found.bounds, limit)
    if decision != "pass" and (high - limit) * median_a <= LATENCY_FLOOR_MS:
        decision = "pass"
    elif decision == "fail" and (low - limit) * median_a <= LATENCY_FLOOR_MS:
        decision = "inconclusive"
    detail = f"{median_b:.4g} ms against {median_a:.4g} ms"
    includes_a, includes_b = (place.facts.get(f"latency_includes_{side}") for side in "ab")
    if includes_a != includes_b:
        detail += f"; they include different things: '{includes_b}' and '{includes_a}'"
    elif includes_b:
        detail += f"; includes {includes_b}"
    return Finding(
        measured=found.ratio,
        num_samples=n,
        text=f"{found.ratio:.3f} [{low:.3f}, {high:.3f}] against a limit of {limit:g}",
        detail=detail,
        interval=found.bounds,
        decision=decision,
        p_value=found.p_value_above(limit),
    )

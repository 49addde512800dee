"""What a gate can put a limit on: one row a metric. Adding one is one function and one row.

A function looks at one place and answers None where that place does not have the metric at all. Where it has a part of
it, or the number is NaN, it answers a finding with NaN: what was measured and lost fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from mpdeploy.gates import parity, sampled
from mpdeploy.gates.evidence import Place
from mpdeploy.gates.finding import Finding, MetricRow, lost
from mpdeploy.gates.verdict import format_number
from mpdeploy.measure.drift import SAMPLE_FIELDS, OutputDrift

# -- drift -------------------------------------------------------------------------------------------------------------


def _per_output(
    place: Place, value: Callable[[OutputDrift], float], combine: Callable[[Iterable[float]], float]
) -> Finding | None:
    """The outputs' numbers combined; NaN where any of them is, or where its evidence is not whole."""
    names = sorted({key.split("/", 1)[1].rsplit("/", 1)[0] for key in place.arrays if key.startswith("drift/")})
    if not names:
        return None
    found: dict[str, float] = {}
    num_samples = 0
    for name in names:
        fields = [place.arrays.get(f"drift/{name}/{item}") for item in SAMPLE_FIELDS]
        if any(field is None or field.ndim != 1 for field in fields):
            return lost(f"the evidence of output '{name}' lacks a field of {', '.join(SAMPLE_FIELDS)}")
        drift = OutputDrift(*(np.asarray(field, dtype=np.float64) for field in fields))
        lengths = {len(getattr(drift, item)) for item in SAMPLE_FIELDS}
        if lengths == {0} or len(lengths) != 1:
            return lost(f"output '{name}' was measured on {sorted(lengths)} samples")
        num_samples = lengths.pop()
        found[name] = math.nan if _has_nan(drift) else value(drift)
    nan = [name for name, number in found.items() if math.isnan(number)]
    if nan:
        return lost(f"NaN in output '{nan[0]}'", num_samples)
    measured = combine(found.values())
    worst = [name for name, number in found.items() if number == measured]
    return Finding(measured, num_samples, detail=f"worst output: {worst[0]}" if worst and len(found) > 1 else "")


def _has_nan(drift: OutputDrift) -> bool:
    return any(bool(np.isnan(getattr(drift, item)).any()) for item in SAMPLE_FIELDS)


def _rel_l2(place: Place, limit: float) -> Finding | None:
    return _per_output(place, lambda drift: drift.rel_l2, max)


def _max_abs(place: Place, limit: float) -> Finding | None:
    return _per_output(place, lambda drift: float(drift.max_abs.max()), max)


def _cosine(place: Place, limit: float) -> Finding | None:
    return _per_output(place, lambda drift: drift.cosine, min)


def _worst_sample_rel_l2(place: Place, limit: float) -> Finding | None:
    def worst_of(drift: OutputDrift) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.sqrt(drift.sq_error / drift.sq_golden)
        ratio = np.where(drift.num_nonfinite > 0, np.inf, np.where(drift.sq_error == 0.0, 0.0, ratio))
        return float(ratio.max())

    return _per_output(place, worst_of, max)


def _num_nonfinite(place: Place, limit: float) -> Finding | None:
    found = _per_output(place, lambda drift: float(drift.num_nonfinite.sum()), math.fsum)
    if found is None or math.isnan(found.measured):
        return found
    if found.measured == 0.0:
        return replace(found, detail="")
    counts = [
        array for key, array in place.arrays.items() if key.startswith("drift/") and key.endswith("/num_nonfinite")
    ]
    samples = np.unique(np.concatenate([np.flatnonzero(array) for array in counts]))
    ids = place.arrays.get("ids")
    first = ids[samples[0]] if ids is not None and len(ids) == found.num_samples else samples[0]
    return replace(found, detail=f"in {len(samples):,} of {found.num_samples:,} samples, first in sample {first}")


# -- facts -------------------------------------------------------------------------------------------------------------


def _number(value: Any) -> float:
    """A fact as a number; NaN where it is none. A list counts its items."""
    if isinstance(value, list | tuple):
        return float(len(value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        try:
            return float(value) if isinstance(value, str) else math.nan  # "inf" and "nan" are written as strings
        except ValueError:
            return math.nan
    return float(value)


def _fact(name: str) -> Callable[[Place, float], Finding | None]:
    """The finder of a fact of that name."""

    def find(place: Place, limit: float) -> Finding | None:
        if name not in place.facts:
            return None
        value = place.facts[name]
        number = _number(value)
        detail = "" if not math.isnan(number) else f"the fact '{name}' is {value!r}"
        if isinstance(value, list | tuple) and value:
            detail = ", ".join(map(str, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "")
        return Finding(number, 1, detail=detail)

    return find


def _size_ratio(place: Place, limit: float) -> Finding | None:
    if "size_ratio" in place.facts:
        return Finding(_number(place.facts["size_ratio"]), 1)
    if "baseline_size_bytes" not in place.facts:
        return None
    here, there = _number(place.facts.get("size_bytes")), _number(place.facts["baseline_size_bytes"])
    text = f"{format_number(here)} bytes against {format_number(there)} bytes"
    return Finding(here / there if there > 0 else math.nan, 1, detail=text)


METRICS: dict[str, MetricRow] = {
    "num_nonfinite": MetricRow(_num_nonfinite, "values", "NaN and infinities where the baseline's value is finite"),
    "rel_l2": MetricRow(_rel_l2, "", "||candidate - golden|| / ||golden|| over all samples, worst output"),
    "worst_sample_rel_l2": MetricRow(_worst_sample_rel_l2, "", "the same of the single worst sample and output"),
    "max_abs": MetricRow(_max_abs, "", "largest |candidate - golden| of any value"),
    "cosine": MetricRow(_cosine, "", "cosine between all values of candidate and golden, worst output", "smallest"),
    "score_drop": MetricRow(
        sampled.score_drop, "share", "drop of the task's mean score: non-inferiority on paired samples"
    ),
    "relative_score_drop": MetricRow(
        sampled.relative_score_drop, "share of the baseline's score", "the same relative to the baseline"
    ),
    "corpus_drop": MetricRow(
        sampled.corpus_drop, "", "drop of the corpus metric: one number over all samples, resampled"
    ),
    "flips": MetricRow(sampled.flips, "share", "share of samples whose predicted class changed"),
    "latency_ratio": MetricRow(sampled.latency_ratio, "", "median latency over the baseline's, measured in turns"),
    "noise_rerun_rel_l2": MetricRow(
        _fact("noise_rerun_rel_l2"), "", "the engine against itself, run again on the same samples"
    ),
    "noise_rebuild_rel_l2": MetricRow(
        _fact("noise_rebuild_rel_l2"), "", "the engine against itself, built again from the same model"
    ),
    "excess_zero_gradients": MetricRow(
        _fact("excess_zero_gradients"),
        "share",
        "gradients that are exactly zero in mixed precision alone",
        needs_run=False,
    ),
    "parity_nll": MetricRow(
        parity.nll, "share of FP32's loss", "held-out loss of AMP against FP32 over paired seeds: equivalence (TOST)"
    ),
    "parity_nll_nats": MetricRow(parity.nll_nats, "nats", "the same with the margin in nats"),
    "parity_score_drop": MetricRow(
        parity.score_drop, "share", "drop of the task's mean score under AMP over paired seeds: non-inferiority"
    ),
    "parity_churn": MetricRow(
        parity.excess_churn, "share", "predictions that AMP changes beyond those that another seed changes"
    ),
    "kept_in_half": MetricRow(_fact("kept_in_half"), "nodes", "kept nodes that really run in half", needs_run=False),
    "kept_unaccounted": MetricRow(
        _fact("kept_unaccounted"), "nodes", "kept nodes that no layer of the engine answers for", needs_run=False
    ),
    "half_in_fp32": MetricRow(_fact("half_in_fp32"), "nodes", "half nodes that really run in FP32", needs_run=False),
    "num_kept": MetricRow(_fact("num_kept"), "nodes", "nodes that stay FP32", needs_run=False),
    "size_bytes": MetricRow(_fact("size_bytes"), "bytes", "size of the model or engine file", needs_run=False),
    "size_ratio": MetricRow(_size_ratio, "", "that size over the baseline's", needs_run=False),
}

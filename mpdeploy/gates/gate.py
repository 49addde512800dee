"""Deciding: gates and evidence in, verdicts and gate.json out. The same evidence gives the same bytes on any machine.

Every gate must pass, so passing needs no correction for how many there are (intersection-union test); only the claim
that some gate failed is corrected, by Holm's method.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from mpdeploy.config import Gate
from mpdeploy.errors import ConfigError, closest_names
from mpdeploy.gates.evidence import HARNESS_VERSION, Evidence, Place
from mpdeploy.gates.finding import Finding, MetricRow
from mpdeploy.gates.metrics import METRICS
from mpdeploy.gates.place_json import place_json
from mpdeploy.gates.schema import GATE_SCHEMA
from mpdeploy.gates.verdict import (
    SEVERITY,
    Verdict,
    VerdictName,
    format_apart,
    format_count,
    format_number,
    overall,
    stable_json,
)
from mpdeploy.measure.statistics import CONFIDENCE, holm

__all__ = [
    "GATE_SCHEMA",
    "METRICS",
    "SEVERITY",
    "Verdict",
    "VerdictName",
    "decide",
    "gate_json",
    "mlperf_99",
    "mlperf_999",
    "not_applied",
    "overall",
]


TRAINING_BASELINE = "fp32-reference"
"""What `parity` is compared with; every later place is compared with `golden`."""


def mlperf_99(at: str = "*") -> Gate:
    """MLPerf inference's usual accuracy rule: at least 99 % of the FP32 model's score."""
    return Gate(id="mlperf-99", metric="relative_score_drop", limit=0.01, at=at)


def mlperf_999(at: str = "*") -> Gate:
    """MLPerf inference's high-accuracy rule: at least 99.9 % of the FP32 model's score."""
    return Gate(id="mlperf-999", metric="relative_score_drop", limit=0.001, at=at)


def decide(gates: Iterable[Gate], evidence: Evidence) -> list[Verdict]:
    """One verdict for each gate and each place that has what it asks for, in the order of gates, then of places.

    A missing metric is never a pass: a gate that finds its metric nowhere fails, and so does a place that lacks what
    its siblings have. The one exception is a gate for a precision that the run has no model of (see `not_applied`).

    Raises:
        ConfigError: a gate names a metric that does not exist, or takes its limit from noise that is not measured.
    """
    verdicts: list[Verdict] = []
    for gate in gates:
        if gate.metric not in METRICS:
            raise ConfigError(
                f"Gate '{gate.id}' names the metric '{gate.metric}', which does not exist.",
                hint=f"closest names: {closest_names(gate.metric, METRICS)}",
            )
        if gate.times_noise is not None and gate.metric not in _FLOORS:
            raise ConfigError(
                f"Gate '{gate.id}' takes its limit from noise, and no noise floor of '{gate.metric}' is measured.",
                hint=f"times_noise is for {', '.join(_FLOORS)}",
            )
        row = METRICS[gate.metric]
        found = [verdict for place in _parts(gate, evidence) if (verdict := _verdict(gate, row, place)) is not None]
        found += _lost_alone(gate, row, evidence, found)
        if not found and not _has_no_such_precision(gate, evidence):
            found = [_nowhere(gate, evidence)]
        verdicts += found
    return verdicts + [_empty(place) for place in evidence.places.values() if _is_empty(place)]


def not_applied(gates: Iterable[Gate], evidence: Evidence) -> list[dict[str, str]]:
    """Gates for a precision that no model of this run has: they forbid nothing here, and the record says so."""
    return [
        {"id": gate.id, "reason": f"no place of this run has a model in {gate.precision}"}
        for gate in gates
        if _has_no_such_precision(gate, evidence)
    ]


def gate_json(
    verdicts: Sequence[Verdict], evidence: Evidence, pipeline_name: str, gates: Iterable[Gate] = ()
) -> dict[str, Any]:
    """All of gate.json, see `GATE_SCHEMA`. It holds no times: deciding again gives the same bytes.

    Args:
        verdicts: from `decide`.
        evidence: what they rest on.
        pipeline_name: of the run.
        gates: those that were decided, to list the ones that did not apply.
    """
    undecided = [verdict for verdict in verdicts if verdict.verdict == "inconclusive" and not verdict.advisory]
    needed = [verdict.samples_to_decide for verdict in undecided]
    value: dict[str, Any] = stable_json(
        {
            "schema": 1,
            "harness": HARNESS_VERSION,
            "pipeline": pipeline_name,
            "verdict": overall(verdicts),
            "unvalidated": [at for at, place in evidence.places.items() if place.status != "measured"],
            "verdicts": [verdict.to_json() for verdict in verdicts],
            "not_applied": not_applied(gates, evidence),
            "failure_claim": _failure_claim(verdicts),
            "samples_to_decide": max((count for count in needed if count is not None), default=None),
            "places": {at: place_json(place) for at, place in evidence.places.items()},
            "digests": dict(evidence.digests),
            "environment": dict(evidence.environment),
        }
    )
    return value


# -- one gate at one place ---------------------------------------------------------------------------------------------


def _places(gate: Gate, evidence: Evidence) -> list[Place]:
    return [
        place
        for at, place in evidence.places.items()
        if fnmatch.fnmatchcase(at, gate.at) and gate.precision in (None, place.precision)
    ]


def _parts(gate: Gate, evidence: Evidence) -> list[Place]:
    """The gate's places, or their slices where it names some. A place that could not run here stays whole."""
    if gate.slice is None:
        return _places(gate, evidence)
    parts = []
    for place in _places(gate, evidence):
        names = [name for name in place.slices if fnmatch.fnmatchcase(name, gate.slice)]
        parts += [place.sliced(name) for name in names] if place.status == "measured" else [place]
    return parts


def _has_no_such_precision(gate: Gate, evidence: Evidence) -> bool:
    if gate.precision is None:
        return False
    # A trained model that is compared with its FP32 twin (`parity`) is not yet a model that ships in that precision.
    of_precision = [place for place in _places(gate, evidence) if place.baseline != TRAINING_BASELINE]
    return not of_precision and bool(_places(gate.model_copy(update={"precision": None}), evidence))


def _verdict(gate: Gate, row: MetricRow, place: Place) -> Verdict | None:
    if place.status != "measured" and row.needs_run:
        reason = str(place.notes.get("unvalidated", "it was built here and cannot run here"))
        message = f"{gate.metric} on `{place.at}`: unvalidated, {reason}"
        return Verdict(gate.id, place.at, gate.metric, "unvalidated", None, gate.limit, None, 0, message, gate.advisory)
    limit, floor = limit_at(gate, place)
    finding = row.find(place, limit)
    if finding is None:
        return None
    verdict = _decision(row, finding, limit)
    if floor:
        finding = replace(finding, detail="; ".join(filter(None, (finding.detail, floor))))
    return Verdict(
        id=gate.id,
        at=place.at,
        metric=gate.metric,
        verdict=verdict,
        measured=finding.measured,
        limit=limit,
        interval=finding.interval,
        num_samples=finding.num_samples,
        message=_message(gate.metric, limit, finding, place, verdict),
        advisory=gate.advisory,
        samples_to_decide=finding.samples_to_decide if verdict == "inconclusive" else None,
        p_value=finding.p_value,
        slice=place.slice,
    )


def _decision(row: MetricRow, finding: Finding, limit: float) -> VerdictName:
    if math.isnan(finding.measured):
        return "fail"
    if finding.decision is not None:
        return finding.decision
    kept = finding.measured <= limit if row.limit_is == "largest" else finding.measured >= limit
    return "pass" if kept else "fail"


_FLOORS = {
    "rel_l2": ("noise_rerun_rel_l2", "noise_rebuild_rel_l2", "noise_tf32_rel_l2"),
    "score_drop": ("noise_seeds_score",),
}
"""Metric -> facts that say how far it moves when nothing was changed."""


def limit_at(gate: Gate, place: Place) -> tuple[float, str]:
    """The gate's limit at a place, raised to a multiple of the noise floor where the gate asks for it, and what was done."""
    if gate.times_noise is None:
        return gate.limit, ""
    found = {name: float(place.facts[name]) for name in _FLOORS[gate.metric] if name in place.facts}
    floors = {name: value for name, value in found.items() if math.isfinite(value) and value > 0.0}
    if not floors:
        return gate.limit, "no noise floor above zero was measured here, so the limit is the declared one"
    largest = max(floors, key=lambda name: floors[name])
    limit = gate.times_noise * floors[largest]
    text = f"{gate.times_noise:g} times the noise floor {format_number(floors[largest])} ({largest})"
    if limit <= gate.limit:
        return gate.limit, f"{text} is less than the declared limit"
    return limit, f"the limit is {text}"


def _message(metric: str, limit: float, finding: Finding, place: Place, verdict: VerdictName) -> str:
    numbers = format_apart(finding.measured, limit), format_apart(limit, finding.measured)
    text = finding.text or f"{numbers[0]} against a limit of {numbers[1]}"
    needed = ""
    if verdict == "inconclusive" and finding.samples_to_decide is not None:
        needed = f", ~{format_count(finding.samples_to_decide)} samples would decide"
    detail = f" ({finding.detail})" if finding.detail else ""
    where = f"`{place.at}`" + (f", slice `{place.slice}`" if place.slice else "")
    return f"{finding.name or metric} on {where}: {text}: {verdict}{needed}{detail}"


def _nowhere(gate: Gate, evidence: Evidence) -> Verdict:
    matched = [place.at for place in _places(gate, evidence)]
    if matched and gate.slice is not None:
        known = sorted({name for place in evidence.places.values() for name in place.slices})
        reason = f"no slice '{gate.slice}' with this metric: the slices of this run are {', '.join(known) or 'none'}"
    elif matched:
        reason = f"was measured at none of {', '.join(matched)}"
    else:
        reason = f"applies nowhere: the places of this run are {', '.join(evidence.places) or 'none'}"
    message = f"{gate.metric} on `{gate.at}`: {reason}: fail (a missing metric is never a pass)"
    return Verdict(gate.id, gate.at, gate.metric, "fail", None, gate.limit, None, 0, message, gate.advisory)


_OF_ANSWERS = ("score_drop", "relative_score_drop", "corpus_drop", "flips", "num_nonfinite", "rel_l2",
               "worst_sample_rel_l2", "max_abs", "cosine")  # fmt: skip
"""Metrics of what a model answered: every place that was compared with the golden answers has the same ones."""


def _siblings(row_name: str, place: Place, evidence: Evidence) -> list[Place]:
    """The other places that have a metric if this one has it: all that answered, for latency and facts those of its kind."""
    kind = place.at.split("/")[0]
    return [
        other
        for other in evidence.places.values()
        if other.at != place.at
        and other.status == "measured"
        and other.baseline == place.baseline
        and not other.at.startswith("parity")
        and (other.at.split("/")[0] == kind or row_name in _OF_ANSWERS)
    ]


def _lost_alone(gate: Gate, row: MetricRow, evidence: Evidence, found: Sequence[Verdict]) -> list[Verdict]:
    """A failure for each place that the gate covers and that lacks a metric (or a slice) which its siblings have."""
    decided = {verdict.at for verdict in found}
    lost = []
    for place in _places(gate, evidence):
        if place.at in decided or place.status != "measured" or _is_empty(place) or place.at.startswith("parity"):
            continue  # an empty place fails by itself; `parity` and `parity/...` are each of their own kind
        siblings = _siblings(gate.metric, place, evidence)
        if gate.slice is not None:
            siblings = [
                each.sliced(name) for each in siblings for name in each.slices if fnmatch.fnmatchcase(name, gate.slice)
            ]
        having = [each.at for each in siblings if row.find(each, gate.limit) is not None]
        if having:
            part = f", slice `{gate.slice}`" if gate.slice else ""
            message = (
                f"{gate.metric} on `{place.at}`{part}: was not measured there, while {having[0]} has it: "
                "fail (a missing metric is never a pass)"
            )
            lost.append(
                Verdict(gate.id, place.at, gate.metric, "fail", None, gate.limit, None, 0, message, gate.advisory)
            )
    return lost


def _is_empty(place: Place) -> bool:
    return place.status == "measured" and not place.facts and not any(len(array) for array in place.arrays.values())


def _empty(place: Place) -> Verdict:
    message = f"`{place.at}` is listed as measured and its evidence holds no number: fail"
    return Verdict("measured", place.at, "num_numbers", "fail", 0.0, 1.0, None, 0, message)


# -- gate.json ---------------------------------------------------------------------------------------------------------


def _failure_claim(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What may be claimed of the gates that failed on a sample, when so many were looked at."""
    sampled = [verdict for verdict in verdicts if verdict.p_value is not None and not verdict.advisory]
    adjusted = holm({verdict.key: float(verdict.p_value or 0.0) for verdict in sampled})
    failed = [verdict.key for verdict in sampled if verdict.verdict == "fail"]
    kept = [name for name in failed if adjusted[name] < 1.0 - CONFIDENCE]
    if failed:
        still = ", ".join(kept) if kept else "none of them"
        statement = (
            f"{len(failed)} of {len(sampled)} gates on sampled numbers failed, each at 95 %; "
            f"claimed jointly (Holm): {still}."
        )
    else:
        statement = f"None of {len(sampled)} gates on sampled numbers failed."
    return {
        "num_sampled": len(sampled),
        "num_failed": len(failed),
        "num_failed_corrected": len(kept),
        "adjusted_p_values": {name: adjusted[name] for name in failed},
        "statement": statement,
    }

"""What the measured sections of the page show: verdicts, drift, accuracy, noise, latency."""

from __future__ import annotations

import math
from typing import Any

from mpdeploy.gates.evidence import Evidence
from mpdeploy.gates.metrics import METRICS
from mpdeploy.gates.verdict import format_apart, format_number
from mpdeploy.report import charts
from mpdeploy.report.reading import SYMBOLS, Json, dicts, measured_text, number, worst_first
from mpdeploy.run_dir import RunDir


def verdict_rows(gate: Json) -> list[dict[str, Any]]:
    """The table of verdicts, worst first."""
    rows = []
    for verdict in worst_first(gate["verdicts"]):
        if verdict["verdict"] == "unvalidated":
            continue
        measured, limit = number(verdict["measured"]), number(verdict["limit"])
        low_high = verdict["interval"] and (number(verdict["interval"][0]), number(verdict["interval"][1]))
        row = METRICS.get(verdict["metric"])
        rows.append(
            {
                **verdict,
                "symbol": SYMBOLS[verdict["verdict"]],
                "measured_text": measured_text(verdict),
                "limit_text": format_apart(limit, measured),
                "limit_is": "at least" if row and row.limit_is == "smallest" else "at most",
                "strip": charts.verdict_strip(
                    measured,
                    low_high or None,
                    limit,
                    verdict=verdict["verdict"],
                    limit_is=row.limit_is if row else "largest",
                    label=verdict["message"],
                ),
            }
        )
    return rows


def waiting_lines(gate: Json) -> list[str]:
    """A line for each place whose gates wait for a machine that can run it."""
    waiting: dict[str, list[Json]] = {}
    for verdict in gate["verdicts"]:
        if verdict["verdict"] == "unvalidated":
            waiting.setdefault(verdict["at"], []).append(verdict)
    lines = []
    for at, found in waiting.items():
        names = list(dict.fromkeys(f"{each['id']}" for each in found))
        reason = found[0]["message"].partition("unvalidated, ")[2]
        lines.append(f"`{at}`: {len(found)} gates are unvalidated ({', '.join(names)}). {reason}")
    return lines


def _after_name(message: str) -> str:
    """A verdict's message without the metric and the place, for a table that names them."""
    return message.partition(": ")[2] or message


def _strip(verdict: Json, limit_is: str) -> str:
    """A decided verdict's number, interval and limit; empty where it has no interval."""
    if not verdict["interval"]:
        return ""
    low, high = (number(bound) for bound in verdict["interval"])
    return charts.verdict_strip(
        number(verdict["measured"]), (low, high), number(verdict["limit"]), verdict=verdict["verdict"],
        limit_is=limit_is, label=verdict["message"],
    )  # fmt: skip


def drift_rows(gate: Json) -> dict[str, Any]:
    """The waterfall: one row a place and output on one logarithmic axis, each with the limit that holds there."""
    limits: dict[str, float] = {}
    for verdict in gate["verdicts"]:
        if verdict["metric"] == "rel_l2" and not verdict.get("slice"):
            limits[verdict["at"]] = min(limits.get(verdict["at"], math.inf), number(verdict["limit"]))
    cells = [
        (at, name, {key: number(value) for key, value in output.items()})
        for at, place in gate["places"].items()
        for name, output in place.get("drift", {}).items()
    ]
    known = [limit for limit in limits.values() if math.isfinite(limit)]
    decades = charts.decades_of([output["rel_l2"] for _, _, output in cells] + known)
    rows = [
        {
            "at": at,
            "output": name,
            "precision": gate["places"][at]["precision"],
            "rel_l2": format_number(output["rel_l2"]),
            "max_abs": format_number(output["max_abs"]),
            "cosine": f"{output['cosine']:.9f}".rstrip("0").rstrip(".") if math.isfinite(output["cosine"]) else "NaN",
            "num_nonfinite": f"{output['num_nonfinite']:,.0f}",
            "lost": output["num_nonfinite"] > 0 or output["rel_l2"] > limits.get(at, math.inf),
            "strip": charts.log_strip(
                [(name, output["rel_l2"])],
                limits.get(at),
                decades,
                label=f"rel_l2 of {name} at {at}: {format_number(output['rel_l2'])}"
                + (f", limit {format_number(limits[at])}" if at in limits else ""),
            ),
        }
        for at, name, output in cells
    ]
    return {"rows": rows, "axis": charts.decade_labels(decades)}


def accuracy_rows(gate: Json) -> list[dict[str, Any]]:
    """Scores and flips by place, with the non-inferiority interval drawn where a gate decided it."""
    decided = {
        verdict["at"]: verdict
        for verdict in gate["verdicts"]
        if verdict["metric"] in ("score_drop", "relative_score_drop") and not verdict.get("slice")
    }
    rows = []
    for at, place in gate["places"].items():
        if "scores" not in place and "flips" not in place:
            continue
        scores, flips, verdict = place.get("scores"), place.get("flips"), decided.get(at)
        strip = "" if verdict is None else _strip(verdict, "largest")
        p_value = None if scores is None else scores["mcnemar_p_value"]
        rows.append(
            {
                "at": at,
                "baseline": place["baseline"],
                "scores": scores,
                "mean": "" if scores is None else f"{number(scores['mean']):.5g}",
                "baseline_mean": "" if scores is None else f"{number(scores['baseline_mean']):.5g}",
                "flips": flips,
                "mcnemar": "" if p_value is None else f"{number(p_value):.3g}",
                "strip": strip,
                "message": "" if verdict is None else _after_name(verdict["message"]),
                "verdict": "" if verdict is None else verdict["verdict"],
            }
        )
    return rows


MAX_SLICE_ROWS = 80


def slice_rows(gate: Json) -> dict[str, Any]:
    """Every slice at every place, the largest drop first, then the largest drift; and each slice where it is worst."""
    rows = []
    failed = {
        (verdict["at"], verdict.get("slice"))
        for verdict in gate["verdicts"]
        if verdict["verdict"] == "fail" and not verdict["advisory"]
    }
    for at, place in gate["places"].items():
        for name, found in place.get("slices", {}).items():
            scores, drift = found.get("scores"), number(found.get("rel_l2"))
            drop = number(scores["baseline_mean"]) - number(scores["mean"]) if scores else 0.0
            rows.append(
                {
                    "at": at,
                    "name": name,
                    "num_samples": f"{found['num_samples']:,}",
                    "mean": "" if scores is None else f"{number(scores['mean']):.4g}",
                    "baseline_mean": "" if scores is None else f"{number(scores['baseline_mean']):.4g}",
                    "flips": found["flips"]["count"] if "flips" in found else "",
                    "rel_l2": "" if math.isnan(drift) else format_number(drift),
                    "failed": (at, name) in failed,
                    "order": (-drop, -drift if math.isfinite(drift) else -math.inf),
                }
            )
    rows.sort(key=lambda row: (not row["failed"], row["order"]))
    worst: dict[str, dict[str, Any]] = {}
    for row in rows:
        worst.setdefault(str(row["name"]), row)
    return {
        "worst": list(worst.values())[:MAX_SLICE_ROWS],
        "rows": rows[:MAX_SLICE_ROWS],
        "more": max(0, len(rows) - MAX_SLICE_ROWS),
    }


def corpus_rows(gate: Json) -> list[dict[str, Any]]:
    """The corpus metric of each place, with its interval against the margin where a gate decided it."""
    decided = {verdict["at"]: verdict for verdict in gate["verdicts"] if verdict["metric"] == "corpus_drop"}
    rows = []
    for at, place in gate["places"].items():
        found, verdict = place.get("corpus"), decided.get(at)
        if found is None:
            continue
        rows.append(
            {
                "at": at,
                "metric": found["metric"],
                "value": f"{number(found['value']):.5g}",
                "baseline_value": f"{number(found['baseline_value']):.5g}",
                "baseline": place["baseline"],
                "verdict": "" if verdict is None else verdict["verdict"],
                "strip": "" if verdict is None else _strip(verdict, "largest"),
                "message": "no gate asks for it (corpus_drop does)"
                if verdict is None
                else _after_name(verdict["message"]),
            }
        )
    return rows


_NOISE = {
    "noise_rerun_rel_l2": "run again",
    "noise_rebuild_rel_l2": "built again",
    "noise_tf32_rel_l2": "TF32 for FP32",
}


def noise_rows(gate: Json) -> list[dict[str, Any]]:
    """What moves at each place when nothing was changed, beside what was measured and the limit that holds there."""
    rows = []
    for at, place in gate["places"].items():
        floors = {name: number(place["facts"][name]) for name in _NOISE if name in place["facts"]}
        if not floors:
            continue
        limits = [
            number(verdict["limit"])
            for verdict in gate["verdicts"]
            if verdict["at"] == at and verdict["metric"] == "rel_l2" and not verdict.get("slice")
        ]
        limit, largest = min(limits, default=math.nan), max(floors.values())
        drift = [number(output["rel_l2"]) for output in place.get("drift", {}).values()]
        rows.append(
            {
                "at": at,
                "floors": [format_number(floors[name]) if name in floors else "" for name in _NOISE],
                "drift": format_number(max(drift)) if drift else "",
                "limit": "" if math.isnan(limit) else format_number(limit),
                "says": _says(largest, limit, max(drift, default=math.nan)),
            }
        )
    return rows


NOISE_TITLES = tuple(_NOISE.values())
SUGGESTED_TIMES = 3.0


def _says(floor: float, limit: float, drift: float) -> str:
    """What the floor means for the limit."""
    if not floor > 0.0:
        return "the engine repeats itself to the bit: no limit is too strict for it"
    if limit < floor:
        return f"the limit lies below the noise: it cannot be kept; {format_number(SUGGESTED_TIMES * floor)} is 3 times the floor"
    text = f"the limit is {format_number(limit / floor)} times the floor" if not math.isnan(limit) else ""
    if drift <= SUGGESTED_TIMES * floor:
        text += f"{'; ' if text else ''}the drift is within 3 times the floor: as good as unchanged"
    return text


def seed_line(run_dir: RunDir) -> str:
    """How far seeds alone move the score; empty where it was not measured."""
    record = run_dir.record("50-validate")
    seeds = record.report.get("noise_floors", {}).get("seeds") if record else None
    if not seeds:
        return ""
    scores = ", ".join(format_number(number(score)) for score in seeds["scores"].values())
    text, flips, spread = (
        f"FP32 models of other seeds score {scores}",
        seeds.get("flips_between_two"),
        seeds.get("spread"),
    )
    if spread is not None:
        text += f" (standard deviation {format_number(number(spread))})"
    return text + (f"; two of them differ on {100 * flips:.2g} % of the samples." if flips is not None else ".")


def tf32_line(run_dir: RunDir) -> str:
    """Why TF32's noise floor is missing; empty where it was measured or not asked for."""
    record = run_dir.record("50-validate")
    found = record.report.get("noise_floors", {}).get("tf32") if record else None
    return f"FP32 against TF32 was not measured: {found['missing']}." if found and "missing" in found else ""


# -- latency ----------------------------------------------------------------------------------------


def latency_cards(gate: Json, evidence: Evidence | None) -> list[dict[str, Any]]:
    """Raw points of both sides for each place whose latency was measured."""
    decided = {verdict["at"]: verdict for verdict in gate["verdicts"] if verdict["metric"] == "latency_ratio"}
    cards = []
    for at, place in gate["places"].items():
        if "latency" not in place:
            continue
        summary = place["latency"]
        median, before = number(summary["median_ms"]), number(summary["baseline_median_ms"])
        p99 = summary["p99_ms"]
        baseline = str(place["notes"].get("latency_baseline", place["baseline"]))
        caption = f"{format_number(median)} ms against {format_number(before)} ms of {baseline}"
        raw = evidence.places.get(at) if evidence is not None else None
        plot = ""
        if raw is not None and {"latency_a_ms", "latency_b_ms"} <= raw.arrays.keys():
            sides = {"baseline": raw.arrays["latency_a_ms"], at: raw.arrays["latency_b_ms"]}
            plot = charts.latency_points(sides, label=f"Raw latencies at {at}: median {caption}")
        cards.append(
            {
                "at": at,
                "caption": caption,
                "p99": format_number(number(p99)) + " ms"
                if p99 is not None
                else "not claimed (fewer than 299 samples)",
                "num_samples": summary["num_samples"],
                "includes": "" if at in decided else place["facts"].get("latency_includes_b", ""),
                "message": decided[at]["message"] if at in decided else "",
                "ratio": _strip(decided[at], "largest") if at in decided else "",
                "plot": plot,
                **_sweep(at, place["facts"].get("batch_sweep")),
            }
        )
    return cards


def _sweep(at: str, rows: Any) -> dict[str, Any]:
    """Throughput over batch, as a chart and in words; empty where none was measured."""
    found = [
        (number(row.get("batch")), number(row.get("median_ms")), number(row.get("throughput_per_s")))
        for row in dicts(rows)
    ]
    if not found:
        return {"sweep": "", "sweep_text": ""}
    text = "; ".join(f"batch {batch:g}: {format_number(ms)} ms, {rate:,.0f}/s" for batch, ms, rate in found)
    chart = charts.line_chart(
        {at: [(batch, rate) for batch, _, rate in found]},
        label=f"Samples a second by batch at {at}: {text}",
        x_name="batch",
    )
    return {"sweep": chart, "sweep_text": text}

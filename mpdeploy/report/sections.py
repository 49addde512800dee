"""What the measured sections of the page show: verdicts, drift, accuracy, latency, training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mpdeploy.gates.evidence import Evidence
from mpdeploy.gates.metrics import METRICS
from mpdeploy.gates.verdict import format_number
from mpdeploy.report import charts
from mpdeploy.report.reading import SYMBOLS, Json, dicts, measured_text, number, worst_first
from mpdeploy.run_dir import RunDir

_CURVES = {
    "loss": "training loss",
    "early_stopping_loss": "held-out loss",
    "early_stopping_score": "held-out score",
    "learning_rate": "learning rate",
    "loss_scale": "loss scale (powers of two)",
    "num_skipped": "skipped steps",
}


def verdict_rows(gate: Json) -> list[dict[str, Any]]:
    """The table of verdicts, worst first."""
    rows = []
    for verdict in worst_first(gate["verdicts"]):
        measured, limit = number(verdict["measured"]), number(verdict["limit"])
        low_high = verdict["interval"] and (number(verdict["interval"][0]), number(verdict["interval"][1]))
        row = METRICS.get(verdict["metric"])
        rows.append(
            {
                **verdict,
                "symbol": SYMBOLS[verdict["verdict"]],
                "measured_text": measured_text(verdict),
                "limit_text": format_number(limit),
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
        strip = ""
        if verdict is not None and verdict["interval"]:
            low, high = (number(bound) for bound in verdict["interval"])
            strip = charts.verdict_strip(
                number(verdict["measured"]),
                (low, high),
                number(verdict["limit"]),
                verdict=verdict["verdict"],
                limit_is="largest",
                label=verdict["message"],
            )
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
                "message": "" if verdict is None else verdict["message"],
                "verdict": "" if verdict is None else verdict["verdict"],
            }
        )
    return rows


MAX_SLICE_ROWS = 80


def slice_rows(gate: Json) -> dict[str, Any]:
    """Every slice at every place, the largest drop first, then the largest drift."""
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
    return {"rows": rows[:MAX_SLICE_ROWS], "more": max(0, len(rows) - MAX_SLICE_ROWS)}


def corpus_lines(gate: Json) -> list[str]:
    """The corpus metric of each place in a sentence."""
    return [
        f"{at}: {place['corpus']['metric']} {format_number(number(place['corpus']['value']))} against "
        f"{format_number(number(place['corpus']['baseline_value']))} of {place['baseline']}"
        for at, place in gate["places"].items()
        if "corpus" in place
    ]


_NOISE = {"noise_rerun_rel_l2": "run again", "noise_rebuild_rel_l2": "built again"}


def noise_lines(gate: Json, run_dir: RunDir) -> list[str]:
    """What moves when nothing was changed: limits below this cannot be kept."""
    lines = []
    for at, place in gate["places"].items():
        found = [
            f"{text} {format_number(number(place['facts'][key]))}"
            for key, text in _NOISE.items()
            if key in place["facts"]
        ]
        if found:
            lines.append(f"{at} against itself (rel_l2): {', '.join(found)}.")
    record = run_dir.record("50-validate")
    seeds = record.report.get("noise_floors", {}).get("seeds") if record else None
    if seeds:
        scores = ", ".join(format_number(number(score)) for score in seeds["scores"].values())
        flips = seeds.get("flips_between_two")
        lines.append(
            f"FP32 models of other seeds score {scores}"
            + (f"; two of them differ on {100 * flips:.2g} % of the samples." if flips is not None else ".")
        )
    return lines


# -- latency, training ----------------------------------------------------------------------------------------


def latency_cards(gate: Json, evidence: Evidence | None) -> list[dict[str, Any]]:
    """Raw points of both sides for each place whose latency was measured."""
    messages = {
        verdict["at"]: verdict["message"] for verdict in gate["verdicts"] if verdict["metric"] == "latency_ratio"
    }
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
                "includes": "" if at in messages else place["facts"].get("latency_includes_b", ""),
                "message": messages.get(at, ""),
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


def training_cards(run_dir: RunDir) -> list[dict[str, str]]:
    """A small chart for each number of the training history, with the FP32 reference's curve where there is one."""
    record = run_dir.record("10-train")
    history = dicts(record.report.get("history")) if record else []
    reference = dicts(record.report.get("reference_history")) if record else []
    cards = []
    for key, title in _CURVES.items():
        log_scale = key == "loss_scale"
        curves = {"mixed precision": _curve(history, key), "FP32 reference": _curve(reference, key)}
        chart = charts.line_chart(
            {name: curve for name, curve in curves.items() if curve}, label=title, log_scale=log_scale
        )
        if chart and curves["mixed precision"]:
            last = curves["mixed precision"][-1][1]
            cards.append({"title": title, "chart": chart, "last": format_number(last)})
    return cards


def _curve(history: Sequence[Json], key: str) -> list[tuple[float, float]]:
    points = []
    for index, item in enumerate(history):
        try:
            points.append((float(item.get("epoch", index + 1)), float(item[key])))
        except (KeyError, TypeError, ValueError):
            continue
    return points

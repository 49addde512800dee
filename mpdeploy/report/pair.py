"""One page that compares two runs: verdicts, scores, drift, latency and what their configs and environments differ in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mpdeploy.gates.verdict import format_number
from mpdeploy.report import charts
from mpdeploy.report.html import page_template
from mpdeploy.report.reading import SYMBOLS, Json, headline, measured_text, number
from mpdeploy.report.run_tables import flat_items
from mpdeploy.run_dir import RunDir

TEMPLATE = "pair.html.j2"
_RANK = {"fail": 3, "unvalidated": 2, "inconclusive": 1, "pass": 0}
MAX_ROWS = 400


def render_pair(before_dir: RunDir, after_dir: RunDir, before: Json, after: Json) -> str:
    """The page as text.

    Args:
        before_dir: the run that is compared with.
        after_dir: the run that is looked at.
        before: the first one's gate.json.
        after: the second one's.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    text: str = page_template(TEMPLATE).render(
        before={"name": before_dir.path.name, "verdict": before["verdict"], "headline": headline(before)},
        after={"name": after_dir.path.name, "verdict": after["verdict"], "headline": headline(after)},
        symbols=SYMBOLS,
        pipeline=after["pipeline"],
        comparable=_comparable(before, after),
        verdicts=_verdict_rows(before, after),
        places=_place_rows(before, after),
        config=differences(before_dir.manifest.get("config", {}), after_dir.manifest.get("config", {})),
        environment=differences(before["environment"], after["environment"]),
    )
    return text


def differences(before: Json, after: Json) -> list[tuple[str, str, str]]:
    """(name, value before, value after) of all that differs, nested names dotted; '-' where a side lacks it."""
    first, second = dict(flat_items(before)), dict(flat_items(after))
    return [
        (name, first.get(name, "-"), second.get(name, "-"))
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name)
    ][:MAX_ROWS]


def _comparable(before: Json, after: Json) -> list[str]:
    """What forbids to take differences at face value."""
    notes = []
    if before["digests"].get("dataset") != after["digests"].get("dataset"):
        notes.append("The two were measured on different samples or labels: scores and drift are not comparable.")
    if _hardware(before) != _hardware(after):
        notes.append(
            f"The two were measured on different hardware ({_hardware(before)}; {_hardware(after)}): "
            "latencies are not comparable."
        )
    if before["harness"] != after["harness"]:
        notes.append(f"The two were measured by different harnesses ({before['harness']}, {after['harness']}).")
    return notes


def _hardware(gate: Json) -> str:
    environment = gate["environment"]
    names = [str(item.get("name")) for item in environment.get("gpus", []) if isinstance(item, Mapping)]
    return ", ".join(names) or str(environment.get("cpu", "?"))


def _verdict_rows(before: Json, after: Json) -> list[dict[str, Any]]:
    """Every gate and place of either run; those whose verdict changed first, the worst of them on top."""

    def keyed(gate: Json) -> dict[tuple[str, str, str], Json]:
        return {(each["id"], each["at"], each.get("slice", "")): each for each in gate["verdicts"]}

    first, second = keyed(before), keyed(after)
    rows = []
    for key in dict.fromkeys([*second, *first]):
        sides = first.get(key), second.get(key)
        names = [None if side is None else str(side["verdict"]) for side in sides]
        rows.append(
            {
                "id": key[0],
                "at": key[1] + (f", slice {key[2]}" if key[2] else ""),
                "before": names[0],
                "after": names[1],
                "before_text": "" if sides[0] is None else measured_text(sides[0]),
                "after_text": "" if sides[1] is None else measured_text(sides[1]),
                "changed": names[0] != names[1],
            }
        )
    rows.sort(key=lambda row: (not row["changed"], -_RANK.get(str(row["after"]), -1)))
    return rows[:MAX_ROWS]


def _place_rows(before: Json, after: Json) -> dict[str, Any]:
    """Score, drift, latency and size of each place in both runs, with drift on one logarithmic axis."""
    names = dict.fromkeys([*after["places"], *before["places"]])
    pairs = {at: (before["places"].get(at), after["places"].get(at)) for at in names}
    drifts = {at: tuple(_worst_drift(place) for place in pair) for at, pair in pairs.items()}
    decades = charts.decades_of([value for pair in drifts.values() for value in pair if not math.isnan(value)])
    rows = []
    for at, pair in pairs.items():
        values = [
            (name, value) for name, value in zip(("before", "after"), drifts[at], strict=True) if not math.isnan(value)
        ]
        rows.append(
            {
                "at": at,
                "score": _both(pair, lambda place: number((place.get("scores") or {}).get("mean")), better="higher"),
                "drift": _both(pair, _worst_drift, better="lower"),
                "strip": charts.pair_strip(
                    values, decades, label=f"Drift at {at}: " + ", ".join(f"{n} {format_number(v)}" for n, v in values)
                )
                if values
                else "",
                "latency": _both(
                    pair, lambda place: number((place.get("latency") or {}).get("median_ms")), better="lower"
                ),
                "size": _both(pair, lambda place: number(place["facts"].get("size_bytes")), better="lower"),
            }
        )
    return {"rows": rows, "axis": charts.decade_labels(decades)}


def _worst_drift(place: Json | None) -> float:
    found = [number(output["rel_l2"]) for output in (place or {}).get("drift", {}).values()]
    return max(found, default=math.nan)


def _both(pair: tuple[Json | None, Json | None], value: Any, *, better: str) -> dict[str, str]:
    first, second = (math.nan if place is None else float(value(place)) for place in pair)
    change, css = "", ""
    if math.isfinite(first) and math.isfinite(second) and first != 0.0 and first != second:
        ratio = second / first - 1.0
        change = f"{100.0 * ratio:+.1f} %" if abs(ratio) < 10 else f"x{second / first:.3g}"
        if abs(ratio) >= 1e-3:
            css = "down" if (ratio > 0) == (better == "higher") else "up"
    return {
        "before": "" if math.isnan(first) else format_number(first),
        "after": "" if math.isnan(second) else format_number(second),
        "change": change,
        "css": css,
    }

"""The training section: curves, loss scale and skipped steps, gradient health, AMP against FP32 over seeds, pruning.

It reads the report of `10-train`, and `health.json` beside it for exponents. What it knows is drawn; numbers and dictionaries that it
does not know are listed by their names, so that a new fact is seen before it has a picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mpdeploy.gates.verdict import format_number
from mpdeploy.report import charts
from mpdeploy.report.reading import Json, dicts, maybe_number
from mpdeploy.report.run_tables import flat_items
from mpdeploy.report.training_facts import gradient_table, parity_facts, pruning_facts, shadow_table
from mpdeploy.run_dir import RunDir

_TITLES = {
    "loss": "training loss",
    "early_stopping_loss": "held-out loss",
    "early_stopping_score": "held-out score",
    "learning_rate": "learning rate",
    "loss_scale": "loss scale (powers of two)",
    "num_skipped": "skipped steps",
}
_DRAWN = (
    "choice", "splits", "splits_sha256", "history", "reference_history", "step_ms", "reference_step_ms", "num_steps",
    "num_skipped", "skipped_steps", "loss_scales", "gradient_norm", "gradient_parity", "excess_zero_gradients", "health",
    "parity", "pruning", "precision_events", "fp32_modules", "memory", "reference_memory", "best_epoch", "shipped",
    "averaged",
)  # fmt: skip
MAX_OTHER, MAX_HISTOGRAMS, MAX_EVENTS = 120, 6, 20


def training_section(run_dir: RunDir) -> dict[str, Any] | None:
    """What the section shows; None where the run trained nothing."""
    record = run_dir.record("10-train")
    if record is None or not record.report:
        return None
    report = record.report
    cards, steady = _curves(dicts(report.get("history")), dicts(report.get("reference_history")))
    trace = _scale_trace(report)
    cards += [trace] if trace is not None else []
    health, facts = report.get("health"), _facts(report)
    facts += [item for item in steady if item[0] not in dict(facts)]
    return {
        "cards": cards,
        "facts": facts,
        "events": [_event(item) for item in dicts(report.get("precision_events"))[:MAX_EVENTS]],
        "tables": [
            table
            for table in (
                gradient_table(dicts(report.get("gradient_parity"))),
                shadow_table(dicts(health.get("shadow_backward")) if isinstance(health, Mapping) else []),
            )
            if table is not None
        ],
        "histograms": _histograms(run_dir, str(_choice(report).get("precision", "fp16"))),
        "parity": parity_facts(report.get("parity")),
        "pruning": pruning_facts(report.get("pruning")),
        "other": flat_items({name: value for name, value in report.items() if name not in _DRAWN})[:MAX_OTHER],
    }


def _choice(report: Json) -> Json:
    found = report.get("choice")
    return found if isinstance(found, Mapping) else {}


def _facts(report: Json) -> list[tuple[str, str]]:
    """Numbers in a line each: what was chosen, how long a step takes, how much memory."""
    choice, facts = _choice(report), []
    if choice:
        facts.append(
            ("precision", f"{choice.get('precision')} on {choice.get('device')} ({choice.get('reason', 'no reason')})")
        )
    steps, skipped = maybe_number(report.get("num_steps")), maybe_number(report.get("num_skipped"))
    if steps is not None and skipped is not None:
        which = ", ".join(str(step) for step in list(report.get("skipped_steps") or ())[:12])
        facts.append(("skipped steps", f"{skipped:,.0f} of {steps:,.0f}" + (f": {which}" if which else "")))
    step, before = maybe_number(report.get("step_ms")), maybe_number(report.get("reference_step_ms"))
    if step is not None:
        ratio = f", {step / before:.2f} times FP32's {before:.4g} ms" if before else ""
        facts.append(("median step", f"{step:.4g} ms{ratio}"))
    norm = report.get("gradient_norm")
    if isinstance(norm, Mapping):
        facts.append(("gradient norm", ", ".join(f"{key} {_text(value)}" for key, value in norm.items())))
    zeros = maybe_number(report.get("excess_zero_gradients"))
    if zeros is not None:
        facts.append(("gradients that are zero in mixed precision alone", f"{100.0 * zeros:.3g} %"))
    memory, reference = (report.get(name) for name in ("memory", "reference_memory"))
    for key, title in (
        ("saved_activations", "activations kept for backward"),
        ("cuda_peak_allocated", "peak GPU memory"),
    ):
        pair = [maybe_number(side.get(key)) if isinstance(side, Mapping) else None for side in (memory, reference)]
        if pair[0] is not None:
            more = f", {pair[0] / pair[1]:.2f} times FP32's" if pair[1] else ""
            facts.append((title, f"{pair[0] / 1e6:,.1f} MB{more}"))
    if report.get("best_epoch") is not None:
        average = ", averaged" if report.get("averaged") else ""
        facts.append(("best epoch", f"{report['best_epoch']}; the weights that ship: {report.get('shipped')}{average}"))
    kept = list(report.get("fp32_modules") or ())
    if kept:
        facts.append(("modules kept in FP32", ", ".join(map(str, kept[:12])) + (" ..." if len(kept) > 12 else "")))
    return facts


# -- curves ------------------------------------------------------------------------------------------------------------


def _curves(history: Sequence[Json], reference: Sequence[Json]) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """A card for each number of the history that moves, and a line for each that does not."""
    names = dict.fromkeys([*_TITLES, *(key for item in history for key in item)])
    cards, steady = [], []
    for key in names:
        curve, other = _curve(history, key), _curve(reference, key)
        if key in ("epoch", "seconds") or not curve:
            continue
        values = {value for _, value in (*curve, *other)}
        title = _TITLES.get(key, key.replace("_", " "))
        if len(values) == 1 and len(curve) > 1:
            steady.append((title, f"{_text(curve[0][1])} in every epoch"))
            continue
        chart = charts.line_chart(
            {name: each for name, each in (("mixed precision", curve), ("FP32 reference", other)) if each},
            label=f"{title} by epoch, last {_text(curve[-1][1])}" + (f"; FP32 {_text(other[-1][1])}" if other else ""),
            log_scale=key == "loss_scale",
        )
        if chart:
            last = f"last: {_text(curve[-1][1])}" + (f"; FP32: {_text(other[-1][1])}" if other else "")
            cards.append({"title": title, "chart": chart, "caption": last})
    return cards, steady


def _curve(history: Sequence[Json], key: str) -> list[tuple[float, float]]:
    points = []
    for index, item in enumerate(history):
        value, epoch = maybe_number(item.get(key)), maybe_number(item.get("epoch", index + 1))
        if value is not None and epoch is not None:
            points.append((epoch, value))
    return points


def _scale_trace(report: Json) -> dict[str, str] | None:
    """The loss scale over steps, a step line; None where it never moved."""
    changes = [
        (step, scale)
        for item in report.get("loss_scales") or ()
        if isinstance(item, list | tuple)
        and len(item) == 2
        and (step := maybe_number(item[0])) is not None
        and (scale := maybe_number(item[1])) is not None
    ]
    if len(changes) < 2:
        return None
    points = [changes[0]]
    for step, scale in changes[1:]:
        points += [(step, points[-1][1]), (step, scale)]
    points.append((max(maybe_number(report.get("num_steps")) or 0.0, points[-1][0]), points[-1][1]))
    skipped = [value for item in report.get("skipped_steps") or () if (value := maybe_number(item)) is not None]
    text = f"{len(changes) - 1} changes, last {_text(changes[-1][1])}; {len(skipped)} steps skipped"
    chart = charts.line_chart(
        {"scale": points}, label=f"Loss scale by step: {text}", log_scale=True, x_name="step", marks=skipped
    )
    return {"title": "loss scale by step", "chart": chart, "caption": f"{text} (ticks below)"} if chart else None


def _event(item: Json) -> str:
    step = f"step {item['step']}: " if "step" in item else ""
    if {"from", "to"} <= item.keys():
        return f"{step}{item['from']} → {item['to']}, {item.get('reason', 'no reason')}"
    return step + ", ".join(f"{key} {value}" for key, value in item.items() if key != "step")


# -- exponents ---------------------------------------------------------------------------------------------------------


def _histograms(run_dir: RunDir, precision: str) -> list[dict[str, str]]:
    """Exponents of the gradients that lie lowest, and of the activations that lie highest, as far as they were recorded."""
    try:
        held = json.loads((run_dir.path / "10-train" / "health.json").read_text(encoding="utf-8")).get("health", {})
    except (OSError, ValueError, AttributeError):
        return []
    precision = precision if precision in ("fp16", "bf16") else "fp16"
    cards = []
    for key, kind, lowest in (("gradient_exponents", "gradient", True), ("activation_exponents", "activation", False)):
        found = held.get(key) if isinstance(held, Mapping) else None
        counted = {
            str(name): {int(exponent): int(count) for exponent, count in item["exponents"].items()}
            for name, item in (found.items() if isinstance(found, Mapping) else ())
            if isinstance(item, Mapping) and isinstance(item.get("exponents"), Mapping) and item["exponents"]
        }
        ends = {name: min(counts) if lowest else -max(counts) for name, counts in counted.items()}
        for name in sorted(ends, key=lambda each: ends[each])[: MAX_HISTOGRAMS // 2]:
            smallest, largest = min(counted[name]), max(counted[name])
            caption = f"{kind}, from 2^{smallest} to 2^{largest}"
            chart = charts.exponent_histogram(counted[name], precision, label=f"Exponents of {name}, {caption}")
            cards.append({"title": name, "chart": chart, "caption": caption})
    return [card for card in cards if card["chart"]]


def _text(value: Any) -> str:
    number = maybe_number(value)
    return str(value) if number is None else ("NaN" if math.isnan(number) else format_number(number))

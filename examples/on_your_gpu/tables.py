"""The report as Markdown."""

from __future__ import annotations

from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """Hardware first, then one table a part, then what was skipped and why."""
    hardware = report["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in hardware["versions"].items())
    device = hardware["gpu"] or "CPU"
    lines = ["# On your GPU", ""]
    if report["dry_run"]:
        lines += ["**A dry run on a CPU with tiny models: no number here means anything.**", ""]
    lines += [
        f"{device}{', ' + hardware['compute_capability'] if hardware.get('compute_capability') else ''}, "
        f"driver {hardware.get('driver')}, {report['date']}, `{report['command']}`",
        f"Python {hardware['python']}, {versions}",
        "",
    ]
    for name, table in (("amp", _amp), ("fidelity", _fidelity), ("engines", _engines), ("tests", _tests)):
        if report.get(name):
            lines += table(report[name])
    lines += ["## Skipped", ""]
    lines += [f"- {item['what']}: {item['why']}" for item in report.get("skipped", [])] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _amp(found: dict[str, Any]) -> list[str]:
    lines = [
        "## AMP: training steps",
        "",
        "Median step; change against FP32 eager of the same run. The tutorial's claims stand beside them.",
        "",
        "| model | runs | batch | step ms | time | peak memory | saved activations | claimed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, rows in found["steps"].items():
        base = rows["cells"].get("fp32", {})
        for label, cell in rows["cells"].items():
            columns = [
                model, label, str(cell["batch"]), f"{cell['median_ms']:.2f}", _change(cell, base, "median_ms"),
                _change(cell, base, "peak_bytes"), _change(cell, base, "saved_bytes"),
                rows["claim"] if label == "fp16" else "",
            ]  # fmt: skip
            lines.append("| " + " | ".join(columns) + " |")
    lines += ["", "## AMP: accuracy over paired seeds", "", "| model | precision | seeds | mean | lowest | highest | skipped steps |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for model, precisions in found["accuracy"].items():
        for precision, row in precisions.items():
            scores = [100 * score for score in row["accuracy"]]
            columns = [model, precision, str(len(scores)), f"{sum(scores) / len(scores):.2f} %", f"{min(scores):.2f} %", f"{max(scores):.2f} %", str(row["num_skipped"])]  # fmt: skip
            lines.append("| " + " | ".join(columns) + " |")
    return [*lines, ""]


def _change(cell: dict[str, Any], base: dict[str, Any], field: str) -> str:
    here, there = cell.get(field), base.get(field)
    if not here or not there:
        return "-"
    return "1" if cell is base else f"{100 * (here / there - 1):+.0f} %"


def _fidelity(rows: dict[str, Any]) -> list[str]:
    engines = sorted({name for row in rows.values() for name in row["engines"]})
    head = ["architecture", "emulated", *(f"{name}: drift, emulated / it" for name in engines)]
    head += ["all half, emulated", "torch: drift, emulated / it", "same answer on lost signal"]
    lines = [
        "## The emulator against real half precision",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for name, row in rows.items():
        judged = [row["engines"].get(engine) for engine in engines]
        torchs = row.get("torch_all_half")
        known = [item for item in (*judged, torchs) if item]
        columns = [
            name,
            _number(row["emulated"]),
            *map(_judged, judged),
            _number(row.get("emulated_all_half")),
            _judged(torchs),
        ]
        columns.append("-" if not known else "yes" if all(item["same_answer_on_lost"] for item in known) else "**no**")
        lines.append("| " + " | ".join(columns) + " |")
    return [*lines, ""]


def _judged(item: dict[str, Any] | None) -> str:
    if not item:
        return "-"
    ratio = item["ratio"]
    return f"{_number(item['drift'])}, {'-' if ratio is None else f'{ratio:.2f}'}"


def _engines(found: dict[str, Any]) -> list[str]:
    lines = ["## Engines", "", "| model | runs | batch | median ms | p99 ms | drift | build s | MB | layers | layers known from |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for model, rows in found.items():
        for row in rows:
            layers = ", ".join(f"{count} {precision}" for precision, count in row.get("layers", {}).items()) or "-"
            columns = [
                model, row["runs"], str(row["batch"]), _number(row["median_ms"]), _number(row["p99_ms"]), _number(row["rel_l2"]),
                _number(row.get("build_s")), _number(row["bytes"] / 1e6) if "bytes" in row else "-", layers,
                row.get("source", "-"),
            ]  # fmt: skip
            lines.append("| " + " | ".join(columns) + " |")
    includes = {row["runs"].split(",")[0]: row["includes"] for rows in found.values() for row in rows}
    return [*lines, "", *(f"- {runs}: {what}" for runs, what in includes.items()), ""]


def _tests(found: dict[str, Any]) -> list[str]:
    return ["## Tests marked gpu", "", f"`{found['summary']}`", "", *(f"- {line}" for line in found["failed"]), ""]


def _number(value: Any) -> str:
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    return f"{value:.3g}"

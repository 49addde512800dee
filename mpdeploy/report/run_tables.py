"""Tables about the run itself: engines, stages, environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpdeploy.report.reading import Json
from mpdeploy.run_dir import RunDir


def stage_rows(run_dir: RunDir) -> list[dict[str, Any]]:
    """Every stage: how it ended, how long it took, what it made."""
    return [
        {
            "name": name,
            "status": record.status,
            "seconds": f"{record.seconds:,.1f}",
            "message": " ".join(filter(None, (record.message, record.hint))),
            "artifacts": [
                {"name": key, "path": artifact.path.name, "sha256": artifact.sha256[:12]}
                for key, artifact in record.artifacts.items()
            ],
        }
        for name, record in run_dir.records().items()
    ]


def engine_rows(run_dir: RunDir, gate: Json) -> list[dict[str, Any]]:
    """Every engine: precision, size, what it really runs in, and its verdicts."""
    rows = []
    for name, record in run_dir.records().items():
        if not name.startswith("40-build/"):
            continue
        engine = name.removeprefix("40-build/")
        artifact = next(iter(record.artifacts.values()), None)
        names = [
            verdict["verdict"]
            for verdict in gate["verdicts"]
            if verdict["at"] == f"engine/{engine}" and not verdict["advisory"]
        ]
        worst = next((each for each in ("fail", "inconclusive", "unvalidated", "pass") if each in names), "")
        audit = record.report.get("audit", artifact.sidecar.get("audit") if artifact else None)
        size = artifact.path.stat().st_size if artifact is not None and artifact.path.is_file() else None
        rows.append(
            {
                "engine": engine,
                "status": record.status,
                "verdict": worst,
                "precision": str(artifact.sidecar.get("precision", "")) if artifact else "",
                "size": f"{size / 1e6:,.2f} MB" if size is not None else "",
                "audit": _audit_text(audit),
                "seconds": f"{record.seconds:,.1f}",
                "message": " ".join(filter(None, (record.message, record.hint))),
            }
        )
    return rows


_SOURCES = {
    "network": "as parsed, which repeats the ONNX file",
    "inspector": "from the engine's inspector",
    "runtime_model": "from the model that the runtime runs",
}


def _audit_text(audit: Any) -> str:
    """Layers by precision, what differs from the plan, and where that is known from."""
    if not isinstance(audit, Mapping):
        return "" if audit is None else str(audit)
    layers = audit.get("layers")
    counts = layers if isinstance(layers, Mapping) else {k: v for k, v in audit.items() if isinstance(v, int | float)}
    parts = [", ".join(f"{count} {precision}" for precision, count in counts.items() if not isinstance(count, bool))]
    for key, text in (
        ("kept_in_half", "kept, but in half"),
        ("kept_unaccounted", "kept, and no layer answers for it"),
        ("half_in_fp32", "half, but in FP32"),
    ):
        found = audit.get(key)
        if isinstance(found, list | tuple) and found:
            parts.append(f"{len(found)} {text}: {', '.join(map(str, found[:4]))}{' ...' if len(found) > 4 else ''}")
    source = str(audit.get("source", ""))
    parts.append(_SOURCES.get(source, source))
    return "; ".join(filter(None, parts))


def _flat_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key}: {_flat_text(item)}" for key, item in value.items() if not isinstance(item, list) or len(item) < 9
        )
    return "" if value is None else str(value)


def flat_items(value: Json, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, text) pairs."""
    items: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            items += flat_items(item, f"{prefix}{key}.")
        elif isinstance(item, list | tuple):
            parts = [_flat_text(part) for part in item]
            items.append((f"{prefix}{key}", "; ".join(parts) or "none"))
        else:
            items.append((f"{prefix}{key}", str(item)))
    return items

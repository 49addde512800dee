"""Tables about the run itself: precision plans, engines, stages, environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpdeploy.report import charts
from mpdeploy.report.reading import Json, dicts
from mpdeploy.run_dir import RunDir

MAX_KEPT_NODES = 300
MAX_BLOCKS = 40


def precision_maps(plans: Mapping[str, Json]) -> list[dict[str, Any]]:
    """Each plan: counts, half and kept nodes by block of the network, and every kept node with its reason."""
    maps = []
    for name, plan in plans.items():
        kept = dicts(plan.get("keep") or plan.get("kept"))
        half = [str(node) for node in plan.get("half") or () if isinstance(node, str)]
        counts: dict[str, list[int]] = {}
        for node in half:
            counts.setdefault(_block(node), [0, 0])[0] += 1
        for item in kept:
            counts.setdefault(_block(str(item.get("node", "?"))), [0, 0])[1] += 1
        largest = sorted(counts.items(), key=lambda item: -sum(item[1]))[:MAX_BLOCKS]
        shown = {block for block, _ in largest}
        blocks = [
            {
                "name": block,
                "half": halves,
                "kept": keeps,
                "bar": charts.share_bar(
                    [("n-half", halves), ("n-kept", keeps)],
                    label=f"{block}: {halves} nodes in half, {keeps} kept in FP32",
                ),
            }
            for block, (halves, keeps) in counts.items()
            if block in shown
        ]
        num_half, num_kept = int(plan.get("num_half", len(half))), int(plan.get("num_kept", len(kept)))
        maps.append(
            {
                "name": name,
                "precision": str(plan.get("precision", "")),
                "ranges_from": str(plan.get("ranges_from", "")),
                "num_half": num_half,
                "num_kept": num_kept,
                "bar": charts.share_bar(
                    [("n-half", num_half), ("n-kept", num_kept)],
                    label=f"{num_half} nodes in half, {num_kept} kept in FP32",
                ),
                "blocks": blocks,
                "more_blocks": len(counts) - len(blocks),
                "kept": [
                    {key: str(item.get(key, "")) for key in ("node", "op", "reason")} for item in kept[:MAX_KEPT_NODES]
                ],
                "more_kept": max(0, len(kept) - MAX_KEPT_NODES),
                "notes": [str(note) for note in plan.get("notes") or ()],
            }
        )
    return maps


def _block(node: str) -> str:
    """The first two levels of a node's name, which exporters build from module names."""
    separator = "/" if "/" in node else "."
    parts = [part for part in node.split(separator) if part]
    return separator.join(parts[:2]) if len(parts) > 2 else (parts[0] if len(parts) == 2 else "(top level)")


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
                "audit": _flat_text(audit),
                "seconds": f"{record.seconds:,.1f}",
                "message": " ".join(filter(None, (record.message, record.hint))),
            }
        )
    return rows


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

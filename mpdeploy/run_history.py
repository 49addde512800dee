"""The runs in a folder, for `mpdeploy history`: what each measured, and how that moves from run to run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpdeploy.errors import RunDirError
from mpdeploy.run_dir import MANIFEST, RunDir

TRENDS = ("score", "worst_rel_l2", "median_ms")
_BARS = "▁▂▃▄▅▆▇█"


def runs_in(folder: Path) -> list[dict[str, Any]]:
    """Every run directory in `folder` (or `folder` itself), oldest first: verdict, score, worst drift, chosen engine.

    A folder whose manifest cannot be read is listed with its fault: one broken run does not hide the others.

    Raises:
        RunDirError: there is none.
    """
    paths = [folder] if (folder / MANIFEST).is_file() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not paths:
        raise RunDirError(f"{folder} holds no run directory.", hint="runs lie in runs/NAME unless --run says otherwise")
    return sorted((_describe(path) for path in paths), key=lambda item: str(item["updated"]))


def trends_of(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """Pipeline -> number -> its value in each run of that pipeline, oldest first."""
    pipelines = dict.fromkeys(str(item["pipeline"]) for item in runs if item["pipeline"])
    return {
        name: {key: [item[key] for item in runs if item["pipeline"] == name] for key in TRENDS} for name in pipelines
    }


def sparkline(values: Sequence[float | None]) -> str:
    """A bar a run, from the smallest to the largest value; a dot where there is none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return "·" * len(values)
    low, high = min(finite), max(finite)

    def bar(value: float | None) -> str:
        if value is None or math.isnan(value):
            return "·"
        if value == math.inf:
            return "!"
        return _BARS[0 if high == low else round((len(_BARS) - 1) * (value - low) / (high - low))]

    return "".join(bar(value) for value in values)


def _describe(path: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "updated": "", "pipeline": None, "verdict": None, "failed": [], "chosen_engine": None, **dict.fromkeys(TRENDS),
    }  # fmt: skip
    try:
        run = RunDir.open(path)
    except RunDirError as error:
        return {"run": str(path), **empty, "fault": error.message}
    try:
        gate = json.loads((path / "gate.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        gate = {}
    validated = run.record("50-validate")
    places = validated.report.get("places", {}) if validated else {}
    drifts = [found for place in places.values() if (found := _number(place.get("rel_l2"))) is not None]
    chosen = run.manifest.get("chosen_engine")
    return {
        "run": str(path),
        "updated": run.manifest.get("updated", ""),
        "pipeline": run.manifest.get("pipeline"),
        "verdict": gate.get("verdict"),
        "failed": _failed(gate),
        "score": _number(places.get("onnx", {}).get("score")),
        "worst_rel_l2": max(drifts, default=None),
        "median_ms": _number(places.get(f"engine/{chosen}", {}).get("median_ms")),
        "chosen_engine": chosen,
        "fault": None,
    }


def _failed(gate: dict[str, Any]) -> list[str]:
    """Ids of the gates that failed and count, each once."""
    verdicts = gate.get("verdicts", [])
    return list(
        dict.fromkeys(
            str(each.get("id"))
            for each in verdicts
            if isinstance(each, dict) and each.get("verdict") == "fail" and not each.get("advisory")
        )
    )


def verdict_line(runs: Sequence[dict[str, Any]], pipeline: str) -> str:
    """A sign a run of that pipeline, oldest first: passed, failed, undecided, waiting, or not there yet."""
    signs = {"pass": "✓", "fail": "✕", "inconclusive": "?", "unvalidated": "…"}
    return "".join(signs.get(str(item["verdict"]), "·") for item in runs if item["pipeline"] == pipeline)


def _number(value: Any) -> float | None:
    """A number of a manifest, where infinities are strings."""
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None

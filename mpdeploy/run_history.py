"""The runs in a folder, for `mpdeploy history`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpdeploy.errors import RunDirError
from mpdeploy.run_dir import MANIFEST, RunDir


def runs_in(folder: Path) -> list[dict[str, Any]]:
    """Every run directory in `folder` (or `folder` itself), oldest first: verdict, score, worst drift, chosen engine.

    Raises:
        RunDirError: there is none.
    """
    paths = [folder] if (folder / MANIFEST).is_file() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not paths:
        raise RunDirError(f"{folder} holds no run directory.", hint="runs lie in runs/NAME unless --run says otherwise")
    return sorted((_describe(path) for path in paths), key=lambda item: str(item["updated"]))


def _describe(path: Path) -> dict[str, Any]:
    run = RunDir.open(path)
    try:
        gate = json.loads((path / "gate.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        gate = {}
    validated = run.record("50-validate")
    places = validated.report.get("places", {}) if validated else {}
    drifts = [place["rel_l2"] for place in places.values() if isinstance(place.get("rel_l2"), int | float)]
    return {
        "run": str(path),
        "updated": run.manifest.get("updated", ""),
        "pipeline": run.manifest.get("pipeline"),
        "verdict": gate.get("verdict"),
        "score": places.get("onnx", {}).get("score"),
        "worst_rel_l2": max(drifts, default=None),
        "chosen_engine": run.manifest.get("chosen_engine"),
    }

"""What every package says of itself in `package.json`: from which run it was made, what the gates said, and what was checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpdeploy.environment import package_version
from mpdeploy.errors import UsageError
from mpdeploy.files import sha256_of_file
from mpdeploy.run_dir import MANIFEST, RunDir
from mpdeploy.serve.package.choose import Chosen

PACKAGE_FILE = "package.json"
SCHEMA_VERSION = 1


def provenance_of(
    run: RunDir, target: str, chosen: Chosen, names: Mapping[str, Any], *, allow_failed: bool, checks: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `package.json`.

    Args:
        run: it was made from.
        target: a row of the table of targets.
        chosen: its models.
        names: name in the package -> what stands there, as JSON.
        allow_failed: whether the user said so.
        checks: what was checked, with what.
    """
    gate = run.path / "gate.json"
    return {
        "schema": SCHEMA_VERSION,
        "made_by": f"mpdeploy {package_version('mpdeploy')}",
        "target": target,
        "run": {
            "name": run.path.resolve().name,
            "pipeline": run.manifest.get("pipeline"),
            "manifest_sha256": sha256_of_file(run.path / MANIFEST),
            "gate_sha256": sha256_of_file(gate) if gate.is_file() else None,
        },
        "allow_failed": allow_failed,
        "models": dict(names),
        "left_out": dict(chosen.left_out),
        "warnings": list(chosen.warnings),
        "checks": dict(checks),
    }


def check_output(folder: Path) -> None:
    """Refuse to take the place of what is no package.

    Raises:
        UsageError: it is a file, or a folder that holds other things.
    """
    if not folder.exists() or (folder / PACKAGE_FILE).is_file():
        return
    found = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else [folder.name]
    if found:
        raise UsageError(
            f"{folder} is no package and is not empty: {', '.join(found[:5])}" + (", ..." if len(found) > 5 else ""),
            hint="give a new folder with --output; nothing in it was touched",
        )

"""What every engine's `engine.json` says, and what is checked of it before the engine is loaded."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpdeploy.artifact import Engine, OnnxModel, TensorSpec
from mpdeploy.engines.accounting import Nodes
from mpdeploy.engines.base import Profile
from mpdeploy.errors import UnavailableError
from mpdeploy.files import sha256_of_file, write_json

SIDECAR = "engine.json"


def described(
    model: OnnxModel,
    profile: Profile,
    folder: Path,
    nodes: Nodes,
    *,
    engine: str,
    library: tuple[str, str],
    options: Mapping[str, Any],
    started: float,
) -> dict[str, Any]:
    """The entries that all engines have: what built it, where, from what, with which options and shapes.

    Args:
        model: what it was built from.
        profile: the shapes it was built for.
        folder: where the engine lies.
        nodes: the model's nodes.
        engine: the row of the engine table.
        library: name and version.
        options: the build's options, defaults included.
        started: `time.perf_counter()` when the build began.
    """
    parts = {name: [part.to_json() for part in shapes.parts] for name, shapes in profile.items() if shapes.parts}
    return {
        "engine": engine,
        "precision": model.precision,
        "library": library[0],
        "library_version": library[1],
        "os": platform.system(),
        "machine": platform.machine(),
        "options": dict(options),
        "profile": {name: shapes.to_json() for name, shapes in profile.items()},
        "profiles": parts,
        "source": os.path.relpath(model.path, folder),
        "source_sha256": model.sha256,
        **nodes.to_sidecar(),
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.perf_counter() - started, 3),
    }


def written(
    path: Path, sidecar: Mapping[str, Any], inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> Engine:
    """Write the sidecar beside a finished engine file; it is the last file of a build."""
    whole = {
        **sidecar,
        "inputs": [spec.to_json() for spec in inputs],
        "outputs": [spec.to_json() for spec in outputs],
        "sha256": sha256_of_file(path),
    }
    write_json(path.parent / SIDECAR, whole)
    return Engine(path, whole["sha256"], inputs, outputs, whole)


def check_library(engine: Engine, title: str, version: str) -> None:
    """Refuse an engine that another release of its library wrote, or that was written on another kind of machine.

    Patch releases run each other's engines.

    Raises:
        UnavailableError: what it was built with and what is here.
    """
    sidecar = engine.sidecar
    built = str(sidecar.get("library_version", version))
    where = f"{sidecar.get('os', platform.system())} {sidecar.get('machine', platform.machine())}"
    here = f"{platform.system()} {platform.machine()}"
    if built.split("-")[0].split(".")[:2] != version.split("-")[0].split(".")[:2] or where != here:
        raise UnavailableError(
            f"{engine.path} was built on {where} with {title} {built}; this machine is {here} with {title} {version}.",
            hint="build it again here (--from 40-build), or install the version it was built with",
        )

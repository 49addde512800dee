"""Run directories as a model repository: which one a load means, and whether it has changed since it was loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpdeploy.run_dir import MANIFEST, RunDir
from mpdeploy.serve.messages import BadRequestError, UnknownModelError
from mpdeploy.serve.options import NAME

DECIDES = (MANIFEST, "gate.json")
"""The files that decide what a run serves: its records and its verdicts."""


class Repository:
    """The folder that clients may load runs from.

    Args:
        root: None: no other run may be loaded than the one the server was started with.
    """

    def __init__(self, root: Path | None) -> None:
        self.known: dict[str, str] = {}
        """Models that the server was started with -> their runs: they may be loaded again after an unload."""
        self._root = root

    def asked(self, name: str, parameters: Mapping[str, Any], current: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a load means: `run` and `engine`.

        Args:
            name: of the model.
            parameters: of the request.
            current: what is served under that name.

        Raises:
            BadRequestError: parameters or a name that mean nothing here.
            UnknownModelError: no such run directory.
        """
        unknown = set(parameters) - {"run", "engine"}
        if unknown:
            raise BadRequestError(f"parameter {sorted(unknown)[0][:80]!r}: a load takes 'run' and 'engine'")
        for key, value in parameters.items():
            if not isinstance(value, str):
                raise BadRequestError(f"parameter '{key}' must be a string")
        if not NAME.fullmatch(name):
            raise BadRequestError(f"{name[:80]!r} is no model name: letters, digits, '.', '_' and '-'")
        if "run" in parameters or current is None:
            engine = parameters.get("engine")
            if "run" not in parameters and name in self.known:
                return {"run": self.known[name], "engine": engine}
            return {"run": str(self._path(parameters.get("run", name), name)), "engine": engine}
        return {"run": current["run"], "engine": parameters.get("engine", current.get("engine"))}

    def names(self) -> list[str]:
        """Run directories that lie in it."""
        if self._root is None or not self._root.is_dir():
            return []
        return sorted(path.parent.name for path in self._root.glob(f"*/{MANIFEST}"))

    def _path(self, asked: str, name: str) -> Path:
        if self._root is None:
            raise UnknownModelError(
                f"there is no model {name[:80]!r}, and this server was started without --repository: "
                "it only reads the run again that it was started with"
            )
        root = self._root.resolve()
        try:
            path = (root / asked).resolve()
            found = path.is_relative_to(root) and (path / MANIFEST).is_file()
        except (OSError, ValueError):  # too long, or a null byte
            found = False
        if not found:
            raise UnknownModelError(f"there is no run directory {asked[:200]!r} in the repository")
        return path


def default_name(run: Path) -> str:
    """A model's name where none was given: its pipeline's, else its folder's."""
    found = str(RunDir.open(run).manifest.get("pipeline") or run.resolve().name)
    return found if NAME.fullmatch(found) else re.sub(r"[^A-Za-z0-9_.-]", "_", found).lstrip("_.-") or "model"


def digest(run: Path) -> str:
    """Of what decides what a run serves."""
    found = hashlib.sha256()
    for name in DECIDES:
        with suppress(OSError):
            found.update((run / name).read_bytes())
    return found.hexdigest()


def stamp_of(run: Path) -> tuple[int, ...]:
    """Changes whenever `digest` may."""
    return tuple((run / name).stat().st_mtime_ns if (run / name).is_file() else 0 for name in DECIDES)

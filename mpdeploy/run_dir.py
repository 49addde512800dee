"""A run's directory: where everything lies, the manifest `run.json`, and the lock that keeps two processes apart.

run.json                 the manifest: one record a stage
10-train ... 50-validate what each stage made
evidence/                per-sample scores and raw latencies: enough to decide the gates again
gate.json junit.xml summary.md report.html
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from mpdeploy.artifact import Checkpoint, Engine, FileArtifact, OnnxModel, TensorSpec
from mpdeploy.errors import ArtifactChangedError, RunDirError
from mpdeploy.files import remove_partials, write_json

SCHEMA_VERSION = 1
MANIFEST = "run.json"

StageStatus = Literal["done", "failed", "interrupted", "unavailable"]
_KINDS: dict[str, type[FileArtifact]] = {kind.__name__: kind for kind in (Checkpoint, OnnxModel, Engine, FileArtifact)}


def _is_ours(name: str) -> bool:
    """What a process that was killed before its first manifest leaves behind."""
    return name == ".lock" or (name.startswith(f".{MANIFEST}.") and name.endswith(".partial"))


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What a stage did, written when it ended.

    Attributes:
        name: `10-train`, `40-build/openvino`, ...
        status: `unavailable` is for an engine this machine lacks, with the reason in `message`.
        key: part -> value of all that decides whether the stage must run again: its config, source digests, inputs, versions.
        artifacts: name -> file, digest, specs, sidecar.
        report: what was measured, as plain JSON.
        seconds: how long it ran.
        message: why it failed or was not available.
        hint: what to do about that.
    """

    name: str
    status: StageStatus
    key: Mapping[str, Any]
    artifacts: Mapping[str, FileArtifact] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    started: str = ""
    message: str | None = None
    hint: str | None = None


class RunDir:
    """A run directory, opened for reading, or (as a context manager) claimed for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = {"schema": SCHEMA_VERSION, "stages": {}}
        self._lock: Any = None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing run for reading.

        Raises:
            RunDirError: it is no run directory, or its manifest is corrupt.
        """
        run = cls(path)
        if not (path / MANIFEST).is_file():
            raise RunDirError(
                f"{path} is no run directory: it holds no {MANIFEST}.",
                hint="mpdeploy train-and-export PIPELINE --run DIR makes one",
            )
        run._read()
        return run

    @classmethod
    def create(cls, path: Path) -> Self:
        """Open a run for writing, making its directory where there is none. Claim it with `with`.

        Raises:
            RunDirError: it holds other things than a run, cannot be written, or its manifest is corrupt.
        """
        run = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(
                f"Cannot make the run directory {path}: {error.strerror}.", hint="give another one with --run DIR"
            ) from error
        if (path / MANIFEST).exists():
            run._read()
        elif foreign := sorted(item.name for item in path.iterdir() if not _is_ours(item.name)):
            raise RunDirError(
                f"{path} is not empty and holds no {MANIFEST}: {', '.join(foreign[:5])}"
                + (", ..." if len(foreign) > 5 else ""),
                hint="give an empty or a new directory with --run DIR; nothing in it was touched",
            )
        if not os.access(path, os.W_OK | os.X_OK):
            raise RunDirError(
                f"The run directory {path} cannot be written.",
                hint="check its owner and permissions, or give another --run",
            )
        return run

    def _read(self) -> None:
        path = self.path / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest["schema"] != SCHEMA_VERSION:  # before anything else is read: another schema has another form
                raise RunDirError(
                    f"{path} has schema {manifest['schema']}; this mpdeploy reads schema {SCHEMA_VERSION}.",
                    hint="use the version of mpdeploy that wrote it, or start a new run directory",
                )
            if not isinstance(manifest["stages"], dict):
                raise TypeError("'stages' is no object")
            for name, record in manifest["stages"].items():
                self._record_from_json(name, record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunDirError(
                f"The manifest {path} is corrupt: {error}.",
                hint="restore it from a copy, or move the directory away and run again; nothing in it was changed",
            ) from error
        self.manifest = manifest

    def __enter__(self) -> Self:
        from filelock import FileLock, Timeout

        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunDirError(
                f"The run directory {self.path} is in use by another process.",
                hint="wait for it to end, or give another one with --run DIR",
            ) from error
        except OSError as error:
            raise RunDirError(f"Cannot lock the run directory {self.path}: {error}.") from error
        if (self.path / MANIFEST).exists():
            self._read()  # another process may have finished stages between our opening and our lock
        remove_partials(self.path)
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    def folder(self, stage: str) -> Path:
        """The folder a stage writes to, made where it is missing."""
        path = self.path / stage
        path.mkdir(parents=True, exist_ok=True)
        return path

    def set_header(self, **values: Any) -> None:
        """Put values beside the stages: the pipeline, the environment."""
        self.manifest |= values
        self._write()

    def record(self, name: str) -> StageRecord | None:
        """A stage's record, or None where it has not run."""
        value = self.manifest["stages"].get(name)
        return None if value is None else self._record_from_json(name, value)

    def records(self) -> dict[str, StageRecord]:
        """All records, in the order they were first written."""
        return {name: self._record_from_json(name, value) for name, value in self.manifest["stages"].items()}

    def put(self, record: StageRecord) -> None:
        """Write a stage's record into the manifest, atomically."""
        self.manifest["stages"][record.name] = {
            "status": record.status,
            "key": dict(record.key),
            "artifacts": {name: self._artifact_to_json(item) for name, item in record.artifacts.items()},
            "report": dict(record.report),
            "seconds": round(record.seconds, 3),
            "started": record.started,
            "message": record.message,
            "hint": record.hint,
        }
        self._write()

    def drop(self, name: str) -> None:
        """Forget a stage."""
        if self.manifest["stages"].pop(name, None) is not None:
            self._write()

    def artifact(self, stage: str, name: str) -> FileArtifact:
        """A finished stage's artifact, its digest checked.

        Raises:
            RunDirError: the stage has not finished.
            ArtifactChangedError: the file is not the one that was recorded.
        """
        record = self.record(stage)
        if record is None or record.status != "done" or name not in record.artifacts:
            raise RunDirError(
                f"{self.path} has no finished {stage} with '{name}'.", hint="run the earlier stages first"
            )
        try:
            return record.artifacts[name].verified()
        except ArtifactChangedError as error:
            raise ArtifactChangedError(
                error.message, hint=f"put the recorded file back, or make it again with --from {stage.split('/')[0]}"
            ) from error

    def _write(self) -> None:
        self.manifest["updated"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(self.path / MANIFEST, self.manifest)

    def _artifact_to_json(self, item: FileArtifact) -> dict[str, Any]:
        return {
            "kind": type(item).__name__,
            "path": str(item.path.relative_to(self.path)),
            "sha256": item.sha256,
            "bytes": item.path.stat().st_size,
            "inputs": [spec.to_json() for spec in item.inputs],
            "outputs": [spec.to_json() for spec in item.outputs],
            "sidecar": dict(item.sidecar),
        }

    def _record_from_json(self, name: str, value: Mapping[str, Any]) -> StageRecord:
        artifacts = {}
        for key, item in value["artifacts"].items():
            artifacts[key] = _KINDS[item["kind"]](
                self.path / item["path"],
                item["sha256"],
                tuple(TensorSpec.from_json(spec) for spec in item["inputs"]),
                tuple(TensorSpec.from_json(spec) for spec in item["outputs"]),
                item["sidecar"],
            )
        return StageRecord(
            name=name,
            status=value["status"],
            key=value["key"],
            artifacts=artifacts,
            report=value["report"],
            seconds=value["seconds"],
            started=value["started"],
            message=value["message"],
            hint=value["hint"],
        )

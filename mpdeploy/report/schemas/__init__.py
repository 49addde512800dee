"""Published JSON Schemas (draft 2020-12) of what CI reads: `gate.schema.json` and `run.schema.json` beside this file.

`python -m mpdeploy.report.schemas` writes them from the definitions in the code; a test holds them equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpdeploy.gates.schema import GATE_SCHEMA

_TEXT: dict[str, Any] = {"type": "string"}
_TEXT_OR_NULL: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ANYTHING: dict[str, Any] = {"type": "object"}

_TENSOR = {
    "type": "object",
    "properties": {
        "name": _TEXT,
        "dtype": _TEXT,
        "shape": {
            "anyOf": [
                {
                    "type": "array",
                    "items": {"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
                },
                {"type": "null"},
            ],
            "description": "an integer: fixed; a name: symbolic; null: unknown",
        },
    },
    "required": ["name", "dtype", "shape"],
    "additionalProperties": False,
}

_ARTIFACT = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["FileArtifact", "Checkpoint", "OnnxModel", "Engine"]},
        "path": {"type": "string", "description": "relative to the run directory"},
        "sha256": {"type": "string", "description": "of the file when the stage ended"},
        "bytes": {"type": "integer", "minimum": 0},
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {"type": "array", "items": _TENSOR},
        "sidecar": {**_ANYTHING, "description": "what made it"},
    },
    "required": ["kind", "path", "sha256", "bytes", "inputs", "outputs", "sidecar"],
    "additionalProperties": False,
}

_STAGE = {
    "type": "object",
    "properties": {
        "status": {"enum": ["done", "failed", "interrupted", "unavailable"]},
        "key": {**_ANYTHING, "description": "all that decides whether the stage must run again"},
        "artifacts": {"type": "object", "additionalProperties": _ARTIFACT},
        "report": {**_ANYTHING, "description": "what the stage measured"},
        "seconds": {"type": "number", "minimum": 0},
        "started": {"type": "string", "description": "UTC, ISO 8601"},
        "message": _TEXT_OR_NULL,
        "hint": _TEXT_OR_NULL,
    },
    "required": ["status", "key", "artifacts", "report", "seconds", "started", "message", "hint"],
    "additionalProperties": False,
}

_GATE = {
    "type": "object",
    "properties": {
        "id": _TEXT,
        "metric": _TEXT,
        "limit": {"type": "number"},
        "at": {"type": "string", "description": "a glob over places"},
        "precision": {"enum": ["fp32", "fp16", "bf16", None]},
        "slice": {**_TEXT_OR_NULL, "description": "a glob over slices; null: all samples"},
        "times_noise": {
            "anyOf": [{"type": "number"}, {"type": "null"}],
            "description": "the limit is at least so many times the noise floor measured for it",
        },
        "advisory": {"type": "boolean"},
    },
    "required": ["id", "metric", "limit"],
    "additionalProperties": False,
}

RUN_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "run.json of mpdeploy",
    "description": "The manifest of a run directory: with evidence/ it is all that `mpdeploy gate` needs.",
    "type": "object",
    "properties": {
        "schema": {"const": 1},
        "stages": {"type": "object", "additionalProperties": _STAGE},
        "updated": _TEXT,
        "pipeline": _TEXT,
        "config": {**_ANYTHING, "description": "the pipeline; a function is its name and the digest of its source"},
        "gates": {"type": "array", "items": _GATE},
        "environment": _ANYTHING,
        "chosen_engine": {**_TEXT_OR_NULL, "description": "the fastest engine that failed no gate"},
    },
    "required": ["schema", "stages"],
    "additionalProperties": True,
}

SCHEMAS: dict[str, dict[str, Any]] = {"gate.schema.json": GATE_SCHEMA, "run.schema.json": RUN_SCHEMA}


def schema_text(name: str) -> str:
    """A schema as its file holds it."""
    return json.dumps(SCHEMAS[name], indent=2, ensure_ascii=False) + "\n"


def write_schemas(folder: Path = Path(__file__).parent) -> list[Path]:
    """Write the published files; returns their paths."""
    for name in SCHEMAS:
        (folder / name).write_text(schema_text(name), encoding="utf-8")
    return [folder / name for name in SCHEMAS]

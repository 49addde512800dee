"""Writing what a run is told by: gate.json, junit.xml, summary.md, report.html, each atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpdeploy.artifact import FileArtifact, Golden
from mpdeploy.errors import MissingExtraError
from mpdeploy.files import sha256_of_file, write_json, write_text
from mpdeploy.report.graph import Node, outline_of
from mpdeploy.report.html import render_html
from mpdeploy.report.junit import render_junit
from mpdeploy.report.markdown import render_markdown
from mpdeploy.run_dir import RunDir

REPORTS = ("gate.json", "junit.xml", "summary.md", "report.html")


def write_reports(directory: RunDir, gate_value: Mapping[str, Any]) -> list[Path]:
    """Write gate.json and what is rendered from it and the manifest: junit.xml, summary.md, and report.html where jinja2 is."""
    write_json(directory.path / "gate.json", gate_value)
    write_text(directory.path / "junit.xml", render_junit(dict(gate_value)))
    write_text(directory.path / "summary.md", render_markdown(dict(gate_value)))
    written = [directory.path / name for name in REPORTS[:3]]
    try:
        html = render_html(
            directory, dict(gate_value), plans=_plans(directory), golden=_golden(directory), graph=_graph(directory)
        )
    except MissingExtraError:
        return written
    write_text(directory.path / "report.html", html)
    return [*written, directory.path / "report.html"]


def _plans(directory: RunDir) -> dict[str, dict[str, Any]]:
    record = directory.record("30-convert")
    if record is None:
        return {}
    return {
        name.removeprefix("plan."): json.loads(item.path.read_text(encoding="utf-8"))
        for name, item in record.artifacts.items()
        if name.startswith("plan.") and _intact(item)
    }


def _golden(directory: RunDir) -> Golden | None:
    record = directory.record("20-export")
    item = record.artifacts.get("golden") if record else None
    return Golden.load(item.path) if item is not None and _intact(item) else None


def _graph(directory: RunDir) -> list[Node] | None:
    record = directory.record("20-export")
    item = record.artifacts.get("model") if record else None
    return outline_of(item.path) if item is not None and _intact(item) else None


def _intact(item: FileArtifact) -> bool:
    return item.path.is_file() and sha256_of_file(item.path) == item.sha256

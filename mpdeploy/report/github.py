"""What GitHub reads of a job: `::error` lines in its log, and the step's summary."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from mpdeploy.report.markdown import MAX_BYTES, github_annotations, render_markdown
from mpdeploy.report.reading import Json

SUMMARY = "GITHUB_STEP_SUMMARY"


def tell_github(gate: Json, stream: TextIO, environment: Mapping[str, str] = os.environ) -> None:
    """Print annotations where GITHUB_ACTIONS is set, and add the summary to the file that GITHUB_STEP_SUMMARY names.

    Args:
        gate: gate.json.
        stream: GitHub reads both streams of a step; stderr where stdout holds a document.
        environment: of the process.
    """
    if environment.get("GITHUB_ACTIONS"):
        for line in github_annotations(gate):
            print(line, file=stream)
    if environment.get(SUMMARY):
        append_summary(gate, Path(environment[SUMMARY]))


def append_summary(gate: Json, path: Path) -> None:
    """Add the summary to what earlier commands of the step wrote, within what GitHub takes for the whole step."""
    room = MAX_BYTES - (path.stat().st_size if path.is_file() else 0)
    text = render_markdown(gate, max_bytes=max(room, 2048))
    if len(text.encode()) <= room:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)

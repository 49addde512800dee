"""Every command block of every example's README runs, in order, in a copy of its folder.

A block may be marked, on the line above it, with one of
    <!-- exit: 10 -->            it must end with that exit code instead of 0
    <!-- slow -->                it, and with it the whole README, is run with the slow tests only
    <!-- not-run: reason -->     it is shown but not run
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
BLOCK = re.compile(r"((?:^<!--[^\n]*-->\n)*)^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One command block."""

    commands: str
    line: int
    exit_code: int = 0
    slow: bool = False
    not_run: str | None = None


def blocks_of(text: str) -> list[Block]:
    """The blocks of a README with their marks."""
    found = []
    for match in BLOCK.finditer(text):
        marks = match.group(1)
        exit_code = re.search(r"<!-- exit: (\d+) -->", marks)
        not_run = re.search(r"<!-- not-run: (.+?) -->", marks)
        found.append(
            Block(
                commands=match.group(2),
                line=text[: match.start(2)].count("\n"),
                exit_code=int(exit_code.group(1)) if exit_code else 0,
                slow="<!-- slow -->" in marks,
                not_run=not_run.group(1) if not_run else None,
            )
        )
    return found


def _examples() -> list[object]:
    params = []
    for readme in sorted(EXAMPLES.glob("*/README.md")):
        blocks = blocks_of(readme.read_text(encoding="utf-8"))
        if any(block.not_run is None for block in blocks):
            marks = [pytest.mark.slow] if any(block.slow for block in blocks) else []
            params.append(pytest.param(readme, id=readme.parent.name, marks=marks))
    return params


@pytest.mark.timeout(900)
@pytest.mark.parametrize("readme", _examples())
def test_the_commands_of_an_example_do_what_it_says(readme: Path, tmp_path: Path) -> None:
    folder = tmp_path / readme.parent.name
    shutil.copytree(readme.parent, folder, ignore=shutil.ignore_patterns("__pycache__", "*.onnx", "*.npz"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "MPDEPLOY_REPO": str(EXAMPLES.parent), "PYTHONWARNINGS": "ignore"}
    for block in blocks_of(readme.read_text(encoding="utf-8")):
        if block.not_run is not None:
            continue
        process = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.commands],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=800, check=False,
        )  # fmt: skip
        assert process.returncode == block.exit_code, (
            f"{readme.parent.name}/README.md:{block.line} ended with {process.returncode}, expected {block.exit_code}:\n"
            f"{block.commands}\n{process.stdout[-3000:]}\n{process.stderr[-3000:]}"
        )


def test_the_reader_of_blocks_sees_marks_and_lines() -> None:
    text = "# t\n\n```bash\na\nb\n```\n<!-- exit: 10 -->\n```bash\nc\n```\n<!-- slow -->\n<!-- not-run: needs a GPU -->\n```bash\nd\n```\n```python\ne\n```\n"
    assert blocks_of(text) == [
        Block("a\nb\n", 3),
        Block("c\n", 8, exit_code=10),
        Block("d\n", 13, slow=True, not_run="needs a GPU"),
    ]


@pytest.mark.parametrize(
    ("commands", "code"), [("true\n", 0), ("false\ntrue\n", 1), ("false | true\n", 1), ("echo $UNSET_NAME\n", 1)]
)
def test_a_block_fails_at_its_first_failing_command(commands: str, code: int) -> None:
    process = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], capture_output=True, check=False)
    assert (process.returncode != 0) is (code != 0)

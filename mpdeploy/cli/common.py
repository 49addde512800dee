"""What verbs share: the one JSON document on stdout, everything else on stderr, options in one wording, and tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
Data = Annotated[
    str,
    typer.Option(
        "--data", metavar="DATA", help="An .npz with one array an input, a folder of such, or module:function."
    ),
]
OptionalData = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DATA", help="An .npz with one array an input, a folder of such, or module:function."
    ),
]
EngineName = Annotated[str | None, typer.Option("--engine", metavar="NAME", help="A row of the engine table.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]

_printed = False


def emit(document: Any) -> None:
    """Print the verb's JSON document."""
    global _printed
    from mpdeploy.files import finite_json

    print(json.dumps(finite_json(document), indent=2, ensure_ascii=False), flush=True)
    _printed = True


def printed_document() -> bool:
    """Whether a document was printed."""
    return _printed


def console(*, stderr: bool = True) -> Console:
    """A console: on stderr for progress and messages, on stdout for what was asked for."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else 160)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the house's style."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def verdict_markup(verdict: str) -> str:
    """A verdict in its colour; the word is always there."""
    colour = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "unvalidated": "yellow"}.get(
        verdict, "dim"
    )
    return f"[{colour}]{verdict}[/]"


def plain(text: object) -> str:
    """A text that stands beside markup, as it is: brackets in a path, a name or a hint style nothing."""
    from rich.markup import escape

    return escape(str(text))


def human_bytes(count: float) -> str:
    """1234567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def number(value: Any, digits: int = 2) -> str:
    """A number with few digits, or a dash."""
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    return f"{value:.{digits}g}" if abs(value) < 0.01 or abs(value) >= 1e5 else f"{value:.{digits + 1}g}"

"""What the terminal shows of a run: a live list of stages with bars and times, then one table."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mpdeploy.cli.common import human_bytes, number, plain, table, verdict_markup
from mpdeploy.run_dir import StageRecord

_MARKS = {
    "done": "[green]done[/]",
    "cached": "[dim]kept[/]",
    "failed": "[bold red]failed[/]",
    "unavailable": "[yellow]not here[/]",
}


class LiveListener:
    """Draws on a terminal; writes plain lines where there is none (a log)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=False) if console.is_terminal else None
        self._rows: dict[str, tuple[str, str, float]] = {}
        self._running: tuple[str, int, int, str, float] | None = None
        self._told: float = 0.0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._running = None
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
            self._live.__exit__(None, None, None)

    def stage_started(self, name: str) -> None:
        """A stage begins."""
        self._running = (name, 0, 0, "", time.perf_counter())
        self._draw(f"{name} ...")

    def stage_progress(self, name: str, done: int, total: int, text: str) -> None:
        """A stage goes on."""
        begin = self._running[4] if self._running else time.perf_counter()
        self._running = (name, done, total, text, begin)
        if self._live is not None:
            self._live.update(self._render())
        elif time.perf_counter() - self._told > 5:
            self._told = time.perf_counter()
            self._console.print(f"  {name}: {text}" + (f" ({done}/{total})" if total else ""), markup=False)

    def stage_ended(self, record: StageRecord, *, cached: bool) -> None:
        """A stage ended or was kept."""
        self._running = None
        status = "cached" if cached and record.status == "done" else record.status
        note = record.message or ""
        self._rows[record.name] = (status, note, record.seconds)
        seconds = "" if cached else f" in {record.seconds:.1f} s"
        self._draw(
            f"{record.name}: {'kept from an earlier run' if status == 'cached' else status}{seconds}{': ' + note if note else ''}"
        )

    def message(self, text: str) -> None:
        """Something to know."""
        (self._live.console if self._live is not None else self._console).print(text, markup=False, style="dim")

    def _draw(self, line: str) -> None:
        if self._live is not None:
            self._live.update(self._render())
        else:
            self._console.print(line, markup=False)

    def _render(self) -> Group:
        rows = Table.grid(padding=(0, 2))
        for name, (status, note, seconds) in self._rows.items():
            rows.add_row(
                name,
                Text.from_markup(_MARKS.get(status, status)),
                "" if status in ("cached", "unavailable") else f"{seconds:.1f} s",
                Text(note.split("\n")[0][:90], style="dim"),
            )
        if self._running is not None:
            name, done, total, text, begin = self._running
            bar = (
                ProgressBar(total=total, completed=done, width=24)
                if total
                else ProgressBar(total=None, pulse=True, width=24)
            )
            rows.add_row(Text(name, style="bold"), bar, f"{time.perf_counter() - begin:.0f} s", Text(text, style="dim"))
        return Group(rows)


def summary_table(console: Console, document: dict[str, Any]) -> None:
    """The run in one table, its verdicts that are not a pass, and where the evidence lies."""
    columns = ("stage", "artifact", "size", "drift (rel L2)", "accuracy", "latency ms", "verdict")
    rows = table(*columns, right=("size", "drift (rel L2)", "latency ms"))
    for row in document["table"]:
        interval = row.get("score_change_pt")
        score = "-" if row["score"] is None else f"{100 * row['score']:.2f} %"
        if interval is not None:
            score += f" ({interval['measured'] + 0.0:+.2f} pt [{interval['low']:+.2f}, {interval['high']:+.2f}])"
        size = "-" if row["bytes"] is None else human_bytes(row["bytes"])
        name = row["artifact"] + (" *" if row["artifact"] == document.get("chosen_engine") else "")
        rows.add_row(
            row["stage"],
            plain(name),
            size,
            number(row["rel_l2"]),
            score,
            number(row["median_ms"]),
            verdict_markup(row["verdict"] or "-"),
        )
    console.print(rows)
    waiting: dict[str, int] = {}
    for verdict in document.get("verdicts", []):
        if verdict["verdict"] == "unvalidated":
            waiting[verdict["at"]] = waiting.get(verdict["at"], 0) + 1
        elif verdict["verdict"] != "pass":
            word = (
                f"[dim]advisory {verdict['verdict']}[/]" if verdict["advisory"] else verdict_markup(verdict["verdict"])
            )
            console.print(f"{word}  ", end="")
            console.print(verdict["message"], markup=False, style="dim" if verdict["advisory"] else None)
    for at, count in waiting.items():
        console.print(
            f"{verdict_markup('unvalidated')}  {at}: {count} gates wait for a machine that can run it; take {plain(document['run'])} there "
            "and go on with --from 50-validate",
        )
    if document.get("chosen_engine"):
        console.print(f"* the fastest engine that passed here: {document['chosen_engine']}", markup=False)
    if document["verdict"] is not None:
        console.print(
            f"\n{plain(document['run'])}: {verdict_markup(document['verdict'])}   (report.html, gate.json and evidence/ lie there)"
        )

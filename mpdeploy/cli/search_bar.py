"""What the terminal shows of a search: a bar, evaluations, the best answer so far, and the time left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console

TOLD_EVERY_S = 10.0


class SearchBar:
    """Draws on a terminal; writes a plain line now and then where there is none (a log)."""

    def __init__(self, console: Console, name: str) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self._console = console
        self._name = name
        self._told = time.perf_counter()
        self._bar = (
            Progress(
                SpinnerColumn(), TextColumn("{task.fields[doing]}", markup=False), BarColumn(bar_width=24),
                TextColumn("{task.fields[said]}", markup=False), console=console, transient=True,
            )
            if console.is_terminal
            else None
        )  # fmt: skip
        self._task = None if self._bar is None else self._bar.add_task("", total=None, doing=name, said="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def doing(self, text: str) -> None:
        """What is done before and after the search."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, doing=f"{self._name}: {text}", said="")

    def searching(self, now: Any) -> None:
        """Numbers of the search (see `precision.search.types.SearchProgress`)."""
        said = search_line(now)
        if self._bar is not None and self._task is not None:
            share = now.fraction
            self._bar.update(
                self._task, doing=f"{self._name}: {now.phase}", said=said,
                total=None if share is None else 1.0, completed=share or 0.0,
            )  # fmt: skip
        elif time.perf_counter() - self._told > TOLD_EVERY_S:
            self._told = time.perf_counter()
            self._console.print(f"{self._name}: {now.phase}: {said}", markup=False)


def search_line(now: Any) -> str:
    """Evaluations, best, time left."""
    best = "none yet" if now.best is None else f"{now.best} kept, drift {now.best_drift:.2g}"
    left = "" if now.seconds_left is None else f", about {_duration(now.seconds_left)} left"
    return f"{now.evaluations:.1f} evaluations, best so far: {best}{left}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

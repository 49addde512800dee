"""The library's one logger, and Ctrl-C while native code runs.

The library keeps the logger of the first builder or runtime that lives and ignores all later ones, so there is one
logger a module for the life of the process; whoever wants its lines collects them for a while (`collected_lines`).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

_LOGGERS: dict[str, Any] = {}

# What every call adds where there is no driver: CUDA's own complaint, no cause of anything.
_NOISE = ("catchCudaError", "Error reading CUDA GPU properties")


@dataclass(eq=False)
class Lines:
    """What the library logged while it was listened to."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The errors, each once, without those that only say that there is no driver."""
        return without_noise("\n".join(dict.fromkeys(self.errors))) or "the library gave no reason"


def without_noise(text: str) -> str:
    """`text` without the lines that the library adds to any error on a machine without a driver."""
    lines = [line for line in text.splitlines() if line.strip() and not any(noise in line for noise in _NOISE)]
    return "\n".join(lines) or text


@contextlib.contextmanager
def collected_lines(trt: Any) -> Iterator[tuple[Any, Lines]]:
    """Yield the module's logger and the lines that it is given until the block ends."""
    logger = _LOGGERS.get(trt.__name__)
    if logger is None:
        logger = _LOGGERS[trt.__name__] = _make_logger(trt)
    lines = Lines()
    logger.listeners.append(lines)
    try:
        yield logger, lines
    finally:
        logger.listeners.remove(lines)


def _make_logger(trt: Any) -> Any:
    severity_of = trt.ILogger.Severity
    errors = (severity_of.INTERNAL_ERROR, severity_of.ERROR)

    class Logger(trt.ILogger):
        """Hands errors and warnings to whoever listens; the rest is dropped."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.listeners: list[Lines] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in errors:
                for lines in self.listeners:
                    lines.errors.append(msg)
            elif severity == severity_of.WARNING:
                for lines in self.listeners:
                    lines.warnings.append(msg)

    return Logger()


@contextlib.contextmanager
def deferred_signals() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C and SIGTERM while native code runs; yield a function that says whether one came.

    Python runs a signal's handler inside whatever callback the library makes next, and the bindings swallow what the
    handler raises. So the signal is noted, the progress monitor cancels, and the handler runs when the block ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    handlers: dict[int, Callable[[int, Any], Any]] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):
            handlers[number] = handler
            signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        for held, handler in handlers.items():
            signal.signal(held, handler)
        for first in came[:1]:
            handlers[first](first, None)

"""When cores of this machine stood still: a virtual machine's host may take one away for seconds, and no clock of a server tells."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from types import TracebackType

BEAT_S = 0.02
GAP_S = 0.25
"""A core that lets a thread wait for so long, which only wants to look at the clock, stood still: to share it costs far less."""


class Standstills:
    """While entered, a thread on each of the cores looks at the clock every 20 ms and notes where it could not."""

    def __init__(self, cores: Iterable[int] | None) -> None:
        self.found: list[tuple[float, float]] = []
        self._end = threading.Event()
        chosen: list[int | None] = [None] if cores is None else [*dict.fromkeys(cores)]
        self._threads = [threading.Thread(target=self._watch, args=(core,), daemon=True) for core in chosen]

    def __enter__(self) -> Standstills:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _watch(self, core: int | None) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})  # of this thread
        last, ended = time.monotonic(), False
        while not ended:
            ended = self._end.wait(BEAT_S)
            now = time.monotonic()
            if now - last > GAP_S:
                self.found.append((last, now))
            last = now

    def seconds_within(self, begin: float, end: float) -> float:
        """How much of the time between two readings of `time.monotonic()` at least one core stood still."""
        total, reached = 0.0, begin
        for first, last in sorted(self.found):
            first, last = max(first, reached), min(last, end)
            if last > first:
                total, reached = total + last - first, last
        return total

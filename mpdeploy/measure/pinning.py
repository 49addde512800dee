"""Busy threads tied to cores of their own while latencies are taken, and set free afterwards (Linux; elsewhere it says that it cannot).

A runtime makes its threads when a model is opened, so they are found by what they did: those that worked during the warm-up. Each is
tied to the core it last ran on, or to the next free one. Where other processes take much of the cores nothing is pinned: a thread
that may not move would wait for them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpdeploy.measure.conditions import Watch

TASKS = Path("/proc/self/task")
BUSY_SHARE = 0.1
"""A thread that took this share of the process's CPU time in a warm-up is busy."""
MAX_OTHERS = 0.25
"""Other processes may take this share of the cores; where they take more, nothing is pinned."""


class Pins:
    """Which threads were tied to which cores, and why not.

    Attributes:
        cores: thread -> core.
        reason: why nothing is pinned, or an empty text.
    """

    def __init__(self, reason: str = "") -> None:
        self.cores: dict[int, int] = {}
        self.reason = reason
        self._before: dict[int, set[int]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Tie the threads that are busy inside the block to cores of their own."""
        if self.reason:
            yield
            return
        before, watch = _nanoseconds(), Watch()
        yield
        ran = {tid: now - before.get(tid, 0) for tid, now in _nanoseconds().items()}
        others = (watch.shares() or (0.0, 0.0))[0]
        if others > MAX_OTHERS:
            self.reason = (
                f"other processes take {others:.0%} of the cores: a thread that may not move would wait for them"
            )
            self.release()
            return
        least = BUSY_SHARE * sum(ran.values())
        self.pin([tid for tid in sorted(ran, key=lambda tid: -ran[tid]) if ran[tid] > least])

    def pin(self, threads: list[int]) -> None:
        """Tie each thread to one core; threads that were tied before keep theirs."""
        allowed = os.sched_getaffinity(0) if not self._before else set().union(*self._before.values())
        if len(threads) > len(allowed):
            self.reason = f"{len(threads)} threads are busy, and the process may use {len(allowed)} cores"
            self.release()
            return
        free = sorted(allowed - {self.cores[tid] for tid in threads if tid in self.cores})
        for tid in threads:
            if tid in self.cores:
                continue
            with contextlib.suppress(OSError, ValueError, IndexError):  # it ended meanwhile
                mask, last = os.sched_getaffinity(tid), _last_core(tid)
                possible = [core for core in free if core in mask] or sorted(mask)
                core = last if last in possible else possible[0]
                os.sched_setaffinity(tid, {core})
                self._before[tid], self.cores[tid] = mask, core
                free = [other for other in free if other != core]

    def release(self) -> None:
        """Give every thread the cores it had."""
        for tid, mask in self._before.items():
            with contextlib.suppress(OSError):  # it ended meanwhile
                os.sched_setaffinity(tid, mask)
        self._before = {}
        if self.reason:
            self.cores = {}

    def to_json(self) -> dict[str, Any]:
        """`{"pinned", "cores"}`, or `{"pinned": false, "reason"}`."""
        if not self.cores:
            return {"pinned": False, "reason": self.reason or "no thread was busy"}
        return {"pinned": True, "cores": sorted(self.cores.values())}


@contextlib.contextmanager
def pinning(*, wanted: bool, device: str) -> Iterator[Pins]:
    """Yield pins, which are released when the block ends."""
    if not wanted:
        pins = Pins("not asked for")
    elif not device.startswith("cpu"):
        pins = Pins(f"the work is done on {device}")
    elif not hasattr(os, "sched_setaffinity") or not (TASKS / str(threading.get_native_id()) / "schedstat").is_file():
        pins = Pins("this system does not tell which threads are busy")
    else:
        pins = Pins()
    try:
        yield pins
    finally:
        pins.release()


def _nanoseconds() -> dict[int, int]:
    """Thread -> nanoseconds it ran so far."""
    found = {}
    for task in TASKS.iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):  # it ended meanwhile
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0])
    return found


def _last_core(tid: int) -> int:
    return int((TASKS / str(tid) / "stat").read_text().rsplit(")", 1)[1].split()[36])

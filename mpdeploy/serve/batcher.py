"""Requests into batches, greedily: an engine that becomes free takes what has queued meanwhile. No timer, unless one is asked for.

Requests come in on the event loop's thread; engines take batches on threads of their own, or the event loop computes a quick one in
an idle engine's place. One lock guards the queues.
Only requests of one key (the shapes of their samples) share a batch; the queue whose first request is oldest goes first.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from mpdeploy.artifact import Array
from mpdeploy.serve.contract import Contract, Key
from mpdeploy.serve.messages import (
    CancelledRequestError,
    DeadlineError,
    OverloadedError,
    ServeError,
    UnavailableServeError,
)
from mpdeploy.serve.padding import Lengths


class Reply(Protocol):
    """Who waits for a request's outputs: an asyncio future or what looks like one. Called on the event loop's thread, but for `done`."""

    def done(self) -> bool:
        """Whether it has its answer, or wants none."""

    def cancelled(self) -> bool:
        """Whether it wants none."""

    def set_result(self, outputs: dict[str, Array], /) -> None:
        """The outputs by name."""

    def set_exception(self, error: ServeError, /) -> None:
        """Why there are none."""


class Item:
    """A request on its way through the queue and the engine.

    Attributes:
        arrays: in the engine's order.
        rows: samples it holds.
        key: of its batch.
        future: gets the outputs by name, or a ServeError; touched on the event loop's thread alone, but for `done()`.
        deadline: `time.monotonic()` seconds.
        cancelled: whether its client has gone.
        lengths: that its filled-up axes had.
        queued_ns, started_ns, computed_ns: `time.monotonic_ns()` when it was queued, taken, and computed.
    """

    __slots__ = (
        "arrays", "cancelled", "computed_ns", "deadline", "future", "key", "lengths", "queued_ns", "result", "rows",
        "started_ns",
    )  # fmt: skip

    def __init__(
        self,
        arrays: tuple[Array, ...],
        rows: int,
        key: Key,
        future: Reply,
        deadline: float,
        cancelled: Callable[[], bool] | None,
        lengths: Lengths = (),
    ) -> None:
        self.arrays = arrays
        self.rows = rows
        self.key = key
        self.future = future
        self.deadline = deadline
        self.cancelled = cancelled
        self.lengths = lengths
        self.queued_ns = time.monotonic_ns()
        self.started_ns = 0
        self.computed_ns = 0
        self.result: Any = None

    def why_not(self, now: float) -> ServeError | None:
        """Why it need not be computed any more, if so."""
        if self.future.done() or (self.cancelled is not None and self.cancelled()):
            return CancelledRequestError("the client has gone")
        if now > self.deadline:
            waited = (time.monotonic_ns() - self.queued_ns) / 1e6
            return DeadlineError(f"the deadline passed while the request was queued ({waited:.0f} ms)")
        return None


class Borrowed(NamedTuple):
    """A batch and the engine to compute it with, by its thread's lock; and what need not be computed any more."""

    wake: Any
    batch: list[Item]
    dropped: list[tuple[Item, ServeError]]


class Batcher:
    """The queues of one version of a model.

    Args:
        contract: which requests may share a batch, and how many samples it may hold.
        max_queue: requests that may wait; more are refused.
        delay_s: how long a batch that is not full waits for more; 0: not at all.
        on_dropped: called from an engine's thread with requests that were not computed, and why.
        quick: whether so many samples of a key may be computed by who calls `borrow`; None: none are.
        on_quick: called from an engine's thread that leaves such a batch for `borrow`.
    """

    def __init__(
        self,
        contract: Contract,
        *,
        max_queue: int,
        delay_s: float = 0.0,
        on_dropped: Callable[[list[tuple[Item, ServeError]]], None],
        quick: Callable[[Key, int], bool] | None = None,
        on_quick: Callable[[], None] = lambda: None,
    ) -> None:
        self._contract = contract
        self._max_queue = max_queue
        self._delay_ns = int(delay_s * 1e9)
        self._on_dropped = on_dropped
        self._quick = quick if not delay_s else None
        self._on_quick = on_quick
        self._lock = threading.Lock()
        self._queues: dict[Key, deque[Item]] = {}
        self._count = 0
        self._idle: list[Any] = []
        self._closed = False
        self._rate = 0.0  # requests a second, lately: for Retry-After
        self._rate_mark = (time.monotonic(), 0)
        self._taken = 0

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._count

    def submit(self, item: Item) -> None:
        """Queue a request; call `wake` afterwards, best when all requests that came in together are queued.

        Raises:
            OverloadedError: the queue is full.
            UnavailableServeError: the version was closed.
        """
        with self._lock:
            if self._closed:
                raise UnavailableServeError("this version of the model is being unloaded")
            if self._count >= self._max_queue:
                raise OverloadedError(
                    f"the queue is full: {self._count} requests wait", retry_after_s=self._retry_after_s()
                )
            queue = self._queues.get(item.key)
            if queue is None:
                queue = self._queues[item.key] = deque()
            queue.append(item)
            self._count += 1

    def wake(self) -> None:
        """Wake idle engines, as far as there are requests: one that finds none left sleeps on."""
        with self._lock:
            woken = [self._idle.pop() for _ in range(min(len(self._idle), self._count))]
        for lock in woken:
            lock.release()

    def take(self, wake: Any) -> list[Item] | None:
        """Block until there is a batch and return it; None once the batcher is closed and empty.

        Args:
            wake: the calling thread's own `threading.Lock`, acquired.
        """
        while True:
            batch: list[Item] = []
            dropped: list[tuple[Item, ServeError]] = []
            wait_ns = 0
            with self._lock:
                left = not self._closed and self._next_is_quick()
                if not left:
                    batch, dropped, wait_ns = self._pop()
                if not batch:
                    if self._closed and not self._count and not dropped:
                        return None
                    if not dropped:
                        self._idle.append(wake)
            if left:
                self._on_quick()
            if dropped:
                self._on_dropped(dropped)
            if batch:
                return batch
            if not dropped:
                self._wait(wake, wait_ns)

    def borrow(self) -> Borrowed | None:
        """The next batch, if it is quick, and an idle engine to compute it with on the calling thread; `give_back` the engine afterwards."""
        with self._lock:
            if not self._idle or not self._next_is_quick():
                return None
            batch, dropped, _ = self._pop()
            return Borrowed(self._idle.pop(), batch, dropped)

    def give_back(self, wake: Any) -> None:
        """An engine that was borrowed is idle again."""
        with self._lock:
            if not self._closed:
                self._idle.append(wake)
                return
        wake.release()

    def sweep(self) -> list[tuple[Item, ServeError]]:
        """Take out requests whose client has gone or whose deadline passed, wherever they stand in a queue."""
        now = time.monotonic()
        dropped: list[tuple[Item, ServeError]] = []
        with self._lock:
            for key, queue in list(self._queues.items()):
                gone = [(item, why) for item in queue if (why := item.why_not(now)) is not None]
                if gone:
                    dropped += gone
                    out = {id(item) for item, _ in gone}
                    kept = deque(item for item in queue if id(item) not in out)
                    self._count -= len(gone)
                    if kept:
                        self._queues[key] = kept
                    else:
                        del self._queues[key]
            elapsed, taken = now - self._rate_mark[0], self._taken - self._rate_mark[1]
            if elapsed > 0.5:
                self._rate, self._rate_mark = taken / elapsed, (now, self._taken)
        return dropped

    def close(self) -> None:
        """Take no more requests; engines get what is queued, then None."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for wake in idle:
            wake.release()

    def close_and_clear(self) -> list[Item]:
        """Take no more requests, and take out those that are queued: no engine is left."""
        self.close()
        with self._lock:
            items = [item for queue in self._queues.values() for item in queue]
            self._queues.clear()
            self._count = 0
        return items

    def _pop(self) -> tuple[list[Item], list[tuple[Item, ServeError]], int]:
        """A batch from the oldest queue, what need not be computed any more, and how long to wait for a fuller one (ns)."""
        batch: list[Item] = []
        dropped: list[tuple[Item, ServeError]] = []
        if not self._count:
            return batch, dropped, 0
        key = self._oldest()
        queue = self._queues[key]
        if self._delay_ns and not self._closed:
            ready_ns = queue[0].queued_ns + self._delay_ns - time.monotonic_ns()
            if ready_ns > 0 and sum(item.rows for item in queue) < self._contract.max_batch:
                return batch, dropped, ready_ns
        now = time.monotonic()
        left = self._contract.max_batch if self._contract.batched else 1
        while queue:
            item = queue[0]
            why = item.why_not(now)
            if why is None:
                if item.rows > left:
                    break
                left -= item.rows
                batch.append(item)
            else:
                dropped.append((item, why))
            queue.popleft()
            self._count -= 1
        self._taken += len(batch)
        if not queue:
            del self._queues[key]
        return batch, dropped, 0

    def _next_is_quick(self) -> bool:
        if self._quick is None or not self._count:
            return False
        key = self._oldest()
        return self._quick(key, sum([item.rows for item in self._queues[key]]))

    def _oldest(self) -> Key:
        queues = self._queues
        return next(iter(queues)) if len(queues) == 1 else min(queues, key=lambda each: queues[each][0].queued_ns)

    def _wait(self, wake: Any, wait_ns: int) -> None:
        if not wait_ns:
            wake.acquire()
            return
        if not wake.acquire(timeout=wait_ns / 1e9):
            with self._lock:
                if wake in self._idle:
                    self._idle.remove(wake)
                    return
            wake.acquire()  # submit took it out and releases it

    def _retry_after_s(self) -> float:
        return float(min(60, max(1, math.ceil(self._count / self._rate)))) if self._rate > 0 else 1.0

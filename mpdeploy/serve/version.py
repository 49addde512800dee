"""One loaded version of a model: its engine's instances, its queue, and how requests pass through them.

Everything here but `Instance`'s own thread runs on the event loop's thread, so counters need no lock. A batch that the engine is known to
compute within `Loaded.inline_ms` is computed on the event loop's thread too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpdeploy.artifact import Array
from mpdeploy.serve.batcher import Batcher, Borrowed, Item, Reply
from mpdeploy.serve.contract import Contract, Key
from mpdeploy.serve.instance import Done, Instance, Watcher
from mpdeploy.serve.memory import remember
from mpdeploy.serve.messages import (
    CancelledRequestError,
    DeadlineError,
    InferRequest,
    InferResponse,
    ModelMetadata,
    OverloadedError,
    ServeError,
    UnavailableServeError,
)
from mpdeploy.serve.metrics import model_key
from mpdeploy.serve.options import ModelOptions
from mpdeploy.serve.selection import Candidate
from mpdeploy.serve.shared import Counts
from mpdeploy.serve.statistics import Statistics
from mpdeploy.serve.warmup import Prepared

log = logging.getLogger("mpdeploy.serve")


LEARNING_DOWN, LEARNING_UP = 0.5, 0.1
"""How far an estimate follows a batch that took less, or longer: a core that did something else in between says nothing of the engine."""
MAX_LEARNT = 1024
COMPUTE_SHARE, LONGEST_TURN_NS = 2, 50_000_000
"""While batches wait, the event loop's thread computes for so many times as long as its connections just took, at most so long at a stretch:
to refuse nine requests for each one that is computed would otherwise take most of its time."""


@dataclass(frozen=True)
class Loaded:
    """An engine that runs: what `Version` is made of.

    Attributes:
        candidate: the engine and its verdict.
        instances: of it, each with its thread.
        prepared: what was learnt by running it.
        inline_ms: a batch that takes no longer is computed on the event loop's thread; 0: none is.
    """

    candidate: Candidate
    instances: tuple[Instance, ...]
    prepared: Prepared
    inline_ms: float


class Version:
    """A version that serves, drains or is closed. Made by `loading.load_version`."""

    def __init__(
        self,
        name: str,
        number: int,
        loaded: Loaded,
        metadata: ModelMetadata,
        options: ModelOptions,
        watchers: tuple[Watcher, ...],
    ) -> None:
        self.name = name
        self.number = str(number)
        self.contract: Contract = loaded.prepared.contract
        self.statistics = Statistics()
        self.options = options
        self.watchers = watchers
        self.digest = ""  # of its run, when it was loaded
        self.pending = 0
        self.dead: str | None = None
        self.closing = False
        self._waking = False
        self._left_ns = 0  # when the event loop's thread last turned from batches that wait to its connections
        self._loop = asyncio.get_running_loop()
        self._instances = loaded.instances
        self._inline_ns = int(loaded.inline_ms * 1e6)
        self._took_ns: dict[tuple[Key, int], float] = {}  # by key and size of a batch, up to powers of two
        self._texts = tuple(spec.name for spec in self.contract.outputs if spec.dtype == "object")
        self.metadata = metadata
        self.batcher = Batcher(
            self.contract,
            max_queue=options.max_queue,
            delay_s=options.delay_ms / 1000,
            on_dropped=lambda dropped: self._post(self._drop, dropped),
            quick=self._quick if self._inline_ns else None,
            on_quick=lambda: self._post(self._wake),
        )

    def serve(self) -> None:
        """Let the engines compute."""
        for instance in self._instances:
            instance.serve(self.contract, self.batcher)

    async def infer(self, request: InferRequest) -> dict[str, Array]:
        """Queue a request and wait for its outputs, all of them.

        Raises:
            ServeError: of the kind that says what happened.
        """
        future: asyncio.Future[dict[str, Array]] = self._loop.create_future()
        self.submit(request, future)
        return await future

    def submit(self, request: InferRequest, reply: Reply) -> None:
        """Queue a request whose outputs, all of them, or ServeError `reply` will get.

        Raises:
            ServeError: it was not queued; `reply` hears nothing.
        """
        statistics = self.statistics
        try:
            if self.dead is not None:
                raise UnavailableServeError("the engine of this model ended; the server's log says why")
            arrays, rows, key, lengths = self.contract.admit(request)
            if not rows:
                reply.set_result(self.contract.empty_answer())
                statistics.answered(0)
                return
            now = time.monotonic()
            deadline = now + self.options.deadline_s if request.deadline is None else request.deadline
            if deadline <= now:
                raise DeadlineError("the deadline had passed when the request came in")
            self.batcher.submit(Item(arrays, rows, key, reply, deadline, request.cancelled, lengths))
        except ServeError as error:
            statistics.failed(_reason(error))
            raise
        self.pending += 1
        if not self._waking:  # requests that came in together are queued first, and share a batch
            self._waking = True
            self._loop.call_soon(self._wake)

    def response(self, request: InferRequest, outputs: Mapping[str, Array]) -> InferResponse:
        """The outputs that were asked for, as an answer."""
        if request.outputs:
            outputs = {output.name: outputs[output.name] for output in request.outputs}
        return InferResponse(self.name, self.number, request.id, outputs)

    def _wake(self) -> None:
        self._waking = False
        if (borrowed := self.batcher.borrow()) is None:
            self._left_ns = 0
            self.batcher.wake()
            return
        now_ns = time.monotonic_ns()
        until_ns = now_ns + min(COMPUTE_SHARE * (now_ns - self._left_ns), LONGEST_TURN_NS) if self._left_ns else 0
        while borrowed is not None:
            self._compute_here(borrowed)
            now_ns = time.monotonic_ns()
            borrowed = self.batcher.borrow() if now_ns < until_ns else None
        self._left_ns = 0
        if self.batcher.queued and not self._waking:  # what waits is computed after what has come in meanwhile
            self._waking, self._left_ns = True, now_ns
            self._loop.call_soon(self._wake)

    def _quick(self, key: Key, rows: int) -> bool:
        """Whether so many samples are known to be computed in a time that other connections may wait for."""
        contract = self.contract
        size = contract.size_to_run(min(rows, contract.max_batch)) if contract.batched else rows
        took_ns = self._took_ns.get((key, (size - 1).bit_length()))
        return took_ns is not None and took_ns <= self._inline_ns

    def _compute_here(self, borrowed: Borrowed) -> None:
        wake, batch, dropped = borrowed
        if dropped:
            self._drop(dropped)
        instance = next(each for each in self._instances if each.wake is wake)
        try:
            if batch:
                instance.compute(batch, self._delivered)
        except Exception as error:
            instance.ended = True
            self._died(error)
        finally:
            self.batcher.give_back(wake)

    @property
    def ready(self) -> bool:
        """Whether it takes requests and an engine computes them."""
        return not self.closing and self.dead is None

    def tick(self) -> None:
        """Answer requests whose deadline passed, queued or in an engine that is still busy with them."""
        dropped = self.batcher.sweep()
        if dropped:
            self._drop(dropped)
        now = time.monotonic()
        for instance in self._instances:
            for item in instance.running:
                if now > item.deadline and not item.future.done():
                    item.future.set_exception(DeadlineError("the deadline passed while the request was computed"))

    async def close(self, timeout_s: float) -> bool:
        """Drain, then end the engines' threads; whether all of that ended in time."""
        self.closing = True
        begin = time.monotonic()
        while self.pending and time.monotonic() - begin < timeout_s:
            await asyncio.sleep(0.005)
        self.batcher.close()
        drained = not self.pending
        left = max(0.1, timeout_s - (time.monotonic() - begin)) if drained else 0.1
        ended = await asyncio.gather(
            *(self._loop.run_in_executor(None, instance.join, left) for instance in self._instances)
        )
        for watcher in self.watchers:
            await self._loop.run_in_executor(None, watcher.close)
        if not drained or not all(ended):
            log.error("version %s of %s did not end within %g s", self.number, self.name, timeout_s)
        return drained and all(ended)

    # -- called from the engines' threads ------------------------------------------------------------------------------

    def deliver(self, done: Done) -> None:
        """Hand what was computed to the event loop."""
        self._post(self._delivered, done)

    def died(self, error: BaseException) -> None:
        """An engine's thread ended by itself."""
        self._post(self._died, error)

    def _post(self, function: Callable[..., None], *values: Any) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *values)

    def counts(self, name: str) -> Counts:
        """Its counters and gauges, and those of its watchers, by the keys under which all processes add them up."""
        flat = self.statistics.to_flat() | {"gauge/pending": self.pending, "gauge/dead": float(self.dead is not None)}
        for watcher in self.watchers:
            flat |= watcher.figures()
        return {model_key(name, self.number, key): value for key, value in flat.items()}

    # -- on the event loop's thread ------------------------------------------------------------------------------------

    def _delivered(self, done: Done) -> None:
        statistics, now_ns, now = self.statistics, time.monotonic_ns(), time.monotonic()
        self.pending -= len(done.items)
        if done.retried:
            statistics.retried += 1
        statistics.nonfinite_requests += done.nonfinite
        if done.failed is not None:
            for item in done.items:
                self._fail(item, done.failed, now_ns)
            return
        statistics.ran(done.rows, done.size, len(done.items), done.input_ns, done.infer_ns, done.output_ns)
        if self._inline_ns:
            self._learn(done)
        for item in done.items:
            future = item.future
            if future.done():
                statistics.failed("CANCELED" if future.cancelled() else "DEADLINE", now_ns - item.queued_ns)
            elif now > item.deadline:
                self._fail(item, DeadlineError("the deadline passed while the request was computed"), now_ns)
            else:
                future.set_result(self._encoded(item.result) if self._texts else item.result)
                statistics.queue_ns += item.started_ns - item.queued_ns
                statistics.answered(now_ns - item.queued_ns)

    def _learn(self, done: Done) -> None:
        """How long the engine takes for such a batch; what proves slow on the event loop's thread is computed on its own from then on."""
        at, took_ns = (done.items[0].key, (done.size - 1).bit_length()), done.infer_ns
        known_ns = self._took_ns.get(at)
        if known_ns is None:
            remember(self._took_ns, at, took_ns, MAX_LEARNT)
        else:
            self._took_ns[at] = known_ns + (took_ns - known_ns) * (LEARNING_DOWN if took_ns < known_ns else LEARNING_UP)

    def _drop(self, dropped: list[tuple[Item, ServeError]]) -> None:
        now_ns = time.monotonic_ns()
        self.pending -= len(dropped)
        for item, error in dropped:
            self._fail(item, error, now_ns)

    def _fail(self, item: Item, error: ServeError, now_ns: int) -> None:
        self.statistics.failed(_reason(error), now_ns - item.queued_ns)
        if not item.future.done():
            item.future.set_exception(error)

    def _died(self, error: BaseException) -> None:
        self.dead = f"{type(error).__name__}: {error}"
        log.critical("an engine of version %s of %s ended: %s", self.number, self.name, self.dead)
        for instance in self._instances:
            if instance.ended:
                held, instance.running = instance.running, []
                self._drop([(item, UnavailableServeError("the engine ended")) for item in held])
        if all(instance.ended for instance in self._instances):
            self._drop([(item, UnavailableServeError("the engine ended")) for item in self.batcher.close_and_clear()])

    def _encoded(self, outputs: dict[str, Array]) -> dict[str, Array]:
        """Outputs with text as `bytes`."""
        encoded = dict(outputs)
        for name in self._texts:
            array = outputs[name]
            texts = np.empty(array.size, np.object_)
            for index, item in enumerate(array.ravel()):
                texts[index] = item.encode() if isinstance(item, str) else item
            encoded[name] = texts.reshape(array.shape)
        return encoded


def _reason(error: ServeError) -> str:
    if isinstance(error, OverloadedError):
        return "REJECTED"
    if isinstance(error, CancelledRequestError):
        return "CANCELED"
    if isinstance(error, DeadlineError):
        return "DEADLINE"
    return "BACKEND" if error.status == 500 else "OTHER"

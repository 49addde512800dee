"""One engine on one device, and the thread that owns it: loads, warms up, computes batches, and closes it there.

While that thread waits for a batch, the event loop's may compute a quick one in its place: to wake a thread costs more than a small model.

A batch that fails is computed again request by request, so that the one that poisons it fails alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mpdeploy.artifact import Array, Runner
from mpdeploy.errors import MpdeployError
from mpdeploy.serve.batcher import Batcher, Item
from mpdeploy.serve.contract import Contract
from mpdeploy.serve.messages import BadRequestError, ModelFailedError, ServeError

log = logging.getLogger("mpdeploy.serve")


class Watcher(Protocol):
    """Sees some of what an engine computes: the shadow comparison, the recorder."""

    failed: int
    """Requests that it should have seen and could not."""

    def offer(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array], rows: int, *, batched: bool) -> None:
        """Called on the engine's thread after the answers have left; must not block. The arrays must not be changed.

        Where the model is not `batched`, they are those of one request, and its first axis means nothing.
        """

    def figures(self) -> dict[str, float]:
        """Counters and gauges for the metrics."""

    def close(self) -> None:
        """Work off what waits, then end."""


class Done:
    """What one run of the engine did, for the statistics."""

    __slots__ = ("failed", "infer_ns", "input_ns", "items", "nonfinite", "output_ns", "retried", "rows", "size")

    def __init__(self, items: list[Item]) -> None:
        self.items = items
        self.rows = self.size = 0
        self.input_ns = self.infer_ns = self.output_ns = 0
        self.nonfinite = 0
        self.retried = False
        self.failed: ServeError | None = None


class Instance:
    """An engine and its thread.

    Args:
        name: of the thread.
        runner: not yet entered.
        contract: what it takes; None until `start` learnt it where `prepare` makes it.
        prepare: called on the thread with the entered runner, before the first batch: warm-up and checks.
        batcher: where batches come from.
        deliver: called on the thread with what was done.
        watchers: see some of it.
    """

    def __init__(
        self,
        name: str,
        runner: Runner,
        *,
        deliver: Callable[[Done], None],
        on_dead: Callable[[BaseException], None],
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self.name = name
        self._runner = runner
        self._deliver = deliver
        self._on_dead = on_dead
        self._watchers = tuple(watchers)
        self._batcher: Batcher | None = None
        self._contract: Contract | None = None
        self._go = threading.Event()
        self.wake = threading.Lock()
        self.wake.acquire()
        self._names: tuple[str, ...] = ()
        self._thread: threading.Thread | None = None
        self.running: list[Item] = []
        self.ended = False

    def start(
        self,
        prepare: Callable[[Runner], Any],
        ready: Callable[[Any, BaseException | None], None],
    ) -> None:
        """Start the thread: it enters the runner, calls `prepare`, and then `ready` with its answer or the exception."""
        self._thread = threading.Thread(target=self._main, args=(prepare, ready), name=self.name, daemon=True)
        self._thread.start()

    def serve(self, contract: Contract, batcher: Batcher) -> None:
        """Compute batches from now on, until the batcher is closed and empty."""
        self._contract, self._batcher = contract, batcher
        self._go.set()

    def abandon(self) -> None:
        """End the thread of an instance that never served."""
        self._go.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread's end; whether it ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def _main(self, prepare: Callable[[Runner], Any], ready: Callable[[Any, BaseException | None], None]) -> None:
        try:
            with self._runner as runner:
                try:
                    prepared = prepare(runner)
                    self._names = tuple(spec.name for spec in runner.inputs)
                except BaseException as error:
                    ready(None, error)
                    return
                ready(prepared, None)
                self._go.wait()
                if self._batcher is not None:
                    while (batch := self._batcher.take(self.wake)) is not None:
                        self.compute(batch, self._deliver)
                        del batch  # a thread that waits keeps no request alive
        except BaseException as error:
            if self._go.is_set():
                self.ended = True
                self._on_dead(error)
            else:
                ready(None, error)

    def compute(self, batch: list[Item], deliver: Callable[[Done], None]) -> None:
        """Compute a batch and deliver it, on the calling thread: the instance's own, or one that borrowed it from the batcher."""
        self.running = batch
        feeds, outputs, done = self._run(batch)
        if done.failed is not None and len(batch) > 1:
            log.warning("a batch of %d requests failed, each is computed alone: %s", len(batch), done.failed)
            for item in batch:
                _, _, alone = self._run([item])
                alone.retried = True
                deliver(alone)
        else:
            deliver(done)
        self.running = []
        if outputs is not None and self._contract is not None:
            for watcher in self._watchers:
                try:
                    watcher.offer(feeds, outputs, done.rows, batched=self._contract.batched)
                except Exception:
                    if not watcher.failed:
                        log.exception("a fault while a request was sampled; more of them are counted, and not logged")
                    watcher.failed += 1

    def _run(self, batch: list[Item]) -> tuple[dict[str, Array], dict[str, Array] | None, Done]:
        contract = self._contract
        assert contract is not None
        done = Done(batch)
        begin = time.monotonic_ns()
        feeds: dict[str, Array] = {}
        try:
            rows = sum([item.rows for item in batch])
            size = contract.size_to_run(rows) if contract.batched else rows
            for position, name in enumerate(self._names):
                feeds[name] = _joined([item.arrays[position] for item in batch], size - rows)
            done.nonfinite = _count_nonfinite(feeds, batch)
            joined = time.monotonic_ns()
            outputs = self._runner.infer(feeds)
            computed = time.monotonic_ns()
            _split(outputs, batch, size, contract.batched)
            if contract.padding is not None:
                for item in batch:
                    if item.lengths:
                        item.result = contract.padding.cut(item.result, item.lengths)
        except ServeError as error:
            done.failed = error
        except MpdeployError as error:
            done.failed = ModelFailedError(f"the engine could not compute the request: {error.message}")
        except Exception as error:
            log.exception("the engine failed")
            done.failed = ModelFailedError(f"the engine could not compute the request: {type(error).__name__}: {error}")
        else:
            end = time.monotonic_ns()
            done.rows, done.size = rows, size
            done.input_ns, done.infer_ns, done.output_ns = joined - begin, computed - joined, end - computed
            for item in batch:
                item.started_ns, item.computed_ns = begin, end
            return feeds, outputs, done
        for item in batch:
            item.started_ns = begin
        return feeds, None, done


def _joined(parts: list[Array], padding: int) -> Array:
    """The parts one after another along axis 0, the last sample repeated to fill up; text as `str` for the runtimes."""
    if padding:
        parts = [*parts, *([parts[-1][-1:]] * padding)]
    if len(parts) == 1:
        array = parts[0]
    elif parts[0].dtype.kind in "OV":
        array = np.concatenate(parts)
    else:  # as numpy.concatenate, which lets go of the GIL for each part and waits to have it back
        contiguous: list[Any] = [np.ascontiguousarray(part) for part in parts]
        array = np.frombuffer(b"".join(contiguous), parts[0].dtype)
        array = array.reshape(-1, *parts[0].shape[1:])
    return _as_text(array) if array.dtype.kind == "O" else array


def _as_text(array: Array) -> Array:
    text = np.empty(array.size, np.object_)
    try:
        for index, item in enumerate(array.ravel()):
            text[index] = item.decode() if isinstance(item, bytes) else item
    except UnicodeDecodeError as error:
        raise BadRequestError(f"a BYTES element is no UTF-8 text: {error.reason} at byte {error.start}") from error
    return text.reshape(array.shape)


def _split(outputs: dict[str, Array], batch: list[Item], size: int, batched: bool) -> None:
    """Give each request its rows, in order."""
    if len(batch) == 1 and (not batched or batch[0].rows == size):
        batch[0].result = outputs
        return
    for name, array in outputs.items():
        if array.ndim == 0 or len(array) != size:
            raise ModelFailedError(f"output '{name}' has the shape {list(array.shape)} for a batch of {size}")
    start = 0
    for item in batch:
        end = start + item.rows
        item.result = {name: array[start:end] for name, array in outputs.items()}
        start = end


def _count_nonfinite(feeds: Mapping[str, Array], batch: list[Item]) -> int:
    """Requests that hold a NaN or an infinity. The sum tells at once where there is none."""
    suspicious = False
    for array in feeds.values():
        if array.dtype.kind == "f":
            with np.errstate(over="ignore", invalid="ignore"):
                suspicious = suspicious or not np.isfinite(array.sum(dtype=np.float32 if array.itemsize < 4 else None))
    if not suspicious:
        return 0
    return sum(any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in item.arrays) for item in batch)

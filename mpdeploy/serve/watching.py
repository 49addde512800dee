"""What looks on while an engine serves: the shadow comparison with the FP32 model, and the recorder of requests for calibration.

Both see a random share of the requests, work on a thread of their own at low priority, and drop what they have no time for:
no request waits for them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from mpdeploy.artifact import Array, OnnxModel, Runner
from mpdeploy.engines import backend
from mpdeploy.errors import MpdeployError, UnavailableError, UsageError
from mpdeploy.files import atomic_path
from mpdeploy.serve.instance import Watcher
from mpdeploy.serve.options import ModelOptions
from mpdeploy.serve.selection import Candidate, Selection

log = logging.getLogger("mpdeploy.serve")

MAX_WAITING = 16
WINDOW = 512
"""Samples that the drift metric is taken over."""
SAMPLES_A_FILE = 32
FLUSH_S = 60.0
_END = object()


class Seen(NamedTuple):
    """Inputs and the engine's outputs: of one sample, with a first axis of length 1; of a whole request where none share a batch."""

    feeds: dict[str, Array]
    outputs: dict[str, Array]
    batched: bool


def watchers_of(selection: Selection, candidate: Candidate, options: ModelOptions) -> tuple[Watcher, ...]:
    """What the options ask for.

    Raises:
        UsageError: a shadow comparison is asked for and the run has no FP32 model.
        UnavailableError: ONNX Runtime, which computes the FP32 model, is not installed.
        ArtifactChangedError: the FP32 model is not the one that the run recorded.
    """
    made: list[Watcher] = []
    if options.shadow_rate > 0:
        if selection.model is None:
            raise UsageError(f"{selection.run.path} has no FP32 model to compare with.", hint="leave --shadow-rate out")
        missing = backend("onnxruntime").available()
        if missing is not None:
            raise UnavailableError(f"The shadow comparison needs ONNX Runtime: {missing.reason}", hint=missing.hint)
        model = selection.model.verified()
        made.append(Shadow(model, rate=options.shadow_rate, limit=options.shadow_limit, name=candidate.name))
    if options.record is not None:
        made.append(Recorder(options.record, rate=options.record_rate, most=options.record_max))
    return tuple(made)


class Background:
    """A thread that works off a short queue of samples.

    Args:
        name: of the thread.
        rate: the share of requests that it is to see.
    """

    def __init__(self, name: str, rate: float) -> None:
        self.dropped = 0
        self.failed = 0
        self.up = True
        """False once a fault has ended the thread."""
        self._rate = rate
        self._random = random.Random()  # noqa: S311 - it picks samples, it keeps no secret
        self._queue: queue.Queue[Any] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._begun = False

    def offer(
        self, feeds: Mapping[str, Array], outputs: Mapping[str, Array], rows: int, *, batched: bool = True
    ) -> None:
        """See `Watcher`."""
        if self._random.random() >= self._rate * rows:
            return
        if not self._begun:
            self._begun = True
            self._thread.start()
        row = self._random.randrange(rows) if batched else None
        sample = Seen(_copied(feeds, row), _copied(outputs, row), batched)
        try:
            self._queue.put_nowait(sample)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Work off what waits, then end."""
        if self._begun:
            with contextlib.suppress(queue.Full):
                self._queue.put(_END, timeout=5)
            self._thread.join(10)

    def _main(self) -> None:
        with contextlib.suppress(OSError):  # on Linux a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            self.work()
        except Exception:
            self.up = False
            log.exception("%s ended", self._thread.name)

    def next(self, timeout_s: float | None = None) -> Seen | None:
        """The next sample; None at the end, or (with a timeout) where none came."""
        try:
            found = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if found is _END:
            self.ended = True
            return None
        sample: Seen = found
        return sample

    ended = False

    def work(self) -> None:
        """The thread's work."""
        raise NotImplementedError

    def figures(self) -> dict[str, float]:
        """Counters for the metrics."""
        raise NotImplementedError


class Shadow(Background):
    """Compares a share of the answers with those of the FP32 model, and raises the alarm where they drift apart.

    Drift is `||answer - fp32|| / ||fp32||` over the latest 512 samples, of the worst output, as the gates measure it.

    Args:
        model: the run's FP32 model.
        rate: the share of requests.
        limit: above it the alert is raised.
        name: of the engine, for messages.
    """

    def __init__(self, model: OnnxModel, *, rate: float, limit: float, name: str) -> None:
        super().__init__("shadow", rate)
        self._model = model
        self._limit = limit
        self._name = name
        self._seen: dict[str, deque[tuple[float, float]]] = {}
        self.compared = 0
        self.alert = False

    def work(self) -> None:
        """Compute each sample with the FP32 model and compare."""
        from mpdeploy.engines.onnxruntime import OrtOptions, OrtRunner

        with OrtRunner(self._model.verified().path, options=OrtOptions(threads=1)) as runner:
            while (sample := self.next()) is not None:
                self._compare(runner, sample)

    def _compare(self, runner: Runner, sample: Seen) -> None:
        feeds, answers = sample.feeds, sample.outputs
        try:
            expected = runner.infer(feeds)
        except MpdeployError as error:
            self.failed += 1
            if self.failed == 1:
                log.warning("the FP32 model cannot compute a sampled request: %s", error.message)
            return
        for name, reference in expected.items():
            if name not in answers or reference.dtype.kind != "f":
                continue
            wanted, found = reference.astype(np.float64), answers[name].astype(np.float64)
            both = np.isfinite(wanted) & np.isfinite(found)
            if not both.all() and not np.array_equal(np.isfinite(wanted), np.isfinite(found)):
                distance, size = float("inf"), 1.0  # one of the two lost a value
            else:
                distance = float(np.square(np.where(both, found - wanted, 0.0)).sum())
                size = float(np.square(np.where(both, wanted, 0.0)).sum())
            self._seen.setdefault(name, deque(maxlen=WINDOW)).append((distance, size))
        self.compared += 1
        drift = self.rel_l2
        if (drift > self._limit) != self.alert:
            self.alert = drift > self._limit
            if self.alert:
                log.error(
                    "drift alert: answers of %s are %.3g (rel L2) from the FP32 model over %d samples; the limit is %g",
                    self._name, drift, min(self.compared, WINDOW), self._limit,
                )  # fmt: skip
            else:
                log.warning("drift alert over: %.3g (rel L2), the limit is %g", drift, self._limit)

    @property
    def rel_l2(self) -> float:
        """Of the worst output, over the window; 0 where nothing was compared."""
        worst = 0.0
        for pairs in list(self._seen.values()):
            error, size = (sum(column) for column in zip(*list(pairs), strict=True))
            worst = max(worst, (error / size) ** 0.5 if size > 0 else (0.0 if error == 0 else float("inf")))
        return worst

    def figures(self) -> dict[str, float]:
        """See `Background.figures`."""
        return {
            "shadow/compared": self.compared,
            "shadow/dropped": self.dropped,
            "shadow/failed": self.failed,
            "gauge/min/shadow/up": float(self.up),
            "gauge/max/shadow/rel_l2": min(self.rel_l2, 1e30),
            "gauge/max/shadow/alert": float(self.alert),
        }


class Recorder(Background):
    """Writes a share of the requests as `.npz` files, one array an input: `mpdeploy convert --data FOLDER` reads them.

    A request that shares no batch is a sample, and a file, of its own.

    Samples with a NaN are left out: nothing can be calibrated on them.

    Args:
        folder: where to; made where missing.
        rate: the share of requests.
        most: samples in all, over all recorders of this process that write to the folder: each version has one.
    """

    _lock = threading.Lock()
    _taken: ClassVar[Counter[Path]] = Counter()
    """Samples by folder, of this process."""
    _numbers = itertools.count(1)
    """Of files: two recorders may write in the same second."""

    def __init__(self, folder: Path, *, rate: float, most: int) -> None:
        super().__init__("recorder", rate)
        self._folder = folder.resolve()
        self._most = most
        self._waiting: dict[Any, list[dict[str, Array]]] = {}
        self.written = 0
        self.with_nan = 0

    def work(self) -> None:
        """Collect samples and write them, 32 to a file, or what there is each minute."""
        self._folder.mkdir(parents=True, exist_ok=True)
        flushed = time.monotonic()
        while not self.ended:
            sample = self.next(timeout_s=1.0)
            if sample is not None:
                self._take(sample)
            if time.monotonic() - flushed > FLUSH_S:
                flushed = time.monotonic()
                self._flush()
        self._flush()

    def _take(self, sample: Seen) -> None:
        feeds = sample.feeds
        if any(array.dtype.kind == "f" and np.isnan(array).any() for array in feeds.values()):
            self.with_nan += 1
            return
        with self._lock:
            if self._taken[self._folder] >= self._most:
                return
            self._taken[self._folder] += 1
        if not sample.batched:
            self._write([feeds])
            return
        key = tuple(array.shape[1:] for array in feeds.values())
        held = self._waiting.setdefault(key, [])
        held.append(feeds)
        if len(held) >= SAMPLES_A_FILE:
            self._write(self._waiting.pop(key))

    def _flush(self) -> None:
        for key in list(self._waiting):
            self._write(self._waiting.pop(key))

    def _write(self, samples: list[dict[str, Array]]) -> None:
        arrays = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
        path = self._folder / f"requests-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{next(self._numbers):05d}.npz"
        try:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
        except (MpdeployError, OSError, ValueError) as error:
            log.error("sampled requests cannot be written: %s", error)
            self.failed += len(samples)
            return
        self.written += len(samples)

    def figures(self) -> dict[str, float]:
        """See `Background.figures`."""
        return {"recorded/samples": self.written, "recorded/failed": self.failed}


def _copied(arrays: Mapping[str, Array], row: int | None) -> dict[str, Array]:
    """One row of each, as far as it has rows; all of it where `row` is None."""
    if row is None:
        return {name: array.copy() for name, array in arrays.items()}
    return {
        name: array[row : row + 1].copy() if array.ndim > 0 and len(array) > row else array
        for name, array in arrays.items()
    }

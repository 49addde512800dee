"""Runs a plan on a GPU, with torch tensors as device memory and a stream of its own.

What `time_ms` includes: the enqueue of one inference and its work on the GPU, between two CUDA events on the runner's
stream, the GPU idle before each. Copies to and from the device, and the host's work before the enqueue, are not in it
(`TensorRTRunner.includes`).

A runner serves one call at a time; calls from several threads wait for each other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Self

from mpdeploy.artifact import Array, Engine, Feeds, TensorSpec, check_feeds
from mpdeploy.engines.tensorrt.library import Family, import_library
from mpdeploy.engines.tensorrt.load import gpu_problem
from mpdeploy.engines.tensorrt.session import Session
from mpdeploy.errors import UnavailableError


class TensorRTRunner:
    """Answers feeds with a plan; see the module for what its times include."""

    includes = "enqueue and GPU work of one inference between CUDA events; no copies to or from the device"
    device = "cuda"

    def __init__(self, family: Family, engine: Engine) -> None:
        self.inputs: tuple[TensorSpec, ...] = engine.inputs
        self.outputs: tuple[TensorSpec, ...] = engine.outputs
        self._family = family
        self._engine = engine
        self._session: Session | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        problem = gpu_problem()
        if problem is not None:
            raise UnavailableError(problem.reason, hint=problem.hint)
        self._session = Session(import_library(self._family), self._family, self._engine)
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            session, self._session = self._session, None
            if session is not None:
                session.close()

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Answer one feed; the arrays are the caller's own.

        Raises:
            DataError: the feeds do not fit the model or the engine's profiles.
            UnavailableError: the runner is not open.
        """
        with self._opened(feeds) as session:
            session.bind(feeds)
            session.launch()
            return session.results(self.outputs)

    def time_ms(self, feeds: Feeds, iterations: int) -> list[float]:
        """Milliseconds of each of `iterations` runs on `feeds`, after one that is not counted; see `includes`."""
        with self._opened(feeds) as session:
            session.bind(feeds)
            session.launch()
            return [session.timed_launch_ms() for _ in range(iterations)]

    def copies_ms(self, feeds: Feeds, iterations: int) -> dict[str, list[float]]:
        """Milliseconds of copying the feeds to the device and the answers back, which `time_ms` leaves out."""
        with self._opened(feeds) as session:
            session.bind(feeds)
            session.launch()
            pairs = [session.timed_copies_ms(feeds, self.outputs) for _ in range(iterations)]
        return {"to_device": [to for to, _ in pairs], "to_host": [back for _, back in pairs]}

    @contextlib.contextmanager
    def _opened(self, feeds: Feeds) -> Iterator[Session]:
        with self._lock:
            if self._session is None:
                raise UnavailableError(
                    f"The runner of {self._engine.path} is closed.", hint="use it inside its `with` block"
                )
            check_feeds(self.inputs, feeds, where=str(self._engine.path))
            with self._session.on_device():
                yield self._session

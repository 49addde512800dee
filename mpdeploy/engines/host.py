"""What runners share that are fed and answered with numpy arrays: `with`, checks, answers of the caller's own, and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from mpdeploy.artifact import Array, Feeds, TensorSpec, check_feeds
from mpdeploy.errors import MpdeployError, StageFailedError

INCLUDES = "handing over numpy arrays, the run, output arrays"

Specs = tuple[TensorSpec, ...]


class HostRunner:
    """The base of the CPU runtimes' runners. A subclass says how it opens, runs once, and makes arrays of what that returned."""

    title = "The runtime"
    includes = INCLUDES
    device = "cpu"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inputs: Specs = ()
        self._outputs: Specs = ()
        self._is_open = False

    def _open(self) -> tuple[Specs, Specs]:
        """Claim the runtime; return the inputs and outputs."""
        raise NotImplementedError

    def _close(self) -> None:
        """Give it back."""
        raise NotImplementedError

    def _caller(self, feeds: Feeds) -> Callable[[], Any]:
        """A function without arguments that runs `feeds` once and leaves out what need not be done again."""
        raise NotImplementedError

    def _arrays(self, returned: Any) -> dict[str, Array]:
        """The caller's own arrays of what `_caller`'s function returned."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._inputs, self._outputs = self._open()
        self._is_open = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_open = False
        self._close()

    @property
    def inputs(self) -> Specs:
        """What the model wants."""
        return self._inputs

    @property
    def outputs(self) -> Specs:
        """What the model answers."""
        return self._outputs

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Answer one feed (see `artifact.Runner`).

        Raises:
            DataError: feeds that do not fit.
            StageFailedError: the runner is closed, or the runtime failed.
        """
        self._check(feeds)
        return self._arrays(self._guarded(feeds, self._caller(feeds)))

    def time_ms(self, feeds: Feeds, iterations: int) -> list[float]:
        """Milliseconds of each run: see `includes`."""
        self._check(feeds)
        call, now = self._caller(feeds), time.perf_counter_ns

        def timed() -> list[float]:
            times = []
            for _ in range(iterations):
                begin = now()
                call()
                times.append((now() - begin) / 1e6)
            return times

        found: list[float] = self._guarded(feeds, timed)
        return found

    def _check(self, feeds: Feeds) -> None:
        if not self._is_open:
            raise StageFailedError(
                f"{self.title}: the runner of {self.path} is closed.", hint="use it inside its 'with' block"
            )
        check_feeds(self._inputs, feeds, where=self.path.name)

    def _guarded(self, feeds: Feeds, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except MpdeployError:
            raise
        except Exception as error:  # the runtimes raise types of their own extension modules
            shapes = ", ".join(f"{name}: {list(array.shape)}" for name, array in feeds.items())
            raise StageFailedError(
                f"{self.title} could not run {self.path.name} on {shapes}: {one_line(error, 500)}",
                hint="are the inputs' axes consistent with one another?",
            ) from error


def one_line(error: BaseException, length: int = 600) -> str:
    """A library's message on one line, cut where it goes on for pages."""
    return " ".join(str(error).split())[:length]

"""What a process does of its own accord: serve what another one was told to serve, and read runs again that changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from mpdeploy.serve.repository import stamp_of
from mpdeploy.serve.shared import Shared

RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses before what could not be loaded is tried again."""
LOOK_S = 0.05
"""Between two looks whether a pause has become pointless."""

Keep = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]
"""Runs a coroutine for as long as the server."""


class Follower:
    """Serves what another process was told to serve.

    Args:
        shared: what the processes behind the port share.
        load: serve this version of a model; False where it cannot be loaded.
        retire: serve no models but these.

    Attributes:
        generation: of what is wanted, up to which this process has come.
    """

    def __init__(
        self,
        shared: Shared,
        load: Callable[[str, Mapping[str, Any]], Awaitable[bool]],
        retire: Callable[[Collection[str]], None],
    ) -> None:
        self.generation = 0
        self._shared = shared
        self._load = load
        self._retire = retire
        self._task: asyncio.Task[None] | None = None

    def look(self, keep: Keep) -> None:
        """Begin to follow where something else is wanted by now; one follows at a time, so that the last one wanted comes last."""
        if self._shared.wanted().generation > self.generation and (self._task is None or self._task.done()):
            self._task = keep(self._follow())

    async def _follow(self) -> None:
        """What cannot be loaded here is tried again, after pauses."""
        pauses = _pauses()
        while (wanted := self._shared.wanted()).generation > self.generation:
            loaded = [await self._load(name, model) for name, model in wanted.models.items()]
            if self._shared.wanted().generation != wanted.generation:
                continue
            self._retire(wanted.models)
            if all(loaded):
                self.generation = wanted.generation
                return
            await _pause(next(pauses), lambda: self._shared.wanted().generation == wanted.generation)


class RunWatch:
    """Has runs read again that changed on disk, once they have been still between two looks.

    Args:
        shared: what the processes behind the port share.
        reload: reads all runs again; False where one cannot be loaded.
    """

    def __init__(self, shared: Shared, reload: Callable[[], Awaitable[bool]]) -> None:
        self._shared = shared
        self._reload = reload
        self._stamp: Any = None
        self._seen: Any = None
        self._task: asyncio.Task[None] | None = None

    def look(self, keep: Keep) -> None:
        """At the stamps of all runs that are served."""
        stamp = self._stamps()
        if stamp == self._stamp != self._seen and (self._task is None or self._task.done()):
            self._task = keep(self._read_again(stamp))
        self._stamp = stamp

    async def _read_again(self, stamp: Any) -> None:
        """Where a run cannot be loaded, as while it is still being copied, try again after pauses."""
        for seconds in _pauses():
            if await self._reload():
                self._seen = stamp
                return
            if not await _pause(seconds, lambda: self._stamps() == stamp):  # the next look sees to it
                return

    def _stamps(self) -> Any:
        return tuple(stamp_of(Path(model["run"])) for model in self._shared.wanted().models.values())


def _pauses() -> Iterator[float]:
    return chain(RETRY_S, repeat(RETRY_S[-1]))


async def _pause(seconds: float, unchanged: Callable[[], bool]) -> bool:
    """Wait so long, or until something has changed; False where it has."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await asyncio.sleep(LOOK_S)
        if not unchanged():
            return False
    return True

"""What the processes behind one port share: which models they should serve, and what each of them has done.

FOLDER/models.json     the models that should be served; a process that sees it changed follows, one that was restarted begins there
FOLDER/models.lock     held while a process loads a new version, so that two never number theirs alike
FOLDER/counts-PID.json a process's counters; those of a dead one stay, so that sums never fall

With a single process there is no folder, and nothing is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpdeploy.serve.messages import UnavailableServeError

MODELS, LOCK, COUNTS = "models.json", "models.lock", "counts-"
Counts = dict[str, float]


@dataclass
class Wanted:
    """The models that should be served.

    Attributes:
        generation: rises with every change.
        models: name -> run directory, version number, engine (None: the best).
    """

    generation: int = 0
    models: dict[str, dict[str, Any]] = field(default_factory=dict)


class Shared:
    """One process's view of what is shared.

    Args:
        folder: None where this process is alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._alone = Wanted()
        self._busy = False

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self._folder is None

    def wanted(self) -> Wanted:
        """The models that should be served now."""
        if self._folder is None:
            return self._alone
        try:
            value = json.loads((self._folder / MODELS).read_text(encoding="utf-8"))
            return Wanted(int(value["generation"]), dict(value["models"]))
        except FileNotFoundError:
            return Wanted()

    def begin(self, models: Mapping[str, dict[str, Any]]) -> Wanted:
        """The models that should be served; `models` where no process has said so before."""
        if self._folder is None:
            return self.publish(models)
        with (self._folder / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # held for a moment by processes that begin together
            wanted = self.wanted()
            return wanted if wanted.generation else self.publish(models)

    def publish(self, models: Mapping[str, dict[str, Any]]) -> Wanted:
        """Say which models should be served from now on. Only inside `changing`."""
        wanted = Wanted(self.wanted().generation + 1, dict(models))
        if self._folder is None:
            self._alone = wanted
        else:
            _replace(self._folder / MODELS, {"generation": wanted.generation, "models": wanted.models})
        return wanted

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the right to change which models are served.

        Raises:
            UnavailableServeError: another load or unload is under way.
        """
        busy = UnavailableServeError("another load or unload is under way; try again")
        if self._busy:
            raise busy
        self._busy = True
        try:
            if self._folder is None:
                yield
                return
            with (self._folder / LOCK).open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise busy from error
                yield
        finally:
            self._busy = False

    def write_counts(self, counts: Counts) -> None:
        """Publish this process's counters."""
        if self._folder is not None:
            _replace(self._folder / f"{COUNTS}{os.getpid()}.json", counts)

    def others(self) -> Iterator[tuple[Counts, bool]]:
        """The counters of every other process, and whether it lives."""
        for path in self._folder.glob(f"{COUNTS}*.json") if self._folder is not None else ():
            pid = int(path.stem.removeprefix(COUNTS))
            if pid == os.getpid():
                continue
            try:
                counts = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # being replaced right now
            yield counts, _lives(pid)

    def sum_counts(self, own: Counts) -> Counts:
        """Sums of these counters of this process and those of all others, dead ones too; gauges (`gauge/...`) of living ones alone.

        A gauge whose name begins with `gauge/max/` or `gauge/min/` is not summed: the largest or the smallest is taken.
        """
        total = dict(own)
        for counts, living in self.others():
            for name, value in counts.items():
                if name.startswith(("gauge/max/", "gauge/min/")):
                    if living:
                        choose = max if name.startswith("gauge/max/") else min
                        total[name] = choose(total.get(name, value), value)
                elif living or not name.startswith("gauge/"):
                    total[name] = total.get(name, 0) + value
        return total


def _replace(path: Path, value: Any) -> None:
    """Write atomically. Nothing here must outlive the machine, so nothing waits for a disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

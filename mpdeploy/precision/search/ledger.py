"""The ledger of a search: it counts, remembers, logs and replays every measurement, and holds the best answer so far.

A search is deterministic for its seed, so resuming is replaying: the same steps are taken again, and what the log already holds is
answered from it. The log is a text file with one JSON document a line, the first of which names the problem; a line that a kill
cut short is dropped.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from mpdeploy.errors import UsageError
from mpdeploy.files import cannot_write, digest_of_json, finite_json
from mpdeploy.precision.search.types import (
    Evaluation,
    KeepSet,
    Landscape,
    OnProgress,
    Problem,
    SearchProgress,
    SearchStoppedError,
    Until,
)

LOG_VERSION = 4
HAIR = 0.03
"""Where the thing itself is above the gate by less than this part of it, that is how sums are ordered: another keep-list may do."""
STEP = 0.003
"""By so much of what stands for it the limit is lowered then,"""
GENTLE = 2
"""so often; after that, by as much as the last one was off."""


def set_aside(log: Path, problem: Problem, seed: int) -> Path | None:
    """Rename a log that belongs to another problem or seed, so that a new one can be begun; returns its new name, None where it fits."""
    try:
        with log.open(encoding="utf-8") as file:
            header = json.loads(file.readline())
    except FileNotFoundError:
        return None
    except ValueError:
        header = None  # no log at all
    if header == _header_of(problem, seed):
        return None
    number = 1
    while (other := log.with_name(f"{log.stem}.{number}{log.suffix}")).exists():
        number += 1
    log.replace(other)
    return other


def _header_of(problem: Problem, seed: int) -> dict[str, Any]:
    """The first line of a log, as it is read back."""
    header = {"version": LOG_VERSION, "problem": problem.digest, "limit": problem.limit, "seed": seed}
    return dict(json.loads(json.dumps(finite_json(header))))


@dataclass(frozen=True, slots=True)
class Best:
    """A keep-list that met the gate on all samples."""

    kept: KeepSet
    evaluation: Evaluation
    cost: float


class Ledger:
    """See the module's docstring. Use it as a context manager: it closes the log.

    Args:
        problem, landscape: what is measured.
        log: where to keep the log, or None; a log of the same problem and seed is replayed.
        seed: of the search.
        max_evaluations, max_seconds: when to stop with the best answer so far.
        on_progress: told after every measurement.
        on_best: given every answer that is better than all before.

    Raises:
        UsageError: the log belongs to another problem.
    """

    def __init__(
        self,
        problem: Problem,
        landscape: Landscape | None,
        *,
        log: Path | None = None,
        seed: int = 0,
        max_evaluations: float = math.inf,
        max_seconds: float = math.inf,
        on_progress: OnProgress = lambda _: None,
        on_best: Callable[[Best], None] = lambda _: None,
    ) -> None:
        self._on_best = on_best
        self.problem = problem
        self.landscape = landscape
        self.evaluations = 0.0
        self.by_phase: dict[str, float] = {}
        self.replayed = 0
        self.phase = "start"
        self.expected: float | None = None
        self._later = 0.0
        self._fresh = 0.0  # evaluations that were measured, not replayed
        self.history: list[tuple[KeepSet, Evaluation]] = []  # as measured, under the gate's own limit
        self._best: Best | None = None
        self._refuted: set[KeepSet] = set()
        self.confirmed: list[KeepSet] = []
        self._known: dict[str, Any] = {}
        self._item_number = {item: position for position, item in enumerate(landscape.parts.items)} if landscape else {}
        self._max_evaluations = max_evaluations
        self._max_seconds = max_seconds
        self._on_progress = on_progress
        self._began = time.perf_counter()
        self.limit = problem.limit
        self._header = _header_of(problem, seed)
        self._path = log
        self._file: TextIO | None = None

    def __enter__(self) -> Ledger:
        if self._path is not None:
            self._open(self._path)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def best(self) -> Best | None:
        """The cheapest keep-list that met the gate so far."""
        return self._best

    @property
    def seconds(self) -> float:
        """Since the ledger was made."""
        return time.perf_counter() - self._began

    @property
    def evaluations_left(self) -> float:
        """Until the search is stopped."""
        return self._max_evaluations - self.evaluations

    def start(self, phase: str, expected: float | None = None, later: float = 0.0) -> None:
        """Name what follows, how many evaluations it may take, and how many come after it, for the progress display."""
        self.phase, self.expected = phase, None if expected is None else self.evaluations + expected
        self._later = later
        self._tell()

    def evaluate(
        self, kept: KeepSet, samples: Sequence[int] | None = None, *, until: Until = "gate", exactly: bool = False
    ) -> Evaluation:
        """Measure the model to which a keep-list leads, or that which keeps exactly these; no model is measured twice.

        Raises:
            SearchStoppedError: time or evaluations are spent.
        """
        planned = self.problem.canonical(kept)
        is_model = not exactly or planned == kept  # else nobody would be given it
        kept = kept if exactly else planned
        key = "e" + digest_of_json([sorted(kept), list(samples or ())])[:24]
        memory = "m" + key
        if memory in self._known:
            raw: Evaluation = self._known[memory]
            found = self._judged(kept, raw)
            if samples is None and is_model and found.passes:
                self._offer(kept, found)
            return found
        if key in self._known:
            self.replayed += 1
            raw = Evaluation.from_json(self._known.pop(key))
        else:
            self._check()
            raw = self.problem.evaluate(kept, samples, until=until)
            self._write({"key": key, "phase": self.phase, "num_kept": len(kept), **raw.to_json()})
            self._fresh += raw.share
        self._known[memory] = raw  # judged whenever it is looked at: the limit that is aimed at changes
        found = self._judged(kept, raw)
        self._count(raw.share)
        if samples is None and is_model:
            self.history.append((kept, raw))
            if found.passes:
                self._offer(kept, found)
        self._tell()
        return found

    def _judged(self, kept: KeepSet, found: Evaluation) -> Evaluation:
        """Under the limit that is aimed at now; what was refuted does not pass."""
        passes = found.passes and found.measured <= self.limit and kept not in self._refuted
        return replace(found, passes=passes)

    def cheapest(self, *, above: KeepSet = frozenset()) -> KeepSet | None:
        """The cheapest keep-list measured on all samples that passes and holds all of `above`."""
        passing = [kept for kept, found in self.history if above <= kept and self._judged(kept, found).passes]
        return min(passing, key=lambda kept: (self.problem.cost(kept), len(kept), sorted(kept)), default=None)

    def was_met(self, kept: KeepSet) -> bool:
        """Whether it was measured on all samples and passes."""
        kept = self.problem.canonical(kept)
        return any(known == kept and self._judged(known, found).passes for known, found in self.history)

    def really(self, kept: KeepSet) -> float:
        """What the gate looks at, of the thing itself.

        Raises:
            SearchStoppedError: time or evaluations are spent.
        """
        key = "c" + digest_of_json(sorted(self.problem.canonical(kept)))[:24]
        if key not in self._known:
            self._check()
            self._known[key] = {"measured": self.problem.confirm(kept)}
            self._write({"key": key, "phase": self.phase, **self._known[key]})
        return float(self._known[key]["measured"])

    def confirm(self, kept: KeepSet) -> bool:
        """Whether the thing itself meets the gate too; if it does not, a lower limit is aimed at from here on.

        Raises:
            SearchStoppedError: time or evaluations are spent.
        """
        kept = self.problem.canonical(kept)
        measured = self.really(kept)
        if measured <= self.gate:
            self.confirmed.append(kept)
            return True
        self._refuted.add(kept)
        self.limit = min(self.limit, self._needed(self.evaluate(kept).measured, measured))
        if self._best is not None and self._best.kept == kept:
            self._best = None
            other = self.cheapest()
            if other is not None:
                self.evaluate(other)  # from memory; it becomes the best
        return False

    def _needed(self, found: float, measured: float) -> float:
        """Down to where what stands for the thing itself must come, so that the latter, above the gate now, meets it."""
        if not self.problem.gates_drift:  # a drop may be zero or negative: by so much as the thing itself is worse
            return max(found - (measured - self.problem.limit if math.isfinite(measured) else abs(self.limit)), 0.0)
        needed = 0.995 * found * self.problem.limit / measured if math.isfinite(measured) else 0.99 * self.limit
        if len(self._refuted) <= GENTLE and needed > (1 - HAIR) * found:
            needed = max(needed, (1 - STEP) * found)
        return needed

    @property
    def gate(self) -> float:
        """The largest measure of the thing itself that passes."""
        return self.problem.limit * (1 + 1e-9)

    def aim_at_the_gate(self) -> None:
        """From here on the limit is the gate's own, and whoever asks confirms what passes it."""
        self.limit = self.problem.limit
        self._refuted.clear()

    def probe(self, item: str, samples: Sequence[int]) -> tuple[float, ...]:
        """Measure one part of the error on some samples; counts by their share.

        Raises:
            SearchStoppedError: time or evaluations are spent.
        """
        assert self.landscape is not None
        key = f"p{self._item_number[item]}:{','.join(map(str, samples))}"
        if key in self._known:
            self.replayed += 1
            energies = tuple(float(energy) for energy in self._known[key]["energies"])
        else:
            self._check()
            energies = self.landscape.probe(item, samples)
            self._fresh += len(samples) / self.landscape.num_samples
            self._write({"key": key, "energies": list(energies)})
        self._count(len(samples) / self.landscape.num_samples)
        self._tell()
        return energies

    def charge(self, evaluations: float) -> None:
        """Count a pass that was made outside (the one that gives the injected errors)."""
        self._count(evaluations)

    def _offer(self, kept: KeepSet, found: Evaluation) -> None:
        cost = self.problem.cost(kept)
        if self._best is None or (cost, len(kept)) < (self._best.cost, len(self._best.kept)):
            self._best = Best(kept, found, cost)
            self._on_best(self._best)

    def _count(self, share: float) -> None:
        self.evaluations += share
        self.by_phase[self.phase] = self.by_phase.get(self.phase, 0.0) + share

    def _check(self) -> None:
        if self.evaluations >= self._max_evaluations:
            raise SearchStoppedError(f"{self.evaluations:.0f} evaluations are spent")
        if self.seconds >= self._max_seconds:
            raise SearchStoppedError(f"{self.seconds:.0f} s are spent")

    def _tell(self) -> None:
        left = fraction = None
        if self.expected is not None:
            evaluations = max(self.expected - self.evaluations, 0.0) + self._later
            fraction = self.evaluations / max(self.evaluations + evaluations, 1e-9)
            left = evaluations * self.seconds / self._fresh if self._fresh > 0 else None
        best = self._best
        self._on_progress(
            SearchProgress(
                self.phase,
                self.evaluations,
                None if best is None else len(best.kept),
                None if best is None else best.evaluation.drift,
                left,
                fraction,
            )
        )

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            whole = []
            for line in lines:
                with contextlib.suppress(ValueError):
                    whole.append(json.loads(line))
            if whole and whole[0] != self._header:
                raise UsageError(
                    f"The search log {path} belongs to another model, data, gate or seed.",
                    hint="give another --run folder, or remove the log to search anew",
                )
            self._known = {entry["key"]: entry for entry in whole[1:] if "key" in entry}
            temporary = path.with_name(f".{path.name}.partial")
            with temporary.open("w", encoding="utf-8") as file:
                for entry in whole or [self._header]:
                    file.write(json.dumps(finite_json(entry)) + "\n")
            temporary.replace(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise cannot_write(path, error) from error

    def _write(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(finite_json(entry)) + "\n")
            self._file.flush()  # a kill of this process loses nothing; a power cut may lose lines, which are measured again

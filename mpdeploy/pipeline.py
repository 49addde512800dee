"""Running a pipeline: stages in order, each skipped where its record still holds, one record a stage.

A stage is a `Stage`: it says what decides that it must run again (`key`), and runs. This module knows nothing of what stages do.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from mpdeploy.artifact import FileArtifact
from mpdeploy.config import Pipeline
from mpdeploy.errors import ArtifactChangedError, ConfigError, MpdeployError, StageFailedError, closest_names
from mpdeploy.run_dir import RunDir, StageRecord, StageStatus

_AGAIN = "the same command goes on from here"


class TerminatedError(BaseException):
    """SIGTERM arrived. No Exception, like KeyboardInterrupt: nothing may swallow it."""


class Listener(Protocol):
    """What is told of a run as it goes on; the command line draws it."""

    def stage_started(self, name: str) -> None:
        """A stage begins to run."""

    def stage_progress(self, name: str, done: int, total: int, text: str) -> None:
        """A stage is `done` of `total` steps far (0 of 0: no steps to count)."""

    def stage_ended(self, record: StageRecord, *, cached: bool) -> None:
        """A stage ended, or (`cached`) was skipped because its record holds."""

    def message(self, text: str) -> None:
        """Something a user should know."""


class Silent:
    """A listener that says nothing."""

    def stage_started(self, name: str) -> None:
        """Nothing."""

    def stage_progress(self, name: str, done: int, total: int, text: str) -> None:
        """Nothing."""

    def stage_ended(self, record: StageRecord, *, cached: bool) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Outcome:
    """What a stage made and measured.

    Attributes:
        artifacts: name -> file.
        report: plain JSON.
        status: `done`; or `unavailable` for an engine this machine lacks, then with a message and a hint.
    """

    artifacts: Mapping[str, FileArtifact] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    status: StageStatus = "done"
    message: str | None = None
    hint: str | None = None


@dataclass
class Context:
    """What a stage is given."""

    run: RunDir
    pipeline: Pipeline
    listener: Listener
    stage: str = ""

    def progress(self, done: int, total: int, text: str) -> None:
        """Tell how far this stage is."""
        self.listener.stage_progress(self.stage, done, total, text)

    def message(self, text: str) -> None:
        """Tell the user something."""
        self.listener.message(f"{self.stage}: {text}")


class Stage(Protocol):
    """One step of the flow."""

    @property
    def name(self) -> str:
        """Its record's name, and its folder's: `10-train`, `40-build/openvino`."""

    @property
    def isolated(self) -> bool:
        """Whether the stages after it can go on when it fails (one engine of several)."""

    def key(self, context: Context) -> dict[str, Any]:
        """All that decides whether it must run again: config, source digests, digests of what it takes, versions."""

    def run(self, context: Context) -> Outcome:
        """Do it."""


@dataclass(frozen=True)
class RunSummary:
    """How a run went.

    Attributes:
        cached: names of the stages that were skipped.
        failures: stage -> the error of an isolated stage that failed; the run went on.
    """

    cached: tuple[str, ...]
    failures: Mapping[str, MpdeployError]


def run_stages(
    stages: Sequence[Stage], context: Context, *, start: str | None = None, until: str | None = None
) -> RunSummary:
    """Run stages in order.

    Args:
        stages: all of them.
        context: where and with what.
        start: run this stage and those after it even if their records hold; take those before it as they are.
        until: stop after this stage.

    Raises:
        MpdeployError: what a stage raised; its record says `failed`, finished ones are kept.
        KeyboardInterrupt, TerminatedError: the running stage's record says `interrupted`.
    """
    names = [stage.name for stage in stages]
    first = _position(names, start, "--from") if start else None
    last = _position(names, until, "--until", last=True) if until else len(names) - 1
    if first is not None and first > last:
        raise ConfigError(f"--from {start} comes after --until {until}.", hint=f"stages in order: {', '.join(names)}")
    cached: list[str] = []
    failures: dict[str, MpdeployError] = {}
    for position, stage in enumerate(stages[: last + 1]):
        context.stage = stage.name
        record = context.run.record(stage.name)
        if first is not None and position < first:
            _require(record, stage.name, start or "")
            assert record is not None
            _verify(record)
            cached.append(stage.name)
            context.listener.stage_ended(record, cached=True)
            continue
        key = stage.key(context)
        reasons = ["--from asks for it"] if first is not None else _why_again(record, key)
        if not reasons:
            assert record is not None
            _verify(record)
            cached.append(stage.name)
            context.listener.stage_ended(record, cached=True)
            continue
        if record is not None and record.status == "done":
            context.message(f"runs again: {'; '.join(reasons[:3])}" + ("; ..." if len(reasons) > 3 else ""))
        try:
            _run_one(stage, key, context)
        except MpdeployError as error:
            if not stage.isolated:
                raise
            failures[stage.name] = error
    return RunSummary(tuple(cached), failures)


def _position(names: Sequence[str], wanted: str, option: str, *, last: bool = False) -> int:
    matches = [i for i, name in enumerate(names) if name == wanted or name.split("/")[0] == wanted]
    if not matches:
        raise ConfigError(
            f"{option} {wanted}: there is no such stage.", hint=f"closest names: {closest_names(wanted, names)}"
        )
    return matches[-1] if last else matches[0]


def _require(record: StageRecord | None, name: str, start: str) -> None:
    if record is None or (record.status not in ("done", "unavailable") and not name.startswith("40-build/")):
        raise StageFailedError(
            f"--from {start} needs a finished {name}, and the run has none.", hint=f"run with --from {name} first"
        )


def _verify(record: StageRecord) -> None:
    for item in record.artifacts.values():
        try:
            item.verified()
        except ArtifactChangedError as error:
            raise ArtifactChangedError(
                error.message,
                hint=f"put the recorded file back, or make it again with --from {record.name.split('/')[0]}",
            ) from error


def _why_again(record: StageRecord | None, key: Mapping[str, Any]) -> list[str]:
    """Why a stage must run; empty where its record holds."""
    if record is None:
        return ["it has not run"]
    if record.status not in ("done", "unavailable"):
        return [f"it was {record.status}"]
    return list(_differences(record.key, key))


def _differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    from mpdeploy.files import finite_json

    before, after = finite_json(before), finite_json(after)
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after}):
            where = f"{path}.{name}" if path else name
            if name not in before or name not in after:
                yield f"{where} is {'new' if name not in before else 'gone'}"
            else:
                yield from _differences(before[name], after[name], where)
    elif before != after:
        shown = f" ({before} -> {after})" if len(f"{before}{after}") < 60 else ""
        yield f"{path} changed{shown}"


def _run_one(stage: Stage, key: Mapping[str, Any], context: Context) -> None:
    begin = time.perf_counter()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def finish(status: StageStatus, outcome: Outcome | None, message: str | None, hint: str | None) -> StageRecord:
        record = StageRecord(
            name=stage.name,
            status=status,
            key=key,
            artifacts=outcome.artifacts if outcome else {},
            report=outcome.report if outcome else {},
            seconds=time.perf_counter() - begin,
            started=started,
            message=message,
            hint=hint,
        )
        context.run.put(record)
        context.listener.stage_ended(record, cached=False)
        return record

    # Written first: a stage that is killed while it replaces its files must not be taken for the finished one of before.
    context.run.put(
        StageRecord(stage.name, "interrupted", key, started=started, message="it was killed while it ran", hint=_AGAIN)
    )
    try:
        context.listener.stage_started(stage.name)  # within: who is told may be interrupted, too
        outcome = stage.run(context)
    except MpdeployError as error:
        finish("failed", None, error.message, error.hint)
        raise
    except (KeyboardInterrupt, TerminatedError):
        finish("interrupted", None, "interrupted", _AGAIN)
        raise
    except OSError as error:
        from mpdeploy.files import cannot_write

        wrapped = cannot_write(context.run.path / stage.name, error) if error.errno is not None else None
        finish("failed", None, str(wrapped or error), None)
        raise (wrapped or error) from error
    except BaseException as error:
        finish("failed", None, f"{type(error).__name__}: {error}", "this is a bug in mpdeploy: please report it")
        raise
    finish(outcome.status, outcome, outcome.message, outcome.hint)


@contextmanager
def termination_raises() -> Iterator[None]:
    """Turn SIGTERM into `TerminatedError` within the block, so that records are written and locks given back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""Builds in a child process: a crash, a kill or an out-of-memory there is a classified failure with its log, and nothing else breaks.

The child is a fresh interpreter (never a fork: it must not hold the run's lock), it dies with its parent, and what native libraries
print goes to `build.log` beside the engine. Request, progress and answer are pickled frames over pipes of our own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from mpdeploy.artifact import Engine, OnnxModel
from mpdeploy.engines import ENGINES
from mpdeploy.engines.base import Profile
from mpdeploy.errors import BuildError, MpdeployError

LOG = "build.log"
LOG_TAIL_LINES = 20
_PR_SET_PDEATHSIG = 1

Progress = Callable[[str, int, int], None]
"""Told (phase, steps done, steps in all)."""


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What the child is to build: arguments of `EngineBackend.build`, and the backend's row."""

    engine: str
    model: OnnxModel
    profile: Profile
    options: Mapping[str, Any]
    folder: Path


def build_isolated(request: BuildRequest, progress: Progress | None = None) -> Engine:
    """Build in a child process.

    Raises:
        MpdeployError: what the backend raised there.
        BuildError: the child crashed, was killed or ran out of memory; the message says which and shows the end of its log.
    """
    log_path = request.folder / LOG
    read_end, write_end = os.pipe()
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "mpdeploy.engines.isolation", str(write_end)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(write_end,),
        )
    os.close(write_end)
    try:
        with os.fdopen(read_end, "rb") as answers:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError), child.stdin:  # a child that died at once is classified below
                child.stdin.write(pickle.dumps((request, ENGINES[request.engine])))
            answer = _listen(answers, progress)
        status = child.wait()
    except BaseException:
        child.kill()
        child.wait()
        raise
    if isinstance(answer, Engine):
        return answer
    if isinstance(answer, MpdeployError):
        raise answer
    raise _classified(request, status, answer, log_path)


def _listen(answers: IO[bytes], progress: Progress | None) -> Any:
    """Read frames until the answer, or None where the pipe closed before one came."""
    while True:
        header = answers.read(8)
        if len(header) < 8:
            return None
        (size,) = struct.unpack("<Q", header)
        kind, value = pickle.loads(answers.read(size))  # noqa: S301 - our own child, over a pipe nobody else holds
        if kind == "progress":
            if progress is not None:
                progress(*value)
        else:
            return value


def _classified(request: BuildRequest, status: int, answer: Any, log_path: Path) -> BuildError:
    tail = "\n".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])
    if isinstance(answer, str):
        what = f"failed with an unexpected error:\n{answer}"
    elif status == -signal.SIGKILL:
        what = "was killed (SIGKILL): most often the system ran out of memory"
    elif status < 0:
        what = f"crashed ({signal.Signals(-status).name})"
    else:
        what = f"ended with exit code {status} and no answer"
    return BuildError(
        f"The build of {request.model.path.name} with {request.engine} {what}."
        + (f"\n\nThe end of its log:\n{tail}" if tail else ""),
        hint=f"the whole log is {log_path}; the other engines are not affected",
    )


def _child(write_end: int) -> None:
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # the parent died before the kernel knew that we want to follow it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides, and ends us
    with os.fdopen(write_end, "wb") as answers:

        def send(kind: str, value: Any) -> None:
            frame = pickle.dumps((kind, value))
            answers.write(struct.pack("<Q", len(frame)) + frame)
            answers.flush()

        try:
            request, (module, name) = pickle.loads(sys.stdin.buffer.read())  # noqa: S301 - from our parent
            row: Any = getattr(import_module(module), name)
            if hasattr(row, "with_progress"):

                def tell(phase: str, done: int, total: int) -> bool:
                    send("progress", (phase, done, total))
                    return True

                row = row.with_progress(tell)
            send("done", row.build(request.model, request.profile, request.options, request.folder))
        except MpdeployError as error:
            send("error", error)
        except OSError as error:  # a full disk, a quota, a folder that may not be written
            where = f" at {error.filename}" if error.filename else ""
            send(
                "error",
                BuildError(
                    f"The build with {request.engine} failed on a file{where}: {error.strerror or error}.",
                    hint=f"free disk space for {request.folder}, or give another folder; nothing half-written is used",
                ),
            )
        except BaseException:
            send("error", traceback.format_exc())


if __name__ == "__main__":
    _child(int(sys.argv[1]))

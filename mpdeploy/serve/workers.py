"""Several processes behind one port: one a device, or some on a CPU. One that dies is started again.

All accept from one listening socket that the parent bound. The parent computes nothing: it starts, watches, and passes signals on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mpdeploy.errors import MpdeployError, StageFailedError
from mpdeploy.serve.logs import set_up_logging
from mpdeploy.serve.options import ServerOptions
from mpdeploy.serve.server import run_process

log = logging.getLogger("mpdeploy.serve")

Ready = Callable[[dict[str, Any]], None]
RESTART_S = (0.1, 0.5, 2.0, 5.0, 10.0)
"""Pauses before a process that keeps dying is started again; one that lived a minute begins anew."""
LIVED_S = 60.0
LOOK_S = 0.2


@dataclass
class Worker:
    """A process, its pipe, and how often in a row it died young."""

    index: int
    process: Any
    pipe: Connection
    started: float
    deaths: int = 0
    again_at: float | None = None
    ready: bool = False


def run_workers(options: ServerOptions, bound: socket.socket, *, on_ready: Ready | None = None) -> int:
    """Run the processes until a signal says otherwise; the exit code.

    Raises:
        MpdeployError: what the first process could not do: the run cannot be served.
    """
    set_up_logging(options.log_format)
    with tempfile.TemporaryDirectory(prefix="mpdeploy-serve-") as folder:
        return _Supervisor(options, bound, Path(folder), on_ready).run()


class _Supervisor:
    def __init__(self, options: ServerOptions, bound: socket.socket, folder: Path, on_ready: Ready | None) -> None:
        self._options = options
        self._bound = bound
        self._folder = folder
        self._on_ready = on_ready
        self._spawn = multiprocessing.get_context("spawn")
        self._workers: list[Worker] = []
        self._signal = 0
        self._signals = 0

    def run(self) -> int:
        before = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        try:
            self._workers = [self._start(index, 0) for index in range(self._options.num_processes)]
            while not self._signal:
                self._look()
            return self._stop()
        finally:
            for worker in self._workers:
                if worker.process.is_alive():
                    worker.process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: Any) -> None:
        if number == signal.SIGHUP:  # one process loads what changed; the others see it do so, and follow
            leader = next((worker for worker in self._workers if worker.ready and worker.process.is_alive()), None)
            if leader is not None and leader.process.pid is not None:
                os.kill(leader.process.pid, signal.SIGHUP)
            return
        self._signal = number
        self._signals += 1
        for worker in self._workers:
            if worker.process.is_alive() and worker.process.pid is not None:
                os.kill(worker.process.pid, signal.SIGTERM)

    def _start(self, index: int, deaths: int) -> Worker:
        ours, theirs = self._spawn.Pipe(duplex=False)
        options = replace(self._options, watch=self._options.watch and index == 0)
        device = self._options.devices[index] if self._options.devices else None
        process = self._spawn.Process(
            target=_main, args=(options, self._bound, self._folder, device, theirs), name=f"mpdeploy-serve-{index}"
        )
        process.start()
        theirs.close()
        return Worker(index, process, ours, time.monotonic(), deaths)

    def _look(self) -> None:
        """One round: news from the processes, and those that died are started again."""
        pipes = {worker.pipe: worker for worker in self._workers if not worker.pipe.closed}
        for pipe in wait(list(pipes), timeout=LOOK_S):
            self._hear(pipes[pipe])  # type: ignore[index]
        now = time.monotonic()
        for position, worker in enumerate(self._workers):
            if worker.process.is_alive() or self._signal:
                continue
            if worker.again_at is None:
                worker.process.join()
                code = worker.process.exitcode
                if now - worker.started > LIVED_S:
                    worker.deaths = 0
                pause = RESTART_S[min(worker.deaths, len(RESTART_S) - 1)]
                how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with {code}"
                log.error("process %d of the server %s; it is started again in %g s", worker.process.pid, how, pause)
                worker.again_at = now + pause
            elif now >= worker.again_at:
                if not worker.pipe.closed:
                    worker.pipe.close()
                self._workers[position] = self._start(worker.index, worker.deaths + 1)

    def _hear(self, worker: Worker) -> None:
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, OSError):
            worker.pipe.close()
            return
        if kind == "failed":
            if self._on_ready is not None and worker.deaths == 0:  # nothing was ever served: say why, and end
                raise value if isinstance(value, MpdeployError) else StageFailedError(str(value))
            log.error("process %d of the server cannot serve: %s", worker.process.pid, value)
        elif kind == "ready":
            worker.ready = True
            if self._on_ready is not None and all(each.ready for each in self._workers):
                told, self._on_ready = self._on_ready, None
                told({**value, "pid": os.getpid(), "processes": [each.process.pid for each in self._workers]})

    def _stop(self) -> int:
        """Wait for the processes, which have their signal; a second signal kills them."""
        until = time.monotonic() + self._options.drain_s + 2 * self._options.stop_s + 5
        while any(worker.process.is_alive() for worker in self._workers):
            if self._signals > 1 or time.monotonic() > until:
                for worker in self._workers:
                    worker.process.kill()
            for worker in self._workers:
                worker.process.join(LOOK_S / len(self._workers))
        # One that had not begun to serve ends by the signal itself; one that had died already was told of then.
        served = [worker for worker in self._workers if worker.ready and worker.again_at is None]
        return 1 if any(worker.process.exitcode for worker in served) else 0


def _main(options: ServerOptions, bound: socket.socket, folder: Path, device: str | None, pipe: Connection) -> None:
    """A worker's whole life, in a fresh interpreter."""
    _die_with_parent()
    if device is not None:  # before any CUDA library is loaded
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        code = run_process(options, bound, folder=folder, on_ready=lambda told: pipe.send(("ready", told)))
    except MpdeployError as error:
        pipe.send(("failed", error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    pipe.close()
    raise SystemExit(code)


def _die_with_parent() -> None:
    """On Linux: a parent that is killed takes its processes with it."""
    import contextlib
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)

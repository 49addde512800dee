"""`mpdeploy serve RUN --server triton`: a tritonserver found on this machine serves the run's model repository instead of our server.

The repository is made in a temporary folder, from the same choice and under the same rules as `mpdeploy package --target triton`.
The server is a child in a process group of its own: signals are handed on to it, and it dies when this process does.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import http.client
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mpdeploy.engines import backend
from mpdeploy.errors import StageFailedError, UnavailableError, UsageError
from mpdeploy.run_dir import RunDir
from mpdeploy.serve.options import ModelOptions, ServerOptions
from mpdeploy.serve.package import PackageRequest
from mpdeploy.serve.package.check import check_repository
from mpdeploy.serve.package.models import PackagedModel
from mpdeploy.serve.package.target_triton import repository_of
from mpdeploy.serve.package.triton import BACKENDS, NO_BACKEND, TritonOptions

EXECUTABLE = "MPDEPLOY_TRITONSERVER"
"""Environment variable that names the tritonserver, where it is not on PATH."""
USUAL_FOLDER = Path("/opt/tritonserver")
log = logging.getLogger("mpdeploy.serve.triton")
READY_SECONDS = 300.0
STOP_SECONDS = 30.0
LOG_LINES = 40
_PR_SET_PDEATHSIG = 1
_TAKEN = frozenset({"run", "name", "host", "port", "grpc_port", "model", "stop_s", "log_format"})
_TAKEN_OF_MODEL = frozenset({"engine", "allow_failed", "instances", "max_queue", "deadline_s"})


def serve_with_triton(
    options: ServerOptions,
    *,
    executable: Path | None = None,
    on_ready: Callable[[Mapping[str, Any]], None] | None = None,
    arguments: tuple[str, ...] = (),
) -> int:
    """Serve a run with a tritonserver until it is told to stop (SIGTERM, SIGINT), and return its exit code (0 after a signal).

    Args:
        options: those of our own server; one that Triton has nothing like is refused.
        executable: the tritonserver; None: what MPDEPLOY_TRITONSERVER names, else the one on PATH or in /opt/tritonserver.
        on_ready: told what is served where, once every model answers.
        arguments: further ones for tritonserver.

    Raises:
        UnavailableError: there is no tritonserver, or it has no backend for anything of this run.
        UsageError: an option that Triton has nothing like.
        GateFailedError, ArtifactChangedError: nothing of the run may be served.
        StageFailedError: tritonserver ended before it was ready; its own errors are in the message.
    """
    _check_options(options)
    server = find_tritonserver(executable)
    backends = backends_of(server)
    with tempfile.TemporaryDirectory(prefix="mpdeploy-triton-") as folder:
        names = _write_repository(options, Path(folder), server, backends)
        port = options.port or _free_port(options.host)
        _check_free(options.host, port)
        command = _command(server, backends, Path(folder), options, port)
        return _run([*command, *arguments], options, port, names, on_ready)


def find_tritonserver(executable: Path | None = None) -> Path:
    """The tritonserver of this machine.

    Raises:
        UnavailableError: there is none, or the named one cannot be run.
    """
    named = str(executable) if executable is not None else os.environ.get(EXECUTABLE)
    usual = str(USUAL_FOLDER / "bin" / "tritonserver")
    found = shutil.which(named) if named else shutil.which("tritonserver") or shutil.which(usual)
    if found is None:
        where = f"{named} cannot be run" if named else f"there is none on PATH or in {USUAL_FOLDER}"
        raise UnavailableError(
            f"No tritonserver: {where}.",
            hint=f"run inside NVIDIA's tritonserver container, set {EXECUTABLE}, or leave out --server triton: "
            "our own server speaks the same protocol",
        )
    return Path(found).resolve()


def backends_of(server: Path) -> Mapping[str, Path]:
    """Backend -> its folder, of a tritonserver's own backend folder (`../backends` of its binary)."""
    for folder in (server.parent.parent / "backends", USUAL_FOLDER / "backends"):
        if folder.is_dir():
            return {
                item.name: item
                for item in sorted(folder.iterdir())
                # a shared library, or a backend that is itself written in Python
                if (item / f"libtriton_{item.name}.so").is_file() or (item / "model.py").is_file()
            }
    return {}


def _write_repository(
    options: ServerOptions, folder: Path, server: Path, backends: Mapping[str, Path]
) -> dict[str, PackagedModel]:
    """The run's models that this server can run, in `folder`."""
    run = RunDir.open(options.run)
    refused = dict(NO_BACKEND)
    for engine, row in BACKENDS.items():
        if row.name not in backends:
            refused[engine] = f"{server} has no backend '{row.name}'; it has {', '.join(backends) or 'none'}"
    if "tensorrt" not in refused and (missing := backend("tensorrt").can_run()) is not None:
        refused["tensorrt"] = f"a plan cannot run here: {missing.reason}"
    if set(BACKENDS) <= set(refused):
        reasons = "".join(f"\n  {engine}: {refused[engine]}" for engine in BACKENDS)
        raise UnavailableError(
            f"This tritonserver can run nothing that is packaged for it:{reasons}",
            hint="take a tritonserver with the onnxruntime or tensorrt backend (NVIDIA's container has both)",
        )
    model = options.model
    request = PackageRequest(
        options.run,
        "triton",
        folder,
        engines=(model.engine,) if model.engine else (),
        name=options.name,
        allow_failed=model.allow_failed,
    )
    triton = TritonOptions(
        instances=model.instances, max_queue_size=model.max_queue, queue_timeout_us=round(model.deadline_s * 1e6)
    )
    chosen, names = repository_of(run, request, folder, triton, refused=refused)
    log.info("packaged %s", ", ".join(names))
    for warning in chosen.warnings:
        log.warning("%s", warning)
    check_repository(folder, names)
    return names


def _command(server: Path, backends: Mapping[str, Path], folder: Path, options: ServerOptions, port: int) -> list[str]:
    command = [
        str(server),
        f"--model-repository={folder}",
        f"--backend-directory={next(iter(backends.values())).parent}",
        "--disable-auto-complete-config",
        f"--http-address={options.host}",
        f"--http-port={port}",
        "--allow-metrics=true",
        f"--metrics-address={options.host}",
        f"--metrics-port={_free_port(options.host) if options.port == 0 else options.port + 2}",
        f"--exit-timeout-secs={max(1, round(options.stop_s))}",
    ]
    if options.grpc_port is None:
        return [*command, "--allow-grpc=false"]
    grpc_port = options.grpc_port or _free_port(options.host)
    return [*command, f"--grpc-address={options.host}", f"--grpc-port={grpc_port}"]


def _run(
    command: list[str],
    options: ServerOptions,
    port: int,
    names: Mapping[str, PackagedModel],
    on_ready: Callable[[Mapping[str, Any]], None] | None,
) -> int:
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent
    )  # fmt: skip
    with _signals_to(child) as stopping, _log_of(child) as tail:
        try:
            ready = _wait_until_ready(child, options.host, port)
            if ready and on_ready is not None:
                on_ready(_told(command, options, port, names))
            code = child.wait()
        finally:
            if child.poll() is None:
                _stop(child)
    if stopping:
        return 0
    if not ready:
        raise StageFailedError(
            f"tritonserver ended with {code} before it was ready:\n" + "\n".join(_errors_of(tail)),
            hint="the lines above are its own; --port and --grpc-port choose other ports",
        )
    return code


def _wait_until_ready(child: subprocess.Popen[bytes], host: str, port: int) -> bool:
    """Ask until every model is ready; False where the child ended first.

    Raises:
        StageFailedError: it is still not ready after READY_SECONDS.
    """
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    end = time.monotonic() + READY_SECONDS
    while child.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(address, port, timeout=2)
            try:
                connection.request("GET", "/v2/health/ready")
                if connection.getresponse().status == 200:
                    return True
            finally:
                connection.close()
        if time.monotonic() > end:
            raise StageFailedError(f"tritonserver is not ready after {READY_SECONDS:.0f} s.", hint="its log says more")
        time.sleep(0.1)
    return False


def _told(command: list[str], options: ServerOptions, port: int, names: Mapping[str, PackagedModel]) -> dict[str, Any]:
    """What our own server tells when it is ready, and every model of the repository beside it."""

    def given(flag: str) -> str | None:
        return next((item.partition("=")[2] for item in command if item.startswith(f"{flag}=")), None)

    name, model = next(iter(names.items()))
    host = f"[{options.host}]" if ":" in options.host else options.host
    grpc_port = given("--grpc-port")
    return {
        "server": "triton",
        "url": f"http://{host}:{port}",
        "grpc": f"{options.host}:{grpc_port}" if grpc_port else None,
        "metrics": f"http://{host}:{given('--metrics-port')}/metrics",
        "model": name,
        "engine": model.engine,
        "precision": model.precision,
        "verdict": model.verdict,
        "max_batch": model.batching.max_batch,
        "warnings": list(model.reasons),
        "models": {each: item.provenance() for each, item in names.items()},
        "run": str(options.run),
        "pid": os.getpid(),
    }


@contextlib.contextmanager
def _signals_to(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Hand SIGTERM and SIGINT on to the child; what is yielded lists those that came."""
    came: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        came.append(number)
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGTERM if len(came) == 1 else signal.SIGKILL)  # a second one does not wait

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _log_of(child: subprocess.Popen[bytes]) -> Iterator[collections.deque[str]]:
    """Copy what the child prints to stderr, and keep its last lines."""
    tail: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
    assert child.stdout is not None

    def copy() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            tail.append(text)
            print(text, file=sys.stderr, flush=True)

    reader = threading.Thread(target=copy, name="tritonserver-log", daemon=True)
    reader.start()
    try:
        yield tail
    finally:
        reader.join(timeout=5)


def _errors_of(tail: collections.deque[str]) -> list[str]:
    errors = [line for line in tail if line.startswith(("E", "error:")) or "UNAVAILABLE" in line]
    return errors or list(tail)[-10:]


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _check_free(host: str, port: int) -> None:
    """Refuse a port that another process holds: its answers would be taken for tritonserver's.

    Raises:
        UnavailableError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UnavailableError(
                f"Cannot listen on {host}:{port}: {error.strerror or error}.", hint="give another --host or --port"
            ) from error


def _check_options(options: ServerOptions) -> None:
    """Refuse options that were given and that Triton has nothing like: none is silently dropped."""
    standard, standard_model = ServerOptions(options.run), ModelOptions()
    changed = [
        item.name
        for value, usual, taken in ((options, standard, _TAKEN), (options.model, standard_model, _TAKEN_OF_MODEL))
        for item in fields(value)
        if item.name not in taken and getattr(value, item.name) != getattr(usual, item.name)
    ]
    if changed:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise UsageError(
            f"--server triton has nothing like {names}.",
            hint="leave them out, or use our own server; for TLS and tokens put a proxy before Triton",
        )


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """In the child, before it becomes tritonserver: a parent that is killed takes it along."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

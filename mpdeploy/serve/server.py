"""One serving process: the event loop with the models, uvicorn around the application, gRPC beside it, and an orderly end.

SIGTERM or SIGINT: not ready first, then (after `drain_s`) no new connections, requests in flight are answered, engines close.
A second one ends it at once. SIGHUP reads the runs again and swaps where one changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mpdeploy.errors import MissingExtraError, UnavailableError
from mpdeploy.serve.app import App
from mpdeploy.serve.connection import connection_class
from mpdeploy.serve.direct import Door
from mpdeploy.serve.logs import AccessLog, set_up_logging
from mpdeploy.serve.manager import ModelManager
from mpdeploy.serve.options import ServerOptions
from mpdeploy.serve.shared import Counts, Shared
from mpdeploy.serve.tracing import Tracer

log = logging.getLogger("mpdeploy.serve")

Ready = Callable[[dict[str, Any]], None]
FORCED = 1
GC_THRESHOLDS = (20_000, 20, 50)
"""Each request leaves a few objects in cycles; Python's own 700 would collect every few dozen requests."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening address, bound.

    Raises:
        UnavailableError: it cannot be had.
    """
    found: socket.socket | None = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        if found is not None:
            found.close()
        raise UnavailableError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}.", hint="give another --host or --port"
        ) from error
    found.set_inheritable(True)
    return found


def address(options: ServerOptions, bound: socket.socket) -> str:
    """The URL of the server."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if options.tls_cert else 'http'}://{shown}:{port}"


def run_process(
    options: ServerOptions, bound: socket.socket, *, folder: Path | None = None, on_ready: Ready | None = None
) -> int:
    """Serve until a signal says otherwise; the process's exit code.

    Args:
        options: of the server.
        bound: the socket to listen on.
        folder: what processes behind the port share; None where there is one.
        on_ready: told what is served, once it is.

    Raises:
        MpdeployError: the run cannot be served.
    """
    uvloop = uvloop_module()
    set_up_logging(options.log_format)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(options, bound, folder, on_ready))


def uvloop_module() -> Any:
    """Uvloop.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import uvloop
    except ImportError as error:
        raise MissingExtraError.for_extra("uvloop", "serve") from error
    return uvloop


async def _serve(options: ServerOptions, bound: socket.socket, folder: Path | None, on_ready: Ready | None) -> int:
    import uvicorn

    app: App | None = None
    server: uvicorn.Server | None = None

    def gauges() -> Counts:
        connections = 0 if server is None else len(server.server_state.connections)
        return {"gauge/connections": connections, "gauge/inflight_bytes": 0 if app is None else app.inflight_bytes}

    manager = ModelManager(options, shared=Shared(folder), gauges=gauges)
    access_log = AccessLog(options.access_log) if options.access_log else None
    tracer = Tracer(options.otlp_endpoint) if options.otlp_endpoint else None
    app = App(manager, options, access_log=access_log, tracer=tracer)
    stop = _Stop()
    with _signals(stop, manager):
        starting = asyncio.ensure_future(manager.start())
        await _first(starting, stop.asked)
        if stop.event.is_set():
            starting.cancel()
            return 128 + stop.signal
        await starting
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection needs to look at it again
        gc.set_threshold(*GC_THRESHOLDS)
        if options.tls_cert is not None:
            _limit_handshakes(options.header_timeout_s)
        server = _Server(_config(app, options, uvicorn))
        serving = asyncio.ensure_future(server.serve(sockets=[bound]))
        grpc = await _start_grpc(manager, options)
        keeping = asyncio.ensure_future(_keep_house(server, access_log))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if on_ready is not None:
            on_ready(described(options, bound, manager, grpc))
        await _first(serving, stop.asked)
        # -- the end ---------------------------------------------------------------------------------------------------
        manager.stopping = True
        log.info("stopping: not ready any more; requests in flight are answered")
        await _first(asyncio.ensure_future(asyncio.sleep(options.drain_s)), stop.forced)
        server.should_exit = True
        if grpc is not None:
            await grpc.stop(options.stop_s)
        await _first(serving, stop.forced)
        drained = False if stop.force.is_set() else await manager.stop()
        keeping.cancel()
    if access_log is not None:
        access_log.flush()
    if tracer is not None:
        tracer.close()
    if not drained:
        log.error("ended before every request was answered")
        os._exit(FORCED)  # an engine that never returns would keep the process alive
    log.info("ended; every request was answered")
    return 0


def described(options: ServerOptions, bound: socket.socket, manager: ModelManager, grpc: Any) -> dict[str, Any]:
    """What is served and where, for `--json`."""
    models = [
        {
            "model": version.name,
            "version": version.number,
            "engine": version.metadata.notes["engine"],
            "precision": version.metadata.notes["precision"],
            "device": version.metadata.notes["device"],
            "verdict": version.metadata.notes["verdict"],
            "max_batch": version.metadata.notes["max_batch"],
            "warnings": version.metadata.notes["warnings"],
            "not_served": version.metadata.notes["not_served"],
        }
        for version in manager.versions()
    ]
    return {
        "url": address(options, bound),
        "grpc": None if grpc is None else f"{options.host}:{grpc.port}",
        **(models[0] if models else {}),
        "run": str(options.run),
        "pid": os.getpid(),
    }


def _config(app: App, options: ServerOptions, uvicorn: Any) -> Any:
    protocol = connection_class()
    protocol.limits = options  # type: ignore[attr-defined]
    protocol.door = Door(app)  # type: ignore[attr-defined]
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        interface="asgi3",
        backlog=2048,
        timeout_keep_alive=options.keep_alive_s,
        timeout_graceful_shutdown=max(1, round(options.stop_s)),
        ssl_certfile=None if options.tls_cert is None else str(options.tls_cert),
        ssl_keyfile=None if options.tls_key is None else str(options.tls_key),
    )


def _limit_handshakes(seconds: float) -> None:
    """End TLS handshakes that take longer: until one is done, no connection is there to be swept. uvicorn has no setting for it."""
    loop: Any = asyncio.get_running_loop()
    loop.create_server = partial(loop.create_server, ssl_handshake_timeout=seconds)


def _make_server() -> Any:
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc]
        """uvicorn's, which leaves signals to us."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server


def _Server(config: Any) -> Any:  # noqa: N802 - stands for the class, whose base is imported late
    return _make_server()(config)


async def _start_grpc(manager: ModelManager, options: ServerOptions) -> Any:
    if options.grpc_port is None:
        return None
    from mpdeploy.environment import package_version
    from mpdeploy.serve.grpc_server import GrpcOptions, start_grpc

    chosen = GrpcOptions(
        max_request_bytes=options.max_body_bytes,
        max_inflight_bytes=options.max_inflight_bytes,
        share_port=options.num_processes > 1,
        token=options.token,
        certificate=options.tls_cert,
        key=options.tls_key,
        version=package_version("mpdeploy") or "",
    )
    return await start_grpc(manager, options.host, options.grpc_port, chosen)


async def _keep_house(server: Any, access_log: AccessLog | None) -> None:
    """Twice a second: cut off peers that took too long, write the access log."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(0.5)
        now = time.monotonic()
        for connection in list(server.server_state.connections):
            connection.sweep(now)
        if access_log is not None:
            await loop.run_in_executor(None, access_log.flush)


class _Stop:
    """What signals ask for: the first to stop, the second to stop at once."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.force = asyncio.Event()
        self.signal = 0

    def on_signal(self, number: int) -> None:
        (self.force if self.event.is_set() else self.event).set()
        self.signal = number

    async def asked(self) -> None:
        await self.event.wait()

    async def forced(self) -> None:
        await self.force.wait()


@contextlib.contextmanager
def _signals(stop: _Stop, manager: ModelManager) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    reloads: set[asyncio.Task[bool]] = set()

    def reload() -> None:
        task = loop.create_task(manager.reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


async def _first(task: asyncio.Future[Any], until: Callable[[], Any]) -> None:
    """Wait for the task, or until what ends the wait; whichever is first."""
    other = asyncio.ensure_future(until())
    try:
        await asyncio.wait({task, other}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        other.cancel()

"""The short way of an inference request: read, queued and answered by plain calls, without a scope, a task or a coroutine.

At a few ten thousand requests a second on a core, ASGI's machinery costs more than the protocol and the batching together. The door
opens for the common case alone: POST to a loaded model, HTTP/1.1 kept alive, a body of a known and moderate length, nothing in
progress on the connection. Whatever is out of the ordinary, each kind of refusal included, takes uvicorn's and ASGI's way (`app.py`).

Clients send the very same head again and again: on a connection where it came last, it is not parsed again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mpdeploy.artifact import Array
from mpdeploy.serve.memory import remember
from mpdeploy.serve.messages import InferRequest, ServeError
from mpdeploy.serve.protocol import decode_request, encode_response

if TYPE_CHECKING:
    from mpdeploy.serve.app import App
    from mpdeploy.serve.version import Version

log = logging.getLogger("mpdeploy.serve")

DIRECT_BYTES = 2**20
"""A larger body takes ASGI's way, where reading is paused while it waits."""
MAX_ROUTES = 256
MAX_SEEN = 2048
"""Bytes of the longest head that a connection keeps."""
_ELSEWHERE = frozenset({b"content-encoding", b"transfer-encoding", b"upgrade", b"expect"})
"""Headers that a request on the short way must not have."""


class _NoEvent:
    def set(self) -> None:
        """Nobody waits: what comes next is called."""


class Door:
    """Decides which requests take the short way.

    Args:
        app: answers the others, and holds the limits that count for both.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._most = min(DIRECT_BYTES, app.options.max_body_bytes)
        self._open = app.tracer is None
        self._routes: dict[bytes, tuple[str, str | None]] = {}

    def enter(self, connection: Any) -> Direct | None:
        """The request whose head was just read, if it may take the short way; its bytes are then counted as held."""
        app = self.app
        cycle = connection.cycle
        if not self._open or app.manager.stopping or (cycle is not None and not cycle.response_complete):
            return None
        route = self._routes.get(connection.url) or self._route(connection.url)
        if route is None or connection.flow.write_paused or not app.manager.serves(*route):
            return None
        parser = connection.parser
        if parser.get_method() != b"POST" or parser.get_http_version() != "1.1" or not parser.should_keep_alive():
            return None
        length = json_length = timeout = None
        for key, value in connection.headers:
            if key == b"content-length":
                length = value
            elif key == b"inference-header-content-length":
                json_length = value
            elif key == b"x-request-timeout-ms":
                timeout = value
            elif key in _ELSEWHERE:
                return None
        if length is None or json_length == b"0" or not app.authorised(connection.headers):
            return None
        size = int(length)
        if size > self._most or app.inflight_bytes + size > app.options.max_inflight_bytes:
            return None
        app.inflight_bytes += size
        return Direct(app, connection, route, size, json_length, timeout)

    def enter_again(self, connection: Any, seen: SeenHead) -> Direct | None:
        """The request whose head is the one that was read last, under all conditions that may have changed since."""
        app = self.app
        if app.manager.stopping or not connection.cycle.response_complete or connection.flow.write_paused:
            return None
        if app.inflight_bytes + seen.size > app.options.max_inflight_bytes or not app.manager.serves(*seen.route):
            return None
        app.inflight_bytes += seen.size
        return Direct(app, connection, seen.route, seen.size, seen.json_length, seen.timeout)

    def _route(self, url: bytes) -> tuple[str, str | None] | None:
        """Model and version of a path that asks for inference and needs no unquoting."""
        parts = url.split(b"/")
        if parts[:3] != [b"", b"v2", b"models"] or parts[-1] != b"infer" or any(byte in url for byte in b"%?#"):
            return None
        if not url.isascii() or not (len(parts) == 5 or (len(parts) == 7 and parts[4] == b"versions")):
            return None
        route = (parts[3].decode(), parts[5].decode() if len(parts) == 7 else None)
        if not self.app.manager.serves(*route):
            return None  # a stranger's paths are not remembered
        remember(self._routes, url, route, MAX_ROUTES)
        return route


class SeenHead:
    """A request's head that was read, and let in, when it and its body came in one piece. To read the same bytes again says the same."""

    __slots__ = ("head", "json_length", "length", "route", "size", "split", "timeout")

    def __init__(self, head: bytes, direct: Direct) -> None:
        self.head = head
        self.split = len(head)
        self.size = direct.size
        self.length = self.split + self.size
        self.route = direct.route
        self.json_length = direct.json_length
        self.timeout = direct.timeout

    @classmethod
    def of(cls, data: bytes, direct: Direct) -> SeenHead | None:
        """Of what was read between two requests and gave `direct`; None where it is not one whole request."""
        end = data.find(b"\r\n\r\n") + 4
        if len(data) - end != direct.size or end > MAX_SEEN:
            return None
        return cls(data[:end], direct)


class Direct:
    """A request on the short way. To uvicorn it is the cycle in progress, to the batcher the future that gets the outputs."""

    __slots__ = (
        "app", "begin", "binary", "connection", "disconnected", "held", "json_length", "keep_alive", "parts", "request",
        "response_complete", "response_started", "route", "size", "submitted", "timeout", "version",
    )  # fmt: skip
    message_event = _NoEvent()

    def __init__(
        self,
        app: App,
        connection: Any,
        route: tuple[str, str | None],
        size: int,
        json_length: bytes | None,
        timeout: bytes | None,
    ) -> None:
        self.app = app
        self.connection = connection
        self.route = route
        self.size = self.held = size
        self.json_length = json_length
        self.timeout = timeout
        self.parts: list[bytes] = []
        self.begin = time.perf_counter() if app.access_log is not None else 0.0
        self.request: InferRequest | None = None
        self.version: Version | None = None
        self.binary = False
        self.keep_alive = True
        self.submitted = self.disconnected = self.response_started = self.response_complete = False

    # -- what the connection calls -------------------------------------------------------------------------------------

    def complete(self) -> None:
        """All parts of the body are there: queue the request."""
        parts, self.parts = self.parts, []
        self.submit(parts[0] if len(parts) == 1 else b"".join(parts))

    def submit(self, body: bytes) -> None:
        """Queue the request."""
        self.submitted = True
        name, version = self.route
        try:
            self.request, self.binary = decode_request(
                body, self.json_length, name, version, timeout_ms=self.timeout, cancelled=self.connection.is_lost
            )
            self.version = self.app.manager.version(name, version)
            self.version.submit(self.request, self)
        except ServeError as error:
            self.set_exception(error)
        except Exception as error:
            self._fault(error)

    def lost(self) -> None:
        """The peer has gone. What was queued is given back by the batcher, which sees it before it computes."""
        if not self.submitted:
            self.submitted = True
            self._release()

    # -- what the batcher's side calls, on the event loop's thread but for `done` --------------------------------------

    def done(self) -> bool:
        """Whether it was answered."""
        return self.response_complete

    def cancelled(self) -> bool:
        """Never by itself: see `lost`."""
        return False

    def set_result(self, outputs: Mapping[str, Array]) -> None:
        """Answer with the outputs."""
        request, version = self.request, self.version
        assert request is not None
        assert version is not None
        try:
            content, head = encode_response(version.response(request, outputs), request, self.binary)
        except ServeError as error:
            self.set_exception(error)
        except Exception as error:
            self._fault(error)
        else:
            if head is None:
                self._send(200, b"content-type: application/json\r\n", content, False)
            else:
                self._send(
                    200,
                    b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n" % head,
                    content,
                    False,
                )

    def set_exception(self, error: ServeError) -> None:
        """Answer with an error."""
        answer = self.app.error(error)
        headers = b"".join([b"%s: %s\r\n" % header for header in answer.headers])
        self._send(answer.status, headers, answer.body, answer.close)

    def _fault(self, error: Exception) -> None:
        log.error("a fault of the server", exc_info=error)
        self.set_exception(ServeError("a fault of the server; its log says more"))

    def _send(self, status: int, headers: bytes, body: bytes, close: bool) -> None:
        connection, app = self.connection, self.app
        received = self.held
        self._release()
        self.response_started = self.response_complete = True
        if not connection.lost:
            close = close or not self.keep_alive or app.manager.stopping
            connection.answer(status, headers, body, close)
        if app.access_log is not None:
            scope = {"client": connection.client, "method": "POST", "path": _path(self.route)}
            app.access_log.add(scope, status, received, len(body), time.perf_counter() - self.begin)

    def _release(self) -> None:
        self.app.inflight_bytes -= self.held
        self.held = 0


def _path(route: tuple[str, str | None]) -> str:
    name, version = route
    return f"/v2/models/{name}/infer" if version is None else f"/v2/models/{name}/versions/{version}/infer"

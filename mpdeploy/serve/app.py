"""The HTTP side as a plain ASGI application: routes, limits, authorisation, and errors as JSON.

GET   /                                             a page for people
GET   /v2  /v2/health/live  /v2/health/ready        the server
GET   /v2/models/M[/versions/V]  .../ready  .../config  .../stats      a model; /v2/models/stats: all of them
POST  /v2/models/M[/versions/V]/infer
POST  /v2/repository/index  /v2/repository/models/M/load  .../unload
GET   /metrics
"""

from __future__ import annotations

import hmac
import logging
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from mpdeploy.serve.logs import AccessLog
from mpdeploy.serve.manager import ModelManager
from mpdeploy.serve.messages import (
    BadRequestError,
    CancelledRequestError,
    InferRequest,
    InferResponse,
    OverloadedError,
    ServeError,
    TooLargeError,
    UnauthorizedError,
    UnavailableServeError,
    UnknownModelError,
)
from mpdeploy.serve.metrics import exposition
from mpdeploy.serve.options import ServerOptions
from mpdeploy.serve.page import page
from mpdeploy.serve.protocol import deadline_of, decode_request, encode_response, load_orjson, read_json
from mpdeploy.serve.tracing import Tracer
from mpdeploy.serve.wire import config_json, metadata_json, server_json

log = logging.getLogger("mpdeploy.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON: Header = (b"content-type", b"application/json")
BINARY: Header = (b"content-type", b"application/octet-stream")
DRAIN_BYTES = 8 * 2**20
"""Of a body that is too large, so much is read and thrown away before the answer, so that its sender gets to read it."""


class Answer:
    """What a route answers."""

    __slots__ = ("body", "close", "headers", "status")

    def __init__(self, status: int, body: bytes, *headers: Header, close: bool = False) -> None:
        self.status = status
        self.body = body
        self.headers = headers
        self.close = close


class App:
    """The ASGI application.

    Args:
        manager: answers.
        options: limits, token.
        access_log: where requests are noted; None: nowhere.
        tracer: where spans go; None: nowhere.
    """

    def __init__(
        self,
        manager: ModelManager,
        options: ServerOptions,
        *,
        access_log: AccessLog | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.inflight_bytes = 0
        self.manager = manager
        self.options = options
        self._token = None if options.token is None else b"bearer " + options.token.encode()
        self.access_log = access_log
        self.tracer = tracer
        self._dumps: Callable[[Any], bytes] = load_orjson().dumps

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        begin = time.perf_counter() if self.access_log is not None else 0.0
        held = [0]
        try:
            answer = await self._answer(scope, receive, held)
        except ServeError as error:
            answer = self.error(error)
        except Exception:
            log.exception("a fault of the server")
            answer = Answer(500, self._dumps({"error": "a fault of the server; its log says more"}), JSON)
        size = len(answer.body)
        held[0] += size
        self.inflight_bytes += size
        try:
            headers = [*answer.headers, (b"content-length", str(size).encode())]
            if answer.close or self.manager.stopping:
                headers.append((b"connection", b"close"))
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "http.response.body", "body": answer.body})
        finally:
            self.inflight_bytes -= held[0]
            if self.access_log is not None:
                self.access_log.add(scope, answer.status, held[0] - size, size, time.perf_counter() - begin)

    async def _answer(self, scope: Scope, receive: Receive, held: list[int]) -> Answer:
        method: str = scope["method"]
        parts: list[str] = scope["path"].split("/")
        stranger = self._token is not None and not self.authorised(scope["headers"])
        if stranger and not _is_open(parts):
            raise UnauthorizedError("a bearer token is needed: Authorization: Bearer TOKEN")
        if len(parts) > 4 and parts[1] == "v2" and parts[2] == "models":
            name = parts[3]
            version, rest = (parts[5], parts[6:]) if parts[4] == "versions" and len(parts) > 5 else (None, parts[4:])
            if stranger and not self.manager.serves(name, version):
                raise UnknownModelError("there is no such model")  # the manager's message names those that there are
            if rest == ["infer"]:
                _allow(method, "POST")
                return await self._infer(scope, receive, held, name, version)
            _allow(method, "GET", "HEAD")
            return self._of_model(name, version, rest)
        return await self._of_server(scope, receive, held, method, parts)

    # -- inference -----------------------------------------------------------------------------------------------------

    async def _infer(self, scope: Scope, receive: Receive, held: list[int], name: str, version: str | None) -> Answer:
        self.manager.version(name, version)  # before the body is read: an unknown model costs nothing
        length = json_length = timeout = encoding = None
        for key, value in scope["headers"]:
            if key == b"content-length":
                length = value
            elif key == b"inference-header-content-length":
                json_length = value
            elif key == b"x-request-timeout-ms":
                timeout = value
            elif key == b"content-encoding":
                encoding = value
        body = await self._body(receive, length, held)
        if encoding is not None and encoding.lower() != b"identity":
            body = self._decompressed(body, encoding.lower(), held)
        connection = scope.get("mpdeploy.connection")
        cancelled = None if connection is None else connection.is_lost
        if json_length == b"0":
            inputs = self.manager.version(name, version).contract.input_of_raw(body)
            deadline = deadline_of({}, timeout)
            request, binary = InferRequest(name, version, inputs, deadline=deadline, cancelled=cancelled), True
        else:
            request, binary = decode_request(body, json_length, name, version, timeout_ms=timeout, cancelled=cancelled)
        if self.tracer is None:
            response = await self.manager.infer(request)
        else:
            response = await self._traced(scope, request, self.tracer)
        content, head = encode_response(response, request, binary)
        if head is None:
            return Answer(200, content, JSON)
        return Answer(200, content, BINARY, (b"inference-header-content-length", str(head).encode()))

    async def _traced(self, scope: Scope, request: InferRequest, tracer: Tracer) -> InferResponse:
        with tracer.request(request.model_name, scope["headers"]) as span:
            response = await self.manager.infer(request)
            span.set_attribute("mpdeploy.model_version", response.model_version)
            return response

    async def _body(self, receive: Receive, length: bytes | None, held: list[int]) -> bytes:
        """The request's body.

        Raises:
            TooLargeError: it is larger than a body may be.
            OverloadedError: too many bytes are held already.
            CancelledRequestError: the client has gone.
        """
        most = self.options.max_body_bytes
        if length is not None:
            expected = int(length)
            if expected > most:
                await self._drain(receive, expected)
                raise TooLargeError(f"the body has {expected} bytes; {most} is the most")
            self._hold(expected, held)
        message = await receive()
        if message["type"] != "http.request":
            raise CancelledRequestError("the client has gone")
        first: bytes = message.get("body", b"")
        if length is None:
            self._hold(len(first), held)
        if not message.get("more_body", False):
            if len(first) > most:
                raise TooLargeError(f"the body has {len(first)} bytes; {most} is the most")
            return first
        parts, size = [first], len(first)
        while message.get("more_body", False):
            message = await receive()
            if message["type"] != "http.request":
                raise CancelledRequestError("the client has gone")
            part: bytes = message.get("body", b"")
            size += len(part)
            if length is None:
                self._hold(len(part), held)
            if size > most:
                raise TooLargeError(f"the body has more than {most} bytes, which is the most")
            parts.append(part)
        return b"".join(parts)

    def _hold(self, size: int, held: list[int]) -> None:
        if self.inflight_bytes + size > self.options.max_inflight_bytes:
            raise OverloadedError(f"{self.inflight_bytes} bytes of requests and answers are held already")
        self.inflight_bytes += size
        held[0] += size

    async def _drain(self, receive: Receive, expected: int) -> None:
        if expected > self.options.max_body_bytes + DRAIN_BYTES:
            return
        while True:
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                return

    def _decompressed(self, body: bytes, encoding: bytes, held: list[int]) -> bytes:
        if encoding not in (b"gzip", b"deflate"):
            raise BadRequestError(f"header Content-Encoding {encoding[:40]!r}: gzip, deflate or identity")
        most = self.options.max_body_bytes
        stream = zlib.decompressobj(wbits=47)
        try:
            content = stream.decompress(body, most + 1)
        except zlib.error as error:
            raise BadRequestError(f"the body is not {encoding.decode()}: {error}") from error
        if len(content) > most:
            raise TooLargeError(f"the body has more than {most} bytes when unpacked, which is the most")
        if not stream.eof:
            raise BadRequestError(f"the body is no complete {encoding.decode()}: it breaks off")
        if stream.unused_data:
            raise BadRequestError(
                f"{len(stream.unused_data)} bytes follow the body's {encoding.decode()}: send one member"
            )
        self._hold(len(content), held)
        return content

    # -- the rest ------------------------------------------------------------------------------------------------------

    def _of_model(self, name: str, version: str | None, rest: list[str]) -> Answer:
        manager = self.manager
        if rest == []:
            return self._json(metadata_json(manager.metadata(name, version)))
        if rest == ["ready"]:
            if manager.ready(name, version):
                return Answer(200, b"")
            manager.version(name, version)
            raise UnavailableServeError(f"model '{name}' is not ready")
        if rest == ["config"]:
            return self._json(config_json(manager.version(name, version)))
        if rest == ["stats"]:
            return self._json(manager.statistics(name, version))
        raise UnknownModelError("there is nothing at this path")

    async def _of_server(
        self, scope: Scope, receive: Receive, held: list[int], method: str, parts: list[str]
    ) -> Answer:
        manager = self.manager
        path = [part for part in parts if part]
        if path[:2] == ["v2", "repository"]:
            _allow(method, "POST")
            return await self._repository(scope, receive, held, path[2:])
        if path not in _KNOWN and not (path[:2] == ["v2", "models"] and len(path) == 3):
            raise UnknownModelError("there is nothing at this path; GET /v2 says what the server is")
        _allow(method, "GET", "HEAD")
        if path == ["v2", "health", "live"]:
            return Answer(200, b"")
        if path == ["v2", "health", "ready"]:
            if not manager.server_ready():
                raise UnavailableServeError("the server is not ready")
            return Answer(200, b"")
        if path == ["v2"]:
            return self._json(server_json())
        if path == ["v2", "models", "stats"]:
            return self._json(manager.statistics())
        if path == ["metrics"]:
            info = [
                {"model": version.name, "version": version.number}
                | {key: str(version.metadata.notes[key]) for key in ("engine", "precision", "verdict")}
                for version in manager.versions()
            ]
            content_type, text = exposition(manager.all_counts(), info)
            return Answer(200, text, (b"content-type", content_type.encode()))
        if path == ["figures"]:
            return self._json(self._figures())
        if len(path) == 3:
            return self._of_model(path[2], None, [])
        return Answer(200, page(), (b"content-type", b"text/html; charset=utf-8"), *PAGE_HEADERS)

    async def _repository(self, scope: Scope, receive: Receive, held: list[int], path: list[str]) -> Answer:
        length = next((value for key, value in scope["headers"] if key == b"content-length"), None)
        body = await self._body(receive, length, held)
        document = read_json(body) if body.strip() else {}
        if path == ["index"]:
            listed = self.manager.index()
            if document.get("ready") is True:
                listed = [item for item in listed if item["state"] == "READY"]
            return self._json(listed)
        if len(path) == 3 and path[0] == "models" and path[2] in ("load", "unload"):
            if path[2] == "unload":
                await self.manager.unload(path[1])
                return Answer(200, b"")
            parameters = document.get("parameters", {})
            if not isinstance(parameters, dict):
                raise BadRequestError("'parameters' must be an object")
            await self.manager.load(path[1], parameters)
            return Answer(200, b"")
        raise UnknownModelError("there is nothing at this path")

    def _figures(self) -> dict[str, Any]:
        """What the page shows of each model, polled."""
        models = {}
        for version in self.manager.versions():
            stats = self.manager.statistics(version.name)["model_stats"]
            models[version.name] = {
                "statistics": stats[0] if stats else None,
                "percentiles_ms": version.statistics.percentiles_ms(),
                "pending": version.pending,
                "failures": dict(version.statistics.failures),
                "watchers": {key: value for watcher in version.watchers for key, value in watcher.figures().items()},
            }
        return {"models": models, "inflight_bytes": self.inflight_bytes}

    def authorised(self, headers: Iterable[Header]) -> bool:
        """Whether the token is shown, where one is needed."""
        if self._token is None:
            return True
        given = next((value for key, value in headers if key == b"authorization"), b"")
        scheme, _, credentials = given.partition(b" ")
        return hmac.compare_digest(scheme.lower() + b" " + credentials.strip(), self._token)

    def _json(self, value: Any) -> Answer:
        return Answer(200, self._dumps(value), JSON)

    def error(self, error: ServeError) -> Answer:
        """The answer that says what went wrong."""
        headers = [JSON]
        if isinstance(error, OverloadedError):
            headers.append((b"retry-after", str(max(1, round(error.retry_after_s))).encode()))
        if isinstance(error, UnauthorizedError):
            headers.append((b"www-authenticate", b"Bearer"))
        if isinstance(error, _MethodError):
            headers.append((b"allow", error.allowed.encode()))
        message = error.message.encode("utf-8", "replace").decode()
        return Answer(error.status, self._dumps({"error": message}), *headers, close=isinstance(error, TooLargeError))


class _MethodError(ServeError):
    """A path that exists, with a method that it has not."""

    status = 405
    grpc = "UNIMPLEMENTED"

    def __init__(self, method: str, allowed: str) -> None:
        super().__init__(f"{method} is not for this path; {allowed} is")
        self.allowed = allowed


_KNOWN: tuple[list[str], ...] = (
    [],
    ["figures"],
    ["metrics"],
    ["v2"],
    ["v2", "health", "live"],
    ["v2", "health", "ready"],
    ["v2", "models", "stats"],
)
PAGE_HEADERS: tuple[Header, ...] = (
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
     b"connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)  # fmt: skip


def _allow(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise _MethodError(method, ", ".join(allowed))


def _is_open(parts: list[str]) -> bool:
    """What needs no token: probes, which have none, and the page, which holds nothing and asks for one."""
    if parts[1:3] == ["v2", "models"]:
        return parts[4:] == ["ready"] or (parts[4:5] == ["versions"] and parts[6:] == ["ready"])
    return parts[1:3] == ["v2", "health"] or parts == ["", ""]

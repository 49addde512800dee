"""The gRPC door: the Open Inference Protocol's service on grpc.aio, over the same model manager as the REST door.

A door for clients that speak gRPC: Python's gRPC ends near 2,000 requests a second and core, the REST door with binary tensors
does several times that.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mpdeploy.errors import MissingExtraError, UnavailableError, UsageError
from mpdeploy.serve.grpc_messages import (
    SERVICE,
    load_protocol,
    message_from_metadata,
    message_from_response,
    parameters_from,
    request_from_message,
)
from mpdeploy.serve.grpc_reading import Read, Reading
from mpdeploy.serve.messages import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    OverloadedError,
    ServeError,
)

EXTENSIONS = ("model_repository", "model_repository(unload_dependents)", "statistics")
OPEN_METHODS = frozenset({"ServerLive", "ServerReady", "ModelReady"})
"""What needs no token: probes have none."""
log = logging.getLogger("mpdeploy.serve.grpc")


class Manager(Protocol):
    """What the door needs of the model manager."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer a request."""

    def metadata(self, name: str, version: str | None = None) -> ModelMetadata:
        """What is known of a model."""

    def ready(self, name: str, version: str | None = None) -> bool:
        """Whether a model answers requests."""

    def server_ready(self) -> bool:
        """Whether all models do, and the server is not stopping."""

    def index(self) -> Sequence[Mapping[str, Any]]:
        """The repository: name, version, state and reason of each model."""

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load or reload a model."""

    async def unload(self, name: str) -> None:
        """Unload a model."""

    def statistics(self, name: str | None = None, version: str | None = None) -> Mapping[str, Any]:
        """As the statistics extension writes it: `model_stats`."""


@dataclass(frozen=True, slots=True)
class GrpcOptions:
    """How the door is opened."""

    max_request_bytes: int = 64 * 2**20
    """The largest message taken; a larger one is refused with RESOURCE_EXHAUSTED."""
    max_inflight_bytes: int = 512 * 2**20
    """All messages in progress at a time; beyond it requests are refused with RESOURCE_EXHAUSTED."""
    max_concurrent: int | None = None
    """Calls in progress; further ones are refused with RESOURCE_EXHAUSTED. None: the manager's queue limits them."""
    max_stream_in_flight: int = 64
    """Requests of one stream that are computed at the same time; the stream is not read further beyond."""
    token: str | None = None
    """Clients must send `authorization: Bearer TOKEN`, but for the three probes."""
    share_port: bool = False
    """Several processes open one port, and the kernel spreads the connections over them."""
    certificate: Path | None = None
    """PEM file of the certificate chain; with `key`, the port speaks TLS alone."""
    key: Path | None = None
    """PEM file of the certificate's private key."""
    name: str = "mpdeploy"
    """The server's name in its metadata."""
    version: str = ""
    """The server's version in its metadata."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise UsageError("TLS needs both a certificate and its key.", hint="give both files")
        for name in ("max_request_bytes", "max_inflight_bytes", "max_stream_in_flight"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}.")


class GrpcServer:
    """A running door."""

    def __init__(self, server: Any, host: str, port: int) -> None:
        self._server = server
        self.host = host
        self.port = port

    async def stop(self, grace: float) -> None:
        """Take no new calls, give those in progress `grace` seconds, then cut them off."""
        await self._server.stop(grace)


async def start_grpc(manager: Manager, host: str, port: int, options: GrpcOptions | None = None) -> GrpcServer:
    """Open the door; port 0 takes a free one.

    Raises:
        MissingExtraError: the extra `grpc` is not installed.
        UsageError: a certificate or key that cannot be read.
        UnavailableError: the port cannot be had.
    """
    try:
        import grpc
    except ImportError as error:
        raise MissingExtraError.for_extra("grpcio", "grpc") from error
    options = options or GrpcOptions()
    server = grpc.aio.server(
        maximum_concurrent_rpcs=options.max_concurrent,
        options=[
            ("grpc.max_receive_message_length", options.max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", 16 * 1024),
            (
                "grpc.so_reuseport",
                int(options.share_port),
            ),  # else a second server on the port is an error, not a lottery
        ],
    )
    reading = Reading(max(options.max_inflight_bytes, options.max_request_bytes))
    server.add_generic_rpc_handlers((_handlers(_Service(manager, options, reading), options, reading),))
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    credentials = _credentials(options)
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise UnavailableError(
            f"The gRPC port {address} cannot be opened: {error}.", hint="another process may hold it; give --grpc-port"
        ) from error
    await server.start()
    return GrpcServer(server, host, bound)


def _credentials(options: GrpcOptions) -> Any:
    import grpc

    if options.certificate is None or options.key is None:
        return None
    try:
        pair = options.key.read_bytes(), options.certificate.read_bytes()
    except OSError as error:
        raise UsageError(f"The TLS file {error.filename} cannot be read: {error.strerror}.") from error
    return grpc.ssl_server_credentials([pair])


def _handlers(service: _Service, options: GrpcOptions, reading: Reading) -> Any:
    import grpc

    handlers = {}
    for method in load_protocol().methods:
        function = getattr(service, _SNAKE[method.name])
        token = None if method.name in OPEN_METHODS else options.token
        make = grpc.stream_stream_rpc_method_handler if method.streams else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = make(
            _guarded_stream(function, token) if method.streams else _guarded(function, token, reading),
            request_deserializer=reading.reader_of(method.request),
            response_serializer=method.response.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


_SNAKE = {
    "ServerLive": "server_live",
    "ServerReady": "server_ready",
    "ModelReady": "model_ready",
    "ServerMetadata": "server_metadata",
    "ModelMetadata": "model_metadata",
    "ModelInfer": "infer",
    "ModelStreamInfer": "stream",
    "ModelStatistics": "statistics",
    "RepositoryIndex": "index",
    "RepositoryModelLoad": "load",
    "RepositoryModelUnload": "unload",
}
"""Method of the protocol -> method of `_Service`."""
Answer = Callable[[Any, Any], Awaitable[Any]]


def _guarded(function: Answer, token: str | None, reading: Reading) -> Answer:
    """The function behind the token, its errors as gRPC statuses; what is unexpected is logged and says nothing."""
    import grpc

    async def answer(read: Read, context: Any) -> Any:
        failure: ServeError
        try:
            await _check_token(context, token)
            return await function(read.checked(), context)
        except ServeError as error:
            failure = error
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception:
            log.exception("a gRPC call failed")
            failure = ServeError("the server failed; its log says more")
        finally:
            reading.done(read)
        return await _abort(context, failure)

    return answer


def _guarded_stream(function: Callable[[Any, Any], AsyncIterator[Any]], token: str | None) -> Any:
    async def answer(messages: Any, context: Any) -> AsyncIterator[Any]:
        await _check_token(context, token)
        async for message in function(messages, context):
            yield message

    return answer


async def _check_token(context: Any, token: str | None) -> None:
    import grpc

    if token is None:
        return
    sent = dict(context.invocation_metadata() or ()).get("authorization", "")
    text = sent if isinstance(sent, str) else ""
    if not hmac.compare_digest(text.encode(), f"Bearer {token}".encode()):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed, and this is not it")


async def _abort(context: Any, error: ServeError) -> None:
    import grpc

    trailing: tuple[tuple[str, str], ...] = ()
    if isinstance(error, OverloadedError):  # gRPC's own word for Retry-After
        trailing = (("grpc-retry-pushback-ms", str(max(1, int(error.retry_after_s * 1000)))),)
    await context.abort(getattr(grpc.StatusCode, error.grpc), error.message, trailing_metadata=trailing)


class _Service:
    """The methods of the protocol: each takes a message and the call's context, and returns a message."""

    def __init__(self, manager: Manager, options: GrpcOptions, reading: Reading) -> None:
        self._manager = manager
        self._options = options
        self._reading = reading
        self._messages = load_protocol().messages

    async def server_live(self, message: Any, context: Any) -> Any:
        return self._messages["ServerLiveResponse"](live=True)

    async def server_ready(self, message: Any, context: Any) -> Any:
        return self._messages["ServerReadyResponse"](ready=self._manager.server_ready())

    async def model_ready(self, message: Any, context: Any) -> Any:
        ready = self._manager.ready(message.name, message.version or None)
        return self._messages["ModelReadyResponse"](ready=ready)

    async def server_metadata(self, message: Any, context: Any) -> Any:
        return self._messages["ServerMetadataResponse"](
            name=self._options.name, version=self._options.version, extensions=EXTENSIONS
        )

    async def model_metadata(self, message: Any, context: Any) -> Any:
        return message_from_metadata(self._manager.metadata(message.name, message.version or None))

    async def infer(self, message: Any, context: Any) -> Any:
        return message_from_response(await self._manager.infer(self._request(message, context)))

    async def stream(self, messages: Any, context: Any) -> AsyncIterator[Any]:
        """Answer a stream in its order; a request that fails answers with its error and the stream goes on."""
        answers: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(self._options.max_stream_in_flight)
        started: set[asyncio.Task[Any]] = set()

        def ended(task: asyncio.Task[Any], read: Read) -> None:
            started.discard(task)
            self._reading.done(read)

        async def read() -> None:
            try:
                async for message in messages:
                    task = asyncio.create_task(self._stream_answer(message, context))
                    started.add(task)
                    task.add_done_callback(functools.partial(ended, read=message))
                    await answers.put(task)
            except asyncio.CancelledError:
                raise  # nobody takes from the queue any more
            except Exception:
                await answers.put(None)
                raise
            await answers.put(None)

        reader = asyncio.create_task(read())
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
            await reader
        finally:
            reader.cancel()
            for task in list(started):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(reader, *started, return_exceptions=True)

    async def _stream_answer(self, read: Read, context: Any) -> Any:
        answer = self._messages["ModelStreamInferResponse"]()
        try:
            response = await self._manager.infer(self._request(read.checked(), context))
            answer.infer_response.CopyFrom(message_from_response(response))
        except ServeError as error:
            answer.error_message = error.message
        except Exception:
            log.exception("a request of a gRPC stream failed")
            answer.error_message = "the server failed; its log says more"
        if answer.error_message and not isinstance(read.message, ServeError):
            answer.infer_response.id = read.message.id
            answer.infer_response.model_name = read.message.model_name
        return answer

    async def statistics(self, message: Any, context: Any) -> Any:
        from google.protobuf import json_format

        found = self._manager.statistics(message.name or None, message.version or None)
        answer = self._messages["ModelStatisticsResponse"]()
        return json_format.ParseDict(dict(found), answer, ignore_unknown_fields=True)

    async def index(self, message: Any, context: Any) -> Any:
        answer = self._messages["RepositoryIndexResponse"]()
        for entry in self._manager.index():
            if not message.ready or entry.get("state") == "READY":
                answer.models.add(**{key: str(entry.get(key) or "") for key in ("name", "version", "state", "reason")})
        return answer

    async def load(self, message: Any, context: Any) -> Any:
        await self._manager.load(message.model_name, parameters_from(message.parameters))
        return self._messages["RepositoryModelLoadResponse"]()

    async def unload(self, message: Any, context: Any) -> Any:
        await self._manager.unload(message.model_name)
        return self._messages["RepositoryModelUnloadResponse"]()

    def _request(self, message: Any, context: Any) -> InferRequest:
        """The request, its deadline the sooner of the call's and of Triton's parameter `timeout` (microseconds; 0 is none)."""
        remaining = context.time_remaining()
        timeout_us = message.parameters["timeout"].int64_param if "timeout" in message.parameters else 0
        if timeout_us > 0:
            remaining = min(timeout_us / 1e6, float("inf") if remaining is None else remaining)
        deadline = None if remaining is None else time.monotonic() + remaining
        return request_from_message(message, deadline=deadline, cancelled=context.cancelled)

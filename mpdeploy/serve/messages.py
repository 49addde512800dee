"""What passes between a transport (REST, gRPC) and the model manager: requests, answers, metadata, and errors.

ServeError                       HTTP   gRPC
├── BadRequestError               400   INVALID_ARGUMENT
├── UnauthorizedError             401   UNAUTHENTICATED
├── UnknownModelError             404   NOT_FOUND
├── TooLargeError                 413   RESOURCE_EXHAUSTED
├── CancelledRequestError         499   CANCELLED             the client has gone: nobody reads the answer
├── ModelFailedError              500   INTERNAL              the engine could not answer this very request
├── UnavailableServeError         503   UNAVAILABLE           the model is not ready, or the server is stopping
│   └── OverloadedError           503   RESOURCE_EXHAUSTED    the queue is full; `retry_after_s` says when to come back
└── DeadlineError                 504   DEADLINE_EXCEEDED     the request's time had passed before it was computed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpdeploy.artifact import Array, TensorSpec


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that a client asked for by name.

    Attributes:
        name: the model's output.
        binary: whether it wants raw bytes behind the JSON; None: as the request's `binary_data_output` says.
        parameters: all of the output's parameters, as sent.
    """

    name: str
    binary: bool | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)  # not frozen: one is made for every request, and a frozen one takes three times as long to make
class InferRequest:
    """One request, decoded: names, dtypes and shapes are not yet checked against the model. Nobody changes it.

    Attributes:
        model_name: as in the URL.
        model_version: None for the newest that is ready.
        inputs: name -> array. BYTES tensors are object arrays of `bytes`.
        id: the client's own, given back with the answer.
        parameters: of the request, as sent.
        outputs: which to answer with, in this order; empty for all.
        deadline: `time.monotonic()` seconds after which nobody waits for the answer; None for the server's default.
        cancelled: says whether the client has gone; asked right before the request is computed.
    """

    model_name: str
    model_version: str | None
    inputs: Mapping[str, Array]
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[RequestedOutput, ...] = ()
    deadline: float | None = None
    cancelled: Callable[[], bool] | None = None


@dataclass(slots=True)  # not frozen: as InferRequest
class InferResponse:
    """The answer to one request: outputs by name, in the order that was asked for. BYTES are object arrays of `bytes`. Nobody changes it."""

    model_name: str
    model_version: str
    id: str
    outputs: Mapping[str, Array]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a client may know of a model.

    Attributes:
        name: in URLs.
        versions: that are ready, oldest first.
        platform: `onnxruntime_onnx`, `openvino_ir`, `tensorrt_plan`, ...
        inputs: with numpy dtypes and shapes; a symbolic axis is a str or None (-1 on the wire).
        outputs: as inputs.
        notes: run, engine, precision, device, verdict, warnings: plain JSON.
    """

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)


class ServeError(Exception):
    """A request that gets an error for an answer.

    Attributes:
        status: of HTTP.
        grpc: the name of gRPC's status code.
        message: for the client: which field, what was found, what was expected.
    """

    status = 500
    grpc = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class BadRequestError(ServeError):
    """The request does not say what it must, or not in the form it must."""

    status = 400
    grpc = "INVALID_ARGUMENT"


class UnauthorizedError(ServeError):
    """The bearer token is missing or wrong."""

    status = 401
    grpc = "UNAUTHENTICATED"


class UnknownModelError(ServeError):
    """There is no model, or no version, of this name."""

    status = 404
    grpc = "NOT_FOUND"


class TooLargeError(ServeError):
    """The request is larger than the server takes."""

    status = 413
    grpc = "RESOURCE_EXHAUSTED"


class CancelledRequestError(ServeError):
    """The client has gone before its request was computed."""

    status = 499
    grpc = "CANCELLED"


class ModelFailedError(ServeError):
    """The engine could not answer this request, alone in its batch."""


class UnavailableServeError(ServeError):
    """The model is known and not ready, or the server is stopping."""

    status = 503
    grpc = "UNAVAILABLE"


class OverloadedError(UnavailableServeError):
    """The queue is full. `retry_after_s`: in how many seconds there should be room."""

    grpc = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(ServeError):
    """The request's deadline passed before it was computed."""

    status = 504
    grpc = "DEADLINE_EXCEEDED"

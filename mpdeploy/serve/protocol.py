"""The REST codec of the Open Inference Protocol (V2): request bodies into requests, answers into bodies, JSON and binary tensors.

A body is JSON, and behind it, where the header `Inference-Header-Content-Length` says how long the JSON is, the raw bytes of the tensors
that name a `binary_data_size`, in order. Every fault of a body raises BadRequestError and names the field.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from mpdeploy.artifact import Array
from mpdeploy.errors import MissingExtraError
from mpdeploy.serve.dtypes import array_from_json, array_from_raw, datatype_of, json_from_array, raw_from_array
from mpdeploy.serve.memory import remember
from mpdeploy.serve.messages import BadRequestError, InferRequest, InferResponse, RequestedOutput

MAX_NAME = 256
MAX_TENSORS = 1024
SHARED_MEMORY = "shared_memory_region"


@lru_cache(maxsize=1)
def load_orjson() -> Any:
    """The JSON library.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import orjson
    except ImportError as error:
        raise MissingExtraError.for_extra("orjson", "serve") from error
    return orjson


def read_json(content: bytes | memoryview, what: str = "the body") -> dict[str, Any]:
    """A JSON object. The bare words NaN and Infinity, which Python writes, are read though they are no JSON.

    Raises:
        BadRequestError: it is no JSON, or no object.
    """
    orjson = load_orjson()
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        value = _lenient(bytes(content), what, error)
    if type(value) is not dict:
        raise BadRequestError(f"{what} must be a JSON object, found a {type(value).__name__}")
    return value


def _lenient(content: bytes, what: str, error: Exception) -> Any:
    if b"NaN" in content or b"Infinity" in content:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            pass
    raise BadRequestError(f"{what} is no JSON: {error}") from error


def decode_request(
    body: bytes,
    header_length: bytes | None,
    model_name: str,
    model_version: str | None,
    *,
    timeout_ms: bytes | None = None,
    cancelled: Any = None,
) -> tuple[InferRequest, bool]:
    """A request from its body, and whether outputs that do not choose are answered in binary.

    Args:
        body: as received.
        header_length: of the header `Inference-Header-Content-Length`; None where it was not sent: all of the body is JSON.
        model_name: from the URL.
        model_version: from the URL.
        timeout_ms: of the header `x-request-timeout-ms`.
        cancelled: says whether the client has gone.

    Raises:
        BadRequestError: see the module.
    """
    split = len(body)
    if header_length is not None:
        split = _whole(header_length, "header Inference-Header-Content-Length")
        if split > len(body):
            raise BadRequestError(
                f"header Inference-Header-Content-Length says {split}, the body has {len(body)} bytes"
            )
        if split <= MAX_KNOWN and (known := _KNOWN.get(body[:split])) is not None and known.size == len(body) - split:
            return known.request(body, split, model_name, model_version, timeout_ms, cancelled), known.binary
    content = memoryview(body)
    document = read_json(content[:split], "the body" if split == len(body) else "the JSON part of the body")
    parameters = _parameters(document, "the request")
    binary = parameters.get("binary_data_output", False)
    if type(binary) is not bool:
        raise BadRequestError("parameter 'binary_data_output' must be true or false")
    request_id = document.get("id", "")
    if type(request_id) is not str:
        raise BadRequestError("'id' must be a string")
    inputs, end = _inputs(document, content, split)
    if end != len(body):
        raise BadRequestError(f"the body has {len(body) - end} bytes more than its inputs' 'binary_data_size' say")
    request = InferRequest(
        model_name,
        model_version,
        inputs,
        request_id,
        parameters,
        _outputs(document) if "outputs" in document else (),
        deadline_of(parameters, timeout_ms),
        cancelled,
    )
    if split < len(body) and split <= MAX_KNOWN and not request_id:
        _remember(body[:split], document, request, binary)
    return request, binary


class _KnownHead:
    """What the JSON of an earlier request said, for bodies that begin with the very same bytes: clients repeat themselves."""

    __slots__ = ("binary", "outputs", "parameters", "size", "tensors", "timed")

    def __init__(self, request: InferRequest, binary: bool) -> None:
        self.binary = binary
        self.parameters = request.parameters
        self.timed = "timeout" in request.parameters
        self.outputs = request.outputs
        self.tensors = tuple((name, array.dtype, array.shape, array.nbytes) for name, array in request.inputs.items())
        self.size = sum(array.nbytes for array in request.inputs.values())

    def request(
        self, body: bytes, position: int, name: str, version: str | None, timeout_ms: bytes | None, cancelled: Any
    ) -> InferRequest:
        """The request of a body whose tensors begin at `position`."""
        arrays: dict[str, Array] = {}
        for tensor, dtype, shape, size in self.tensors:
            end = position + size
            if position % dtype.itemsize:  # as in `array_from_raw`: a copy is aligned
                arrays[tensor] = np.frombuffer(body[position:end], dtype).reshape(shape)
            else:
                arrays[tensor] = np.frombuffer(body, dtype, size // dtype.itemsize, position).reshape(shape)
            position = end
        deadline = deadline_of(self.parameters, timeout_ms) if self.timed or timeout_ms is not None else None
        return InferRequest(name, version, arrays, "", self.parameters, self.outputs, deadline, cancelled)


_KNOWN: dict[bytes, _KnownHead] = {}
MAX_KNOWN = 2048
"""Bytes of the longest JSON part that is remembered."""
MAX_KNOWN_HEADS = 256


def _remember(head: bytes, document: Mapping[str, Any], request: InferRequest, binary: bool) -> None:
    """Keep what the JSON part says, where all its tensors are raw numbers that any bytes are."""
    if any("data" in tensor for tensor in document["inputs"]):
        return
    if any(array.dtype.kind not in "iufV" for array in request.inputs.values()):
        return
    remember(_KNOWN, head, _KnownHead(request, binary), MAX_KNOWN_HEADS)


def encode_response(response: InferResponse, request: InferRequest, binary: bool) -> tuple[bytes, int | None]:
    """A response's body, and the length of its JSON where raw bytes follow it.

    Raises:
        BadRequestError: an output that JSON cannot hold was asked for in JSON.
    """
    plain = binary and not request.outputs and not response.id and not response.parameters
    if plain:
        shapes = tuple([(name, array.dtype, array.shape) for name, array in response.outputs.items()])
        known = _HEADS.get((response.model_name, response.model_version, shapes))
        if known is not None:
            return b"".join([known, *[array.tobytes() for array in response.outputs.values()]]), len(known)
    raws: list[bytes] = []
    outputs = []
    wanted = {output.name: output for output in request.outputs}
    for name, array in response.outputs.items():
        asked = wanted.get(name)
        described: dict[str, Any] = {"name": name, "datatype": datatype_of(array.dtype), "shape": list(array.shape)}
        if binary if asked is None or asked.binary is None else asked.binary:
            raw = raw_from_array(array)
            described["parameters"] = {"binary_data_size": len(raw)}
            raws.append(raw)
        else:
            described["data"] = json_from_array(array, f"output '{name}'")
        outputs.append(described)
    document: dict[str, Any] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = dict(response.parameters)
    document["outputs"] = outputs
    head: bytes = load_orjson().dumps(document)
    if plain and raws and all(array.dtype.kind in "biufV" for array in response.outputs.values()):
        remember(_HEADS, (response.model_name, response.model_version, shapes), head, MAX_KNOWN_HEADS)
    return (b"".join((head, *raws)), len(head)) if raws else (head, None)


_HEADS: dict[tuple[str, str, tuple[Any, ...]], bytes] = {}
"""The JSON part of answers, by model, version, and the outputs' names, dtypes and shapes: it says nothing else where no more was asked for."""


def encode_request(
    inputs: Mapping[str, Array], *, outputs: tuple[str, ...] = (), binary: bool = True, request_id: str = ""
) -> tuple[bytes, dict[str, str]]:
    """A request's body and headers, for clients in Python and for tests.

    Args:
        inputs: name -> array.
        outputs: to ask for; empty for all.
        binary: send and ask for raw bytes instead of JSON.
        request_id: given back with the answer.
    """
    raws = []
    described = []
    for name, array in inputs.items():
        tensor: dict[str, Any] = {"name": name, "datatype": datatype_of(array.dtype), "shape": list(array.shape)}
        if binary:
            raws.append(raw_from_array(array))
            tensor["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            tensor["data"] = json_from_array(array, f"input '{name}'")
        described.append(tensor)
    document: dict[str, Any] = {"inputs": described}
    if request_id:
        document["id"] = request_id
    if binary:
        document["parameters"] = {"binary_data_output": True}
    if outputs:
        document["outputs"] = [{"name": name} for name in outputs]
    head: bytes = load_orjson().dumps(document)
    if not binary:
        return head, {"content-type": "application/json"}
    head += b" " * (-len(head) % 8)  # raw bytes that lie aligned are read in place
    return b"".join((head, *raws)), {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(head)),
    }


# -- parts of a request ------------------------------------------------------------------------------------------------


def _inputs(document: Mapping[str, Any], content: memoryview, position: int) -> tuple[dict[str, Array], int]:
    """The input tensors, and where the raw bytes of the last one end."""
    described = document.get("inputs")
    if type(described) is not list or not described:
        raise BadRequestError("'inputs' must be a list of at least one tensor")
    if len(described) > MAX_TENSORS:
        raise BadRequestError(f"'inputs' has {len(described)} tensors; {MAX_TENSORS} is the most")
    arrays: dict[str, Array] = {}
    for index, tensor in enumerate(described):
        name = _name(tensor, f"inputs[{index}]")
        where = f"input '{name}'"
        if name in arrays:
            raise BadRequestError(f"{where} is there twice")
        for field in ("datatype", "shape"):
            if field not in tensor:
                raise BadRequestError(f"{where}: '{field}' is missing")
        parameters = _parameters(tensor, where)
        if SHARED_MEMORY in parameters:
            raise BadRequestError(f"{where}: shared memory is not supported; send the data")
        size = parameters.get("binary_data_size")
        if size is None:
            if "data" not in tensor:
                raise BadRequestError(f"{where}: it has neither 'data' nor the parameter 'binary_data_size'")
            arrays[name] = array_from_json(tensor["datatype"], tensor["shape"], tensor["data"], where)
            continue
        if "data" in tensor:
            raise BadRequestError(f"{where}: it has both 'data' and the parameter 'binary_data_size'")
        if type(size) is not int or size < 0:
            raise BadRequestError(f"{where}: parameter 'binary_data_size' must be a whole number from 0 up")
        end = position + size
        if end > len(content):
            raise BadRequestError(
                f"{where}: parameter 'binary_data_size' is {size}, {len(content) - position} bytes of the body are left"
            )
        arrays[name] = array_from_raw(tensor["datatype"], tensor["shape"], content[position:end], where)
        position = end
    return arrays, position


def _outputs(document: Mapping[str, Any]) -> tuple[RequestedOutput, ...]:
    described = document["outputs"]
    if type(described) is not list:
        raise BadRequestError("'outputs' must be a list")
    if len(described) > MAX_TENSORS:
        raise BadRequestError(f"'outputs' has {len(described)} entries; {MAX_TENSORS} is the most")
    wanted: dict[str, RequestedOutput] = {}
    for index, output in enumerate(described):
        name = _name(output, f"outputs[{index}]")
        where = f"output '{name}'"
        if name in wanted:
            raise BadRequestError(f"{where} is asked for twice")
        parameters = _parameters(output, where)
        binary = parameters.get("binary_data")
        if binary is not None and type(binary) is not bool:
            raise BadRequestError(f"{where}: parameter 'binary_data' must be true or false")
        if parameters.get("classification"):
            raise BadRequestError(f"{where}: the classification extension is not supported; ask for the tensor")
        if SHARED_MEMORY in parameters:
            raise BadRequestError(f"{where}: shared memory is not supported")
        wanted[name] = RequestedOutput(name, binary, parameters)
    return tuple(wanted.values())


def _name(tensor: Any, where: str) -> str:
    if type(tensor) is not dict:
        raise BadRequestError(f"{where} must be an object")
    name = tensor.get("name")
    if type(name) is not str or not name:
        raise BadRequestError(f"{where}: 'name' must be a string that is not empty")
    if len(name) > MAX_NAME:
        raise BadRequestError(f"{where}: 'name' has {len(name)} characters; {MAX_NAME} is the most")
    return name


def _parameters(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = value.get("parameters")
    if parameters is None:
        return {}
    if type(parameters) is not dict:
        raise BadRequestError(f"{where}: 'parameters' must be an object")
    return parameters


def deadline_of(parameters: Mapping[str, Any], timeout_ms: bytes | None) -> float | None:
    """From the parameter `timeout` (microseconds, as Triton has it) or the header; the sooner of the two."""
    deadline = None
    timeout_us = parameters.get("timeout")
    if timeout_us is not None:
        if type(timeout_us) is not int or timeout_us < 0:
            raise BadRequestError("parameter 'timeout' must be a whole number of microseconds")
        if timeout_us:  # 0: none, as in Triton
            deadline = time.monotonic() + min(timeout_us, 10**15) / 1e6
    if timeout_ms is not None:
        other = time.monotonic() + min(_whole(timeout_ms, "header x-request-timeout-ms"), 10**12) / 1e3
        deadline = other if deadline is None else min(deadline, other)
    return deadline


@lru_cache(maxsize=1024)
def _whole(text: bytes, where: str) -> int:
    stripped = text.strip()
    if not stripped.isdigit() or len(stripped) > 18:
        raise BadRequestError(f"{where} must be a whole number")
    return int(stripped)

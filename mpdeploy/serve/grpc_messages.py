"""The messages of open_inference.proto: compiled when they are first asked for, and translated to and from the server's own.

They live in a descriptor pool of their own, so a process may hold tritonclient's messages of the same names beside them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, TensorSpec
from mpdeploy.errors import MissingExtraError
from mpdeploy.serve.dtypes import (
    NUMPY_OF,
    array_from_raw,
    checked_shape,
    datatype_of,
    num_elements,
    numpy_dtype,
    raw_from_array,
)
from mpdeploy.serve.messages import BadRequestError, InferRequest, InferResponse, ModelMetadata, RequestedOutput

PROTO = Path(__file__).with_name("open_inference.proto")
SERVICE = "inference.GRPCInferenceService"
CONTENTS_OF: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Datatype -> the field of InferTensorContents that holds it. FP16 and BF16 have none."""


@dataclass(frozen=True)
class Method:
    """A method of the service: the classes of its messages, and whether both sides stream."""

    name: str
    request: Any
    response: Any
    streams: bool


@dataclass(frozen=True)
class Protocol:
    """The compiled protocol: message classes by their names, and the service's methods."""

    messages: Mapping[str, Any]
    methods: tuple[Method, ...]


@lru_cache(maxsize=1)
def load_protocol() -> Protocol:
    """Compile the .proto file.

    Raises:
        MissingExtraError: the extra `grpc` is not installed.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
        from grpc_tools import protoc
    except ImportError as error:
        raise MissingExtraError.for_extra("grpcio-tools", "grpc") from error
    with tempfile.TemporaryDirectory(prefix="mpdeploy-") as folder:
        compiled = Path(folder) / "compiled"
        arguments = ["protoc", f"--proto_path={PROTO.parent}", f"--descriptor_set_out={compiled}", PROTO.name]
        code = protoc.main(arguments)
        assert code == 0, f"{PROTO.name} does not compile"
        files = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    described = pool.FindFileByName(PROTO.name)
    classes = {
        name: message_factory.GetMessageClass(message) for name, message in described.message_types_by_name.items()
    }
    service = described.services_by_name[SERVICE.rpartition(".")[2]]
    methods = tuple(
        Method(
            method.name,
            classes[method.input_type.name],
            classes[method.output_type.name],
            bool(method.client_streaming and method.server_streaming),
        )
        for method in service.methods
    )
    return Protocol(classes, methods)


# -- requests ----------------------------------------------------------------------------------------------------------


def request_from_message(message: Any, **more: Any) -> InferRequest:
    """A ModelInferRequest as the server's own request.

    Args:
        message: as it came.
        more: further fields of `InferRequest`: `deadline`, `cancelled`.

    Raises:
        BadRequestError: tensors that say one thing and hold another.
    """
    return InferRequest(
        model_name=message.model_name,
        model_version=message.model_version or None,
        inputs=_inputs(message),
        id=message.id,
        parameters=parameters_from(message.parameters),
        outputs=tuple(_requested(output) for output in message.outputs),
        **more,
    )


def parameters_from(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as plain values; one that holds nothing is left out."""
    found = {}
    for name, parameter in fields.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None:
            found[name] = getattr(parameter, kind)
    return found


def _inputs(message: Any) -> dict[str, Array]:
    raws = message.raw_input_contents
    for tensor in message.inputs:
        if shared := [name for name in tensor.parameters if name.startswith("shared_memory_")]:
            raise BadRequestError(f"input '{tensor.name}': '{shared[0]}': this server takes no shared memory")
    if raws and len(raws) != len(message.inputs):
        raise BadRequestError(f"'raw_input_contents' has {len(raws)} entries for {len(message.inputs)} inputs")
    inputs: dict[str, Array] = {}
    for index, tensor in enumerate(message.inputs):
        where = f"input '{tensor.name}'"
        if tensor.name in inputs:
            raise BadRequestError(f"{where} is given twice")
        if not raws:
            inputs[tensor.name] = _array_from_contents(tensor, where)
        elif tensor.HasField("contents"):
            raise BadRequestError(f"{where} has 'contents' beside the request's 'raw_input_contents': one of them only")
        else:
            inputs[tensor.name] = array_from_raw(tensor.datatype, tuple(tensor.shape), raws[index], where)
    return inputs


def _array_from_contents(tensor: Any, where: str) -> Array:
    dtype = numpy_dtype(tensor.datatype, where)
    shape = checked_shape(tuple(tensor.shape), where)
    field = CONTENTS_OF.get(tensor.datatype)
    if field is None:
        raise BadRequestError(f"{where}: {tensor.datatype} has no typed contents; send it in 'raw_input_contents'")
    filled = [other.name for other, _ in tensor.contents.ListFields()]
    if filled not in ([], [field]):
        raise BadRequestError(f"{where}: {tensor.datatype} goes into '{field}', found {', '.join(filled)}")
    values = getattr(tensor.contents, field)
    if len(values) != num_elements(shape):
        raise BadRequestError(
            f"{where}: {tensor.datatype}{list(shape)} takes {num_elements(shape)} elements, '{field}' has {len(values)}"
        )
    if tensor.datatype == "BYTES":
        array: Array = np.empty(len(values), np.object_)
        array[:] = list(values)
        return array.reshape(shape)
    wide = np.array(values, np.int64 if field in ("int_contents", "uint_contents") else dtype)
    if wide.dtype != dtype:
        limits = np.iinfo(dtype)
        outside = (wide < limits.min) | (wide > limits.max)
        if outside.any():
            raise BadRequestError(f"{where}: {wide[outside][0]} in '{field}' is no {tensor.datatype}")
    return wide.astype(dtype, copy=False).reshape(shape)


def _requested(output: Any) -> RequestedOutput:
    parameters = parameters_from(output.parameters)
    if "shared_memory_region" in parameters:
        raise BadRequestError(f"output '{output.name}': 'shared_memory_region': this server has no shared memory")
    return RequestedOutput(output.name, binary=True, parameters=parameters)


# -- answers -----------------------------------------------------------------------------------------------------------


def message_from_response(response: InferResponse) -> Any:
    """The server's own answer as a ModelInferResponse; tensors go raw."""
    message = load_protocol().messages["ModelInferResponse"](
        model_name=response.model_name, model_version=response.model_version, id=response.id
    )
    for name, value in response.parameters.items():
        set_parameter(message.parameters[name], value)
    for name, array in response.outputs.items():
        message.outputs.add(name=name, datatype=datatype_of(array.dtype), shape=array.shape)
        message.raw_output_contents.append(raw_from_array(array))
    return message


def set_parameter(parameter: Any, value: Any) -> None:
    """Put a plain value into an InferParameter; what is no number, truth value or text goes as its text."""
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int) and -(2**63) <= value < 2**63:
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = str(value)


def message_from_metadata(metadata: ModelMetadata) -> Any:
    """A model's metadata as a ModelMetadataResponse."""
    message = load_protocol().messages["ModelMetadataResponse"](
        name=metadata.name, versions=metadata.versions, platform=metadata.platform
    )
    for spec in metadata.inputs:
        message.inputs.add(name=spec.name, datatype=datatype_of(spec.dtype), shape=_axes(spec))
    for spec in metadata.outputs:
        message.outputs.add(name=spec.name, datatype=datatype_of(spec.dtype), shape=_axes(spec))
    return message


def _axes(spec: TensorSpec) -> list[int]:
    return [axis if isinstance(axis, int) else -1 for axis in spec.shape or ()]


assert set(CONTENTS_OF) | {"FP16", "BF16"} == set(NUMPY_OF)

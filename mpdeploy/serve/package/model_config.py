"""Triton's `config.pbtxt`: the part of its ModelConfig message that packages use, written and read strictly by protobuf itself.

The message is described here as a table and made when it is needed, in a descriptor pool of its own: neither generated code nor
tritonclient is needed, and neither is disturbed. A name or a value that the table does not have is an error, so a typo cannot be
written. Field numbers do not show in text; they are Triton's own all the same, and a test holds the table against its client's.

Source: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mpdeploy.errors import ConfigError, MissingExtraError

PACKAGE = "inference"
MESSAGE = f"{PACKAGE}.ModelConfig"

# message -> (field number, name, type); `[T]` is repeated, `{T}` a map from string to T. Text is written in the table's order.
FIELDS: Mapping[str, tuple[tuple[int, str, str], ...]] = {
    "ModelConfig": (
        (1, "name", "string"),
        (17, "backend", "string"),
        (8, "default_model_filename", "string"),
        (4, "max_batch_size", "int32"),
        (5, "input", "[ModelInput]"),
        (6, "output", "[ModelOutput]"),
        (3, "version_policy", "ModelVersionPolicy"),
        (7, "instance_group", "[ModelInstanceGroup]"),
        (11, "dynamic_batching", "ModelDynamicBatching"),
        (12, "optimization", "ModelOptimizationPolicy"),
        (16, "model_warmup", "[ModelWarmup]"),
        (14, "parameters", "{ModelParameter}"),
    ),
    "ModelVersionPolicy": ((1, "latest", "ModelVersionPolicy.Latest"), (3, "specific", "ModelVersionPolicy.Specific")),
    "ModelVersionPolicy.Latest": ((1, "num_versions", "uint32"),),
    "ModelVersionPolicy.Specific": ((1, "versions", "[int64]"),),
    "ModelInput": (
        (1, "name", "string"),
        (2, "data_type", "DataType"),
        (4, "dims", "[int64]"),
        (5, "reshape", "ModelTensorReshape"),
    ),
    "ModelOutput": (
        (1, "name", "string"),
        (2, "data_type", "DataType"),
        (3, "dims", "[int64]"),
        (5, "reshape", "ModelTensorReshape"),
        (4, "label_filename", "string"),
    ),
    "ModelTensorReshape": ((1, "shape", "[int64]"),),
    "ModelInstanceGroup": (
        (4, "kind", "ModelInstanceGroup.Kind"),
        (2, "count", "int32"),
        (3, "gpus", "[int32]"),
        (5, "profile", "[string]"),
    ),
    "ModelDynamicBatching": (
        (1, "preferred_batch_size", "[int32]"),
        (2, "max_queue_delay_microseconds", "uint64"),
        (6, "default_queue_policy", "ModelQueuePolicy"),
    ),
    "ModelQueuePolicy": (
        (1, "timeout_action", "ModelQueuePolicy.TimeoutAction"),
        (2, "default_timeout_microseconds", "uint64"),
        (3, "allow_timeout_override", "bool"),
        (4, "max_queue_size", "uint32"),
    ),
    "ModelOptimizationPolicy": ((3, "cuda", "ModelOptimizationPolicy.Cuda"),),
    "ModelOptimizationPolicy.Cuda": (
        (1, "graphs", "bool"),
        (3, "graph_spec", "[ModelOptimizationPolicy.Cuda.GraphSpec]"),
    ),
    "ModelOptimizationPolicy.Cuda.GraphSpec": (
        (1, "batch_size", "int32"),
        (2, "input", "{ModelOptimizationPolicy.Cuda.GraphSpec.Shape}"),
    ),
    "ModelOptimizationPolicy.Cuda.GraphSpec.Shape": ((1, "dim", "[int64]"),),
    "ModelParameter": ((1, "string_value", "string"),),
    "ModelWarmup": (
        (1, "name", "string"),
        (2, "batch_size", "uint32"),
        (3, "inputs", "{ModelWarmup.Input}"),
        (4, "count", "uint32"),
    ),
    "ModelWarmup.Input": (
        (1, "data_type", "DataType"),
        (2, "dims", "[int64]"),
        (3, "zero_data", "bool"),
        (4, "random_data", "bool"),
    ),
}  # fmt: skip
ENUMS: Mapping[str, tuple[str, ...]] = {
    "DataType": (
        "TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8", "TYPE_INT16",
        "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING", "TYPE_BF16",
    ),
    "ModelInstanceGroup.Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
    "ModelQueuePolicy.TimeoutAction": ("REJECT", "DELAY"),
}  # fmt: skip
"""Enum -> its members, numbered from 0."""


def config_text(values: Mapping[str, Any]) -> str:
    """A ModelConfig as text.

    Args:
        values: field -> value; messages as mappings, enums by the names of their members.

    Raises:
        ConfigError: a field that ModelConfig does not have, or a value of another type.
    """
    from google.protobuf import json_format, text_format

    try:
        message = json_format.ParseDict(dict(values), message_class()())
    except json_format.ParseError as error:
        raise ConfigError(f"Triton's ModelConfig cannot hold this: {error}.") from error
    return str(
        text_format.MessageToString(message, use_short_repeated_primitives=True, use_index_order=True, as_utf8=True)
    )


def config_values(text: str, *, where: str) -> dict[str, Any]:
    """What `config_text` wrote, as it would be given to it.

    Raises:
        ConfigError: it is no such text, or names a field that the table does not have.
    """
    from google.protobuf import json_format, text_format

    try:
        message = text_format.Parse(text, message_class()())
    except text_format.ParseError as error:
        raise ConfigError(f"{where} is no ModelConfig of Triton: {error}.") from error
    found: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return found


def check_with_client(text: str, *, where: str) -> bool:
    """Read the text with the ModelConfig of tritonclient, where that is installed; says whether it was.

    Raises:
        ConfigError: its ModelConfig does not take the text.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        return False
    from google.protobuf import text_format

    try:
        text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ConfigError(f"{where} is not what tritonclient's ModelConfig takes: {error}.") from error
    return True


@lru_cache(maxsize=1)
def message_class() -> Any:
    """The class of ModelConfig messages."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as error:  # onnx brings it
        raise MissingExtraError("protobuf is not installed.", hint="pip install protobuf") from error
    file = descriptor_pb2.FileDescriptorProto(name="mpdeploy/model_config.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name in FIELDS:
        made[name] = _place(file, made, name).add(name=name.rpartition(".")[2])
    for name, members in ENUMS.items():
        outer, _, last = name.rpartition(".")
        enum = (made[outer].enum_type if outer else file.enum_type).add(name=last)
        for number, member in enumerate(members):
            enum.value.add(name=member, number=number)
    for name, fields in FIELDS.items():
        for number, field, kind in fields:
            _add_field(made[name], number, field, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(MESSAGE))


def _place(file: Any, made: Mapping[str, Any], name: str) -> Any:
    outer = name.rpartition(".")[0]
    return made[outer].nested_type if outer else file.message_type


def _add_field(message: Any, number: int, name: str, kind: str) -> None:
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field

    field = message.field.add(name=name, number=number, label=Field.LABEL_OPTIONAL)
    if kind[0] in "[{":
        field.label = Field.LABEL_REPEATED
    if kind[0] == "{":  # a map is a repeated message of a key and a value
        entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        _add_field(entry, 1, "key", "string")
        _add_field(entry, 2, "value", kind[1:-1])
        field.type, field.type_name = Field.TYPE_MESSAGE, f".{PACKAGE}.{_full(message, entry)}"
        return
    plain = kind.strip("[]")
    if plain in FIELDS:
        field.type, field.type_name = Field.TYPE_MESSAGE, f".{PACKAGE}.{plain}"
    elif plain in ENUMS:
        field.type, field.type_name = Field.TYPE_ENUM, f".{PACKAGE}.{plain}"
    else:
        field.type = getattr(Field, f"TYPE_{plain.upper()}")


def _full(message: Any, entry: Any) -> str:
    """The name of a map's entry inside the message of the table that holds it (the last parts of those names are unique)."""
    holder = next(name for name in FIELDS if name.rpartition(".")[2] == message.name)
    return f"{holder}.{entry.name}"

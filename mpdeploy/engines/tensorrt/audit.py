"""Precision per layer: of the network as it was parsed, or of the engine as the inspector describes it.

Two rules keep the answer honest:

1. A node that became several layers is named by those of its lowest float precision only: its shape arithmetic in
   INT64 says nothing about it, and one half layer is what an audit must find.
2. The inspector tells the types at a kernel's border, not inside it. A kernel that fused a Cast, or that has several
   float types at its border, is `mixed` unless all its nodes were typed alike and that type is at the border too. A
   fused region whose types are not told at all is `unknown`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mpdeploy.engines.base import LOWEST_FIRST, Layer
from mpdeploy.errors import BuildError

MIXED, UNKNOWN = "mixed", "unknown"

# TensorRT's DataType member -> the words of an audit.
PRECISION_FROM_DATATYPE = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "FP8": "fp8",
    "FP4": "fp4",
    "E8M0": "e8m0",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "INT4": "int4",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_FLOATS = LOWEST_FIRST

# What the inspector's texts hold ("Half", "Row major linear FP16 format", "BFloat16"), the more special ones first.
_PRECISION_FROM_TEXT = (
    ("bf16", r"bf16|bfp16|bfloat16"),
    ("fp16", r"fp16|float16|half"),
    ("fp8", r"fp8|e4m3|e5m2"),
    ("fp4", r"fp4|e2m1"),
    ("e8m0", r"e8m0"),
    ("int64", r"int64"),
    ("int32", r"int32"),
    ("uint8", r"uint8"),
    ("int8", r"int8"),
    ("int4", r"int4"),
    ("bool", r"bool"),
    ("fp32", r"fp32|float32|\bfloat\b"),
)
_NODE = re.compile(r"\[ONNX Layer: (.+?)\](?=\[|[\x1e\x1f]|$)", re.DOTALL)
_CASTS = ("CAST", "Reformat")
_TF32_LAYERS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM")


def nodes_from_metadata(metadata: str) -> tuple[str, ...]:
    """`[ONNX Layer: a][ONNX Layer: b]` (with or without control characters between) -> ("a", "b"), each once."""
    return tuple(dict.fromkeys(_NODE.findall(metadata)))


def layers_from_network(network: Any, *, tf32: bool) -> tuple[Layer, ...]:
    """The layers of a parsed `INetworkDefinition`, constants left out.

    A layer's precision is the type of its first float input, else of its first float output, else of its first
    output; a Cast's is what it casts to. With `tf32`, FP32 products and convolutions are named `tf32`: they may run so.
    """
    layers: list[Layer] = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        op = layer.type.name
        if op == "CONSTANT":
            continue
        inputs = [layer.get_input(position) for position in range(layer.num_inputs)]
        outputs = [layer.get_output(position) for position in range(layer.num_outputs)]
        taken = [PRECISION_FROM_DATATYPE.get(tensor.dtype.name, UNKNOWN) for tensor in inputs if tensor is not None]
        made = [PRECISION_FROM_DATATYPE.get(tensor.dtype.name, UNKNOWN) for tensor in outputs if tensor is not None]
        precision = _first_float(made if op in _CASTS else [*taken, *made]) or next(iter(made), UNKNOWN)
        if tf32 and precision == "fp32" and op in _TF32_LAYERS:
            precision = "tf32"
        layers.append(Layer(layer.name, op, precision, nodes_from_metadata(layer.metadata or "")))
    return on_deciding_layers(layers)


def layers_from_inspector(text: str, network: Sequence[Layer] = ()) -> tuple[Layer, ...]:
    """The layers in the engine inspector's JSON, of TensorRT 10 (`Format/Datatype`) and 11 (`Datatype`, `Format`).

    Args:
        text: what `EngineInspector.get_engine_information` returned for the whole engine.
        network: the layers as they were parsed, which say what each node inside a fused kernel was typed as.

    Raises:
        BuildError: the text is no such JSON.
    """
    try:
        items = json.loads(text)["Layers"]
        typed = {node: layer for layer in network for node in layer.nodes}
        layers = [_layer_from_item(item, typed) for item in items]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(
            f"The engine inspector's answer cannot be read: {type(error).__name__}: {error}. "
            f"It begins with {text[:80]!r}.",
            hint="this version of the library is not known to mpdeploy; the other checks do not need the inspector",
        ) from error
    return on_deciding_layers(layers)


def _layer_from_item(item: Any, typed: Mapping[str, Layer]) -> Layer:
    if isinstance(item, str):  # built without detailed profiling: a name is all there is
        return Layer(item, "", UNKNOWN)
    name, op = str(item["Name"]), str(item.get("LayerType", ""))
    nodes = nodes_from_metadata(item.get("Metadata") or "")
    if op == "Myelin" or name.startswith("{ForeignNode["):
        return Layer(name, op, UNKNOWN, nodes)
    if op == "Reformat":  # it feeds its nodes; only a Cast is one
        nodes = tuple(node for node in nodes if node in typed and typed[node].op == "CAST")
    taken = [_precision_of_tensor(tensor) for tensor in item.get("Inputs") or ()]
    made = [_precision_of_tensor(tensor) for tensor in item.get("Outputs") or ()]
    precision = _precision_of_kernel(name, op, taken, made, [typed[node] for node in nodes if node in typed])
    if precision == "fp32" and "tf32" in str(item.get("TacticName", "")).lower():
        precision = "tf32"
    return Layer(name, op, precision, nodes)


def _precision_of_kernel(name: str, op: str, taken: list[str], made: list[str], inside: list[Layer]) -> str:
    if op in _CASTS:
        return next(iter(made), UNKNOWN)
    border = {precision for precision in (*taken, *made) if precision in _FLOATS}
    if UNKNOWN in border:
        return UNKNOWN
    has_cast = "Cast" in name or any(layer.op == "CAST" for layer in inside)
    if has_cast or len(border) > 1:
        # `tf32` of a network is FP32 to a kernel's border.
        kinds = {layer.precision.replace("tf32", "fp32") for layer in inside if layer.op != "CAST"} & set(_FLOATS)
        if inside and all(layer.op == "CAST" for layer in inside):
            return _first_float(made) or next(iter(made), UNKNOWN)
        return kinds.pop() if len(kinds) == 1 and kinds <= border else MIXED
    return next(iter(border), None) or next(iter(made), UNKNOWN)


def _precision_of_tensor(tensor: Mapping[str, Any]) -> str:
    told = (
        tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype") or tensor.get("Format") or ""
    )
    return next(
        (name for name, pattern in _PRECISION_FROM_TEXT if re.search(pattern, str(told), re.IGNORECASE)), UNKNOWN
    )


def _first_float(precisions: Iterable[str]) -> str | None:
    return next((precision for precision in precisions if precision in _FLOATS), None)


def on_deciding_layers(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The same layers, each node named only on its layers of the lowest float precision (rule 1 of the module)."""

    def rank(precision: str) -> int:
        return _FLOATS.index(precision) if precision in _FLOATS else len(_FLOATS)

    lowest: dict[str, int] = {}
    for layer in layers:
        for node in layer.nodes:
            lowest[node] = min(lowest.get(node, len(_FLOATS)), rank(layer.precision))
    return tuple(
        replace(layer, nodes=tuple(node for node in layer.nodes if lowest[node] == rank(layer.precision)))
        for layer in layers
    )


def tells_nothing(layers: Sequence[Layer]) -> bool:
    """Whether an inspector's layers hold no type at all, as where the engine is one fused region."""
    return all(layer.precision == UNKNOWN or layer.op in _CASTS for layer in layers)

"""What the ONNX schemas admit: for a node at its opset, which of its ports take which type, and which must agree.

A port's type is either fixed (`tensor(float)`) or a variable (`T`). Ports that share a variable must have one type: that is
strict typing. Everything here is read from `onnx.defs`, never from a list of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import onnx
import onnx_ir as ir

_NAMES = {
    ir.DataType.FLOAT: "tensor(float)",
    ir.DataType.FLOAT16: "tensor(float16)",
    ir.DataType.BFLOAT16: "tensor(bfloat16)",
}


@dataclass(frozen=True)
class Signature:
    """An op's ports at one opset.

    Attributes:
        since_version: the opset in which this form of the op began.
        inputs, outputs: the type string of each port; a variadic last port stands for all that follow.
        variadic_input, variadic_output: whether the last port is variadic.
        heterogeneous: whether a variadic port's members may differ in type (Loop, Scan, If).
        admitted: type variable -> the type strings it admits.
    """

    since_version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    variadic_input: bool
    variadic_output: bool
    heterogeneous: bool
    admitted: Mapping[str, frozenset[str]]

    def input_type(self, position: int) -> str | None:
        """The type string of an input port; None past the last one."""
        return _at(self.inputs, position, variadic=self.variadic_input)

    def output_type(self, position: int) -> str | None:
        """The type string of an output port; None past the last one."""
        return _at(self.outputs, position, variadic=self.variadic_output)

    def admits(self, type_string: str, dtype: ir.DataType) -> bool:
        """Whether a port with this type string may hold tensors of `dtype`."""
        wanted = _NAMES[dtype]
        return type_string == wanted or wanted in self.admitted.get(type_string, ())


def _at(ports: tuple[str, ...], position: int, *, variadic: bool) -> str | None:
    if position < len(ports):
        return ports[position]
    return ports[-1] if variadic and ports else None


@lru_cache(maxsize=4096)
def signature(domain: str, op_type: str, version: int) -> Signature | None:
    """The signature of an op at an opset; None for an op that ONNX does not define."""
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    last_input = schema.inputs[-1] if schema.inputs else None
    last_output = schema.outputs[-1] if schema.outputs else None
    return Signature(
        since_version=schema.since_version,
        inputs=tuple(port.type_str for port in schema.inputs),
        outputs=tuple(port.type_str for port in schema.outputs),
        variadic_input=last_input is not None and last_input.option == variadic,
        variadic_output=last_output is not None and last_output.option == variadic,
        heterogeneous=any(port is not None and not port.is_homogeneous for port in (last_input, last_output)),
        admitted={c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints},
    )

"""The conformance table: small FP32 models, each hard for a precision rewriter in one way, with what to feed them.

`CASES[name]` gives a `Case`; `name` is `family/variant`. Every model passes the full checker and runs in ONNX Runtime
on a CPU unless its flags say otherwise. Values are moderate: all-half arithmetic stays within 1e-2 (relative L2) of
float32, except where `hostile` is set: there it does not.
"""

from __future__ import annotations

from . import (
    conformance_control,
    conformance_functions,
    conformance_graphs,
    conformance_hostile,
    conformance_networks,
    conformance_operators,
    conformance_quantised,
    conformance_types,
)
from .conformance_base import Case

_PARTS = (
    conformance_control,
    conformance_functions,
    conformance_types,
    conformance_quantised,
    conformance_operators,
    conformance_graphs,
    conformance_networks,
    conformance_hostile,
)

CASES: dict[str, Case] = {}
for _part in _PARTS:
    for _case in _part.CASES:
        if _case.name in CASES:
            raise ValueError(f"Two conformance cases are called {_case.name}.")
        CASES[_case.name] = _case

FAMILIES: dict[str, list[Case]] = {}
for _case in CASES.values():
    FAMILIES.setdefault(_case.family, []).append(_case)

__all__ = ["CASES", "FAMILIES", "Case"]

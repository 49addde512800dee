"""What a conformance case is, and short ways to write one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

FLOAT = onnx.TensorProto.FLOAT
FLOAT16 = onnx.TensorProto.FLOAT16

Feeds = Mapping[str, Any]  # arrays; a list of arrays feeds a sequence, None an absent optional


@dataclass(frozen=True)
class Case:
    """One small FP32 model and what to feed it."""

    name: str
    """`family/variant`, unique."""
    family: str
    build: Callable[[], onnx.ModelProto] = field(repr=False)
    feeds: Feeds = field(repr=False)
    notes: str = ""
    """What goes wrong here in a careless rewriter."""
    hostile: bool = False
    """All-half arithmetic overflows, underflows or turns to NaN here: something has to stay FP32 or be clamped."""
    stale_value_info: bool = False
    """The annotations contradict the graph on purpose, so the full checker refuses the *input*."""
    refused_by_ort: bool = False
    """ORT does not load the *input*; `onnx.reference` gives its answer."""
    external_data: bool = False
    """`save` writes the weights beside the model."""
    convertible: bool = True
    """There is float32 arithmetic that has a half form (whether it pays is another question)."""

    @property
    def model(self) -> onnx.ModelProto:
        """A model of the caller's own, built anew each time."""
        return self.build()

    def save(self, folder: Path) -> Path:
        """Write the model as a user would have it on disk."""
        path = folder / (self.name.replace("/", "-") + ".onnx")
        onnx.save(
            self.build(),
            path,
            save_as_external_data=self.external_data,
            location=path.name + ".data" if self.external_data else None,
            size_threshold=0,
        )
        return path


def parsed(
    text: str,
    opset: int,
    weights: Mapping[str, np.ndarray] | None = None,
    domains: Mapping[str, int] | None = None,
    ir_version: int | None = None,
) -> onnx.ModelProto:
    """A model from ONNX text without its header; `weights` become initialisers of the main graph."""
    opset_ids = [helper.make_opsetid(domain, version) for domain, version in {"": opset, **(domains or {})}.items()]
    ir_version = ir_version or helper.find_min_ir_version_for(opset_ids, ignore_unknown=True)
    imports = ", ".join(f'"{o.domain}" : {o.version}' for o in opset_ids)
    model = onnx.parser.parse_model(f"<ir_version: {ir_version}, opset_import: [{imports}]>\n{text}")
    for name, array in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def case(
    name: str,
    source: str | Callable[[], onnx.ModelProto],
    feeds: Feeds,
    *,
    opset: int = 17,
    weights: Mapping[str, np.ndarray] | None = None,
    domains: Mapping[str, int] | None = None,
    ir_version: int | None = None,
    **flags: Any,
) -> Case:
    """A case from ONNX text (`g (inputs) => (outputs) {nodes}`, functions after it) or from a builder."""
    if isinstance(source, str):
        text = source

        def build() -> onnx.ModelProto:
            return parsed(text, opset, weights, domains, ir_version)
    else:
        build = source
    return Case(name=name, family=name.split("/")[0], build=build, feeds=feeds, **flags)


def normal(*shape: int, seed: object = 0, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Seeded normal float32 values; equal arguments give equal arrays."""
    rng = np.random.default_rng(zlib.crc32(repr((shape, seed)).encode()))
    return (rng.standard_normal(shape) * scale + shift).astype(np.float32)


def weight(rows: int, columns: int, seed: object = 1) -> np.ndarray:
    """A matrix that keeps the variance of what it multiplies."""
    return normal(rows, columns, seed=seed, scale=rows**-0.5)


def graph_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Mapping[str, np.ndarray] | None = None,
    opset: int = 17,
    **model_fields: Any,
) -> onnx.ModelProto:
    """A model from protobuf nodes, for what ONNX text cannot say."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        list(inputs),
        list(outputs),
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )
    opset_ids = [helper.make_opsetid("", opset)]
    model_fields.setdefault("ir_version", helper.find_min_ir_version_for(opset_ids))
    return helper.make_model(graph, opset_imports=opset_ids, **model_fields)


def floats(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    """A float32 tensor's declaration."""
    return helper.make_tensor_value_info(name, FLOAT, list(shape))

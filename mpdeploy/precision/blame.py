"""Which nodes made the drift: the error of what comes out of each node beside the error of what went in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from mpdeploy.artifact import Array
from mpdeploy.precision.emulate import emulate
from mpdeploy.precision.engine_forms import USUAL
from mpdeploy.precision.formats import FLOAT
from mpdeploy.precision.graph_index import GraphIndex

CHUNK = 64


@dataclass(frozen=True, slots=True)
class Blame:
    """One node's part.

    Attributes:
        node, op: which.
        before: largest relative L2 drift among its inputs.
        after: relative L2 drift of its output; infinite where values are not finite.
    """

    node: str
    op: str
    before: float
    after: float

    def __str__(self) -> str:
        return f"{self.op} '{self.node}': {self.before:.2g} -> {self.after:.2g}"


def blame_nodes(
    fp32: ir.Model,
    mixed: ir.Model,
    feed: Mapping[str, Array],
    open_in: Callable[[ir.Model, str], Any],
    engine: str = USUAL,
) -> list[Blame]:
    """Nodes of the main graph by how much drift they add on one feed, worst first.

    Args:
        fp32: the prepared FP32 model.
        mixed: what was made of it; tensors keep their names.
        feed: the samples to look at.
        open_in: (model, name) -> a function that opens the model with chosen tensors as outputs.
        engine: whose forms are emulated (see `engine_forms`).
    """
    emulated = emulate(mixed, engine=engine)
    names_emulated = {value.name for node in emulated.graph for value in node.outputs}
    index = GraphIndex.of(fp32)
    rounded: dict[str, str] = {}
    for node in fp32.graph:
        for value in node.outputs:
            if index.dtypes.get(value) == FLOAT and value.name:
                for candidate in (f"{value.name}.rounded", value.name):
                    if candidate in names_emulated:
                        rounded[value.name] = candidate
                        break
    drift: dict[str, float] = {}
    names = list(rounded)
    open_fp32, open_emulated = open_in(fp32, "blame_fp32"), open_in(emulated, "blame_emulated")
    for start in range(0, len(names), CHUNK):
        chunk = names[start : start + CHUNK]
        with open_fp32(chunk) as infer_fp32, open_emulated([rounded[name] for name in chunk]) as infer_emulated:
            golden, found = infer_fp32(feed), infer_emulated(feed)
        for name in chunk:
            if golden[name].shape == found[rounded[name]].shape:
                drift[name] = _rel_l2(golden[name], found[rounded[name]])
    blames = []
    for node in fp32.graph:
        after = max((drift.get(value.name or "", 0.0) for value in node.outputs), default=0.0)
        before = max((drift.get(value.name or "", 0.0) for value in node.inputs if value is not None), default=0.0)
        if after > before and not math.isinf(before):
            blames.append(Blame(index.id_of[node], node.op_type, before, after))
    return sorted(
        blames, key=lambda item: item.after if math.isinf(item.after) else item.after - item.before, reverse=True
    )


def _rel_l2(golden: Array, found: Array) -> float:
    reference, candidate = golden.astype(np.float64), found.astype(np.float64)
    usable = np.isfinite(reference)
    if not np.isfinite(candidate[usable]).all():
        return math.inf
    norm = float(np.linalg.norm(reference[usable]))
    error = float(np.linalg.norm(candidate[usable] - reference[usable]))
    return error / norm if norm else (0.0 if error == 0 else math.inf)

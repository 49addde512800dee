"""What `--cost` names: `traffic`, `nodes`, or `profile:FILE`, a measured time a layer.

Two kinds of files are read.

    {"nodes": {"encoder/MatMul_3": {"fp32_ms": 0.81, "half_ms": 0.30}, ...}}     node -> milliseconds in either precision
    [{"count": 100}, {"name": "Conv_0 + Relu_1", "averageMs": 0.42, ...}, ...]   what trtexec --exportProfile writes of one engine

Of the second kind two are given, of the FP32 engine and of the half one: `profile:fp32.json,half.json`. A layer that joins several nodes
names them all; its time is shared among them. What a node costs is the time that FP32 takes there beyond half, in microseconds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from mpdeploy.errors import DataError, UsageError, closest_names
from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.search.cost import CostKind

PREFIX = "profile:"
_RANGE = re.compile(r"\[(?P<first>[^\[\]]+?)\.\.\.(?P<last>[^\[\]]+?)\]")
"""TensorRT's name for a layer that spans nodes: {ForeignNode[FIRST...LAST]}."""


def check_cost(cost: str) -> None:
    """Refuse what is no cost before a model is read.

    Raises:
        UsageError: no such cost, or no such file.
    """
    if cost in get_args(CostKind):
        return
    if not cost.startswith(PREFIX) or not cost.removeprefix(PREFIX):
        raise UsageError(f"--cost {cost}: there is no such cost.", hint="give traffic, nodes, or profile:FILE.json")
    for path in cost.removeprefix(PREFIX).split(","):
        if not Path(path).is_file():
            raise UsageError(f"--cost {cost}: there is no file {path}.", hint="give profile:FILE.json")


def cost_from(cost: str | Mapping[str, float], index: GraphIndex) -> CostKind | Mapping[str, float]:
    """The cost that a search takes: a kind, or node -> microseconds that FP32 takes beyond half.

    Raises:
        UsageError: there is no such cost.
        DataError: a file that is no profile, or one of another model.
    """
    if not isinstance(cost, str):
        return cost
    check_cost(cost)
    if not cost.startswith(PREFIX):
        return cost  # type: ignore[return-value]
    paths = [Path(part) for part in cost.removeprefix(PREFIX).split(",")]
    if len(paths) > 2:
        raise UsageError(f"--cost {cost} names {len(paths)} files.", hint="give profile:FP32.json,HALF.json")
    documents = [_document(path) for path in paths]
    if len(paths) == 1 and isinstance(documents[0], dict):
        extra = _of_nodes(documents[0], paths[0])
    elif all(isinstance(document, list) for document in documents):
        times = [_of_layers(document, path, index) for document, path in zip(documents, paths, strict=True)]
        if len(times) == 1:  # one engine's times say which nodes are large: half would take about half of them
            extra = {node: time / 2 for node, time in times[0].items()}
        else:
            extra = {node: time - times[1].get(node, 0.0) for node, time in times[0].items()}
    else:
        raise DataError(f"--cost {cost}: two files must both be what trtexec --exportProfile writes.", hint=_HINT)
    known = {node: 1e3 * max(ms, 0.0) for node, ms in extra.items() if node in index.nodes}
    if not known:
        raise DataError(
            f"No node of the profile {paths[0]} is in the model.",
            hint=f"it names {', '.join(list(extra)[:3]) or 'none'}; closest in the model: "
            f"{closest_names(next(iter(extra), ''), index.nodes)}",
        )
    return known


_HINT = '{"nodes": {"NODE": {"fp32_ms": 0.8, "half_ms": 0.3}}}, or what trtexec --exportProfile writes'


def _document(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the profile {path}: {error}.", hint=_HINT) from error


def _of_nodes(document: Mapping[str, Any], path: Path) -> dict[str, float]:
    nodes = document.get("nodes")
    try:
        return {
            str(node): _milliseconds(each["fp32_ms"], path) - _milliseconds(each["half_ms"], path)
            for node, each in nodes.items()  # type: ignore[union-attr]
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no profile: {type(error).__name__}: {error}.", hint=_HINT) from error


def _milliseconds(value: Any, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{path} is no profile: {str(value)[:40]!r} is no time.", hint=_HINT)
    return float(value)


def _of_layers(document: Iterable[Any], path: Path, index: GraphIndex) -> dict[str, float]:
    """Node -> milliseconds; a layer's time is shared equally among the nodes that its name names."""
    order = list(index.nodes)
    place = {node: position for position, node in enumerate(order)}
    found: dict[str, float] = {}
    for layer in document:
        if not isinstance(layer, dict) or ("name" in layer and "averageMs" not in layer):
            raise DataError(f"{path} is no profile: a layer without averageMs: {str(layer)[:80]}.", hint=_HINT)
        if "name" not in layer:
            continue  # the count at the top
        nodes = _named_in(str(layer["name"]), order, place)
        for node in nodes:
            found[node] = found.get(node, 0.0) + _milliseconds(layer["averageMs"], path) / len(nodes)
    return found


def _named_in(layer: str, order: list[str], place: Mapping[str, int]) -> list[str]:
    if layer in place:
        return [layer]
    spans = [(match["first"], match["last"]) for match in _RANGE.finditer(layer)]
    if spans:
        ends = [(place[first], place[last]) for first, last in spans if first in place and last in place]
        return [node for low, high in ends for node in order[min(low, high) : max(low, high) + 1]]
    parts = {part for part in re.split(r"\s\+\s|[(),{}\[\]]|\s", layer) if part}
    return [node for node in order if node in parts]

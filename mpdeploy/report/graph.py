"""The network as a reader wants it: nodes in order, the block each belongs to, and which blocks feed which."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

MAX_BYTES = 512 << 20
"""A larger ONNX file (weights inside) is not opened for a picture."""
TOP = "(top level)"
_DEPTH = 2


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the outline: its name in the plan, and the tensors it reads and writes."""

    name: str
    op: str
    block: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def outline_of(path: Path) -> list[Node] | None:
    """The nodes of an ONNX file's main graph, in order; None where onnx or the file is not there, or it is no ONNX file."""
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return None
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        return None
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (DecodeError, OSError):
        return None
    nodes = []
    for node in graph.node:
        properties = {item.key: item.value for item in node.metadata_props}
        scopes = _scopes(properties.get("pkg.torch.onnx.name_scopes", ""))
        block = block_of_scopes(scopes) if scopes else block_of_name(node.name)
        nodes.append(Node(node.name, node.op_type, block, tuple(node.input), tuple(node.output)))
    return nodes


def outline_of_plan(half: Sequence[str], kept: Sequence[tuple[str, str]]) -> list[Node]:
    """What a plan alone gives: its nodes, without order between half and kept, and without tensors."""
    return [Node(name, "", block_of_name(name)) for name in half] + [
        Node(name, op, block_of_name(name)) for name, op in kept
    ]


def block_of_scopes(scopes: Sequence[str]) -> str:
    """The module's path to a depth of two: ['', 'encoder', 'encoder.layer', 'encoder.layer.0', 'add'] -> 'encoder.layer'.

    A numbered module belongs to its list: 'layer.0' counts as one level.
    """
    modules = [scope for scope in scopes[:-1] if scope]
    if not modules:
        return TOP
    parts: list[str] = []
    for part in modules[-1].split("."):
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return ".".join(parts[:_DEPTH])


def block_of_name(name: str) -> str:
    """The first two levels of a node's name, which other exporters build from module names."""
    separator = "/" if "/" in name else "."
    parts = [part for part in name.split(separator) if part]
    return separator.join(parts[:_DEPTH]) if len(parts) > _DEPTH else (parts[0] if len(parts) == _DEPTH else TOP)


def coarser(nodes: Sequence[Node]) -> Sequence[Node]:
    """The same nodes with larger blocks where hardly a block holds two: 'features.3' -> 'features'."""
    if 2 * len({node.block for node in nodes}) <= len(nodes) or len(nodes) < 4:
        return nodes
    return [replace(node, block=node.block.replace("/", ".").split(".")[0] or TOP) for node in nodes]


def blocks_in_order(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    """Block -> its nodes, in the order in which each block first runs."""
    blocks: dict[str, list[Node]] = {}
    for node in nodes:
        blocks.setdefault(node.block, []).append(node)
    return blocks


def feeders(nodes: Sequence[Node]) -> dict[str, list[str]]:
    """Block -> the other blocks whose tensors it reads."""
    made_in = {tensor: node.block for node in nodes for tensor in node.outputs if tensor}
    found: dict[str, dict[str, None]] = {}
    for node in nodes:
        for tensor in node.inputs:
            source = made_in.get(tensor)
            if source is not None and source != node.block:
                found.setdefault(node.block, {})[source] = None
    return {block: list(sources) for block, sources in found.items()}


def _scopes(text: str) -> list[str]:
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in found] if isinstance(found, list) else []

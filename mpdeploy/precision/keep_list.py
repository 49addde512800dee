"""The user's keep-list: which nodes must stay in FP32, by name, glob, or op type.

encoder.layer.0.*      a node's name, or a glob over names
op:Softmax             every node of an op type
scope:encoder.layer.3  every node that came from a module (where the exporter recorded it), with what lies below it
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from mpdeploy.errors import KeepListError, closest_names
from mpdeploy.precision.graph_index import GraphIndex, all_graphs, bodies

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""The metadata key in which torch.onnx.export writes a node's module path, as the text of a list."""


@dataclass(frozen=True, slots=True)
class KeepEntry:
    """A node that a pattern of the user's matched."""

    pattern: str
    note: str = ""


def read_patterns(arguments: Iterable[str]) -> list[tuple[str, str]]:
    """Expand `@FILE` arguments: a text file (one pattern a line, `#` starts a comment) or JSON (`{"keep": [{"node", "reason"}]}`).

    Returns:
        (pattern, the note its file gives for it) pairs.

    Raises:
        KeepListError: the file is missing or cannot be read.
    """
    patterns: list[tuple[str, str]] = []
    for argument in arguments:
        if not argument.startswith("@"):
            patterns.append((argument, ""))
            continue
        path = Path(argument[1:])
        try:
            text = path.read_text(encoding="utf-8")
            if text.lstrip().startswith("{"):
                entries = json.loads(text)["keep"]
                patterns += [
                    (item, "") if isinstance(item, str) else (item["node"], item.get("reason", "")) for item in entries
                ]
                continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KeepListError(
                f"Cannot read the keep-list {path}: {error}.", hint="a text file with one pattern a line, or plan.json"
            ) from error
        for line in text.splitlines():
            pattern, _, comment = line.partition(" #") if not line.lstrip().startswith("#") else ("", "", "")
            if pattern.strip():
                patterns.append((pattern.strip(), comment.strip()))
    return patterns


def match_keep_list(index: GraphIndex, patterns: Sequence[tuple[str, str]], *, model_name: str) -> dict[str, KeepEntry]:
    """Node id -> the entry that keeps it.

    Raises:
        KeepListError: a pattern matches no node; the message names the closest ones. All such patterns are named at once.
    """
    kept: dict[str, KeepEntry] = {}
    unmatched: list[str] = []
    for pattern, note in patterns:
        found = _matches(index, pattern)
        if not found:
            unmatched.append(pattern)
        for node_id in found:
            for each in (node_id, *_inside(index, node_id)):
                kept.setdefault(each, KeepEntry(pattern, note))
    if unmatched:
        names = [*index.nodes, *(f"op:{op}" for op in {node.op_type for node in index.nodes.values()})]
        listed = ", ".join(f"'{pattern}'" for pattern in unmatched)
        raise KeepListError(
            f"Keep-list pattern{'s' if len(unmatched) > 1 else ''} {listed} "
            f"match{'' if len(unmatched) > 1 else 'es'} no node in {model_name}.",
            hint=f"closest names: {closest_names(unmatched[0], names)}; mpdeploy inspect {model_name} lists them",
        )
    return kept


def _matches(index: GraphIndex, pattern: str) -> list[str]:
    if pattern in index.nodes:
        return [pattern]
    kind, colon, rest = pattern.partition(":")
    if colon and kind == "op":
        return [node_id for node_id, node in index.nodes.items() if fnmatch.fnmatchcase(node.op_type, rest)]
    if colon and kind == "scope":
        return [node_id for node_id, node in index.nodes.items() if _in_scope(node, rest)]
    duplicates = [node_id for node_id, node in index.nodes.items() if node.name == pattern]
    return duplicates or [node_id for node_id in index.nodes if fnmatch.fnmatchcase(node_id, pattern)]


def _inside(index: GraphIndex, node_id: str) -> list[str]:
    """Ids of the nodes in the bodies of a control-flow node."""
    return [index.id_of[node] for _, body in bodies(index.nodes[node_id]) for each in all_graphs(body) for node in each]


def scopes_of(node: ir.Node) -> list[str]:
    """The module paths a node came from, outermost first; empty where the exporter did not say."""
    text = node.metadata_props.get(NAME_SCOPES, "")
    return [part.strip(" '\"") for part in text.strip("[]").split(",") if part.strip(" '\"")]


def _in_scope(node: ir.Node, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(scope, pattern) or scope.startswith(f"{pattern}.") for scope in scopes_of(node)[:-1])

"""The keep-list that a search writes: readable, editable, accepted by `--keep @FILE`, and found again after a re-export.

Names end in numbers that move when anything before them changes, and then may name another node of the same kind. So each entry also
says what the node is and where it stands: op, module scopes, what feeds it and takes from it, and digests of all that comes before and
after it. `rematch` trusts a name whose node still has one of these two; else whatever has it is that node.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mpdeploy.errors import KeepListError
from mpdeploy.precision.graph_index import GraphIndex, constant_tensor
from mpdeploy.precision.keep_list import read_patterns, scopes_of
from mpdeploy.precision.plan import Reason
from mpdeploy.precision.search.driver import SearchAnswer

FORMAT = "mpdeploy keep-list 1"
_NUMBER = re.compile(r"(?<=[^\d])\d+$")


def entry_of(index: GraphIndex, unit: str, reasons: Sequence[Reason], answer: SearchAnswer | None) -> dict[str, Any]:
    """One line of the keep-list.

    Args:
        index: the model.
        unit: a node's id, or `input:NAME`, `output:NAME`.
        reasons: why it is kept.
        answer: holds the proof, from which the drift contributed is taken; None while the search runs.
    """
    proof = None if answer is None else next((proof for proof in answer.proofs if proof.unit == unit), None)
    node = index.nodes.get(unit)
    entry: dict[str, Any] = {
        "node": unit,
        "op": node.op_type if node is not None else unit.split(":", 1)[0],
        "reason": "; ".join(map(str, reasons)),
    }
    if answer is not None and proof is not None and proof.samples:
        drift = answer.evaluation.drift
        entry["drift_without"] = proof.drift_without
        entry["drift_contributed"] = math.sqrt(max(proof.drift_without**2 - drift**2, 0.0))
    if node is not None:
        entry["place"] = place_of(index, node)
    return entry


def place_of(index: GraphIndex, node: ir.Node) -> dict[str, Any]:
    """What a node is and where it stands, without names that an exporter numbers."""
    scopes = scopes_of(node)[:-1]
    before, after = surroundings(index)[node]
    return {
        "scope": scopes[-1] if scopes else "",
        "inputs": [_neighbour(index, value) for value in node.inputs],
        "outputs": sorted(user.op_type for value in node.outputs for user, _ in value.uses()),
        "nth": _nth(index, node),
        "before": before,
        "after": after,
    }


def surroundings(index: GraphIndex) -> dict[ir.Node, tuple[str, str]]:
    """Node -> digests of all that leads to it, and of all that it leads to: ops and constants' shapes, no names but of inputs."""
    known = _SURROUNDINGS.get(index)
    if known is None:
        before: dict[ir.Node, str] = {}
        for node in index.nodes.values():  # in the order of the graph: what leads to it was seen
            made = [
                before.get(producer, "")
                if value is not None and (producer := value.producer()) is not None and not index.is_constant(value)
                else _neighbour(index, value)
                for value in node.inputs
            ]
            before[node] = _digest(node.op_type, made)
        after: dict[ir.Node, str] = {}
        for node in reversed(index.nodes.values()):
            leads = [
                [after.get(user, user.op_type), str(place)] for value in node.outputs for user, place in value.uses()
            ]
            outputs = ["output" for value in node.outputs if value.is_graph_output()]
            after[node] = _digest(node.op_type, [*sorted(map("/".join, leads)), *outputs])
        known = _SURROUNDINGS[index] = {node: (before[node], after[node]) for node in before}
    return known


_SURROUNDINGS: weakref.WeakKeyDictionary[GraphIndex, dict[ir.Node, tuple[str, str]]] = weakref.WeakKeyDictionary()


def _digest(op: str, parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join((op, *parts)).encode()).hexdigest()[:16]


def _neighbour(index: GraphIndex, value: ir.Value | None) -> str:
    if value is None:
        return "-"
    if index.is_constant(value):
        tensor = constant_tensor(value)
        shape = "x".join(map(str, tensor.shape)) if tensor is not None and len(tensor.shape) else "scalar"
        return f"constant {shape}"
    producer = value.producer()
    return f"input {value.name}" if producer is None else producer.op_type


def _nth(index: GraphIndex, node: ir.Node) -> int:
    """Its number among the nodes of the same op and scope, in the order of the graph."""
    scopes = scopes_of(node)[:-1]
    count = 0
    for other in index.nodes.values():
        if other is node:
            return count
        count += other.op_type == node.op_type and scopes_of(other)[:-1] == scopes
    return count


def keep_list_json(
    entries: Iterable[Mapping[str, Any]], search: Mapping[str, Any], float_io: Iterable[str] = ()
) -> dict[str, Any]:
    """The document of a keep-list file: nodes under `keep`, graph inputs and outputs under `float_io`.

    Args:
        entries: what `entry_of` made.
        search: the numbers of the search.
        float_io: names of further inputs and outputs that stay FP32, because the user said so.
    """
    nodes: list[dict[str, Any]] = []
    io: dict[str, dict[str, Any]] = {name: {"name": name, "reason": "the user keeps it"} for name in float_io}
    for entry in entries:
        side, _, name = str(entry["node"]).partition(":")
        if side in ("input", "output") and name and "place" not in entry:
            io[name] = {"name": name, **{key: entry[key] for key in entry if key not in ("node", "op")}}
        else:
            nodes.append(dict(entry))
    return {"format": FORMAT, "keep": nodes, "float_io": list(io.values()), "search": dict(search)}


def patterns_for(index: GraphIndex, arguments: Iterable[str]) -> list[tuple[str, str]]:
    """What `--keep` arguments ask for on this model: as `read_patterns`, but a searched keep-list is matched by structure too.

    Raises:
        KeepListError: a file is missing or cannot be read.
    """
    found: list[tuple[str, str]] = []
    for argument in arguments:
        entries = _searched_entries(argument)
        found += read_patterns([argument]) if entries is None else rematch(index, entries)
    return found


def float_io_in(arguments: Iterable[str]) -> list[str]:
    """Inputs and outputs that the searched keep-lists among `--keep` arguments hold in FP32."""
    found: list[str] = []
    for argument in arguments:
        document = _searched_document(argument)
        if document is not None:
            entries = _list_in(document, "float_io", "name", argument)
            found += [entry if isinstance(entry, str) else entry["name"] for entry in entries]
    return found


def _searched_entries(argument: str) -> list[Mapping[str, Any] | str] | None:
    """The entries of a file that a search wrote; None for anything else (`read_patterns` then says what is wrong with it)."""
    document = _searched_document(argument)
    return None if document is None else _list_in(document, "keep", "node", argument)


def _list_in(document: Mapping[str, Any], key: str, named: str, argument: str) -> list[Mapping[str, Any] | str]:
    """A list of a keep-list that people may have edited: each entry is a text, or an object with a text `named`."""
    entries = document.get(key, [])
    wrong = [entries]
    if isinstance(entries, list):
        names = [entry.get(named) if isinstance(entry, Mapping) else entry for entry in entries]
        wrong = [entry for entry, name in zip(entries, names, strict=True) if not isinstance(name, str)]
    if wrong:
        raise KeepListError(
            f'The keep-list {argument[1:]}: in "{key}", {json.dumps(wrong[0])[:80]} names nothing.',
            hint=f'"{key}" is a list of patterns, or of objects like {{"{named}": "NAME"}}',
        )
    return list(entries)


def _searched_document(argument: str) -> Mapping[str, Any] | None:
    if not argument.startswith("@"):
        return None
    try:
        document = json.loads(Path(argument[1:]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and document.get("format") == FORMAT else None


def rematch(index: GraphIndex, entries: Iterable[Mapping[str, Any] | str]) -> list[tuple[str, str]]:
    """(pattern, note) pairs for `match_keep_list`, with the names of nodes that were renumbered brought up to date.

    An entry whose name is there and fits its op and place stays as it is. Else the node with the same op, and the same before or after it, is
    taken; or that with the same op, module scope and neighbours, of several the one with the same number among its like. An entry that fits
    nothing keeps its name, so that `match_keep_list` reports it where it is gone.

    Args:
        index: the model as it is now.
        entries: the `keep` list of a file; plain strings are patterns.
    """
    entries = list(entries)
    found: list[tuple[str, str]] = []
    unmoved = {str(entry["node"]) for entry in entries_of(entries) if _fits(index, entry)}
    taken = set(unmoved)
    for entry in entries:
        if isinstance(entry, str):
            found.append((entry, ""))
            continue
        name, note = str(entry["node"]), str(entry.get("reason", ""))
        if name not in unmoved:
            moved = _moved(index, entry, taken)
            if moved is not None:
                taken.add(moved)
                note = f"{note} (was {name})".strip()
                name = moved
        found.append((name, note))
    return found


def entries_of(entries: Iterable[Mapping[str, Any] | str]) -> list[Mapping[str, Any]]:
    """The entries that are no plain patterns."""
    return [entry for entry in entries if not isinstance(entry, str)]


def _fits(index: GraphIndex, entry: Mapping[str, Any]) -> bool:
    node = index.nodes.get(str(entry["node"]))
    if node is None:
        return False
    place = entry.get("place")
    if node.op_type != entry.get("op", node.op_type):
        return False
    if not isinstance(place, Mapping):
        return True
    now = place_of(index, node)
    if any(now[side] == place.get(side) for side in ("before", "after")):
        return True
    if "before" in place and _surrounded_alike(index, place, node.op_type):
        return False  # another node has what was before or after it
    return bool(now["scope"] == place.get("scope") and now["inputs"] == place.get("inputs"))


def _surrounded_alike(index: GraphIndex, place: Mapping[str, Any], op: str) -> list[str]:
    """Nodes with the same before and after them; or else with one of these."""
    sides = (place.get("before"), place.get("after"))
    of = {name: surroundings(index)[node] for name, node in index.nodes.items() if node.op_type == op}
    both = [name for name, found in of.items() if found == sides]
    return both or [name for name, found in of.items() if found[0] == sides[0] or found[1] == sides[1]]


def _moved(index: GraphIndex, entry: Mapping[str, Any], taken: set[str]) -> str | None:
    place = entry.get("place")
    if not isinstance(place, Mapping):
        return None
    alike = [name for name in _surrounded_alike(index, place, str(entry.get("op"))) if name not in taken]
    if len(alike) == 1:
        return alike[0]
    likely: list[tuple[tuple[int, ...], str]] = []
    stem = _NUMBER.sub("", str(entry["node"]))
    for node_id, node in index.nodes.items():
        if node.op_type != entry.get("op") or node_id in taken:
            continue
        now = place_of(index, node)
        same = (
            int(now["scope"] == place.get("scope")),
            int(now["inputs"] == place.get("inputs")),
            int(now["outputs"] == place.get("outputs")),
            int(now["nth"] == place.get("nth")),
            int(_NUMBER.sub("", node_id) == stem),
        )
        if same[0] and (same[1] or (same[2] and same[3])):
            likely.append((same, node_id))
    if not likely:
        return None
    best = max(rank for rank, _ in likely)
    names = [node_id for rank, node_id in likely if rank == best]
    return names[0] if len(names) == 1 else None

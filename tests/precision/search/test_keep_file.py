"""A keep-list finds its nodes again after a re-export has renumbered them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mpdeploy.errors import KeepListError
from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.keep_list import NAME_SCOPES, match_keep_list
from mpdeploy.precision.plan import Reason
from mpdeploy.precision.search.keep_file import FORMAT, entry_of, float_io_in, patterns_for, rematch
from tests.precision.conformance_base import normal, weight
from tests.precision.visible import graph

TEXT = (
    "g (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, w)  b = Add(a, k)  c = Relu(b)  d = MatMul(c, w)  e = Add(d, k) "
    " f = Exp(e)  y = Add(f, c) }"
)
SCOPES = {"a": "net.0", "b": "net.0", "c": "net.1", "d": "net.2", "e": "net.2", "f": "", "y": ""}


def _exported(first: int, text: str = TEXT) -> GraphIndex:
    """The graph as an exporter names it: `node_OP_NUMBER`, counted from `first`."""
    model = graph(text, w=weight(8, 8), k=normal(8, seed="k"))
    for number, node in enumerate(model.graph):
        scope = SCOPES.get(node.outputs[0].name or "", "")
        node.name = f"node_{node.op_type}_{first + number}"
        node.metadata_props[NAME_SCOPES] = f"['', '{scope}', '{node.outputs[0].name}']"
    return GraphIndex.of(model)


def _entries(index: GraphIndex, *outputs: str) -> list[dict[str, object]]:
    return [
        entry_of(index, name, (Reason("search", "without it the drift is 2 instead of 1"),), None)
        for name, node in index.nodes.items()
        if node.outputs[0].name in outputs
    ]


def _outputs(index: GraphIndex, patterns: list[tuple[str, str]]) -> set[str]:
    matched = match_keep_list(index, patterns, model_name="m")
    return {index.nodes[name].outputs[0].name or "" for name in matched}


def test_names_that_are_there_are_taken_as_they_are() -> None:
    index = _exported(0)
    assert _outputs(index, rematch(index, _entries(index, "b", "f"))) == {"b", "f"}


@pytest.mark.parametrize("kept", [["b"], ["e"], ["a", "d"], ["b", "e", "y"], ["c", "f"]])
def test_renumbered_nodes_are_found_by_op_scope_and_neighbours(kept: list[str]) -> None:
    entries = _entries(_exported(0), *kept)
    for first in (1, 3, 40):  # with 1 and 3 an old name means another node of the new export
        index = _exported(first)
        assert _outputs(index, rematch(index, entries)) == set(kept)


def test_a_node_put_in_before_moves_every_number() -> None:
    entries = _entries(_exported(0), "b", "e", "f")
    index = _exported(0, re.sub(r"a = MatMul\(x, w\)", "x2 = Neg(x)  a = MatMul(x2, w)", TEXT))
    assert _outputs(index, rematch(index, entries)) == {"b", "e", "f"}


def test_an_entry_that_fits_nothing_is_reported_by_its_name() -> None:
    entries = _entries(_exported(0), "f")
    index = _exported(10, TEXT.replace("Exp(e)", "Tanh(e)"))
    with pytest.raises(KeepListError, match="node_Exp_5"):
        match_keep_list(index, rematch(index, entries), model_name="m")


def test_plain_patterns_pass_through() -> None:
    index = _exported(0)
    assert rematch(index, ["op:Exp"]) == [("op:Exp", "")]


def test_the_old_name_stays_in_the_note() -> None:
    entries = _entries(_exported(0), "f")
    index = _exported(7)
    [(name, note)] = rematch(index, entries)
    assert name == "node_Exp_12"
    assert "was node_Exp_5" in note


def test_inputs_and_outputs_are_no_nodes() -> None:
    entry = entry_of(_exported(0), "output:y", (), None)
    assert "place" not in entry


CHAIN = "g (float[N, 8] x) => (float[N, 8] r5) { FRONT m0 = MatMul(q, w) r0 = Relu(m0) m1 = MatMul(r0, w) r1 = Relu(m1) m2 = MatMul(r1, w) r2 = Relu(m2) m3 = MatMul(r2, w) r5 = Relu(m3) }"


@pytest.mark.parametrize("kept", [["m2"], ["m1", "m2"], ["r2"]])
def test_a_name_that_means_another_node_of_the_same_kind_is_seen(kept: list[str]) -> None:
    """Two nodes more at the front move each number by two, onto a node that looks the same."""
    entries = _entries(_exported(0, CHAIN.replace("FRONT", "q = Neg(x)")), *kept)
    index = _exported(0, CHAIN.replace("FRONT", "p = Neg(x) o = Neg(p) q = Neg(o)"))
    assert _outputs(index, rematch(index, entries)) == set(kept)
    assert all("(was " in note for _, note in rematch(index, entries))


@pytest.mark.parametrize("kept", [["m2"], ["m1", "r2"]])
def test_nodes_at_the_end_move_nothing(kept: list[str]) -> None:
    entries = _entries(_exported(0, CHAIN.replace("FRONT", "q = Neg(x)")), *kept)
    index = _exported(0, CHAIN.replace("FRONT", "q = Neg(x)").replace("r5 = Relu(m3)", "e = Exp(m3) r5 = Relu(e)"))
    assert _outputs(index, rematch(index, entries)) == set(kept)
    assert not any("(was " in note for _, note in rematch(index, entries))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"keep": [{"op": "MatMul"}]}, '"keep"'),
        ({"keep": [None]}, '"keep"'),
        ({"keep": [5]}, '"keep"'),
        ({"keep": None}, '"keep"'),
        ({"keep": "a"}, '"keep"'),
        ({"keep": [], "float_io": [{"reason": "x"}]}, '"float_io"'),
        ({"keep": [], "float_io": None}, '"float_io"'),
    ],
)
def test_an_edited_file_that_names_nothing_is_refused(document: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "keep.json"
    path.write_text(json.dumps({"format": FORMAT, **document}), encoding="utf-8")
    read = float_io_in if "float_io" in document else lambda arguments: patterns_for(_exported(0), arguments)
    with pytest.raises(KeepListError, match=words):
        read([f"@{path}"])

"""The precision map: the network by block and node, coloured by what is planned and by what each engine really runs.

Realised precision comes from the audit of the build: `nodes` (node -> precision) where it is recorded, else the lists of
what differs from the plan. The tensors that decided are drawn from `ranges` of plan.json, where it is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpdeploy.gates.verdict import format_number
from mpdeploy.report import charts
from mpdeploy.report.graph import Node, blocks_in_order, coarser, feeders, outline_of_plan
from mpdeploy.report.reading import Json, dicts
from mpdeploy.run_dir import RunDir

MAX_KEPT_NODES = 300
MAX_BLOCKS = 60
MAX_NODES = 2500
MAX_HISTOGRAMS = 24
_LABELLED = 300
"""Up to so many nodes show their op's name; more are drawn as squares, with the name as a tooltip."""
_HALF, _FULL = ("fp16", "bf16"), ("fp32", "tf32")

_SAYS = {
    "half": "half",
    "kept": "kept in FP32",
    "fault": "kept in FP32 by the plan, and runs in half",
    "slow": "half by the plan, and runs in FP32",
    "other": "not a matter of the plan (shapes, integers)",
    "unknown": "not found in the engine (fused or folded)",
}


def precision_maps(
    plans: Mapping[str, Json], graph: Sequence[Node] | None = None, run_dir: RunDir | None = None
) -> list[dict[str, Any]]:
    """One entry a plan: counts, the map as planned and as each engine runs it, kept nodes with reasons, histograms."""
    return [_map_of(name, plan, graph, run_dir) for name, plan in plans.items()]


def fp32_engines(run_dir: RunDir) -> list[str]:
    """A line for each engine that was built from the FP32 model, which no plan concerns."""
    lines = []
    for name, record in run_dir.records().items():
        if name.startswith("40-build/") and record.status == "done" and record.report.get("precision") == "fp32":
            audit = record.report.get("audit", {})
            counts = ", ".join(f"{count} {precision}" for precision, count in audit.get("layers", {}).items())
            lines.append(f"{name.split('/', 1)[1]} takes the FP32 model here; its layers: {counts or 'not listed'}.")
    return lines


def _map_of(name: str, plan: Json, graph: Sequence[Node] | None, run_dir: RunDir | None) -> dict[str, Any]:
    kept_items = dicts(plan.get("keep") or plan.get("kept"))
    half = [str(node) for node in plan.get("half") or () if isinstance(node, str)]
    kept = {str(item.get("node", "?")): str(item.get("op", "")) for item in kept_items}
    planned = dict.fromkeys(half, "half") | dict.fromkeys(kept, "kept")
    nodes = list(graph or ())
    if len({node.name for node in nodes} & planned.keys()) < len(planned) / 2:
        nodes = outline_of_plan(half, list(kept.items()))  # no graph, or not that of this plan
    num_half, num_kept = int(plan.get("num_half", len(half))), int(plan.get("num_kept", len(kept)))
    return {
        "name": name,
        "ranges_from": str(plan.get("ranges_from", "")),
        "num_half": num_half,
        "num_kept": num_kept,
        "bar": charts.share_bar(
            [("n-half", num_half), ("n-kept", num_kept)], label=f"{num_half} nodes in half, {num_kept} kept in FP32"
        ),
        "pictures": [
            _picture("as planned", nodes, planned, note=""),
            *_engine_pictures(str(plan.get("precision", name)), nodes, planned, run_dir),
        ],
        "contributions": any("contribution" in item for item in kept_items),
        "kept": [_kept_row(item) for item in kept_items[:MAX_KEPT_NODES]],
        "more_kept": max(0, len(kept_items) - MAX_KEPT_NODES),
        "histograms": _histograms(plan, nodes, kept, str(plan.get("precision", name))),
        "notes": [str(note) for note in plan.get("notes") or ()],
    }


def _kept_row(item: Json) -> dict[str, str]:
    contribution = item.get("contribution")
    shown = format_number(float(contribution)) if isinstance(contribution, int | float) else ""
    return {**{key: str(item.get(key, "")) for key in ("node", "op", "reason")}, "contribution": shown}


# -- pictures ----------------------------------------------------------------------------------------------------------


def _picture(title: str, nodes: Sequence[Node], state: Mapping[str, str], *, note: str) -> dict[str, Any]:
    shown = coarser(nodes[:MAX_NODES])
    sources = feeders(shown)
    blocks = list(blocks_in_order(shown).items())
    counts: dict[str, int] = {}
    for node in nodes:
        found = state.get(node.name, "other")
        counts[found] = counts.get(found, 0) + 1
    return {
        "title": title,
        "note": note,
        "label": f"{title}: " + ", ".join(f"{count} {_SAYS[kind]}" for kind, count in counts.items()),
        "counts": counts,
        "labelled": len(shown) <= _LABELLED,
        "blocks": [
            {
                "name": block,
                "reads": ", ".join(sources.get(block, ())),
                "num_half": sum(state.get(node.name) in ("half", "fault") for node in members),
                "cells": [
                    {
                        "css": state.get(node.name, "other"),
                        "op": node.op or "·",
                        "title": f"{node.name}{f' ({node.op})' if node.op else ''}: {_SAYS[state.get(node.name, 'other')]}",
                    }
                    for node in members
                ],
            }
            for block, members in blocks[:MAX_BLOCKS]
        ],
        "more": len(nodes) - sum(len(members) for _, members in blocks[:MAX_BLOCKS]),
        "more_blocks": max(0, len(blocks) - MAX_BLOCKS),
    }


def _engine_pictures(
    precision: str, nodes: Sequence[Node], planned: Mapping[str, str], run_dir: RunDir | None
) -> list[dict[str, Any]]:
    pictures = []
    for name, record in run_dir.records().items() if run_dir is not None else ():
        audit = record.report.get("audit")
        if not name.startswith("40-build/") or not isinstance(audit, Mapping) or record.status != "done":
            continue
        if record.report.get("precision") != precision:
            continue
        engine, source = name.split("/", 1)[1], str(audit.get("source", "?"))
        if not audit.get("realised"):
            note = f"Its audit repeats the file that was parsed (source: {source}): what really runs is not known yet."
            pictures.append({**_picture(engine, nodes, planned, note=note), "blocks": [], "more": 0, "more_blocks": 0})
            continue
        state = _realised(planned, audit)
        wrong = sum(value in ("fault", "slow") for value in state.values())
        note = f"Realised, from its {source}: " + (f"{wrong} nodes differ from the plan." if wrong else "as planned.")
        pictures.append(_picture(f"as {engine} runs it", nodes, state, note=note))
    return pictures


def _realised(planned: Mapping[str, str], audit: Mapping[str, Any]) -> dict[str, str]:
    """Node -> half, kept, fault, slow or unknown, from what the audit recorded."""
    found = audit.get("nodes")
    if isinstance(found, Mapping):
        state = {}
        for node, plan in planned.items():
            precision = found.get(node)
            if precision in _HALF:
                state[node] = "half" if plan == "half" else "fault"
            elif precision in _FULL:
                state[node] = "kept" if plan == "kept" else "slow"
            else:
                state[node] = "unknown"
        return state
    faults, slow = (set(audit.get(key) or ()) for key in ("kept_in_half", "half_in_fp32"))
    return {node: "fault" if node in faults else "slow" if node in slow else plan for node, plan in planned.items()}


# -- the tensors that decided ------------------------------------------------------------------------------------------


def _histograms(plan: Json, nodes: Sequence[Node], kept: Mapping[str, str], precision: str) -> list[dict[str, str]]:
    ranges = plan.get("ranges")
    if not isinstance(ranges, Mapping):
        return []
    reads = {tensor: node for node in nodes if node.name in kept for tensor in (*node.outputs, *node.inputs)}
    cards = []
    for tensor, stats in list(ranges.items())[:MAX_HISTOGRAMS]:
        if not isinstance(stats, Mapping) or not isinstance(stats.get("exponents"), Mapping):
            continue
        counts = {int(exponent): int(count) for exponent, count in stats["exponents"].items()}
        node = reads.get(tensor)
        amax = float(stats.get("amax", 0.0))
        place = (
            "" if node is None else f"{'written' if tensor in node.outputs else 'read'} by {node.name} ({node.op}); "
        )
        cards.append(
            {
                "tensor": str(tensor),
                "caption": f"{place}largest magnitude {format_number(amax)}",
                "chart": charts.exponent_histogram(
                    counts, precision, label=f"Exponents of {tensor}, largest magnitude {format_number(amax)}"
                ),
            }
        )
    return [card for card in cards if card["chart"]]

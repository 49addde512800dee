"""Why each kept unit is kept: what its tensors and constants hold, or what it adds to the drift; and which units belong together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from mpdeploy.precision.constants import examine
from mpdeploy.precision.flow import half_ports
from mpdeploy.precision.formats import HalfFormat
from mpdeploy.precision.graph_index import GraphIndex, constant_tensor
from mpdeploy.precision.plan import Reason
from mpdeploy.precision.range_rules import RANGE_RULES, Tensors
from mpdeploy.precision.ranges import Ranges
from mpdeploy.precision.search.causes import cause_of
from mpdeploy.precision.search.soft import Proof
from mpdeploy.precision.search.switch_graph import Switch
from mpdeploy.precision.search.types import KeepSet


def explain(
    index: GraphIndex,
    half: HalfFormat,
    ranges: Ranges | None,
    kept: KeepSet,
    hard: Iterable[str],
    proofs: Sequence[Proof],
    drift: float,
) -> dict[str, tuple[Reason, ...]]:
    """Reasons of every kept unit, the one that was measured last.

    Args:
        index: the model.
        half: the format.
        ranges: statistics, to name what overflows or underflows.
        kept: the units.
        hard: those that lose an output.
        proofs: drift without each.
        drift: with all of them.
    """
    hard = set(hard)
    found: dict[str, list[Reason]] = {unit: [] for unit in kept}
    without = {proof.unit: proof for proof in proofs}
    for unit, reasons in found.items():
        proof = without.get(unit)
        if unit in hard or (proof is not None and not math.isfinite(proof.drift_without)):
            reasons += _constant_faults(index, half, unit)
            reasons += [] if ranges is None else cause_of(index, half, ranges, unit)
    if ranges is not None:
        tensors = Tensors(index, half, ranges)
        for rule in RANGE_RULES:
            for verdict in rule.find(tensors):
                for unit in (
                    *verdict.nodes,
                    *(f"{side}:{name}" for name in verdict.io for side in ("input", "output")),
                ):
                    if unit in found and not any(reason.kind == "mask" for reason in found[unit]):
                        found[unit].append(Reason(rule.kind, verdict.text))
    for unit, reasons in found.items():
        proof = without.get(unit)
        if proof is not None and proof.samples:
            reasons.append(Reason("search", _worth(proof, drift)))
        elif unit in hard:
            reasons.append(Reason("search", "an output is lost when it is half"))
        elif not reasons:
            reasons.append(Reason("search", "kept for the gate; the drift without it was not measured"))
    return {unit: tuple(dict.fromkeys(reasons)) for unit, reasons in found.items()}


def _worth(proof: Proof, drift: float) -> str:
    if not math.isfinite(proof.drift_without):
        return "without it an output is lost"
    return f"without it the drift is {proof.drift_without:.3g} instead of {drift:.3g}"


def _constant_faults(index: GraphIndex, half: HalfFormat, unit: str) -> list[Reason]:
    node = index.nodes.get(unit)
    if node is None:
        return []
    faults = []
    for position in sorted(half_ports(index, node, half)[0]):
        value = node.inputs[position]
        tensor = constant_tensor(value) if value is not None and index.is_constant(value) else None
        fault = None if tensor is None else examine(tensor, half)
        if fault is not None and value is not None:
            faults.append(Reason("constant", f"{value.name}: {fault.text}"))
    return faults


def groups_of(kept: KeepSet, switches: Sequence[Switch], order: Sequence[str]) -> list[list[str]]:
    """Kept units that hold back a rounding together: they stand or fall as one. In the order of the graph."""
    parent = {unit: unit for unit in kept}

    def root(unit: str) -> str:
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit

    for switch in switches:
        members = [unit for unit in switch.needs if unit in parent]
        if len(members) == len(switch.needs):
            for other in members[1:]:
                parent[root(other)] = root(members[0])
    grouped: dict[str, list[str]] = {}
    for unit in order:
        if unit in parent:
            grouped.setdefault(root(unit), []).append(unit)
    return list(grouped.values())


def dominating(energies: Mapping[str, float], switches: Sequence[Switch], count: int = 8) -> list[tuple[str, float]]:
    """The roundings with the largest energies and their drifts, for the message about an unreachable gate."""
    named = [(s.name, math.sqrt(energies.get(s.name, 0.0))) for s in switches]
    return sorted((item for item in named if item[1] > 0), key=lambda item: -item[1])[:count]

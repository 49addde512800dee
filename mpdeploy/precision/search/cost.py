"""What keep-lists cost, and the best one for each price: a parametric minimum cut.

Each switch of the emulation (switch_graph.py) is a rounding that happens as soon as one of its units is half, and adds a known energy.
For a price p of energy, the best labelling minimises

    sum of cost(u) over units in FP32 + casts + p * sum of energy(s) over switches that are thrown

which is a minimum cut: exact, casts and shared tensors included, and units that only help together (a LayerNorm's pieces, a mask's
chain, a residual stream) enter together. Raising p walks the lower convex hull of cost against energy, the predicted Pareto front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from mpdeploy.errors import UsageError
from mpdeploy.precision.borders import cut_arcs, float_side_of, half_units
from mpdeploy.precision.flow import Flow, Unit
from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.op_rules import COMPUTE_OPS
from mpdeploy.precision.search.parts import Parts
from mpdeploy.precision.search.prices import Prices
from mpdeploy.precision.search.switch_graph import Switch
from mpdeploy.precision.search.types import Candidate, KeepSet

CostKind = Literal["nodes", "traffic"]
FLOPS_A_BYTE = 10.0
"""FP32 operations in the time of one byte of memory traffic: 19.5 TFLOP/s beside 2 TB/s (A100; half is 16 times faster)."""
MAX_CUTS = 160


@dataclass(frozen=True)
class Costs:
    """Cost of each unit in FP32, and of casts.

    Attributes:
        units: key -> cost.
        cast: factor on the bytes that casts move.
        name: `nodes`, `traffic` or `profile`.
    """

    units: Mapping[str, float]
    cast: float
    name: str


def make_costs(
    index: GraphIndex, flow: Flow, kind: CostKind | Mapping[str, float], size_of: Callable[[ir.Value], float]
) -> Costs:
    """Costs of a flow's units.

    Args:
        index: the model.
        flow: its units.
        kind: `nodes` (each 1), `traffic` (bytes that half saves, operations in byte equivalents, and the casts), or a measured profile:
            node -> extra microseconds in FP32 (units that are not in it cost the smallest value there).
        size_of: value -> number of elements.

    Raises:
        UsageError: an empty profile.
    """
    keys = [unit.key for unit in flow.units]
    if isinstance(kind, str):
        if kind == "nodes":
            return Costs(dict.fromkeys(keys, 1.0), 0.0, "nodes")
        return Costs({unit.key: _traffic(index, unit, size_of) for unit in flow.units}, 1.0, "traffic")
    if not kind:
        raise UsageError("The cost profile is empty.", hint="give {node: microseconds}, or 'traffic'")
    least = min(value for value in kind.values())
    return Costs({key: max(kind.get(key, least), 1e-9) for key in keys}, 0.0, "profile")


def _traffic(index: GraphIndex, unit: Unit, size_of: Callable[[ir.Value], float]) -> float:
    node = unit.node
    if node is None or unit.key not in index.nodes:
        return max(unit.gain, 1.0) if math.isfinite(unit.gain) else 1.0
    values = [value for value in (*node.inputs, *node.outputs) if value is not None and index.is_float(value)]
    cost = sum(2.0 * size_of(value) for value in values)
    if node.op_type in COMPUTE_OPS:
        cost += _operations(node, size_of) / FLOPS_A_BYTE
    return max(cost, 1.0)


def _operations(node: ir.Node, size_of: Callable[[ir.Value], float]) -> float:
    out = size_of(node.outputs[0])
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is None or weight.shape is None or not weight.shape:
        return 2.0 * out
    axes = [axis if isinstance(axis, int) else 16 for axis in weight.shape]
    if node.op_type in ("Conv", "ConvTranspose"):
        return 2.0 * out * math.prod(axes[1:])
    return 2.0 * out * axes[-2 if len(axes) > 1 else 0]


class FlowCosts:
    """Labels keep-lists, prices them, and finds the best ones.

    Units that rules keep are fixed throughout; those in `never` are half whatever it takes.
    """

    def __init__(
        self, flow: Flow, switches: Sequence[Switch], costs: Costs, never: frozenset[str] = frozenset()
    ) -> None:
        self.never = never
        self.flow = flow
        self.costs = costs
        self.switches = list(switches)
        self.rule_fixed = frozenset(unit.key for unit in flow.units if unit.fixed)
        # an input that is an output too has one type: the output follows the input
        self._passed = {
            f"output:{name}": f"input:{name}"
            for name in (unit.key.removeprefix("input:") for unit in flow.units if unit.key.startswith("input:"))
            if f"output:{name}" in flow.of_key
        }
        # what an If gives back is as its neighbours are: where that costs fewest casts
        self._borders = frozenset(
            unit.key
            for unit in flow.units
            if unit.node is not None
            and ":out" in unit.key
            and not unit.gain
            and not unit.fixed
            and unit.key not in never
        )
        self.free = frozenset(
            unit.key
            for unit in flow.units
            if not unit.fixed
            and unit.key not in never
            and unit.key not in self._passed
            and unit.key not in self._borders
        )
        self._all = frozenset(unit.key for unit in flow.units)
        self._half_at_most = self._all - self.rule_fixed
        self._given = self.rule_fixed | self._borders
        """Units that keep no rounding from happening: what they are follows from rules, or from others."""
        gains = costs.units if costs.cast else {unit.key: unit.gain for unit in flow.units}
        self._gains = {key: 0.0 if key in self._borders else gain for key, gain in gains.items()}
        priced = {key: costs.units[key] for key in self._all - self._given}
        self._prices = Prices(flow, priced, costs.cast)
        self._known: dict[KeepSet, float] = {}
        self._planned: dict[KeepSet, frozenset[str]] = {}
        # units in the order of the graph, so that nothing depends on how sets are ordered
        free = [unit.key for unit in flow.units if unit.key in self.free]
        self.parts = Parts(free, {switch.name: self._held_by(switch) for switch in switches})

    def _held_by(self, switch: Switch) -> tuple[str, ...]:
        """The units that keep a switch from being thrown; an output that is an input too is kept by that."""
        return tuple(self._passed.get(key, key) for key in switch.needs if key not in self._given)

    def half_keys(self, kept: KeepSet) -> frozenset[str]:
        """The units that are half when exactly these are kept."""
        half = self._half_at_most - kept
        if self._borders:
            half = self._cheapest_half(kept, {key: 0.0 if key in self._borders else math.inf for key in self._all})
        return self._with_passed(half)

    def _cheapest_half(self, kept: KeepSet, gains: Mapping[str, float]) -> frozenset[str]:
        """The half units of the labelling that costs least with these in FP32, by what half saves at each of the others."""
        flow = Flow(
            [
                replace(
                    unit,
                    fixed=unit.fixed or unit.key in kept,
                    is_searched=not unit.fixed and unit.key in kept,
                    gain=gains[unit.key],
                )
                for unit in self.flow.units
            ]
        )
        flow.edges, flow.of_key = self.flow.edges, self.flow.of_key
        return frozenset(half_units(flow))

    def _with_passed(self, half: Collection[str]) -> frozenset[str]:
        """With each output that is an input too where its input is."""
        outputs = frozenset(output for output, given in self._passed.items() if given in half)
        return frozenset(half).difference(self._passed) | outputs

    def planned_half_keys(self, kept: KeepSet) -> frozenset[str]:
        """The same in a plan: what would cost more in casts than it saves stays FP32 too, unless nodes are what is counted.

        With `traffic` it is the cheapest model that keeps these: matrix products may be a loss in half, too.
        """
        if self.costs.name == "nodes":
            return self.half_keys(kept)
        if kept not in self._planned:
            half = self._cheapest_half(kept, self._gains) | (self.never - self.rule_fixed)
            self._planned[kept] = self._with_passed(half)
        return self._planned[kept]

    def planned(self, kept: KeepSet) -> KeepSet:
        """What a plan keeps, of the units that may be kept."""
        return self.free - self.planned_half_keys(kept)

    def cost(self, kept: KeepSet) -> float:
        """Of the plan that keeps these (and what lies between them, where that is cheaper than casts), beyond what rules keep."""
        if kept not in self._known:
            self._known[kept] = self._prices.cost(self.planned_half_keys(kept))
        return self._known[kept]

    def price(self, kept: KeepSet) -> float:
        """Where exactly these are kept and nothing between them is."""
        return self._prices.cost(self.half_keys(kept))

    def price_changes(self, kept: KeepSet) -> dict[str, float]:
        """Unit -> what that changes by when it alone changes sides."""
        changes = self._prices.changes(self.half_keys(kept))
        return {key: changes[key] for key in self.free}

    def front(self, energies: Mapping[str, float], hard: KeepSet) -> list[Candidate]:
        """Every keep-list on the lower convex hull of cost against energy, from `hard` alone to everything."""
        live = [s for s in self.switches if energies[s.name] > 0 and not self._given.issuperset(s.needs)]
        least = frozenset(hard)
        found: dict[KeepSet, tuple[float, float]] = {least: self._price(least, live, energies)}
        everything = self._cut(math.inf, least, live, energies)
        found[everything] = self._price(everything, live, energies)
        queue = [(least, everything)]
        cuts = 0
        while queue and cuts < MAX_CUTS:
            a, b = queue.pop(0)
            (cost_a, energy_a), (cost_b, energy_b) = found[a], found[b]
            if energy_a - energy_b <= 1e-12 * max(energy_a, 1e-300) or cost_b <= cost_a:
                continue
            cuts += 1
            middle = self._cut((cost_b - cost_a) / (energy_a - energy_b), least, live, energies)
            if middle not in found:
                found[middle] = self._price(middle, live, energies)
                if energy_b < found[middle][1] < energy_a:
                    queue += [(a, middle), (middle, b)]
        found.setdefault(self.free, self._price(self.free, live, energies))
        order = sorted(found, key=lambda kept: (found[kept][0], -found[kept][1]))
        front: list[Candidate] = []
        for kept in order:
            if not front or found[kept][1] < front[-1].energy or kept == self.free:
                front.append(Candidate(kept, found[kept][1], found[kept][0]))
        return front if self.costs.cast else self._refined(front, energies)

    def _refined(self, front: list[Candidate], energies: Mapping[str, float]) -> list[Candidate]:
        """Every step from everything down, one unit at a time, the least worth its cost first: finer than the hull, and never dearer."""
        kept = front[-1].kept
        steps = [front[-1]]
        while removable := kept - front[0].kept:
            marginals = self.parts.marginals(energies, kept)
            least = min(removable, key=lambda unit: (marginals[unit] / self.costs.units[unit], unit))
            kept = kept - {least}
            cost = sum(self.costs.units[key] for key in kept)
            steps.append(Candidate(kept, self.parts.energy(energies, kept), cost))
        return steps[::-1]

    def _price(self, kept: KeepSet, live: Sequence[Switch], energies: Mapping[str, float]) -> tuple[float, float]:
        fp32 = kept | self._given
        energy = sum(energies[s.name] for s in live if not fp32.issuperset(s.needs))
        return sum(self.costs.units[key] for key in kept), energy

    def _cut(self, price: float, hard: KeepSet, live: Sequence[Switch], energies: Mapping[str, float]) -> KeepSet:
        """The best FP32 set at a price of energy."""
        if math.isinf(price):  # everything that any live switch needs
            return hard | frozenset(key for s in live for key in s.needs if key in self.free)
        units = [
            replace(unit, gain=self.costs.units[unit.key], fixed=unit.fixed or unit.key in hard)
            for unit in self.flow.units
        ]
        flow = Flow(units, [replace(edge, size=edge.size * self.costs.cast) for edge in self.flow.edges])
        fixed = {number for number, unit in enumerate(units) if unit.fixed}
        arcs = [arc for arc in cut_arcs(flow, fixed) if arc[2] > 0]
        count = len(units) + 2 * len(flow.edges)
        total = sum(self.costs.units[unit.key] for unit in units) + 1e-9
        for switch in live:
            needs = [self.flow.of_key[key] for key in switch.needs if self.flow.of_key[key] not in fixed]
            paid = min(price * energies[switch.name], total)
            if len(needs) == 1:
                arcs.append((needs[0], -2, paid))
            elif needs:
                arcs.append((count, -2, paid))
                arcs += [(need, count, np.inf) for need in needs]
                count += 1
        side = float_side_of(arcs, count)
        return hard | frozenset(
            unit.key for number, unit in enumerate(units) if number in side and unit.key in self.free
        )

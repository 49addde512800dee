"""The cheapest set of casts: which units are half and which FP32, by a minimum cut.

Putting a unit into FP32 costs what half precision would have saved there (its gain, in bytes of memory traffic). A tensor that
crosses between half and FP32 costs one cast, however many consumers share it: 4 bytes read and 2 written a value, or the reverse.
The cheapest labelling is a minimum cut between the source (half) and the sink (FP32); among equally cheap ones the one with most
units in half is taken.

A tensor with several consumers is a hyperedge: one auxiliary node with infinite arcs makes the cast be paid once.
Casts at graph inputs and outputs that the user wants in FP32 are free here: they were asked for.
"""

from __future__ import annotations

import numpy as np

from mpdeploy.precision.flow import Flow

CAST_BYTES = 6.0
"""A cast's memory traffic a value: 4 bytes on the FP32 side and 2 on the other."""
_MAX_FINITE_SUM = 1 << 29
_INFINITE = 1 << 30


def half_units(flow: Flow) -> set[str]:
    """Keys of the units that are cheapest in half precision."""
    fixed = {unit for unit, item in enumerate(flow.units) if item.fixed}
    free = [unit for unit in range(len(flow.units)) if unit not in fixed]
    if not sizes_decide(flow):
        return {flow.units[unit].key for unit in free}
    arcs = cut_arcs(flow, fixed)
    float_side = float_side_of(arcs, len(flow.units) + len(flow.edges) * 2, _all_capacities(flow))
    return {flow.units[unit].key for unit in free if unit not in float_side}


def _all_capacities(flow: Flow) -> float:
    """At least what the finite capacities of its arcs add up to, whichever units are fixed."""
    gains = sum(unit.gain for unit in flow.units if 0 < unit.gain < np.inf)
    return gains + sum(2 * CAST_BYTES * edge.size for edge in flow.edges)


def sizes_decide(flow: Flow) -> bool:
    """Whether anything draws a free unit towards FP32; if not, all of them are half whatever their sizes."""
    fixed = {unit for unit, item in enumerate(flow.units) if item.fixed}
    return any(_pulls(flow, edge_number, fixed) for edge_number in range(len(flow.edges)))


def _pulls(flow: Flow, edge_number: int, fixed: set[int]) -> bool:
    """Whether an edge draws a unit that is free towards FP32. An input or output that must be FP32 does not: its cast is free."""
    edge = flow.edges[edge_number]
    members = [edge.producer, *edge.consumers]
    if all(unit in fixed for unit in members):
        return False
    asked_for = [unit for unit in members if _is_asked_for(flow, unit, fixed)]
    return edge.float_consumers or edge.always_float or any(unit in fixed and unit not in asked_for for unit in members)


def _is_asked_for(flow: Flow, unit: int, fixed: set[int], *kinds: str) -> bool:
    """Whether it is an input or output that somebody wants in FP32: its casts are free."""
    item = flow.units[unit]
    return unit in fixed and not item.is_searched and item.key.startswith(kinds or ("input:", "output:"))


def cut_arcs(flow: Flow, fixed: set[int]) -> list[tuple[int, int, float]]:
    """Arcs (from, to, capacity); -1 is the source, -2 the sink."""
    source, sink = -1, -2
    arcs: list[tuple[int, int, float]] = []
    for number, unit in enumerate(flow.units):
        if number not in fixed and unit.gain > 0:
            arcs.append((source, number, unit.gain))
    for number, edge in enumerate(flow.edges):
        asked_for = _is_asked_for(flow, edge.producer, fixed, "input:")
        cost = CAST_BYTES * edge.size
        makes_float = edge.always_float or edge.producer in fixed
        takers = {unit for unit in edge.consumers if not _is_asked_for(flow, unit, fixed, "output:")}
        takes_float = edge.float_consumers or any(unit in fixed for unit in takers)
        free_takers = [unit for unit in takers if unit not in fixed]
        if not makes_float:
            if takes_float:  # half producer, FP32 consumer: the cast is certain
                arcs.append((edge.producer, sink, cost))
            elif len(free_takers) == 1:
                arcs.append((edge.producer, free_takers[0], cost))
            elif free_takers:
                aux = len(flow.units) + 2 * number
                arcs.append((edge.producer, aux, cost))
                arcs += [(aux, unit, np.inf) for unit in free_takers]
        if free_takers and not asked_for:
            producer = sink if makes_float else edge.producer
            if len(free_takers) == 1:
                arcs.append((free_takers[0], producer, cost))
            else:
                aux = len(flow.units) + 2 * number + 1
                arcs.append((aux, producer, cost))
                arcs += [(unit, aux, np.inf) for unit in free_takers]
    return arcs


def float_side_of(arcs: list[tuple[int, int, float]], count: int, total: float | None = None) -> set[int]:
    """Nodes from which the sink can be reached in the residual graph of a maximum flow: the smallest FP32 side of all cheapest ones.

    Args:
        arcs: see `cut_arcs`.
        count: of nodes, source and sink aside.
        total: at least what finite capacities add up to. They are rounded to this scale: with the same one, ties stay ties when more
            units are fixed, and then more are FP32, never fewer.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    finite = sum(capacity for _, _, capacity in arcs if np.isfinite(capacity)) if total is None else total
    scale = min(1.0, _MAX_FINITE_SUM / max(finite, 1.0))
    source, sink = count, count + 1
    place = {-1: source, -2: sink}
    rows = np.array([place.get(tail, tail) for tail, _, _ in arcs])
    columns = np.array([place.get(head, head) for _, head, _ in arcs])
    capacities = np.array(
        [_INFINITE if not np.isfinite(c) else max(1, round(c * scale)) if c > 0 else 0 for _, _, c in arcs],
        dtype=np.int64,
    )
    # parallel arcs add up; scipy wants int32
    graph = csr_matrix((capacities, (rows, columns)), shape=(count + 2, count + 2))
    graph.data = np.minimum(graph.data, _INFINITE).astype(np.int32)
    flow = maximum_flow(graph, source, sink, method="dinic").flow
    residual = (graph - flow).tocsr()
    residual.data = np.where(residual.data > 0, residual.data, 0)
    residual.eliminate_zeros()
    reached = breadth_first_order(residual.T.tocsr(), sink, directed=True, return_predecessors=False)
    return set(reached.tolist())

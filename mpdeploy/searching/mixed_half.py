"""After the search: kept nodes that FP16 cannot hold go to BF16, where the gate is still met on the really rewritten model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mpdeploy.measure.drift import DriftReport
from mpdeploy.precision.plan import PrecisionPlan, Reason
from mpdeploy.precision.search.hard import find_hard

RANGE_KINDS = frozenset(["range", "inner", "constant", "reduction", "mask"])
"""Reasons that BF16 may cure: FP16's range, not its precision."""

Measured = tuple[DriftReport, float]


@dataclass(frozen=True)
class MixedHalf:
    """A plan with BF16 nodes, measured.

    Attributes:
        plan: the plan.
        confirmed: its drift on all samples.
        measured: what the gate looks at.
        evaluations: passes over all samples that it took.
    """

    plan: PrecisionPlan
    confirmed: DriftReport
    measured: float
    evaluations: int


def move_to_bf16(
    plan: PrecisionPlan,
    groups: Sequence[Sequence[str]],
    before: Measured,
    limit: float,
    measure: Callable[[PrecisionPlan], Measured],
) -> MixedHalf:
    """Move as many groups of kept nodes to BF16 as the gate allows: all at once, or by group testing.

    Args:
        plan: of the search; it meets the gate.
        groups: kept units that stand or fall together; of each, the nodes that the range of FP16 hurts are moved.
        before: what was measured of `plan`.
        limit: the gate.
        measure: rewrites, emulates and runs a plan on all samples.
    """
    candidates = {group[0]: found for group in groups if (found := _hurt_by_range(plan, group))}
    known: dict[frozenset[str], tuple[PrecisionPlan, Measured]] = {frozenset(): (plan, before)}

    def fails(moved: frozenset[str]) -> bool:
        if moved not in known:
            tried = with_bf16(plan, [node for name in candidates if name in moved for node in candidates[name]])
            known[moved] = tried, measure(tried)
        drift, measured = known[moved][1]
        return not (measured <= limit * (1 + 1e-9) and math.isfinite(drift.rel_l2))

    chosen = frozenset(candidates)
    if fails(chosen):
        chosen -= frozenset(find_hard(list(candidates), fails))
        if fails(chosen):  # errors that add up: the last one found may have been let go too early
            chosen = frozenset()
    moved, (confirmed, measured) = known[chosen]
    return MixedHalf(moved, confirmed, measured, len(known) - 1)


def _hurt_by_range(plan: PrecisionPlan, group: Sequence[str]) -> list[str]:
    return [unit for unit in group if any(reason.kind in RANGE_KINDS for reason in plan.kept.get(unit, ()))]


def with_bf16(plan: PrecisionPlan, nodes: Sequence[str]) -> PrecisionPlan:
    """The plan with these of its FP32 nodes in BF16."""
    moved: Mapping[str, tuple[Reason, ...]] = {node: tuple(plan.kept.get(node, ())) for node in nodes}
    note = (f"in BF16, which has FP32's range: {', '.join(nodes)}",) if nodes else ()
    return replace(
        plan,
        kept={node: reasons for node, reasons in plan.kept.items() if node not in moved},
        bf16=moved,
        notes=(*plan.notes, *note),
    )

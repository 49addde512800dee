"""What would be needed to meet a gate that could not be met: found from the parts of the error, then measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mpdeploy.measure.drift import DriftReport
from mpdeploy.precision.plan import PrecisionPlan, Reason
from mpdeploy.precision.search.driver import SearchAnswer
from mpdeploy.searching.problem import SUSPICIOUS, ModelProblem


@dataclass(frozen=True)
class Remedy:
    """What is still half and dominates.

    Attributes:
        bf16: nodes that FP16 cannot hold: BF16, or FP32, would do.
        fp32: units whose rounding alone adds too much.
    """

    bf16: tuple[str, ...] = ()
    fp32: tuple[str, ...] = ()


def remedy_for(answer: SearchAnswer, problem: ModelProblem, half: str) -> Remedy:
    """The largest parts of what is left, down to the gate."""
    model = problem.model
    still_half = model.costs.planned_half_keys(answer.kept)
    thrown = [s for s in model.graph.switches if any(key in still_half for key in s.needs)]
    thrown.sort(key=lambda s: -answer.energies.get(s.name, 0.0))
    left = sum(answer.energies.get(s.name, 0.0) for s in thrown)
    out_of_range: list[str] = []
    imprecise: list[str] = []
    for switch in thrown:
        if left <= problem.limit**2:
            break
        left -= answer.energies.get(switch.name, 0.0)
        names = out_of_range if model.injected[switch.name] >= SUSPICIOUS and half == "fp16" else imprecise
        names += [key for key in switch.needs if key in still_half and key not in out_of_range + imprecise]
    return Remedy(tuple(out_of_range), tuple(imprecise))


def advice_on(
    answer: SearchAnswer,
    problem: ModelProblem,
    half: str,
    plan: PrecisionPlan,
    measured: float,
    measure: Callable[[PrecisionPlan], tuple[DriftReport, float]],
) -> list[str]:
    """Lines that say how far the search came and what would be needed; the remedy is measured on the rewritten model.

    Args:
        answer: the best that was reached.
        problem: what was searched.
        half: `fp16` or `bf16`.
        plan: of the answer.
        measured: what the gate looks at, of the rewritten model.
        measure: rewrites, emulates and runs a plan on all samples.
    """
    reached = f"{measured:.3g}" if math.isfinite(measured) else "an output lost"
    lines = [f"the best reached is {reached}, the limit is {problem.limit:.3g}"]
    if answer.stopped:
        return [*lines, f"the search was stopped: {answer.stopped}; run the same command again to go on"]
    remedy = remedy_for(answer, problem, half)
    if remedy.bf16:
        lines.append(
            f"BF16, which has FP32's range, or FP32 for {_listed(remedy.bf16)}: FP16 cannot hold what is there"
        )
    if remedy.fp32:
        lines.append(f"FP32 for {_listed(remedy.fp32)}: rounding alone adds that much there")
    if not remedy.bf16 and not remedy.fp32:
        if problem.model.costs.planned_half_keys(answer.kept):
            return [*lines, "no rounding that is left stands out: by their parts they would meet the gate"]
        return [
            *lines,
            "everything is FP32 that was FP32: the rest is of what the model itself holds in half, or of the order of sums",
        ]
    return [*lines, *_measured(remedy, problem, plan, measure)]


def _measured(
    remedy: Remedy,
    problem: ModelProblem,
    plan: PrecisionPlan,
    measure: Callable[[PrecisionPlan], tuple[DriftReport, float]],
) -> list[str]:
    """What the remedy gives: with BF16 where that is named, and with FP32 throughout where that is not enough."""
    reason = (Reason("search", "what the gate needs"),)
    named = {*remedy.bf16, *remedy.fp32}
    bf16 = {unit: reason for unit in remedy.bf16 if unit in plan.ops}
    in_fp32 = replace(
        plan, half_keys=plan.half_keys - named, kept={**plan.kept, **{u: reason for u in named if u in plan.ops}}
    )
    with_bf16 = replace(in_fp32, bf16=bf16, kept={u: why for u, why in in_fp32.kept.items() if u not in bf16})
    tried = [("with BF16 there", with_bf16)] if bf16 else []
    lines = []
    for words, each in [*tried, ("with FP32 there", in_fp32)]:
        drift, value = measure(each)
        met = value <= problem.limit * (1 + 1e-9) and math.isfinite(drift.rel_l2)
        reached = f"{value:.3g}" if math.isfinite(value) else "an output lost"
        lines.append(f"measured {words}: {reached}, which {'meets' if met else 'does not meet'} the gate")
        if met:
            break
    return lines


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

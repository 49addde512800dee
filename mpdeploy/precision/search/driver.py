"""The search for the smallest keep-list that meets a gate. The driver: read `search` as the list of what happens.

    1. all half            the gate may be met already
    2. hard causes         units that lose an output, by adaptive group testing (hard.py)
    3. gains               injected errors and a few probes give each part's energy at the outputs (gains.py)
    4. prefix              bisection along the predicted Pareto front (soft.py)
    5. exchange            cheaper ones, proposed by a model that learns from every measurement (exchange.py)
    6. proof               the drift without each kept unit, measured (soft.py)

It searches a `Problem` (types.py), whatever that is: a model behind a switchable emulation (`mpdeploy.searching`), or a synthetic
one with a known answer (synthetic.py). Everything that is measured goes through a `Ledger` (ledger.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpdeploy.precision.search.exchange import FAILURES, FEWER_FAILURES, exchange
from mpdeploy.precision.search.gains import Gains, estimate_gains
from mpdeploy.precision.search.hard import find_hard, find_hub
from mpdeploy.precision.search.ledger import Best, Ledger
from mpdeploy.precision.search.soft import Proof, find_prefix, prove, prune
from mpdeploy.precision.search.types import (
    Evaluation,
    KeepSet,
    Landscape,
    OnProgress,
    Problem,
    SearchStoppedError,
)

PROBE_SHARE = 0.5
"""Part of the evaluations that probes may use, where evaluations are limited."""
CONFIRMATIONS = 4
"""How often a lower limit is aimed at, when the thing itself drifts a little more than what stands in for it."""
ROUNDS = 2
"""How often what a proof has taught is used to find something cheaper, which is proven anew."""
WORTHWHILE = 0.02
"""Part of the cost that must be saved for another proof."""
LATER = 30.0
"""Evaluations that a proof may take, as long as nothing is known of it: for the time left."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How many evaluations the parts of a search may take.

    Attributes:
        probes: of single roundings.
        exchange: for something cheaper, all in all.
        proof: that each kept unit is needed; with less than one a unit, most are measured on some samples only.
    """

    probes: float = 30.0
    exchange: float = 128.0
    proof: float = math.inf


THOROUGH = Effort()
QUICK = Effort(probes=30.0, exchange=24.0, proof=48.0)
"""For models whose evaluations take long."""


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """A measured keep-list that no other one beats in both cost and drift."""

    cost: float
    drift: float
    num_kept: int
    passes: bool
    kept: KeepSet

    def to_json(self) -> dict[str, Any]:
        """Without the names."""
        return {"cost": self.cost, "drift": self.drift, "num_kept": self.num_kept, "passes": self.passes}


@dataclass(frozen=True)
class SearchAnswer:
    """What a search found.

    Attributes:
        kept: the keep-list: the gate is met with it, or (`met` is False) it is the best that was reached.
        met: whether the gate is met on all samples.
        evaluation: of `kept`, on all samples.
        all_half: of keeping nothing.
        hard: units that lose an output when they are half.
        proofs: one a kept unit, most needed first; empty where the search was stopped before.
        is_minimal: whether every kept unit is shown to be needed.
        energies: item -> estimated energy at the outputs; empty where no probes were made.
        pareto: the front of everything measured, cheapest first.
        cost: of `kept`.
        evaluations: passes over all samples; probes count by their share.
        by_phase: the same, by phase.
        stopped: why it ended early, or empty.
        replayed: measurements answered from the log.
        seconds: it took.
    """

    kept: KeepSet
    met: bool
    evaluation: Evaluation
    all_half: Evaluation
    hard: tuple[str, ...] = ()
    proofs: tuple[Proof, ...] = ()
    is_minimal: bool = False
    energies: Mapping[str, float] = field(default_factory=dict)
    pareto: tuple[ParetoPoint, ...] = ()
    cost: float = 0.0
    evaluations: float = 0.0
    by_phase: Mapping[str, float] = field(default_factory=dict)
    stopped: str = ""
    replayed: int = 0
    seconds: float = 0.0


def search(
    problem: Problem,
    landscape: Landscape | None = None,
    *,
    seed: int = 0,
    log: Path | None = None,
    max_evaluations: float = math.inf,
    max_seconds: float = math.inf,
    on_progress: OnProgress = lambda _: None,
    on_best: Callable[[Best], None] = lambda _: None,
    num_samples: int = 32,
    charged: float = 0.0,
    effort: Effort = THOROUGH,
) -> SearchAnswer:
    """Find the smallest keep-list that meets a problem's gate.

    Args:
        problem: what is measured.
        landscape: the error's parts, where they are known; without them the gate is treated as pass or fail.
        seed: of the order in which samples are probed; the same seed takes the same steps.
        log: where measurements are kept; the same call resumes from it.
        max_evaluations: passes over all samples after which the best answer so far is given.
        max_seconds: the same in time.
        on_progress: told after every measurement.
        on_best: given every answer that is better than all before: what a kill leaves.
        num_samples: of the data, for proofs on part of it.
        effort: how many evaluations its parts may take.
        charged: evaluations that were spent before (the pass that gave the injected errors).

    Raises:
        UsageError: the log belongs to another problem.
        KeyboardInterrupt: Ctrl-C; the log holds everything up to it.
    """
    ledger = Ledger(
        problem,
        landscape,
        log=log,
        seed=seed,
        max_evaluations=max_evaluations,
        max_seconds=max_seconds,
        on_progress=on_progress,
        on_best=on_best,
    )
    with ledger:
        ledger.charge(charged)
        run = _Search(ledger, seed, num_samples, effort)
        stopped = ""
        try:
            run.run()
        except SearchStoppedError as stop:
            stopped = str(stop)
    return run.answer(stopped)


class _Search:
    def __init__(self, ledger: Ledger, seed: int, num_samples: int, effort: Effort) -> None:
        self.effort = effort
        self.ledger = ledger
        self.seed = seed
        self.num_samples = num_samples
        self.all_half: Evaluation | None = None
        self.hard: tuple[str, ...] = ()
        self.gains: Gains | None = None
        self.kept: KeepSet | None = None
        self.met = False
        self.proofs: list[Proof] = []

    def run(self) -> None:
        ledger = self.ledger
        ledger.start("all half")
        self.all_half = ledger.evaluate(frozenset(), until="lost", exactly=True)
        if ledger.evaluate(frozenset(), until="lost").passes and ledger.confirm(frozenset()):
            self._settle(frozenset(), met=True)
            return
        everything = frozenset(ledger.problem.units)
        if ledger.landscape is not None and not ledger.evaluate(everything, until="lost").passes:
            self._estimate(everything)  # what dominates, for the advice
            self._settle(everything, met=False)
            return
        if self.all_half.lost:
            ledger.start("hard causes", expected=2 * math.log2(len(everything) + 1), later=LATER)
            self.hard = self._find_hard()
        hard = frozenset(self.hard)
        found = ledger.evaluate(hard)
        kept, met = hard, found.passes and ledger.confirm(hard)
        if not met:
            kept, met = self._soften(hard)
        self._settle(kept, met=met)
        if not met:
            return
        kept = self._proven(kept, hard)
        for _ in range(ROUNDS):
            cheaper = self._improved(kept, hard)
            if cheaper == kept:
                return
            self._settle(cheaper, met=True)
            self.proofs = []  # they are of another keep-list
            kept = self._proven(cheaper, hard)

    def _proven(self, kept: KeepSet, hard: KeepSet) -> KeepSet:
        """With a proof of each unit; what the proof shows not to be needed is gone."""
        ledger = self.ledger
        ledger.start("proof", expected=min(0.5 * len(kept), self.effort.proof))
        kept, self.proofs = prove(
            ledger,
            kept,
            hard,
            None if self.gains is None else self.gains.energies,
            max_evaluations=min(ledger.evaluations_left, self.effort.proof),
            num_samples=self.num_samples,
        )
        self._settle(kept, met=True)
        return kept

    def _improved(self, kept: KeepSet, hard: KeepSet) -> KeepSet:
        """By what the proof has taught; `kept` itself where nothing cheaper is confirmed, or another proof could not be paid for."""
        ledger, problem = self.ledger, self.ledger.problem
        affordable = len(kept) <= min(self.effort.proof, ledger.evaluations_left)
        if self.gains is None or not problem.gates_drift or not affordable:
            return kept
        for _ in range(CONFIRMATIONS):
            found = self._cheaper(ledger.cheapest(above=hard) or kept, hard, self.gains, FEWER_FAILURES)
            if problem.cost(found) > (1 - WORTHWHILE) * problem.cost(kept):
                break
            if ledger.confirm(found):
                return found
        return kept

    def _settle(self, kept: KeepSet, *, met: bool) -> None:
        self.kept, self.met = kept, met

    def _find_hard(self) -> tuple[str, ...]:
        units = list(self.ledger.problem.units)
        everything = frozenset(units)

        def is_lost(half: frozenset[str]) -> bool:
            return self.ledger.evaluate(everything - half, until="lost", exactly=True).lost

        suspicion = self.ledger.problem.suspicion()
        found = find_hard(units, is_lost, suspicion=suspicion)
        others = find_hub(units, found, is_lost) if len(found) < len(units) else None
        return tuple(found if others is None else others)

    def _soften(self, hard: KeepSet) -> tuple[KeepSet, bool]:
        """The additive part, beside the hard causes."""
        ledger = self.ledger
        landscape = ledger.landscape
        if landscape is None:
            return self._soften_blindly(hard)
        everything = frozenset(ledger.problem.units)
        gains = self._estimate(hard)
        front = landscape.front(gains.energies, hard)
        for _ in range(CONFIRMATIONS):
            kept = ledger.cheapest(above=hard)
            if kept is None or kept == everything:
                ledger.start("prefix", expected=6.0, later=LATER)
                candidate, met = find_prefix(ledger, front, is_known_to_fail=front[0].kept == hard)
                if not met:
                    return candidate.kept, False
                kept = candidate.kept
            kept = self._cheaper(kept, hard, gains)
            if ledger.confirm(kept):
                return kept, True
        return front[-1].kept, ledger.evaluate(front[-1].kept).passes and ledger.confirm(front[-1].kept)

    def _cheaper(self, kept: KeepSet, hard: KeepSet, gains: Gains, patience: int = FAILURES) -> KeepSet:
        """By what is known of the parts, without a proof."""
        ledger = self.ledger
        later = min(0.5 * len(kept), self.effort.proof)
        if not ledger.problem.gates_drift:
            ledger.start("prune", expected=6.0, later=later)
            return prune(ledger, kept, hard, gains.energies)
        ledger.start("exchange", expected=16.0, later=later)
        left = self.effort.exchange - ledger.by_phase.get("exchange", 0.0)
        left = min(ledger.evaluations_left, left)
        return exchange(ledger, gains, kept, hard, max_evaluations=left, patience=patience)

    def _estimate(self, beside: KeepSet) -> Gains:
        """The energies of the parts."""
        ledger = self.ledger
        landscape, problem = ledger.landscape, ledger.problem
        assert landscape is not None
        limit = problem.limit**2 if problem.gates_drift else ledger.evaluate(beside).drift ** 2 / 4
        probes = landscape.max_probes * landscape.samples_a_probe / max(landscape.num_samples, 1)
        ledger.start("gains", expected=min(probes, self.effort.probes), later=12 + LATER)
        assert self.all_half is not None
        self.gains = estimate_gains(
            ledger,
            all_half=self.all_half.energies,
            target=limit if math.isfinite(limit) else 1e-4,
            budget=min(self.effort.probes, PROBE_SHARE * ledger.evaluations_left),
            seed=self.seed,
            max_probes=landscape.max_probes,
            batch=landscape.samples_a_probe,
        )
        return self.gains

    def _soften_blindly(self, hard: KeepSet) -> tuple[KeepSet, bool]:
        """No parts are known: whatever makes the gate fail is found as hard causes are."""
        everything = frozenset(self.ledger.problem.units)
        if not self.ledger.evaluate(everything).passes:
            return everything, False

        def fails(half: frozenset[str]) -> bool:
            return not self.ledger.evaluate(everything - half).passes

        self.ledger.start("pass or fail")
        rest = [unit for unit in self.ledger.problem.units if unit not in hard]
        return hard | frozenset(find_hard(rest, fails)), True

    def answer(self, stopped: str) -> SearchAnswer:
        ledger = self.ledger
        everything = frozenset(ledger.problem.units)
        history = ledger.history
        all_half = self.all_half or Evaluation(math.inf, False, True, math.inf, 0.0)
        kept, met = self.kept, self.met
        if kept is None or (stopped and not met):
            confirmed = min(ledger.confirmed, key=ledger.problem.cost, default=None)
            if confirmed is not None:
                kept, met = confirmed, True
            elif ledger.best is not None:  # not confirmed yet: whoever has the thing itself does that
                kept, met = ledger.best.kept, True
            else:
                kept, met = everything, ledger.was_met(everything)
        same = ledger.problem.canonical(kept)
        evaluation = next((found for known, found in history if ledger.problem.canonical(known) == same), None)
        if evaluation is None and kept == everything:  # stopped before anything passed: it is the model itself
            evaluation = Evaluation(0.0, True, False, 0.0, 0.0)
            met = True
        elif evaluation is None:
            evaluation = ledger.problem.evaluate(same, until="lost")
            ledger.charge(evaluation.share)
        return SearchAnswer(
            kept=kept,
            met=met,
            evaluation=evaluation,
            all_half=all_half,
            hard=tuple(self.hard),
            proofs=tuple(self.proofs),
            is_minimal=met
            and not stopped
            and len(self.proofs) == len(kept)
            and all(p.needed and p.is_shown for p in self.proofs),
            energies={} if self.gains is None else self.gains.energies,
            pareto=pareto_front(ledger),
            cost=ledger.problem.cost(kept),
            evaluations=ledger.evaluations,
            by_phase=dict(ledger.by_phase),
            stopped=stopped,
            replayed=ledger.replayed,
            seconds=ledger.seconds,
        )


def pareto_front(ledger: Ledger) -> tuple[ParetoPoint, ...]:
    """The keep-lists measured on all samples that no other one beats in both cost and drift, cheapest first."""
    points = [
        ParetoPoint(ledger.problem.cost(kept), found.drift, len(kept), found.passes, kept)
        for kept, found in ledger.history
        if found.share == 1.0 and math.isfinite(found.drift)
    ]
    points.sort(key=lambda point: (point.cost, point.drift, point.num_kept))
    front: list[ParetoPoint] = []
    for point in points:
        if not front or point.drift < front[-1].drift:
            front.append(point)
    return tuple(front)

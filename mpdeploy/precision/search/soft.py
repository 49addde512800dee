"""The additive part: from estimated energies to a keep-list that passes, is 1-minimal, and says what each unit is worth.

find_prefix   bisection along the predicted Pareto front, each step placed by what the last measurement says of the prediction
prune         gives back to half what a gate on a metric does not need (a gate on the drift: exchange.py)
prove         measures the drift without each kept unit; one that is not needed goes
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from mpdeploy.precision.search.ledger import Ledger
from mpdeploy.precision.search.types import Candidate, Evaluation, KeepSet

DOUBTFUL = 12.0
"""Evaluations that a proof short of them keeps for the units that look least needed."""
REVISIONS = 3
"""How often all is measured anew because a unit has gone; in the last one few or none go."""
DESCENTS = 8
"""How often what goes is looked for before the rest is shown; mostly the second time nothing goes."""
IN_A_ROW = 10
"""So many units, least needed first, that are needed one after another: the others are taken to be needed, too, until they are shown to be."""
MAX_PRUNE = 12
"""Evaluations that pruning may take before the proof does the rest."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What a kept unit is worth.

    Attributes:
        unit: which.
        drift_without: drift when it alone becomes half; infinite where that loses an output.
        samples: how many samples that was measured on: all, or fewer where the failure was plain (or evaluations were short).
        needed: whether the gate fails without it; False only where evaluations ran out before it could be tried.
        is_shown: whether that was measured; else it follows from some samples, if errors add up in quadrature.
    """

    unit: str
    drift_without: float
    samples: int
    needed: bool
    is_shown: bool = True


def find_prefix(ledger: Ledger, front: Sequence[Candidate], *, is_known_to_fail: bool) -> tuple[Candidate, bool]:
    """The cheapest candidate of a front that passes, and True; or the last one, and False, where none does.

    Args:
        ledger: what measures.
        front: from cheapest to everything.
        is_known_to_fail: the first candidate was measured already.
    """
    low, high = (0, len(front)) if is_known_to_fail else (-1, len(front))
    ratio = _ratio(ledger.evaluate(front[0].kept), front[0]) if is_known_to_fail else 1.0
    limit = ledger.limit**2
    run_low = run_high = 0  # how often in a row the answer lay on one side: then step out twice as far, or bisect
    while high - low > 1 + _tolerance(front, high):
        guess = (low + high) // 2
        if ledger.problem.gates_drift and max(run_low, run_high) < 5:
            guess = next((i for i in range(low + 1, len(front)) if front[i].energy * ratio <= limit), len(front) - 1)
            guess += (1 << run_low) - (1 << run_high)
        guess = min(max(guess, low + 1), min(high, len(front)) - 1)
        found = ledger.evaluate(front[guess].kept)
        ratio = _ratio(found, front[guess])
        if found.passes:
            high, run_low, run_high = guess, 0, run_high + 1
        else:
            low, run_low, run_high = guess, run_low + 1, 0
            if guess == len(front) - 1:
                return front[-1], False
    return front[high], True


def _tolerance(front: Sequence[Candidate], high: int) -> int:
    """Steps of the front that are left to pruning: one in a hundred of what is kept."""
    return 0 if high >= len(front) else len(front[high].kept) // 100


def _ratio(found: Evaluation, candidate: Candidate) -> float:
    """Measured energy over the predicted one."""
    if not math.isfinite(found.drift) or candidate.energy <= 0 or found.drift <= 0:
        return 1.0
    return min(max(found.drift**2 / candidate.energy, 1e-3), 1e3)


def prune(ledger: Ledger, kept: KeepSet, hard: KeepSet, energies: Mapping[str, float]) -> KeepSet:
    """Give back to half what adds least, a quarter of what is kept at first; the result passes as `kept` does."""
    assert ledger.landscape is not None
    parts = ledger.landscape.parts
    tries = failures = 0
    while tries < MAX_PRUNE and failures < 3:
        marginals = parts.marginals(energies, kept)
        order = sorted(kept - hard, key=lambda unit: (marginals[unit], unit))
        free = sum(1 for unit in order if marginals[unit] <= 0)
        batch = order[: max(free, len(order) // 4, 1)]
        if not batch:
            return kept
        while batch and tries < MAX_PRUNE:
            tries += 1
            smaller = kept - frozenset(batch)
            if ledger.evaluate(smaller).passes:
                kept, failures = smaller, 0
                break
            failures += 1
            batch = batch[: len(batch) // 2]
        else:
            return kept
    return kept


def prove(
    ledger: Ledger,
    kept: KeepSet,
    hard: KeepSet,
    energies: Mapping[str, float] | None,
    *,
    max_evaluations: float,
    num_samples: int,
) -> tuple[KeepSet, list[Proof]]:
    """Measure the drift without each kept unit; whatever turns out not to be needed goes.

    A hard cause that loses an output on one sample is shown by that; the others, least needed first, are tried on all samples, up to
    where the gate fails whatever the rest adds. Where evaluations are short, all units are measured on some samples, which is an
    estimate, and only those that look least needed on all. A unit goes only if the thing itself meets the gate without it. Then what
    was measured of the others beside it is measured anew: errors may cancel. Of what a plan keeps between others, to spare casts, only
    those are named that the gate needs, too, alone or with those that go with them.

    Returns:
        The kept set (1-minimal where every proof says `needed` and `is_shown`), and one proof a unit in the order of what they are worth.
    """
    ledger.aim_at_the_gate()
    kept = ledger.problem.canonical(kept)
    proofs = _Proofs(ledger, kept, energies, ledger.evaluations + max_evaluations, num_samples)
    proofs.of_lost(hard)
    if proofs.are_short():
        proofs.on_part()
    proofs.descend()
    proofs.on_all()
    for _ in range(REVISIONS):
        have_gone = False
        while proofs.join():
            have_gone = True
        if not proofs.revise() and not have_gone:
            break
        proofs.on_all()
    proofs.join()
    proofs.give_up()
    proofs.name()
    return proofs.kept, sorted(proofs.found.values(), key=lambda proof: -_sortable(proof.drift_without))


class _Proofs:
    """What is shown so far, of which units, and what it may still cost."""

    def __init__(
        self, ledger: Ledger, kept: KeepSet, energies: Mapping[str, float] | None, end: float, num_samples: int
    ) -> None:
        self.ledger = ledger
        self.kept = kept
        self.energies = energies
        self.end = end
        self.num_samples = num_samples
        self.found: dict[str, Proof] = {}
        self.doubt: dict[str, float] = {}
        self.untested = set(kept)
        self.between: set[str] = set()  # kept to spare casts alone
        self.beside: dict[str, KeepSet] = {}  # what was kept when a unit was shown to be needed

    @property
    def left(self) -> float:
        return self.end - self.ledger.evaluations

    def of_lost(self, hard: KeepSet) -> None:
        """Hard causes that lose an output on one sample."""
        for unit in sorted(self.kept & hard):
            proof = _when_lost(self.ledger, self.kept, unit, self.num_samples)
            if proof is not None:
                self.found[unit] = proof
                self.untested.discard(unit)

    def are_short(self) -> bool:
        """Whether evaluations will not do for every unit."""
        return len(self.untested) > self.left

    def on_part(self) -> None:
        """All units on so many samples as can be paid for."""
        share = (self.left - min(DOUBTFUL, self.left / 3)) / (len(self.untested) + 1)
        part = _spread(self.num_samples, max(1, int(share * self.num_samples)))
        for unit in _by_worth(self.ledger, self.kept, self.energies, self.untested):
            affordable = self.ledger.evaluations + len(part) / self.num_samples <= self.end
            self.found[unit] = _on_part(self.ledger, self.kept, unit, part, affordable=affordable)
        self.doubt = {unit: _sortable(self.found[unit].drift_without) for unit in self.untested}

    def descend(self) -> None:
        """Let go what goes before the rest is shown, since that must be shown beside what stays."""
        for _ in range(DESCENTS):
            before = self.kept
            self.on_all(in_a_row=IN_A_ROW)
            while self.join():
                pass
            self.revise()
            if self.kept == before:
                return

    def on_all(self, in_a_row: float = math.inf) -> None:
        """The units that are left, least needed first; or until so many in a row are needed."""
        needed = 0
        while self.untested and self.left >= 1.0 and needed < in_a_row:
            order = (
                sorted(self.untested, key=lambda unit: (self.doubt.get(unit, -1.0), unit))
                if self.doubt
                else _by_worth(self.ledger, self.kept, self.energies, self.untested)
            )
            unit = order[0]
            self.untested.discard(unit)
            self.beside[unit] = self.kept
            less = self.kept - {unit}
            found = self.ledger.evaluate(less, exactly=True)
            drift = found.drift
            self.between.discard(unit)
            needed += 1
            if found.passes and unit in self.ledger.problem.canonical(less):
                needed = 0
                self.between.add(unit)  # half here would cost more in casts than it saves
                self.found.pop(unit, None)
                continue
            if found.passes and (really := self.ledger.really(less)) <= self.ledger.gate:
                needed = 0
                self.kept = less
                self.found.pop(unit, None)
                continue
            if found.passes and self.ledger.problem.gates_drift:
                drift = really  # what stands in for the thing itself passes by a hair, and that does not
            self.found[unit] = Proof(unit, drift, self._looked_at(found), needed=True)

    def revise(self) -> bool:
        """Take back what was shown beside a unit that has gone since; whether there is any, and evaluations to show it anew."""
        shown = self.found.keys() | self.between
        stale = {unit for unit in shown if self.beside.get(unit, self.kept) != self.kept}
        for unit in stale & self.found.keys():
            self.found[unit] = replace(self.found[unit], needed=False)
        self.untested |= stale
        return bool(stale) and self.left >= 1.0

    def give_up(self) -> None:
        """Say of what could not be tried that it is not shown."""
        self.revise()
        self.between -= self.untested
        for unit in sorted(self.untested):
            self.found.setdefault(unit, Proof(unit, math.nan, 0, needed=False))

    def join(self) -> bool:
        """What is kept to spare casts may go where it goes together with others: try what is not kept by the rest. Whether any went."""
        for unit in sorted(self._named() & self.between):
            if self.left < 1.0:
                return False
            less = self.ledger.problem.canonical(self._named() - {unit})
            found = self.ledger.evaluate(less)
            if found.passes and self._is_less(less) and self.ledger.really(less) <= self.ledger.gate:
                self.kept = less
                self.between &= less
                self.found = {unit: proof for unit, proof in self.found.items() if unit in less}
                self.untested = (self.untested & less) | (less - self.found.keys() - self.between)
                return True
            self.found[unit] = Proof(unit, found.drift, self._looked_at(found), needed=True)
        return False

    def _is_less(self, less: KeepSet) -> bool:
        cost = self.ledger.problem.cost
        return (cost(less), len(less)) < (cost(self.kept), len(self.kept))

    def _looked_at(self, found: Evaluation) -> int:
        """Samples of a measurement, which may have ended early."""
        return max(1, round(found.share * self.num_samples))

    def _named(self) -> KeepSet:
        """Without what the plan keeps anyhow, between the others."""
        canonical = self.ledger.problem.canonical
        named = self.kept - self.between
        for unit in sorted(self.between):
            if unit not in canonical(named):
                named |= {unit}
        for unit in sorted(self.between & named):  # one that came later may keep it, too
            if unit in canonical(named - {unit}):
                named -= {unit}
        return named

    def name(self) -> None:
        """Leave out what the plan keeps anyhow."""
        named = self._named()
        if self.ledger.problem.canonical(named) == self.kept:  # what is proven must be what the names give
            self.kept = named
        self.found = {unit: proof for unit, proof in self.found.items() if unit in self.kept}
        for unit in sorted(self.kept - self.found.keys()):
            self.found[unit] = Proof(unit, math.nan, 0, needed=False)


def _by_worth(ledger: Ledger, kept: KeepSet, energies: Mapping[str, float] | None, units: Collection[str]) -> list[str]:
    """Units by what they are predicted to be worth now, least first."""
    if ledger.landscape is None or energies is None:
        return sorted(units)
    marginals = ledger.landscape.parts.marginals(energies, kept)
    return sorted(units, key=lambda unit: (marginals[unit], unit))


def _spread(num_samples: int, count: int) -> tuple[int, ...]:
    """Samples from all over the data; a single one from its middle."""
    return tuple(sorted({int((place + 0.5) * num_samples / count) for place in range(count)}))


def _when_lost(ledger: Ledger, kept: KeepSet, unit: str, num_samples: int) -> Proof | None:
    """A proof on one sample, where that is enough."""
    without = ledger.evaluate(kept - {unit}, (num_samples // 2,), until="lost", exactly=True)
    return Proof(unit, math.inf, 1, needed=True) if without.lost and not math.isfinite(without.drift) else None


def _on_part(ledger: Ledger, kept: KeepSet, unit: str, part: tuple[int, ...], *, affordable: bool) -> Proof:
    if not affordable:
        return Proof(unit, math.nan, 0, needed=False)
    whole, beside = ledger.evaluate(kept), ledger.evaluate(kept, part, until="lost")
    without = ledger.evaluate(kept - {unit}, part, until="lost", exactly=True)
    drift = math.sqrt(whole.drift**2 + max(without.drift**2 - beside.drift**2, 0.0))
    return Proof(unit, drift, len(part), needed=drift > ledger.limit, is_shown=False)


def _sortable(drift: float) -> float:
    return -1.0 if math.isnan(drift) else drift

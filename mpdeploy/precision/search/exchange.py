"""From a keep-list that passes to a cheaper one: propose what the surrogate thinks best, measure it, learn, propose again.

A proposal is walked to (walk.py) on the surrogate (surrogate.py): units are let go, those first that lower the chance of passing least
for what they save, until the price is low enough; then some are taken back and others let go instead, more and more of them at once,
for as long as the chance rises (a strategic oscillation, Glover 1977). What is measured next is what promises most: its chance times
what it saves. It ends where nothing promises anything, or after some failures in a row. Of a handful of units all keep-lists are looked
at: there casts make valleys that no walk crosses.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import numpy as np

from mpdeploy.precision.search.gains import Gains
from mpdeploy.precision.search.ledger import Ledger
from mpdeploy.precision.search.surrogate import LARGEST, Measured, Surrogate
from mpdeploy.precision.search.types import Evaluation, KeepSet, Landscape
from mpdeploy.precision.search.walk import Walk

SAVINGS = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
"""What a proposal tries to save, as parts of the price; the first one: anything at all."""
TRIED_WELL = 5
"""So many of them are exchanged, those that promise most."""
DEPTH = 4
"""Groups that are exchanged at once, at most."""
NEAR, NEAR_STARTS = 1.1, 3
"""Proposals are walked to from so many more that were measured too, and had a drift of at most so many times the limit."""
LEAST_CHANCE, LEAST_SAVED = 0.01, 2e-4
"""Of passing, and its product with the part of the price that is saved, for a measurement to be worth its time."""
MOST_LEARNT = 256
"""Measurements that the surrogate begins with, those nearest the gate: a step costs their number times that of the parts."""
HANDFUL = 12
"""Of so many units all keep-lists are looked at."""
FAILURES, FEWER_FAILURES = 16, 8
"""Measurements in a row that do not pass, before it ends: usually, and where only a great saving is of use."""

Proposal = tuple[float, float, KeepSet]
"""What it promises, its chance, and the keep-list."""


def exchange(
    ledger: Ledger, gains: Gains, kept: KeepSet, hard: KeepSet, *, max_evaluations: float, patience: int = FAILURES
) -> KeepSet:
    """The cheapest keep-list that was found to pass, `kept` if there is none cheaper.

    Args:
        ledger: what measures; its problem gates a drift.
        gains: the energies of the parts.
        kept: passes.
        hard: of it, what must stay.
        max_evaluations: at most.
        patience: measurements in a row that do not pass, before it ends.
    """
    assert ledger.landscape is not None
    kept = ledger.problem.canonical(kept)
    end = ledger.evaluations + max_evaluations
    surrogate = _surrogate(ledger, gains)
    few = _Handful(ledger.landscape, hard) if len(ledger.landscape.parts.units) <= HANDFUL else None
    failures = 0
    while failures < patience and ledger.evaluations + 1 <= end:
        proposal, chance = _propose(ledger, surrogate, kept, hard, few)
        price = ledger.problem.cost(kept)
        if chance < LEAST_CHANCE or chance * (price - ledger.problem.cost(proposal)) < LEAST_SAVED * price:
            break
        found = ledger.evaluate(proposal, until="lost")
        if found.passes:
            kept, failures = proposal, 0
        else:
            failures += 1
        if not _is_whole(found):
            break  # what should only add up has lost an output: the surrogate knows nothing of that
        if _is_near(ledger, found):
            surrogate.learn([_measured(ledger, proposal, found)])
    return kept


def _is_whole(found: Evaluation) -> bool:
    """Whether there is something to learn from it."""
    errors = (*found.energies, *found.learnable)
    return found.share == 1.0 and not found.lost and bool(found.energies) and bool(np.isfinite(errors).all())


def _learnable(found: Evaluation) -> float:
    """Drift of the worst output without the samples that are held out."""
    return math.sqrt(max(found.learnable, default=found.drift**2))


def _is_near(ledger: Ledger, found: Evaluation) -> bool:
    """Whether the surrogate's energies reach so far: beyond, each counts for less than it is."""
    return _learnable(found) ** 2 <= LARGEST * ledger.limit**2


def _measured(ledger: Ledger, kept: KeepSet, found: Evaluation) -> Measured:
    assert ledger.landscape is not None
    gate = ledger.limit**2
    return Measured(
        ledger.landscape.parts.thrown(kept), np.array(found.learnable) / gate, np.array(found.energies) / gate
    )


def _surrogate(ledger: Ledger, gains: Gains) -> Surrogate:
    """With everything that was measured as a whole."""
    assert ledger.landscape is not None
    surrogate = Surrogate(gains.expected / ledger.limit**2, gains.variances)
    whole = {kept: found for kept, found in ledger.history if _is_whole(found) and _is_near(ledger, found)}
    if whole:
        order = sorted(whole, key=lambda kept: (abs(_learnable(whole[kept]) - ledger.limit), sorted(kept)))
        nearest = set(order[:MOST_LEARNT])
        surrogate.learn([_measured(ledger, kept, whole[kept]) for kept in whole if kept in nearest])
    return surrogate


class _Handful:
    """All keep-lists of a few units: masks [keep-lists, units], their prices, and which roundings happen with each."""

    def __init__(self, landscape: Landscape, hard: KeepSet) -> None:
        parts = landscape.parts
        numbers = np.arange(1 << len(parts.units))
        masks = (numbers[:, None] >> np.arange(len(parts.units))) & 1 == 1
        masks = masks[masks[:, parts.mask(hard)].all(axis=1)]
        self._units = parts.units
        self._masks = masks
        self._prices = np.array([landscape.price(self._keep_set(number)) for number in range(len(masks))])
        self._thrown = np.stack([parts.missing(mask) > 0 for mask in masks])

    def _keep_set(self, number: int) -> KeepSet:
        return frozenset(self._units[place] for place in np.flatnonzero(self._masks[number]))

    def best(
        self, ledger: Ledger, surrogate: Surrogate, price: float, measured: Collection[KeepSet]
    ) -> Proposal | None:
        """The one that promises most below a price, if there is any."""
        chances = surrogate.chances(self._thrown @ surrogate.features)
        worth = (price - self._prices) * chances**2
        for number in np.argsort(-worth, kind="stable"):
            if not worth[number] > 0 or chances[number] < LEAST_CHANCE:
                break
            proposal = ledger.problem.canonical(self._keep_set(int(number)))
            if proposal not in measured:
                return float(worth[number]), float(chances[number]), proposal
        return None


def _propose(
    ledger: Ledger, surrogate: Surrogate, kept: KeepSet, hard: KeepSet, few: _Handful | None
) -> tuple[KeepSet, float]:
    """What promises most among what was not measured yet, and its chance of passing."""
    assert ledger.landscape is not None
    price = ledger.problem.cost(kept)
    measured = {known for known, _ in ledger.history}
    start = Walk(ledger.landscape, surrogate, kept, hard, measured)
    walks = list(_cheaper(start))
    for near in _near_misses(ledger, price, hard):
        walk = Walk(ledger.landscape, surrogate, near, hard, measured)
        walk.limit = _below(start.price)
        walks += [walk] if walk.let_go() else []
    walks.sort(key=lambda walk: -(start.price - walk.price) * walk.chance**2)
    looked_up = None if few is None else few.best(ledger, surrogate, price, measured)
    found: list[Proposal] = [] if looked_up is None else [looked_up]
    for walk in walks[:TRIED_WELL]:
        for better in (walk, walk.exchanged(DEPTH)):
            proposal = ledger.problem.canonical(better.keep_set)
            saved = price - ledger.problem.cost(proposal)
            if proposal not in measured and saved > 0:
                found.append((saved * better.chance**2, better.chance, proposal))
    if not found:
        return kept, 0.0
    _, chance, proposal = max(found, key=lambda each: (each[0], sorted(each[2])))
    return proposal, chance


def _near_misses(ledger: Ledger, price: float, hard: KeepSet) -> list[KeepSet]:
    """Cheaper ones that were measured and failed by little: from there, other valleys are in reach."""
    found = [
        (_learnable(measured), sorted(kept))
        for kept, measured in ledger.history
        if _is_whole(measured)
        and measured.drift > ledger.limit
        and _learnable(measured) <= NEAR * ledger.limit
        and hard <= kept
        and ledger.problem.cost(kept) < price
    ]
    return [frozenset(kept) for _, kept in sorted(found)[:NEAR_STARTS]]


def _below(price: float) -> float:
    return price - 1e-9 * abs(price)


def _cheaper(start: Walk) -> Iterator[Walk]:
    """One walk a saving, each goes on where the last one ended."""
    walk = start.copy()
    for saving in SAVINGS:
        walk.limit = _below(start.price * (1 - saving))
        if not walk.let_go():
            return
        yield walk.copy()

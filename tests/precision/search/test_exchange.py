"""Exchange: what it gives passes, is never dearer than what it was given, and is cheaper where errors interact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from mpdeploy.precision.search.driver import search
from mpdeploy.precision.search.exchange import exchange
from mpdeploy.precision.search.gains import Gains, estimate_gains
from mpdeploy.precision.search.ledger import Ledger
from mpdeploy.precision.search.synthetic import NUM_HELD_OUT, NUM_SAMPLES, SyntheticProblem, synthetic_problem
from mpdeploy.precision.search.types import Evaluation, KeepSet, Until


def _gains(ledger: Ledger, problem: SyntheticProblem) -> Gains:
    all_half = ledger.evaluate(frozenset(), until="lost").energies
    return estimate_gains(ledger, all_half=all_half, target=problem.limit**2, budget=30.0, seed=0)


@pytest.mark.parametrize("seed", range(4))
def test_what_sorting_keeps_is_made_cheaper_where_errors_interact(seed: int) -> None:
    problem = synthetic_problem(seed=seed, num_units=300, budget=0.25, dimensions=1)
    with Ledger(problem, problem) as ledger:
        gains = _gains(ledger, problem)
        order = sorted(problem.units, key=lambda unit: -gains.energies[unit])
        start = next(
            kept for n in range(len(order)) if ledger.evaluate(kept := frozenset(order[:n]), until="lost").passes
        )
        before = ledger.evaluations
        found = exchange(ledger, gains, start, frozenset(), max_evaluations=48)
    assert problem.evaluate(found).passes
    assert len(found) < len(start)
    assert ledger.evaluations - before <= 48


def test_the_whole_search_keeps_less_than_sorting_by_the_true_errors() -> None:
    kept, sorted_by_truth = [], []
    for seed in range(4):
        problem = synthetic_problem(seed=seed, num_units=200, budget=0.25, dimensions=4)
        answer = search(problem, problem)
        assert answer.met
        assert answer.is_minimal
        kept.append(len(answer.kept))
        sorted_by_truth.append(len(problem.true_answer()))
    assert sum(kept) < sum(sorted_by_truth)


def test_held_out_samples_tell_how_much_is_luck() -> None:
    """With few dimensions a search finds errors that cancel on its samples. On fresh ones they would not, and the held-out ones say so."""
    learnt, held_out, fresh = [], [], []
    for seed in range(4):
        problem = synthetic_problem(seed=seed, num_units=200, budget=0.25, dimensions=8)
        answer = search(problem, problem)
        half = [int(unit[1:]) for unit in problem.units if unit not in answer.kept]
        assert problem.errors is not None
        energy = np.square(problem.errors[half].sum(axis=0)).sum(axis=1)
        seen = NUM_SAMPLES - NUM_HELD_OUT
        learnt.append(energy[:seen].mean() / problem.limit**2)
        held_out.append(energy[seen:].mean() / problem.limit**2)
        fresh.append(problem.terms[half].mean(axis=1).sum() / problem.limit**2)  # what random directions add up to
    assert np.mean(learnt) < 0.95 * np.mean(fresh), "what was learnt from looks better than it is"
    assert np.mean(held_out) > np.mean(learnt) + 0.5 * (np.mean(fresh) - np.mean(learnt))


def test_hard_units_stay_whatever_they_cost() -> None:
    problem = synthetic_problem(seed=1, num_units=200, budget=0.5, dimensions=1)
    with Ledger(problem, problem) as ledger:
        gains = _gains(ledger, problem)
        order = sorted(problem.units, key=lambda unit: gains.energies[unit])
        hard = frozenset(order[:5])  # those that add least: nothing but `hard` keeps them
        found = exchange(ledger, gains, frozenset(problem.units), hard, max_evaluations=48)
    assert hard <= found < frozenset(problem.units)


def test_no_evaluations_leave_things_as_they_are() -> None:
    problem = synthetic_problem(seed=1, num_units=200, budget=0.5)
    with Ledger(problem, problem) as ledger:
        gains = _gains(ledger, problem)
        before = ledger.evaluations
        everything = frozenset(problem.units)
        assert exchange(ledger, gains, everything, frozenset(), max_evaluations=0.5) == everything
        assert ledger.evaluations == before


@dataclass(frozen=True)
class Twofold(SyntheticProblem):
    """Two outputs: the units of even number are felt at the first one only, the others at the second one."""

    def _energies(self, kept: KeepSet) -> tuple[float, float]:
        half = [int(unit[1:]) for unit in self.injected if unit not in kept]
        energy = self.terms.mean(axis=1)
        return (float(sum(energy[u] for u in half if u % 2 == 0)), float(sum(energy[u] for u in half if u % 2)))

    def evaluate(self, kept: KeepSet, samples: Sequence[int] | None = None, *, until: Until = "gate") -> Evaluation:
        energies = self._energies(kept)
        drift = math.sqrt(max(energies))
        share = 1.0 if samples is None else len(samples) / self.num_samples
        return Evaluation(drift, drift <= self.limit, False, drift, share, energies, energies)

    def probe(self, item: str, samples: Sequence[int]) -> tuple[float, float]:
        energy = float(self.terms[int(item[1:]), list(samples)].mean())
        return (energy, 0.0) if int(item[1:]) % 2 == 0 else (0.0, energy)


def _twofold(seed: int) -> tuple[Twofold, int]:
    """The problem and the size of its best answer: each output's largest energies, as many as that output needs."""
    whole = synthetic_problem(seed=seed, num_units=200, budget=0.1)
    fields: Mapping[str, object] = {name: getattr(whole, name) for name in SyntheticProblem.__dataclass_fields__}
    problem = replace(Twofold(**fields), limit=whole.limit)  # type: ignore[arg-type]
    energy, best = problem.terms.mean(axis=1), 0
    for parity in (0, 1):
        mine = np.sort(energy[parity::2])
        best += int((np.cumsum(mine) > problem.limit**2).sum())
    return problem, best


@pytest.mark.parametrize("seed", range(4))
def test_each_output_has_its_own_budget(seed: int) -> None:
    """What only one output feels need not be kept for the other one's sake."""
    problem, best = _twofold(seed)
    answer = search(problem, problem)
    assert answer.met
    assert max(problem.evaluate(answer.kept).energies) <= problem.limit**2
    assert len(answer.kept) <= 1.1 * best + 1

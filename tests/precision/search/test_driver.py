"""The search on synthetic problems with known answers: within the issue's budgets, deterministic, resumable, honest."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from mpdeploy.errors import UsageError
from mpdeploy.precision.search.driver import Effort, search
from mpdeploy.precision.search.synthetic import SyntheticProblem, synthetic_problem
from mpdeploy.precision.search.types import Evaluation, KeepSet, SearchProgress, Until

BUDGET_EVALUATIONS = 60


@pytest.mark.parametrize("budget", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("seed", range(6))
def test_additive_error_is_solved_near_the_optimum_in_sixty_evaluations(budget: float, seed: int) -> None:
    problem = synthetic_problem(seed=seed, budget=budget)
    answer = search(problem, problem, max_evaluations=BUDGET_EVALUATIONS)
    best = len(problem.true_answer())
    assert answer.met
    assert answer.evaluations <= BUDGET_EVALUATIONS
    assert len(answer.kept) <= max(1.1 * best, best + 1)
    assert problem.evaluate(answer.kept).passes


def test_known_errors_alone_would_not_do() -> None:
    """The control: ranked by what is injected, without probes, far more is kept."""
    problem = synthetic_problem(seed=0, budget=0.5)
    order = sorted(problem.units, key=lambda unit: -problem.injected[unit])
    count = next(n for n in range(1000) if problem.evaluate(frozenset(order[:n])).passes)
    assert count > 1.5 * len(problem.true_answer())


@pytest.mark.parametrize("seed", range(3))
def test_traps_and_additive_error_together_are_solved(seed: int) -> None:
    problem = synthetic_problem(seed=seed, num_units=500, num_traps=5, num_pairs=2, budget=0.5)
    answer = search(problem, problem)
    best = len(problem.true_answer())
    assert answer.met
    assert answer.is_minimal
    assert problem.traps <= answer.kept
    assert len(answer.kept) <= 1.1 * best + 1
    assert answer.evaluations < 200


def test_without_known_parts_pass_or_fail_is_enough() -> None:
    problem = synthetic_problem(seed=3, num_traps=5)
    answer = search(problem)
    assert answer.kept == problem.traps
    assert answer.is_minimal
    assert answer.evaluations <= 60


def test_each_kept_unit_is_shown_to_be_needed() -> None:
    problem = synthetic_problem(seed=1, budget=0.5)
    answer = search(problem, problem)
    assert answer.is_minimal
    assert {proof.unit for proof in answer.proofs} == answer.kept
    for proof in answer.proofs:
        truth = problem.evaluate(answer.kept - {proof.unit}).drift
        assert truth > problem.limit
        assert (proof.samples, proof.is_shown) == (problem.num_samples, True)
        assert proof.drift_without == pytest.approx(truth, rel=1e-6)


def test_where_evaluations_are_short_an_estimate_is_no_proof() -> None:
    problem = synthetic_problem(seed=1, budget=0.1)
    answer = search(problem, problem, max_evaluations=BUDGET_EVALUATIONS)
    estimated = [proof for proof in answer.proofs if proof.samples < problem.num_samples]
    assert estimated
    assert not any(proof.is_shown for proof in estimated)
    assert not answer.is_minimal


@pytest.mark.parametrize("budget", [0.9, 0.5])
@pytest.mark.parametrize("seed", range(6, 10))
def test_no_proof_is_wrong_where_samples_differ(budget: float, seed: int) -> None:
    """Samples of very unequal error: the part that is looked at may be far from the whole."""
    problem = synthetic_problem(seed=seed, num_units=300, budget=budget, sample_shape=0.5)
    answer = search(problem, problem)
    assert answer.is_minimal
    for proof in answer.proofs:
        assert not problem.evaluate(answer.kept - {proof.unit}).passes


def test_the_pareto_front_falls_and_holds_the_answer() -> None:
    problem = synthetic_problem(seed=2, budget=0.5)
    answer = search(problem, problem)
    costs = [point.cost for point in answer.pareto]
    drifts = [point.drift for point in answer.pareto]
    assert costs == sorted(costs)
    assert drifts == sorted(drifts, reverse=True)
    assert any(point.kept == answer.kept for point in answer.pareto)


def test_a_gate_that_all_half_meets_keeps_nothing() -> None:
    problem = replace(synthetic_problem(seed=0, budget=0.5), limit=1.0)
    answer = search(problem, problem)
    assert answer.kept == frozenset()
    assert answer.evaluations == 1


# ---- the thing itself differs a little from what stands in for it


class Doubtful(SyntheticProblem):
    """The thing itself drifts up to 2 % more or less than `evaluate` says, as sums in another order do."""

    def confirm(self, kept: KeepSet) -> float:
        chance = np.random.default_rng([len(kept), *(int(unit[1:]) for unit in sorted(kept))]).uniform(-0.02, 0.02)
        return self.evaluate(kept).drift * (1 + chance)


def _doubtful(seed: int, budget: float) -> Doubtful:
    problem = synthetic_problem(seed=seed, num_units=200, budget=budget, dimensions=1)
    return Doubtful(**{name: getattr(problem, name) for name in SyntheticProblem.__dataclass_fields__})


@pytest.mark.parametrize("budget", [0.5, 0.2])
@pytest.mark.parametrize("seed", range(2))
def test_the_thing_itself_meets_the_gate_and_does_not_without_any_kept_unit(seed: int, budget: float) -> None:
    problem = _doubtful(seed, budget)
    answer = search(problem, problem)
    assert answer.met
    assert problem.confirm(answer.kept) <= problem.limit
    assert answer.is_minimal
    for proof in answer.proofs:
        without = answer.kept - {proof.unit}
        assert max(problem.confirm(without), problem.evaluate(without).drift) > problem.limit
        assert proof.drift_without > problem.limit


@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_unit_that_went_late_takes_no_proof_of_another_with_it(dimensions: int) -> None:
    """Where errors cancel, what one unit is worth changes when another goes: in one of five such problems for the worse."""
    for seed in range(12):
        problem = synthetic_problem(seed=seed, num_units=100, budget=0.3, dimensions=dimensions, gain_sigma=1.9)
        problem = Doubtful(**{name: getattr(problem, name) for name in SyntheticProblem.__dataclass_fields__})
        answer = search(problem, problem, effort=Effort(exchange=0))
        assert answer.met
        assert answer.is_minimal
        for unit in answer.kept:
            without = answer.kept - {unit}
            assert max(problem.confirm(without), problem.evaluate(without).drift) > problem.limit, (seed, unit)


class FivePercentMore(SyntheticProblem):
    """The thing itself drifts more than what stands in for it, everywhere."""

    confirmed: ClassVar[list[float]] = []

    def confirm(self, kept: KeepSet) -> float:
        self.confirmed.append(1.05 * self.evaluate(kept).drift)
        return self.confirmed[-1]


def _five_percent_more(limit: float | None = None) -> FivePercentMore:
    problem = synthetic_problem(seed=3, num_units=300, budget=0.5)
    fields = {name: getattr(problem, name) for name in SyntheticProblem.__dataclass_fields__}
    return FivePercentMore(**{**fields, "limit": limit or problem.limit})


def test_all_half_is_confirmed_too() -> None:
    problem = _five_percent_more()
    problem = _five_percent_more(limit=1.01 * problem.evaluate(frozenset()).drift)
    answer = search(problem, problem)
    assert answer.met
    assert answer.kept
    assert 1.05 * problem.evaluate(answer.kept).drift <= problem.limit


@pytest.mark.parametrize("evaluations", range(20, 70, 6))
def test_a_search_that_is_stopped_answers_with_what_was_confirmed(evaluations: int) -> None:
    problem = _five_percent_more()
    problem.confirmed.clear()
    answer = search(problem, problem, max_evaluations=evaluations)
    assert answer.met
    if any(drift <= problem.limit for drift in problem.confirmed):
        assert 1.05 * problem.evaluate(answer.kept).drift <= problem.limit


@dataclass(frozen=True)
class Metric(SyntheticProblem):
    """A drop of a metric, which noise makes negative for one size of keep-list; and there the thing itself is worse."""

    gates_drift = False
    largest_drift: float = 0.0
    unlucky: int = -1

    def evaluate(self, kept: KeepSet, samples: Sequence[int] | None = None, *, until: Until = "gate") -> Evaluation:
        found = super().evaluate(kept, samples, until=until)
        drop = 0.1 if found.drift > self.largest_drift else -0.01 if len(kept) == self.unlucky else 0.0
        return replace(found, measured=drop, passes=drop <= self.limit)

    def confirm(self, kept: KeepSet) -> float:
        drop = self.evaluate(kept).measured
        return drop + 0.013 if drop < 0 else drop


def test_a_metric_that_is_refuted_once_does_not_keep_everything() -> None:
    problem = synthetic_problem(seed=0, num_units=200, budget=0.3)
    fields = {name: getattr(problem, name) for name in SyntheticProblem.__dataclass_fields__}
    fields |= {"limit": 0.002, "largest_drift": problem.limit}
    honest = search(lucky := Metric(**fields), lucky)
    unlucky = Metric(**fields, unlucky=len(honest.kept))
    answer = search(unlucky, unlucky)
    assert answer.met
    assert unlucky.confirm(answer.kept) <= unlucky.limit
    assert len(answer.kept) <= len(honest.kept) + 3


def test_a_hair_too_much_costs_few_units() -> None:
    """Beside the same problem whose stand-in tells the truth."""
    kept = {True: 0, False: 0}
    for seed in range(3):
        doubtful = _doubtful(seed, 0.3)
        honest = SyntheticProblem(**{name: getattr(doubtful, name) for name in SyntheticProblem.__dataclass_fields__})
        for problem in (doubtful, honest):
            kept[problem is doubtful] += len(search(problem, problem).kept)
    assert kept[True] <= 1.05 * kept[False]


def test_a_stand_in_that_is_far_off_ends_honestly() -> None:
    """The thing itself drifts half as much again: the limit is lowered until it passes, or the answer says that it does not."""

    class FarOff(SyntheticProblem):
        def confirm(self, kept: KeepSet) -> float:
            return 1.5 * self.evaluate(kept).drift

    problem = synthetic_problem(seed=1, num_units=300, budget=0.5)
    far = FarOff(**{name: getattr(problem, name) for name in SyntheticProblem.__dataclass_fields__})
    answer = search(far, far)
    assert answer.met
    assert far.confirm(answer.kept) <= far.limit


# ---- determinism, replay, resume


def test_the_same_seed_takes_the_same_steps(tmp_path: Path) -> None:
    problem = synthetic_problem(seed=4, num_units=300, num_traps=2, budget=0.3)
    logs = []
    for name in ("a", "b"):
        search(problem, problem, seed=7, log=tmp_path / name)
        logs.append((tmp_path / name).read_text())
    assert logs[0] == logs[1]
    search(problem, problem, seed=8, log=tmp_path / "c")
    assert (tmp_path / "c").read_text() != logs[0]


@dataclass(frozen=True)
class Counted(SyntheticProblem):
    """Dies after some measurements, as a kill would end it."""

    lives: tuple[list[int], ...] = ()

    def _spend(self) -> None:
        self.lives[0][0] -= 1
        if self.lives[0][0] < 0:
            raise KeyboardInterrupt

    def evaluate(self, kept: KeepSet, samples: Sequence[int] | None = None, *, until: Until = "gate") -> Evaluation:
        self._spend()
        return super().evaluate(kept, samples, until=until)

    def probe(self, item: str, samples: Sequence[int]) -> tuple[float, ...]:
        self._spend()
        return super().probe(item, samples)


def _mortal(problem: SyntheticProblem, lives: int) -> Counted:
    return Counted(**{name: getattr(problem, name) for name in SyntheticProblem.__dataclass_fields__}, lives=([lives],))


def test_a_killed_search_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = synthetic_problem(seed=5, num_units=500, num_traps=3, budget=0.5)
    expected = search(whole, whole)
    log = tmp_path / "search.jsonl"
    runs = 0
    while True:
        mortal = _mortal(whole, lives=150)
        runs += 1
        try:
            answer = search(mortal, mortal, log=log)
            break
        except KeyboardInterrupt:
            with log.open("a") as file:
                file.write('{"key": "e12')  # what a kill leaves of a line
    assert runs > 2
    assert answer.replayed > 0
    assert answer.kept == expected.kept
    assert answer.evaluations == pytest.approx(expected.evaluations)


def test_a_finished_log_replays_without_measuring(tmp_path: Path) -> None:
    problem = synthetic_problem(seed=6, budget=0.5)
    log = tmp_path / "search.jsonl"
    first = search(problem, problem, log=log)
    mortal = _mortal(problem, lives=0)
    again = search(mortal, mortal, log=log)
    assert again.kept == first.kept
    assert again.proofs == first.proofs
    assert [json.loads(line) for line in log.read_text().splitlines()]


STEPS = """
from mpdeploy.precision.search.driver import QUICK, search
from mpdeploy.precision.search.synthetic import synthetic_problem
problem = synthetic_problem(seed=2, num_units=500, budget=0.05, dimensions=4)
answer = search(problem, problem, effort=QUICK)
print(answer.evaluations, *sorted(answer.kept))
"""


def test_another_process_takes_the_same_steps() -> None:
    """Python orders sets of strings anew in each."""
    said = {
        subprocess.run(
            [sys.executable, "-c", STEPS],
            env={**os.environ, "PYTHONHASHSEED": str(number)}, capture_output=True, text=True, check=True,
        ).stdout
        for number in (1, 2, 3)
    }  # fmt: skip
    assert len(said) == 1


def test_the_log_of_another_problem_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "search.jsonl"
    first, second = synthetic_problem(seed=1, num_traps=1), synthetic_problem(seed=2, num_traps=1)
    search(first, log=log)
    with pytest.raises(UsageError, match="another model"):
        search(second, log=log)


def test_a_kill_leaves_the_best_answer_so_far() -> None:
    problem = synthetic_problem(seed=5, budget=0.5)
    best: list[int] = []
    mortal = _mortal(problem, lives=970)
    with pytest.raises(KeyboardInterrupt):
        search(mortal, mortal, on_best=lambda found: best.append(len(found.kept)))
    assert best == sorted(best, reverse=True) != []


# ---- limits


def test_evaluations_that_run_out_end_in_the_best_valid_answer() -> None:
    problem = synthetic_problem(seed=3, budget=0.5)
    answer = search(problem, problem, max_evaluations=12)
    assert answer.evaluations <= 13
    assert answer.met
    assert problem.evaluate(answer.kept).passes
    assert not answer.is_minimal


def test_traps_that_run_out_of_evaluations_leave_a_valid_answer() -> None:
    problem = synthetic_problem(seed=3, num_traps=20)
    answer = search(problem, max_evaluations=40)
    assert answer.stopped
    assert not problem.evaluate(answer.kept).lost
    assert not answer.is_minimal


class Unreachable(SyntheticProblem):
    """Even everything in FP32 drifts."""

    def evaluate(self, kept: KeepSet, samples: Sequence[int] | None = None, *, until: Until = "gate") -> Evaluation:
        found = super().evaluate(kept, samples, until=until)
        drift = math.hypot(found.drift, 1e-3)
        return replace(found, drift=drift, measured=drift, passes=drift <= self.limit)


def test_an_unreachable_gate_ends_with_the_best_reached() -> None:
    easy = synthetic_problem(seed=0, budget=0.5)
    fields = {name: getattr(easy, name) for name in SyntheticProblem.__dataclass_fields__}
    problem = Unreachable(**{**fields, "limit": 5e-4})
    answer = search(problem, problem)
    assert not answer.met
    assert answer.evaluation.drift == pytest.approx(1e-3)
    assert answer.evaluations < 50


def test_progress_tells_evaluations_best_and_time_left() -> None:
    problem = synthetic_problem(seed=0, budget=0.5)
    told: list[SearchProgress] = []
    answer = search(problem, problem, on_progress=told.append)
    assert [report.evaluations for report in told] == sorted(report.evaluations for report in told)
    assert told[-1].best == len(answer.kept)
    assert {"all half", "gains", "prefix", "proof"} <= {report.phase for report in told}
    assert any(report.seconds_left is not None for report in told)

"""Proofs: what goes, what is named, and what each evaluation is spent on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from mpdeploy.precision.search.ledger import Ledger
from mpdeploy.precision.search.soft import IN_A_ROW, prove
from mpdeploy.precision.search.synthetic import SyntheticProblem, synthetic_problem
from mpdeploy.precision.search.types import Evaluation, KeepSet, Until

Rules = tuple[tuple[frozenset[str], str], ...]
"""(kept, what then is kept too)"""


@dataclass(frozen=True)
class Planned(SyntheticProblem):
    """Where some are kept, the plan keeps others too, to spare casts."""

    rules: Rules = ()
    asked: list[KeepSet] = field(default_factory=list)

    def canonical(self, kept: KeepSet) -> KeepSet:
        found = set(kept)
        while more := {then for given, then in self.rules if given <= found} - found:
            found |= more
        return frozenset(found)

    def evaluate(self, kept: KeepSet, samples: object = None, *, until: Until = "gate") -> Evaluation:
        assert samples is None
        self.asked.append(kept)
        return super().evaluate(kept, until=until)


def _planned(energies: dict[str, float], limit: float, rules: Rules) -> Planned:
    plain = synthetic_problem(seed=0, num_units=len(energies), budget=0.5)
    values = np.repeat(np.array(list(energies.values()))[:, None], plain.num_samples, axis=1)
    fields = {name: getattr(plain, name) for name in ("traps", "groups", "digest")}
    return Planned(values, dict.fromkeys(energies, 1.0), limit=limit**0.5, rules=rules, **fields)


def _prove(problem: Planned, kept: KeepSet) -> tuple[KeepSet, set[str], Ledger]:
    ledger = Ledger(problem, None)
    with ledger:
        named, proofs = prove(ledger, kept, frozenset(), None, max_evaluations=1e9, num_samples=problem.num_samples)
    return named, {proof.unit for proof in proofs if proof.needed}, ledger


@pytest.mark.timeout(20)
def test_what_is_kept_by_others_that_are_named_later_is_not_named() -> None:
    """n0 comes before n1, which keeps it; once the list of names was not the shortest, and letting n0 go changed nothing, for ever."""
    rules = (
        (frozenset({"n1", "n2"}), "n0"),
        (frozenset({"n0", "n2", "n3"}), "n1"),
        (frozenset({"n0", "n1", "n2"}), "n3"),
    )
    problem = _planned({"n0": 1.0, "n1": 1.0, "n2": 10.0, "n3": 1.0}, 1.5, rules)
    kept, needed, _ = _prove(problem, frozenset(problem.units))
    assert kept == {"n1", "n2"}
    assert needed == kept
    assert problem.canonical(kept) == frozenset(problem.units)


def test_units_that_go_together_are_found_before_the_others_are_shown_to_be_needed() -> None:
    """What is shown beside units that go afterwards must be measured again: of 60 needed ones only the few that come first are."""
    rules = ((frozenset({"n0"}), "n1"), (frozenset({"n1"}), "n0"))
    problem = _planned({f"n{i}": 0.01 if i < 2 else 2.0 for i in range(62)}, 1.0, rules)
    kept, needed, ledger = _prove(problem, frozenset(problem.units))
    assert kept == needed == {f"n{i}" for i in range(2, 62)}
    assert {kept - {unit} for unit in kept} <= set(problem.asked)
    assert ledger.evaluations <= 62 + 2 * IN_A_ROW


def test_a_unit_that_goes_late_has_the_others_measured_beside_what_stays() -> None:
    problem = replace(_planned({f"n{i}": 2.0 for i in range(30)} | {"n30": 0.01}, 1.0, ()), asked=[])
    kept, needed, _ = _prove(problem, frozenset(problem.units))
    assert kept == needed == {f"n{i}" for i in range(30)}
    assert {kept - {unit} for unit in kept} <= set(problem.asked)

"""Group testing finds hard causes exactly, in the number of tests that the issue allows."""

from __future__ import annotations

import numpy as np
import pytest

from mpdeploy.precision.search.hard import find_hard, find_hub

UNITS = [f"n{i}" for i in range(1000)]


class LostTest:
    """Counts tests; a set of half units is lost when it holds all of some group."""

    def __init__(self, *groups: frozenset[str]) -> None:
        self.groups = groups
        self.count = 1  # that everything in half is lost was seen before

    def __call__(self, half: frozenset[str]) -> bool:
        self.count += 1
        return any(group <= half for group in self.groups)


def _traps(count: int, seed: int) -> LostTest:
    chosen = np.random.default_rng(seed).choice(len(UNITS), count, replace=False)
    return LostTest(*(frozenset({UNITS[i]}) for i in chosen))


@pytest.mark.parametrize(("count", "limit"), [(1, 14), (5, 60), (20, 200), (100, 700)])
def test_independent_traps_are_found_exactly_within_the_budget(count: int, limit: int) -> None:
    for seed in range(20):
        tests = _traps(count, seed)
        found = find_hard(UNITS, tests)
        assert {frozenset({unit}) for unit in found} == set(tests.groups)
        assert tests.count <= limit, f"seed {seed}"


@pytest.mark.parametrize("position", [0, 1, 499, 500, 998, 999])
def test_one_trap_costs_about_log_n_wherever_it_lies(position: int) -> None:
    tests = LostTest(frozenset({UNITS[position]}))
    assert find_hard(UNITS, tests) == [UNITS[position]]
    assert tests.count <= 12


def test_five_traps_stay_within_halving_wherever_they_lie() -> None:
    """The first five cost at most ceil(log2 n) tests each, and one of the rest after each: no density that is guessed costs more."""
    rng = np.random.default_rng(0)
    spread = [rng.choice(len(UNITS), 5, replace=False) for _ in range(300)]
    close = [start + np.arange(5) for start in (0, 1, 30, 495, 995)]
    geometric = [np.array([15, 31, 62, 125, 250]), np.array([0, 500, 750, 875, 937]), np.array([0, 1, 2, 3, 999])]
    for chosen in [*spread, *close, *geometric]:
        tests = LostTest(*(frozenset({UNITS[i]}) for i in chosen))
        assert {frozenset({unit}) for unit in find_hard(UNITS, tests)} == set(tests.groups)
        assert tests.count <= 1 + 5 * (10 + 1), sorted(chosen)


def test_of_a_pair_that_fails_only_together_one_is_kept() -> None:
    for seed in range(10):
        chosen = np.random.default_rng(seed).choice(len(UNITS), 6, replace=False)
        pairs = [frozenset({UNITS[chosen[i]], UNITS[chosen[i + 1]]}) for i in (0, 2, 4)]
        tests = LostTest(*pairs)
        found = set(find_hard(UNITS, tests))
        assert len(found) == 3
        assert all(len(pair & found) == 1 for pair in pairs)


def test_the_answer_is_one_minimal_for_any_monotone_failure() -> None:
    rng = np.random.default_rng(5)
    for _ in range(30):
        units = UNITS[:30]
        groups = [frozenset(rng.choice(units, rng.integers(1, 5), replace=False).tolist()) for _ in range(6)]
        tests = LostTest(*groups)
        kept = set(find_hard(units, tests))
        half = frozenset(units) - kept
        assert not tests(half)
        assert all(tests(half | {unit}) for unit in kept)


def test_suspects_are_tested_alone_and_the_rest_at_once() -> None:
    traps = {"n10", "n700"}
    tests = LostTest(*(frozenset({unit}) for unit in traps))
    found = find_hard(UNITS, tests, suspicion={"n10": 0.9, "n300": 0.9, "n700": 0.9})
    assert set(found) == traps
    assert tests.count <= 6  # everything but the suspects, then each of them


def test_a_wrong_suspicion_costs_tests_but_no_answer() -> None:
    tests = _traps(3, seed=1)
    suspicion = dict.fromkeys(UNITS[:50], 0.9)
    assert {frozenset({unit}) for unit in find_hard(UNITS, tests, suspicion=suspicion)} == set(tests.groups)


def test_units_that_all_fail_beside_one_other_are_one_cause() -> None:
    tests = LostTest(*(frozenset({"n0", leaf}) for leaf in ("n5", "n6", "n7")))
    found = find_hard(UNITS, tests)
    assert len(found) == 3
    assert find_hub(UNITS, found, tests) == ["n0"]


def test_traps_that_fail_by_themselves_have_no_hub() -> None:
    tests = _traps(4, seed=2)
    found = find_hard(UNITS, tests)
    before = tests.count
    assert find_hub(UNITS, found, tests) is None
    assert tests.count == before + 1

"""Walking on the surrogate: what stands or falls together moves together, prices are kept to, and a better valley is found."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from mpdeploy.precision.search.parts import Parts
from mpdeploy.precision.search.surrogate import Surrogate
from mpdeploy.precision.search.types import Candidate, KeepSet
from mpdeploy.precision.search.walk import Walk


class Visible:
    """A landscape that is written down: who holds back what, and what each unit costs."""

    injected: Mapping[str, float] = {}
    num_samples = samples_a_probe = 1
    max_probes = 0.0

    def __init__(self, needs: Mapping[str, tuple[str, ...]], prices: Mapping[str, float]) -> None:
        self.parts = Parts(list(prices), needs)
        self._prices = prices

    def probe(self, item: str, samples: object) -> tuple[float, ...]:
        raise AssertionError("a walk measures nothing")

    def front(self, energies: Mapping[str, float], hard: KeepSet) -> list[Candidate]:
        raise AssertionError("a walk needs no front")

    def price(self, kept: KeepSet) -> float:
        return sum(self._prices[unit] for unit in kept)

    def price_changes(self, kept: KeepSet) -> Mapping[str, float]:
        return {unit: -price if unit in kept else price for unit, price in self._prices.items()}


def _walk(
    needs: Mapping[str, tuple[str, ...]],
    energies: Mapping[str, float],
    kept: set[str],
    *,
    prices: Mapping[str, float] | None = None,
    locked: frozenset[str] = frozenset(),
) -> Walk:
    units = dict.fromkeys((unit for of_item in needs.values() for unit in of_item), 1.0)
    landscape = Visible(needs, prices or units)
    column = np.array([[energies[item]] for item in needs])
    return Walk(landscape, Surrogate(column, np.full_like(column, 0.01)), frozenset(kept), locked)


CHAIN = {"chain": ("matmul", "transpose", "reshape", "next"), "alone": ("other",), "next out": ("next",)}
"""A rounding on a chain of moves happens as soon as one of its four units is half."""


def test_a_chain_is_taken_back_as_one() -> None:
    """One unit of it gains nothing by itself; all of them together gain the most."""
    walk = _walk(CHAIN, {"chain": 0.9, "alone": 0.2, "next out": 0.1}, set())
    walk.take_back(1)
    assert walk.keep_set in ({"other"}, {"next"}, {"matmul", "transpose", "reshape", "next"})
    walk = _walk(CHAIN, {"chain": 2.0, "alone": 0.01, "next out": 0.01}, set())
    taken = walk.take_back(1)
    assert walk.keep_set == {"matmul", "transpose", "reshape", "next"}
    assert taken.sum() == 4


def test_what_holds_back_nothing_any_more_is_let_go_along() -> None:
    walk = _walk(
        CHAIN, {"chain": 0.05, "alone": 0.9, "next out": 0.9}, {"matmul", "transpose", "reshape", "next", "other"}
    )
    walk.limit = 2.0
    assert walk.let_go()
    assert walk.keep_set == {"next", "other"}, "the moves and the product go for the price of one rounding"


def test_what_is_locked_or_spared_stays() -> None:
    energies = {"chain": 0.001, "alone": 0.01, "next out": 0.9}
    kept = {"matmul", "transpose", "reshape", "next", "other"}
    walk = _walk(CHAIN, energies, kept, locked=frozenset({"transpose"}))
    walk.limit = 3.0
    assert walk.let_go()
    assert "transpose" in walk.keep_set
    walk = _walk(CHAIN, energies, kept)
    walk.limit = 4.0
    assert walk.let_go(walk.kept & ~Parts(["matmul", "transpose", "reshape", "next", "other"], CHAIN).mask({"other"}))
    assert walk.keep_set == kept - {"other"}
    walk.limit = 0.0
    spared = np.ones(5, dtype=bool)
    assert not walk.let_go(spared), "nothing may go"


def test_a_copy_goes_its_own_way() -> None:
    walk = _walk(CHAIN, dict.fromkeys(CHAIN, 0.1), {"matmul", "transpose", "reshape", "next", "other"})
    other = walk.copy()
    other.limit = 0.0
    assert other.let_go()
    assert other.keep_set == frozenset()
    assert len(walk.keep_set) == 5
    assert walk.price == 5.0


def test_an_exchange_is_never_dearer_never_worse_and_mostly_the_best_there_is() -> None:
    """Beside all keep-lists of the same price: seven units, a dozen roundings, sixty problems."""
    best_at_once = best_after = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        units = [f"u{number}" for number in range(7)]
        prices = {unit: float(rng.integers(1, 4)) for unit in units}
        needs = {f"i{n}": tuple(rng.choice(units, rng.integers(1, 4), replace=False)) for n in range(12)}
        energies = {item: float(rng.lognormal(-2.0, 1.0)) for item in needs}
        walk = _walk(needs, energies, set(units), prices=prices)
        walk.limit = sum(prices.values()) / 2
        assert walk.let_go()
        better = walk.exchanged(4)
        assert better.price <= walk.limit
        assert better.value >= walk.value
        affordable = [
            frozenset(chosen)
            for size in range(8)
            for chosen in itertools.combinations(units, size)
            if sum(prices[unit] for unit in chosen) <= walk.limit
        ]
        parts = Parts(units, needs)
        least = min(parts.energy(energies, kept) for kept in affordable)
        best_at_once += parts.energy(energies, walk.keep_set) <= least * (1 + 1e-9)
        best_after += parts.energy(energies, better.keep_set) <= least * (1 + 1e-9)
    assert best_after >= 42, "seven in ten"
    assert best_after > best_at_once + 15, "letting go alone finds far fewer"

"""Which roundings a keep-list lets happen, what they add up to, and what labellings cost: against their definitions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from mpdeploy.precision.borders import CAST_BYTES
from mpdeploy.precision.flow import Edge, Flow, Unit
from mpdeploy.precision.search.parts import Parts
from mpdeploy.precision.search.prices import Prices

UNITS = ["a", "b", "c"]
NEEDS = {"constants of a": ("a",), "a -> b": ("a", "b"), "b -> c": ("b", "c"), "c -> output": ("c", "output")}
ENERGIES = {"constants of a": 1.0, "a -> b": 2.0, "b -> c": 4.0, "c -> output": 8.0}


def _thrown(needs: Mapping[str, tuple[str, ...]], kept: set[str]) -> set[str]:
    """By definition: an item happens as soon as one of its units is half."""
    return {item for item, units in needs.items() if not kept.issuperset(units)}


@pytest.mark.parametrize("kept", [set(), {"a"}, {"a", "b"}, {"b"}, {"a", "b", "c"}])
def test_an_item_happens_as_soon_as_one_of_its_units_is_half(kept: set[str]) -> None:
    parts = Parts(UNITS, NEEDS)
    happens = {item for item, thrown in zip(parts.items, parts.thrown(kept), strict=True) if thrown}
    assert happens == _thrown(NEEDS, kept)
    assert "c -> output" in happens, "no unit keeps the output"
    assert parts.energy(ENERGIES, kept) == sum(ENERGIES[item] for item in happens)


def test_a_marginal_is_what_one_kept_unit_alone_holds_back() -> None:
    parts = Parts(UNITS, NEEDS)
    kept = {"a", "b"}
    expected = {unit: parts.energy(ENERGIES, kept - {unit}) - parts.energy(ENERGIES, kept) for unit in kept}
    assert parts.marginals(ENERGIES, kept) == expected == {"a": 3.0, "b": 2.0}


@pytest.mark.parametrize("seed", range(8))
def test_flips_are_what_changes_when_one_unit_changes_sides(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = [f"u{number}" for number in range(8)]
    needs = {
        f"i{number}": tuple(rng.choice([*units, "stuck"], rng.integers(1, 4), replace=False)) for number in range(20)
    }
    parts = Parts(units, needs)
    kept = {unit for unit in units if rng.random() < 0.5}
    mask = parts.mask(kept)
    flips = parts.flips(mask, parts.missing(mask))
    for place, unit in enumerate(units):
        before, after = _thrown(needs, kept), _thrown(needs, kept ^ {unit})
        changed = {
            parts.items[column]: int(flip)
            for row, column, flip in zip(parts.rows, parts.columns, flips, strict=True)
            if row == place and flip
        }
        assert changed == dict.fromkeys(after - before, 1) | dict.fromkeys(before - after, -1)


def _flow(seed: int) -> Flow:
    rng = np.random.default_rng(seed)
    flow = Flow()
    for number in range(7):
        flow.add(Unit(f"u{number}"))
    for producer in range(6):
        takers = rng.permutation(np.arange(producer + 1, 7))[: rng.integers(0, 4)]
        flow.edges.append(
            Edge(
                None,  # type: ignore[arg-type]
                producer,
                always_float=bool(rng.random() < 0.2),
                consumers=[int(unit) for unit in takers] * 2,  # a unit may take a tensor twice: one cast
                float_consumers=bool(rng.random() < 0.3),
                size=float(rng.integers(1, 9)),
            )
        )
    return flow


def _cost(flow: Flow, prices: dict[str, float], cast: float, half: set[str]) -> float:
    """By definition: FP32 units that have a price, and one cast for each tensor that someone takes in the other precision."""
    cost = sum(price for key, price in prices.items() if key not in half)
    for edge in flow.edges:
        made_half = flow.units[edge.producer].key in half and not edge.always_float
        takers = [flow.units[unit].key in half for unit in edge.consumers] + [False] * edge.float_consumers
        cost += cast * CAST_BYTES * edge.size * any(taker != made_half for taker in takers)
    return cost


@pytest.mark.parametrize("cast", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_prices_and_their_changes_are_those_of_the_definition(seed: int, cast: float) -> None:
    rng = np.random.default_rng(seed)
    flow = _flow(seed)
    priced = {unit.key: float(rng.integers(1, 9)) for unit in flow.units[1:]}  # the first one is kept by a rule
    prices = Prices(flow, priced, cast)
    keys = {unit.key for unit in flow.units}
    for _ in range(10):
        half = {key for key in keys if rng.random() < 0.5}
        cost = _cost(flow, priced, cast, half)
        assert prices.cost(half) == pytest.approx(cost)
        expected = {key: _cost(flow, priced, cast, half ^ {key}) - cost for key in keys}
        assert prices.changes(half) == pytest.approx(expected)

"""A keep-list on its way to a better one, on the surrogate alone: a step costs about a millisecond, and nothing is measured.

A step changes units that stand or fall together. A rounding is held back by all the units that it needs, so one of them alone gains
nothing: they are taken back as a group. And a unit that is let go takes those with it that hold nothing back any more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpdeploy.precision.search.parts import Bools, Floats
from mpdeploy.precision.search.surrogate import Surrogate
from mpdeploy.precision.search.types import KeepSet, Landscape

MAX_GROUP = 12
"""Units that are taken back in one step, at most."""
FREE = 1e9
"""What a gain is worth that costs nothing, against one that costs one."""


@dataclass(frozen=True)
class _Steps:
    """Steps that may be taken next.

    Attributes:
        of, units: [pairs], step and unit that changes sides in it; sorted by step.
        numbers: [steps], as in `of`.
        values: [steps], the value after each.
        prices: [steps], what each does to the price, about.
    """

    of: NDArray[np.intp]
    units: NDArray[np.intp]
    numbers: NDArray[np.intp]
    values: Floats
    prices: Floats


class Walk:
    """A keep-list, with what the surrogate needs to know of it.

    Args:
        landscape: its parts and prices.
        surrogate: says how likely a keep-list passes.
        kept: where the walk begins.
        locked: units that are never let go.
        refused: keep-lists that are no place to stop at: they were measured already.

    Attributes:
        kept: [units], mask.
        price: of what is kept now.
        limit: the price to come down to.
    """

    def __init__(
        self,
        landscape: Landscape,
        surrogate: Surrogate,
        kept: KeepSet,
        locked: KeepSet,
        refused: Collection[KeepSet] = frozenset(),
    ) -> None:
        parts = landscape.parts
        self._landscape, self._surrogate, self._parts = landscape, surrogate, parts
        self._features = surrogate.features
        self._free = ~parts.mask(locked)
        self._refused = refused
        self.limit = math.inf
        self._stand(parts.mask(kept))

    def copy(self) -> Walk:
        """Another walk that goes on from here."""
        return copy.copy(self)  # arrays are replaced, never changed

    @property
    def keep_set(self) -> KeepSet:
        """The keep-list."""
        return frozenset(self._parts.units[place] for place in np.flatnonzero(self.kept))

    @property
    def chance(self) -> float:
        """Of passing."""
        return math.exp(self.value)

    @property
    def worth(self) -> float:
        """The value, or minus infinity where it was measured already."""
        return -math.inf if self.keep_set in self._refused else self.value

    def let_go(self, spared: Bools | None = None) -> bool:
        """Units become half until the price is low enough; False where no more can."""
        while self.price > self.limit:
            steps = self._releases(spared)
            if not steps.values.size:
                return False
            best = int(np.argmin((self.value - steps.values) / -steps.prices))
            self._take(steps, best)
        return True

    def take_back(self, count: int) -> Bools:
        """So many groups become FP32 again, those that raise the value most for their price; returns who did."""
        taken = np.zeros_like(self.kept)
        for _ in range(count):
            steps = self._returns()
            if not steps.values.size:
                break
            gained = steps.values - self.value
            worth = np.where(steps.prices > 0, gained / np.where(steps.prices > 0, steps.prices, 1.0), gained * FREE)
            before = self.kept
            self._take(steps, int(np.argmax(worth)))
            taken |= self.kept & ~before
        return taken

    def fill(self) -> None:
        """Take back what raises the value and still fits below the limit."""
        while self.price < self.limit:
            steps = self._returns()
            gained = np.where(self.price + steps.prices <= self.limit, steps.values - self.value, 0.0)
            if not gained.size or gained.max() <= 0:
                return
            self._take(steps, int(np.argmax(gained)))

    def exchanged(self, depth: int) -> Walk:
        """The same price or less, and a better chance: groups taken back, up to so many at once, and others let go for them."""
        best, count = self.copy(), 1
        best.fill()
        while count <= depth:
            walk = best.copy()
            fits = walk.let_go(walk.take_back(count))
            if fits:
                walk.fill()
            best, count = (walk, 1) if fits and walk.worth > best.worth + 1e-9 else (best, count + 1)
        return best

    def _stand(self, kept: Bools, value: float | None = None) -> None:
        """Be at this keep-list, whose value may be known."""
        self.kept = kept
        self._missing = self._parts.missing(kept)
        self._sums = self._features[self._missing > 0].sum(axis=0)
        self.price = self._landscape.price(self.keep_set)
        self.value = float(self._surrogate.log_chances(self._sums[None, :])[0]) if value is None else value

    def _take(self, steps: _Steps, number: int) -> None:
        kept = self.kept.copy()
        kept[steps.units[steps.of == steps.numbers[number]]] ^= True
        self._stand(kept, float(steps.values[number]))

    def _changes(self) -> Floats:
        changes = self._landscape.price_changes(self.keep_set)
        return np.array([changes[unit] for unit in self._parts.units])

    def _releases(self, spared: Bools | None) -> _Steps:
        """Each kept unit, and with it those that hold back nothing but what it holds back too."""
        parts, pairs = self._parts, self._parts.by_unit
        free = self.kept & self._free if spared is None else self.kept & self._free & ~spared
        silent = self._missing == 0
        shared = pairs.counts(silent)
        own = np.bincount(parts.rows[silent[parts.columns]], minlength=len(parts.units))
        along = free[pairs.first] & free[pairs.second] & (shared == own[pairs.second])
        along |= (pairs.first == pairs.second) & free[pairs.first]
        of, units = pairs.first[along], pairs.second[along]
        prices = _added_up(self._changes()[units], of, len(parts.units))
        numbers = np.flatnonzero(free & (prices < 0))
        added = _summed(parts.rows, parts.columns, silent[parts.columns], self._features, len(parts.units))[numbers]
        return _Steps(of, units, numbers, self._surrogate.log_chances(self._sums + added), prices[numbers])

    def _returns(self) -> _Steps:
        """For each rounding that happens, the units that would have to be kept to hold it back."""
        parts, pairs = self._parts, self._parts.by_item
        half = ~self.kept
        wanting = np.bincount(parts.columns[half[parts.rows]], minlength=len(parts.items))
        possible = (wanting == self._missing) & (wanting > 0) & (wanting <= MAX_GROUP)
        quiet = possible[pairs.first] & possible[pairs.second]
        quiet &= pairs.counts(half) == self._missing[pairs.second]
        numbers = np.flatnonzero(possible)
        silenced = _summed(pairs.first, pairs.second, quiet, self._features, len(parts.items))[numbers]
        member = half[parts.rows] & possible[parts.columns]
        of, units = parts.columns[member], parts.rows[member]
        prices = _added_up(self._changes()[units], of, len(parts.items))[numbers]
        return _Steps(of, units, numbers, self._surrogate.log_chances(self._sums - silenced), prices)


def _added_up(weights: Floats, of: NDArray[np.intp], count: int) -> Floats:
    return np.asarray(np.bincount(of, weights=weights, minlength=count), dtype=np.float64)


def _summed(
    rows: NDArray[np.intp], columns: NDArray[np.intp], chosen: Bools, features: Floats, num_rows: int
) -> Floats:
    """[rows, features]: the features of the chosen columns of each row, added up; rows are sorted."""
    from scipy.sparse import csr_array

    starts = np.searchsorted(rows[chosen], np.arange(num_rows + 1))
    matrix = csr_array((np.ones(int(starts[-1])), columns[chosen], starts), shape=(num_rows, len(features)), copy=False)
    return np.asarray(matrix @ features)

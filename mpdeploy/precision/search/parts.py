"""Which roundings a keep-list lets happen, and what they add up to.

An *item* is one rounding. It happens as soon as one of the units that it needs is half, so items and units make a sparse matrix, and
what a single unit changes is one row of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Pairs:
    """Pairs of things that share others: (a, b) wherever some c goes with both of them.

    Args:
        things: [entries], what is paired.
        shared: [entries], what each of them goes with.

    Attributes:
        first, second: [pairs], sorted by the first.
    """

    def __init__(self, things: NDArray[np.intp], shared: NDArray[np.intp]) -> None:
        order = np.lexsort((things, shared))
        things, shared = things[order], shared[order]
        starts = np.flatnonzero(np.diff(shared, prepend=-1))
        sizes = np.diff(starts, append=len(shared))
        # each entry beside all entries of its group
        repeats = np.repeat(sizes, sizes)
        left = np.repeat(np.arange(len(things)), repeats)
        group_start = np.repeat(np.repeat(starts, sizes), repeats)
        within = np.arange(len(left)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        right = group_start + within
        width = int(things.max(initial=0)) + 1
        pairs, self._pair = np.unique(things[left] * width + things[right], return_inverse=True)
        self._shared = shared[left]
        self.first, self.second = pairs // width, pairs % width

    def counts(self, chosen: Bools) -> NDArray[np.int64]:
        """[pairs]: how many of what they share is chosen."""
        return np.bincount(self._pair[chosen[self._shared]], minlength=len(self.first))


class Parts:
    """The roundings of a problem.

    Args:
        units: what may be kept.
        needs: item -> units that must all be kept for it not to happen; one that is not among `units` can never be.

    Attributes:
        units, items: their names; the positions in every array here.
        rows, columns: [entries], unit and item of each place where an item needs a unit, sorted by unit.
        by_unit: two units that one item needs, whatever it is: who goes along with whom.
        by_item: two items that need one unit.
    """

    def __init__(self, units: Sequence[str], needs: Mapping[str, Sequence[str]]) -> None:
        self.units = tuple(units)
        self.items = tuple(needs)
        self.number = {unit: place for place, unit in enumerate(self.units)}
        entries = [
            (self.number[unit], item)
            for item, of_item in enumerate(needs.values())
            for unit in dict.fromkeys(of_item)
            if unit in self.number
        ]
        entries.sort()
        self.rows = np.array([row for row, _ in entries], dtype=np.intp)
        self.columns = np.array([column for _, column in entries], dtype=np.intp)
        self.by_unit = Pairs(self.rows, self.columns)
        self.by_item = Pairs(self.columns, self.rows)
        self._stuck = np.array(
            [any(u not in self.number for u in of_item) for of_item in needs.values()], dtype=np.int64
        )

    def mask(self, kept: Iterable[str]) -> Bools:
        """[units]: which ones a keep-list holds."""
        found = np.zeros(len(self.units), dtype=bool)
        found[[self.number[unit] for unit in kept if unit in self.number]] = True
        return found

    def missing(self, kept: Bools) -> NDArray[np.int64]:
        """[items]: how many of the units that an item needs are half."""
        half = ~kept[self.rows]
        return self._stuck + np.bincount(self.columns[half], minlength=len(self.items))

    def thrown(self, kept: Iterable[str]) -> Bools:
        """[items]: which ones happen with a keep-list."""
        return np.asarray(self.missing(self.mask(kept)) > 0)

    def flips(self, kept: Bools, missing: NDArray[np.int64]) -> NDArray[np.int8]:
        """[entries]: 1 where an item begins to happen if its unit alone changes sides, -1 where it stops, else 0."""
        waiting, was_kept = missing[self.columns], kept[self.rows]
        return np.asarray(np.where(was_kept, waiting == 0, -(waiting == 1).astype(np.int8)), dtype=np.int8)

    def vector(self, energies: Mapping[str, float]) -> Floats:
        """[items]: energies in their order."""
        return np.array([energies[item] for item in self.items], dtype=np.float64)

    def energy(self, energies: Mapping[str, float], kept: Iterable[str]) -> float:
        """Of all that happens with a keep-list."""
        return float(self.vector(energies)[self.thrown(kept)].sum())

    def marginals(self, energies: Mapping[str, float], kept: Iterable[str]) -> dict[str, float]:
        """Kept unit -> energy of what would happen if it alone were half: what it holds back, alone or together with others."""
        mask = self.mask(kept)
        flips = self.flips(mask, self.missing(mask))
        weights = np.where(flips > 0, self.vector(energies)[self.columns], 0.0)
        added = np.bincount(self.rows, weights=weights, minlength=len(self.units))
        return {self.units[place]: float(added[place]) for place in np.flatnonzero(mask)}

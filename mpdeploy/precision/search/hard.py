"""Hard causes: the units that lose an output when they are half, found exactly by adaptive group testing.

A test makes a set of units half, beside everything already cleared, and asks whether an output is lost. Two facts make few tests
enough. A group that passes is cleared as a whole; a group that fails holds a cause, which halving finds. And the group is chosen so
that it fails about every second time (hazards of its members add up to ln 2), with the density of causes estimated on the way.

Because every test is made beside what was cleared, units that fail only together need nothing extra: the first of a pair is cleared,
the second is found. If lost outputs stay lost when more becomes half, the answer is 1-minimal by construction.
Bound: k causes among n, k up to `FEW`, cost at most 1 + k (1 + ceil(log2 n)) tests, wherever they lie.
Source: Hwang 1972 (generalised binary splitting), with online estimation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

IsLost = Callable[[frozenset[str]], bool]
"""Given the units that are half, whether an output is lost."""

FEW = 5
"""Up to this many causes found, the whole rest is tested at once after each: most models have few."""


def find_hard(
    units: Sequence[str],
    is_lost: IsLost,
    *,
    suspicion: Mapping[str, float] | None = None,
    context: frozenset[str] = frozenset(),
    known_lost: bool = True,
) -> list[str]:
    """The units that cannot be half.

    Args:
        units: all of them, in the order of the graph.
        is_lost: the test.
        suspicion: unit -> prior probability of being a cause; suspects are tested last and alone, where they are almost certain.
        context: units that are half throughout and not asked about.
        known_lost: all units together are known to be lost.
    """
    search = _GroupTesting(units, is_lost, suspicion or {}, context)
    search.run(known_lost=known_lost)
    return search.found


def find_hub(units: Sequence[str], found: Sequence[str], is_lost: IsLost) -> list[str] | None:
    """A smaller answer, where the causes found fail only beside a few others: then the others are kept instead.

    Three units that each fail beside a fourth are one cause, not three. Costs one test where the causes fail by themselves.
    """
    if len(found) < 2 or is_lost(frozenset(found)):
        return None
    rest = [unit for unit in units if unit not in set(found)]
    others = find_hard(rest, is_lost, context=frozenset(found))
    return others if len(others) < len(found) else None


class _GroupTesting:
    def __init__(
        self, units: Sequence[str], is_lost: IsLost, suspicion: Mapping[str, float], context: frozenset[str]
    ) -> None:
        self._is_lost = is_lost
        self._suspicion = suspicion
        self._cleared: set[str] = set(context)
        self._num_cleared = 0
        self.found: list[str] = []
        # sorted() is stable: equal suspicion keeps the order of the graph, where causes lie close to each other
        self._pool = sorted(units, key=lambda unit: suspicion.get(unit, 0.0))

    def run(self, *, known_lost: bool) -> None:
        if known_lost and self._pool:
            suspects = [unit for unit in self._pool if self._suspicion.get(unit, 0.0) >= 0.5]
            if not suspects:
                self._split(self._take(len(self._pool)))
        while self._pool:
            group = self._take(self._group_size())
            if self._lost(group):
                self._split(group)
            else:
                self._clear(group)

    def _take(self, count: int) -> list[str]:
        group, self._pool = self._pool[:count], self._pool[count:]
        return group

    def _lost(self, group: Sequence[str]) -> bool:
        return self._is_lost(frozenset(self._cleared | set(group)))

    def _clear(self, group: Sequence[str]) -> None:
        self._cleared.update(group)
        self._num_cleared += len(group)

    def _rate(self) -> float:
        """Estimated probability that an unsuspicious unit is a cause."""
        return min((len(self.found) + 0.3) / (self._num_cleared + len(self.found) + 1.0), 0.9)

    def _hazard(self, unit: str, rate: float) -> float:
        prior = self._suspicion.get(unit)
        # a suspicion is a hint: where nothing was found yet, units without one are taken as clean together
        return -math.log1p(-min(max(rate if prior is None else prior, 1e-9), 0.99))

    def _group_size(self) -> int:
        suspects = sum(1 for unit in self._pool if self._suspicion.get(unit, 0.0) >= 0.5)
        if len(self.found) <= FEW and len(self._pool) > suspects:
            return len(self._pool) - suspects
        rate, hazard = self._rate(), 0.0
        for count, unit in enumerate(self._pool):
            hazard += self._hazard(unit, rate)
            if hazard > math.log(2.0):
                return max(count, 1)
        return len(self._pool)

    def _split(self, group: list[str]) -> None:
        """A group that is lost holds a cause: find the first, clear what lies before it, give back what lies behind it."""
        while len(group) > 1:
            middle = self._median(group)
            left = group[:middle]
            if self._lost(left):
                self._pool = group[middle:] + self._pool
                group = left
            else:
                self._clear(left)
                group = group[middle:]
        self.found.append(group[0])

    def _median(self, group: Sequence[str]) -> int:
        """Where to split so that, given that the group holds a cause, it lies left with probability one half.

        For the first few causes only as far from the middle as does not need a test more than halving in the worst case.
        """
        suspected = any(unit in self._suspicion for unit in group)
        rate = self._rate() if len(self.found) > 1 else 0.0
        if rate <= 0 and not suspected:
            return len(group) // 2
        if len(self.found) < FEW and not suspected:
            most = 1 << (
                (len(group) - 1).bit_length() - 1
            )  # the largest power of two below its size: neither side may be larger
            return min(max(self._likely_half(group, rate), len(group) - most), most)
        return self._likely_half(group, rate)

    def _likely_half(self, group: Sequence[str], rate: float) -> int:
        hazards = [self._hazard(unit, max(rate, 1e-6)) for unit in group]
        fails = -math.expm1(-sum(hazards))
        total = 0.0
        for count, hazard in enumerate(hazards[:-1], start=1):
            total += hazard
            if -math.expm1(-total) >= fails / 2:
                return count
        return len(group) - 1

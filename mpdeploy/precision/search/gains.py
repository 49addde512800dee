"""How much each rounding adds at the outputs, from the error it injects and a few probes.

The energy of a part is what it injects times a gain nobody knows. A probe makes one rounding happen alone, on one sample, and costs
one evaluation divided by the number of samples; it is noisy, because samples differ. So both are joined in one estimate an item:

    ln energy ~ Normal(ln injected + mean gain, spread of gains)     the prior; its two numbers are learnt from the probes
    ln probe  ~ Normal(ln energy + the sample's own factor, noise)   the noise is learnt from items probed twice

and the next probes go where they can change the answer: to items near the threshold between kept and half that are not known well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mpdeploy.precision.search.ledger import Ledger

HARD_ENERGY = 0.25
"""A rounding that alone makes a relative L2 drift of 0.5 is a hard cause, not a part of a budget."""
LOST_ENERGY = 1e6
"""What stands for an infinite energy."""
FLOOR = 1e-30
ROUND = 32
"""Probes between two looks at where the threshold lies."""
FIRST_SPREAD = 1.5
GUESSED = 30
"""The first guess of the spread counts as much as this many probes."""
ENOUGH = 32
"""Probes of one item."""


@dataclass
class Gains:
    """What is known of the items' energies.

    Attributes:
        items: their names.
        energies: item -> expected energy.
        spread: learnt standard deviation of ln gain.
        noise: learnt standard deviation of the ln of a probe.
        probes: how many were made.
    """

    items: list[str]
    energies: dict[str, float] = field(default_factory=dict)
    spread: float = FIRST_SPREAD
    noise: float = 0.7
    probes: int = 0


def estimate_gains(
    ledger: Ledger, *, target: float, budget: float, seed: int, max_probes: float = math.inf, batch: int = 1
) -> Gains:
    """Estimate the energy of every item of the ledger's landscape.

    Args:
        ledger: what measures.
        target: energy that may remain; it says where the threshold lies.
        budget: evaluations that probes may use up.
        seed: decides the order of the samples.
        max_probes: how many probes at most: on a real model, a probe of one sample costs more than its share.
        batch: samples of a probe.
    """
    landscape = ledger.landscape
    assert landscape is not None
    injected = np.array([landscape.injected[item] for item in landscape.items], dtype=np.float64)
    live = np.flatnonzero(injected > 0)
    ln_injected = np.log(np.clip(injected[live], FLOOR, LOST_ENERGY))
    state = _State(ledger, [landscape.items[int(i)] for i in live], ln_injected, seed, batch)
    budget = min(budget, ledger.evaluations_left)
    cost = min(batch / landscape.num_samples, 1.0)
    before = ledger.evaluations
    while live.size and ledger.evaluations - before + cost <= budget:
        room = min((budget - (ledger.evaluations - before)) / cost, max_probes - state.num_probes, ROUND)
        chosen = state.choose(target, int(room + 1e-9))
        if not len(chosen):
            break
        for item in chosen:
            state.probe(int(item))
        state.learn()
    gains = Gains(list(landscape.items), spread=state.spread, noise=state.noise, probes=state.num_probes)
    gains.energies = dict.fromkeys(landscape.items, 0.0)
    gains.energies |= dict(zip(state.items, state.expected().tolist(), strict=True))
    return gains


class _State:
    def __init__(
        self, ledger: Ledger, items: list[str], ln_injected: NDArray[np.float64], seed: int, batch: int
    ) -> None:
        assert ledger.landscape is not None
        self.ledger = ledger
        self.items = items
        self.ln_injected = ln_injected
        order = np.random.default_rng(seed).permutation(ledger.landscape.num_samples)
        self.order = [tuple(order[i : i + batch].tolist()) for i in range(0, len(order), batch)]
        self.seen: list[list[float]] = [[] for _ in items]  # ln of each probe, in the order of `order`
        self.hard = np.zeros(len(items), dtype=bool)
        self.factor = np.zeros(len(self.order))
        self.shift = 0.0
        self.spread = FIRST_SPREAD
        self.noise = 0.7
        self.num_probes = 0
        self.mean = ln_injected.copy()
        self.variance = np.full(len(items), self.spread**2)

    def probe(self, item: int) -> None:
        round_number = len(self.seen[item])
        energy = self.ledger.probe(self.items[item], self.order[round_number])
        self.num_probes += 1
        if not math.isfinite(energy) or energy >= HARD_ENERGY:
            self.hard[item] = True
        self.seen[item].append(math.log(min(max(energy, FLOOR), LOST_ENERGY)))

    def learn(self) -> None:
        """Fit the mean gain, its spread, the samples' factors and the noise, then each item's estimate."""
        soft = [i for i, seen in enumerate(self.seen) if seen and not self.hard[i] and min(seen) > math.log(FLOOR) + 1]
        if len(soft) >= 4:
            first = np.array([self.seen[i][0] for i in soft]) - self.ln_injected[soft]
            self.shift = float(np.median(first))
            spread = 1.4826 * float(np.median(np.abs(first - self.shift)))
            twice = [i for i in soft if len(self.seen[i]) > 1]
            for number in range(1, len(self.order)):
                both = [self.seen[i][number] - self.seen[i][0] for i in twice if len(self.seen[i]) > number]
                if len(both) >= 4:
                    self.factor[number] = float(np.median(both))
            within = [
                seen[n] - self.factor[n] - seen[0]
                for seen in (self.seen[i] for i in twice)
                for n in range(1, len(seen))
            ]
            if len(within) >= 8:
                self.noise = min(max(float(np.std(within)) / math.sqrt(2), 0.05), 2.0)
            learnt = max(spread**2 - self.noise**2, 0.0)
            # few probes say little about how far gains spread: they count beside a first guess
            self.spread = math.sqrt((len(soft) * learnt + GUESSED * FIRST_SPREAD**2) / (len(soft) + GUESSED))
        for i, seen in enumerate(self.seen):
            prior = 1.0 / self.spread**2
            weight = len(seen) / self.noise**2
            found = sum(value - self.factor[n] for n, value in enumerate(seen))
            self.variance[i] = 1.0 / (prior + weight)
            self.mean[i] = (prior * (self.ln_injected[i] + self.shift) + found / self.noise**2) * self.variance[i]
            if seen and min(seen) <= math.log(FLOOR) + 1:
                self.mean[i], self.variance[i] = math.log(FLOOR), 0.0  # it does not reach the outputs
            elif self.hard[i]:
                self.mean[i], self.variance[i] = max(seen), 0.0

    def expected(self) -> NDArray[np.float64]:
        """Expected energies."""
        return np.asarray(np.exp(self.mean + self.variance / 2))

    def choose(self, target: float, count: int) -> NDArray[np.int64]:
        """The items whose probes can change the answer most."""
        probes = np.array([len(seen) for seen in self.seen])
        if self.num_probes == 0:  # learn the prior from items all over the range
            by_injected = np.argsort(-self.ln_injected, kind="stable")
            spaced = np.unique(np.linspace(0, len(by_injected) - 1, min(count, len(by_injected))).round().astype(int))
            return np.asarray(by_injected[spaced])
        energies = self.expected()
        order = np.argsort(-energies, kind="stable")
        rest = float(energies.sum()) - np.cumsum(energies[order])
        kept = int(np.searchsorted(-rest, -target)) + 1
        threshold = math.log(max(float(energies[order[min(kept, len(order) - 1)]]), FLOOR))
        deviation = np.sqrt(self.variance)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.where(deviation > 0, (self.mean - threshold) / deviation, np.inf)
        value = deviation * np.exp(-(distance**2) / 2)
        value[(probes >= min(ENOUGH, len(self.order))) | self.hard | (value < 0.005)] = 0.0
        chosen = np.argsort(-value, kind="stable")[:count]
        return np.asarray(chosen[value[chosen] > 0])

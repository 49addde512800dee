"""How much each rounding adds at each output, from the error it injects and a few probes.

The energy of a part is what it injects times a gain nobody knows. A probe makes one rounding happen alone, on some samples, and costs
one evaluation times their share; it is noisy, because samples differ. So both are joined in one estimate an item and output:

    ln energy ~ Normal(ln injected + mean gain, spread of gains)     the prior; its two numbers are learnt from the probes
    ln probe  ~ Normal(ln energy + the sample's own factor, noise)   the noise is learnt from items probed twice

and the next probes go where they can change the answer: to items near the threshold between kept and half that are not known well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpdeploy.precision.search.ledger import Ledger

Floats = NDArray[np.float64]

HARD_ENERGY = 0.25
"""A rounding that alone makes a relative L2 drift of 0.5 is a hard cause, not a part of a budget."""
LOST_ENERGY = 1e6
"""What stands for an infinite energy."""
FLOOR = 1e-30
_NOTHING = math.log(FLOOR) + 1
ROUND = 32
"""Probes between two looks at where the threshold lies."""
FIRST_SPREAD = 1.5
FIRST_NOISE = 0.7
GUESSED = 30
"""The first guess of the spread counts as much as this many probes."""
SILENT = 4
"""Probes of one item that must say nothing at any output, before it is believed to do nothing: samples may be masked there."""
ENOUGH = 32
"""Probes of one item."""
STRANGE = 6.0
"""An injected error so many times e above the usual one is no rounding but a loss (a mask's constant, say): it may matter or not."""


@dataclass(frozen=True)
class Gains:
    """What is known of the items' energies.

    Attributes:
        items: their names.
        weights: [outputs], how much each counts where one number an item is wanted: those that drift most.
        expected: [items, outputs], expected energies.
        variances: [items, outputs], of their logarithms.
        probes: how many were made.
    """

    items: tuple[str, ...]
    weights: Floats
    expected: Floats
    variances: Floats
    probes: int = 0

    @property
    def energies(self) -> dict[str, float]:
        """Item -> expected energy at the outputs, weighed."""
        return dict(zip(self.items, (self.expected @ self.weights).tolist(), strict=True))


def output_weights(energies: Sequence[float]) -> Floats:
    """How much each output counts where one number is wanted: those that drift most with everything in half are those that gate."""
    squares = np.square(np.minimum(np.nan_to_num(np.array(energies, dtype=np.float64), nan=1.0, posinf=1.0), 1.0))
    total = float(squares.sum())
    return np.asarray(squares / total if total > 0 else np.full(len(squares), 1.0 / max(len(squares), 1)))


def estimate_gains(
    ledger: Ledger,
    *,
    all_half: Sequence[float],
    target: float,
    budget: float,
    seed: int,
    max_probes: float = math.inf,
    batch: int = 1,
) -> Gains:
    """Estimate the energy of every item of the ledger's landscape at every output.

    Args:
        ledger: what measures.
        all_half: [outputs], energies with everything in half.
        target: energy that may remain; it says where the threshold lies.
        budget: evaluations that probes may use up.
        seed: decides the order of the samples.
        max_probes: how many probes at most: on a real model, a probe of one sample costs more than its share.
        batch: samples of a probe.
    """
    landscape = ledger.landscape
    assert landscape is not None
    items, weights = landscape.parts.items, output_weights(all_half)
    injected = np.array([landscape.injected[item] for item in items], dtype=np.float64)
    live = np.flatnonzero(injected > 0)
    ln_injected = np.log(np.clip(injected[live], FLOOR, LOST_ENERGY))
    state = _State(ledger, [items[int(i)] for i in live], ln_injected, len(weights), seed, batch)
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
    expected, variances = np.zeros((len(items), len(weights))), np.zeros((len(items), len(weights)))
    expected[live], variances[live] = state.expected(), state.variance
    return Gains(items, weights, expected, variances, state.num_probes)


class _State:
    """What the probes have said so far; arrays are [live items, outputs]."""

    def __init__(
        self, ledger: Ledger, items: list[str], ln_injected: Floats, num_outputs: int, seed: int, batch: int
    ) -> None:
        assert ledger.landscape is not None
        self.ledger = ledger
        self.items = items
        self.ln_injected = ln_injected
        order = np.random.default_rng(seed).permutation(ledger.landscape.num_samples)
        self.order = [tuple(order[i : i + batch].tolist()) for i in range(0, len(order), batch)]
        self.seen: list[list[Floats]] = [[] for _ in items]  # ln of each probe, in the order of `order`
        self.hard = np.zeros(len(items), dtype=bool)
        self.reaches = np.zeros(len(items), dtype=bool)  # some output
        self.num_probes = 0
        self.mean = np.repeat(ln_injected[:, None], num_outputs, axis=1)
        self.variance = np.full_like(self.mean, FIRST_SPREAD**2)

    def probe(self, item: int) -> None:
        round_number = len(self.seen[item])
        energies = np.array(self.ledger.probe(self.items[item], self.order[round_number]), dtype=np.float64)
        self.num_probes += 1
        if not np.isfinite(energies).all() or energies.max(initial=0.0) >= HARD_ENERGY:
            self.hard[item] = True
        self.reaches[item] |= bool(energies.any())
        self.seen[item].append(np.log(np.clip(np.nan_to_num(energies, nan=LOST_ENERGY), FLOOR, LOST_ENERGY)))

    def learn(self) -> None:
        """Fit each output's mean gain, its spread, the samples' factors and the noise, then each item's estimate."""
        for output in range(self.mean.shape[1]):
            self._learn(output, [[float(probe[output]) for probe in seen] for seen in self.seen])

    def _learn(self, output: int, seen: list[list[float]]) -> None:
        soft = [i for i, of_item in enumerate(seen) if of_item and not self.hard[i] and min(of_item) > _NOTHING]
        shift, spread, noise = 0.0, FIRST_SPREAD, FIRST_NOISE
        factor = np.zeros(len(self.order))
        if len(soft) >= 4:
            first = np.array([seen[i][0] for i in soft]) - self.ln_injected[soft]
            shift = float(np.median(first))
            twice = [i for i in soft if len(seen[i]) > 1]
            for number in range(1, len(self.order)):
                both = [seen[i][number] - seen[i][0] for i in twice if len(seen[i]) > number]
                if len(both) >= 4:
                    factor[number] = float(np.median(both))
            within = [seen[i][n] - factor[n] - seen[i][0] for i in twice for n in range(1, len(seen[i]))]
            if len(within) >= 8:
                noise = min(max(float(np.std(within)) / math.sqrt(2), 0.05), 2.0)
            learnt = max((1.4826 * float(np.median(np.abs(first - shift)))) ** 2 - noise**2, 0.0)
            # few probes say little about how far gains spread: they count beside a first guess
            spread = math.sqrt((len(soft) * learnt + GUESSED * FIRST_SPREAD**2) / (len(soft) + GUESSED))
        prior = 1.0 / spread**2
        for i, of_item in enumerate(seen):
            found = [value - factor[n] for n, value in enumerate(of_item) if value > _NOTHING]
            variance = 1.0 / (prior + len(found) / noise**2)
            mean = (prior * (self.ln_injected[i] + shift) + sum(found) / noise**2) * variance
            if self.hard[i] and found:
                mean, variance = max(of_item), 0.0
            elif found:
                mean += math.log(len(found) / len(of_item))  # on samples where nothing comes of it, it is 0
            elif of_item and (self.reaches[i] or len(of_item) >= SILENT):
                mean, variance = math.log(FLOOR), 0.0  # it does not reach this output
            self.mean[i, output], self.variance[i, output] = mean, variance

    def expected(self) -> Floats:
        """Expected energies."""
        return np.asarray(np.exp(self.mean + self.variance / 2))

    def choose(self, target: float, count: int) -> NDArray[np.int64]:
        """The items whose probes can change the answer most, at the output where they do."""
        if self.num_probes == 0:
            # those that the prior says nothing of, then items all over the range, to learn it from
            by_injected = np.argsort(-self.ln_injected, kind="stable")
            strange = int((self.ln_injected > np.median(self.ln_injected) + STRANGE).sum())
            rest = by_injected[strange:]
            spaced = np.unique(
                np.linspace(0, len(rest) - 1, min(max(count - strange, 0), len(rest))).round().astype(int)
            )
            return np.concatenate([by_injected[: min(strange, count)], rest[spaced]])
        probes = np.array([len(seen) for seen in self.seen])
        energies = self.expected()
        value = np.zeros(len(self.items))
        for output in range(energies.shape[1]):
            value = np.maximum(
                value, self._values(energies[:, output], self.mean[:, output], self.variance[:, output], target)
            )
        value[(probes >= min(ENOUGH, len(self.order))) | self.hard | (value < 0.005)] = 0.0
        chosen = np.argsort(-value, kind="stable")[:count]
        return np.asarray(chosen[value[chosen] > 0])

    @staticmethod
    def _values(energies: Floats, mean: Floats, variance: Floats, target: float) -> Floats:
        order = np.argsort(-energies, kind="stable")
        rest = float(energies.sum()) - np.cumsum(energies[order])
        kept = int(np.searchsorted(-rest, -target)) + 1
        threshold = math.log(max(float(energies[order[min(kept, len(order) - 1)]]), FLOOR))
        deviation = np.sqrt(variance)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.where(deviation > 0, (mean - threshold) / deviation, np.inf)
        return np.asarray(deviation * np.exp(-(distance**2) / 2))

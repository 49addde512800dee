"""Synthetic problems with a known answer: what the search is benchmarked on. The generators are published here, with their seeds.

additive   unit i adds the energy t_i = injected_i * gain_i, ln t ~ Normal(0, 2): injected_i is told (ln ~ Normal(0, sqrt 3)),
gain_i is not (ln ~ Normal(0, 1)). Sample s sees t_i * Gamma(4, 1/4); there are 32 samples. The budget is a share of
the sum over all units. The true answer sorts by the mean over the samples.
vectors    the same, but what unit i adds on a sample is a vector of that energy in a random direction, and vectors add up: with few
dimensions their cosines are no longer nothing. Sorting is then a good answer, not the best.
traps      units that lose the output each by itself
groups     units that lose the output only where all of a group are half
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mpdeploy.files import digest_of_json
from mpdeploy.precision.search.parts import Parts
from mpdeploy.precision.search.types import Candidate, Evaluation, KeepSet, Until

NUM_SAMPLES = 32
NUM_HELD_OUT = 8
"""The last ones: nothing is learnt from them but whether the gate is met."""
ALL_HALF_DRIFT = 2e-3


@dataclass(frozen=True)
class SyntheticProblem:
    """A problem (see `types.Problem`) and its landscape in one.

    Attributes:
        terms: [num_units, num_samples], energy that a half unit adds on a sample.
        injected: unit -> what is told of it.
        traps: units that lose the output.
        groups: units that lose it together.
        limit: largest drift.
        digest: of all this.
        errors: [num_units, num_samples, dimensions], the vectors whose squared lengths are `terms`; None where energies add up.
    """

    terms: NDArray[np.float64]
    injected: Mapping[str, float]
    traps: frozenset[str]
    groups: tuple[frozenset[str], ...]
    limit: float
    digest: str
    errors: NDArray[np.float64] | None = None

    gates_drift = True
    samples_a_probe = 1
    max_probes = math.inf

    @property
    def units(self) -> Sequence[str]:
        """`n0`, `n1`, ..."""
        return list(self.injected)

    @cached_property
    def parts(self) -> Parts:
        """Each unit has one part of the error."""
        return Parts(list(self.injected), {unit: (unit,) for unit in self.injected})

    @property
    def num_samples(self) -> int:
        """Columns of `terms`."""
        return int(self.terms.shape[1])

    def evaluate(self, kept: KeepSet, samples: Sequence[int] | None = None, *, until: Until = "gate") -> Evaluation:
        """Add up what is half."""
        half = [unit for unit in self.injected if unit not in kept]
        lost = not self.traps.isdisjoint(half) or any(group <= set(half) for group in self.groups)
        columns = slice(None) if samples is None else list(samples)
        rows = [int(unit[1:]) for unit in half]
        if self.errors is None:
            of_samples = self.terms[rows].sum(axis=0)
        else:
            of_samples = np.square(self.errors[rows].sum(axis=0)).sum(axis=1)
        chosen = of_samples[columns]
        drift = math.inf if lost else math.sqrt(float(chosen.mean()))
        share = 1.0 if samples is None else len(samples) / self.num_samples
        learnable = math.inf if lost else float(of_samples[: NUM_SAMPLES - NUM_HELD_OUT].mean())
        return Evaluation(drift, drift <= self.limit, lost, drift, share, (drift**2,), (learnable,))

    def canonical(self, kept: KeepSet) -> KeepSet:
        """Each keep-list is a model of its own."""
        return kept

    def probe(self, item: str, samples: Sequence[int]) -> tuple[float, ...]:
        """One unit alone."""
        return (math.inf if item in self.traps else float(self.terms[int(item[1:]), list(samples)].mean()),)

    def confirm(self, kept: KeepSet) -> float:
        """Nothing stands in for anything."""
        return 0.0

    def cost(self, kept: KeepSet) -> float:
        """Their number."""
        return float(len(kept))

    def suspicion(self) -> Mapping[str, float]:
        """Nothing is told."""
        return {}

    def front(self, energies: Mapping[str, float], hard: KeepSet) -> list[Candidate]:
        """Prefixes in the order of the estimated energies."""
        order = sorted((unit for unit in self.injected if unit not in hard), key=lambda unit: -energies[unit])
        rest = sum(energies[unit] for unit in order)
        found = [Candidate(hard, rest, float(len(hard)))]
        for count, unit in enumerate(order, start=1):
            rest -= energies[unit]
            found.append(Candidate(hard | frozenset(order[:count]), max(rest, 0.0), float(len(hard) + count)))
        return found

    def price(self, kept: KeepSet) -> float:
        """Their number."""
        return float(len(kept))

    def price_changes(self, kept: KeepSet) -> Mapping[str, float]:
        """Each costs one."""
        return {unit: -1.0 if unit in kept else 1.0 for unit in self.injected}

    def true_answer(self) -> list[str]:
        """The traps, and as many of the largest true energies as the budget demands, and one of each group.

        With vectors, as few of the largest as any such answer holds; another order may do with fewer still.
        """
        energy = {unit: float(self.terms[int(unit[1:])].mean()) for unit in self.injected if unit not in self.traps}
        order = sorted(energy, key=lambda unit: -energy[unit])
        if self.errors is None:
            rest = np.append(sum(energy.values()), sum(energy.values()) - np.cumsum([energy[unit] for unit in order]))
        else:
            kept = [frozenset(order[:count]) for count in range(len(order) + 1)]
            rest = np.array([self.evaluate(each).drift ** 2 for each in kept])
        count = int(np.argmax(rest <= self.limit**2 * (1 + 1e-12)))
        chosen = set(order[:count])
        partners = [min(group) for group in self.groups if chosen.isdisjoint(group)]
        return [*sorted(self.traps), *order[:count], *partners]


def synthetic_problem(
    *,
    seed: int,
    num_units: int = 1000,
    num_traps: int = 0,
    num_pairs: int = 0,
    budget: float | None = None,
    gain_sigma: float = 1.0,
    sample_shape: float = 4.0,
    dimensions: int | None = None,
) -> SyntheticProblem:
    """Draw a problem.

    Args:
        seed: of everything drawn.
        num_units: N.
        num_traps: units that lose the output alone.
        num_pairs: pairs of units that lose it together.
        budget: share of the additive energy that may remain, or None for no additive error at all.
        gain_sigma: standard deviation of the unknown ln gain, of the 2 in all.
        sample_shape: of the Gamma law of the samples; its relative spread is 1 / sqrt(shape).
        dimensions: of the vectors; None: energies add up.
    """
    rng = np.random.default_rng(seed)
    names = [f"n{i}" for i in range(num_units)]
    ln_injected = rng.normal(0.0, math.sqrt(4.0 - gain_sigma**2), num_units)
    ln_gain = rng.normal(0.0, gain_sigma, num_units)
    terms = np.exp(ln_injected + ln_gain)[:, None] * rng.gamma(sample_shape, 1 / sample_shape, (num_units, NUM_SAMPLES))
    terms *= (ALL_HALF_DRIFT**2 / terms.mean(axis=1).sum()) if budget is not None else 0.0
    bad = [names[i] for i in rng.choice(num_units, num_traps + 2 * num_pairs, replace=False)]
    injected = dict(zip(names, np.exp(ln_injected).tolist(), strict=True))
    limit = 1.0
    if budget is not None:
        soft = [i for i in range(num_units) if names[i] not in set(bad[:num_traps])]
        limit = math.sqrt(budget * float(terms[soft].mean(axis=1).sum()))
    errors = None
    if dimensions is not None:
        directions = rng.standard_normal((num_units, NUM_SAMPLES, dimensions))
        directions /= np.linalg.norm(directions, axis=2, keepdims=True)
        errors = directions * np.sqrt(terms)[:, :, None]
    return SyntheticProblem(
        terms=terms,
        injected=injected if budget is not None else dict.fromkeys(names, 0.0),
        traps=frozenset(bad[:num_traps]),
        groups=tuple(frozenset(bad[i : i + 2]) for i in range(num_traps, len(bad), 2)),
        limit=limit,
        digest=digest_of_json([seed, num_units, num_traps, num_pairs, budget, gain_sigma, sample_shape, dimensions]),
        errors=errors,
    )

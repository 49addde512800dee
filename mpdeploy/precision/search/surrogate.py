"""A model of the drift of every keep-list, from the energies of its parts and everything measured so far.

Errors of roundings add up as vectors: y = sum e_i + sum 2 <e_i, e_j>. In quadrature the second sum is nothing; near a gate, where a few
values carry most of the error, it is what decides. Its terms are too many to measure and too persistent to ignore. So y is a Gaussian
process over keep-lists: with z the roundings that happen and t = sum e_i z_i,

    mean(z)    = t
    k(z, z')   = sum s_i^2 z_i z_i'              what the probes leave open of each energy
               + 2 rho^2 sum_{i<j} e_i e_j ...   pairs of error vectors with random cosines of size rho
               + SCALE^2 t t'                    a factor common to all

and every whole measurement of a keep-list makes it sharper for the keep-lists that share roundings with that one. Energies are divided
by what the gate allows: y <= 1 passes. rho and the size of what no such model explains are those that make the data likeliest.
Source: Rasmussen and Williams 2006, chapters 2 and 5; the pair term is the polynomial kernel of degree 2 without its squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SCALE = 0.2
"""Standard deviation of the factor that all energies share: probes look at few samples."""
COSINES = (0.025, 0.05, 0.1, 0.2, 0.4)
UNEXPLAINED = (0.005, 0.01, 0.02, 0.04)
"""Relative standard deviations of what is left."""
USUAL, SPREAD = (0.1, 0.02), 0.7
"""What these two are before anything was measured: their medians, and the standard deviation of their logarithms."""
USUAL_GAP = 0.03
"""Standard deviation, in gates, of what held-out samples add, before anything was measured."""
NEAR_GATE, LATEST = 0.5, 8
"""What held-out samples add is taken from so many measurements, the latest whose energy is a gate or so."""
LARGEST = 100.0
"""Energies are not taken for more, in gates: that much fails anyhow."""
LEAST = 0.02
"""What is left is never taken for less than this part of the gate times the relative deviation."""


class Output:
    """The surrogate of one output.

    Args:
        energies: [items], expected energy of each, the gate's being 1.
        variances: [items], of their logarithms.
    """

    def __init__(self, energies: Floats, variances: Floats) -> None:
        energies = np.minimum(energies, LARGEST)
        self._terms = np.stack([energies, energies**2, energies**2 * np.expm1(np.minimum(variances, 4.0))], axis=1)
        self._seen = np.zeros((0, len(energies)))
        self._measured = np.zeros(0)
        self._rho, self._left = COSINES[1], UNEXPLAINED[1]
        self._alpha = np.zeros(0)
        self._inverse = np.zeros((0, 0))
        self.features = self._terms

    def learn(self, thrown: Floats, measured: Floats) -> None:
        """Take in all measurements.

        Args:
            thrown: [measurements, items], which roundings happened.
            measured: [measurements], energies.
        """
        self._seen, self._measured = thrown, measured
        # [items, 3 * (1 + measurements)]: what one rounding adds to every sum
        shared = self._terms[:, :, None] * thrown.T[:, None, :]
        self.features = np.concatenate([self._terms[:, :, None], shared], axis=2).reshape(len(self._terms), -1)
        own, seen = self._split(thrown @ self.features)
        best = -np.inf
        for rho, left in product(COSINES, UNEXPLAINED):
            kernel = self._kernel(seen, own[:, 0], own[:, 0], rho)
            kernel[np.diag_indices(len(kernel))] += self._noise(own[:, 0], left)
            rest = measured - own[:, 0]
            factor = np.linalg.cholesky(kernel)
            half = np.linalg.solve(factor, rest)
            likelihood = -0.5 * float(half @ half) - float(np.log(np.diag(factor)).sum())
            likelihood -= float(np.square(np.log(np.array([rho, left]) / USUAL) / SPREAD).sum()) / 2
            if likelihood > best:
                best, self._rho, self._left = likelihood, rho, left
                self._inverse = np.linalg.inv(factor)
                self._alpha = self._inverse.T @ half

    def _split(self, sums: Floats) -> tuple[Floats, Floats]:
        parts = sums.reshape(len(sums), 3, sums.shape[1] // 3)
        return parts[:, :, 0], parts[:, :, 1:]

    @staticmethod
    def _kernel(shared: Floats, own: Floats, seen: Floats, rho: float) -> Floats:
        pairs = np.maximum(shared[:, 0] ** 2 - shared[:, 1], 0.0)
        return np.asarray(shared[:, 2] + 2 * rho**2 * pairs + SCALE**2 * own[:, None] * seen[None, :])

    @staticmethod
    def _noise(own: Floats, left: float) -> Floats:
        return np.asarray((left * np.maximum(own, LEAST)) ** 2)

    def predict(self, sums: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the energy.

        Args:
            sums: [keep-lists, 3 * (1 + measurements)], `features` summed over the roundings that happen.
        """
        own, shared = self._split(sums)
        total, squares, doubt = own[:, 0], own[:, 1], own[:, 2]
        seen = self._seen @ self._terms[:, 0]
        kernel = self._kernel(shared, total, seen, self._rho)
        pairs = np.maximum(total**2 - squares, 0.0)
        prior = doubt + 2 * self._rho**2 * pairs + SCALE**2 * total**2 + self._noise(total, self._left)
        known = np.square(kernel @ self._inverse.T).sum(axis=1)
        return total + kernel @ self._alpha, np.sqrt(np.maximum(prior - known, self._noise(total, self._left)))


@dataclass(frozen=True)
class Measured:
    """A keep-list that was measured on all samples.

    Attributes:
        thrown: [items], which roundings happened.
        learnable: [outputs], energies without the samples that are held out, in gates.
        whole: [outputs], energies on all samples, in gates.
    """

    thrown: NDArray[np.bool_]
    learnable: Floats
    whole: Floats


class Surrogate:
    """All outputs. What decides is the energy on all samples, but only that without the held-out ones is learnt.

    A search that chooses among many keep-lists finds those whose errors happen to cancel on what it sees. So it must not see everything:
    by how much the whole lies above what was learnt is taken from the latest measurements, as a mean and a spread, and is no reason to
    prefer one keep-list to another.

    Args:
        expected: [items, outputs], expected energies, in gates.
        variances: [items, outputs], of their logarithms.
    """

    def __init__(self, expected: Floats, variances: Floats) -> None:
        self.outputs = [Output(expected[:, o], variances[:, o]) for o in range(expected.shape[1])]
        self._known: list[Measured] = []
        self._gap = np.zeros(expected.shape[1])
        self._gap_spread = np.full(expected.shape[1], USUAL_GAP)

    def learn(self, found: Sequence[Measured]) -> None:
        """Take in measurements."""
        self._known += found
        thrown = np.stack([each.thrown for each in self._known]).astype(np.float64)
        learnable = np.stack([each.learnable for each in self._known])
        for number, output in enumerate(self.outputs):
            output.learn(thrown, learnable[:, number])
        near = [each for each in self._known if NEAR_GATE <= each.whole.max() <= 1 / NEAR_GATE][-LATEST:]
        if near:
            gaps = np.stack([each.whole - each.learnable for each in near])
            self._gap = gaps.sum(axis=0) / (
                len(near) + 1
            )  # few of them say little: nothing is expected, within `USUAL_GAP`
            squares = np.square(gaps - self._gap).sum(axis=0) + 2 * USUAL_GAP**2
            self._gap_spread = np.sqrt(squares / (len(near) + 2))

    @property
    def features(self) -> Floats:
        """[items, columns]: what one rounding adds to all sums of all outputs."""
        return np.concatenate([output.features for output in self.outputs], axis=1)

    def chances(self, sums: Floats) -> Floats:
        """[keep-lists]: of passing; arguments as of `margins`."""
        return np.asarray(np.exp(self.log_chances(sums)))

    def log_chances(self, sums: Floats) -> Floats:
        """Their logarithms."""
        from scipy.special import log_ndtr

        return np.asarray(log_ndtr(self.margins(sums)).sum(axis=1))

    def margins(self, sums: Floats) -> Floats:
        """[keep-lists, outputs]: by how many standard deviations each output lies below the gate.

        Args:
            sums: [keep-lists, columns], `features` summed over the roundings that happen.
        """
        width = sums.shape[1] // len(self.outputs)
        found = []
        for number, output in enumerate(self.outputs):
            mean, deviation = output.predict(sums[:, number * width : (number + 1) * width])
            spread = np.hypot(deviation, self._gap_spread[number])
            found.append((1.0 - mean - self._gap[number]) / spread)
        return np.stack(found, axis=1)

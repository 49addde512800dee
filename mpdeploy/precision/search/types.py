"""What the search and the things it searches say to each other. It knows no model and no runtime: only this.

A *unit* is something that may be kept in FP32 (a node, a graph input or output). A *problem* measures a keep-list. A *landscape*, where
there is one, says what parts the error has, lets single parts be measured on some samples, and orders keep-lists by cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mpdeploy.precision.search.parts import Parts

KeepSet = frozenset[str]
Until = Literal["gate", "lost"]
"""What ends an evaluation early: a gate that plainly fails, or only a lost output."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One keep-list, measured.

    Attributes:
        drift: relative L2 drift of the worst output over what was looked at; infinite where a value is not finite.
        passes: whether the gate is met; only a look at all samples can say so.
        lost: whether an output is lost: not finite, or beyond any use.
        measured: what the gate looks at: the drift, or the drop of a metric.
        share: how much of all samples was looked at, 0 to 1; less than 1 where a failure was plain before the end.
        energies: squared relative L2 drift of each output over what was looked at; `drift` is the root of the largest.
        learnable: the same without the samples that are held out: what a search may learn from. The others only count in pass or fail.
    """

    drift: float
    passes: bool
    lost: bool
    measured: float
    share: float = 1.0
    energies: tuple[float, ...] = ()
    learnable: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the log."""
        return {
            "drift": self.drift,
            "passes": self.passes,
            "lost": self.lost,
            "measured": self.measured,
            "share": self.share,
            "energies": list(self.energies),
            "learnable": list(self.learnable),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Evaluation:
        """Read what `to_json` wrote."""
        return cls(
            float(value["drift"]),
            bool(value["passes"]),
            bool(value["lost"]),
            float(value["measured"]),
            float(value["share"]),
            tuple(float(energy) for energy in value["energies"]),
            tuple(float(energy) for energy in value["learnable"]),
        )


class Problem(Protocol):
    """What can be measured."""

    @property
    def units(self) -> Sequence[str]:
        """Everything that may be kept, in the order of the graph."""

    @property
    def limit(self) -> float:
        """The gate: the largest `Evaluation.measured` that passes."""

    @property
    def gates_drift(self) -> bool:
        """Whether `measured` is the drift, so that it can be predicted."""

    @property
    def digest(self) -> str:
        """Changes with anything that changes an answer; a log of another problem is not replayed."""

    def evaluate(self, kept: KeepSet, samples: Sequence[int] | None = None, *, until: Until = "gate") -> Evaluation:
        """Measure what keeps exactly these on all samples, or on some; it may stop early, where the gate fails or an output is lost."""

    def canonical(self, kept: KeepSet) -> KeepSet:
        """All that the model keeps to which a keep-list leads: these units, and what would be half between them at a loss."""

    def confirm(self, kept: KeepSet) -> float:
        """What the gate looks at, of the thing itself where `evaluate` measures a stand-in of it; 0 where it does not."""

    def cost(self, kept: KeepSet) -> float:
        """What keeping these costs, casts included."""

    def suspicion(self) -> Mapping[str, float]:
        """Unit -> probability that it cannot be half at all, where something is known."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A keep-list on the Pareto front that a landscape predicts: `energy` is the predicted squared drift."""

    kept: KeepSet
    energy: float
    cost: float


class Landscape(Protocol):
    """The error's parts. Energies are squared relative L2 drifts: what adds up."""

    @property
    def parts(self) -> Parts:
        """Which items (roundings of a tensor or of constants) happen with which keep-list."""

    @property
    def injected(self) -> Mapping[str, float]:
        """Item -> relative squared error that rounding puts in there; 0 for a rounding that changes nothing."""

    @property
    def num_samples(self) -> int:
        """That probes may use."""

    @property
    def samples_a_probe(self) -> int:
        """How many of them a probe takes."""

    @property
    def max_probes(self) -> float:
        """How many probes are worth their time."""

    def probe(self, item: str, samples: Sequence[int]) -> tuple[float, ...]:
        """The energy at each output when this rounding alone happens, on these samples."""

    def front(self, energies: Mapping[str, float], hard: KeepSet) -> list[Candidate]:
        """Keep-lists that hold `hard`, from the cheapest to everything, each the best predicted for its cost."""

    def price(self, kept: KeepSet) -> float:
        """What it costs that exactly these are kept; `Problem.cost` may be less, where keeping more is cheaper."""

    def price_changes(self, kept: KeepSet) -> Mapping[str, float]:
        """Unit -> what the cost changes by when it alone changes sides: below 0 where it becomes cheaper."""


@dataclass(frozen=True, slots=True)
class SearchProgress:
    """What a progress display shows.

    Attributes:
        phase: what is being done.
        evaluations: passes over all samples so far; probes count by their share.
        best: size of the smallest keep-list that passed so far, or None.
        best_drift: its drift.
        seconds_left: estimated, of the whole search; None where that cannot be said.
        fraction: of the whole search that is done, estimated, 0 to 1; None where that cannot be said.
    """

    phase: str
    evaluations: float
    best: int | None
    best_drift: float | None
    seconds_left: float | None
    fraction: float | None = None


OnProgress = Callable[[SearchProgress], None]


class SearchStoppedError(Exception):
    """Raised inside a search whose time or evaluations are spent; the driver catches it and gives the best answer so far."""

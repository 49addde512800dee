"""A model as a search problem: every candidate is one run of the switchable emulation, measured against the FP32 answers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Array, Feeds
from mpdeploy.data_files import FeedSet
from mpdeploy.emulated_runs import tensors_of
from mpdeploy.measure.drift import per_sample
from mpdeploy.precision.formats import HalfFormat
from mpdeploy.precision.search.cost import FlowCosts
from mpdeploy.precision.search.switch_graph import FLAGS, SwitchGraph
from mpdeploy.precision.search.types import Candidate, Evaluation, KeepSet, Until

LOST_REL_L2 = 0.5
"""As in `conversion`: above this an output is lost."""
SUSPICIOUS = 0.05
"""Relative squared error of a rounding from which its units are suspected of being hard causes."""
BATCH = 32
"""Samples of a run."""
PROBES_AN_ITEM = 2.0
SAMPLES_A_PROBE = 2
MAX_VALUES = 1 << 18
"""Values of a tensor that are looked at for the error it injects."""

Scorer = Callable[[Mapping[str, Array], Sequence[int]], NDArray[np.float64]]
"""(outputs, numbers of their rows) -> one score a row."""


@dataclass(frozen=True)
class Batch:
    """A feed with its FP32 answer.

    Attributes:
        feeds, golden: what goes in, and what the FP32 model makes of it.
        samples: numbers of its samples; one where its outputs cannot be taken apart.
        rows: numbers of its answers, the rows of the first output: what labels belong to.
        split: each row of each output is a sample's.
    """

    feeds: Feeds
    golden: Mapping[str, Array]
    samples: tuple[int, ...]
    rows: tuple[int, ...]
    split: bool

    @cached_property
    def sq_golden(self) -> dict[str, NDArray[np.float64]]:
        """Output -> [num_samples], the sum of the squares of the golden values that are finite."""
        return {name: per_sample(array, array, split=self.split)[1] for name, array in self.golden.items()}

    def errors(self, name: str, found: Array) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
        """Sums over each sample of squared errors and of golden squares, [num_samples] each; and whether a value is lost."""
        golden = self.golden[name]
        error = np.subtract(found, golden, dtype=np.float64).reshape(len(self.samples) if self.split else 1, -1)
        sq_error = np.einsum("ij,ij->i", error, error)
        if np.isfinite(sq_error).all():
            return sq_error, self.sq_golden[name], False
        rows = per_sample(golden, found, split=self.split)
        return rows[0], rows[1], bool(rows[5].any())


def make_batches(feeds: FeedSet, infer: Callable[[Feeds], Mapping[str, Array]]) -> list[Batch]:
    """Run the FP32 model once over all samples, in batches large enough that weights are not what is read most."""
    batches: list[Batch] = []
    number = row = 0
    for feed in _merged(feeds):
        golden = tensors_of(infer(feed))
        count = feeds.samples_in(feed)
        split = bool(feeds.batched) and all(array.ndim and len(array) == count for array in golden.values())
        count = count if split else 1
        first = next(iter(golden.values()), None)
        num_rows = len(first) if first is not None and first.ndim else 1
        batches.append(
            Batch(feed, golden, tuple(range(number, number + count)), tuple(range(row, row + num_rows)), split)
        )
        number, row = number + count, row + num_rows
    return batches


def scores_of(scorer: Scorer, answers: Sequence[Mapping[str, Array]], batches: Sequence[Batch]) -> NDArray[np.float64]:
    """One score a row of all batches."""
    return np.concatenate([scorer(outputs, batch.rows) for outputs, batch in zip(answers, batches, strict=True)])


def drop(reference: float, scores: NDArray[np.float64]) -> float:
    """By how much a metric falls; infinite where a score is not finite, which is never a pass."""
    return reference - float(scores.mean()) if np.isfinite(scores).all() else math.inf


def _merged(feeds: FeedSet) -> Iterator[Feeds]:
    """Feeds joined along the sample axis, up to `BATCH` samples."""
    held: list[Feeds] = []
    for feed in feeds:
        fits = held and all(
            feed[name].shape[1:] == held[0][name].shape[1:]
            if name in feeds.batched
            else np.array_equal(feed[name], held[0][name])
            for name in feed
        )
        if held and not (feeds.batched and fits and sum(map(feeds.samples_in, held)) + feeds.samples_in(feed) <= BATCH):
            yield _joined(held, feeds.batched)
            held = []
        held.append(feed)
    yield _joined(held, feeds.batched)


def _joined(held: Sequence[Feeds], batched: frozenset[str]) -> Feeds:
    return {
        name: np.concatenate([feed[name] for feed in held]) if name in batched else array
        for name, array in held[0].items()
    }


@dataclass
class Model:
    """What a problem and its landscape share: the session, the answers, and the flow with its costs.

    Attributes:
        infer: runs the switchable emulation with flags.
        graph: its switches.
        costs: labels and prices keep-lists.
        batches: the data.
        batched: inputs along whose first axis samples lie.
        injected: tensor -> relative squared error of rounding it.
        num_runs: runs of the session so far.
    """

    infer: Callable[[Feeds], Mapping[str, Array]]
    graph: SwitchGraph
    costs: FlowCosts
    batches: list[Batch]
    batched: frozenset[str]
    injected: Mapping[str, float] = field(default_factory=dict)
    num_runs: int = 0

    @property
    def num_samples(self) -> int:
        """In all batches."""
        return sum(len(batch.samples) for batch in self.batches)

    def run(self, batch: Batch, flags: NDArray[np.bool_]) -> Mapping[str, Array]:
        """Answer a batch with some switches thrown."""
        self.num_runs += 1
        return self.infer({**batch.feeds, FLAGS: flags})

    def part(self, samples: Sequence[int]) -> list[Batch]:
        """Batches that hold these samples only."""
        wanted = set(samples)
        found = []
        for batch in self.batches:
            rows = [row for row, sample in enumerate(batch.samples) if sample in wanted]
            if not rows:
                continue
            if not batch.split or len(rows) == len(batch.samples):
                found.append(batch)
                continue
            feeds = {name: array[rows] if name in self.batched else array for name, array in batch.feeds.items()}
            golden = {name: array[rows] for name, array in batch.golden.items()}
            samples, answers = (tuple(numbers[row] for row in rows) for numbers in (batch.samples, batch.rows))
            found.append(Batch(feeds, golden, samples, answers, True))
        return found


class ModelProblem:
    """See `types.Problem`.

    Args:
        model: what runs.
        limit: largest drift, or largest drop of the mean score where a scorer is given.
        scorer: scores outputs, or None: the drift gates.
        reference: mean score of the FP32 model.
        held_out: samples that count in pass or fail and that nothing else is learnt from.
        digest: of model, data, gate and costs.
        confirm: measures the really rewritten model.
    """

    def __init__(
        self,
        model: Model,
        *,
        limit: float,
        scorer: Scorer | None,
        reference: float,
        held_out: Collection[int],
        digest: str,
        confirm: Callable[[KeepSet], float],
    ) -> None:
        self.confirm = confirm
        self.model = model
        self.limit = limit
        self.digest = digest
        self.gates_drift = scorer is None
        self._held_out = frozenset(held_out)
        self.units = [unit.key for unit in model.costs.flow.units if unit.key in model.costs.free]
        self._scorer = scorer
        self._reference = reference

    def canonical(self, kept: KeepSet) -> KeepSet:
        """What the plan keeps: these, and what lies between them where half would cost more in casts than it saves."""
        return self.model.costs.planned(kept)

    def cost(self, kept: KeepSet) -> float:
        """See `FlowCosts.cost`."""
        return self.model.costs.cost(kept)

    def suspicion(self) -> Mapping[str, float]:
        """Units at whose tensors or constants rounding alone does great harm."""
        found: dict[str, float] = {}
        for switch in self.model.graph.switches:
            injected = self.model.injected[switch.name]
            if injected >= SUSPICIOUS:
                for key in switch.needs:
                    found[key] = max(found.get(key, 0.0), 0.9 if injected >= 0.25 else 0.6)
        return found

    def evaluate(self, kept: KeepSet, samples: Sequence[int] | None = None, *, until: Until = "gate") -> Evaluation:
        """Run the batches; stop where nothing can change the answer any more."""
        flags = self.model.graph.flags(self.model.costs.half_keys(kept))
        return self.measure(flags, samples, until=until)

    def measure(
        self, flags: NDArray[np.bool_], samples: Sequence[int] | None = None, *, until: Until = "gate"
    ) -> Evaluation:
        """The same for flags."""
        batches = self.model.batches if samples is None else self.model.part(samples)
        meter = _Meter(batches, self._held_out)
        scores: list[NDArray[np.float64]] = []
        for batch in batches:
            found = self.model.run(batch, flags)
            meter.add(batch, found)
            if self._scorer is not None and not meter.nonfinite:
                scores.append(self._scorer(found, batch.rows))
            if meter.nonfinite or meter.surely_above(LOST_REL_L2) or self._is_decided(meter, until):
                break
        drift = meter.drift
        lost = meter.nonfinite or not drift < LOST_REL_L2
        measured, passes = drift, drift <= self.limit
        if self._scorer is not None:
            measured = drop(self._reference, np.concatenate(scores)) if scores else math.inf
            passes = not lost and measured <= self.limit + 1e-12
        share = meter.num_samples / self.model.num_samples
        whole = meter.num_samples == sum(len(batch.samples) for batch in batches)
        return Evaluation(drift, passes and whole and not lost, lost, measured, share, meter.energies, meter.learnable)

    def _is_decided(self, meter: _Meter, until: Until) -> bool:
        return until == "gate" and self.gates_drift and meter.surely_above(self.limit)


class _Meter:
    """Adds up energies per output, and knows what the whole of the golden answers weighs."""

    def __init__(self, batches: Sequence[Batch], held_out: frozenset[int] = frozenset()) -> None:
        self._golden: dict[str, float] = {}
        for batch in batches:
            for name, squares in batch.sq_golden.items():
                self._golden[name] = self._golden.get(name, 0.0) + float(squares.sum())
        self._held_out = held_out
        self._error: dict[str, float] = dict.fromkeys(self._golden, 0.0)
        self._seen = dict(self._error)
        self._error_held_out, self._seen_held_out = dict(self._error), dict(self._error)
        self.nonfinite = False
        self.num_samples = 0

    def add(self, batch: Batch, found: Mapping[str, Array]) -> None:
        self.num_samples += len(batch.samples)
        held_out = [row for row, sample in enumerate(batch.samples) if sample in self._held_out]
        for name in batch.golden:
            sq_error, sq_golden, is_lost = batch.errors(name, found[name])
            self._error[name] += float(sq_error.sum())
            self._seen[name] += float(sq_golden.sum())
            if held_out:
                self._error_held_out[name] += float(sq_error[held_out].sum())
                self._seen_held_out[name] += float(sq_golden[held_out].sum())
            self.nonfinite |= is_lost

    def surely_above(self, limit: float) -> bool:
        """Whether no further batch can bring the drift of some output down to the limit."""
        return any(error > limit**2 * self._golden[name] for name, error in self._error.items())

    @property
    def energies(self) -> tuple[float, ...]:
        """Relative squared error of each output over what was seen; infinite where a value of any is not finite."""
        return tuple(self._energy(self._error[name], self._seen[name]) for name in self._error)

    @property
    def learnable(self) -> tuple[float, ...]:
        """The same without the samples that are held out."""
        return tuple(
            self._energy(self._error[name] - self._error_held_out[name], self._seen[name] - self._seen_held_out[name])
            for name in self._error
        )

    def _energy(self, error: float, seen: float) -> float:
        if self.nonfinite:
            return math.inf
        return error / seen if seen else math.inf if error else 0.0

    @property
    def drift(self) -> float:
        """Of the worst output, over what was seen."""
        return math.sqrt(max(self.energies, default=0.0))


class ModelLandscape:
    """See `types.Landscape`. Items are the switches; probes use only the samples that are not held out."""

    def __init__(self, model: Model, samples: Sequence[int]) -> None:
        self._model = model
        self._samples = list(samples)
        self._position = {switch.name: place for place, switch in enumerate(model.graph.switches)}
        self.parts = model.costs.parts
        self.injected = dict(model.injected)
        self.samples_a_probe = min(SAMPLES_A_PROBE, len(self._samples))
        self.max_probes = PROBES_AN_ITEM * sum(1 for energy in self.injected.values() if energy > 0)

    @property
    def num_samples(self) -> int:
        """That probes may use."""
        return len(self._samples)

    def probe(self, item: str, samples: Sequence[int]) -> tuple[float, ...]:
        """Throw one switch."""
        flags = np.zeros(len(self._position), dtype=bool)
        flags[self._position[item]] = True
        batches = self._model.part([self._samples[sample] for sample in samples])
        meter = _Meter(batches)
        for batch in batches:
            meter.add(batch, self._model.run(batch, flags))
        return meter.energies

    def front(self, energies: Mapping[str, float], hard: KeepSet) -> list[Candidate]:
        """See `FlowCosts.front`."""
        return self._model.costs.front(energies, hard)

    def price(self, kept: KeepSet) -> float:
        """See `FlowCosts.price`."""
        return self._model.costs.price(kept)

    def price_changes(self, kept: KeepSet) -> Mapping[str, float]:
        """See `FlowCosts.price_changes`."""
        return self._model.costs.price_changes(kept)


def measure_injected(
    names: Sequence[str],
    batches: Sequence[Batch],
    half: HalfFormat,
    open_model: Callable[[Sequence[str]], contextlib.AbstractContextManager[Any]],
) -> dict[str, float]:
    """One FP32 pass over some samples: the relative squared error that rounding each named tensor puts in, unless it is all 0 there."""
    error = dict.fromkeys(names, 0.0)
    energy = dict.fromkeys(names, 0.0)
    for chunk in _chunks(list(names)):
        with open_model(chunk) as infer:
            for batch in batches:
                for name, array in infer(batch.feeds).items():
                    flat = np.asarray(array, dtype=np.float32).reshape(-1)
                    flat = flat[:: max(1, flat.size // MAX_VALUES)]
                    flat = flat[np.isfinite(flat)]
                    error[name] += float(np.square(half.rounded(flat).astype(np.float64) - flat).sum())
                    energy[name] += float(np.square(flat, dtype=np.float64).sum())
    return {name: error[name] / energy[name] for name in names if energy[name] > 0}


def _chunks(names: list[str], size: int = 128) -> Iterator[list[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]


def held_out_samples(num_samples: int, seed: int) -> tuple[int, ...]:
    """A quarter of the samples, which no probe sees; none where there are fewer than 8."""
    if num_samples < 8:
        return ()
    order = np.random.default_rng(seed).permutation(num_samples)
    return tuple(sorted(int(sample) for sample in order[: num_samples // 4]))

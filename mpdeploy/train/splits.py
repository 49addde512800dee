"""Disjoint samples for training, early stopping, calibration and the gates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mpdeploy.artifact import Array, Dataset, digest_of_arrays
from mpdeploy.errors import DataError

GATE_SHARE, STOPPING_SHARE, CALIBRATION_SHARE = 0.2, 0.1, 0.1
"""Shares of all samples; the rest is trained on. An official test split is the gate's, and the shares are of what is left."""
_NAMES = ("train", "early_stopping", "calibration", "gate")


@dataclass(frozen=True)
class Splits:
    """Four datasets without a sample in common: the gate's samples are seen by gates alone.

    Attributes:
        train: what weights are fitted to.
        early_stopping: what decides when to stop.
        calibration: what ranges are taken from.
        gate: what verdicts rest on.
        classes: names of the classes, in the order of their numbers; empty where they have none.
        source: what the samples are, for example `digits`, `mnist-official` or `custom`.
        notes: what a user should know of them, for example that duplicates were removed.
    """

    train: Dataset
    early_stopping: Dataset
    calibration: Dataset
    gate: Dataset
    classes: tuple[str, ...] = ()
    source: str = "custom"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        named = {name: getattr(self, name) for name in _NAMES}
        for (first, one), (second, other) in combinations(named.items(), 2):
            shared = np.intersect1d(one.ids, other.ids)
            if len(shared):
                raise DataError(
                    f"The splits '{first}' and '{second}' share {len(shared)} samples, for example id {shared[0]}.",
                    hint="a verdict on samples that were trained on says nothing: make the splits disjoint by sample id",
                )
        for name, dataset in named.items():
            if not len(dataset):
                raise DataError(f"The split '{name}' is empty.")

    @property
    def digest(self) -> str:
        """Digest over all four."""
        return digest_of_arrays(
            {name: np.frombuffer(bytes.fromhex(getattr(self, name).digest), np.uint8) for name in _NAMES}
        )

    def sizes(self) -> dict[str, int]:
        """Name -> number of samples."""
        return {name: len(getattr(self, name)) for name in _NAMES}


def stratified(
    labels: np.ndarray[tuple[int], np.dtype[np.int64]], sizes: tuple[int, ...], seed: int
) -> list[np.ndarray]:
    """Positions for parts of the given sizes, each class spread evenly over them; the rest makes one more part.

    Samples are dealt in an order that interleaves classes, so that every prefix holds each class in proportion.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    ranks = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        ranks[members] = (np.arange(len(members)) + generator.random()) / len(members)
    dealt = np.argsort(ranks, kind="stable")
    cuts = np.cumsum(sizes)
    return [np.sort(part) for part in np.split(dealt, cuts)]


@dataclass(frozen=True)
class Plan:
    """Which samples go where: positions in the samples, and in the official test samples where `gate` is None.

    Splitting is planned on labels and content digests alone, before any sample is decoded or copied.

    Attributes:
        train: positions to train on.
        early_stopping: positions for early stopping.
        calibration: positions for calibration.
        gate: positions for the gate, or None where official samples are the gate's.
        official_gate: positions in the official test samples, or None.
        notes: what was removed, in words.
    """

    train: Array
    early_stopping: Array
    calibration: Array
    gate: Array | None
    official_gate: Array | None
    notes: tuple[str, ...]


def plan_splits(
    labels: Array,
    content: Sequence[bytes],
    *,
    seed: int,
    limit: int | None = None,
    official: tuple[Array, Sequence[bytes]] | None = None,
) -> Plan:
    """Deal samples to the four splits, each class in proportion, and none of them twice.

    Content that appears again is removed: it could be trained on and judged by. The gate's official samples stay as they are; what
    repeats one of them is removed from the others.

    Args:
        labels: int64 [n].
        content: a digest a sample.
        seed: fixes the splits.
        limit: at most so many samples in all, a fifth of them the gate's.
        official: labels and digests of a test split that comes with the data: it becomes the gate's.

    Raises:
        DataError: too few samples, or a gate's class that nothing can be learnt of.
    """
    kept, notes = _without_repeats(labels, content, official[1] if official else ())
    chosen_official = None
    if official is not None:
        chosen_official = _at_most(official[0], None if limit is None else max(1, limit // 5), seed)
        limit = None if limit is None else limit - len(chosen_official)
    kept = kept[_at_most(labels[kept], limit, seed)]
    count = len(kept)
    sizes = (
        0 if official is not None else round(GATE_SHARE * count),
        round(STOPPING_SHARE * count),
        round(CALIBRATION_SHARE * count),
    )
    if min(sizes[1:]) < 1 or (official is None and sizes[0] < 1):
        raise DataError(
            f"{count} different samples are too few to train, stop, calibrate and judge with.",
            hint="give at least 20, better thousands",
        )
    gate, stopping, calibration, train = (kept[part] for part in stratified(labels[kept], sizes, seed))
    judged = official[0][chosen_official] if official is not None else labels[gate]
    unknown = np.setdiff1d(judged, labels[train])
    if len(unknown):
        raise DataError(
            f"The gate holds samples of class {unknown[0]}, and the training split has none of it.",
            hint="give every class at least ten samples, or leave that class out",
        )
    return Plan(train, stopping, calibration, None if official is not None else gate, chosen_official, notes)


def _at_most(labels: Array, limit: int | None, seed: int) -> Array:
    """Positions of at most `limit` samples, each class in proportion, in their order."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    return stratified(labels, (limit,), seed)[0]


def _without_repeats(
    labels: Array, content: Sequence[bytes], official: Sequence[bytes]
) -> tuple[Array, tuple[str, ...]]:
    judged = set(official)
    first: dict[bytes, int] = {}
    kept: list[int] = []
    num_judged = num_repeats = num_contradicting = 0
    for position, digest in enumerate(content):
        if digest in judged:
            num_judged += 1
        elif digest in first:
            num_repeats += 1
            num_contradicting += int(labels[first[digest]] != labels[position])
        else:
            first[digest] = position
            kept.append(position)
    notes = []
    if num_repeats:
        contradicting = f", {num_contradicting:,} of them with another label" if num_contradicting else ""
        notes.append(f"removed {num_repeats:,} of {len(content):,} samples that repeat an earlier one{contradicting}")
    if num_judged:
        notes.append(
            f"removed {num_judged:,} of {len(content):,} training samples that are also in the official test split"
        )
    return np.array(kept, dtype=np.int64), tuple(notes)


def content_digests(dataset: Dataset) -> list[bytes]:
    """A digest a sample over the bytes of its inputs; ids and labels do not count."""
    arrays = [np.ascontiguousarray(dataset.inputs[name]) for name in sorted(dataset.inputs)]
    digests = []
    for position in range(len(dataset)):
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(array[position].tobytes())
        digests.append(digest.digest())
    return digests


def split_samples(
    samples: Dataset,
    *,
    seed: int,
    limit: int | None = None,
    official: Dataset | None = None,
    classes: tuple[str, ...] = (),
    source: str = "custom",
) -> Splits:
    """Split samples that lie in memory (see `plan_splits`); labels are class numbers.

    Raises:
        DataError: no labels, or see `plan_splits`.
    """
    if samples.labels is None or (official is not None and official.labels is None):
        raise DataError("The samples have no labels: they could be neither trained on nor judged.")
    judged = None
    if official is not None:
        assert official.labels is not None
        judged = (official.labels, content_digests(official))
    plan = plan_splits(samples.labels, content_digests(samples), seed=seed, limit=limit, official=judged)
    gate = samples if official is None else official
    at = plan.gate if official is None else plan.official_gate
    assert at is not None
    return Splits(
        samples.take(plan.train), samples.take(plan.early_stopping), samples.take(plan.calibration), gate.take(at),
        classes=classes, source=source, notes=plan.notes,
    )  # fmt: skip

"""What a model's shapes and its profile mean to a server that batches: which axis is the batch, how many samples, which lengths.

A model can be batched where every input and every output has the same symbolic first axis, and its profile begins at one sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpdeploy.artifact import TensorSpec
from mpdeploy.engines.base import Profile, Shape, ShapeRange
from mpdeploy.errors import ConfigError


@dataclass(frozen=True)
class Batching:
    """How a model may be batched.

    Attributes:
        max_batch: the most samples in one batch; 0 where the model has no batch axis.
        sizes: the samples that the profiles were made for (one, the best and the most of each), rising; empty without a batch axis.
        profiles: the engine's optimisation profiles: input -> its smallest, best and largest shape, batch axis included.
    """

    max_batch: int
    sizes: tuple[int, ...]
    profiles: tuple[Mapping[str, ShapeRange], ...]

    def dims(self, spec: TensorSpec) -> list[int]:
        """A tensor's axes without the batch; -1 for one whose length varies."""
        axes = spec.shape or ()
        return [axis if isinstance(axis, int) else -1 for axis in (axes[1:] if self.max_batch else axes)]

    def samples(self) -> list[tuple[str, int, dict[str, list[int]]]]:
        """What each profile was made for: (a name, samples, input -> shape of one sample), without repeats.

        Each batch size with the best lengths, and the smallest and largest lengths where lengths vary.
        """
        found: list[tuple[str, int, dict[str, list[int]]]] = []
        for number, profile in enumerate(self.profiles):
            sizes = _sizes(profile, self.max_batch) if self.max_batch else (1,)
            wanted = [(size, "best") for size in sizes]
            if any(shapes.smallest[1:] != shapes.largest[1:] for shapes in profile.values()) or not self.max_batch:
                wanted += [(sizes[0], "smallest"), (sizes[-1], "largest")]
            for size, which in wanted:
                shapes = {name: self._sample(item, which) for name, item in profile.items()}
                name = f"{size} x {which}" + (f", profile {number}" if len(self.profiles) > 1 else "")
                if (size, shapes) not in [(other, known) for _, other, known in found]:
                    found.append((name, size, shapes))
        return found

    def fits(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether one of the profiles takes these shapes, batch axis included."""
        return any(
            set(shapes) == set(profile)
            and all(
                len(shape) == len(profile[name].best)
                and all(
                    low <= axis <= high
                    for low, axis, high in zip(profile[name].smallest, shape, profile[name].largest, strict=True)
                )
                for name, shape in shapes.items()
            )
            for profile in self.profiles
        )

    def _sample(self, shapes: ShapeRange, which: str) -> list[int]:
        shape: Shape = getattr(shapes, which)
        return list(shape[1:] if self.max_batch else shape)


def batching_of(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], profile: Profile, *, where: str
) -> Batching:
    """How a model with this profile may be batched.

    Args:
        inputs: the model's.
        outputs: the model's.
        profile: ranges of the inputs with symbolic axes.
        where: names the model in messages.

    Raises:
        ConfigError: a tensor of unknown rank, a symbolic axis without a range, or a profile that does not take a single sample.
    """
    for spec in (*inputs, *outputs):
        if spec.shape is None:
            raise ConfigError(
                f"{where}: the number of axes of '{spec.name}' is not known, and no server's configuration can hold that.",
                hint="export the model again with the shapes of its inputs and outputs",
            )
    shapes = {spec.name: _range(spec, profile, where) for spec in inputs}
    count = max((len(item.parts) for item in shapes.values()), default=0) or 1
    profiles = tuple(
        {name: item.parts[number] if len(item.parts) > 1 else item for name, item in shapes.items()}
        for number in range(count)
    )
    if not has_batch_axis(inputs, outputs):
        return Batching(0, (), profiles)
    smallest = max(item.smallest[0] for item in shapes.values())
    if smallest != 1:
        raise ConfigError(
            f"{where}: its profile begins at {smallest} samples; a server also runs single ones.",
            hint="build the engine with a profile whose smallest shape has one sample",
        )
    largest = [min(item.largest[0] for item in each.values()) for each in profiles]
    # Where profiles are for different lengths, a batch may be of any of them, so the smallest limit holds for all.
    lengths = [{name: (item.smallest[1:], item.largest[1:]) for name, item in each.items()} for each in profiles]
    max_batch = max(largest) if all(each == lengths[0] for each in lengths) else min(largest)
    sizes = sorted({1} | {size for each in profiles for size in _sizes(each, max_batch)})
    return Batching(max_batch, tuple(sizes), profiles)


def _sizes(profile: Mapping[str, ShapeRange], max_batch: int) -> tuple[int, ...]:
    """The samples of a profile's smallest, best and largest shape that may be asked for."""
    smallest = max(item.smallest[0] for item in profile.values())
    best = min(item.best[0] for item in profile.values())
    largest = min(item.largest[0] for item in profile.values())
    return tuple(dict.fromkeys(min(size, max_batch) for size in (smallest, best, largest)))


def has_batch_axis(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether all inputs and outputs have one and the same symbolic first axis."""
    first = {spec.shape[0] if spec.shape else 0 for spec in (*inputs, *outputs)}
    return bool(inputs) and len(first) == 1 and isinstance(next(iter(first)), str)


def _range(spec: TensorSpec, profile: Profile, where: str) -> ShapeRange:
    axes = spec.shape or ()
    found = profile.get(spec.name)
    if found is not None:
        return found
    if any(not isinstance(axis, int) for axis in axes):
        raise ConfigError(
            f"{where}: the input '{spec}' has a symbolic axis and the run has no profile for it.",
            hint="build an engine of this run first: its profile says which lengths are served",
        )
    fixed = tuple(int(axis) for axis in axes if isinstance(axis, int))
    return ShapeRange(fixed, fixed, fixed)


def profile_from_sidecar(sidecar: Mapping[str, Any]) -> dict[str, ShapeRange]:
    """The profile of an engine's sidecar, with the parts it was joined from where there are several."""
    several: Mapping[str, Any] = sidecar.get("profiles") or {}

    def range_of(shapes: Any, parts: tuple[ShapeRange, ...] = ()) -> ShapeRange:
        smallest, best, largest = (tuple(shape) for shape in shapes)
        return ShapeRange(smallest, best, largest, parts)

    return {
        name: range_of(shapes, tuple(range_of(part) for part in several.get(name, ())))
        for name, shapes in sidecar["profile"].items()
    }

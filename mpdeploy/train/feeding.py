"""Feeding: samples in an order fixed by the seed, augmented, on the device, and ready before the step wants them.

A feeder can stop after any batch and go on there in another process: the order comes from one generator, augmentation from another,
and each batch carries the second one's state. A thread makes batches ready ahead; it changes neither.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpdeploy.artifact import Array, Dataset
from mpdeploy.config import TrainConfig
from mpdeploy.errors import ConfigError, DataError
from mpdeploy.user_code import user_call


@dataclass(frozen=True)
class Batch:
    """The samples of one optimiser step, or this rank's share of them.

    Attributes:
        number: its place in the epoch, from 0.
        inputs: in the dataset's order, on the device.
        labels: on the device.
        ids: the samples' ids, on the host.
        num_global: samples of the step over all ranks, which the loss is averaged over.
        smallest_share: samples of the rank that has the fewest, at least 1.
        counts: False where a batch is so small that none of it is this rank's: it runs one sample along, whose loss weighs nothing.
        augmentation: state of the augmentation's generator after this batch.
        ready: on CUDA, recorded when the copies are done.
    """

    number: int
    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    ids: Array
    num_global: int
    smallest_share: int
    augmentation: torch.Tensor
    counts: bool = True
    ready: Any = None

    def micro_batches(self, count: int) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
        """Up to `count` parts of nearly equal size, none empty; as many on every rank."""
        count = min(count, self.smallest_share)
        parts = [values.tensor_split(count) for values in (*self.inputs, self.labels)]
        for *inputs, labels in zip(*parts, strict=True):
            yield tuple(inputs), labels


class Feeder:
    """Batches of a training set, epoch after epoch.

    Each rank draws the same order and takes its share of every batch. Where there is an augmentation it is applied to the whole
    batch on every rank, so that any number of ranks sees the same samples.
    """

    def __init__(
        self, dataset: Dataset, config: TrainConfig, device: str, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if dataset.labels is None:
            raise DataError(f"Training wants datasets with labels, found inputs {list(dataset.inputs)} and no labels.")
        self.dataset = dataset
        self.config = config
        self.device = device
        self.rank, self.world_size = rank, world_size
        self.prefetch = config.prefetch if config.prefetch is not None else (2 if device == "cuda" else 0)
        self.num_batches = -(-len(dataset) // config.batch_size)
        self._order = torch.Generator().manual_seed(config.seed)
        self._order_before = self._order.get_state()
        self._augmentation = torch.Generator().manual_seed(config.seed + 1)
        self._consumed = self._augmentation.get_state()
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._probed = config.augment is None

    def epoch(self, first: int = 0) -> Iterator[Batch]:
        """The batches of the next epoch, from number `first` on."""
        self._order_before = self._order.get_state()
        order = torch.randperm(len(self.dataset), generator=self._order).numpy()
        numbers = iter(range(first, self.num_batches))
        if not self._probed:
            for number in numbers:
                yield self._handed_out(self._probe(order, number))
                break
        source = self._ahead(order, numbers) if self.prefetch else (self._made(order, number) for number in numbers)
        for batch in source:
            yield self._handed_out(batch)

    def state_dict(self, *, next_batch: int) -> dict[str, Any]:
        """Where it is: `next_batch` is the number of the batch that comes next, 0 at the end of an epoch."""
        order = self._order_before if next_batch else self._order.get_state()
        return {"order": order, "augmentation": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; give `next_batch` to `epoch` again."""
        self._order.set_state(state["order"])
        self._consumed = state["augmentation"]
        self._augmentation.set_state(state["augmentation"])

    def _handed_out(self, batch: Batch) -> Batch:
        self._consumed = batch.augmentation
        if batch.ready is not None:
            current = torch.cuda.current_stream()
            current.wait_event(batch.ready)
            for values in (*batch.inputs, batch.labels):
                values.record_stream(current)
        return batch

    def _made(self, order: Array, number: int) -> Batch:
        assert self.dataset.labels is not None
        chosen = order[number * self.config.batch_size : (number + 1) * self.config.batch_size]
        num_global = len(chosen)
        share, counts = share_of(num_global, self.rank, self.world_size)
        if self.config.augment is None:
            chosen, share = chosen[share], slice(None)
        arrays = [*(array[chosen] for array in self.dataset.inputs.values()), self.dataset.labels[chosen]]
        if self._stream is None:
            *inputs, labels = (torch.from_numpy(np.asarray(array)) for array in arrays)
            ready = None
            made = self._augmented(tuple(inputs))
        else:
            with torch.cuda.stream(self._stream):
                pinned = [torch.from_numpy(np.asarray(array)).pin_memory() for array in arrays]
                *inputs, labels = (values.to(self.device, non_blocking=True) for values in pinned)
                made = self._augmented(tuple(inputs))
                ready = torch.cuda.Event()
                ready.record(self._stream)
        return Batch(
            number,
            tuple(laid_out(values[share], self.config) for values in made),
            labels[share],
            self.dataset.ids[chosen][share],
            num_global,
            max(num_global // self.world_size, 1),
            self._augmentation.get_state(),
            counts,
            ready,
        )

    def _augmented(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        augment, names = self.config.augment, tuple(self.dataset.inputs)
        if augment is None:
            return inputs
        if len(names) == 1:
            return (user_call(augment, inputs[0], self._augmentation),)
        changed = user_call(augment, dict(zip(names, inputs, strict=True)), self._augmentation)
        if not isinstance(changed, dict) or set(changed) != set(names):
            found = sorted(changed) if isinstance(changed, dict) else type(changed).__name__
            raise ConfigError(f"train.augment returned {found}, expected a dict with {list(names)}.")
        return tuple(changed[name] for name in names)

    def _probe(self, order: Array, number: int) -> Batch:
        """The first batch, made in this thread, to see whether augmentation draws from a generator that the model draws from too."""
        before = _global_draws()
        batch = self._made(order, number)
        self._probed = True
        if _global_draws() != before:  # a thread would draw at another time in every run
            self.prefetch = 0
        return batch

    def _ahead(self, order: Array, numbers: Iterator[int]) -> Iterator[Batch]:
        """Batches that a thread makes ready, at most `prefetch` ahead."""
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(self.prefetch)
        stopped = threading.Event()

        def put(item: Batch | BaseException | None) -> None:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def produce() -> None:
            try:
                for number in numbers:
                    if stopped.is_set():
                        return
                    put(self._made(order, number))
                put(None)
            except BaseException as error:  # it is raised again where the batch is wanted
                put(error)

        thread = threading.Thread(target=produce, name="mpdeploy-feeder", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()


def _global_draws() -> tuple[Any, ...]:
    return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), random.getstate()


def share_of(count: int, rank: int, world_size: int) -> tuple[slice, bool]:
    """A rank's share of `count` samples, and whether it counts: where there is none, one sample is run along for nothing."""
    share = slice(count * rank // world_size, count * (rank + 1) // world_size)
    return (share, True) if share.start < share.stop else (slice(0, 1), False)


def laid_out(values: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """Images as NHWC in memory where `train.channels_last` asks for it; anything else as it is."""
    if config.channels_last and values.ndim == 4 and values.is_floating_point():
        return values.contiguous(memory_format=torch.channels_last)
    return values


def tensors_of(dataset: Dataset, device: str) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """A dataset's inputs, in its order, and its labels, on a device. Integers stay integers.

    Raises:
        DataError: it has no labels.
    """
    if dataset.labels is None:
        raise DataError(f"Training wants datasets with labels, found inputs {list(dataset.inputs)} and no labels.")
    *inputs, labels = (
        torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)
        for array in (*dataset.inputs.values(), dataset.labels)
    )
    return tuple(inputs), labels

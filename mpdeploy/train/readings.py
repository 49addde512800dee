"""Numbers of a step on their way to the host, without making the GPU wait."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch


class Reading:
    """A step's time and some of its scalars.

    On CUDA the scalars are copied into pinned memory behind the step's own work, and the time is that between two events: nothing
    waits until `values` is called, and then only for this step. On a CPU both are there at once.
    """

    def __init__(self, device: str) -> None:
        self._on_cuda = device == "cuda"
        self._began = time.perf_counter()
        self._milliseconds: float | None = None
        if self._on_cuda:
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._start.record()

    def take(self, scalars: Sequence[torch.Tensor]) -> None:
        """The step is launched: these are its scalars."""
        packed = torch.stack([value.detach().double() for value in scalars])
        if not self._on_cuda:
            self._host = packed
            self._milliseconds = (time.perf_counter() - self._began) * 1e3
            return
        self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        self._host.copy_(packed, non_blocking=True)
        self._end.record()

    def values(self) -> list[float]:
        """The scalars, once the step is done."""
        if self._on_cuda:
            self._end.synchronize()
        return [float(value) for value in self._host.tolist()]

    @property
    def milliseconds(self) -> float:
        """From the step's beginning to its end."""
        if self._milliseconds is None:
            self._end.synchronize()
            self._milliseconds = self._start.elapsed_time(self._end)
        return self._milliseconds

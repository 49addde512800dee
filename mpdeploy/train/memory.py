"""Memory: bytes of activations that backward keeps (the same on every machine), the GPU's peak, and the process's."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn


class SavedBytes:
    """Bytes of tensors that a forward pass keeps for backward, weights and buffers left out, each storage counted once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.num_bytes = 0

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Count what forward passes within the block keep."""
        weights = [*self._model.parameters(), *self._model.buffers()]
        seen = {value.untyped_storage().data_ptr() for value in weights}

        def pack(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in seen:  # what is kept stays alive: no other storage can take its address
                seen.add(storage.data_ptr())
                self.num_bytes += storage.nbytes()
            return value.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            yield


class PeakMemory:
    """Peaks from when it was made: of the process's resident memory, and of what torch holds on the GPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._at_start = psutil.Process().memory_info().rss
        self._since = "the start of training" if _reset_peak() else "the start of the process"
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def to_json(self) -> dict[str, Any]:
        """In bytes."""
        found = {"rss_at_start": self._at_start, "rss_peak": _peak(), "rss_peak_since": self._since}
        if self._device == "cuda":
            found["cuda_peak_allocated"] = torch.cuda.max_memory_allocated()
            found["cuda_peak_reserved"] = torch.cuda.max_memory_reserved()
        return found


def _reset_peak() -> bool:
    """Set the kernel's peak of this process to what it uses now. Linux alone can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

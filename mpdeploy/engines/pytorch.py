"""PyTorch, the reference: a program that `torch.export` made (`model.pt2`), run by torch itself in the precision it was made in.

It is no row of the engine table: torch cannot run an ONNX file, so nothing is built from one. `compare` and `bench` take a `.pt2`
file wherever they take a model or an engine. On a GPU it runs there, timed by CUDA events, with the copies measured apart.
A `.pt2` file is code, like a checkpoint: open only those that you trust.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, Feeds, TensorSpec
from mpdeploy.engines.host import HostRunner, Specs, one_line
from mpdeploy.errors import MissingExtraError, ModelError, UnavailableError

NAMES = "mpdeploy.json"
SUFFIX = ".pt2"


def _library() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError.for_extra("torch", "train") from error
    return torch


def save_program(program: Any, path: Path, output_names: Sequence[str]) -> None:
    """Write an exported program with the names of its outputs, which torch does not keep."""
    _library().export.save(program, path, extra_files={NAMES: json.dumps({"outputs": list(output_names)})})


class TorchRunner(HostRunner):
    """A program in torch. `device`: `cpu`, `cuda`, or `auto` for CUDA where it works."""

    title = "PyTorch"

    def __init__(self, path: Path, *, device: str = "auto") -> None:
        super().__init__(path)
        self._wanted = device
        self._module: Any = None
        self._in_spec: Any = None

    def _open(self) -> tuple[Specs, Specs]:
        torch = _library()
        works = torch.cuda.is_available()
        if self._wanted == "cuda" and not works:
            raise UnavailableError(
                f"torch {torch.__version__} cannot use a GPU here.", hint="mpdeploy doctor says what is here"
            )
        extra = {NAMES: ""}
        try:
            program = torch.export.load(self.path, extra_files=extra)
        except Exception as error:  # zip, pickle and schema errors of every kind
            raise ModelError(
                f"{self.path} is no program of torch.export: {one_line(error, 300)}",
                hint="write it with torch.export.save; torch reads programs of its own version and older ones",
            ) from error
        self.device = "cuda" if works and self._wanted != "cpu" else "cpu"
        if self.device == "cuda":
            program = torch.export.passes.move_to_device_pass(program, "cuda")
            self.includes = (
                "the forward pass between CUDA events, Python's launches included; no copies to or from the device"
            )
        self._module, self._in_spec = program.module(), program.call_spec.in_spec
        taken = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
        (output,) = (node for node in program.graph.nodes if node.op == "output")
        made = {node.name: node.meta["val"] for node in output.args[0]}
        told = program.graph_signature.user_outputs
        names = json.loads(extra[NAMES])["outputs"] if extra[NAMES] else told
        return (
            tuple(_spec(name, taken[name]) for name in program.graph_signature.user_inputs),
            tuple(_spec(name, made[own]) for name, own in zip(names, told, strict=True)),
        )

    def _close(self) -> None:
        self._module = self._in_spec = None

    def _caller(self, feeds: Feeds) -> Callable[[], Any]:
        torch, module = _library(), self._module
        tensors = self._on_device(feeds)
        args, kwargs = torch.utils._pytree.tree_unflatten(tensors, self._in_spec)

        def run() -> Any:
            with torch.inference_mode():
                return module(*args, **kwargs)

        return run

    def _on_device(self, feeds: Feeds) -> list[Any]:
        torch = _library()
        hosts = [torch.from_numpy(np.require(feeds[spec.name], requirements=["C", "W"])) for spec in self._inputs]
        return [host.to(self.device) for host in hosts]

    def _arrays(self, returned: Any) -> dict[str, Array]:
        leaves = _library().utils._pytree.tree_leaves(returned)
        # a copy: an output may be an input, or memory that the module keeps
        return {spec.name: leaf.cpu().numpy().copy() for spec, leaf in zip(self._outputs, leaves, strict=True)}

    def time_ms(self, feeds: Feeds, iterations: int) -> list[float]:
        """Milliseconds of each run: see `includes`."""
        if self.device != "cuda":
            return super().time_ms(feeds, iterations)
        self._check(feeds)
        torch, call, times = _library(), self._caller(feeds), []
        for _ in range(iterations):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._guarded(feeds, call)
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)))
        return times

    def copies_ms(self, feeds: Feeds, iterations: int) -> dict[str, list[float]]:
        """Milliseconds of copying the feeds to the device and the answers back; nothing on the CPU."""
        self._check(feeds)
        if self.device != "cuda":
            return {}
        torch, times = _library(), {"to_device": [], "to_host": []}  # type: ignore[var-annotated]
        answer = self._guarded(feeds, self._caller(feeds))
        for _ in range(iterations):
            torch.cuda.synchronize()
            begin = time.perf_counter_ns()
            self._on_device(feeds)
            torch.cuda.synchronize()
            copied = time.perf_counter_ns()
            self._arrays(answer)
            times["to_device"].append((copied - begin) / 1e6)
            times["to_host"].append((time.perf_counter_ns() - copied) / 1e6)
        return times


def _spec(name: str, value: Any) -> TensorSpec:
    shape = tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape)
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), shape)

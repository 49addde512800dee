"""An engine at work on a GPU: context, stream, buffers, and the CUDA graph of the shapes that are bound."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mpdeploy.artifact import Array, Engine, Feeds, TensorSpec
from mpdeploy.engines.tensorrt.build import DTYPE_FROM_DATATYPE
from mpdeploy.engines.tensorrt.library import Family
from mpdeploy.engines.tensorrt.load import deserialised
from mpdeploy.engines.tensorrt.log import collected_lines
from mpdeploy.errors import BuildError, DataError, StageFailedError, UnavailableError

Shapes = dict[str, tuple[int, ...]]


class Session:
    """A deserialised engine with its context, stream and buffers; alive between `__enter__` and `__exit__`."""

    def __init__(self, trt: Any, family: Family, engine: Engine) -> None:
        import torch

        self.torch = torch
        self.where = str(engine.path)
        self.device = torch.device("cuda", torch.cuda.current_device())
        with collected_lines(trt) as (logger, lines):
            self.runtime, self.engine = deserialised(trt, family, engine, logger, lines, ordinal=self.device.index)
            self.context = make_context(trt, self.engine)
            if self.context is None:
                raise BuildError(
                    f"{self.where} cannot make an execution context:\n{lines.text()}",
                    hint="free device memory: the context needs "
                    f"{self.engine.device_memory_size_v2 / 2**20:.0f} MiB beside the weights",
                )
        self.trt = trt
        self.stream = torch.cuda.Stream(self.device)
        self.wants_graph = bool(engine.sidecar["options"]["cuda_graph"])
        self.graph: Any = None
        self.shapes: Shapes = {}
        self.buffers: dict[str, Any] = {}
        self.allocator = _make_allocator(trt, torch, self.device)
        self.input_names: list[str] = []
        self.output_names: list[str] = []
        self.dtypes: dict[str, str] = {}
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            is_input = self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.input_names if is_input else self.output_names).append(name)
            self.dtypes[name] = DTYPE_FROM_DATATYPE[self.engine.get_tensor_dtype(name).name]

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Make the session's device and stream torch's current ones."""
        with self.torch.cuda.device(self.device), self.torch.cuda.stream(self.stream):
            yield

    def close(self) -> None:
        """Give everything back, what depends on other things first."""
        self.stream.synchronize()
        self.graph = None
        self.buffers.clear()
        self.context = None
        self.allocator = None
        self.engine = None
        self.runtime = None

    def bind(self, feeds: Feeds) -> None:
        """Copy the feeds to the device, and make the context ready for their shapes."""
        arrays = {name: np.require(feeds[name], self.numpy_dtype(name), ["C", "W"]) for name in self.input_names}
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        if shapes != self.shapes:
            self.shapes, self.graph = {}, None  # nothing half bound is kept where this raises
            self.set_shapes(shapes)
            self.shapes = shapes
        for name, array in arrays.items():
            self.buffers[name].copy_(self.tensor_from_array(array), non_blocking=True)
        self.stream.synchronize()  # the copies must not reach into a timed run

    def set_shapes(self, shapes: Shapes) -> None:
        """Choose a profile, set the input shapes, and give every tensor memory."""
        context, torch = self.context, self.torch
        profile = profile_for(shapes, self.profiles(), where=self.where)
        with collected_lines(self.trt) as (_, lines):
            try:
                accepted = True
                if profile != context.active_optimization_profile:
                    accepted = context.set_optimization_profile_async(profile, self.stream.cuda_stream)
                    self.stream.synchronize()
                accepted = accepted and all(context.set_input_shape(name, shape) for name, shape in shapes.items())
                accepted = accepted and not context.infer_shapes()  # it returns the names that still lack values
            except RuntimeError as error:  # the bindings raise it where the library returns an error code
                raise StageFailedError(
                    f"{self.where} cannot take the shapes {shapes}: {error}\n{lines.text()}"
                ) from error
            if not accepted:
                raise StageFailedError(f"{self.where} cannot take the shapes {shapes}:\n{lines.text()}")
        try:
            self.set_memory(shapes)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.where, error) from error

    def set_memory(self, shapes: Shapes) -> None:
        """Give every tensor memory for the shapes that the context was given."""
        context, torch = self.context, self.torch
        for name in (*self.input_names, *self.output_names):
            shape = shapes[name] if name in shapes else tuple(context.get_tensor_shape(name))
            if any(axis < 0 for axis in shape):  # its shape depends on data: the engine asks for memory as it runs
                if self.wants_graph:
                    raise UnavailableError(
                        f"{self.where} cannot run as a CUDA graph: the shape of its output '{name}' depends on data.",
                        hint="build it without cuda_graph",
                    )
                self.buffers.pop(name, None)
                accepted = context.set_output_allocator(name, self.allocator)
            else:
                on_host = self.engine.get_tensor_location(name) == self.trt.TensorLocation.HOST
                device = torch.device("cpu") if on_host else self.device
                # One element at least: an empty tensor has no address.
                memory = torch.empty(max(1, int(np.prod(shape))), dtype=self.torch_dtype(name), device=device)
                self.buffers[name] = memory[: int(np.prod(shape))].view(shape)
                accepted = context.set_tensor_address(name, memory.data_ptr())
            if not accepted:
                raise StageFailedError(f"{self.where} does not accept memory for '{name}'.")

    def profiles(self) -> list[dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
        """Per optimisation profile: dynamic input -> its smallest and its largest shape."""
        dynamic = [name for name in self.input_names if any(axis < 0 for axis in self.engine.get_tensor_shape(name))]
        found = []
        for index in range(self.engine.num_optimization_profiles):
            ranges = {name: self.engine.get_tensor_profile_shape(name, index) for name in dynamic}
            found.append({name: (tuple(shapes[0]), tuple(shapes[2])) for name, shapes in ranges.items()})
        return found

    def launch(self) -> None:
        """Run once on what is bound, and wait for it."""
        self.enqueue()
        self.stream.synchronize()

    def timed_launch_ms(self) -> float:
        """Run once on what is bound; the time between an event before the enqueue and one after it."""
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(self.stream)
        self.enqueue()
        end.record(self.stream)
        end.synchronize()
        return float(begin.elapsed_time(end))

    def enqueue(self) -> None:
        """Put one inference on the stream, by replaying the graph where one is wanted."""
        if not self.wants_graph:
            self.execute()
            return
        if self.graph is None:
            self.graph = self.captured()
        self.graph.replay()

    def execute(self) -> None:
        """Put one inference on the stream."""
        self.allocator.error = None
        with collected_lines(self.trt) as (_, lines):
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                if self.allocator.error is not None:
                    raise out_of_memory(self.where, self.allocator.error) from self.allocator.error
                raise StageFailedError(f"{self.where} failed while it ran:\n{lines.text()}")

    def captured(self) -> Any:
        """A CUDA graph of the bound shapes' work, after one plain run: new shapes do work that cannot be captured."""
        self.execute()
        self.stream.synchronize()
        can_capture = getattr(self.context, "is_stream_capturable", None)  # TensorRT-RTX only
        if can_capture is not None and not can_capture(self.stream.cuda_stream):
            raise UnavailableError(
                f"{self.where} cannot be captured in a CUDA graph for shapes {self.shapes}.",
                hint="build it without cuda_graph",
            )
        graph = self.torch.cuda.CUDAGraph()
        try:
            with self.torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.execute()
        except RuntimeError as error:  # torch's own, from ending a capture that something in it invalidated
            raise StageFailedError(
                f"{self.where} failed while its CUDA graph was captured for shapes {self.shapes}: {error}",
                hint="build it without cuda_graph",
            ) from error
        return graph

    def results(self, outputs: tuple[TensorSpec, ...]) -> dict[str, Array]:
        """The outputs as arrays of their own, in the model's dtypes."""
        answer: dict[str, Array] = {}
        for spec in outputs:
            tensor = self.buffers.get(spec.name)
            if tensor is None:
                tensor = self.allocator.result(spec.name, self.torch_dtype(spec.name))
            host = tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()
            if self.dtypes[spec.name] == "bfloat16":  # numpy has no such type: its bits travel as int16
                array = host.view(self.torch.int16).numpy().view(ml_dtypes.bfloat16)
            else:
                array = host.numpy()
            answer[spec.name] = array.astype(np.dtype(spec.dtype), copy=False)
        return answer

    def timed_copies_ms(self, feeds: Feeds, outputs: tuple[TensorSpec, ...]) -> tuple[float, float]:
        """Milliseconds of the feeds' way to the device and of the answers' way back, Python's part included."""
        begin = time.perf_counter_ns()
        self.bind(feeds)
        bound = time.perf_counter_ns()
        self.launch()
        run = time.perf_counter_ns()
        self.results(outputs)
        done = time.perf_counter_ns()
        return (bound - begin) / 1e6, (done - run) / 1e6

    def numpy_dtype(self, name: str) -> np.dtype[Any]:
        """The dtype the engine takes (a float64 input of the model becomes float32)."""
        return np.dtype(self.dtypes[name])

    def torch_dtype(self, name: str) -> Any:
        """The same as a torch dtype."""
        return getattr(self.torch, self.dtypes[name])

    def tensor_from_array(self, array: Array) -> Any:
        """A host tensor over the array's memory."""
        if array.dtype == ml_dtypes.bfloat16:
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)


def make_context(trt: Any, engine: Any) -> Any:
    """An execution context, or None where the library cannot make one.

    TensorRT-RTX compiles kernels for the shapes it meets as it runs, in the background unless told not to: times would fall
    while they are taken, and a captured graph would keep the slow kernels. So it is told to compile before it runs.
    """
    strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None:
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return engine.create_execution_context(config)


def out_of_memory(where: str, error: BaseException) -> StageFailedError:
    """The failure for a device that has no memory left."""
    return StageFailedError(
        f"{where} needs more memory than the GPU has left: {str(error).splitlines()[0]}",
        hint="feed smaller batches, or end what else uses the GPU",
    )


def profile_for(
    shapes: Mapping[str, tuple[int, ...]],
    profiles: list[dict[str, tuple[tuple[int, ...], tuple[int, ...]]]],
    *,
    where: str,
) -> int:
    """The first optimisation profile that holds `shapes`.

    Raises:
        DataError: none does; the message gives the ranges that were built.
    """
    for index, ranges in enumerate(profiles):
        if all(
            all(low <= axis <= high for low, axis, high in zip(smallest, shapes[name], largest, strict=True))
            for name, (smallest, largest) in ranges.items()
        ):
            return index
    given = ", ".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in shapes.items())
    built = " or ".join(
        ", ".join(
            f"{name}={'x'.join(map(str, low))} to {'x'.join(map(str, high))}" for name, (low, high) in ranges.items()
        )
        for ranges in profiles
    )
    raise DataError(
        f"{where} was built for shapes {built} and was given {given}.",
        hint="feed smaller batches, or build again with a wider --profile",
    )


def _make_allocator(trt: Any, torch: Any, device: Any) -> Any:
    class Allocator(trt.IOutputAllocator):
        """Device memory for outputs whose shapes depend on data."""

        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.memory: dict[str, Any] = {}
            self.shapes: Shapes = {}
            self.error: Exception | None = None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            return self.reallocate_output_async(tensor_name, memory, size, alignment, 0)

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            # torch aligns to 512 bytes, which is more than is ever asked for
            held = self.memory.get(tensor_name)
            if held is None or held.numel() < size:
                try:
                    held = torch.empty(max(1, size), dtype=torch.uint8, device=device)
                except Exception as error:  # out of memory: the bindings would swallow it
                    self.error = error
                    return 0
                self.memory[tensor_name] = held
            return int(held.data_ptr())

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shapes[tensor_name] = tuple(shape)

        def result(self, name: str, dtype: Any) -> Any:
            """The output as it was announced, over the first bytes of its memory."""
            shape = self.shapes[name]
            size = int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size()
            return self.memory[name][:size].view(dtype).view(shape)

    return Allocator()

"""ONNX file -> `engine.plan` and `engine.json`: parse, configure, build, write.

Two facts about types: a float64 input or output becomes FP32 in the engine (the runner converts, the sidecar's
`engine_dtypes` says so), int64 stays int64. Errors are collected by the logger alone: a Python `error_recorder` would
see nothing more, and one that is set before parsing crashes the process when it is torn down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpdeploy.artifact import Engine, OnnxModel, TensorSpec
from mpdeploy.engines.accounting import Nodes
from mpdeploy.engines.base import Profile, ShapeRange
from mpdeploy.engines.sidecar import described, written
from mpdeploy.engines.tensorrt.audit import layers_from_network
from mpdeploy.engines.tensorrt.driver import Gpu
from mpdeploy.engines.tensorrt.library import Family
from mpdeploy.engines.tensorrt.log import Lines, collected_lines, deferred_signals, without_noise
from mpdeploy.engines.tensorrt.options import TensorRTOptions
from mpdeploy.errors import BuildError, ConfigError, closest_names
from mpdeploy.files import atomic_path

PLAN = "engine.plan"

Progress = Callable[[str, int, int], bool | None]
"""`on_progress(phase, done, total)`; returning False cancels the build."""

# TensorRT's DataType member -> the dtype of arrays.
DTYPE_FROM_DATATYPE = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_FLAG_FROM_OPTION = {
    "tf32": "TF32",
    "sparse_weights": "SPARSE_WEIGHTS",
    "version_compatible": "VERSION_COMPATIBLE",
    "refit": "REFIT",
    "strip": "STRIP_PLAN",
    "weight_streaming": "WEIGHT_STREAMING",
}


def build_plan(
    trt: Any,
    family: Family,
    model: OnnxModel,
    profile: Profile,
    options: TensorRTOptions,
    folder: Path,
    *,
    gpu: Gpu | None,
    on_progress: Progress | None = None,
) -> Engine:
    """Build `model` into `folder`; see `EngineBackend.build`.

    Raises:
        BuildError: the parser's or the builder's own errors, with the nodes they name.
        ConfigError: the profile or the options do not fit the model or the library.
    """
    started = time.perf_counter()
    with collected_lines(trt) as (logger, lines), deferred_signals() as interrupted:
        builder = trt.Builder(logger)
        # On 11 and in RTX every network is strongly typed; the flag says so to 10 and changes nothing there.
        typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network = builder.create_network(1 << int(typed))
        assert network.get_flag(typed)
        parser = trt.OnnxParser(network, logger)  # owns the weights: it must live until the plan is built
        if not parser.parse_from_file(str(model.path)):
            raise BuildError(parse_message(parser, lines, family, model.path), hint=_parse_hint(lines))
        inputs, engine_inputs = _specs(network.num_inputs, network.get_input, model.inputs, model.path)
        outputs, engine_outputs = _specs(network.num_outputs, network.get_output, model.outputs, model.path)
        check_profile(inputs, profile)
        config = builder.create_builder_config()
        flags = _configure(trt, family, config, options)
        if any(_is_dynamic(spec) for spec in inputs):
            for part in range(num_profiles(profile)):
                _add_profile(builder, config, inputs, profile, part, lines)
        cache = _read_timing_cache(config, options, lines)
        layers = layers_from_network(network, tf32=options.tf32)
        monitor = _make_monitor(trt, on_progress, interrupted)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if monitor.error is not None:
            raise monitor.error
        if plan is None:
            if monitor.cancelled_at:
                raise BuildError(f"The build of {model.path} was cancelled at '{monitor.cancelled_at}'.")
            raise BuildError(
                f"{family.title} {trt.__version__} cannot build {model.path}:\n{lines.text()}", hint=_build_hint(lines)
            )
    path = folder / PLAN
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(plan)
    if cache is not None and options.timing_cache and not options.timing_cache_readonly:
        with atomic_path(Path(options.timing_cache)) as temporary, temporary.open("wb") as file:
            file.write(config.get_timing_cache().serialize())
    sidecar = described(
        model, profile, folder, Nodes.of(model.path), engine=family.name, library=(trt.__name__, trt.__version__),
        options=options.to_json(), started=started,
    )  # fmt: skip
    sidecar |= {
        "device": gpu.to_json() if gpu else None,
        "flags": flags,
        "engine_dtypes": engine_inputs | engine_outputs,
        "warnings": list(dict.fromkeys(lines.warnings))[:50],
        "layers": [layer.to_json() for layer in layers],
    }
    return written(path, sidecar, inputs, outputs)


def check_profile(inputs: Sequence[TensorSpec], profile: Profile) -> None:
    """Refuse a profile that does not fit the model's inputs.

    Raises:
        ConfigError: a name that is no input, a rank or a fixed axis that differs, an order that is not
            smallest <= best <= largest, or a dynamic input without a range.
    """
    named = {spec.name: spec for spec in inputs}
    for name, shapes in profile.items():
        if name not in named:
            raise ConfigError(
                f"The profile names '{name}', which is no input of the model.",
                hint=f"closest names: {closest_names(name, named)}",
            )
        spec = named[name]
        axes = spec.shape or ()
        given = ",".join("x".join(map(str, shape)) for shape in shapes.to_json())
        for shape in (shapes.smallest, shapes.best, shapes.largest):
            if len(shape) != len(axes) or any(isinstance(a, int) and a != s for a, s in zip(axes, shape, strict=True)):
                raise ConfigError(
                    f"The profile {name}={given} does not fit the input '{spec}'.",
                    hint=f"give shapes of {len(axes)} axes, with the model's own length where it is fixed",
                )
        parts = shapes.parts or (shapes,)
        if any(not s <= b <= g for p in parts for s, b, g in zip(p.smallest, p.best, p.largest, strict=True)):
            raise ConfigError(
                f"The profile {name}={given} is not in order.",
                hint="give the smallest, the best, then the largest shape",
            )
    for spec in inputs:
        if _is_dynamic(spec) and spec.name not in profile:
            axes_text = "x".join(str(axis) for axis in spec.shape or ())
            raise ConfigError(
                f"The input '{spec}' has a dynamic shape and the profile gives no range for it.",
                hint=f"give --profile {spec.name}=MIN,OPT,MAX with shapes like {axes_text}",
            )


def num_profiles(profile: Profile) -> int:
    """How many optimisation profiles a profile asks for: an input with one range has it in each of them.

    Raises:
        ConfigError: two inputs ask for different numbers.
    """
    counts = {name: len(shapes.parts) for name, shapes in profile.items() if len(shapes.parts) > 1}
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"The inputs have different numbers of profiles: {', '.join(f'{n}: {c}' for n, c in counts.items())}.",
            hint="give each of them as often as the others, or once for all profiles",
        )
    return max(counts.values(), default=1)


def _is_dynamic(spec: TensorSpec) -> bool:
    return any(not isinstance(axis, int) for axis in spec.shape or ())


def _specs(
    count: int, tensor_at: Callable[[int], Any], declared: Sequence[TensorSpec], path: Path
) -> tuple[tuple[TensorSpec, ...], dict[str, str]]:
    """The model's specs in the network's order, and the dtype of those tensors that differ in the engine."""
    by_name = {spec.name: spec for spec in declared}
    specs: list[TensorSpec] = []
    differing: dict[str, str] = {}
    for index in range(count):
        tensor = tensor_at(index)
        dtype = DTYPE_FROM_DATATYPE.get(tensor.dtype.name)
        if dtype is None:
            raise BuildError(
                f"'{tensor.name}' of {path} has the type {tensor.dtype.name}, which no array has.",
                hint="keep inputs and outputs in FP32 (--keep-io)",
            )
        if tensor.is_network_input and tensor.is_shape_tensor:
            raise BuildError(
                f"The input '{tensor.name}' of {path} is itself a shape: its values decide other tensors' shapes.",
                hint="export the model with that shape as a constant, or as the dynamic axis of another input",
            )
        shape = tuple(
            axis if axis >= 0 else tensor.get_dimension_name(position) or None
            for position, axis in enumerate(tensor.shape)
        )
        known = by_name.get(tensor.name)
        spec = (
            known
            if known and known.shape is not None
            else TensorSpec(tensor.name, known.dtype if known else dtype, shape)
        )
        if spec.dtype != dtype:
            differing[spec.name] = dtype
        specs.append(spec)
    return tuple(specs), differing


def _configure(trt: Any, family: Family, config: Any, options: TensorRTOptions) -> list[str]:
    """Set the options; return the names of the builder flags that are on."""
    for option, name in _FLAG_FROM_OPTION.items():
        flag = getattr(trt.BuilderFlag, name)
        if getattr(options, option):
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
    # TensorRT-RTX allocates while it runs unless told not to, and what allocates cannot be captured.
    if options.cuda_graph and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.builder_optimization_level = options.builder_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.hardware_compatible != "none":
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatible.upper())
        config.hardware_compatibility_level = level
    if options.compute_capabilities:
        known = trt.ComputeCapability.__members__
        for name in options.compute_capabilities:
            if name not in known:
                raise ConfigError(
                    f"{family.title} {trt.__version__} does not build for {name}.",
                    hint=f"it knows {', '.join(item for item in known if item.startswith('SM'))}",
                )
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, name in enumerate(options.compute_capabilities):
            config.set_compute_capability(known[name], index)
    return sorted(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag))


def _add_profile(
    builder: Any, config: Any, inputs: Sequence[TensorSpec], profile: Profile, part: int, lines: Lines
) -> None:
    ranges = builder.create_optimization_profile()
    for spec in inputs:
        if _is_dynamic(spec):
            whole = profile[spec.name]
            shapes: ShapeRange = whole.parts[part] if len(whole.parts) > 1 else whole
            ranges.set_shape(spec.name, shapes.smallest, shapes.best, shapes.largest)
    if config.add_optimization_profile(ranges) < 0:
        raise BuildError(f"The library refuses the profile:\n{lines.text()}")


def _read_timing_cache(config: Any, options: TensorRTOptions, lines: Lines) -> Any:
    if options.timing_cache is None:
        return None
    path = Path(options.timing_cache)
    if not path.is_file() and options.timing_cache_readonly:
        raise ConfigError(
            f"The timing cache {path} does not exist and timing_cache_readonly is set.",
            hint="build once without timing_cache_readonly to write it",
        )
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise BuildError(
            f"The timing cache {path} cannot be used here:\n{lines.text()}",
            hint="it belongs to another GPU or version; give another file",
        )
    return cache


def _make_monitor(trt: Any, on_progress: Progress | None, interrupted: Callable[[], bool]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Hands steps on; cancels where the callback says so or raises, or a signal came."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.error: BaseException | None = None
            self.cancelled_at = ""

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if self.cancelled_at:
                return False
            go_on = not interrupted()
            if go_on and on_progress is not None:
                try:
                    go_on = on_progress(phase_name, step + 1, self.totals.get(phase_name, 0)) is not False
                except BaseException as error:  # raised again after the build: the bindings would swallow it
                    self.error, go_on = error, False
            if not go_on:
                self.cancelled_at = phase_name
            return go_on

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

    return Monitor()


def parse_message(parser: Any, lines: Lines, family: Family, path: Path) -> str:
    """What the parser refused, with node, op, file and line as it tells them."""
    faults = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        if error.node() >= 0:
            where = f"node '{error.node_name()}' ({error.node_operator()}, number {error.node()})"
        else:
            where = "the file"
        faults.append(f"{where}: {without_noise(error.desc())} [{error.file()}:{error.line()}, {error.func()}]")
    return f"{family.title} cannot parse {path}:\n" + ("\n".join(faults) or lines.text())


def _parse_hint(lines: Lines) -> str | None:
    text = "\n".join(lines.errors)
    if "must have same input types" in text or "same type" in text:
        return "the network is strongly typed: cast one input to the other's type (mpdeploy convert inserts such casts)"
    if "Plugin not found" in text or "was not found in plugin registry" in text:
        return "the library has no such operator: rewrite it with others, or give this model to another engine"
    return None


def _build_hint(lines: Lines) -> str | None:
    text = "\n".join(lines.errors)
    hints: Mapping[str, str] = {
        "workspace": "give a larger workspace_bytes, or leave it out",
        "out of memory": "free device memory, or give a smaller workspace_bytes or profile",
        "Turing": "leave SM75 out of compute_capabilities: the library does not run FP32 products there",
    }
    return next((hint for word, hint in hints.items() if word.lower() in text.lower()), None)

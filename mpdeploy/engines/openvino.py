"""OpenVINO on the CPU, run as typed.

With EXECUTION_MODE_HINT=ACCURACY an FP16 node runs in FP16 (AVX512-FP16) and a BF16 node in BF16 (AMX), as TensorRT 11 would.
It takes the BF16 model where the CPU has AMX-BF16, else the FP32 one.

Timings include handing numpy arrays over, the run, and copying the outputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from mpdeploy.artifact import Array, Engine, Feeds, OnnxModel, TensorSpec, check_feeds
from mpdeploy.engines.base import Audit, Layer, Profile, Unavailable
from mpdeploy.environment import cpu_flags
from mpdeploy.errors import BuildError, ConfigError, MissingExtraError, StageFailedError, closest_names
from mpdeploy.files import atomic_path, sha256_of_file, write_json

OPTIONS = ("threads", "inference_precision", "cache_dir", "performance_hint")
_NUMPY = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
    "boolean": "bool",
    "string": "object",
}
_PRECISION = {
    "f32": "fp32",
    "f16": "fp16",
    "bf16": "bf16",
    "f64": "fp64",
    "i8": "int8",
    "u8": "uint8",
    "i32": "int32",
    "i64": "int64",
}


def _library() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError.for_extra("openvino", "cpu") from error
    return openvino


def _numpy_name(element: Any) -> str:
    name = str(element.get_type_name())
    if name in _NUMPY:
        return _NUMPY[name]
    return name.replace("i", "int", 1) if name.startswith("i") else name.replace("u", "uint", 1)


def _spec(port: Any) -> TensorSpec:
    shape = tuple(axis.get_length() if axis.is_static else None for axis in port.get_partial_shape())
    return TensorSpec(port.get_any_name(), _numpy_name(port.get_element_type()), shape)


def compile_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """OpenVINO properties for our options; the default runs the graph as typed."""
    config: dict[str, Any] = {
        "EXECUTION_MODE_HINT": "ACCURACY",
        "PERFORMANCE_HINT": options.get("performance_hint", "LATENCY"),
    }
    if options.get("inference_precision"):  # retypes the whole graph: only to show that the audit catches it
        config["INFERENCE_PRECISION_HINT"] = options["inference_precision"]
        del config["EXECUTION_MODE_HINT"]
    if options.get("threads"):
        config["INFERENCE_NUM_THREADS"] = int(options["threads"])
    if options.get("cache_dir"):
        config["CACHE_DIR"] = str(options["cache_dir"])
    return config


class OpenVinoRunner:
    """A compiled model."""

    includes = "handing over numpy arrays, the run, output arrays"

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path = path
        self._config = dict(config)
        self._compiled: Any = None
        self._request: Any = None
        self._inputs: tuple[TensorSpec, ...] = ()
        self._outputs: tuple[TensorSpec, ...] = ()

    def __enter__(self) -> Self:
        self._compiled = _compile(self._path, self._config)
        self._request = self._compiled.create_infer_request()
        self._inputs = tuple(_spec(port) for port in self._compiled.inputs)
        self._outputs = tuple(_spec(port) for port in self._compiled.outputs)
        return self

    def __exit__(self, *exc: object) -> None:
        self._request = None
        self._compiled = None

    @property
    def compiled(self) -> Any:
        """OpenVINO's compiled model."""
        return self._compiled

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the model wants."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the model answers."""
        return self._outputs

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Answer one feed (see `artifact.Runner`)."""
        self._check(feeds)
        answers = self._run(feeds)
        return {spec.name: np.array(answers[i]) for i, spec in enumerate(self._outputs)}

    def time_ms(self, feeds: Feeds, iterations: int) -> list[float]:
        """Milliseconds of each run: see `includes`."""
        self._check(feeds)
        times: list[float] = []
        for _ in range(iterations):
            begin = time.perf_counter_ns()
            self._request.infer(dict(feeds), share_inputs=True, share_outputs=False)
            times.append((time.perf_counter_ns() - begin) / 1e6)
        return times

    def _check(self, feeds: Feeds) -> None:
        if self._request is None:
            raise StageFailedError(f"The model {self._path} is closed.", hint="use the runner inside its 'with' block")
        check_feeds(self._inputs, feeds, where=self._path.name)

    def _run(self, feeds: Feeds) -> Any:
        try:
            return self._request.infer(dict(feeds), share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            shapes = ", ".join(f"{name}: {list(array.shape)}" for name, array in feeds.items())
            raise StageFailedError(
                f"OpenVINO could not run {self._path.name} on {shapes}: {' '.join(str(error).split())[:500]}"
            ) from error


def _compile(path: Path, config: Mapping[str, Any]) -> Any:
    openvino = _library()
    try:
        core = openvino.Core()
        return core.compile_model(core.read_model(path), "CPU", dict(config))
    except RuntimeError as error:
        raise BuildError(
            f"OpenVINO {openvino.__version__} cannot load {path}: {' '.join(str(error).split())[:600]}",
            hint="onnx.checker.check_model checks the model",
        ) from error


class OpenVinoBackend:
    """The row `openvino`."""

    name = "openvino"

    def available(self) -> Unavailable | None:
        """Whether OpenVINO is installed."""
        try:
            _library()
        except MissingExtraError as error:
            return Unavailable(error.message, error.hint or "")
        return None

    def can_run(self) -> Unavailable | None:
        """It runs wherever it builds."""
        return self.available()

    def takes(self) -> str:
        """BF16 where the CPU is fast at it (AMX), else FP32."""
        return "bf16" if "amx_bf16" in cpu_flags() else "fp32"

    def build(self, model: OnnxModel, profile: Profile, options: Mapping[str, Any], folder: Path) -> Engine:
        """Read the model, keep its types as they are, and write OpenVINO's own form: `engine.xml` and `engine.bin`.

        Options: `threads`, `cache_dir`, `performance_hint`, and `inference_precision` (retypes the graph; the audit will say so).

        Raises:
            BuildError: OpenVINO cannot read or compile it.
        """
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ConfigError(
                f"openvino has no option '{unknown[0]}'.", hint=f"closest: {closest_names(unknown[0], OPTIONS)}"
            )
        openvino = _library()
        begin = time.perf_counter()
        path = folder / "engine.xml"
        try:
            core = openvino.Core()
            network = core.read_model(model.path)
            openvino.save_model(network, folder / "engine.partial.xml", compress_to_fp16=False)
        except RuntimeError as error:
            raise BuildError(
                f"OpenVINO {openvino.__version__} cannot read {model.path}: {' '.join(str(error).split())[:600]}",
                hint="onnx.checker.check_model checks the model",
            ) from error
        (folder / "engine.partial.bin").replace(folder / "engine.bin")
        with atomic_path(path) as temporary:
            (folder / "engine.partial.xml").replace(temporary)
        config = compile_config(options)
        with OpenVinoRunner(path, config) as runner:  # compile once now: what cannot be compiled is no engine
            inputs, outputs = runner.inputs, runner.outputs
        sidecar = {
            "engine": self.name,
            "library": "openvino",
            "library_version": openvino.__version__,
            "device": "cpu",
            "config": config,
            "precision": model.precision,
            "source_sha256": model.sha256,
            "weights_sha256": sha256_of_file(folder / "engine.bin"),
            "sha256": sha256_of_file(path),
            "profile": {name: shapes.to_json() for name, shapes in profile.items()},
            "inputs": [spec.to_json() for spec in inputs],
            "outputs": [spec.to_json() for spec in outputs],
            "seconds": round(time.perf_counter() - begin, 3),
        }
        write_json(folder / "engine.json", sidecar)
        return Engine.of(path, inputs=inputs, outputs=outputs, sidecar=sidecar)

    def load(self, engine: Engine) -> OpenVinoRunner:
        """A runner for a built engine.

        Raises:
            BuildError: its weights are not those that were written beside it.
        """
        weights = engine.path.with_suffix(".bin")
        recorded = engine.sidecar.get("weights_sha256")
        if recorded and (not weights.is_file() or sha256_of_file(weights) != recorded):
            raise BuildError(f"{weights} is missing or not the file that was built.", hint="build the engine again")
        return OpenVinoRunner(engine.path, engine.sidecar.get("config", compile_config({})))

    def audit(self, engine: Engine) -> Audit:
        """Read each layer's precision back from the compiled runtime model: what really runs."""
        with self.load(engine) as runner:
            runtime = runner.compiled.get_runtime_model()
            layers = []
            for op in runtime.get_ordered_ops():
                info = {str(key): _text(value) for key, value in op.get_rt_info().items()}
                kind = info.get("layerType", op.get_type_name())
                if kind in ("Input", "Output", "Const", "Constant", "Reorder", "Convert", "Parameter", "Result"):
                    continue
                precision = info.get("runtimePrecision", "")
                nodes = tuple(name for name in info.get("originalLayersNames", "").split(",") if name)
                layers.append(
                    Layer(op.get_friendly_name(), kind, _PRECISION.get(precision, precision or "unknown"), nodes)
                )
        return Audit("runtime_model", tuple(layers))


OPENVINO = OpenVinoBackend()


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))

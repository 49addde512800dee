"""OpenVINO on the CPU, run as typed.

With EXECUTION_MODE_HINT=ACCURACY an FP16 node runs in FP16 (AVX512-FP16) and a BF16 node in BF16 (AMX), as TensorRT 11 would.
It takes the BF16 model where the CPU has AMX-BF16, else the FP32 one.

OpenVINO turns one ONNX node into several operations, of which only the last bears the node's name: a LayerNormalization becomes an
anonymous MVN, which does the arithmetic, and a named Add. So every operation is named after its node before the engine is written
(`name_after_nodes`), and the names that the runtime model lists for a fused layer lead back to all nodes it stands for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, Engine, Feeds, OnnxModel, TensorSpec
from mpdeploy.engines.accounting import Nodes, spread
from mpdeploy.engines.base import Audit, Layer, Profile, Unavailable
from mpdeploy.engines.host import HostRunner, Specs, one_line
from mpdeploy.engines.options import FILE, OptionRow, one_of, option, options_to_json, read_options, rows_of, whole
from mpdeploy.engines.sidecar import check_library, described, written
from mpdeploy.environment import cpu_flags
from mpdeploy.errors import BuildError, MissingExtraError
from mpdeploy.files import atomic_path, sha256_of_file

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
_NO_LAYERS = ("Input", "Output", "Const", "Constant", "Reorder", "Convert", "Parameter", "Result")


@dataclass(frozen=True)
class OpenVinoOptions:
    """How a model is compiled. The graph runs as typed, unless `inference_precision` retypes it."""

    threads: int | None = option(None, whole(1), "Threads of one inference; by default one a physical core.")
    streams: int | None = option(None, whole(1), "Inferences that run at once, each on its share of the threads.")
    performance_hint: str = option(
        "LATENCY", one_of("LATENCY", "THROUGHPUT", "CUMULATIVE_THROUGHPUT"), "What threads and streams are chosen for."
    )
    pinning: str = option("auto", one_of("auto", "on", "off"), "Whether OpenVINO ties its threads to cores.")
    cache_dir: str | None = option(
        None, FILE, "A folder for compiled models: a second start loads one instead of compiling."
    )
    inference_precision: str | None = option(
        None, one_of("f32", "f16", "bf16"), "Retype the whole graph against the plan; the audit says what that did."
    )

    def to_config(self) -> dict[str, Any]:
        """OpenVINO's own properties."""
        config: dict[str, Any] = {"PERFORMANCE_HINT": self.performance_hint}
        if self.inference_precision is None:
            config["EXECUTION_MODE_HINT"] = "ACCURACY"
        else:
            config["INFERENCE_PRECISION_HINT"] = self.inference_precision
        if self.pinning != "auto":
            config["ENABLE_CPU_PINNING"] = self.pinning == "on"
        given = {"INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": self.streams, "CACHE_DIR": self.cache_dir}
        return config | {name: value for name, value in given.items() if value is not None}


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


class OpenVinoRunner(HostRunner):
    """A compiled model."""

    title = "OpenVINO"

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        super().__init__(path)
        self._config = dict(config)
        self._compiled: Any = None
        self._request: Any = None

    def _open(self) -> tuple[Specs, Specs]:
        openvino = _library()
        try:
            core = openvino.Core()
            self._compiled = core.compile_model(core.read_model(self.path), "CPU", self._config)
        except RuntimeError as error:
            raise BuildError(
                f"OpenVINO {openvino.__version__} cannot load {self.path}: {one_line(error)}",
                hint="onnx.checker.check_model checks the model",
            ) from error
        self._request = self._compiled.create_infer_request()
        return tuple(map(_spec, self._compiled.inputs)), tuple(map(_spec, self._compiled.outputs))

    def _close(self) -> None:
        self._request = None
        self._compiled = None

    @property
    def compiled(self) -> Any:
        """OpenVINO's compiled model."""
        return self._compiled

    def _caller(self, feeds: Feeds) -> Callable[[], Any]:
        request, given = self._request, dict(feeds)
        return lambda: request.infer(given, share_inputs=True, share_outputs=False)

    def _arrays(self, returned: Any) -> dict[str, Array]:
        return {spec.name: np.array(returned[position]) for position, spec in enumerate(self._outputs)}


class OpenVinoBackend:
    """The row `openvino`."""

    name = "openvino"

    def option_rows(self) -> tuple[OptionRow, ...]:
        """See `OpenVinoOptions`."""
        return rows_of(OpenVinoOptions)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that it lacks."""
        self._read(options)

    def _read(self, options: Mapping[str, Any]) -> OpenVinoOptions:
        return read_options(OpenVinoOptions, options, title="OpenVINO", engine=self.name)

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

        Options: `OpenVinoOptions`.

        Raises:
            BuildError: OpenVINO cannot read or compile it, or the files cannot be written.
        """
        chosen, openvino, begin = self._read(options), _library(), time.perf_counter()
        path = folder / "engine.xml"
        nodes = Nodes.of(model.path)
        try:
            network = openvino.Core().read_model(model.path)
        except RuntimeError as error:
            raise BuildError(
                f"OpenVINO {openvino.__version__} cannot read {model.path}: {one_line(error)}",
                hint="onnx.checker.check_model checks the model",
            ) from error
        names = name_after_nodes(network, nodes)
        partial = folder / "engine.partial.xml"
        try:
            openvino.save_model(network, partial, compress_to_fp16=False)
        except RuntimeError as error:
            partial.unlink(missing_ok=True)
            partial.with_suffix(".bin").unlink(missing_ok=True)
            raise BuildError(
                f"OpenVINO {openvino.__version__} cannot write {path}: {one_line(error)}",
                hint="is the disk full, or the folder read-only?",
            ) from error
        partial.with_suffix(".bin").replace(folder / "engine.bin")
        with atomic_path(path) as temporary:
            partial.replace(temporary)
        config = chosen.to_config()
        with OpenVinoRunner(path, config) as runner:  # compile once now: what cannot be compiled is no engine
            inputs, outputs = runner.inputs, runner.outputs
        sidecar = described(
            model, profile, folder, nodes, engine=self.name, library=("openvino", openvino.__version__),
            options=options_to_json(chosen), started=begin,
        )  # fmt: skip
        sidecar |= {"device": "cpu", "weights_sha256": sha256_of_file(folder / "engine.bin"), "names": names}
        sidecar["before"] = {node: list(taken) for node, taken in nodes.before.items()}
        return written(path, sidecar, inputs, outputs)

    def load(self, engine: Engine) -> OpenVinoRunner:
        """A runner for a built engine.

        Raises:
            BuildError: its weights are not those that were written beside it.
            UnavailableError: another release of OpenVINO built it.
        """
        check_library(engine, "OpenVINO", _library().__version__)
        weights = engine.path.with_suffix(".bin")
        if not weights.is_file() or sha256_of_file(weights) != engine.sidecar["weights_sha256"]:
            raise BuildError(f"{weights} is missing or not the file that was built.", hint="build the engine again")
        return OpenVinoRunner(engine.path, self._read(engine.sidecar["options"]).to_config())

    def audit(self, engine: Engine) -> Audit:
        """Read each layer's precision back from the compiled runtime model: what really runs."""
        names: Mapping[str, str] = engine.sidecar["names"]
        with self.load(engine) as runner:
            layers = []
            for op in runner.compiled.get_runtime_model().get_ordered_ops():
                info = {str(key): str(getattr(value, "value", value)) for key, value in op.get_rt_info().items()}
                kind = info.get("layerType", op.get_type_name())
                if kind in _NO_LAYERS:
                    continue
                told = info.get("runtimePrecision", "")
                original = (name for name in info.get("originalLayersNames", "").split(",") if name)
                nodes = tuple(dict.fromkeys(names[name] for name in original if name in names))
                layers.append(Layer(op.get_friendly_name(), kind, _PRECISION.get(told, told or "unknown"), nodes))
        return Audit("runtime_model", spread(layers, engine.sidecar["before"]))


OPENVINO = OpenVinoBackend()


def name_after_nodes(network: Any, nodes: Nodes) -> dict[str, str]:
    """Name every operation of a model that was read after the ONNX node it is a part of.

    An operation that makes a value of the ONNX file belongs to the node that makes it; one that makes none, to the node of what
    takes its result. (Commas, which separate names in the runtime model, are written as semicolons.)

    Returns:
        operation -> node.
    """
    found: dict[str, str] = {}
    for number, op in enumerate(reversed(network.get_ordered_ops())):
        if op.get_type_name() in ("Parameter", "Constant", "Result"):
            continue
        made = [nodes.maker[name] for out in op.outputs() for name in sorted(out.get_names()) if name in nodes.maker]
        taken_by = (target.get_node().get_friendly_name() for out in op.outputs() for target in out.get_target_inputs())
        owner = made[0] if made else next((found[name] for name in taken_by if name in found), None)
        if owner is not None:
            name = owner.replace(",", ";")
            if not made or name in found:
                name = f"{name}/{op.get_type_name()}_{number}"
            op.set_friendly_name(name)
            found[name] = owner
    return found

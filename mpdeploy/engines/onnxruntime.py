"""ONNX Runtime: the CPU provider (takes the FP32 model) and the CUDA provider (takes the FP16 one, where it really loads).

On the CPU a run is `session.run`, as a server calls it: binding its outputs gained less than 5 % on a layer of 0.25 ms. On CUDA
inputs and outputs are bound to device memory, and the copies are measured apart (`OrtRunner.copies_ms`).
The CPU provider computes FP16 nodes in FP32: it is never asked to judge a half model (see `precision.emulate`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mpdeploy.artifact import Array, Engine, Feeds, OnnxModel, TensorSpec
from mpdeploy.engines.accounting import Nodes, spread
from mpdeploy.engines.base import Audit, Layer, Profile, Unavailable
from mpdeploy.engines.host import HostRunner, Specs, one_line
from mpdeploy.engines.options import FLAG, OptionRow, one_of, option, options_to_json, read_options, rows_of, whole
from mpdeploy.engines.sidecar import check_library, described, written
from mpdeploy.environment import gpus
from mpdeploy.errors import BuildError, MissingExtraError, StageFailedError, UnavailableError
from mpdeploy.files import atomic_path

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_NUMPY = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    "tensor(string)": "object",
}
_PRECISION = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.DOUBLE: "fp64",
}

_CAST_PREFIX = "InsertedPrecisionFreeCast_"  # what ONNX Runtime puts before the name of a value that it made FP32


@dataclass(frozen=True)
class OrtOptions:
    """How a session is made."""

    provider: str = option("auto", one_of("auto", "cpu", "cuda"), "auto: CUDA where its provider really loads.")
    threads: int | None = option(None, whole(1), "Threads of one operator; by default one a physical core.")
    inter_op_threads: int | None = option(
        None, whole(1), "Run independent operators at once, on so many threads; by default one after the other."
    )
    spinning: str = option(
        "auto", one_of("auto", "on", "off"), "Whether idle threads spin: faster answers for a busier CPU."
    )
    tf32: bool = option(
        False, FLAG, "CUDA: let FP32 products and convolutions run in TF32, the provider's own default."
    )


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError.for_extra("onnxruntime", "cpu") from error
    return onnxruntime


def installed_version() -> str:
    """The version of whichever ONNX Runtime distribution is installed, or `none`."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "none"


@lru_cache(maxsize=1)
def loads_cuda() -> str | None:
    """None where the CUDA provider really loads, else why not. Being listed as available is not enough."""
    ort = _library()
    if CUDA not in ort.get_available_providers():
        return "this ONNX Runtime is built without CUDA"
    if hasattr(ort, "preload_dlls"):
        with contextlib.suppress(Exception):  # its own failure shows in the session below, with the reason
            ort.preload_dlls()
    node = ir.node("Identity", [ir.val("x", dtype=ir.DataType.FLOAT, shape=[1])])
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([node.inputs[0]], node.outputs, nodes=[node], opset_imports={"": 17}, name="probe")  # type: ignore[list-item]
    content = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    try:
        session = ort.InferenceSession(content, _session_options(ort), providers=[CUDA])
    except Exception as error:  # ONNX Runtime raises types of its own extension module
        return str(error).splitlines()[0]
    return None if session.get_providers()[0] == CUDA else "the CUDA provider was listed but fell back to the CPU"


def _provider(name: str, options: OrtOptions | None) -> str | tuple[str, dict[str, str]]:
    """A provider with its options: CUDA's computes FP32 nodes in TF32 unless it is told not to."""
    return (name, {"use_tf32": "1" if options is not None and options.tf32 else "0"}) if name == CUDA else name


def _session_options(ort: Any, options: OrtOptions | None = None, *, optimise: bool = True) -> Any:
    made = ort.SessionOptions()
    made.log_severity_level = 4
    if not optimise:
        made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if options is not None and options.threads is not None:
        made.intra_op_num_threads = options.threads
    if options is not None and options.inter_op_threads is not None:
        made.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        made.inter_op_num_threads = options.inter_op_threads
    if options is not None and options.spinning != "auto":
        made.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning == "on" else "0")
    return made


class OrtRunner(HostRunner):
    """A session. `outputs_wanted` restricts (and orders) what is answered."""

    title = "ONNX Runtime"

    def __init__(
        self,
        path: Path,
        *,
        provider: str = CPU,
        optimise: bool = True,
        options: OrtOptions | None = None,
        outputs_wanted: Sequence[str] | None = None,
    ) -> None:
        super().__init__(path)
        self._provider = provider
        self._optimise = optimise
        self._options = options
        self._wanted = None if outputs_wanted is None else list(outputs_wanted)
        self._session: Any = None
        if provider == CUDA:
            self.device = "cuda"
            self.includes = "the run on bound device memory until the device is done; no copies to or from the device"

    def _open(self) -> tuple[Specs, Specs]:
        ort = _library()
        made = _session_options(ort, self._options, optimise=self._optimise)
        try:
            session = ort.InferenceSession(str(self.path), made, providers=[_provider(self._provider, self._options)])
        except Exception as error:  # ONNX Runtime raises types of its own extension module
            raise BuildError(
                f"ONNX Runtime {ort.__version__} cannot load {self.path}: {one_line(error)}",
                hint="mpdeploy inspect shows the model; onnx.checker.check_model checks it",
            ) from error
        check_provider(session, self._provider)
        self._session = session
        inputs, outputs = _specs(session)
        self._wanted = self._wanted or [spec.name for spec in outputs]
        return inputs, outputs

    def _close(self) -> None:
        self._session = None

    def _caller(self, feeds: Feeds) -> Callable[[], Any]:
        session, wanted = self._session, self._wanted
        if self._provider == CPU:
            given = dict(feeds)
            return lambda: session.run(wanted, given)
        binding = self._bound(feeds)

        def run() -> Any:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return binding

        return run

    def _arrays(self, returned: Any) -> dict[str, Array]:
        answers = returned if self._provider == CPU else returned.copy_outputs_to_cpu()
        return dict(zip(self._wanted or (), answers, strict=True))

    def _bound(self, feeds: Feeds) -> Any:
        """The feeds on the device, and outputs that ONNX Runtime allocates there."""
        ort, binding = _library(), self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
        for name in self._wanted or ():
            binding.bind_output(name, "cuda", 0)
        binding.synchronize_inputs()
        return binding

    def copies_ms(self, feeds: Feeds, iterations: int) -> dict[str, list[float]]:
        """Milliseconds of copying the feeds to the device and the answers back; nothing on the CPU."""
        self._check(feeds)
        if self._provider == CPU:
            return {}
        times: dict[str, list[float]] = {"to_device": [], "to_host": []}
        for _ in range(iterations):
            begin = time.perf_counter_ns()
            binding = self._bound(feeds)
            times["to_device"].append((time.perf_counter_ns() - begin) / 1e6)
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            begin = time.perf_counter_ns()
            binding.copy_outputs_to_cpu()
            times["to_host"].append((time.perf_counter_ns() - begin) / 1e6)
        return times


def check_provider(session: Any, wanted: str) -> None:
    """Refuse a session that silently fell back to another provider than the one asked for.

    Raises:
        UnavailableError: it did.
    """
    found = list(session.get_providers())
    if not found or found[0] != wanted:
        raise UnavailableError(
            f"ONNX Runtime was asked for {wanted} and fell back to {', '.join(found) or 'none'}.",
            hint="mpdeploy doctor says which providers load, and why others do not",
        )


def _specs(session: Any) -> tuple[Specs, Specs]:
    return tuple(_spec(item) for item in session.get_inputs()), tuple(_spec(item) for item in session.get_outputs())


def _spec(item: Any) -> TensorSpec:
    kind = item.type[len("optional(") : -1] if item.type.startswith("optional(") else item.type
    dtype = _NUMPY.get(kind, kind.removeprefix("tensor(").removesuffix(")"))
    return TensorSpec(item.name, dtype, tuple(item.shape) or None)  # it tells a scalar and an unknown rank alike, as []


class OnnxRuntimeBackend:
    """The row `onnxruntime`: CUDA where its provider loads, else the CPU."""

    name = "onnxruntime"

    def option_rows(self) -> tuple[OptionRow, ...]:
        """See `OrtOptions`."""
        return rows_of(OrtOptions)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that it lacks, and the CUDA provider where that does not load."""
        _provider_of(self._read(options))

    def _read(self, options: Mapping[str, Any]) -> OrtOptions:
        return read_options(OrtOptions, options, title="ONNX Runtime", engine=self.name)

    def available(self) -> Unavailable | None:
        """Whether ONNX Runtime is installed."""
        try:
            _library()
        except MissingExtraError as error:
            return Unavailable(error.message, error.hint or "")
        return None

    def can_run(self) -> Unavailable | None:
        """It runs wherever it builds."""
        return self.available()

    def takes(self) -> str:
        """FP16 on CUDA; FP32 on a CPU, which has no half kernels."""
        return "fp16" if loads_cuda() is None else "fp32"

    def build(self, model: OnnxModel, profile: Profile, options: Mapping[str, Any], folder: Path) -> Engine:
        """Optimise the graph for this machine and write it as `engine.onnx`; options: `OrtOptions`.

        Raises:
            BuildError: ONNX Runtime cannot load the model.
            UnavailableError: the provider asked for does not load.
        """
        chosen, ort, begin = self._read(options), _library(), time.perf_counter()
        provider = _provider_of(chosen)
        path = folder / "engine.onnx"
        with atomic_path(path) as temporary:
            made = _session_options(ort, chosen)
            # EXTENDED: above it, layouts are chosen for this very CPU and the file may not load on another
            made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            made.optimized_model_filepath = str(temporary)
            try:
                session = ort.InferenceSession(str(model.path), made, providers=[_provider(provider, chosen)])
            except Exception as error:  # ONNX Runtime raises types of its own extension module
                writing = "serialization failed" in str(error).lower()
                raise BuildError(
                    f"ONNX Runtime {ort.__version__} cannot {f'write {path}' if writing else f'load {model.path}'}: {one_line(error)}",
                    hint="is the disk full, or the folder read-only?"
                    if writing
                    else "onnx.checker.check_model checks the model",
                ) from error
            check_provider(session, provider)
            inputs, outputs = _specs(session)
            del session
            layers = _layers(temporary, nodes := Nodes.of(model.path))
        sidecar = described(
            model, profile, folder, nodes, engine=self.name, library=("onnxruntime", ort.__version__),
            options=options_to_json(chosen), started=begin,
        )  # fmt: skip
        sidecar |= {"device": "cuda" if provider == CUDA else "cpu", "provider": provider}
        if provider == CUDA:
            sidecar["gpus"] = [dict(gpu) for gpu in gpus()]
        return written(path, sidecar | {"layers": [layer.to_json() for layer in layers]}, inputs, outputs)

    def load(self, engine: Engine) -> OrtRunner:
        """A runner for a built engine.

        Raises:
            UnavailableError: another release of ONNX Runtime built it.
        """
        check_library(engine, "ONNX Runtime", _library().__version__)
        return OrtRunner(
            engine.path, provider=engine.sidecar["provider"], options=self._read(engine.sidecar.get("options", {}))
        )

    def audit(self, engine: Engine) -> Audit:
        """What ONNX Runtime says it runs: the nodes of the optimised graph it wrote, with the types of their kernels.

        The file it writes is the graph after its own casts were inserted and fused, so this is what really runs.
        """
        return Audit("runtime_model", tuple(Layer.from_json(layer) for layer in engine.sidecar["layers"]))


def _provider_of(options: OrtOptions) -> str:
    if options.provider == "cpu" or (options.provider == "auto" and loads_cuda() is not None):
        return CPU
    if (reason := loads_cuda()) is not None:
        raise UnavailableError(
            f"ONNX Runtime's CUDA provider does not load: {reason}.", hint="pip install 'mpdeploy[gpu]'"
        )
    return CUDA


def _layers(optimised: Path, nodes: Nodes) -> tuple[Layer, ...]:
    """The nodes of the optimised graph, named after the nodes of the model that bear their names or make their outputs."""
    from mpdeploy.precision.graph_index import GraphIndex

    index = GraphIndex.of(ir.load(optimised))
    layers = []
    for node_id, node in index.nodes.items():
        # contrib ops (FusedConv, ...) have no ONNX schema: ONNX Runtime declares the types of what they make
        types = [index.dtypes.get(v) or v.dtype for v in (*node.outputs, *node.inputs) if v is not None]
        kind = next((_PRECISION[t] for t in types if t in _PRECISION), None)
        if kind is None or node.op_type == "Cast":
            continue
        made = [(v.name or "").removeprefix(_CAST_PREFIX) for v in node.outputs]
        own = [node_id] if node_id in nodes.ids else []
        own += [nodes.maker[name] for name in made if name in nodes.maker]
        layers.append(Layer(node_id, node.op_type, kind, tuple(dict.fromkeys(own))))
    return spread(layers, nodes.before)


ONNXRUNTIME = OnnxRuntimeBackend()


@contextlib.contextmanager
def run_tensors(path: Path, names: Sequence[str]) -> Iterator[Any]:
    """Yield a function that answers feeds with the named tensors, which must be outputs of the model at `path`."""
    with OrtRunner(path, optimise=False, outputs_wanted=names) as runner:
        yield runner.infer


def prove_pairs_are_kept(dtype: ir.DataType) -> None:
    """Run the canary of `precision.emulate` and prove that this ONNX Runtime rounds at cast pairs.

    Raises:
        StageFailedError: it does not; nothing it emulates could be believed.
    """
    _prove(int(dtype))


@lru_cache(maxsize=2)
def _prove(dtype: int) -> None:
    from mpdeploy.precision.emulate import CANARY_INPUT, canary, canary_answer

    ort = _library()
    content = ir.to_proto(canary(ir.DataType(dtype))).SerializeToString()
    session = ort.InferenceSession(content, _session_options(ort), providers=[CPU])
    found = session.run(None, {"x": CANARY_INPUT})[0]
    expected = canary_answer(ir.DataType(dtype))
    if not np.array_equal(found, expected, equal_nan=True):
        raise StageFailedError(
            f"ONNX Runtime {ort.__version__} does not round as {ir.DataType(dtype).name} hardware does: "
            f"{found.tolist()} instead of {expected.tolist()}.",
            hint="no drift emulated with this version can be believed; install another onnxruntime",
        )

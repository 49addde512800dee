"""ONNX Runtime: the CPU provider (takes the FP32 model) and the CUDA provider (takes the FP16 one, where it really loads).

Timings include handing numpy arrays over, the run, and making the output arrays; on CUDA the copies to and from the device too.
The CPU provider computes FP16 nodes in FP32: it is never asked to judge a half model (see `precision.emulate`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from mpdeploy.artifact import Array, Engine, Feeds, OnnxModel, TensorSpec, check_feeds
from mpdeploy.engines.base import Audit, Layer, Profile, Unavailable
from mpdeploy.errors import (
    BuildError,
    ConfigError,
    MissingExtraError,
    StageFailedError,
    UnavailableError,
    closest_names,
)
from mpdeploy.files import atomic_path, sha256_of_file, write_json

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_NUMPY = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    "tensor(string)": "object",
}


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
        session = ort.InferenceSession(content, _options(ort), providers=[CUDA])
    except Exception as error:  # ONNX Runtime raises types of its own extension module
        return str(error).splitlines()[0]
    return None if session.get_providers()[0] == CUDA else "the CUDA provider was listed but fell back to the CPU"


def _options(ort: Any, *, optimise: bool = True, threads: int | None = None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


class OrtRunner:
    """A session. `outputs_wanted` restricts (and orders) what is answered."""

    includes = "handing over numpy arrays, the run, output arrays"

    def __init__(
        self,
        path: Path,
        *,
        provider: str = CPU,
        optimise: bool = True,
        threads: int | None = None,
        outputs_wanted: Sequence[str] | None = None,
    ) -> None:
        self._path = path
        self._provider = provider
        self._optimise = optimise
        self._threads = threads
        self._wanted = None if outputs_wanted is None else list(outputs_wanted)
        self._session: Any = None
        self._inputs: tuple[TensorSpec, ...] = ()
        self._outputs: tuple[TensorSpec, ...] = ()

    def __enter__(self) -> Self:
        ort = _library()
        try:
            self._session = ort.InferenceSession(
                str(self._path),
                _options(ort, optimise=self._optimise, threads=self._threads),
                providers=[self._provider],
            )
        except Exception as error:  # ONNX Runtime raises types of its own extension module
            raise BuildError(
                f"ONNX Runtime {ort.__version__} cannot load {self._path}: {' '.join(str(error).split())[:600]}",
                hint="mpdeploy inspect shows the model; onnx.checker.check_model checks it",
            ) from error
        if self._session.get_providers()[0] != self._provider:
            found = self._session.get_providers()[0]
            self._session = None
            raise UnavailableError(
                f"ONNX Runtime was asked for {self._provider} and fell back to {found}.",
                hint="mpdeploy doctor says which providers load, and why others do not",
            )
        self._inputs = tuple(_spec(item) for item in self._session.get_inputs())
        self._outputs = tuple(_spec(item) for item in self._session.get_outputs())
        return self

    def __exit__(self, *exc: object) -> None:
        self._session = None

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
        return self._run(feeds)

    def time_ms(self, feeds: Feeds, iterations: int) -> list[float]:
        """Milliseconds of each run: see `includes`."""
        self._check(feeds)
        times: list[float] = []
        for _ in range(iterations):
            begin = time.perf_counter_ns()
            self._session.run(self._wanted, feeds)
            times.append((time.perf_counter_ns() - begin) / 1e6)
        return times

    def _check(self, feeds: Feeds) -> None:
        if self._session is None:
            raise StageFailedError(
                f"The session for {self._path} is closed.", hint="use the runner inside its 'with' block"
            )
        check_feeds(self._inputs, feeds, where=str(self._path.name))

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        names = self._wanted or [spec.name for spec in self._outputs]
        try:
            answers = self._session.run(names, dict(feeds))
        except Exception as error:  # ONNX Runtime raises types of its own extension module
            shapes = ", ".join(f"{name}: {list(array.shape)}" for name, array in feeds.items())
            raise StageFailedError(
                f"ONNX Runtime could not run {self._path.name} on {shapes}: {' '.join(str(error).split())[:500]}",
                hint="are the inputs' axes consistent with one another?",
            ) from error
        return dict(zip(names, answers, strict=True))


def _spec(item: Any) -> TensorSpec:
    kind = item.type[len("optional(") : -1] if item.type.startswith("optional(") else item.type
    dtype = _NUMPY.get(kind, kind.removeprefix("tensor(").removesuffix(")"))
    return TensorSpec(item.name, dtype, tuple(item.shape) if item.shape is not None else None)


class OnnxRuntimeBackend:
    """The row `onnxruntime`: CUDA where its provider loads, else the CPU."""

    name = "onnxruntime"

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
        """Optimise the graph for this machine and write it as `engine.onnx`.

        Options: `threads` (int) and `provider` (`cpu` or `cuda`).

        Raises:
            BuildError: ONNX Runtime cannot load the model.
        """
        ort = _library()
        unknown = set(options) - {"threads", "provider"}
        if unknown:
            raise ConfigError(
                f"onnxruntime has no option '{sorted(unknown)[0]}'.",
                hint=f"closest: {closest_names(sorted(unknown)[0], ['threads', 'provider'])}",
            )
        wanted = options.get("provider", "cuda" if loads_cuda() is None else "cpu")
        provider = CUDA if wanted == "cuda" else CPU
        if provider == CUDA and (reason := loads_cuda()) is not None:
            raise UnavailableError(
                f"ONNX Runtime's CUDA provider does not load: {reason}.", hint="pip install 'mpdeploy[gpu]'"
            )
        begin = time.perf_counter()
        path = folder / "engine.onnx"
        with atomic_path(path) as temporary:
            session_options = _options(ort, threads=options.get("threads"))
            # EXTENDED: above it, layouts are chosen for this very CPU and the file may not load on another
            session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            session_options.optimized_model_filepath = str(temporary)
            try:
                session = ort.InferenceSession(str(model.path), session_options, providers=[provider])
            except Exception as error:  # ONNX Runtime raises types of its own extension module
                raise BuildError(
                    f"ONNX Runtime {ort.__version__} cannot load {model.path}: {' '.join(str(error).split())[:600]}",
                    hint="onnx.checker.check_model checks the model",
                ) from error
            inputs = tuple(_spec(item) for item in session.get_inputs())
            outputs = tuple(_spec(item) for item in session.get_outputs())
            del session
        sidecar = {
            "engine": self.name,
            "library": "onnxruntime",
            "library_version": ort.__version__,
            "device": "cuda" if provider == CUDA else "cpu",
            "provider": provider,
            "threads": options.get("threads"),
            "precision": model.precision,
            "source_sha256": model.sha256,
            "sha256": sha256_of_file(path),
            "profile": {name: shapes.to_json() for name, shapes in profile.items()},
            "inputs": [spec.to_json() for spec in inputs],
            "outputs": [spec.to_json() for spec in outputs],
            "seconds": round(time.perf_counter() - begin, 3),
        }
        write_json(folder / "engine.json", sidecar)
        return Engine.of(path, inputs=inputs, outputs=outputs, sidecar=sidecar)

    def load(self, engine: Engine) -> OrtRunner:
        """A runner for a built engine."""
        return OrtRunner(
            engine.path, provider=engine.sidecar.get("provider", CPU), threads=engine.sidecar.get("threads")
        )

    def audit(self, engine: Engine) -> Audit:
        """What ONNX Runtime says it runs: the nodes of the optimised graph it wrote, with the types of their kernels.

        The file it writes is the graph after its own casts were inserted and fused, so this is what really runs.
        """
        graph = ir.load(engine.path)
        from mpdeploy.precision.graph_index import GraphIndex

        index = GraphIndex.of(graph)
        layers = []
        for node_id, node in index.nodes.items():
            # contrib ops (FusedConv, ...) have no ONNX schema: ONNX Runtime declares the types of what they make
            types = [index.dtypes.get(v) or v.dtype for v in (*node.outputs, *node.inputs) if v is not None]
            kind = next((_PRECISION[t] for t in types if t in _PRECISION), None)
            if kind is not None and node.op_type != "Cast":
                layers.append(Layer(node_id, node.op_type, kind, (node.name,) if node.name else ()))
        return Audit("runtime_model", tuple(layers))


ONNXRUNTIME = OnnxRuntimeBackend()

_PRECISION = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.DOUBLE: "fp64",
}


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
    session = ort.InferenceSession(content, _options(ort), providers=[CPU])
    found = session.run(None, {"x": CANARY_INPUT})[0]
    expected = canary_answer(ir.DataType(dtype))
    if not np.array_equal(found, expected, equal_nan=True):
        raise StageFailedError(
            f"ONNX Runtime {ort.__version__} does not round as {ir.DataType(dtype).name} hardware does: "
            f"{found.tolist()} instead of {expected.tolist()}.",
            hint="no drift emulated with this version can be believed; install another onnxruntime",
        )

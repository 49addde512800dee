"""A plan -> the library's engine: checked to fit this machine, and given its weights back where it was stripped."""

from __future__ import annotations

from typing import Any

from mpdeploy.artifact import Engine
from mpdeploy.engines.base import Unavailable
from mpdeploy.engines.tensorrt.driver import probe_gpu
from mpdeploy.engines.tensorrt.header import check_fits, read_header
from mpdeploy.engines.tensorrt.library import Family
from mpdeploy.engines.tensorrt.log import Lines, collected_lines
from mpdeploy.errors import ArtifactChangedError, BuildError, UnavailableError
from mpdeploy.files import sha256_of_file


def gpu_problem() -> Unavailable | None:
    """None where a plan can run here (driver, GPU, torch with CUDA), else why not."""
    gpu = probe_gpu()
    if isinstance(gpu, Unavailable):
        return gpu
    try:
        import torch
    except ImportError as error:
        return Unavailable(
            f"torch, which holds the device memory, is not installed: {error}.", "pip install 'mpdeploy[train]'"
        )
    if not torch.cuda.is_available():
        return Unavailable(
            f"torch {torch.__version__} cannot use the GPU {gpu.name}.", "install a torch that is built for CUDA 13"
        )
    return None


def deserialised(
    trt: Any, family: Family, engine: Engine, logger: Any, lines: Lines, *, ordinal: int
) -> tuple[Any, Any]:
    """The runtime and the `ICudaEngine` of a plan that was checked to fit this machine.

    Raises:
        UnavailableError: it does not fit, in words.
        BuildError: it is a plan of the other library, or the library refuses it.
    """
    options = engine.sidecar["options"]
    gpu = probe_gpu(ordinal)
    if isinstance(gpu, Unavailable):
        raise UnavailableError(gpu.reason, hint=gpu.hint)
    header = None if options["version_compatible"] else read_header(engine.path)
    check_fits(engine.sidecar, header, family, trt.__version__, gpu, where=str(engine.path))
    runtime = trt.Runtime(logger)
    if options["version_compatible"]:
        runtime.engine_host_code_allowed = True  # its lean runtime is host code; the plan's digest was checked
    data = engine.path.read_bytes()
    _check_validity(trt, runtime, data, engine, lines)
    cuda_engine = runtime.deserialize_cuda_engine(data)
    if cuda_engine is None:
        raise BuildError(
            f"{family.title} {trt.__version__} cannot load {engine.path}:\n{lines.text()}",
            hint="build the engine again on this machine (--from 40-build)",
        )
    if options["strip"]:
        _refit(trt, engine, cuda_engine, logger, lines)
    if options["weight_streaming"]:
        cuda_engine.weight_streaming_budget_v2 = cuda_engine.get_weight_streaming_automatic_budget()
    return runtime, cuda_engine


def _check_validity(trt: Any, runtime: Any, data: bytes, engine: Engine, lines: Lines) -> None:
    """Ask TensorRT-RTX itself whether this machine can run the plan; TensorRT has no such question."""
    ask = getattr(runtime, "get_engine_validity", None)
    if ask is None:
        return
    validity, bits = ask(data)
    if validity == trt.EngineValidity.INVALID:
        reasons = [name for name, member in trt.EngineInvalidityDiagnostics.__members__.items() if int(member) & bits]
        raise UnavailableError(
            f"{engine.path} is not valid on this machine: {', '.join(reasons) or lines.text()}.",
            hint="UNSUPPORTED_CC: build with compute_capabilities that hold this GPU; otherwise build again here",
        )


def _refit(trt: Any, engine: Engine, cuda_engine: Any, logger: Any, lines: Lines) -> None:
    """Give a stripped plan its weights back, from the ONNX file that it was built from."""
    source = (engine.path.parent / str(engine.sidecar["source"])).resolve()
    if not source.is_file() or sha256_of_file(source) != engine.sidecar["source_sha256"]:
        raise ArtifactChangedError(
            f"{engine.path} was built without its weights, and {source}, which holds them, "
            f"{'has changed' if source.is_file() else 'is missing'}.",
            hint="put the ONNX file back, or build again without 'strip'",
        )
    refitter = trt.Refitter(cuda_engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(source)) or not refitter.refit_cuda_engine():
        raise BuildError(f"The weights of {source} cannot be put into {engine.path}:\n{lines.text()}")


def engine_information(trt: Any, family: Family, engine: Engine, *, ordinal: int = 0) -> str:
    """The engine inspector's JSON for the whole engine, at the best shapes of its first profile."""
    with collected_lines(trt) as (logger, lines):
        runtime, cuda_engine = deserialised(trt, family, engine, logger, lines, ordinal=ordinal)
        context = cuda_engine.create_execution_context()
        if context is None:
            raise BuildError(f"{engine.path} cannot make an execution context:\n{lines.text()}")
        for index in range(cuda_engine.num_io_tensors):
            name = cuda_engine.get_tensor_name(index)
            is_input = cuda_engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            if is_input and any(axis < 0 for axis in cuda_engine.get_tensor_shape(name)):
                context.set_input_shape(name, tuple(cuda_engine.get_tensor_profile_shape(name, 0)[1]))
        inspector = cuda_engine.create_engine_inspector()
        inspector.execution_context = context
        text = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        del inspector, context, cuda_engine, runtime
        return text

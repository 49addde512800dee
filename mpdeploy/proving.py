"""Proof before a mixed model has its name: ONNX's checker, an ONNX Runtime session, TensorRT-RTX's parser; and the atomic write."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir

from mpdeploy.engines import onnxruntime as ort_engine
from mpdeploy.environment import package_version
from mpdeploy.errors import BuildError, ConversionError
from mpdeploy.files import atomic_path
from mpdeploy.precision.emulate import emulate
from mpdeploy.precision.graph_index import GraphIndex, all_graphs
from mpdeploy.precision.model_io import load_model, save_model, write_model
from mpdeploy.precision.plan import PrecisionPlan
from mpdeploy.precision.verify import check_file, one_of_each_kind

WHOLE_SESSION_NODES = 1500
"""Up to this many nodes ONNX Runtime loads the whole file as a check: its start-up grows with their square."""


def prove_and_write(source: Path, output: Path, plan: PrecisionPlan, mixed: GraphIndex, folder: Path) -> list[str]:
    """Write the model once every check has passed, and return warnings; where nothing became half, copy the source bit for bit.

    Args:
        source: the FP32 file.
        output: where to.
        plan: what was carried out.
        mixed: the rewritten model, indexed.
        folder: for scratch files.

    Raises:
        ConversionError: a check refused it; no file is left.
        StageFailedError: it cannot be written.
    """
    if not plan.half_nodes and not any(key.startswith(("input:", "output:")) for key in plan.half_keys):
        _copy(source, output)
        return []
    warnings: list[str] = []

    def prove(path: Path) -> None:
        with ThreadPoolExecutor(1) as beside:  # TensorRT parses, which takes longest, while the others look
            parsed = beside.submit(_check_rtx, path, source)
            check_file(path)
            if package_version("onnxruntime") or package_version("onnxruntime-gpu"):
                _check_session(path, mixed, plan, folder)
            warnings.extend(parsed.result())

    save_model(mixed.model, output, [prove])
    return warnings


def _check_rtx(path: Path, source: Path) -> list[str]:
    """TensorRT-RTX's parser, where it is installed, must take the file; unless it does not take the FP32 model either."""
    from mpdeploy.engines.tensorrt.parse import rtx_refusal

    refusal = rtx_refusal(path)
    if refusal is None:
        return []
    if rtx_refusal(source) is not None:
        first = refusal.strip().splitlines()
        return [f"TensorRT-RTX does not parse this model, nor the FP32 one: {first[min(1, len(first) - 1)].strip()}"]
    raise ConversionError(
        f"TensorRT-RTX's parser takes the FP32 model and refuses the rewritten one:\n{refusal}",
        hint="--keep the node it names, and please report it",
    )


def _copy(source: Path, output: Path) -> None:
    """Nothing becomes half: the file stays what it was, bit for bit."""
    locations = {
        value.const_value.location
        for graph in all_graphs(load_model(source).graph)
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    for location in locations:
        with atomic_path(output.parent / location) as temporary:
            shutil.copyfile(source.parent / location, temporary)
    with atomic_path(output) as temporary:
        shutil.copyfile(source, temporary)


def _check_session(path: Path, mixed: GraphIndex, plan: PrecisionPlan, folder: Path) -> None:
    """ONNX Runtime must load the file; for BF16, of which its CPU provider has few kernels, the emulated model.

    Of a large graph it must load one node of each kind (see `one_of_each_kind`).
    """
    target = path
    kinds = one_of_each_kind(mixed) if len(mixed.nodes) > WHOLE_SESSION_NODES else None
    if kinds is not None:
        target = write_model(kinds if plan.half.name == "fp16" else emulate(kinds), folder, "kinds.onnx")
    elif plan.half.name == "bf16":
        target = folder / "emulated.onnx"
        if not target.exists():
            write_model(emulate(mixed.model), folder, target.name)
    try:
        with ort_engine.OrtRunner(target, optimise=False):
            pass
    except BuildError as error:
        raise ConversionError(
            f"ONNX Runtime refuses the rewritten model: {error.message}",
            hint="--keep the node it names, and please report it",
        ) from error

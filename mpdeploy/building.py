"""Engines outside a pipeline: build one from an ONNX file, find a built one again, and open anything that can run."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, Engine, OnnxModel, Runner, TensorSpec
from mpdeploy.data_files import load_feeds
from mpdeploy.engines import backend
from mpdeploy.engines.base import Audit, Profile, ShapeRange, default_profile
from mpdeploy.engines.isolation import BuildRequest, Progress, build_isolated
from mpdeploy.errors import ModelError, UnavailableError, UsageError, closest_names
from mpdeploy.files import sha256_of_file

SIDECAR = "engine.json"
DEFAULT_BATCHES = (1, 8, 32)


def describe_model(path: Path) -> OnnxModel:
    """An ONNX file as an artifact: inputs, outputs, and the precision it was converted to (`fp32` where it was not).

    Raises:
        ModelError: not a readable ONNX file.
    """
    from mpdeploy.precision.model_io import input_specs, load_model, output_specs
    from mpdeploy.precision.rewrite import PRECISION

    model = load_model(path)
    precision = model.metadata_props.get(PRECISION) or _half_of(model)
    return OnnxModel.of(path, inputs=input_specs(model), outputs=output_specs(model), sidecar={"precision": precision})


def _half_of(model: Any) -> str:
    import onnx_ir as ir

    names = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.dtype in names:
                return names[value.dtype]
        for node in graph:
            for value in node.outputs:
                if value.dtype in names:
                    return names[value.dtype]
    return "fp32"


def build(
    model: Path,
    engine: str,
    folder: Path,
    *,
    profile: Sequence[str] = (),
    data: str | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[Engine, Audit]:
    """Build an engine into `folder` and read back what it runs.

    Args:
        model: an ONNX file in the precision the engine is to run.
        engine: a row of the engine table.
        folder: where to; made where missing.
        profile: `input=min,opt,max` with shapes like `1x3x64x64`, several times for several optimisation profiles; inputs that are
            not named get batches 1, 8, 32 and `data`'s shapes.
        data: samples, for the lengths of symbolic axes.
        options: the backend's own options: values, or their texts (see `EngineBackend.option_rows`).
        progress: told (phase, steps done, steps in all).

    Raises:
        UnavailableError: this machine lacks the engine.
        BuildError: it cannot be built.
        UsageError, DataError: a profile that does not fit.
    """
    row = backend(engine)
    missing = row.available()
    if missing is not None:
        raise UnavailableError(f"The engine '{engine}' is not available: {missing.reason}", hint=missing.hint)
    row.check_options(options or {})
    described = describe_model(model)
    ranges = profile_of(described.inputs, profile, data, where=str(model))
    folder.mkdir(parents=True, exist_ok=True)
    built = build_isolated(BuildRequest(engine, described, ranges, dict(options or {}), folder), progress)
    return built, row.audit(built)


def profile_of(inputs: tuple[TensorSpec, ...], given: Sequence[str], data: str | None, *, where: str) -> Profile:
    """Shape ranges from `--profile` arguments, with defaults for inputs that are not named; an input named twice has two profiles."""
    parts: dict[str, list[ShapeRange]] = {}
    for name, part in (_parse(text, inputs) for text in given):
        parts.setdefault(name, []).append(part)
    ranges = {name: ShapeRange.joined(found) for name, found in parts.items()}
    rest = tuple(spec for spec in inputs if spec.name not in ranges)
    sample: dict[str, tuple[int, ...]] = {}
    if data is not None:
        feeds = load_feeds(data, inputs, where=where)
        sample = {name: array.shape for name, array in feeds.feeds[0].items()}
    return {**default_profile(rest, DEFAULT_BATCHES, sample), **ranges}


def _parse(text: str, inputs: tuple[TensorSpec, ...]) -> tuple[str, ShapeRange]:
    name, equals, shapes = text.partition("=")
    spec = next((item for item in inputs if item.name == name), None)
    if not equals or spec is None:
        raise UsageError(
            f"--profile {text}: there is no input '{name}'.",
            hint=f"write INPUT=MIN,OPT,MAX; closest names: {closest_names(name, [item.name for item in inputs])}",
        )
    try:
        found = [tuple(int(axis) for axis in shape.split("x")) for shape in shapes.split(",")]
    except ValueError:
        found = []
    rank = len(spec.shape or ())
    if len(found) != 3 or any(len(shape) != rank for shape in found):
        raise UsageError(
            f"--profile {text}: expected three shapes of {rank} axes each.",
            hint=f"for example {name}={','.join('x'.join(['1'] * rank) for _ in range(3))}",
        )
    smallest, best, largest = found
    rising = all(low <= middle <= high for low, middle, high in zip(smallest, best, largest, strict=True))
    fixed = all(not isinstance(axis, int) or axis == found for axis, found in zip(spec.shape or (), best, strict=True))
    if not rising or not fixed:
        raise UsageError(
            f"--profile {text}: shapes must rise from MIN to MAX, and fixed axes must be those of '{spec}'.",
            hint="only symbolic axes may vary",
        )
    return name, ShapeRange(smallest, best, largest)


def find_engine(path: Path) -> Engine:
    """A built engine, from its folder or its file.

    Raises:
        ModelError: no sidecar beside it, or the file is not the one the sidecar describes.
    """
    folder = path if path.is_dir() else path.parent
    sidecar_path = folder / SIDECAR
    try:
        sidecar = json.loads(sidecar_path.read_text(encoding="utf-8"))
        name = str(sidecar["engine"])
        inputs = tuple(TensorSpec.from_json(item) for item in sidecar["inputs"])
        outputs = tuple(TensorSpec.from_json(item) for item in sidecar["outputs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder} holds no engine: {SIDECAR} cannot be read ({error}).",
            hint="mpdeploy build MODEL.onnx --engine NAME --output DIR",
        ) from error
    file = path if path.is_file() and path.name != SIDECAR else _engine_file(folder)
    found = sha256_of_file(file)
    if found != sidecar.get("sha256"):
        raise ModelError(
            f"{file} is not the engine that {sidecar_path} describes: sha256 {found[:12]}, recorded {str(sidecar.get('sha256'))[:12]}.",
            hint="build it again; an engine is native code, and one that was changed is never loaded",
        )
    backend(name)
    return Engine(file, found, inputs, outputs, sidecar)


def _engine_file(folder: Path) -> Path:
    for name in ("engine.plan", "engine.xml", "engine.onnx"):
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"{folder} holds no engine file.", hint="mpdeploy build MODEL.onnx --engine NAME --output DIR")


def engine_bytes(engine: Engine) -> int:
    """The size of an engine: of its file, and of the weights that OpenVINO keeps in a file of their own."""
    return sum(file.stat().st_size for file in engine.path.parent.glob("engine.*") if file.suffix != ".json")


def is_engine(path: Path) -> bool:
    """Whether a path names a built engine (a folder or file with a sidecar) and not a plain ONNX file."""
    folder = path if path.is_dir() else path.parent
    return (folder / SIDECAR).is_file() and (path.is_dir() or path.name.startswith("engine."))


@contextlib.contextmanager
def open_runner(
    path: Path, *, engine: str | None = None, emulate: bool = False, half_sums: bool = False
) -> Iterator[Runner]:
    """Open anything that can run: a built engine, a program of torch.export, or an ONNX file in ONNX Runtime, in `engine`, or emulated.

    With `emulate`, `engine` is whose forms are emulated; with `half_sums` it is emulated as on an engine that sums in half.

    Raises:
        UsageError: `emulate` of something that is no ONNX file.
        UnavailableError: it cannot run on this machine.
    """
    with contextlib.ExitStack() as stack:
        if path.suffix == ".pt2":
            if emulate or engine is not None:
                raise UsageError(
                    f"{path} is a program of torch.export, which torch alone runs.", hint="give an ONNX file instead"
                )
            from mpdeploy.engines.pytorch import TorchRunner

            yield stack.enter_context(TorchRunner(path))
            return
        if is_engine(path):
            if emulate:
                raise UsageError(
                    f"--emulate wants an ONNX file, {path} is an engine.", hint="give the .onnx it was built from"
                )
            built = find_engine(path)
        elif emulate:
            from mpdeploy.emulated_runs import emulated_runner
            from mpdeploy.precision.engine_forms import USUAL
            from mpdeploy.precision.model_io import load_model

            runner = emulated_runner(load_model(path), half_sums=half_sums, engine=engine or USUAL)
            yield stack.enter_context(runner)
            return
        elif engine is None:
            from mpdeploy.engines.onnxruntime import OrtRunner

            describe_model(path)
            yield stack.enter_context(OrtRunner(path))
            return
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpdeploy-")))
            built, _ = build(path, engine, folder)
        row = backend(built.backend)
        missing = row.available() or row.can_run()
        if missing is not None:
            raise UnavailableError(f"{path} cannot run here: {missing.reason}", hint=missing.hint)
        yield stack.enter_context(row.load(built))


def fitted(feeds: Mapping[str, Array], inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Feeds in the dtypes that a runner wants, where the two differ only in the kind of float."""
    wanted = {spec.name: spec.dtype for spec in inputs}
    return {
        name: array if wanted.get(name) in (None, str(array.dtype)) else _cast(array, wanted[name])
        for name, array in feeds.items()
    }


def _cast(array: Array, dtype: str) -> Array:
    if array.dtype.kind != "f" and str(array.dtype) != "bfloat16":
        return array
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    with np.errstate(over="ignore"):
        return array.astype(np.dtype(dtype)) if dtype.startswith("float") else array

"""Reading and writing ONNX files: external data stays on disk until it is needed, and a file is whole or not there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from mpdeploy.artifact import TensorSpec
from mpdeploy.errors import ModelError, UsageError, closest_names
from mpdeploy.files import cannot_write
from mpdeploy.precision.formats import FLOAT
from mpdeploy.precision.graph_index import all_graphs

EXTERNAL_FROM_BYTES = 1_000_000_000
"""Above this a model's weights go into a file of their own: protobuf ends at 2 GiB, and takes thrice a file's size to read and write."""
SCRATCH_EXTERNAL_FROM_BYTES = 1_000_000
SMALL_BYTES = 1024
OPSETS = range(9, 26)


def load_model(path: Path) -> ir.Model:
    """Read an ONNX file; weights stay where they are until someone asks for them.

    Raises:
        ModelError: no such file, not ONNX, truncated, or external data that is missing, too short or outside its folder.
    """
    if not path.is_file():
        raise ModelError(f"There is no model file {path}.", hint="check the path")
    try:
        model = _load(path)
    except Exception as error:  # protobuf and the deserialiser raise a dozen types for a file that is not ONNX
        text = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{path} is not a readable ONNX model: {text}",
            hint=f"the file has {path.stat().st_size} bytes; export it again, or fetch it again if it was cut short",
        ) from error
    if not len(model.graph) and not model.graph.outputs:
        raise ModelError(f"{path} is not an ONNX model: it holds no graph.", hint="give the .onnx file itself")
    opset = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx"))
    if opset is not None and opset not in OPSETS:
        raise ModelError(
            f"{path} has opset {opset}; opsets {OPSETS[0]} to {OPSETS[-1]} are supported.",
            hint="export it with opset_version=20, or convert it with onnx.version_converter",
        )
    weights = _initialisers(model)
    _check_external_data(weights, path)
    _decode_small(weights)
    return model


def _initialisers(model: ir.Model) -> list[ir.Value]:
    return [value for graph in all_graphs(model.graph) for value in graph.initializers.values()]


def _decode_small(weights: Sequence[ir.Value]) -> None:
    """Read small constants out of protobuf once: they are looked at many times."""
    for value in weights:
        tensor = value.const_value
        if isinstance(tensor, ir.TensorProtoTensor) and tensor.dtype == FLOAT and tensor.nbytes <= SMALL_BYTES:
            value.const_value = ir.Tensor(tensor.numpy(), dtype=FLOAT, name=tensor.name, doc_string=tensor.doc_string)


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception:
        # onnx_ir 1.1 reads no sparse constants: make them dense, where that is what it stumbled over
        proto = onnx.load(path, load_external_data=False)
        if not _densify(proto.graph):
            raise
        onnx.external_data_helper.load_external_data_for_model(proto, str(path.parent))
        return ir.from_proto(proto)


def _densify(graph: onnx.GraphProto) -> bool:
    found = False
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                sparse = attribute.sparse_tensor
                values = onnx.numpy_helper.to_array(sparse.values)
                indices = onnx.numpy_helper.to_array(sparse.indices)
                dense = np.zeros(tuple(sparse.dims), values.dtype)
                if indices.ndim == 1:
                    dense.reshape(-1)[indices] = values
                else:
                    dense[tuple(indices.T)] = values
                attribute.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(dense)))
                found = True
            elif attribute.type == onnx.AttributeProto.GRAPH:
                found |= _densify(attribute.g)
    return found


def _check_external_data(weights: Sequence[ir.Value], path: Path) -> None:
    folder = path.parent.resolve()
    for value in weights:
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        where = (folder / tensor.location).resolve()
        if not where.is_relative_to(folder):
            raise ModelError(
                f"{path}: the external data of '{value.name}' lies outside the model's folder: {tensor.location}",
                hint="a model must keep its weights beside it; this one may be hostile",
            )
        if not where.is_file():
            raise ModelError(
                f"{path}: the external data file '{tensor.location}' of '{value.name}' is missing.",
                hint=f"put it into {folder}",
            )
        need = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if where.stat().st_size < need:
            raise ModelError(
                f"{path}: the external data file '{tensor.location}' has {where.stat().st_size} bytes, "
                f"'{value.name}' needs {need}.",
                hint="it was cut short: fetch it again",
            )


def weight_files(model: ir.Model) -> list[Path]:
    """The files beside an ONNX file in which it keeps weights."""
    tensors = (value.const_value for value in _initialisers(model))
    return sorted({Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)})


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initialisers."""
    return sum(value.const_value.nbytes for value in _initialisers(model) if value.const_value is not None)


def write_model(model: ir.Model, folder: Path, name: str, *, external_from_bytes: int = EXTERNAL_FROM_BYTES) -> Path:
    """Write into a folder, with external data `NAME.data` where the weights are large. Not atomic: see `save_model`.

    A scratch file that only a runtime will read is written faster with its weights beside it.
    """
    path = folder / name
    if weight_bytes(model) > external_from_bytes:
        ir.save(model, path, external_data=f"{name}.data")
    else:
        _bring_in(model)
        ir.save(model, path)
    return path


def _bring_in(model: ir.Model) -> None:
    """Read what still lies in the source's external data: the file that is written stands elsewhere, and alone."""
    for graph in all_graphs(model.graph):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _in_memory(value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, _in_memory(attribute.value))


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)


def save_model(model: ir.Model, path: Path, checks: Sequence[Callable[[Path], None]] = ()) -> None:
    """Write a model so that it is whole, and passes every check, before it has its name.

    Raises:
        StageFailedError: the disk is full or the folder cannot be written.
        Whatever a check raises; no file is left then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        written = write_model(model, folder, path.name)
        for check in checks:
            check(written)
        data = folder / f"{path.name}.data"
        if data.exists():
            data.replace(path.parent / data.name)
        written.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def float_io_names(model: ir.Model, keep_io: bool, names: Collection[str]) -> set[str]:
    """Names of the inputs and outputs that stay FP32: all of them, or those named.

    Raises:
        UsageError: the model has no input or output of that name; the hint holds the closest ones.
    """
    known = [value.name or "" for value in (*model.graph.inputs, *model.graph.outputs)]
    for name in names:
        if name not in known:
            raise UsageError(
                f"The model has no input or output '{name}'.", hint=f"closest names: {closest_names(name, known)}"
            )
    return set(known) if keep_io else set(names)


def specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    """Specs of graph inputs or outputs."""
    found = []
    for value in values:
        dtype = "unknown" if value.dtype is None else _NUMPY_NAMES.get(value.dtype, value.dtype.name.lower())
        shape = None
        if value.shape is not None:
            shape = tuple(axis if isinstance(axis, int) else axis.value for axis in value.shape)
        found.append(TensorSpec(value.name or "", dtype, shape))
    return tuple(found)


def input_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """Inputs a caller must give: those without a default."""
    return specs([value for value in model.graph.inputs if not value.is_initializer()])


def output_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """Outputs."""
    return specs(model.graph.outputs)


_NUMPY_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.STRING: "object",
}

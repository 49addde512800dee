"""`torch.onnx.export` done right: FP32 weights, eval mode, outside autocast, eager attention, named dynamic axes; then checked."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

from mpdeploy.artifact import Array
from mpdeploy.errors import MpdeployError, StageFailedError
from mpdeploy.export.outputs import answering_tuples, named_outputs
from mpdeploy.export.small_constants import small_addends
from mpdeploy.files import atomic_path
from mpdeploy.user_code import user_call

__all__ = [
    "PARITY_BATCHES",
    "TRACED_BATCH",
    "answers_of",
    "check_parity",
    "dynamic_axes",
    "export_onnx",
    "named_outputs",
    "parity_feeds",
]

TRACED_BATCH = 2
PARITY_BATCHES = (1, 2, 7)
"""Batch sizes at which torch and ONNX Runtime must agree: 1, the traced one, and one that was never traced."""
MASK = "attention_mask"
"""The input that marks a text model: its second axis is the `sequence`, and that of every integer input as long as it."""


def dynamic_axes(inputs: Mapping[str, Array]) -> dict[str, dict[int, str]]:
    """Input name -> axis -> its name: `batch` first, and `sequence` second for the token inputs of a text model."""
    mask = inputs.get(MASK)
    tokens = [
        name
        for name, array in inputs.items()
        if mask is not None and array.ndim >= 2 and array.dtype.kind in "iub" and array.shape[1] == mask.shape[1]
    ]
    return {name: {0: "batch", 1: "sequence"} if name in tokens else {0: "batch"} for name in inputs}


def export_onnx(
    model: nn.Module, inputs: dict[str, Array], path: Path, *, opset: int, output_names: Sequence[str]
) -> tuple[str, ...]:
    """Write `model` as FP32 ONNX with an axis named `batch` (and `sequence`, see `dynamic_axes`), and run ONNX's full checker on it.

    Where the exporter's optimiser deletes a small constant (see `small_constants`), the graph is written without it.

    Args:
        model: on the CPU, in eval mode, FP32; called with the inputs in their order.
        inputs: input name -> samples; the first `TRACED_BATCH` are traced.
        path: where to.
        opset: ONNX opset.
        output_names: names of the outputs; of a dict or dataclass these are taken.

    Returns:
        What the user should know, in words.

    Raises:
        StageFailedError: torch cannot export it, or the checker refuses the result.
        UserCodeError: the model itself raises, without any export.
    """
    if any(value.is_floating_point() and value.dtype != torch.float32 for value in model.state_dict().values()):
        raise StageFailedError("The model holds weights that are not FP32.", hint="export the FP32 master weights")
    example = tuple(_tensor(array[:TRACED_BATCH]) for array in inputs.values())
    with torch.no_grad():
        named_outputs(user_call(model, *example), output_names)
    axes = dynamic_axes(inputs)

    def traced() -> Any:
        dims = {name: torch.export.Dim(name) for name in {axis for found in axes.values() for axis in found.values()}}
        program = torch.onnx.export(
            answering_tuples(model, output_names),
            example,
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(output_names),
            # forward is `*inputs`: the shapes of one argument that holds them all
            dynamic_shapes=(tuple({position: dims[axis] for position, axis in axes[name].items()} for name in inputs),),
            optimize=False,
            verbose=False,
        )
        assert program is not None
        return program

    notes: tuple[str, ...] = ()
    try:
        with _quiet(), torch.no_grad():
            program = traced()
            before = small_addends(program.model)
            program.optimize()
            lost = {value: node for value, node in before.items() if value not in small_addends(program.model)}
            if lost:
                program = traced()
                notes = (_note(lost),)
        _refuse_fixed_axes(program.model, axes)
        with atomic_path(path) as temporary:
            program.save(temporary)
            onnx.checker.check_model(temporary, full_check=True)
    except (MpdeployError, KeyboardInterrupt):
        raise
    except Exception as error:  # the exporter raises types of many packages, and wraps what went wrong in advice
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise StageFailedError(
            f"torch.onnx.export failed: {type(cause).__name__}: {' '.join(str(cause).split())[:800]}",
            hint="torch.export.export(model, ...) alone shows whether the model can be traced",
        ) from error
    return notes


def _refuse_fixed_axes(exported: ir.Model, axes: Mapping[str, Mapping[int, str]]) -> None:
    """The exporter makes an axis that the model fixes a number, and says nothing."""
    for value in exported.graph.inputs:
        for position, axis in axes[str(value.name)].items():
            found = None if value.shape is None else value.shape[position]
            if isinstance(found, int):
                raise StageFailedError(
                    f"The model fixes the axis '{axis}' of its input '{value.name}' at {found}.",
                    hint="does it add or reshape to a tensor of that length? make it from the input's own shape",
                )


def _note(lost: Mapping[float, str]) -> str:
    named = ", ".join(f"{value:.3g} (in {node})" for value, node in lost.items())
    return (
        f"the exporter's optimiser deletes the constant {named}, which may keep a division from one by zero: the graph was written "
        "without that optimiser; add at least 1e-7 instead to have a smaller graph"
    )


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's deprecation warnings and its notes about torchvision from the user."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def answers_of(
    model: nn.Module, inputs: Mapping[str, Array], output_names: Sequence[str], batch_size: int = 64
) -> dict[str, Array]:
    """The model's FP32 answers on the CPU, by output name."""
    count = len(next(iter(inputs.values())))
    parts: dict[str, list[Array]] = {name: [] for name in output_names}
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            answer = model(*(_tensor(array[start : start + batch_size]) for array in inputs.values()))
            for name, value in zip(output_names, named_outputs(answer, output_names), strict=True):
                parts[name].append(value.float().numpy().copy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def parity_feeds(inputs: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Name of a size (`7`, or `7x12` where there is a sequence) -> samples cut to it.

    Batches are `PARITY_BATCHES`; sequences are the traced length, a shorter one, and 1.
    """
    axes = dynamic_axes(inputs)
    texts = [name for name, found in axes.items() if "sequence" in found.values()]
    if not texts:
        return {str(batch): {name: array[:batch] for name, array in inputs.items()} for batch in PARITY_BATCHES}
    length = inputs[texts[0]].shape[1]
    sizes = dict.fromkeys(((1, length), (2, length), (7, max(1, length // 2 + 1)), (7, length), (2, 1)))
    return {
        f"{batch}x{sequence}": {
            name: array[:batch, :sequence] if name in texts else array[:batch] for name, array in inputs.items()
        }
        for batch, sequence in sizes
    }


def check_parity(
    model: nn.Module, path: Path, inputs: Mapping[str, Array], output_names: Sequence[str], *, rtol: float
) -> dict[str, float]:
    """Relative L2 difference between torch and ONNX Runtime at several batch sizes (and sequence lengths), some of them untraced.

    Returns:
        size (see `parity_feeds`) -> the worst output's difference.

    Raises:
        StageFailedError: one is above `rtol`, or ONNX Runtime cannot run the model.
    """
    from mpdeploy.engines.onnxruntime import OrtRunner
    from mpdeploy.measure.drift import DriftMeter

    found: dict[str, float] = {}
    with OrtRunner(path) as runner:
        for size, feeds in parity_feeds(inputs).items():
            meter = DriftMeter()
            meter.add(answers_of(model, feeds, output_names), runner.infer(_owned(feeds)))
            found[size] = meter.report().rel_l2
    worst = max(found.values())
    if not worst <= rtol:
        raise StageFailedError(
            f"The exported model does not answer as torch does: relative L2 difference {worst:.3g}, the limit is {rtol:.3g} "
            f"({', '.join(f'batch {size}: {value:.2g}' for size, value in found.items())}).",
            hint="does the model branch on the batch size, or draw random numbers in eval mode?",
        )
    return found


def _owned(feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.ascontiguousarray(array) for name, array in feeds.items()}

"""`torch.onnx.export` done right: FP32 weights, eval mode, outside autocast, eager attention, a named dynamic batch; then checked."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from mpdeploy.artifact import Array
from mpdeploy.errors import MpdeployError, StageFailedError
from mpdeploy.files import atomic_path
from mpdeploy.user_code import user_call

TRACED_BATCH = 2
PARITY_BATCHES = (1, 2, 7)
"""Batch sizes at which torch and ONNX Runtime must agree: 1, the traced one, and one that was never traced."""


def export_onnx(
    model: nn.Module, inputs: dict[str, Array], path: Path, *, opset: int, output_names: Sequence[str]
) -> None:
    """Write `model` as FP32 ONNX with a batch axis named `batch`, and run ONNX's full checker on it.

    Args:
        model: on the CPU, in eval mode, FP32.
        inputs: input name -> samples; the first `TRACED_BATCH` are traced.
        path: where to.
        opset: ONNX opset.
        output_names: names of the outputs.

    Raises:
        StageFailedError: torch cannot export it, or the checker refuses the result.
        UserCodeError: the model itself raises, without any export.
    """
    if any(value.is_floating_point() and value.dtype != torch.float32 for value in model.state_dict().values()):
        raise StageFailedError("The model holds weights that are not FP32.", hint="export the FP32 master weights")
    example = tuple(torch.from_numpy(array[:TRACED_BATCH]) for array in inputs.values())
    with torch.no_grad():
        user_call(model, *example)
    batch = torch.export.Dim("batch")
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                example,
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(output_names),
                dynamic_shapes=tuple({0: batch} for _ in example),
                verbose=False,
            )
        assert program is not None
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
    model: nn.Module, inputs: dict[str, Array], output_names: Sequence[str], batch_size: int = 64
) -> dict[str, Array]:
    """The model's FP32 answers on the CPU, by output name."""
    count = len(next(iter(inputs.values())))
    parts: dict[str, list[Array]] = {name: [] for name in output_names}
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            outputs: Any = model(*(torch.from_numpy(array[start : start + batch_size]) for array in inputs.values()))
            outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
            if len(outputs) != len(output_names):
                raise StageFailedError(
                    f"The model answers {len(outputs)} outputs, export.output_names names {len(output_names)}.",
                    hint="name each output in export.output_names",
                )
            for name, value in zip(output_names, outputs, strict=True):
                parts[name].append(value.float().numpy().copy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def check_parity(
    model: nn.Module, path: Path, inputs: dict[str, Array], output_names: Sequence[str], *, rtol: float
) -> dict[str, float]:
    """Relative L2 difference between torch and ONNX Runtime at several batch sizes, one of them untraced.

    Returns:
        batch size (as text) -> the worst output's difference.

    Raises:
        StageFailedError: one is above `rtol`, or ONNX Runtime cannot run the model.
    """
    from mpdeploy.engines.onnxruntime import OrtRunner
    from mpdeploy.measure.drift import DriftMeter

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(), OrtRunner(path) as runner:
        for batch in PARITY_BATCHES:
            feeds = {name: array[:batch] for name, array in inputs.items()}
            meter = DriftMeter()
            meter.add(answers_of(model, feeds, output_names), runner.infer(feeds))
            found[str(batch)] = meter.report().rel_l2
    worst = max(found.values())
    if not worst <= rtol:
        raise StageFailedError(
            f"The exported model does not answer as torch does: relative L2 difference {worst:.3g}, the limit is {rtol:.3g} "
            f"({', '.join(f'batch {batch}: {value:.2g}' for batch, value in found.items())}).",
            hint="does the model branch on the batch size, or draw random numbers in eval mode?",
        )
    return found

"""Recipe -> ONNX file, checked against torch."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .recipe import Recipe

OPSET = 20
MAX_TORCH_PARITY = 1e-4


def export_to(recipe: Recipe, path: Path) -> dict[str, float]:
    """Write `path`; returns the parity with torch and the seconds it took."""
    import torch

    started = time.perf_counter()
    with _quiet(), torch.no_grad():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = recipe.build()
        # Two samples: torch.export takes an axis of length 1 for a constant.
        example = {name: torch.from_numpy(array) for name, array in recipe.feeds(2, 0).items()}
        temporary = path.with_suffix(".tmp.onnx")
        if recipe.torchscript_opset:
            _trace(recipe, module, example, temporary)
        else:
            _export(recipe, module, example, temporary)
        onnx.checker.check_model(str(temporary), full_check=True)
        parity = max(_parity(recipe, module, temporary, num_samples) for num_samples in (1, 2, 5))
    if not parity < MAX_TORCH_PARITY:
        raise AssertionError(f"{recipe.name}: ONNX Runtime is {parity:.1e} (relative L2) away from torch.")
    temporary.replace(path)
    return {"torch_parity": parity, "export_seconds": time.perf_counter() - started}


def _export(recipe: Recipe, module: Any, example: dict[str, Any], path: Path) -> None:
    import torch

    names = {name for axes in recipe.dynamic.values() for name in axes.values()} | {"batch"}
    dimensions = {name: torch.export.Dim(name, min=1 if name == "batch" else 2, max=4096) for name in names}
    shapes = tuple({a: dimensions[d] for a, d in {0: "batch", **recipe.dynamic.get(n, {})}.items()} for n in example)
    torch.onnx.export(
        _star(module),
        tuple(example.values()),
        str(path),
        input_names=list(example),
        output_names=list(recipe.outputs),
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes=(shapes,),
        external_data=False,
        verbose=False,
    )


def _trace(recipe: Recipe, module: Any, example: dict[str, Any], path: Path) -> None:
    import torch

    axes = {name: {0: "batch", **recipe.dynamic.get(name, {})} for name in (*example, *recipe.outputs)}
    torch.onnx.export(
        _star(module),
        tuple(example.values()),
        str(path),
        input_names=list(example),
        output_names=list(recipe.outputs),
        opset_version=recipe.torchscript_opset,
        dynamo=False,
        dynamic_axes=axes,
    )


def _star(module: Any) -> Any:
    """The module under one signature: `forward(*inputs)`."""
    import torch

    class Star(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *inputs: Any) -> Any:
            return self.model(*inputs)

    return Star().eval()


def _parity(recipe: Recipe, module: Any, path: Path, num_samples: int) -> float:
    import onnxruntime
    import torch

    feeds = recipe.feeds(num_samples, 100 + num_samples)
    if num_samples == 5 and recipe.dynamic:  # another length as well
        feeds = {name: array[:, :17] for name, array in feeds.items()}
    expected = module(*(torch.from_numpy(array) for array in feeds.values()))
    expected = expected if isinstance(expected, tuple) else (expected,)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, feeds)
    return max(_rel_l2(f, e.numpy()) for f, e in zip(found, expected, strict=True))


def _rel_l2(candidate: np.ndarray, reference: np.ndarray) -> float:
    difference = np.linalg.norm(candidate.astype(np.float64) - reference.astype(np.float64))
    return float(difference / np.linalg.norm(reference.astype(np.float64)))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn and print about themselves; a test run treats warnings as errors."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "transformers", "torch.export")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _silent():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

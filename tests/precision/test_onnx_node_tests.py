"""ONNX's own node tests, every one in FP32 that ONNX Runtime loads, through the whole converter in both precisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest

from mpdeploy.conversion import convert
from mpdeploy.precision.model_io import OPSETS

pytestmark = pytest.mark.slow

NUM_GROUPS = 32


def _models() -> dict[str, onnx.ModelProto]:
    """Name -> model: with a float32 input or output, of the opsets that are supported, of ONNX's own domain."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ONNX makes its cases anew, overflow and all
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    found = {}
    for case in cases:
        model = case.model
        if (
            model is None
            or any(opset.domain for opset in model.opset_import)
            or model.opset_import[0].version not in OPSETS
        ):
            continue
        values = [*model.graph.input, *model.graph.output]
        if any(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in values):
            found[case.name] = model
    return found


@pytest.fixture(scope="module")
def models() -> dict[str, onnx.ModelProto]:
    return _models()


def test_there_are_many(models: dict[str, onnx.ModelProto]) -> None:
    assert len(models) > 1000
    assert len({node.op_type for model in models.values() for node in model.graph.node}) > 140


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("group", range(NUM_GROUPS))
def test_they_convert_and_prove_valid(
    group: int, precision: Any, models: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    converted, faults = 0, {}
    for name in sorted(models)[group::NUM_GROUPS]:
        path = tmp_path / f"{name}.onnx"
        onnx.save(models[name], path)
        try:
            ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception:  # no kernel on a CPU: ONNX Runtime raises its own types, one a status
            continue
        try:
            done = convert(path, keep_io=True, precision=precision, output=tmp_path / "out.onnx")
        except Exception as error:
            faults[name] = f"{type(error).__name__}: {error}"
            continue
        assert done.output is not None
        converted += 1
    assert faults == {}
    assert converted > 25

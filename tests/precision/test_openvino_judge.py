"""What the judge does about OpenVINO's own conversion to BF16."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from tests.precision.openvino_judge import AS_TYPED, answers_as_typed, skip_where_it_cannot_judge, software_cast
from tests.precision.visible import graph, named

VALUES = np.concatenate(
    [
        np.random.default_rng(0).normal(0, 1, 4096).astype(np.float32),
        np.array([0.0, -0.0, 1e-30, -1e30, -3.0e38, 65504.0], np.float32),
    ]
)[:, None]


def _saved(folder: Path) -> Path:
    model = named(graph("g (float[N, 1] x) => (float[N, 1] y) { h = Cast<to = 16>(x) y = Cast<to = 1>(h) }", 20))
    ir.save(model, folder / "cast.onnx")
    return folder / "cast.onnx"


def test_openvino_converts_to_bf16_as_no_hardware_does(tmp_path: Path) -> None:
    """Where this fails, OpenVINO has mended it, and the judge need not round before casts any more."""
    skip_where_it_cannot_judge("bf16")
    import openvino as ov

    compiled = ov.Core().compile_model(ov.Core().read_model(_saved(tmp_path)), "CPU", AS_TYPED)
    found = np.asarray(compiled({"x": VALUES})[0])
    np.testing.assert_array_equal(found, software_cast(VALUES))
    assert np.mean(found == VALUES.astype(ml_dtypes.bfloat16).astype(np.float32)) < 0.8


def test_the_judge_rounds_to_nearest_even(tmp_path: Path) -> None:
    skip_where_it_cannot_judge("bf16")
    (found,) = answers_as_typed(_saved(tmp_path), {"x": VALUES})
    expected = VALUES.astype(ml_dtypes.bfloat16).astype(np.float32)
    large = np.abs(VALUES) >= 1e30
    np.testing.assert_array_equal(found[~large], expected[~large])
    np.testing.assert_allclose(found[large], expected[large], rtol=2**-7)

"""What a search found holds on hardware that computes half for real, within the ratio that the emulator states."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest

from mpdeploy.conversion import convert
from mpdeploy.engines.onnxruntime import OrtRunner
from mpdeploy.searching.conversion import convert_searched
from tests import zoo
from tests.precision.openvino_judge import HALF, answers_as_typed, skip_where_it_cannot_judge
from tests.precision.visible import rel_l2

EMULATED_OVER_REAL = 0.8
"""The least that emulated drift may be of real drift (tests/precision/test_emulate_judged.py)."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "share", "precision"),
    [
        ("digits", 0.75, "fp16"),
        ("minilm", 0.25, "fp16"),
        ("convnext", 0.25, "fp16"),
        ("digits", 0.75, "bf16"),
        ("minilm", 0.25, "bf16"),
        ("convnext", 0.25, "bf16"),
    ],
)
def test_the_gate_is_met_by_openvino_running_the_answer_as_typed(
    name: str, share: float, precision: Literal["fp16", "bf16"], zoo_folder: Path, tmp_path: Path
) -> None:
    """The gate is a share of the all-half drift: of the four layers of `digits` none may be half for a quarter of it."""
    skip_where_it_cannot_judge(precision)
    model = zoo.trained_digits_cnn(zoo_folder, "none") if name == "digits" else zoo.export(name, zoo_folder)
    if model is None:
        pytest.skip(f"the weights of {name} are not installed")
    feeds = model.feeds(32, 1)
    np.savez(tmp_path / "x.npz", **feeds)
    half = convert(model.path, data=str(tmp_path / "x.npz"), precision=precision, keep_io=True, engine="openvino")
    assert half.drift is not None
    limit = share * half.drift.rel_l2
    output = tmp_path / "searched.onnx"
    convert_searched(
        model.path,
        data=str(tmp_path / "x.npz"),
        precision=precision,
        max_drift=limit,
        output=output,
        keep_io=True,
        engine="openvino",
    )
    kinds = {tensor.data_type for tensor in onnx.load(output).graph.initializer}
    assert {HALF[precision][0], onnx.TensorProto.FLOAT} <= kinds, "a mixed graph, else there is nothing to judge"
    with OrtRunner(model.path) as runner:
        golden = runner.infer(feeds)
    answers = answers_as_typed(output, feeds)
    real = max(rel_l2(found, array) for found, array in zip(answers, golden.values(), strict=True))
    print(f"{name} {precision}: real drift {real:.3g}, limit {limit:.3g}, ratio {real / limit:.2f}")
    assert real <= limit / EMULATED_OVER_REAL

"""What a search found holds on hardware that computes half for real, within the ratio that the emulator states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpdeploy.conversion import convert
from mpdeploy.engines.onnxruntime import OrtRunner
from mpdeploy.searching.conversion import convert_searched
from tests import zoo
from tests.precision.openvino_judge import answers_as_typed, skip_where_it_cannot_judge
from tests.precision.visible import rel_l2

EMULATED_OVER_REAL = 0.8
"""The least that emulated drift may be of real drift (tests/precision/test_emulate_judged.py)."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "minilm", "convnext"])
def test_the_gate_is_met_by_openvino_running_the_answer_as_typed(name: str, zoo_folder: Path, tmp_path: Path) -> None:
    skip_where_it_cannot_judge("fp16")
    model = zoo.trained_digits_cnn(zoo_folder, "none") if name == "digits" else zoo.export(name, zoo_folder)
    if model is None:
        pytest.skip(f"the weights of {name} are not installed")
    feeds = model.feeds(32, 1)
    np.savez(tmp_path / "x.npz", **feeds)
    half = convert(model.path, data=str(tmp_path / "x.npz"), keep_io=True)
    assert half.drift is not None
    limit = 0.25 * half.drift.rel_l2
    output = tmp_path / "searched.onnx"
    convert_searched(model.path, data=str(tmp_path / "x.npz"), max_drift=limit, output=output, keep_io=True)
    with OrtRunner(model.path) as runner:
        golden = runner.infer(feeds)
    answers = answers_as_typed(output, feeds)
    real = max(rel_l2(found, array) for found, array in zip(answers, golden.values(), strict=True))
    assert real <= limit / EMULATED_OVER_REAL

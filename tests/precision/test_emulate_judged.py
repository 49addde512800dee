"""The emulator against engines that compute half for real: torch's half kernels everywhere, OpenVINO where the CPU has the units.

The ratio of drifts (emulated over real, both against FP32) on at least 32 samples and 1,000 output values must lie in 0.8 to 1.25.
torch's kernels store half between modules, as hardware does, but fuse nothing; what a module computes in FP32 of its own accord
(RMSNorm, rotary angles) is not half there: such architectures are left to OpenVINO.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from mpdeploy.conversion import convert
from mpdeploy.data_files import FeedSet
from mpdeploy.emulated_runs import emulated_runner
from mpdeploy.engines.onnxruntime import OrtOptions, OrtRunner
from mpdeploy.precision.formats import FORMATS
from mpdeploy.precision.model_io import input_specs, load_model
from mpdeploy.precision.plan import make_plan
from mpdeploy.precision.rewrite import prepare, rewrite
from tests import zoo
from tests.precision.openvino_judge import answers_as_typed, skip_where_it_cannot_judge
from tests.precision.visible import rel_l2

pytestmark = pytest.mark.slow
NUM_SAMPLES = 32
ROUNDED_ONCE = frozenset({"bert_torchscript_opset11"})
"""Here OpenVINO makes one kernel of the pieces of a LayerNorm and of a GELU, which does less rounding than the file says: BF16 drift
emulated is 1.28 of it, and 1.08 of what it is where every tensor of the file is stored."""


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
@pytest.mark.parametrize("name", zoo.TORCH_JUDGES)
def test_drift_is_that_of_torch_in_half(name: str, precision: str, dtype: str, zoo_folder: Path) -> None:
    model = zoo.export(name, zoo_folder)
    feeds = model.feeds(NUM_SAMPLES, 5)
    with OrtRunner(model.path) as runner:
        golden = list(runner.infer(feeds).values())
    prepared = prepare(load_model(model.path), FORMATS[precision])
    mixed = rewrite(prepared, make_plan(prepared.index, FORMATS[precision]))
    with emulated_runner(mixed) as runner:
        found = list(runner.infer(feeds).values())
    real = zoo.torch_in_half(name, dtype, feeds)
    assert sum(array.size for array in golden) >= 1000
    for expected, emulated, torchs in zip(golden, found, real, strict=True):
        ratio = rel_l2(emulated, expected) / rel_l2(torchs, expected)
        print(
            f"{name} {precision}: emulated {rel_l2(emulated, expected):.3g}, torch {rel_l2(torchs, expected):.3g}, ratio {ratio:.2f}"
        )
        assert 0.8 < ratio < 1.25


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_an_emulated_run_takes_at_most_3_times_an_fp32_run(name: str, precision: str, zoo_folder: Path) -> None:
    """Processor time, in turns in one process, so that what else the machine does counts for both.

    One thread: the threads of a pool spin while they wait, on processor time, for as long as a busy machine lets them wait.
    """
    model = zoo.export(name, zoo_folder)
    if model is None:
        pytest.skip(f"the weights of {name} are not installed")
    feeds = model.feeds(8, 0)
    prepared = prepare(load_model(model.path), FORMATS[precision])
    mixed = rewrite(prepared, make_plan(prepared.index, FORMATS[precision]))
    alone = OrtOptions(threads=1)
    with OrtRunner(model.path, options=alone) as fp32, emulated_runner(mixed, options=alone) as half:
        ratios = []
        for _ in range(8):
            marks = [time.process_time()]
            for runner in (fp32, half):
                runner.infer(feeds)
                marks.append(time.process_time())
            ratios.append((marks[2] - marks[1]) / (marks[1] - marks[0]))
    assert np.median(ratios[1:]) < 3, ratios


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name not in ("minilm", "mobilenetv2_uncalibrated")])
def test_drift_is_that_of_openvino_running_the_graph_as_typed(
    name: str, precision: str, zoo_folder: Path, tmp_path: Path
) -> None:
    skip_where_it_cannot_judge(precision)
    model = zoo.export(name, zoo_folder)
    feeds = model.feeds(NUM_SAMPLES, 5)
    output = tmp_path / "half.onnx"
    inputs = input_specs(load_model(model.path))
    done = convert(
        model.path,
        data=FeedSet((feeds,), inputs, frozenset()),
        precision=precision,
        keep_io=True,
        output=output,
        engine="openvino",
    )  # type: ignore[arg-type]
    with OrtRunner(model.path) as runner:
        golden = runner.infer(feeds)
    answers = answers_as_typed(output, feeds, fused=name not in ROUNDED_ONCE)
    sizes = [array.size for array in golden.values()]
    real = _over_all([rel_l2(found, array) for found, array in zip(answers, golden.values(), strict=True)], sizes)
    emulated = _over_all([done.drift.outputs[name].rel_l2 for name in golden], sizes)
    print(f"{name} {precision}: emulated {emulated:.3g}, OpenVINO {real:.3g}, ratio {emulated / real:.2f}")
    assert 0.8 < emulated / real < 1.25


def _over_all(drifts: list[float], sizes: list[int]) -> float:
    """Drift of all outputs, each with the weight of its number of values: that of a few values is mostly chance."""
    return float(np.sqrt(np.average(np.square(drifts), weights=sizes)))

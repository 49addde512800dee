"""The emulator against engines that compute half for real: torch's half kernels everywhere, OpenVINO where the CPU has the units.

The ratio of drifts (emulated over real, both against FP32) on at least 32 samples and 1,000 output values must lie in 0.8 to 1.25.
torch's kernels store half between modules, as hardware does, but fuse nothing; what a module computes in FP32 of its own accord
(RMSNorm, rotary angles) is not half there: such architectures are left to OpenVINO.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from mpdeploy.conversion import convert
from mpdeploy.data_files import FeedSet
from mpdeploy.emulated_runs import emulated_runner
from mpdeploy.engines.onnxruntime import OrtRunner
from mpdeploy.precision.model_io import input_specs, load_model
from tests import zoo
from tests.precision.visible import rel_l2

pytestmark = pytest.mark.slow
NUM_SAMPLES = 32
ALL_HALF = ["resnet", "mobilenetv2", "convnext", "vit", "swin", "segformer", "bert", "gpt2", "whisper_encoder", "wav2vec2"]
WIDER: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = Path("/tmp/zoo_cache")
    return cache if cache.is_dir() else tmp_path_factory.mktemp("zoo")


def _as_torch_computes(name: str, dtype: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import torch

    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        module = zoo.RECIPES[name].build().to(getattr(torch, dtype))
        given = [torch.from_numpy(array) for array in feeds.values()]
        outputs = module(*(t.to(getattr(torch, dtype)) if t.is_floating_point() else t for t in given))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [output.float().numpy() for output in outputs]


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
@pytest.mark.parametrize("name", ALL_HALF)
def test_drift_is_that_of_torch_in_half(name: str, precision: str, dtype: str, folder: Path) -> None:
    model = zoo.export(name, folder)
    feeds = model.feeds(NUM_SAMPLES, 5)
    with OrtRunner(model.path) as runner:
        golden = list(runner.infer(feeds).values())
    plan = convert(model.path, precision=precision)  # type: ignore[arg-type]
    from mpdeploy.precision.formats import FORMATS
    from mpdeploy.precision.rewrite import prepare, rewrite

    mixed = rewrite(prepare(load_model(model.path), FORMATS[precision]), plan.plan)
    with emulated_runner(mixed) as runner:
        found = list(runner.infer(feeds).values())
    real = _as_torch_computes(name, dtype, feeds)
    assert sum(array.size for array in golden) >= 1000
    for expected, emulated, torchs in zip(golden, found, real, strict=True):
        ratio = rel_l2(emulated, expected) / rel_l2(torchs, expected)
        print(f"{name} {precision}: emulated {rel_l2(emulated, expected):.3g}, torch {rel_l2(torchs, expected):.3g}, ratio {ratio:.2f}")
        assert 0.8 < ratio < 1.25, WIDER.get((name, precision), "")


def _flags() -> set[str]:
    try:
        return set(next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split())
    except (OSError, StopIteration):
        return set()


@pytest.mark.parametrize(("precision", "flag"), [("fp16", "avx512_fp16"), ("bf16", "amx_bf16")])
@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name not in ("minilm", "mobilenetv2_uncalibrated")])
def test_drift_is_that_of_openvino_running_the_graph_as_typed(name: str, precision: str, flag: str, folder: Path, tmp_path: Path) -> None:
    if flag not in _flags():
        pytest.skip(f"this CPU has no {flag}: OpenVINO computes {precision} nodes in FP32 here and cannot judge")
    ov = pytest.importorskip("openvino")
    model = zoo.export(name, folder)
    feeds = model.feeds(NUM_SAMPLES, 5)
    output = tmp_path / "half.onnx"
    inputs = input_specs(load_model(model.path))
    done = convert(model.path, data=FeedSet((feeds,), inputs, frozenset()), precision=precision, keep_io=True, output=output)  # type: ignore[arg-type]
    with OrtRunner(model.path) as runner:
        golden = runner.infer(feeds)
    compiled = ov.Core().compile_model(output, "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
    answers = compiled(feeds)
    real = max(rel_l2(answers[i], array) for i, array in enumerate(golden.values()))
    assert 0.8 < done.drift.rel_l2 / real < 1.25

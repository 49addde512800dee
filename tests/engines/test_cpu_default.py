"""Which engine a CPU serves with: OpenVINO in BF16 where the chip has AMX, it is faster, and it passes the gates; else FP32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpdeploy.engines import openvino as ov
from mpdeploy.engines.openvino import OPENVINO
from mpdeploy.environment import cpu_flags
from mpdeploy.train_and_export import choose_engine


@pytest.mark.parametrize(
    ("flags", "takes"),
    [
        ({"avx2", "avx512f", "amx_bf16", "amx_tile"}, "bf16"),
        ({"avx2", "avx512f", "avx512_bf16", "avx512_fp16"}, "fp32"),  # half units without AMX are no faster
        ({"avx2"}, "fp32"),
        (set(), "fp32"),
    ],
)
def test_openvino_takes_bf16_only_where_the_cpu_has_amx(flags, takes, monkeypatch):
    monkeypatch.setattr(ov, "cpu_flags", lambda: frozenset(flags))
    assert OPENVINO.takes() == takes


def places(**medians: float) -> dict[str, Any]:
    return {
        "places": {
            f"engine/{name}": {"status": "measured", "latency": {"median_ms": median}}
            for name, median in medians.items()
        }
    }


def verdict(at: str, verdict: str, *, advisory: bool = False) -> Any:
    return SimpleNamespace(at=at, verdict=verdict, advisory=advisory)


@pytest.mark.parametrize(
    ("openvino_ms", "of_openvino", "chosen"),
    [
        (2.0, "pass", "openvino"),  # faster, and it passes
        (2.0, "inconclusive", "openvino"),
        (2.0, "fail", "onnxruntime"),  # faster, and BF16 lost too much
        (9.0, "pass", "onnxruntime"),  # no faster: FP32 serves
    ],
)
def test_the_engine_that_serves_is_the_fastest_that_fails_no_gate(openvino_ms, of_openvino, chosen):
    found = places(onnxruntime=6.0, openvino=openvino_ms)
    verdicts = [verdict("engine/onnxruntime", "pass"), verdict("engine/openvino", of_openvino)]
    assert choose_engine(found, verdicts) == chosen


def test_an_advisory_failure_does_not_decide_and_an_engine_that_did_not_run_is_never_chosen():
    found = places(onnxruntime=6.0, openvino=2.0)
    found["places"]["engine/tensorrt-rtx"] = {"status": "unvalidated"}
    assert choose_engine(found, [verdict("engine/openvino", "fail", advisory=True)]) == "openvino"
    assert choose_engine({"places": {}}, []) is None


@pytest.mark.slow
@pytest.mark.skipif("amx_bf16" not in cpu_flags(), reason="this CPU has no AMX-BF16")
@pytest.mark.parametrize("name", ["resnet50", "bert"])
def test_bf16_in_openvino_is_at_least_3_times_as_fast_as_onnx_runtime_in_fp32(name, tmp_path):
    from mpdeploy.building import build
    from mpdeploy.comparison import bench
    from mpdeploy.conversion import convert
    from mpdeploy.measure.latency import LatencyReport

    model, feeds = exported(name, tmp_path)
    np.savez(tmp_path / "data.npz", **feeds)
    convert(model, precision="bf16", keep_io=True, output=tmp_path / "bf16.onnx")
    _, audit = build(tmp_path / "bf16.onnx", "openvino", tmp_path / "engine", data=str(tmp_path / "data.npz"))
    assert audit.realised
    assert audit.count_by_precision()["bf16"] > audit.count_by_precision().get("fp32", 0)
    report = bench(model, tmp_path / "engine", data=str(tmp_path / "data.npz"), num_samples=100)
    assert isinstance(report, LatencyReport)
    low, high = report.ratio.bounds
    assert high < 1 / 3, f"ratio {report.ratio.ratio:.3f} [{low:.3f}, {high:.3f}]"


def exported(name: str, folder: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """ResNet-50 at 224x224, or BERT base's shape with 4 layers, random weights: (model, one feed)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    if name == "resnet50":
        net = transformers.ResNetForImageClassification(transformers.ResNetConfig())
        feeds: dict[str, np.ndarray] = {"pixel_values": rng.normal(size=(4, 3, 224, 224)).astype(np.float32)}
    else:
        config = transformers.BertConfig(num_hidden_layers=4, attn_implementation="eager")
        net = transformers.BertForSequenceClassification(config)
        feeds = {
            "input_ids": rng.integers(0, config.vocab_size, (8, 128)),
            "attention_mask": np.ones((8, 128), np.int64),
        }

    class Logits(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *arguments: Any) -> Any:
            return self.inner(**dict(zip(feeds, arguments, strict=True))).logits

    path = folder / f"{name}.onnx"
    torch.onnx.export(
        Logits(net).eval(), tuple(torch.from_numpy(array) for array in feeds.values()), path,
        input_names=list(feeds), output_names=["logits"], dynamo=True, opset_version=20, external_data=False, verbose=False,
    )  # fmt: skip
    return path, feeds

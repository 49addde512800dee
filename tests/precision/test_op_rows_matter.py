"""Every row of the op table matters: without it a model that needs it drifts further, or is refused by what must take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mpdeploy.conversion import convert
from mpdeploy.engines.tensorrt.library import RTX_FAMILY, library_problem
from mpdeploy.errors import ConversionError, GateFailedError
from mpdeploy.precision import op_rules
from mpdeploy.precision.formats import HalfName
from tests.precision.conformance_base import normal, parsed, weight

X = normal(3, 8, seed="x")
W = weight(8, 8)
NOISE = normal(1, 1, 64, 64, seed="noise")
GRID = (np.stack(np.meshgrid(*[np.linspace(-0.97, 0.97, 40)] * 2), -1)[None]).astype(np.float32)
REFUSED = "refused"
SCALE = 1612.5 * 2**-17  # as far from an FP16 value as can be


@dataclass(frozen=True)
class Needs:
    """A model that needs the row of an op: what goes in, and what its removal does (`REFUSED`, or it drifts `factor` times further)."""

    text: str
    feeds: Mapping[str, Any]
    weights: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 17
    precision: HalfName = "fp16"
    without: str | None = None
    by_rtx: bool = False
    keep: tuple[str, ...] = ()


def _x(body: str, **more: Any) -> Needs:
    return Needs(f"g (float[N, 8] x) => (float[N, 8] y) {{ {body} }}", {"x": X}, **more)


def _recurrent(op: str, gates: int) -> Needs:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(1, gates * 4, 8)).astype(np.float32) / 3,
        "r": rng.normal(size=(1, gates * 4, 4)).astype(np.float32) / 2,
    }
    text = f"g (float[5, 3, 8] x, int32[3] n) => (float[5, 1, 3, 4] y) {{ y = {op}<hidden_size = 4>(x, w, r, , n) }}"
    feeds = {"x": normal(5, 3, 8, seed=op), "n": np.array([5, 3, 1], np.int32)}
    return Needs(text, feeds, weights, without=REFUSED, by_rtx=True)


NEEDS: dict[str, Needs] = {
    "CumSum": Needs(
        "g (float[N, 2048] x) => (float[N, 2048] y) { h = Relu(x) c = CumSum(h, axis) y = Mul(c, k) }",
        {"x": normal(2, 2048, seed="sum")},
        {"axis": np.int64(1), "k": np.float32(0.01)},
        precision="bf16",
    ),
    "LogSoftmax": _x("h = MatMul(x, w) g = Mul(h, k) y = LogSoftmax(g)", weights={"w": W, "k": np.float32(20)}),
    "Resize": Needs(
        """g (float[N, 2, 4, 4] x) => (float[N, C, H, V] y) { h = Relu(x)
        y = Resize<mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize">(h, roi, s) }""",
        {"x": normal(1, 2, 4, 4, seed="image")},
        {"roi": np.array([0, 0, 0.2, 0.2, 1, 1, 0.8, 0.8], np.float32), "s": np.array([1, 1, 2, 2], np.float32)},
        opset=11,
    ),
    "RandomNormal": _x(
        "r = RandomNormal<seed = 1.0, shape = [3, 8]>() h = MatMul(x, w) y = Add(h, r)", weights={"w": W}, without=REFUSED
    ),
    "RandomUniform": _x(
        "r = RandomUniform<seed = 1.0, shape = [3, 8]>() h = MatMul(x, w) y = Add(h, r)", weights={"w": W}, without=REFUSED
    ),
    **{
        f"Random{kind}Like": _x(
            f"h = MatMul(x, w) r = Random{kind}Like<seed = 1.0>(h) y = Add(h, r)",
            weights={"w": W}, precision="bf16", without=REFUSED, by_rtx=True,
        )
        for kind in ("Normal", "Uniform")
    },
    "QuantizeLinear": Needs(
        """g (float[N, 64] x) => (float[N, 64] y) { h = Relu(x)
        q = QuantizeLinear(h, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w) }""",
        {"x": normal(128, 64, seed="quantised").astype(np.float16).astype(np.float32)},
        {"w": weight(64, 64), "s": np.float32(SCALE), "z": np.int8(0)},
        opset=21,
    ),
    "DequantizeLinear": Needs(
        """g (float[N, 64] x) => (float[N, 1] y) { h = MatMul(x, w) q = QuantizeLinear(h, s, z)
        d = DequantizeLinear(q, s, z) e = Relu(d) y = ReduceSum<keepdims = 1>(e, axis) }""",
        {"x": normal(128, 64, seed="quantised")},
        {"w": weight(64, 64), "s": np.float32(SCALE), "z": np.int8(0), "axis": np.array([1])},
        opset=21,
        keep=("op:ReduceSum",),
    ),
    "RoiAlign": Needs(
        """g (float[1, 1, 256, 256] x, float[R, 4] rois, int64[R] i) => (float[R, 1, 4, 4] y) {
        h = Relu(x)
        y = RoiAlign<output_height = 4, output_width = 4, sampling_ratio = 2, spatial_scale = 0.0625>(h, rois, i) }""",
        {
            "x": normal(1, 1, 256, 256, seed="map"),
            "rois": np.array([[2101, 3003, 2407, 3301], [3501, 2051, 4003, 2603]], np.float32),
            "i": np.zeros(2, np.int64),
        },
    ),
    "GridSample": Needs(
        'g (float[N, 1, 64, 64] x, float[N, 40, 40, 2] q) => (float[N, 1, 40, 40] y) { h = Relu(x) y = GridSample(h, q) }',
        {"x": NOISE, "q": GRID},
    ),
    "EyeLike": _x("h = MatMul(x, w) e = EyeLike<dtype = 1>(i) y = MatMul(h, e)",
                  weights={"w": W, "i": np.zeros((8, 8), np.int64)}, without=REFUSED),
    "LSTM": _recurrent("LSTM", 4),
    "GRU": _recurrent("GRU", 3),
    "RNN": _recurrent("RNN", 1),
    **{
        f"{kind}Window": Needs(
            f"g (float[N, 8] x) => (float[N, 8] y) {{ k = {kind}Window(n) h = MatMul(x, w) y = Mul(h, k) }}",
            {"x": X}, {"w": W, "n": np.int64(8)}, without=REFUSED, by_rtx=True,
        )
        for kind in ("Blackman", "Hamming", "Hann")
    },
    "MeanVarianceNormalization": Needs(
        "g (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y) { h = Tanh(x) y = MeanVarianceNormalization(h) }",
        {"x": normal(3, 2, 4, 4, seed="mvn")}, without=REFUSED,
    ),
    "HardSwish": _x("h = MatMul(x, w) y = HardSwish(h)", weights={"w": W}, precision="bf16", without=REFUSED, by_rtx=True),
    "LpNormalization": _x("h = MatMul(x, w) y = LpNormalization(h)", weights={"w": W}, precision="bf16",
                          without=REFUSED, by_rtx=True),
    "LpPool": Needs(
        "g (float[N, 1, 64, 64] x) => (float[N, 1, 32, 32] y) { h = Sigmoid(x) y = LpPool<kernel_shape = [2, 2], strides = [2, 2]>(h) }",
        {"x": NOISE}, precision="bf16", without=REFUSED, by_rtx=True,
    ),
    "Mish": _x("h = MatMul(x, w) y = Mish(h)", weights={"w": W}, opset=20, precision="bf16", without=REFUSED, by_rtx=True),
    "MelWeightMatrix": Needs(
        """g (float[N, 17] x) => (float[N, 8] y) { m = MelWeightMatrix(bins, length, rate, low, high) y = MatMul(x, m) }""",
        {"x": normal(3, 17, seed="mel")},
        {"bins": np.int64(8), "length": np.int64(32), "rate": np.int64(16000), "low": np.float32(0), "high": np.float32(8000)},
        without=REFUSED,
    ),
}  # fmt: skip


def _outcome(needs: Needs, folder: Path) -> float | str:
    """The emulated drift, or what refused the model."""
    model = parsed(needs.text, needs.opset, {name: np.asarray(value) for name, value in needs.weights.items()})
    path = folder / "model.onnx"
    onnx.save(model, path)
    np.savez(folder / "feeds.npz", **needs.feeds)
    try:
        done = convert(
            path,
            data=str(folder / "feeds.npz"),
            keep_io=True,
            keep=needs.keep,
            precision=needs.precision,
            output=folder / "out.onnx",
        )
    except ConversionError:
        return REFUSED
    except GateFailedError:
        return 1.0
    assert done.drift is not None
    return done.drift.rel_l2


def test_every_row_has_a_model_that_needs_it() -> None:
    assert [rule.op for rule in op_rules.OP_RULES] == list(NEEDS)


@pytest.mark.parametrize("op", NEEDS)
def test_without_its_row_a_model_drifts_further_or_is_refused(
    op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = NEEDS[op]
    if needs.by_rtx and library_problem(RTX_FAMILY) is not None:
        pytest.skip("TensorRT-RTX's parser is not installed")
    with_it = _outcome(needs, tmp_path)
    assert isinstance(with_it, float)
    assert with_it < 2e-2
    monkeypatch.delitem(op_rules.RULE_OF_OP, op)
    without = _outcome(needs, tmp_path)
    if needs.without == REFUSED:
        assert without == REFUSED
    else:
        assert isinstance(without, float)
        assert without > 1.3 * with_it + 1e-5, (with_it, without)

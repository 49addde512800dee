"""Sums inside matrix products and convolutions: as large as numpy finds them, and kept FP32 where half cannot hold them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mpdeploy.conversion import convert
from mpdeploy.data_files import FeedSet
from mpdeploy.emulated_runs import measure_ranges
from mpdeploy.precision.dot_products import DOT_PRODUCTS
from mpdeploy.precision.emulate import emulate
from mpdeploy.precision.model_io import input_specs, load_model
from mpdeploy.precision.ranges import Ranges
from mpdeploy.precision.rewrite import prepare
from tests.precision.conformance_base import normal
from tests.precision.visible import BF16, FP16, graph, named, run

LOUD = 300.0
K = 512
SIGNS = np.where(np.arange(K) % 2, 1.0, -1.0).astype(np.float32)


def feed_set(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> FeedSet:
    return FeedSet((feeds,), input_specs(model), frozenset())


def sums_of(model: ir.Model, feeds: Mapping[str, np.ndarray], folder: Path, half=FP16) -> Ranges:
    return measure_ranges(prepare(model, half), feed_set(model, feeds), folder, half)


def largest(terms: np.ndarray) -> float:
    """Of terms [..., K] of sums over the last axis: the largest magnitude that adding them in any order can pass through."""
    terms = terms.astype(np.float64)
    return float(np.maximum(terms.clip(min=0).sum(-1), -terms.clip(max=0).sum(-1)).max())


X, W, B = LOUD * normal(3, K, seed="dots"), normal(K, 4, seed="dw"), normal(4, seed="db", scale=1e4)
V, U = normal(3, seed="dv") * 100, LOUD * normal(2, 3, K, seed="du")


def _case(op: str) -> tuple[str, dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Text, weights, feeds and the terms of every sum."""
    if op == "MatMul":
        return "(float[N, 512] x) => (float[N, 4] y) { y = MatMul(x, w) }", {"w": W}, {"x": X}, X[:, None] * W.T
    if op == "batched MatMul":
        text = "(float[N, 3, 512] x, float[N, 512, 3] z) => (float[N, 3, 3] y) { y = MatMul(x, z) }"
        z = np.swapaxes(U, 1, 2) / LOUD
        return text, {}, {"x": U, "z": z}, U[:, :, None] * np.swapaxes(z, 1, 2)[:, None]
    if op == "Gemm":
        text = "(float[N, 512] x) => (float[N, 4] y) { y = Gemm<alpha = -0.5, beta = -2.0, transB = 1>(x, w, b) }"
        products = -0.5 * X[:, None] * W.T
        bias = np.broadcast_to(-2 * B[:, None], (*products.shape[:2], 1))
        return text, {"w": np.ascontiguousarray(W.T), "b": B}, {"x": X}, np.concatenate([products, bias], -1)
    if op == "Conv":
        text = "(float[N, 512, 1] x) => (float[N, 4, 1] y) { y = Conv(x, w, b) }"
        products = X[:, None] * W.T
        bias = np.broadcast_to(B[:, None], (*products.shape[:2], 1))
        weights = {"w": np.ascontiguousarray(W.T)[..., None], "b": B}
        return text, weights, {"x": X[..., None]}, np.concatenate([products, bias], -1)
    if op == "grouped Conv":
        text = "(float[N, 512, 1] x) => (float[N, 4, 1] y) { y = Conv<group = 2>(x, w) }"
        kernel = np.ascontiguousarray(W.T)[:, : K // 2]
        parts = np.repeat(X.reshape(3, 2, K // 2), 2, axis=1)
        return text, {"w": kernel[..., None]}, {"x": X[..., None]}, parts * kernel
    if op == "ConvTranspose":
        text = "(float[N, 512, 1] x) => (float[N, 4, 1] y) { y = ConvTranspose(x, w) }"
        return text, {"w": W[..., None]}, {"x": X[..., None]}, X[:, None] * W.T
    assert op == "Einsum of three"
    text = '(float[N, 512] x, float[N] v) => (float[N, 4] y) { y = Einsum<equation = "nk,km,n->nm">(x, w, v) }'
    return text, {"w": W}, {"x": X, "v": V}, X[:, None] * W.T * V[:, None, None]


CASES = ("MatMul", "batched MatMul", "Gemm", "Conv", "grouped Conv", "ConvTranspose", "Einsum of three")


def test_every_kind_of_dot_product_has_a_case() -> None:
    assert {name for case in CASES for name in case.split()} >= DOT_PRODUCTS


@pytest.mark.parametrize("op", CASES)
def test_the_largest_sum_is_that_of_the_terms(op: str, tmp_path: Path) -> None:
    text, weights, feeds, terms = _case(op)
    ranges = sums_of(graph(f"g {text}", **weights), feeds, tmp_path)
    np.testing.assert_allclose(ranges.sums["y"].amax, largest(terms), rtol=1e-5)
    assert ranges.sums["y"].amax >= ranges.tensors["y"].amax * (1 - 1e-6)


def test_where_the_largest_values_in_every_term_would_fit_nothing_is_measured(tmp_path: Path) -> None:
    quiet = {"x": (X / np.abs(X).max()).astype(np.float32)}
    assert (
        sums_of(graph("g (float[N, 512] x) => (float[N, 4] y) { y = MatMul(x, w) }", w=W), quiet, tmp_path).sums == {}
    )


def test_in_bf16_nothing_is_measured(tmp_path: Path) -> None:
    model = graph("g (float[N, 512] x) => (float[N, 4] y) { y = MatMul(x, w) }", 22, w=W)
    assert sums_of(model, {"x": X}, tmp_path, BF16).sums == {}


# Terms near 200 that cancel, 512 of them: sums of 51,000 on the way, x1.25 and more for the tail, and nothing of it in the answer.
CANCELS = "g (float[N, 512] x) => (float[N, 4] y) { h = MatMul(x, w)  y = Tanh(h) }"
BASE = np.full((8, K), 200.0, np.float32) + normal(8, K, seed="noise", scale=0.05)
KERNEL = np.repeat(SIGNS[:, None], 4, axis=1)


def test_terms_that_build_up_before_they_cancel_keep_the_product_fp32(tmp_path: Path) -> None:
    model = named(graph(CANCELS, w=KERNEL))
    ir.save(model, tmp_path / "m.onnx")
    feeds = feed_set(model, {"x": BASE})
    (expected,) = run(model, {"x": BASE})
    assert np.abs(expected).max() <= 1

    with_it = convert(tmp_path / "m.onnx", data=feeds, keep_io=True, output=tmp_path / "with.onnx")
    assert any("sums build up to" in reason.text for reason in with_it.plan.kept["h"])
    without = convert(
        tmp_path / "m.onnx", data=feeds, keep_io=True, disabled_rules=["long-dot-product", "cancellation"],
        output=tmp_path / "without.onnx", max_drift=10.0,
    )  # fmt: skip
    assert "h" not in without.plan.kept


def test_a_product_is_lost_where_its_sums_are_held_in_half() -> None:
    x = BASE[:1] * 2  # 102,400 on the way
    model = named(graph(CANCELS, w=KERNEL))
    from tests.precision.visible import converted

    half = converted(model)
    assert half.plan.kept == {}
    assert np.isfinite(run(emulate(half.model), {"x": x})[0]).all()
    assert np.isnan(run(emulate(half.model, half_sums=True), {"x": x})[0]).all()


@pytest.mark.slow
def test_without_fp32_products_a_spectrogram_front_end_is_lost_on_an_engine_that_sums_in_half(
    tmp_path: Path,
) -> None:
    """Kaldi's features take samples as 16-bit integers; speech models carry them along as a convolution with a Fourier basis."""
    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from mpdeploy.emulated_runs import emulated_runner
    from mpdeploy.export.to_onnx import export_onnx

    torch.manual_seed(0)
    encoder = WhisperEncoder(
        WhisperConfig(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=16, max_source_positions=32)
    ).eval()  # fmt: skip
    time, bands = torch.arange(400) / 16000, torch.linspace(200, 4000, 16)
    window = torch.hann_window(400, periodic=False)

    class Speech(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            angles = 2 * torch.pi * bands[:, None] * time
            self.register_buffer("basis", torch.cat([angles.cos(), angles.sin()])[:, None] * window)

        def forward(self, samples: torch.Tensor) -> torch.Tensor:
            real, imaginary = torch.nn.functional.conv1d(samples, self.basis, stride=160, padding=200).chunk(2, 1)
            loudness = torch.log10(((real / 1000) ** 2 + (imaginary / 1000) ** 2).clamp(min=1e-3))
            return encoder(loudness[..., :64]).last_hidden_state

    hum = 2000 * np.sin(
        2 * np.pi * 50 * np.arange(10320) / 16000
    )  # the mains: below the lowest band, and louder than speech
    speech = 100 * np.random.default_rng(0).standard_normal((4, 1, 10320)) + hum
    samples = {"samples": speech.astype(np.float32)}
    path = tmp_path / "speech.onnx"
    export_onnx(Speech().eval(), samples, path, opset=20, output_names=["state"])
    feeds = feed_set(load_model(path), samples)
    lost = {}
    for disabled in ((), ("long-dot-product",)):
        done = convert(path, data=feeds, keep_io=True, disabled_rules=disabled, output=tmp_path / "out.onnx")
        assert done.drift is not None
        print(disabled, done.drift.rel_l2, len(done.plan.kept))
        assert done.drift.rel_l2 < 2e-2, "an engine that sums in FP32 loses nothing either way"
        with emulated_runner(load_model(tmp_path / "out.onnx"), half_sums=True) as runner:
            (answer,) = runner.infer(samples).values()
        lost[disabled] = not np.isfinite(answer).all()
    assert lost == {(): False, ("long-dot-product",): True}

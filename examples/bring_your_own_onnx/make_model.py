"""Make a model as it could come from anywhere, and samples for it: model.onnx, calib.npz and test.npz in this folder.

A small classifier that normalises its features by their root mean square. Nothing is wrong with it in FP32: the squares reach
250,000, which FP16 (largest value 65,504) cannot hold.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
classifier (float[batch, 64] features) => (float[batch, 10] scores) {
  hidden = Gemm(features, w1, b1)
  active = Relu(hidden)
  scaled = Mul(active, scale)
  squares = Mul(scaled, scaled)
  mean = ReduceMean<axes = [1]>(squares)
  guarded = Add(mean, epsilon)
  rms = Sqrt(guarded)
  normalised = Div(scaled, rms)
  scores = Gemm(normalised, w2, b2)
}
"""


def main() -> None:
    """Write the files."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((64, 128)) / 8,
        "b1": rng.standard_normal(128) * 0.1,
        "scale": np.array(120.0),
        "epsilon": np.array(1e-6),
        "w2": rng.standard_normal((128, 10)) / 11,
        "b2": rng.standard_normal(10) * 0.1,
    }
    model = onnx.parser.parse_model(TEXT)
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
    for node in model.graph.node:
        node.name = f"/classifier/{node.output[0]}"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, Path("model.onnx"))
    np.savez("calib.npz", features=rng.standard_normal((256, 64)).astype(np.float32))
    np.savez("test.npz", features=rng.standard_normal((256, 64)).astype(np.float32))


if __name__ == "__main__":
    main()

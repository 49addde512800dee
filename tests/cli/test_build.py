"""`mpdeploy build`, `doctor`, `inspect` and `bench` where engines' own options and their audits are concerned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from mpdeploy.engines import ENGINES, backend

TEXT = """
<ir_version: 9, opset_import: ["" : 20]>
net (float[batch, 6] x) => (float[batch, 3] y) <float[6, 4] w1, float[4] scale, float[4] shift, float[4, 3] w2>
{
    [first] h = MatMul(x, w1)
    [norm] n = LayerNormalization(h, scale, shift)
    [second] y = MatMul(n, w2)
}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    proto = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    for info in list(proto.graph.value_info):
        shape = [axis.dim_value for axis in info.type.tensor_type.shape.dim]
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), info.name)
        )
        proto.graph.value_info.remove(info)
    onnx.save(proto, path)
    return path


def document(process, code: int = 0):
    assert process.returncode == code, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize(
    ("engine", "option", "code", "said"),
    [
        ("openvino", "thraeds=1", 2, "no build option 'thraeds'"),
        ("openvino", "threads=none", 2, "The build option threads is 'none'"),
        ("onnxruntime", "threads", 2, "write it as NAME=VALUE"),
        ("tensorrt-rtx", "timing_cache=cache.bin", 2, "TensorRT-RTX has no option 'timing_cache'"),
        ("tensorrt-rtx", "strip=true", 21, "needs a GPU to build with 'strip'"),
        ("onnxruntime", "provider=cuda", 21, "CUDA provider does not load"),
    ],
)
def test_an_option_that_cannot_be_had_ends_with_its_code_before_anything_is_written(
    command, model, tmp_path, engine, option, code, said
):
    if backend(engine).available() is not None:
        pytest.skip(backend(engine).available().reason)
    if code == 21 and (backend("tensorrt-rtx").can_run() is None or backend("onnxruntime").takes() == "fp16"):
        pytest.skip("this machine has a GPU")
    process = command("build", model, "--engine", engine, "--option", option, "--output", tmp_path / "e", "--json")
    assert said in document(process, code)["error"]["message"]
    assert not (tmp_path / "e").exists()


def test_options_reach_the_engine_and_its_document(command, model, tmp_path):
    process = command(
        "build", model, "--engine", "onnxruntime", "--option", "threads=1", "--option", "spinning=off",
        "--output", tmp_path / "e", "--json",
    )  # fmt: skip
    assert document(process)["options"] == {
        "provider": "auto", "threads": 1, "inter_op_threads": None, "spinning": "off", "tf32": False,
    }  # fmt: skip


@pytest.mark.skipif(backend("tensorrt-rtx").available() is not None, reason="TensorRT-RTX is not installed")
def test_an_input_may_have_several_profiles(command, model, tmp_path):
    process = command(
        "build", model, "--engine", "tensorrt-rtx", "--profile", "x=1x6,1x6,1x6", "--profile", "x=2x6,8x6,32x6",
        "--option", "compute_capabilities=SM89", "--option", "builder_level=1", "--output", tmp_path / "e", "--json",
    )  # fmt: skip
    document(process)
    sidecar = json.loads((tmp_path / "e" / "engine.json").read_text())
    assert len(sidecar["profiles"]["x"]) == 2
    assert sidecar["options"]["compute_capabilities"] == ["SM89"]


@pytest.mark.parametrize("engine", ["openvino", "tensorrt-rtx"])
def test_the_audit_of_a_mixed_engine_names_its_kept_nodes_and_their_precision(command, model, tmp_path, engine):
    if backend(engine).available() is not None:
        pytest.skip(backend(engine).available().reason)
    half = tmp_path / "half.onnx"
    assert command("convert", model, "--keep", "norm", "--keep-io", "--output", half).returncode == 0
    built = document(command("build", half, "--engine", engine, "--output", tmp_path / "e", "--json"))
    assert (built["kept_in_half"], built["kept_unaccounted"]) == ([], [])
    found = document(command("inspect", tmp_path / "e", "--json"))
    kept = {entry["node"]: entry for entry in found["kept"]}
    assert kept["norm"]["precision"] == "fp32"
    assert kept["norm"]["reason"] == "user: kept by 'norm'"
    assert found["largest"][0]["node"] == "first"
    shown = " ".join(command("inspect", tmp_path / "e").stdout.split())
    assert "user: kept by 'norm'" in shown
    assert "largest nodes" in shown


@pytest.mark.parametrize("name", ENGINES)
def test_doctor_lists_an_engine_s_options(command, name):
    found = document(command("doctor", "--engine", name, "--json"))
    assert found["engine"] == name
    names = [row["name"] for row in found["options"]]
    assert names
    shown = command("doctor", "--engine", name).stdout
    assert all(option in shown for option in names)


def test_doctor_of_an_engine_that_does_not_exist_exits_2(command):
    assert "closest names" in document(command("doctor", "--engine", "tensort", "--json"), 2)["error"]["message"]


def test_bench_says_cpu_time_conditions_and_whether_threads_were_pinned(command, model, tmp_path):
    np.savez(tmp_path / "d.npz", x=np.ones((4, 6), np.float32))
    data = ("--data", tmp_path / "d.npz", "--samples", 20)
    side = document(command("bench", model, *data, "--no-pin", "--json"))["a"]
    assert side["cpu_ms_per_call"] > 0
    assert side["conditions"]["threads"] == {"pinned": False, "reason": "not asked for"}
    shown = " ".join(command("bench", model, *data).stdout.split())
    assert "meanwhile: " in shown
    assert "threads pinned: " in shown

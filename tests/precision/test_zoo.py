"""Every architecture of the zoo through the whole converter, and every rule shown to matter on a model."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from mpdeploy.conversion import Conversion, convert
from mpdeploy.data_files import FeedSet, load_feeds
from mpdeploy.emulated_runs import emulated_runner
from mpdeploy.engines.onnxruntime import OrtRunner
from mpdeploy.errors import GateFailedError
from mpdeploy.export.to_onnx import export_onnx
from mpdeploy.precision import op_rules, plan
from mpdeploy.precision.model_io import input_specs, load_model
from tests import zoo
from tests.precision.visible import rel_l2

NUM_SAMPLES = 32


def _feeds(path: Path, arrays: dict[str, np.ndarray], tmp_path: Path) -> FeedSet:
    np.savez(tmp_path / "x.npz", **arrays)
    return load_feeds(str(tmp_path / "x.npz"), input_specs(load_model(path)), where=path.name)


def _export(name: str, zoo_folder: Path) -> zoo.ZooModel:
    model = zoo.export(name, zoo_folder)
    if model is None:
        pytest.skip(f"the weights of {name} are not installed (package {zoo.RECIPES[name].needs_package})")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_an_architecture_converts_runs_and_is_not_lost(
    name: str, precision: str, zoo_folder: Path, tmp_path: Path
) -> None:
    """Full checker, ONNX Runtime and (where it is installed) TensorRT-RTX's parser take it; rules and ranges keep the signal."""
    model = _export(name, zoo_folder)
    output = tmp_path / "out.onnx"
    feeds = _feeds(model.path, model.feeds(NUM_SAMPLES, 0), tmp_path)
    done = convert(model.path, data=feeds, keep_io=True, precision=precision, output=output)  # type: ignore[arg-type]
    onnx.checker.check_model(output, full_check=True)
    assert done.drift.num_nonfinite == 0
    assert done.drift.rel_l2 < {"fp16": 1e-2, "bf16": 5e-2}[precision]
    assert done.counts.half_nodes > 0
    assert not any("does not parse" in warning for warning in done.warnings)
    if precision == "fp16":
        with OrtRunner(output) as runner:
            answers = runner.infer(feeds.feeds[0])
        assert all(np.isfinite(array).all() and array.dtype == np.float32 for array in answers.values())


@pytest.mark.slow
def test_the_lost_signal_is_told_named_and_not_written(zoo_folder: Path, tmp_path: Path) -> None:
    """mobilenetv2 with uncalibrated BatchNorm, all half: no peer tells."""
    model = _export("mobilenetv2_uncalibrated", zoo_folder)
    feeds = _feeds(model.path, model.feeds(NUM_SAMPLES, 0), tmp_path)
    with pytest.raises(GateFailedError, match="is lost in half precision") as raised:
        convert(model.path, data=feeds, keep_io=True, use_ranges=False, output=tmp_path / "out.onnx")
    assert raised.value.exit_code == 10
    named = [line for line in raised.value.message.splitlines() if "->" in line and "'" in line]
    assert named
    assert "--search" in str(raised.value)
    assert not (tmp_path / "out.onnx").exists()
    blind = convert(model.path, keep_io=True, output=tmp_path / "blind.onnx")
    with OrtRunner(model.path) as fp32, OrtRunner(tmp_path / "blind.onnx") as half:
        (golden,), (found,) = fp32.infer(feeds.feeds[0]).values(), half.infer(feeds.feeds[0]).values()
    assert rel_l2(found, golden) < 0.1, "the CPU provider shows nothing"
    assert blind.drift is None


# ---- every rule is shown to matter


def _drift(path: Path, feeds: FeedSet, **more: object) -> tuple[float, Conversion | None]:
    try:
        done = convert(path, data=feeds, keep_io=True, **more)  # type: ignore[arg-type]
    except GateFailedError:
        return math.inf, None
    return done.drift.rel_l2, done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_name", "rule"),
    [
        ("digits_pow_to_mean", "overflow"),
        ("digits_exp_to_sum", "overflow"),
        ("mobilenetv2_uncalibrated", "underflow"),
        ("digits_epsilon", "small-divisor"),
    ],
)
def test_without_this_rule_this_model_is_lost(model_name: str, rule: str, zoo_folder: Path, tmp_path: Path) -> None:
    if model_name.startswith("digits_"):
        digits = zoo.trained_digits_cnn(zoo_folder, model_name.removeprefix("digits_"))
        path, arrays = digits.path, digits.feeds(64)
    else:
        model = _export(model_name, zoo_folder)
        path, arrays = model.path, model.feeds(NUM_SAMPLES, 0)
    feeds = _feeds(path, arrays, tmp_path)
    with_it, done = _drift(path, feeds)
    without, _ = _drift(path, feeds, disabled_rules=[rule])
    assert with_it < 1e-2
    assert done.plan.kept
    assert without > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_without_fp32_angles_the_rotary_embedding_of_a_long_text_is_another(
    precision: str, zoo_folder: Path, tmp_path: Path
) -> None:
    model = _export("llama", zoo_folder)
    rng = np.random.default_rng(0)
    arrays = {"input_ids": rng.integers(3, 100, (4, 640)), "attention_mask": np.ones((4, 640), np.int64)}
    feeds = _feeds(model.path, arrays, tmp_path)
    with_it, done = _drift(model.path, feeds, precision=precision)
    assert any("rounding moves it by" in str(reasons) for reasons in done.plan.kept.values())
    without, _ = _drift(model.path, feeds, precision=precision, disabled_rules=["large-angle"])
    assert without > 2.5 * with_it


@pytest.mark.slow
def test_without_an_fp32_difference_a_trained_cnn_loses_what_its_camera_saw(zoo_folder: Path, tmp_path: Path) -> None:
    """A sensor whose dark level is 3000, taken off by the model's first node: what is left is a thousandth of what goes in."""
    digits = zoo.trained_digits_cnn(zoo_folder, "none")
    model = onnx.load(digits.path)
    name = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["centred" if taken == name else taken for taken in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(3000), "dark"))
    model.graph.node.insert(0, onnx.helper.make_node("Sub", [name, "dark"], ["centred"], name="subtract_dark"))
    path = tmp_path / "camera.onnx"
    onnx.save(model, path)
    feeds = _feeds(path, {key: array + np.float32(3000) for key, array in digits.feeds(64).items()}, tmp_path)
    with_it, done = _drift(path, feeds)
    assert list(done.plan.kept) == ["subtract_dark"]
    assert with_it < 1e-2
    assert _drift(path, feeds, disabled_rules=["cancellation"])[0] > 0.5


@pytest.mark.slow
def test_without_fp32_sums_a_global_mean_is_lost_on_an_engine_that_sums_in_half(tmp_path: Path) -> None:
    """A ResNet's last pooling over 96 x 96 positions of strong activations: the mean is 40, its sum 370,000."""
    import torch
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    net = ResNetModel(ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")).eval()

    class Loud(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return (net(images).last_hidden_state * 40).mean((2, 3))

    images = np.random.default_rng(0).standard_normal((4, 3, 768, 768)).astype(np.float32)
    path = tmp_path / "loud.onnx"
    export_onnx(Loud().eval(), {"images": images}, path, opset=20, output_names=["pooled"])
    feeds = _feeds(path, {"images": images}, tmp_path)
    lost = {}
    for disabled in ((), ("inner-sum",)):
        done = convert(path, data=feeds, keep_io=True, disabled_rules=disabled, output=tmp_path / "out.onnx")
        assert done.drift.rel_l2 < 1e-2, "an engine that sums in FP32 loses nothing either way"
        with emulated_runner(load_model(tmp_path / "out.onnx"), half_sums=True) as runner:
            (answer,) = runner.infer(feeds.feeds[0]).values()
        lost[disabled] = not np.isfinite(answer).all()
    assert lost == {(): False, ("inner-sum",): True}


@pytest.mark.slow
def test_without_fp32_positions_the_t5_encoder_looks_up_other_buckets(
    zoo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _export("t5_encoder", zoo_folder)
    feeds = _feeds(model.path, model.feeds(NUM_SAMPLES, 0), tmp_path)
    with_it, _ = _drift(model.path, feeds, precision="bf16")
    monkeypatch.setattr(plan, "position_arithmetic", lambda index: set())
    without, _ = _drift(model.path, feeds, precision="bf16")
    assert without > 3 * with_it


@pytest.mark.slow
@pytest.mark.parametrize("trap", [trap for trap in zoo.TRAPS if trap != "none"])
def test_a_planted_trap_is_seen_and_the_labels_stay_right(trap: str, zoo_folder: Path, tmp_path: Path) -> None:
    digits = zoo.trained_digits_cnn(zoo_folder, trap)
    feeds = _feeds(digits.path, digits.feeds(), tmp_path)
    drift, done = _drift(digits.path, feeds)
    assert drift < 1e-2
    assert 0 < len(done.plan.kept) <= 6
    assert digits.float32_accuracy > 0.95


def test_op_rules_are_a_table_with_a_reason_each() -> None:
    assert all(rule.reason for rule in op_rules.OP_RULES)
    assert len(op_rules.RULE_OF_OP) == len(op_rules.OP_RULES), "one row an op"
    for rule in op_rules.OP_RULES:
        assert onnx.defs.has(rule.op), rule.op
        assert rule.keep or rule.float_inputs or rule.keep_with_input or rule.keep_in, "a row that does nothing"


# ---- large models

LARGE = """
import json, resource, sys
from pathlib import Path
import mpdeploy.conversion as conversion
import onnxruntime, onnx  # imported before the base line is taken
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
done = conversion.convert(Path(sys.argv[1]), keep_io=True, output=Path(sys.argv[2]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"base": base * 1024, "peak": peak * 1024, "half": done.counts.half_nodes, "seconds": done.seconds}))
"""


def _write_large(folder: Path, num_layers: int, width: int) -> tuple[Path, int]:
    """A chain of MatMul and Relu whose weights lie in one external file, written layer by layer."""
    from onnx import TensorProto, helper

    path, nodes, initialisers, before = folder / "large.onnx", [], [], "x"
    size = 4 * width * width
    with (folder / "large.data").open("wb") as file:
        for layer in range(num_layers):
            weight = np.random.default_rng(layer).standard_normal((width, width), np.float32) * np.float32(width**-0.5)
            file.write(weight.tobytes())
            tensor = TensorProto(name=f"w{layer}", data_type=1, dims=[width, width], data_location=TensorProto.EXTERNAL)
            for key, value in {"location": "large.data", "offset": layer * size, "length": size}.items():
                entry = tensor.external_data.add()
                entry.key, entry.value = key, str(value)
            initialisers.append(tensor)
            nodes.append(helper.make_node("MatMul", [before, f"w{layer}"], [f"h{layer}"], name=f"m{layer}"))
            nodes.append(helper.make_node("Relu", [f"h{layer}"], [f"r{layer}"], name=f"a{layer}"))
            before = f"r{layer}"
    x, y = (helper.make_tensor_value_info(name, 1, ["N", width]) for name in ("x", before))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], initialisers), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    path.write_bytes(model.SerializeToString())
    return path, num_layers * size


@pytest.mark.slow
def test_a_model_above_2_gb_is_rewritten_in_less_than_one_and_a_half_times_its_size(tmp_path: Path) -> None:
    import json

    path, size = _write_large(tmp_path, 24, 5120)
    assert size > 2.5e9
    process = subprocess.run(
        [sys.executable, "-c", LARGE, path, tmp_path / "out.onnx"],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    found = json.loads(process.stdout.splitlines()[-1])
    print(
        f"model {size / 1e9:.2f} GB, peak {found['peak'] / 1e9:.2f} GB (imports {found['base'] / 1e9:.2f}), {found['seconds']:.1f} s"
    )
    assert found["peak"] < 1.5 * size
    assert found["half"] == 48
    written = sum(file.stat().st_size for file in tmp_path.glob("out.onnx*"))
    assert 0.49 * size < written < 0.51 * size
    last = load_model(tmp_path / "out.onnx").graph.initializers["w23"].const_value.numpy()
    expected = np.random.default_rng(23).standard_normal((5120, 5120), np.float32) * np.float32(5120**-0.5)
    np.testing.assert_array_equal(last, expected.astype(np.float16))

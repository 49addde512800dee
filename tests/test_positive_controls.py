"""Broken on purpose: what naive validation calls fine must fail here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from mpdeploy.comparison import compare
from mpdeploy.conversion import convert, write_plan
from mpdeploy.engines.base import Audit, Layer
from mpdeploy.engines.openvino import OPENVINO, OpenVinoBackend
from mpdeploy.errors import GateFailedError
from mpdeploy.stages.build import _makers_of_outputs, audit_report

# In FP16, 100 * 1000 is beyond 65504; 0.01 * 1e-5 * 1e-3 is below 6e-8. In FP32 both come back.
OVERFLOWS = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[batch, 4] x) => (float[batch, 4] y)
<float up = {1000.0}>
{ large = Mul(x, up)
  y = Div(large, up) }
"""
UNDERFLOWS = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[batch, 4] x) => (float[batch, 4] y)
<float down = {0.0005}, float up = {2000.0}>
{ small = Mul(x, down)
  smaller = Mul(small, down)
  larger = Mul(smaller, up)
  y = Mul(larger, up) }
"""
LOST = {"overflow": (OVERFLOWS, 100.0), "underflow": (UNDERFLOWS, 0.01)}


@pytest.fixture(params=LOST)
def lost(request, tmp_path) -> tuple[Path, str]:
    """A model whose signal does not survive FP16, and samples that show it."""
    text, size = LOST[request.param]
    model, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    onnx.save(onnx.parser.parse_model(text), model)
    rng = np.random.default_rng(0)
    np.savez(data, x=(size * (0.8 + 0.4 * rng.random((32, 4)))).astype(np.float32))
    return model, str(data)


def forced(model: Path, folder: Path) -> Path:
    """All of it in FP16, as a converter does that looks at no ranges."""
    done = convert(model, precision="fp16", keep_io=True, output=folder / "forced.onnx", disabled_rules=())
    assert done.counts.half_nodes > 0
    return folder / "forced.onnx"


def test_naive_validation_on_the_cpu_calls_a_lost_model_fine(lost, tmp_path):
    model, data = lost
    found = compare(model, forced(model, tmp_path), data=data)
    assert found.drift.rel_l2 < 1e-2
    assert any("not to be believed" in warning for warning in found.warnings)


def test_emulation_finds_that_it_is_lost(lost, tmp_path):
    model, data = lost
    found = compare(model, forced(model, tmp_path), data=data, emulate=True)
    assert not found.drift.rel_l2 < 0.5
    assert found.warnings == ()


def test_a_conversion_that_ignores_ranges_fails_and_leaves_no_file(lost, tmp_path):
    model, data = lost
    output = tmp_path / "model.fp16.onnx"
    with pytest.raises(GateFailedError, match="Output 'y' is lost in half precision") as caught:
        convert(model, data=data, precision="fp16", keep_io=True, output=output, use_ranges=False)
    assert caught.value.exit_code == 10
    assert "These nodes did it" in caught.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "model.onnx"]


def test_a_conversion_that_looks_at_ranges_keeps_what_must_be_kept(lost, tmp_path):
    model, data = lost
    output = tmp_path / "model.fp16.onnx"
    done = convert(model, data=data, precision="fp16", keep_io=True, output=output)
    assert done.drift is not None
    assert done.drift.rel_l2 < 1e-2
    assert done.plan.kept, "every node of it would be lost in half"
    assert all(reasons for reasons in done.plan.kept.values())
    assert compare(model, output, data=data, emulate=True).drift.rel_l2 < 1e-2


def test_compare_on_the_command_line_tells_the_same_story(lost, tmp_path, monkeypatch, capsys):
    from mpdeploy.cli import common, main

    model, data = lost
    candidate = forced(model, tmp_path)

    def exit_code(*options: str) -> int:
        monkeypatch.setattr(common, "_printed", False)
        monkeypatch.setattr(
            "sys.argv",
            ["mpdeploy", "compare", str(model), str(candidate), "--data", data, "--max-drift", "0.01", *options],
        )
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert exit_code() == 0
    assert "not to be believed" in " ".join(capsys.readouterr().err.split())
    assert exit_code("--emulate") == 10


# -- the audit ---------------------------------------------------------------------------------------------------------

PLAN = {"keep": [{"node": "softmax"}, {"node": "norm"}], "half": ["conv", "gemm"]}


def audit(**precisions: str) -> Audit:
    """An engine whose layers run these nodes in these precisions."""
    return Audit(
        "runtime_model", tuple(Layer(f"layer_{node}", "Op", found, (node,)) for node, found in precisions.items())
    )


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_a_kept_node_that_runs_in_half_is_a_fault(half):
    report = audit_report(audit(softmax=half, norm="fp32", conv=half, gemm=half), PLAN)
    assert report["kept_in_half"] == ["softmax"]
    assert report["half_in_fp32"] == []


@pytest.mark.parametrize("single", ["fp32", "tf32"])
def test_a_half_node_that_runs_in_fp32_is_a_finding_and_no_fault(single):
    report = audit_report(audit(softmax="fp32", norm="fp32", conv=single, gemm="fp16"), PLAN)
    assert (report["kept_in_half"], report["half_in_fp32"]) == ([], ["conv"])


def test_an_engine_that_runs_as_planned_has_neither():
    report = audit_report(audit(softmax="fp32", norm="fp32", conv="fp16", gemm="fp16"), PLAN)
    assert (report["kept_in_half"], report["half_in_fp32"]) == ([], [])
    assert report["layers"] == {"fp32": 2, "fp16": 2}


def test_a_layer_of_several_nodes_counts_for_each():
    fused = Audit("inspector", (Layer("fused", "Op", "fp16", ("conv", "norm")),))
    assert audit_report(fused, PLAN)["kept_in_half"] == ["norm"]


def test_a_layer_that_is_named_after_the_output_it_makes_counts_for_its_node():
    report = audit_report(audit(probabilities="fp16"), PLAN, {"probabilities": "softmax", "features": "norm"})
    assert report["kept_in_half"] == ["softmax"]


def test_in_an_engine_of_the_fp32_model_no_layer_may_be_half():
    assert audit_report(audit(conv="fp32", gemm="bf16"), {})["kept_in_half"] == ["layer_gemm"]


@pytest.fixture
def kept_gemm(finished_run, tmp_path) -> tuple[Path, dict]:
    """The digits' model in FP16 with its Gemm kept, and its plan."""
    model = finished_run.path / "20-export" / "model.fp32.onnx"
    done = convert(model, keep=["op:Gemm"], precision="fp16", keep_io=True, output=tmp_path / "kept.onnx")
    write_plan(tmp_path / "plan.json", done)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [entry["op"] for entry in plan["keep"]] == ["Gemm"]
    return tmp_path / "kept.onnx", plan


def openvino_audit(model: Path, folder: Path, options: dict) -> Audit:
    from mpdeploy.building import build

    return build(model, "openvino", folder / "engine", options=options)[1]


def test_openvino_s_audit_knows_the_kept_node_by_its_name(kept_gemm, tmp_path):
    """Else a kept node that runs in half would be overlooked."""
    model, plan = kept_gemm
    named = {"keep": [], "half": [plan["keep"][0]["node"]]}
    report = audit_report(openvino_audit(model, tmp_path, {}), named, _makers_of_outputs(model))
    assert report["half_in_fp32"] == named["half"], "it was found, and runs in FP32"


@pytest.mark.parametrize("precision", ["f16", "bf16"])
def test_openvino_told_to_run_all_in_half_is_caught_by_the_audit(kept_gemm, tmp_path, precision):
    model, plan = kept_gemm
    audited = openvino_audit(model, tmp_path, {"inference_precision": precision})
    if not {"fp16", "bf16"} & audited.count_by_precision().keys():
        pytest.skip(f"OpenVINO runs no {precision} on this CPU")
    report = audit_report(audited, plan, _makers_of_outputs(model))
    assert report["kept_in_half"] == [plan["keep"][0]["node"]]
    assert report["realised"]


def test_an_engine_that_runs_a_layer_in_half_against_the_plan_fails_the_run(run_copy, monkeypatch):
    """Wherever this test runs: the audit is doctored, and what follows from it is not."""
    import mpdeploy

    as_built = OpenVinoBackend.audit

    def doctored(self, engine):
        audited = as_built(self, engine)
        first, *rest = audited.layers
        return Audit(audited.source, (Layer(first.name, first.op, "bf16", first.nodes), *rest))

    monkeypatch.setattr(OpenVinoBackend, "audit", doctored)
    pipeline = mpdeploy.load_pipeline(run_copy.parent / "tiny.py")
    result = mpdeploy.run(pipeline, run_copy, engines=["onnxruntime", "openvino"], start="40-build/openvino")
    error = result.error()
    if OPENVINO.takes() == "bf16":
        pytest.skip("here OpenVINO takes the BF16 model, of which this layer may be half")
    assert isinstance(error, GateFailedError)
    assert [(item.id, item.at) for item in result.verdicts if item.verdict == "fail" and not item.advisory] == [
        ("realised-precision", "engine/openvino")
    ]
    assert "kept_in_half on `engine/openvino`: 1 against a limit of 0: fail" in error.message
    assert result.chosen == "onnxruntime", "an engine that failed is never chosen"

"""The other verbs: the keys of their JSON documents are a contract, and wrong input is told with an exit code and a hint."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_pipeline import mpdeploy

from mpdeploy.artifact import Golden
from mpdeploy.cli import app
from mpdeploy.config import load_pipeline
from mpdeploy.engines import ENGINES
from mpdeploy.engines.tensorrt import TENSORRT, TENSORRT_RTX
from mpdeploy.run_dir import RunDir

VERBS = sorted(
    [item.name or item.callback.__name__ for item in app.registered_commands]
    + [group.name for group in app.registered_groups]
)


@pytest.fixture(scope="module")
def fp32(finished_run) -> Path:
    return finished_run.path / "20-export" / "model.fp32.onnx"


@pytest.fixture(scope="module")
def fp16(finished_run) -> Path:
    return finished_run.path / "30-convert" / "model.fp16.onnx"


@pytest.fixture(scope="module")
def data(finished_run, tmp_path_factory) -> Path:
    """32 of the run's images."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    golden = Golden.load(finished_run.path / "20-export" / "golden.npz")
    np.savez(path, **golden.dataset.take(slice(0, 32)).inputs)
    return path


def document(process: subprocess.CompletedProcess[str], code: int = 0) -> dict[str, Any]:
    """What stands on stdout: one JSON document and nothing else; none of its numbers is a bare NaN."""
    assert process.returncode == code, process.stderr
    return json.loads(process.stdout, parse_constant=lambda name: pytest.fail(f"bare {name}"))


# -- every verb --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_explains_itself(command, verb):
    process = command(verb, "--help")
    assert process.returncode == 0
    assert "Usage: " in process.stdout
    if verb != "baseline":  # a group of verbs
        assert "--json" in process.stdout


def test_a_verb_that_does_not_exist_exits_2(command):
    process = command("trian-and-export")
    assert process.returncode == 2
    assert "trian-and-export" in process.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "none.onnx"),
        ("compare", "none.onnx", "none.onnx", "--data", "none.npz"),
        ("bench", "none.onnx", "--data", "none.npz"),
        ("build", "none.onnx", "--engine", "onnxruntime", "--output", "engine"),
        ("convert", "none.onnx"),
        ("gate", "none"),
        ("report", "none"),
        ("history", "none"),
        ("baseline", "promote", "none", "--reason", "x"),
        ("train-and-export", "none.py"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_file_that_is_not_there_exits_2_with_one_json_document(command, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    process = command(*arguments, "--json")
    error = document(process, code=2)["error"]
    assert error["exit_code"] == 2
    assert "none" in error["message"]
    assert "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bug_of_ours_exits_1_and_asks_for_a_report(command, monkeypatch):
    from mpdeploy import doctor

    monkeypatch.setattr(doctor, "examine", lambda: {}["oops"])
    process = command("doctor", "--json")
    assert document(process, 1)["error"]["exit_code"] == 1
    assert "KeyError: 'oops'" in process.stderr
    assert "this is a bug in mpdeploy; please report it" in process.stderr
    assert "Traceback" in process.stderr


def test_python_m_mpdeploy_is_the_same_as_mpdeploy():
    process = mpdeploy("--help")
    assert process.returncode == 0
    assert all(verb in process.stdout for verb in VERBS)


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_of_a_model_counts_precisions_by_op(command, fp32, fp16):
    before, after = (document(command("inspect", path, "--json")) for path in (fp32, fp16))
    assert before["ops"]["Conv"] == {"float32": 1}
    assert after["ops"]["Conv"] == {"float16": 1}
    assert (before["precision"], before["casts"], before["kept"], before["half_nodes"]) == ("fp32", 0, [], 0)
    assert (after["precision"], after["casts"]) == ("fp16", 2), "one cast in, one out: inputs and outputs stay FP32"
    assert after["weight_bytes"] < 0.6 * before["weight_bytes"]


def test_inspect_names_the_kept_nodes_and_why(command, fp32, tmp_path):
    assert command("convert", fp32, "--keep", "op:Gemm", "--output", tmp_path / "m.onnx").returncode == 0
    kept = document(command("inspect", tmp_path / "m.onnx", "--json"))["kept"]
    assert [(entry["op"], entry["reason"]) for entry in kept] == [("Gemm", "user: kept by 'op:Gemm'")]
    assert "op:Gemm" in command("inspect", tmp_path / "m.onnx").stdout


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_inspect_of_an_engine_says_what_really_runs_and_where_from(command, finished_run, engine):
    folder = finished_run.path / "40-build" / engine
    found = document(command("inspect", folder, "--json"))
    assert (found["kind"], found["source"], found["realised"]) == (engine, "runtime_model", True)
    assert found["layers"].keys() == {"fp32"}
    assert {"ops", "casts", "kept"} <= found.keys()
    assert "(what really runs)" in " ".join(command("inspect", folder).stdout.split())


# -- compare -----------------------------------------------------------------------------------------------------------

DRIFT_KEYS = {"rel_l2", "max_abs", "cosine", "num_nonfinite"}


def test_compare_of_a_model_with_itself_finds_no_drift(command, fp32, data):
    found = document(command("compare", fp32, fp32, "--data", data, "--json"))
    assert found["outputs"]["logits"].keys() >= DRIFT_KEYS
    assert (found["outputs"]["logits"]["rel_l2"], found["outputs"]["logits"]["max_abs"]) == (0.0, 0.0)
    assert (found["num_samples"], found["warnings"]) == (32, [])


def test_compare_of_a_half_model_without_emulation_warns_that_the_number_is_blind(command, fp32, fp16, data):
    process = command("compare", fp32, fp16, "--data", data, "--json")
    assert "not to be believed; use --emulate" in " ".join(process.stderr.split())
    assert any("--emulate" in warning for warning in document(process)["warnings"])


def test_compare_with_emulation_does_not_warn_and_finds_the_rounding(command, fp32, fp16, data):
    process = command("compare", fp32, fp16, "--data", data, "--emulate", "--json")
    assert "warning" not in process.stderr
    found = document(process)
    assert found["warnings"] == []
    assert 1e-5 < found["outputs"]["logits"]["rel_l2"] < 1e-2


def test_compare_takes_engines(command, finished_run, fp32, data):
    found = document(command("compare", fp32, finished_run.path / "40-build" / "openvino", "--data", data, "--json"))
    assert found["num_samples"] == 32
    assert found["outputs"]["logits"]["rel_l2"] < 1e-5


@pytest.mark.parametrize(("limit", "code"), [("1e-9", 10), ("0.5", 0)])
def test_compare_above_max_drift_exits_10_and_still_prints_the_numbers(command, fp32, fp16, data, limit, code):
    process = command("compare", fp32, fp16, "--data", data, "--emulate", "--max-drift", limit, "--json")
    assert document(process, code)["outputs"]["logits"]["rel_l2"] > 1e-5
    assert ("is above the limit 1e-09" in process.stderr) == (code == 10)


def test_emulation_of_an_engine_is_refused(command, finished_run, fp32, data):
    process = command(
        "compare", fp32, finished_run.path / "40-build" / "openvino", "--data", data, "--emulate", "--json"
    )
    assert "--emulate wants an ONNX file" in document(process, 2)["error"]["message"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imgae": np.zeros((2, 1, 8, 8), np.float32)}, "no input named 'imgae'"),
        ({"image": np.zeros((2, 1, 9, 8), np.float32)}, "the shapes do not fit"),
        ({"image": np.full((2, 1, 8, 8), np.nan, np.float32)}, "holds NaN, first in sample 0"),
        ({"image": np.zeros((0, 1, 8, 8), np.float32)}, "holds no samples"),
    ],
)
def test_data_that_does_not_fit_exits_2(command, fp32, tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    process = command("compare", fp32, fp32, "--data", tmp_path / "d.npz", "--json")
    assert message in document(process, 2)["error"]["message"]


# -- bench -------------------------------------------------------------------------------------------------------------

SIDE_KEYS = {"median_ms", "p99_ms", "num_samples", "includes"}


def test_bench_of_one_says_what_its_numbers_include(command, fp32, data):
    found = document(command("bench", fp32, "--data", data, "--samples", 20, "--json"))
    assert found["a"].keys() >= SIDE_KEYS
    assert found["a"]["median_ms"] > 0
    assert found["a"]["num_samples"] == 20
    assert found["a"]["p99_ms"] is None, "20 samples have no p99"
    assert (found["b"], found["ratio"]) == (None, None)


def test_bench_of_two_gives_a_ratio_with_its_interval(command, finished_run, fp32, data):
    engine = finished_run.path / "40-build" / "onnxruntime"
    found = document(command("bench", fp32, engine, "--data", data, "--samples", 40, "--json"))
    assert found["b"].keys() >= SIDE_KEYS
    low, high = found["ratio"]["interval"]
    assert low <= found["ratio"]["median"] <= high
    assert 0.2 < found["ratio"]["median"] < 5, "the same model in the same runtime"


# -- build -------------------------------------------------------------------------------------------------------------

BUILD_KEYS = {"engine", "path", "bytes", "precision", "sha256", "source", "realised", "layers"}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_build_writes_an_engine_that_can_be_compared_afterwards(command, fp32, data, tmp_path, engine):
    found = document(command("build", fp32, "--engine", engine, "--output", tmp_path / "engine", "--json"))
    assert found.keys() >= BUILD_KEYS
    assert (found["engine"], found["precision"], found["realised"]) == (engine, "fp32", True)
    drift = document(command("compare", fp32, found["path"], "--data", data, "--json"))["outputs"]["logits"]["rel_l2"]
    assert drift < 1e-5


@pytest.mark.skipif(TENSORRT_RTX.available() is not None, reason="TensorRT-RTX is not installed")
def test_build_of_a_plan_without_a_gpu_repeats_the_network_and_says_so(command, fp16, data, tmp_path):
    found = document(command("build", fp16, "--engine", "tensorrt-rtx", "--output", tmp_path / "engine", "--json"))
    if TENSORRT_RTX.can_run() is not None:
        assert (found["source"], found["realised"]) == ("network", False)
        process = command("compare", fp16, found["path"], "--data", data, "--json")
        assert "cannot run here" in document(process, 21)["error"]["message"]
    assert "fp16" in found["layers"]


@pytest.mark.skipif(TENSORRT.available() is None, reason="TensorRT is here: asking for it is no error")
def test_build_with_an_engine_that_is_missing_exits_21_with_the_reason(command, fp32, tmp_path):
    process = command("build", fp32, "--engine", "tensorrt", "--output", tmp_path / "engine", "--json")
    assert "The engine 'tensorrt' is not available" in document(process, 21)["error"]["message"]
    assert "hint:" in process.stderr
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "tensort"), "closest names: tensorrt"),
        (("--engine", "openvino", "--profile", "imag=1,2,3"), "closest names: image"),
        (("--engine", "openvino", "--profile", "image=1,2,3"), "expected three shapes of 4 axes each"),
        (("--engine", "openvino", "--profile", "image=8x1x8x8,1x1x8x8,9x1x8x8"), "shapes must rise"),
        (("--engine", "openvino", "--profile", "image=1x1x9x8,1x1x9x8,1x1x9x8"), "fixed axes must be those of"),
    ],
)
def test_build_with_wrong_options_exits_2(command, fp32, tmp_path, options, message):
    process = command("build", fp32, "--output", tmp_path / "engine", "--json", *options)
    assert message in document(process, 2)["error"]["message"]


def test_an_engine_that_was_changed_is_never_loaded(command, finished_run, fp32, data, tmp_path):
    shutil.copytree(finished_run.path / "40-build" / "onnxruntime", tmp_path / "engine")
    with (tmp_path / "engine" / "engine.onnx").open("ab") as file:
        file.write(b"\0")
    process = command("compare", fp32, tmp_path / "engine", "--data", data, "--json")
    assert "is not the engine that" in document(process, 2)["error"]["message"]


# -- convert -----------------------------------------------------------------------------------------------------------

CONVERT_KEYS = {"output", "nodes", "half_nodes", "kept", "casts", "drift", "evaluations", "seconds"}


def test_convert_with_data_measures_its_drift(command, fp32, data, tmp_path):
    process = command("convert", fp32, "--data", data, "--output", tmp_path / "m.onnx", "--json")
    found = document(process)
    assert found.keys() >= CONVERT_KEYS
    assert found["output"] == str(tmp_path / "m.onnx")
    assert found["drift"]["logits"].keys() >= DRIFT_KEYS
    assert 0 < found["drift"]["logits"]["rel_l2"] < 1e-2
    assert 0 < found["half_nodes"] <= found["nodes"]
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)


def test_convert_without_data_warns_and_says_null(command, fp32, tmp_path):
    process = command("convert", fp32, "--output", tmp_path / "m.onnx", "--json")
    assert document(process)["drift"] is None
    assert "no --data" in process.stderr


def test_convert_above_max_drift_exits_10_and_leaves_no_file(command, fp32, data, tmp_path):
    output = tmp_path / "m.onnx"
    process = command("convert", fp32, "--data", data, "--max-drift", "1e-9", "--output", output, "--json")
    assert "the limit is 1e-09. Nothing was written." in document(process, 10)["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_convert_writes_beside_the_model_by_default(command, fp32, tmp_path):
    shutil.copy(fp32, tmp_path / "model.onnx")
    assert document(command("convert", tmp_path / "model.onnx", "--json"))["output"] == str(
        tmp_path / "model.fp16.onnx"
    )


def test_convert_into_a_run_keeps_model_plan_and_record(command, fp32, data, tmp_path):
    run = tmp_path / "run"
    assert command("convert", fp32, "--data", data, "--run", run, "--json").returncode == 0
    record = RunDir.open(run).record("30-convert")
    assert record is not None
    assert (record.status, set(record.artifacts)) == ("done", {"fp16", "plan.fp16"})
    assert all(item.verified() for item in record.artifacts.values())


def test_convert_into_a_foreign_folder_is_refused_before_anything_is_written(command, fp32, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    process = command("convert", fp32, "--run", tmp_path, "--json")
    assert "is not empty and holds no run.json: thesis.tex" in document(process, 2)["error"]["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "fp8"), "there is no such half precision"),
        (("--keep", "head/*"), "matches no node"),
        (("--keep-io-name", "logit"), "closest names: logits"),
        (("--max-drift", "0.1"), "--max-drift needs --data"),
    ],
)
def test_convert_with_wrong_options_exits_2_and_leaves_no_file(command, fp32, tmp_path, options, message):
    process = command("convert", fp32, "--output", tmp_path / "m.onnx", "--json", *options)
    assert message in document(process, 2)["error"]["message"]
    assert list(tmp_path.iterdir()) == []


# -- gate, report, history, baseline -----------------------------------------------------------------------------------


def test_gate_from_a_copy_of_the_evidence_gives_the_same_bytes(finished_run, tmp_path):
    """`evidence/` and `run.json` alone are enough: no model, no engine."""
    copy = tmp_path / "elsewhere" / "run"
    copy.mkdir(parents=True)
    shutil.copytree(finished_run.path / "evidence", copy / "evidence")
    shutil.copy(finished_run.path / "run.json", copy)
    process = mpdeploy("gate", copy, "--json")
    written = (finished_run.path / "gate.json").read_bytes()
    assert (copy / "gate.json").read_bytes() == written
    assert document(process) == json.loads(written)


def test_gate_loads_neither_a_model_nor_an_engine(finished_run, tmp_path):
    import sys

    shutil.copytree(finished_run.path, tmp_path / "run")
    code = (
        f"import sys; sys.argv = ['mpdeploy', 'gate', {str(tmp_path / 'run')!r}]\n"
        "from mpdeploy.cli import main\ntry:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "print(' '.join(sys.modules), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "onnxruntime", "openvino", "tensorrt_rtx_bindings", "onnx"} & set(process.stderr.split())


@pytest.mark.parametrize("damage", ["index.json", "engine-openvino.npz"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_evidence_that_is_not_what_was_measured_exits_12(command, run_copy, damage, how):
    path = run_copy / "evidence" / damage
    path.write_bytes(path.read_bytes() + b" ") if how == "changed" else path.unlink()
    process = command("gate", run_copy, "--json")
    assert "50-validate" in document(process, 12)["error"]["message"]


def test_a_run_that_was_not_validated_has_nothing_to_decide(command, run_copy):
    with RunDir.open(run_copy) as run:
        run.drop("50-validate")
    assert "no finished 50-validate" in document(command("gate", run_copy, "--json"), 12)["error"]["message"]


def test_a_gate_that_was_made_stricter_in_the_manifest_fails_from_the_same_evidence(command, run_copy):
    manifest = json.loads((run_copy / "run.json").read_text())
    next(gate for gate in manifest["gates"] if gate["id"] == "drift")["limit"] = 1e-9
    (run_copy / "run.json").write_text(json.dumps(manifest))
    process = command("gate", run_copy, "--json")
    assert document(process, 10)["verdict"] == "fail"
    assert "rel_l2 on `emulated/fp16`" in process.stderr


def test_a_gate_file_has_the_keys_of_the_contract(finished_run):
    found = json.loads((finished_run.path / "gate.json").read_text())
    keys = {"id", "at", "metric", "verdict", "measured", "limit", "interval", "num_samples"}
    assert found["verdict"] == "pass"
    assert all(keys <= verdict.keys() for verdict in found["verdicts"])


def test_report_writes_the_reports_again(command, run_copy):
    names = ["gate.json", "junit.xml", "summary.md", "report.html"]
    before = {name: (run_copy / name).read_bytes() for name in names}
    for name in names:
        (run_copy / name).unlink()
    assert document(command("report", run_copy, "--json"))["written"] == [str(run_copy / name) for name in names]
    assert (run_copy / "gate.json").read_bytes() == before["gate.json"]
    assert (run_copy / "junit.xml").read_bytes() == before["junit.xml"]


def test_history_lists_runs_with_their_verdicts(command, run_copy):
    shutil.copytree(run_copy, run_copy.parent / "unfinished")
    (run_copy.parent / "unfinished" / "gate.json").unlink()
    runs = {Path(item["run"]).name: item for item in document(command("history", run_copy.parent, "--json"))["runs"]}
    assert (runs["run"]["verdict"], runs["unfinished"]["verdict"]) == ("pass", None)
    assert runs["run"]["pipeline"] == "tiny"
    assert runs["run"]["score"] > 0.8
    assert 1e-5 < runs["run"]["worst_rel_l2"] < 1e-2
    assert "unfinished" in command("history", run_copy.parent).stdout


def test_a_promoted_baseline_can_be_compared_with_and_a_missing_one_exits_12(command, run_copy, tmp_path):
    file = tmp_path / "baseline.json"
    assert document(command("gate", run_copy, "--baseline", file, "--json"), 12)["error"]["exit_code"] == 12
    assert command("baseline", "promote", run_copy, "--reason", "first", "--file", file).returncode == 0
    assert "first" in file.read_text()
    before = (run_copy / "gate.json").read_bytes()
    found = document(command("gate", run_copy, "--baseline", file, "--json"))
    assert len(found["verdicts"]) > len(json.loads(before)["verdicts"])
    assert (run_copy / "gate.json").read_bytes() == before, "gate.json holds the run's own gates only"


@pytest.mark.parametrize("verb", ["gate", "report", "history"])
def test_a_run_directory_may_have_brackets_in_its_name(command, run_copy, verb):
    """They are no markup for the terminal."""
    odd = run_copy.parent / "all [" / "red] [bold]x"
    odd.parent.mkdir()
    shutil.move(run_copy, odd)
    process = command(verb, odd.parent if verb == "history" else odd)
    assert process.returncode == 0, process.stderr
    shown = "".join(process.stdout.split())  # a table may fold it
    assert ("all[" in shown and "red][bold]x" in shown) if verb == "history" else "all[/red][bold]x" in shown


# -- doctor, init ------------------------------------------------------------------------------------------------------


def test_doctor_says_of_every_engine_whether_it_builds_and_runs_and_what_is_missing(command):
    found = document(command("doctor", "--json"))
    assert list(found["engines"]) == list(ENGINES)
    for name, state in found["engines"].items():
        assert state["runs"] <= state["builds"], name
        assert state["runs"] or (state["reason"] and state["hint"]), name
        assert not state["builds"] or state["takes"] in ("fp32", "fp16", "bf16"), name
    assert found["engines"]["onnxruntime"]["runs"]
    assert found["providers"]["CPUExecutionProvider"] == "loads"
    assert {"train", "cpu", "gpu", "rtx", "serve", "report"} <= found["extras"].keys()
    assert found["environment"]["cores"] >= 1


def test_doctor_names_the_command_that_installs_what_is_missing(command, monkeypatch):
    from mpdeploy import doctor

    monkeypatch.setattr(doctor, "package_version", lambda name: None)
    process = command("doctor")
    assert process.returncode == 0
    assert "pip install 'mpdeploy[train]'" in process.stdout


def test_doctor_s_hints_are_no_markup(command, monkeypatch):
    from mpdeploy.engines.base import Unavailable
    from mpdeploy.engines.openvino import OpenVinoBackend

    missing = Unavailable("openvino is not installed.", "pip install 'mpdeploy[cpu]'")
    monkeypatch.setattr(OpenVinoBackend, "available", lambda self: missing)
    assert "openvino is not installed. pip install 'mpdeploy[cpu]'" in " ".join(command("doctor").stdout.split())


def test_doctor_warns_of_two_runtimes_in_one_package(command, monkeypatch):
    from mpdeploy import doctor

    monkeypatch.setattr(doctor, "package_version", lambda name: "1.0")
    assert "share one import package" in document(command("doctor", "--json"))["warnings"][0]


def test_init_writes_a_pipeline_that_loads(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert document(command("init", "my_model", "--json")) == {"pipeline": "my_model.py"}
    pipeline = load_pipeline(tmp_path / "my_model.py")
    assert pipeline.name == "my_model"


def test_init_takes_a_path(command, tmp_path):
    assert command("init", tmp_path / "deep" / "mine.py").returncode == 0
    assert load_pipeline(tmp_path / "deep" / "mine.py").name == "mine"


def test_init_never_overwrites(command, tmp_path):
    (tmp_path / "mine.py").write_text("years of work")
    process = command("init", tmp_path / "mine", "--json")
    assert "is there already" in document(process, 2)["error"]["message"]
    assert (tmp_path / "mine.py").read_text() == "years of work"


@pytest.mark.parametrize("name", ["my-model", "3d", "class", "a b", ""])
def test_init_refuses_what_cannot_name_a_module(command, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    document(command("init", name, "--json"), 2)
    assert list(tmp_path.iterdir()) == []


def test_the_scaffold_runs_as_it_is(command, tmp_path):
    """Fewer epochs and one engine: the rest is what `init` wrote."""
    command("init", tmp_path / "mine")
    process = command(
        "train-and-export", tmp_path / "mine.py", "--run", tmp_path / "run", "--engine", "onnxruntime",
        "--set", "train.epochs=2", "--set", "validation.latency_samples=20", "--json",
    )  # fmt: skip
    found = document(process)
    assert found["verdict"] in ("pass", "inconclusive")
    assert {stage["status"] for stage in found["stages"].values()} == {"done"}


@pytest.mark.slow
def test_the_scaffold_passes_with_every_engine_of_this_machine(tmp_path):
    assert mpdeploy("init", "mine", cwd=tmp_path).returncode == 0
    process = mpdeploy("train-and-export", "mine.py", "--json", cwd=tmp_path)
    assert document(process)["verdict"] in ("pass", "inconclusive")
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()

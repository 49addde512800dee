"""`mpdeploy package`: what passed its gates is packaged, what did not is refused and named, and no folder is half written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from packaged import judged_run
from tiny_pipeline import mpdeploy

from mpdeploy.errors import ArtifactChangedError, GateFailedError, NotComparableError, UsageError
from mpdeploy.run_dir import RunDir
from mpdeploy.serve.package import PackageRequest, package
from mpdeploy.serve.package.choose import judge_of, models_of
from mpdeploy.serve.package.run_copy import copy_run
from mpdeploy.serve.selection import Judgement, select


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged_run(tmp_path_factory.mktemp("judged") / "run")


@pytest.fixture
def run_copy(judged: Path, tmp_path: Path) -> Path:
    shutil.copytree(judged, tmp_path / "run")
    return tmp_path / "run"


def request(run: Path, output: Path, **more) -> PackageRequest:
    return PackageRequest(run, **({"target": "triton", "output": output} | more))


def failing_gates(run: Path) -> None:
    """Raise a gate that no model of the run can pass."""
    path = run / "run.json"
    manifest = json.loads(path.read_text())
    for gate in manifest["gates"]:
        if gate["metric"] == "rel_l2":
            gate["limit"] = -1.0
    path.write_text(json.dumps(manifest))


# -- from the command line ---------------------------------------------------------------------------------------------


def test_the_verb_writes_a_repository_and_says_what_it_left_out(judged, tmp_path):
    process = mpdeploy(
        "package", judged, "--target", "triton", "--output", tmp_path / "repository", "--name", "tiny", "--json"
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    assert document["models"]["tiny"]["verdict"] == "pass"
    assert document["models"]["tiny"]["sha256"] == RunDir.open(judged).artifact("20-export", "model").sha256
    assert "as typed" in document["left_out"]["openvino"]
    written = json.loads((tmp_path / "repository/package.json").read_text())
    assert written == {key: value for key, value in document.items() if key not in ("path", "next")}
    assert str(tmp_path) not in (tmp_path / "repository/package.json").read_text(), (
        "a package names no path of its maker"
    )


def test_wrong_usage_exits_2_and_leaves_no_folder(judged, tmp_path):
    process = mpdeploy("package", judged, "--target", "tritno", "--output", tmp_path / "out")
    assert process.returncode == 2
    assert "closest: triton" in process.stderr
    assert list(tmp_path.iterdir()) == []


# -- verdicts and digests ----------------------------------------------------------------------------------------------


def test_what_failed_its_gates_is_not_packaged(run_copy, tmp_path):
    failing_gates(run_copy)
    with pytest.raises(GateFailedError, match=r"(?s)nothing that may be packaged.*onnx: fail: rel_l2"):
        package(request(run_copy, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_was_asked_for_and_failed_exits_10_with_the_gates_own_words(run_copy, tmp_path):
    failing_gates(run_copy)
    with pytest.raises(GateFailedError, match=r"(?s)onnx: fail.*against a limit of -1"):
        package(request(run_copy, tmp_path / "out", engines=("onnx",)))


def test_with_allow_failed_it_is_packaged_and_says_so_wherever_it_can(run_copy, tmp_path):
    failing_gates(run_copy)
    made = package(request(run_copy, tmp_path / "out", allow_failed=True))
    (name,) = made.provenance["models"]
    found = made.provenance["models"][name]
    assert (found["verdict"], made.provenance["allow_failed"]) == ("fail", True)
    assert found["not_passed"]
    assert "--allow-failed" in made.provenance["warnings"][0]
    assert 'string_value: "fail"' in (tmp_path / "out" / name / "config.pbtxt").read_text()


def test_a_run_that_was_never_validated_is_unvalidated(run_copy, tmp_path):
    manifest = json.loads((run_copy / "run.json").read_text())
    del manifest["stages"]["50-validate"]
    (run_copy / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(GateFailedError, match="onnx: unvalidated: the run was never validated"):
        package(request(run_copy, tmp_path / "out"))


def test_a_file_that_changed_is_refused_even_with_allow_failed(run_copy, tmp_path):
    path = run_copy / "20-export/model.fp32.onnx"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises((ArtifactChangedError, NotComparableError), match=r"model\.fp32\.onnx"):
        package(request(run_copy, tmp_path / "out"))
    with pytest.raises(ArtifactChangedError, match=r"model\.fp32\.onnx"):
        package(request(run_copy, tmp_path / "out", allow_failed=True))
    assert not (tmp_path / "out").exists()


def test_evidence_that_changed_is_not_believed(run_copy, tmp_path):
    path = run_copy / "evidence/onnx.npz"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(NotComparableError):
        package(request(run_copy, tmp_path / "out"))


@pytest.mark.parametrize(
    ("engine", "said"),
    [("tensorrt-rtx", "no TensorRT-RTX backend"), ("openvino", "as typed"), ("tensorrt", "has none"), ("tensort", "no such")],
)  # fmt: skip
def test_an_engine_that_triton_does_not_get_is_refused_with_the_reason(judged, tmp_path, engine, said):
    with pytest.raises(UsageError, match=said):
        package(request(judged, tmp_path / "out", engines=(engine,)))


def test_an_unvalidated_engine_is_left_out_and_the_next_one_taken(judged):
    run = RunDir.open(judged)
    verdicts = {
        "openvino": Judgement("unvalidated", ("nobody ran it",)),
        "onnxruntime": Judgement("inconclusive", ("few",)),
    }
    chosen = models_of(run, lambda name: verdicts[name], rows=("openvino", "onnxruntime"))
    assert [model.engine for model in chosen.models] == ["onnxruntime"]
    assert chosen.left_out["openvino"] == "unvalidated: nobody ran it"
    assert chosen.warnings == ("onnxruntime: inconclusive: few",)


def test_the_verdict_of_an_engine_is_that_of_the_server(judged):
    judge = judge_of(RunDir.open(judged), allow_failed=False)
    for candidate in select(judged).candidates:
        assert judge(candidate.name) == candidate.judgement


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_package_takes_the_place_of_an_older_one(judged, tmp_path):
    package(request(judged, tmp_path / "out", name="before"))
    package(request(judged, tmp_path / "out", name="after"))
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == ["README.md", "after", "package.json"]


def test_a_folder_that_is_no_package_is_not_touched(judged, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"is no package and is not empty: thesis\.txt"):
        package(request(judged, tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_option_of_another_target_is_refused(judged, tmp_path):
    with pytest.raises(UsageError, match="--storage-uri is no option of --target triton"):
        package(request(judged, tmp_path / "out", options={"storage_uri": "s3://bucket"}))


def test_a_copied_run_is_served_under_the_same_rules(judged, tmp_path):
    run = RunDir.open(judged)
    chosen = models_of(run, judge_of(run, allow_failed=False), rows=("onnxruntime",))
    copy_run(run, tmp_path / "copy", chosen.models)
    assert not list((tmp_path / "copy").rglob("*.safetensors"))
    assert not list((tmp_path / "copy").rglob("golden.npz"))
    found = select(tmp_path / "copy", engine="onnxruntime")
    assert found.candidates[0].opened().sha256 == chosen.models[0].sha256

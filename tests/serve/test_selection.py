"""Which engine is served, and which is refused and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from served import checksum_model, make_run

from mpdeploy.errors import (
    ArtifactChangedError,
    GateFailedError,
    MpdeployError,
    NotComparableError,
    RunDirError,
    UnavailableError,
    UsageError,
)
from mpdeploy.run_dir import RunDir, StageRecord
from mpdeploy.serve.selection import judge, select

BOTH = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", checksum_model(), engines=BOTH)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def names(selection) -> list[str]:
    return [candidate.name for candidate in selection.candidates]


def set_manifest(run: Path, **values: object) -> None:
    with RunDir.create(run) as directory:
        directory.set_header(**values)


def test_the_measured_fastest_goes_first_and_then_the_table_s_order(copy):
    assert names(select(copy)) == ["onnxruntime", "openvino"]
    set_manifest(copy, chosen_engine=None)
    assert names(select(copy)) == ["openvino", "onnxruntime"]


def test_the_one_that_is_asked_for_is_the_only_one(run):
    assert names(select(run, engine="openvino")) == ["openvino"]
    with pytest.raises(UsageError, match="has no engine 'tensorrt'"):
        select(run, engine="tensorrt")


def test_an_engine_that_failed_gives_way_to_the_next(tmp_path):
    run = make_run(tmp_path / "run", checksum_model(), engines=BOTH, limits={"onnxruntime": -1.0})
    selection = select(run)
    assert names(selection) == ["openvino"]
    assert "verdict is fail: rel_l2 on `engine/onnxruntime`" in selection.refused["onnxruntime"].message


def test_a_run_where_all_failed_is_refused_with_each_reason(tmp_path):
    run = make_run(
        tmp_path / "run", checksum_model(), engines=BOTH, limits={"onnxruntime": -1.0}, unvalidated=("openvino",)
    )
    with pytest.raises(GateFailedError) as caught:
        select(run)
    assert caught.value.exit_code == 10
    assert "onnxruntime: its verdict is fail" in caught.value.message
    assert "openvino: its verdict is unvalidated" in caught.value.message
    allowed = select(run, allow_failed=True)
    assert names(allowed) == ["onnxruntime", "openvino"]
    assert all("--allow-failed" in candidate.warnings[0] for candidate in allowed.candidates)


def test_a_run_that_was_never_validated_is_refused(copy):
    with RunDir.create(copy) as directory:
        directory.drop("50-validate")
    with pytest.raises(GateFailedError, match="never validated"):
        select(copy)
    assert select(copy, allow_failed=True).candidates[0].judgement.verdict == "unvalidated"


@pytest.mark.parametrize(
    "what", ["gate.json edited", "gate.json gone", "evidence edited", "evidence gone", "gates edited"]
)
def test_verdicts_that_the_evidence_does_not_bear_out_are_refused(copy, what):
    gate = copy / "gate.json"
    if what == "gate.json edited":
        gate.write_text(gate.read_text().replace('"verdict": "pass"', '"verdict": "inconclusive"'))
    elif what == "gate.json gone":
        gate.unlink()
    elif what == "evidence edited":
        path = copy / "evidence" / "engine-onnxruntime.npz"
        arrays = dict(np.load(path))
        np.savez(path, **{name: array * 0 for name, array in arrays.items()})
    elif what == "evidence gone":
        shutil.rmtree(copy / "evidence")
    else:  # a limit that was tightened after the verdicts were written
        gates = RunDir.open(copy).manifest["gates"]
        set_manifest(copy, gates=[{**item, "limit": -1.0} for item in gates])
    with pytest.raises(NotComparableError) as caught:
        select(copy)
    assert caught.value.exit_code == 12
    allowed = select(copy, allow_failed=True)
    assert {candidate.judgement.verdict for candidate in allowed.candidates} == {"unvalidated"}


def test_an_engine_whose_bytes_changed_is_not_opened(copy):
    path = copy / "40-build" / "onnxruntime" / "engine.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    first, second = select(copy).candidates
    with pytest.raises(ArtifactChangedError):
        first.opened()
    assert second.opened().sha256 == second.engine.sha256


def test_an_engine_that_was_not_built_says_why(copy):
    with RunDir.create(copy) as directory:
        for name in BOTH:
            directory.put(StageRecord(f"40-build/{name}", "unavailable", {}, message="no such library", hint="get it"))
    with pytest.raises((UnavailableError, NotComparableError)) as caught:
        select(copy)
    if isinstance(caught.value, UnavailableError):
        assert caught.value.exit_code == 21
        assert "no such library" in caught.value.message


def test_what_is_no_run_is_no_run(tmp_path):
    with pytest.raises(RunDirError, match="no run directory"):
        select(tmp_path)


class Said:
    def __init__(self, at: str, verdict: str, *, advisory: bool = False) -> None:
        self.at, self.verdict, self.advisory, self.message = at, verdict, advisory, f"{verdict} at {at}"


@pytest.mark.parametrize(
    ("said", "measured", "verdict"),
    [
        ([Said("engine/a", "pass")], True, "pass"),
        ([Said("engine/a", "pass"), Said("engine/a", "fail")], True, "fail"),
        ([Said("engine/a", "pass"), Said("engine/a", "fail", advisory=True)], True, "pass"),
        ([Said("engine/a", "pass"), Said("engine/b", "fail")], True, "pass"),
        ([Said("engine/a", "pass"), Said("parity", "fail")], True, "fail"),
        ([Said("engine/a", "pass"), Said("onnx", "inconclusive")], True, "inconclusive"),
        ([Said("engine/a", "pass"), Said("engine/*", "fail")], True, "fail"),
        ([Said("engine/a", "pass"), Said("engine/a", "unvalidated")], False, "unvalidated"),
        ([Said("engine/a", "fail"), Said("engine/a", "unvalidated")], False, "fail"),
        ([Said("engine/a", "pass")], False, "unvalidated"),
        ([Said("engine/b", "pass")], True, "unvalidated"),
        ([], False, "unvalidated"),
    ],
)
def test_an_engine_s_verdict_is_the_worst_of_its_own_place_and_of_what_it_was_made_from(said, measured, verdict):
    assert judge(said, "a", measured=measured).verdict == verdict


def test_the_command_line_refuses_with_the_exit_code_of_the_reason(tmp_path, capsys, monkeypatch):
    from mpdeploy.serve.options import ServerOptions
    from mpdeploy.serve.start import serve

    run = make_run(tmp_path / "run", checksum_model(), limits={"onnxruntime": -1.0})
    with pytest.raises(MpdeployError) as caught:
        serve(ServerOptions(run=run, port=0))
    assert caught.value.exit_code == 10
    path = tmp_path / "run" / "gate.json"
    assert json.loads(path.read_text())["verdict"] == "fail"


def test_the_second_engine_serves_where_the_first_cannot_be_loaded(copy, tmp_path):
    import asyncio

    from mpdeploy.serve.manager import ModelManager
    from mpdeploy.serve.options import ServerOptions

    path = copy / "40-build" / "onnxruntime" / "engine.onnx"
    path.write_bytes(path.read_bytes()[:-5])

    async def main():
        manager = ModelManager(ServerOptions(run=copy))
        await manager.start()
        metadata = manager.metadata("model")
        await manager.stop()
        return metadata

    metadata = asyncio.run(main())
    assert metadata.notes["engine"] == "openvino"
    assert "has digest" in metadata.notes["not_served"]["onnxruntime"]

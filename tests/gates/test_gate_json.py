"""gate.json: it follows its schema, and deciding again gives the same bytes on any machine."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mpdeploy.artifact import FileArtifact
from mpdeploy.config import DEFAULT_GATES, Gate
from mpdeploy.errors import NotComparableError
from mpdeploy.files import write_json
from mpdeploy.gates.evidence import Evidence
from mpdeploy.gates.gate import GATE_SCHEMA, decide, gate_json
from mpdeploy.gates.provenance import check_provenance
from mpdeploy.run_dir import RunDir, StageRecord


def validate(value, schema, path="gate.json"):
    """The part of JSON Schema that GATE_SCHEMA uses; an unknown keyword is an error here too."""
    known = {
        "$schema",
        "title",
        "description",
        "type",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "enum",
    }
    known |= {"const", "anyOf", "minimum", "minItems", "maxItems"}
    assert set(schema) <= known, set(schema) - known
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    if "anyOf" in schema:
        faults = []
        for choice in schema["anyOf"]:
            try:
                validate(value, choice, path)
                break
            except AssertionError as error:
                faults.append(str(error))
        else:
            raise AssertionError(f"{path}: {value!r} is none of the choices: {faults}")
    kind = schema.get("type")
    if kind in ("number", "integer"):
        allowed = (int,) if kind == "integer" else (int, float)
        assert isinstance(value, allowed), f"{path}: {value!r} is no {kind}"
        assert not isinstance(value, bool), f"{path}: {value!r} is no {kind}"
        assert value >= schema.get("minimum", value), f"{path}: {value} is too small"
    elif kind is not None:
        assert isinstance(value, types[kind]), f"{path}: {value!r} is no {kind}"
    if "enum" in schema:
        assert value in schema["enum"], f"{path}: {value!r} is not in {schema['enum']}"
    if "const" in schema:
        assert value == schema["const"], f"{path}: {value!r}"
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), (
            f"{path}: lacks {set(schema.get('required', ())) - set(value)}"
        )
        for name, item in value.items():
            other = schema.get("additionalProperties", True)
            inner = schema.get("properties", {}).get(name, other)
            assert inner is not False, f"{path}: '{name}' is not in the schema"
            if isinstance(inner, dict):
                validate(item, inner, f"{path}.{name}")
    if isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)), path
        for index, item in enumerate(value):
            validate(item, schema.get("items", {}), f"{path}[{index}]")


def _decided(evidence, gates=DEFAULT_GATES):
    return gate_json(decide(gates, evidence), evidence, "digits", gates)


@pytest.fixture
def everything(place, evidence):
    """A run with every kind of verdict in it."""
    broken = dict(place().arrays)
    broken["scores"] = np.where(np.arange(1000) == 3, np.nan, broken["scores"])
    return evidence(
        place("onnx", precision="fp32", noise=0.0),
        place("emulated/fp16", num_lost=15, num_gained=2),
        place("engine/broken", arrays=broken, facts={}),
        place("engine/slow", slower=1.3, num_lost=300, noise=0.5),
        place("engine/tensorrt-rtx", status="unvalidated", arrays={}, facts={"size_bytes": 9}),
    )


def test_what_is_written_follows_the_published_schema(everything, tmp_path):
    gate = _decided(everything)
    write_json(tmp_path / "gate.json", gate)
    read = json.loads((tmp_path / "gate.json").read_text())
    assert read == gate  # NaN and infinities are strings already
    validate(read, GATE_SCHEMA)
    assert {verdict["verdict"] for verdict in read["verdicts"]} == {"pass", "fail", "inconclusive", "unvalidated"}
    assert read["verdict"] == "fail"
    assert read["unvalidated"] == ["engine/tensorrt-rtx"]


@pytest.mark.parametrize(
    "change",
    [
        lambda gate: gate.update(verdict="ok"),
        lambda gate: gate.pop("digests"),
        lambda gate: gate.update(decided_at="2024-06-01"),
        lambda gate: gate["verdicts"][0].update(measured="0.3"),
        lambda gate: gate["verdicts"][0].update(interval=[1.0]),
        lambda gate: gate["verdicts"][0].pop("num_samples"),
    ],
)
def test_the_schema_refuses_what_is_no_gate_json(everything, change):
    gate = _decided(everything)
    change(gate)
    with pytest.raises(AssertionError):
        validate(gate, GATE_SCHEMA)


def test_every_verdict_has_the_fields_that_the_command_line_promises(everything):
    for verdict in _decided(everything)["verdicts"]:
        assert {"id", "at", "metric", "verdict", "measured", "limit", "interval", "num_samples"} <= verdict.keys()


def test_deciding_again_from_saved_evidence_gives_the_same_bytes(everything, tmp_path):
    everything.save(tmp_path / "run/evidence")
    write_json(tmp_path / "first.json", _decided(everything))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    write_json(tmp_path / "second.json", _decided(Evidence.load(tmp_path / "copy/evidence")))
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


def test_another_process_with_other_threads_gives_the_same_bytes(everything, tmp_path):
    everything.save(tmp_path / "evidence")
    write_json(tmp_path / "first.json", _decided(everything))
    code = (
        "import sys; from pathlib import Path; from mpdeploy.config import DEFAULT_GATES as g;"
        "from mpdeploy.files import write_json; from mpdeploy.gates.evidence import Evidence;"
        "from mpdeploy.gates.gate import decide, gate_json;"
        "e = Evidence.load(Path(sys.argv[1]) / 'evidence');"
        "write_json(Path(sys.argv[1]) / 'second.json', gate_json(decide(g, e), e, 'digits', g));"
        "bad = {'torch', 'onnxruntime', 'onnx', 'scipy.stats'} & set(sys.modules);"
        "assert not bad, bad"
    )
    root = str(Path(__file__).parents[2])
    environment = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PATH": "/usr/bin", "PYTHONPATH": root, "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


def test_a_tampered_evidence_file_is_refused(everything, tmp_path):
    everything.save(tmp_path)
    with np.load(tmp_path / "engine-slow.npz") as archive:
        arrays = dict(archive)
    arrays["scores"][:] = 1.0
    np.savez_compressed(tmp_path / "engine-slow.npz", **arrays)
    with pytest.raises(NotComparableError, match=r"engine-slow\.npz is not the one that was measured"):
        Evidence.load(tmp_path)


def test_only_the_claim_that_something_failed_is_corrected_for_the_number_of_gates(place, evidence):
    """A drop that is just significant alone fails its gate, and is not claimed among twenty."""
    # 36 lost and 4 gained of 1,000 against a margin of 2 points: one-sided p is near 0.025
    places = [place("engine/bad", num_lost=36, num_gained=4, seed=1)] + [place(f"engine/{n}") for n in range(20)]
    gates = [Gate(id="accuracy", metric="score_drop", limit=0.02)]
    alone, among = _decided(evidence(places[0]), gates), _decided(evidence(*places), gates)
    assert alone["verdict"] == among["verdict"] == "fail"
    assert (alone["failure_claim"]["num_failed_corrected"], among["failure_claim"]["num_failed_corrected"]) == (1, 0)
    assert "claimed jointly (Holm): none of them" in among["failure_claim"]["statement"]


def test_the_samples_that_would_decide_everything_are_named(place, evidence):
    gates = [Gate(id="accuracy", metric="score_drop", limit=0.02)]
    gate = _decided(evidence(place("a", num_lost=15), place("b", num_lost=12)), gates)
    assert gate["verdict"] == "inconclusive"
    assert gate["samples_to_decide"] == max(verdict["samples_to_decide"] or 0 for verdict in gate["verdicts"])


def test_places_are_summed_up_for_renderers(place, evidence):
    gate = _decided(evidence(place(num_lost=6, num_gained=4)))
    found = gate["places"]["engine/openvino"]
    assert found["scores"] == {
        "metric": "top1",
        "mean": 0.994,
        "baseline_mean": 0.996,
        "num_samples": 1000,
        "num_lost": 6,
        "num_gained": 4,
        "mcnemar_p_value": 0.75390625,
    }
    assert found["flips"] == {"count": 10, "share": 0.01}
    assert found["latency"]["p99_ms"] is not None


def test_fifty_thousand_samples_at_five_places_are_decided_in_under_five_seconds(place, evidence):
    """Scores of any value, so that nothing is decided by counting: 50,000 samples, as if infinitely many resamples."""
    rng = np.random.default_rng(0)
    baseline = rng.random(50_000)
    places = [
        place(f"engine/{n}", arrays={"baseline_scores": baseline, "scores": baseline - rng.normal(0.001, 0.05, 50_000)})
        for n in range(5)
    ]
    started = time.perf_counter()
    gate = _decided(evidence(*places), [Gate(id="accuracy", metric="score_drop", limit=0.01)])
    assert time.perf_counter() - started < 5.0
    assert gate["verdict"] == "pass"


# -- provenance --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, place, evidence):
    """A run directory with an engine, golden answers, and evidence that matches both."""
    run = RunDir.create(tmp_path / "run")
    for name, content in (("40-build/openvino/engine.xml", "engine"), ("20-export/golden.npz", "golden")):
        path = run.path / name
        path.parent.mkdir(parents=True)
        path.write_text(content)
    engine, golden = (
        FileArtifact.of(run.path / name) for name in ("40-build/openvino/engine.xml", "20-export/golden.npz")
    )
    run.put(StageRecord("20-export", "done", {}, {"golden": golden}))
    run.put(StageRecord("40-build/openvino", "done", {}, {"engine": engine}))
    measured = evidence(place(digests={"artifact": engine.sha256}))
    measured = Evidence(measured.places, {"golden": golden.sha256}, measured.environment)
    measured.save(run.path / "evidence")
    index = FileArtifact.of(run.path / "evidence/index.json")
    run.put(StageRecord("50-validate", "done", {}, {"evidence": index}))
    return run


def test_evidence_of_its_own_run_is_accepted_also_where_only_run_json_is_left(run):
    check_provenance(Evidence.load(run.path / "evidence"), run)
    shutil.rmtree(run.path / "40-build")
    shutil.rmtree(run.path / "20-export")
    check_provenance(Evidence.load(run.path / "evidence"), RunDir.open(run.path))


def test_evidence_of_an_engine_that_was_built_again_is_stale(run):
    path = run.path / "40-build/openvino/engine.xml"
    path.write_text("another engine")
    run.put(StageRecord("40-build/openvino", "done", {}, {"engine": FileArtifact.of(path)}))
    with pytest.raises(NotComparableError, match="engine/openvino` is stale"):
        check_provenance(Evidence.load(run.path / "evidence"), run)


def test_a_swapped_file_of_samples_and_labels_is_refused(run):
    (run.path / "20-export/golden.npz").write_text("other labels")
    with pytest.raises(NotComparableError, match="samples, labels or answers changed"):
        check_provenance(Evidence.load(run.path / "evidence"), run)


def test_evidence_measured_with_other_golden_answers_is_refused(run):
    path = run.path / "20-export/golden.npz"
    path.write_text("other answers")
    run.put(StageRecord("20-export", "done", {}, {"golden": FileArtifact.of(path)}))
    with pytest.raises(NotComparableError, match="measured with another 'golden'"):
        check_provenance(Evidence.load(run.path / "evidence"), run)


def test_a_fact_that_was_edited_in_the_index_is_refused(run):
    path = run.path / "evidence/index.json"
    path.write_text(path.read_text().replace('"size_bytes": 1000', '"size_bytes": 1'))
    with pytest.raises(NotComparableError, match="index is not the one that was recorded"):
        check_provenance(Evidence.load(run.path / "evidence"), run)

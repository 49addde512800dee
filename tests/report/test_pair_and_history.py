"""Two runs on one page, and all runs of a folder with their trends."""

import json
import math
import subprocess
import sys

from mpdeploy.report.pair import differences, render_pair
from mpdeploy.run_dir import RunDir, StageRecord
from mpdeploy.run_history import runs_in, sparkline, trends_of


def _pair(before, after):
    return render_pair(before.directory, after.directory, before.gate, after.gate)


def test_a_verdict_that_changed_stands_first_and_the_banner_is_the_later_run(make_run):
    text = _pair(make_run(name="good"), make_run(name="bad", broken=True))
    assert 'class="verdict v-fail"' in text
    assert "Compared with good: PASS" in text
    first_row = text[text.index("<tbody>") :].split("</tr>")[0]
    assert "engine/openvino" in first_row
    assert "t-pass" in first_row
    assert "t-fail" in first_row


def test_numbers_of_both_runs_and_how_they_moved_are_shown(make_run):
    text = _pair(make_run(name="good"), make_run(name="bad", broken=True))
    row = text[text.index('id="places"') :]
    row = row[row.index(">engine/openvino<") :].split("</tr>")[0]
    assert "1 → 0.8" in row
    assert "-20.0 %" in row
    assert 'class="up"' in row  # worse is marked


def test_runs_on_other_samples_or_hardware_are_not_taken_at_face_value(make_run):
    before, after = make_run(name="before"), make_run(name="after")
    assert "not comparable" not in _pair(before, after)
    after.gate["digests"]["dataset"] = "ee" * 32
    after.gate["environment"]["gpus"] = [{"name": "NVIDIA L4"}]
    text = _pair(before, after)
    assert "different samples or labels: scores and drift are not comparable" in text
    assert "different hardware (Test CPU; NVIDIA L4): latencies are not comparable" in text


def test_what_the_configs_differ_in_is_listed_and_nothing_else():
    before, after = {"train": {"epochs": 3, "seed": 0}, "x": 1}, {"train": {"epochs": 5, "seed": 0}, "y": [1, 2]}
    assert differences(before, after) == [("train.epochs", "3", "5"), ("x", "1", "-"), ("y", "-", "1; 2")]


def test_names_from_runs_cannot_inject_anything(make_run):
    before, after = make_run(name="before"), make_run(name="after")
    hostile = '"><script>alert(1)</script>'
    after.gate["verdicts"][0]["at"] = after.gate["verdicts"][0]["id"] = hostile
    after.gate["places"][hostile] = after.gate["places"]["onnx"]
    after.directory.manifest["config"] = {hostile: hostile}
    assert "<script" not in _pair(before, after)


# -- history -----------------------------------------------------------------------------------------------------------


def _run(folder, name, *, score, drift, updated, pipeline="digits"):
    run = RunDir.create(folder / name)
    places = {
        "onnx": {"score": score, "rel_l2": 1e-7},
        "emulated/fp16": {"rel_l2": drift},
        "engine/openvino": {"median_ms": 2.0},
    }
    run.put(StageRecord("50-validate", "done", {}, report={"places": places}))
    run.manifest |= {"pipeline": pipeline, "chosen_engine": "openvino", "updated": updated}
    (folder / name / "run.json").write_text(json.dumps(run.manifest))
    gate = {"id": "drift", "verdict": "fail", "advisory": False}
    failed = drift == "inf"
    (folder / name / "gate.json").write_text(
        json.dumps({"verdict": "fail" if failed else "pass", "verdicts": [gate] if failed else []})
    )


def test_runs_are_listed_oldest_first_with_trends_by_pipeline(tmp_path):
    _run(tmp_path, "b", score=0.9, drift=2e-3, updated="2026-02-01")
    _run(tmp_path, "a", score=0.8, drift="inf", updated="2026-03-01")
    _run(tmp_path, "c", score=0.7, drift=1e-3, updated="2026-01-01", pipeline="other")
    runs = runs_in(tmp_path)
    assert [run["run"].rsplit("/", 1)[1] for run in runs] == ["c", "b", "a"]
    trends = trends_of(runs)
    assert trends["digits"] == {"score": [0.9, 0.8], "worst_rel_l2": [2e-3, math.inf], "median_ms": [2.0, 2.0]}
    assert trends["other"]["score"] == [0.7]


def test_a_broken_run_is_listed_with_its_fault_and_hides_no_other(tmp_path):
    _run(tmp_path, "good", score=0.9, drift=1e-3, updated="2026-02-01")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/run.json").write_text("{")
    runs = runs_in(tmp_path)
    assert [bool(run["fault"]) for run in runs] == [True, False]


def test_a_sparkline_shows_order_gaps_and_what_was_lost():
    assert sparkline([1.0, 2.0, None, 8.0, math.inf]) == "▁▂·█!"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([None, None]) == "··"


def test_the_command_prints_one_document(tmp_path):
    _run(tmp_path, "a", score=0.9, drift="inf", updated="2026-02-01")
    _run(tmp_path, "b", score=0.8, drift=1e-3, updated="2026-02-02")
    command = [sys.executable, "-m", "mpdeploy", "history", str(tmp_path)]
    printed = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout)
    assert printed["trends"]["digits"]["worst_rel_l2"] == ["inf", 1e-3]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "█▁  score: 0.9 -> 0.8  (-11.1 % since the run before)" in text
    assert "✕✓  verdicts" in text
    first = next(line for line in text.splitlines() if line.split()[:1] == ["a"])
    assert first.split() == ["a", "2026-02-01", "fail", "0.9", "inf", "2", "openvino", "drift"]

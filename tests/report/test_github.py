"""What GitHub reads: `::error` lines and the step's summary, both from gate.json."""

import io

from mpdeploy.report.github import append_summary, tell_github
from mpdeploy.report.markdown import MAX_BYTES


def test_annotations_are_printed_under_github_only(make_run):
    gate = make_run(broken=True).gate
    stream = io.StringIO()
    tell_github(gate, stream, {})
    assert stream.getvalue() == ""
    tell_github(gate, stream, {"GITHUB_ACTIONS": "true"})
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("::error title=mpdeploy%3A")
    failed = [each for each in gate["verdicts"] if each["verdict"] == "fail" and not each["advisory"]]
    assert sum(line.startswith("::error ") for line in lines) == len(failed) > 0


def test_the_summary_is_added_to_what_the_step_wrote_before(make_run, tmp_path):
    path = tmp_path / "summary.md"
    path.write_text("# earlier\n")
    tell_github(make_run().gate, io.StringIO(), {"GITHUB_STEP_SUMMARY": str(path)})
    text = path.read_text()
    assert text.startswith("# earlier\n## ✓ PASS: digits")


def test_the_steps_summary_stays_below_what_github_takes(make_run, tmp_path):
    path = tmp_path / "summary.md"
    gate = make_run().gate
    gate["verdicts"] = [dict(gate["verdicts"][0], id=f"gate{n}") for n in range(20_000)]
    for _ in range(3):
        append_summary(gate, path)
        assert path.stat().st_size <= MAX_BYTES
    assert path.stat().st_size > MAX_BYTES // 2

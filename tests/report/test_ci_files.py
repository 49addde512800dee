"""junit.xml, summary.md and GitHub's annotations: renderings of one gate.json."""

from xml.etree import ElementTree as ET

import pytest

from mpdeploy.report.junit import render_junit, write_junit
from mpdeploy.report.markdown import MAX_BYTES, github_annotations, render_markdown, write_markdown


def test_junit_has_one_test_case_a_verdict_and_one_failure_a_failed_gate(make_run, tmp_path):
    gate = make_run(broken=True).gate
    write_junit(tmp_path / "junit.xml", gate)
    suite = ET.parse(tmp_path / "junit.xml").getroot().find("testsuite")
    assert len(suite.findall("testcase")) == int(suite.get("tests")) == len(gate["verdicts"])
    failed = [verdict for verdict in gate["verdicts"] if verdict["verdict"] == "fail" and not verdict["advisory"]]
    assert [
        case.find("failure").get("message") for case in suite.iter("testcase") if case.find("failure") is not None
    ] == [verdict["message"] for verdict in failed]
    assert int(suite.get("failures")) == len(failed) > 0
    skipped = [verdict for verdict in gate["verdicts"] if verdict["verdict"] in ("unvalidated", "inconclusive")]
    assert int(suite.get("skipped")) == len(suite.findall(".//skipped")) == len(skipped) > 0


def test_junit_of_a_healthy_run_has_no_failure(make_run):
    assert "<failure" not in render_junit(make_run().gate)


def test_an_advisory_failure_fails_no_test_case(make_run):
    gate = make_run().gate
    gate["verdicts"][0] |= {"verdict": "fail", "advisory": True}
    text = render_junit(gate)
    assert "<failure" not in text
    assert "advisory: " in text


def test_junit_survives_characters_that_xml_cannot_hold(make_run):
    gate = make_run().gate
    gate["verdicts"][0]["message"] = "a\x00b\x1b[31m <&> \ud800 ü"
    suite = ET.fromstring(render_junit(gate).partition("\n")[2]).find("testsuite")
    assert suite.find("testcase/system-out").text == "a\ufffdb\ufffd[31m <&> \ufffd ü"


def test_the_summary_starts_with_the_verdict_and_lists_what_failed_first(make_run, tmp_path):
    gate = make_run(broken=True).gate
    write_markdown(tmp_path / "summary.md", gate)
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert lines[0] == "## ✕ FAIL: digits"
    rows = [line for line in lines if line.startswith(("| ✕", "| ✓"))]
    assert rows[0].startswith("| ✕ fail")
    assert rows[-1].startswith(("| ✓ pass", "| ✕ fail (advisory)"))
    assert len(rows) >= 8


def test_the_summary_fits_into_githubs_limit_and_says_what_it_left_out(make_run):
    gate = make_run().gate
    many = [dict(gate["verdicts"][0], id=f"gate-{n}", message="m" * 3000) for n in range(9000)]
    many[8000] = dict(many[8000], verdict="fail")
    gate["verdicts"] = many
    text = render_markdown(gate)
    assert len(text.encode()) < MAX_BYTES
    assert "gate-8000" in text  # failures are kept
    assert len(render_markdown(gate, max_bytes=20_000).encode()) < 20_000
    assert "more verdicts are in gate.json" in render_markdown(gate, max_bytes=20_000)


def test_the_summary_cannot_be_broken_by_names(make_run):
    gate = make_run().gate
    gate["verdicts"][0] |= {"at": "a|b\n<img src=x>`c`", "id": "*x*"}
    row = next(line for line in render_markdown(gate).splitlines() if "\\*x\\*" in line)
    assert "<img" not in row
    assert row.replace("\\|", "").count("|") == 7


def test_annotations_are_errors_for_what_failed_warnings_for_what_is_open_and_escape_their_text(make_run):
    gate = make_run(broken=True).gate
    gate["verdicts"][0] |= {"verdict": "inconclusive", "message": "100 %\nnext", "at": "a,b:c"}
    lines = github_annotations(gate)
    assert lines[0].startswith("::error title=mpdeploy%3A ")
    assert "::warning title=mpdeploy%3A finite at a%2Cb%3Ac::100 %25%0Anext" in lines
    assert any(line.startswith("::notice") for line in lines)  # unvalidated
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize("broken", [False, True])
def test_a_passing_verdict_makes_no_annotation(make_run, broken):
    run = make_run(broken=broken)
    expected = sum(verdict["verdict"] != "pass" for verdict in run.gate["verdicts"])
    assert len(github_annotations(run.gate)) == expected

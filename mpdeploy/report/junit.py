"""junit.xml: one test case a verdict, so that every CI system shows them."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

from mpdeploy.files import write_text
from mpdeploy.report.reading import Json

# XML 1.0 has no way to write these, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(gate: Json) -> str:
    """The XML text. A failed gate is a failure; inconclusive and unvalidated are skipped with a message; advisory never fails."""
    suite = ET.Element("testsuite", name=_clean(f"mpdeploy {gate['pipeline']}"))
    counts = {"failures": 0, "skipped": 0}
    for verdict in gate["verdicts"]:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=_clean(verdict["at"]),
            name=_clean(f"{verdict['id']} ({verdict['metric']})"),
            time="0",
        )
        message = _clean(verdict["message"])
        if verdict["verdict"] == "fail" and not verdict["advisory"]:
            counts["failures"] += 1
            ET.SubElement(case, "failure", message=message, type=_clean(verdict["metric"])).text = message
        elif verdict["verdict"] in ("inconclusive", "unvalidated"):
            counts["skipped"] += 1
            ET.SubElement(case, "skipped", message=message)
        else:
            advisory = "advisory: " if verdict["verdict"] == "fail" else ""
            ET.SubElement(case, "system-out").text = advisory + message
    suite.set("tests", str(len(gate["verdicts"])))
    suite.set("errors", "0")
    for name, count in counts.items():
        suite.set(name, str(count))
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def write_junit(path: Path, gate: Json) -> None:
    """Write it, atomically."""
    write_text(path, render_junit(gate))


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", str(text))

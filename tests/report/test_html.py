"""The page: self-contained, filled, safe, and a failing run looks failed at first sight."""

import re
import zlib
from base64 import b64decode
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from mpdeploy.report.html import render_html, write_html
from mpdeploy.report.pictures import picture_of

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags close in order; keeps the text of each section and all attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sections, self.current, self.attributes, self.images = [], {}, None, [], []
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.attributes.append((tag, found))
        if tag == "section":
            self.current = found["id"]
            self.sections[self.current] = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"
        if tag == "section":
            self.current = None

    def handle_data(self, data):
        if self.current:
            self.sections[self.current] += data


def _render(run):
    return render_html(run.directory, run.gate, plans=run.plans, golden=run.golden)


def test_every_section_is_filled(make_run):
    page = Page(_render(make_run()))
    says = {
        "gates": "drift-fp16",
        "drift": "emulated/fp16",
        "accuracy": "top1",
        "samples": "margin",
        "latency": "99th percentile",
        "training": "loss scale",
        "precision": "exp(x) exceeds 65504 above x = 11.09",
        "engines": "12 bf16, 3 fp32; from the model that the runtime runs",
        "reproduce": "mpdeploy gate",
    }
    assert set(page.sections) == set(says)
    for section, text in says.items():
        assert text in page.sections[section], section


def test_a_failing_run_looks_failed_at_first_sight(make_run):
    failed, passed = _render(make_run(broken=True)), _render(make_run(name="good"))
    for text, verdict, sign in ((failed, "fail", "✕ FAIL"), (passed, "pass", "✓ PASS")):
        banner = text[text.index("<header") : text.index("</header>")]
        assert f'class="verdict v-{verdict}"' in banner
        assert sign[2:] in banner
        assert f"<title>{sign}: " in text
    banner = failed[failed.index("<header") : failed.index("</header>")]
    assert "num_nonfinite on <code>engine/openvino</code>: 2 against a limit of 0: fail" in banner
    assert "verdicts failed, at engine/openvino" in banner
    first = Page(failed).sections["gates"].split("engine/openvino")[0]
    assert "fail" in first  # and the table starts with what failed


def test_an_unvalidated_engine_is_named_in_the_banner(make_run):
    text = _render(make_run())
    assert "not validated on this machine: engine/tensorrt-rtx" in text[: text.index("</header>")]


def test_the_page_needs_no_network_and_no_script(make_run):
    text = _render(make_run(broken=True))
    page = Page(text)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    for tag, attributes in page.attributes:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href"):
            assert re.match(r"(#|data:)", attributes.get(name) or "#"), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_is_readable_on_a_phone_in_the_dark_and_by_keyboard(make_run):
    text = _render(make_run())
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert "@media (prefers-color-scheme: dark)" in text
    page = Page(text)
    scrolling = [attributes for tag, attributes in page.attributes if attributes.get("class") == "scroll"]
    assert scrolling
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in scrolling)
    assert ("html", {"lang": "en"}) in page.attributes


def test_every_picture_has_a_text_and_is_well_formed(make_run):
    text = _render(make_run(broken=True))
    graphics = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(graphics) > 30
    for graphic in graphics:
        element = ET.fromstring(graphic)
        assert element.get("role") == "img"
        assert element.get("aria-label")
        assert "nan" not in re.sub(r'aria-label="[^"]*"|<title>.*?</title>', "", graphic)
        assert "inf" not in re.sub(r'aria-label="[^"]*"|<title>.*?</title>|class="[^"]*"', "", graphic)
    images = [attributes for tag, attributes in Page(text).attributes if tag == "img"]
    assert len(images) == 12
    assert all(re.match(r"Input of sample \d+, label \d", image["alt"]) for image in images)


def test_flipped_samples_come_first_with_both_answers(make_run):
    samples = Page(_render(make_run(broken=True))).sections["samples"]
    assert "40 of 200 samples flipped" in samples
    assert samples.count("flipped\n") + samples.count("flipped ") >= 12
    assert re.search(r"\d → \d", samples)


def test_names_from_models_cannot_inject_anything(make_run):
    run = make_run()
    hostile = '"><script>alert(1)</script>'
    run.gate["pipeline"] = run.gate["verdicts"][0]["message"] = run.gate["verdicts"][0]["at"] = hostile
    run.gate["places"][hostile] = run.gate["places"].pop("onnx")
    run.plans["fp16"]["keep"][0]["node"] = run.plans["fp16"]["notes"][0] = hostile
    run.plans["fp16"]["half"][0] = f"{hostile}/a/b"
    run.gate["environment"][hostile] = [hostile]
    text = _render(run)
    Page(text)
    assert "<script" not in text


def test_missing_plans_history_golden_and_evidence_leave_a_page_that_says_so(make_run):
    run = make_run()
    run.directory.drop("10-train")
    (run.directory.path / "evidence/index.json").unlink()
    page = Page(render_html(run.directory, run.gate))
    assert "There is no readable evidence" in page.sections["gates"]
    assert "trained nothing" in page.sections["training"]
    assert "No model was converted" in page.sections["precision"]
    assert "No per-sample drift" in page.sections["samples"]
    assert "drift-fp16" in page.sections["gates"]


def test_a_run_without_anything_still_renders(make_run, tmp_path):
    run = make_run()
    gate = {**run.gate, "verdicts": [], "places": {}, "unvalidated": [], "verdict": "inconclusive", "environment": {}}
    page = Page(render_html(run.directory, gate))
    assert "No gate was decided" in page.sections["gates"]
    assert "No drift was measured" in page.sections["drift"]


def test_the_page_stays_under_three_megabytes_with_large_evidence(make_run):
    run = make_run()
    run.plans["fp16"]["keep"] = [{"node": f"n{n}", "op": "Add", "reason": "x" * 200} for n in range(5000)]
    run.plans["fp16"]["half"] = [f"block{n}/layer/{n}" for n in range(5000)]
    run.gate["verdicts"] = [dict(run.gate["verdicts"][0], id=f"gate{n}") for n in range(500)]
    text = _render(run)
    assert len(text.encode()) < 3_000_000
    assert "and 4700 more in plan.json" in text
    assert re.search(r"and [\d,]+ more nodes in [\d,]+ more blocks", text)


def test_the_same_run_gives_the_same_page(make_run):
    run = make_run(broken=True)
    assert _render(run) == _render(run)


def test_a_page_that_cannot_be_written_leaves_the_old_one_whole(make_run, monkeypatch):
    run = make_run()
    path = run.directory.path / "report.html"
    path.write_text("the old page")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_html(path, run.directory, run.gate)
    assert path.read_text() == "the old page"
    assert [item.name for item in path.parent.glob(".report*")] == []


# -- pictures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8), (8, 8, 3), (3, 224, 224)])
def test_a_sample_that_looks_like_a_picture_becomes_a_png(shape):
    sample = np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    content = b64decode(picture_of(sample).partition(",")[2])
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    channels = 3 if 3 in shape else 1
    rows = zlib.decompress(content[content.index(b"IDAT") + 4 : content.index(b"IEND") - 8])
    assert len(rows) == height * (1 + width * channels)
    assert max(width, height) <= 64
    assert (rows[1], rows[-1]) == (0, 255)


@pytest.mark.parametrize(
    "sample", [np.zeros(10), np.zeros((8, 8), np.int64), np.zeros((5, 8, 8)), np.zeros((3, 2, 2)), np.array("text")]
)
def test_a_sample_that_is_no_picture_is_left_alone(sample):
    assert picture_of(sample) is None


def test_a_picture_of_nan_and_of_a_single_colour_does_not_fail():
    assert picture_of(np.full((8, 8), np.nan)) is not None
    assert picture_of(np.full((1, 8, 8), 3.0)) is not None

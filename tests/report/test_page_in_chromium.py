"""The page in a real browser: nothing on its console, no request, no sideways scrolling on a phone, dark where asked."""

import json

import pytest
from chromium import CHROMIUM, Chromium

from mpdeploy.report.html import write_html
from mpdeploy.report.pair import render_pair

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork in a process that has threads
]
SECTIONS = ["gates", "drift", "accuracy", "samples", "latency", "training", "precision", "engines", "reproduce"]


@pytest.fixture(scope="module")
def browser():
    with Chromium() as chromium:
        yield chromium


@pytest.fixture
def page(make_run):
    def write(**options):
        run = make_run(**options)
        path = run.directory.path / "report.html"
        write_html(path, run.directory, run.gate, plans=run.plans, golden=run.golden)
        return path

    return write


def _background(browser, selector):
    return json.loads(
        browser.evaluate(
            f"JSON.stringify(getComputedStyle(document.querySelector('{selector}')).backgroundColor.match(/\\d+/g).map(Number))"
        )
    )


@pytest.mark.parametrize("broken", [False, True])
def test_the_console_stays_empty_and_every_section_is_filled(browser, page, broken):
    browser.open(page(broken=broken))
    assert browser.errors == []
    found = browser.evaluate("[...document.querySelectorAll('section')].map(s => [s.id, s.innerText.length])")
    assert [name for name, _ in found] == SECTIONS
    assert all(length > 80 for _, length in found), found
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
    assert browser.evaluate("document.querySelectorAll('svg').length") > 30


def test_the_console_check_can_fail(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<script>nonsense()</script><img src='http://127.0.0.1:9/x.png'>")
    browser.open(bad)
    assert any("nonsense" in error for error in browser.errors)
    assert any("127.0.0.1" in error for error in browser.errors)


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_needs_no_sideways_scrolling(browser, page, dark):
    browser.open(page(broken=True), width=390, height=844, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.evaluate(
        "[...document.querySelectorAll('section')].every(s => s.getBoundingClientRect().right <= 390)"
    )


def test_dark_is_dark_and_light_is_light(browser, page):
    path = page()
    browser.open(path)
    assert min(_background(browser, "body")) > 200
    browser.open(path, dark=True)
    assert max(_background(browser, "body")) < 60


def test_a_failing_run_looks_failed_at_first_sight(browser, page):
    browser.open(page(broken=True), height=700)
    red, green, blue = _background(browser, "header")[:3]
    assert red > 2 * max(green, blue)
    box = browser.evaluate(
        "(() => {const b = document.querySelector('header').getBoundingClientRect(); return [b.top, b.width, b.height]})()"
    )
    assert box[0] == 0
    assert box[1] >= 1000
    assert box[2] >= 200
    assert browser.evaluate("document.querySelector('h1').innerText").startswith("✕ FAIL")
    assert browser.evaluate("document.querySelector('.stack .chip').innerText.trim()").endswith("fail")


def test_an_unvalidated_engine_stands_in_the_header(browser, page):
    browser.open(page())
    assert "Not a pass for engine/tensorrt-rtx" in browser.evaluate("document.querySelector('header').innerText")


def test_every_scrolling_table_is_reached_by_keyboard(browser, page):
    browser.open(page(), width=390)
    assert browser.evaluate(
        "[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0 && e.getAttribute('aria-label'))"
    )
    assert browser.evaluate("(document.querySelector('.skip').focus(), document.activeElement.hash)") == "#gates"


def test_two_runs_on_one_page(browser, make_run):
    before, after = make_run(name="before"), make_run(name="after", broken=True)
    path = after.directory.path / "pair.html"
    path.write_text(render_pair(before.directory, after.directory, before.gate, after.gate))
    for width, dark in ((1100, False), (390, True)):
        browser.open(path, width=width, dark=dark)
        assert browser.errors == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert "Compared with before: PASS" in browser.evaluate("document.querySelector('header').innerText")

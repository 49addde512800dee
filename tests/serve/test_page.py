"""The page at `/` in a real browser: it shows the model, takes a drawing, and asks nobody but its own server."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from served import FLOAT, make_run, model_of, serving

_SPEC = importlib.util.spec_from_file_location("chromium", Path(__file__).parent.parent / "report" / "chromium.py")
assert _SPEC is not None
assert _SPEC.loader is not None
chromium = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(chromium)

pytestmark = pytest.mark.skipif(chromium.CHROMIUM is None, reason="needs Chromium")

DRAW = """(() => {
  const canvas = document.getElementById("canvas"), box = canvas.getBoundingClientRect();
  canvas.setPointerCapture = () => {};
  const send = (name, [x, y]) => canvas.dispatchEvent(
    new PointerEvent(name, {clientX: box.left + x, clientY: box.top + y, pointerId: 1, bubbles: true}));
  const points = %s;
  send("pointerdown", points[0]);
  points.slice(1).forEach(point => send("pointermove", point));
  send("pointerup", points[points.length - 1]);
})()"""


class Url:
    """What `Chromium.open` wants of a path."""

    def __init__(self, url: str) -> None:
        self._url = url

    def resolve(self) -> Url:
        return self

    def as_uri(self) -> str:
        return self._url


def halves_model() -> onnx.ModelProto:
    """image [n, 1, 8, 8] -> logits [n, 2]: how much ink is in the upper and in the lower half."""
    weights = np.zeros((64, 2), np.float32)
    weights[:32, 0] = weights[32:, 1] = 0.25
    return model_of(
        [
            helper.make_node("Flatten", ["image"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        {"image": (FLOAT, ["n", 1, 8, 8])},
        {"logits": (FLOAT, ["n", 2])},
        {"weights": weights},
    )


def until(page: Any, expression: str) -> Any:
    deadline = time.monotonic() + 30
    while not (found := page.evaluate(expression)):
        assert time.monotonic() < deadline, expression
        time.sleep(0.1)
    return found


def text(page: Any, name: str) -> str:
    return str(page.evaluate(f"document.getElementById('{name}').textContent"))


def test_the_page_shows_the_model_and_takes_a_drawing_and_json(tmp_path):
    run = make_run(tmp_path / "run", halves_model(), name="halves")
    with serving(run) as served, chromium.Chromium() as page:
        page.open(Url(served.document["url"] + "/"), width=390)
        until(page, "document.getElementById('title').textContent === 'halves'")
        assert text(page, "verdict") == "pass"
        assert "image: FP32 [?, 1, 8, 8]" in text(page, "model")
        # a pear: more ink below than above
        page.evaluate(DRAW % json.dumps([[128, 60], [128, 140], [60, 200], [200, 200], [60, 190], [190, 190]]))
        until(page, "document.querySelectorAll('#bars li').length === 2")
        assert "logits is highest for 1" in text(page, "took")
        # the same as JSON, and a mistake in it
        page.evaluate("document.getElementById('as-json').click()")
        shown = json.loads(page.evaluate("document.getElementById('json').value"))
        image = np.array(shown["inputs"][0]["data"]).reshape(8, 8)
        assert image[4:].sum() > image[:4].sum() > 0
        assert image.max() <= 1
        shown["inputs"][0]["shape"] = [1, 1, 8, 9]
        page.evaluate(f"document.getElementById('json').value = {json.dumps(json.dumps(shown))}")
        page.evaluate("document.getElementById('send').click()")
        refused = until(
            page, "!document.getElementById('refused').hidden && document.getElementById('refused').textContent"
        )
        assert "takes 72 elements, 'data' has 64" in refused
        # figures are polled
        until(page, "/Answered1/.test(document.getElementById('figures').textContent)")
        until(page, "/Failed0|Failed1/.test(document.getElementById('figures').textContent)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        foreign = [fault for fault in page.errors if served.document["url"] not in fault and "400" not in fault]
        assert foreign == []


@pytest.mark.slow
def test_a_server_with_a_token_asks_for_it(tmp_path):
    run = make_run(tmp_path / "run", halves_model(), name="halves")
    token = "correct horse battery"
    with serving(run, env={"MPDEPLOY_SERVE_TOKEN": token}) as served, chromium.Chromium() as page:
        page.open(Url(served.document["url"] + "/"), dark=True)
        until(page, "!document.getElementById('login').hidden")
        page.evaluate(f"document.getElementById('token').value = '{token}'")
        page.evaluate("document.querySelector('#token-form button').click()")
        until(page, "document.getElementById('title').textContent === 'halves'")
        assert page.evaluate("document.getElementById('login').hidden")

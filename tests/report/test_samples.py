"""The samples that changed most: pictures or texts, class names, both answers and both margins."""

import json

import numpy as np
import pytest

from mpdeploy.artifact import Dataset, FileArtifact
from mpdeploy.config import ValidationConfig
from mpdeploy.errors import DataError
from mpdeploy.files import write_json
from mpdeploy.gates.changes import most_changed
from mpdeploy.gates.evidence import Evidence
from mpdeploy.report.html import render_html
from mpdeploy.report.samples import changed_samples
from mpdeploy.run_dir import StageRecord
from mpdeploy.stages.command import command_of
from mpdeploy.stages.user_metrics import sample_texts


@pytest.fixture
def evidence(make_run):
    run = make_run(broken=True)
    return run, Evidence.load(run.directory.path / "evidence")


def test_the_sample_that_was_lost_and_those_that_flipped_come_first(evidence):
    _, found = evidence
    order = most_changed(found.places["engine/openvino"], 50)
    assert order[0] == 17, "its answer holds a NaN, and its class flipped"
    assert set(order[:40]) == set(range(40)), "40 flipped"


def test_answers_are_named_and_margins_stand_on_both_sides(evidence):
    run, found = evidence
    place = found.places["engine/openvino"]
    margins = {"margins": np.full(200, 0.25), "baseline_margins": np.full(200, 1.5)}
    changed = Evidence({"x": type(place)(**{**place.__dict__, "arrays": {**place.arrays, **margins}})}, {}, {})
    names = [f"class {number}" for number in range(10)]
    shown = changed_samples(changed, run.golden, texts={"1017": "the text of 17"}, classes=names)
    assert shown is not None
    first = shown["cards"][0]
    assert (first["id"], first["text"], first["error"]) == (1017, "the text of 17", "lost")
    assert first["before"].startswith("class ")
    assert (first["margin_before"], first["margin_after"]) == ("1.5", "0.25")


def test_texts_of_the_evidence_are_on_the_page_unless_they_were_changed(evidence):
    run, _ = evidence
    path = run.directory.folder("evidence") / "samples.json"
    write_json(path, {"texts": {"1017": "it was a <dark> night"}})
    run.directory.put(StageRecord("50-validate", "done", {}, {"samples": FileArtifact.of(path)}))
    assert "it was a &lt;dark&gt; night" in render_html(run.directory, run.gate)
    path.write_text(json.dumps({"texts": {"1017": "it was noon"}}))
    page = render_html(run.directory, run.gate)
    assert "noon" not in page
    assert "night" not in page


def test_only_the_samples_that_changed_most_are_described(evidence):
    _, found = evidence
    data = Dataset({"tokens": np.arange(200)[:, None]}, np.arange(200) + 1000)
    asked = []

    def words(dataset):
        asked.append(len(dataset))
        return [f"sample {number}" for number in dataset.ids]

    places = list(found.places.values())
    texts = sample_texts(ValidationConfig(describe_samples=words), data, places)
    assert texts["1017"] == "sample 1017"
    assert asked == [len(texts)]
    assert 12 <= len(texts) <= 12 * len(places)
    assert sample_texts(ValidationConfig(), data, places) == {}


@pytest.mark.parametrize("wrong", [lambda data: "one text", lambda data: ["a"], lambda data: None])
def test_what_is_not_one_text_a_sample_is_refused(evidence, wrong):
    _, found = evidence
    data = Dataset({"tokens": np.arange(200)[:, None]}, np.arange(200) + 1000)
    with pytest.raises(DataError, match="describe_samples returned"):
        sample_texts(ValidationConfig(describe_samples=wrong), data, list(found.places.values()))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("/usr/bin/mpdeploy train-and-export p.py --run r --from 50-validate --json", "mpdeploy train-and-export p.py --run r"),
        ("/x/__main__.py train-and-export p.py --from=40-build --set a=1", "mpdeploy train-and-export p.py --set a=1"),
        ("/usr/bin/mpdeploy gate r", None),
        ("pytest train-and-export p.py", None),
        ("mpdeploy", None),
    ],
)  # fmt: skip
def test_the_command_of_a_run_is_what_was_typed_less_what_is_not_of_the_run(arguments, expected):
    found = command_of(arguments.split())
    assert (None if found is None else " ".join(found)) == expected

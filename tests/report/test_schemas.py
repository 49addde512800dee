"""The published schemas are those of the code, and accept what is written and nothing else."""

import json
from pathlib import Path

import pytest
from json_schema import faults

import mpdeploy.report.schemas as published
from mpdeploy.config import DEFAULT_GATES


@pytest.fixture
def documents(make_run):
    run = make_run(broken=True)
    run.directory.set_header(
        pipeline="digits",
        config={},
        gates=[gate.to_json() for gate in DEFAULT_GATES],
        environment={},
        chosen_engine=None,
    )
    folder = run.directory.path
    return {
        "gate.schema.json": json.loads((folder / "gate.json").read_text()),
        "run.schema.json": json.loads((folder / "run.json").read_text()),
    }


@pytest.mark.parametrize("name", published.SCHEMAS)
def test_the_published_file_is_what_the_code_says(name):
    path = Path(published.__file__).parent / name
    assert path.read_text(encoding="utf-8") == published.schema_text(name), "run python -m mpdeploy.report.schemas"


@pytest.mark.parametrize("name", published.SCHEMAS)
def test_a_run_follows_its_schema(documents, name):
    assert faults(documents[name], published.SCHEMAS[name]) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gate.schema.json", lambda value: value.update(verdict="ok")),
        ("gate.schema.json", lambda value: value["verdicts"][0].pop("slice")),
        ("gate.schema.json", lambda value: value["places"]["onnx"].update(extra=1)),
        ("run.schema.json", lambda value: value.update(schema=2)),
        ("run.schema.json", lambda value: value["stages"]["10-train"].update(status="ok")),
        ("run.schema.json", lambda value: value["stages"]["10-train"].pop("seconds")),
        ("run.schema.json", lambda value: value["stages"]["40-build/openvino"]["artifacts"]["engine"].pop("sha256")),
        ("run.schema.json", lambda value: value["gates"][0].update(limit="small")),
    ],
)
def test_a_schema_refuses_what_is_not_written(documents, name, change):
    change(documents[name])
    assert faults(documents[name], published.SCHEMAS[name])


def test_the_schemas_can_be_written_anew(tmp_path):
    assert {path.name for path in published.write_schemas(tmp_path)} == set(published.SCHEMAS)

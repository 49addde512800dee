"""What a pipeline file returns, and what `--set` may do to it."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

from mpdeploy.config import (
    DEFAULT_GATES,
    BuildConfig,
    ConvertConfig,
    DataConfig,
    ExportConfig,
    Gate,
    Pipeline,
    TrainConfig,
    ValidationConfig,
    apply_overrides,
    load_pipeline,
)
from mpdeploy.errors import ConfigError, UserCodeError
from mpdeploy.gates.metrics import METRICS


def network() -> None:
    """Stands for a model."""


def load(config: DataConfig) -> None:
    """Stands for data."""


def a_pipeline(**changes) -> Pipeline:
    train = TrainConfig(model=network, cpu_precision="bf16")
    return Pipeline(**{"name": "digits", "data": DataConfig(load=load), "train": train, **changes})


def limit_of(pipeline: Pipeline, gate_id: str) -> float:
    return next(gate.limit for gate in pipeline.gates if gate.id == gate_id)


# -- the config itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [None, "data", "train", "export", "convert", "build", "validation"])
def test_every_section_is_frozen(section):
    pipeline = a_pipeline()
    target = pipeline if section is None else getattr(pipeline, section)
    field = next(iter(type(target).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(target, field, getattr(target, field))


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: TrainConfig(model=network, epochs=0), "epochs"),
        (lambda: TrainConfig(model=network, learning_rate=-1.0), "learning_rate"),
        (lambda: TrainConfig(model=network, precision="int8"), "precision"),
        (lambda: TrainConfig(model=network, epoch=3), "epoch"),
        (lambda: TrainConfig(), "model"),
        (lambda: TrainConfig(model="DigitsCnn"), "model"),
        (lambda: BuildConfig(profile=(8, 1, 32)), "batches must rise"),
        (lambda: BuildConfig(profile=(0, 1, 2)), "batches must rise"),
        (lambda: a_pipeline(name="../escape"), "name"),
        (lambda: a_pipeline(gates=(Gate(id="a", metric="rel_l2", limit=1), Gate(id="a", metric="cosine", limit=1))), "repeat"),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_refused_where_it_is_declared(make, fault):
    with pytest.raises(ValidationError, match=fault):
        make()


def test_every_field_says_what_it_is():
    sections = [TrainConfig, DataConfig, ExportConfig, ConvertConfig, BuildConfig, ValidationConfig, Gate]
    bare = [f"{section.__name__}.{name}" for section in sections
            for name, field in section.model_fields.items() if not field.description]  # fmt: skip
    assert bare == []


def test_the_config_becomes_plain_json_with_functions_by_name_and_source():
    value = a_pipeline().to_json()
    assert json.loads(json.dumps(value)) == value
    assert value["train"]["model"]["function"].endswith(":network")
    assert len(value["train"]["model"]["source"]) == 16
    assert value["train"]["epochs"] == 20
    assert value["gates"][0]["id"] == "finite"


def test_two_configs_that_differ_have_different_json():
    assert a_pipeline().to_json() == a_pipeline().to_json()
    assert apply_overrides(a_pipeline(), ['convert.keep=["op:Softmax"]']).to_json() != a_pipeline().to_json()


def test_gates_read_back_from_the_json_that_the_manifest_holds():
    assert tuple(Gate(**gate.to_json()) for gate in DEFAULT_GATES) == DEFAULT_GATES


def test_every_default_gate_names_a_metric_that_exists():
    assert {gate.metric for gate in DEFAULT_GATES} <= set(METRICS)


def test_the_default_limits_are_those_of_the_design():
    by_id = {gate.id: gate for gate in DEFAULT_GATES}
    assert (by_id["drift-fp16"].limit, by_id["drift-bf16"].limit, by_id["accuracy"].limit) == (1e-2, 5e-2, 0.02)
    assert by_id["finite"].limit == 0
    assert [gate.id for gate in DEFAULT_GATES if gate.advisory] == ["latency"]


# -- --set -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("train.epochs=3", lambda p: p.train.epochs, 3),
        ("train.learning_rate=1e-3", lambda p: p.train.learning_rate, 1e-3),
        ("train.precision=bf16", lambda p: p.train.precision, "bf16"),
        ("train.cpu_precision=null", lambda p: p.train.cpu_precision, None),
        ("train.channels_last=true", lambda p: p.train.channels_last, True),
        ("train.max_grad_norm=null", lambda p: p.train.max_grad_norm, None),
        ('build.engines=["openvino","onnxruntime"]', lambda p: p.build.engines, ("openvino", "onnxruntime")),
        ("build.profile=[1,4,16]", lambda p: p.build.profile, (1, 4, 16)),
        ("data.folder=/data/digits", lambda p: p.data.folder, "/data/digits"),
        ("data.folder=a=b", lambda p: p.data.folder, "a=b"),
        ("data.folder=2024", lambda p: p.data.folder, "2024"),
        ("name=other", lambda p: p.name, "other"),
        ("validation.metric=top5", lambda p: p.validation.metric, "top5"),
        ("gates.accuracy.limit=0.5", lambda p: limit_of(p, "accuracy"), 0.5),
        ("gates.drift-fp16.limit=1e-9", lambda p: limit_of(p, "drift-fp16"), 1e-9),
    ],
)
def test_set_replaces_one_field(override, read, expected):
    before = a_pipeline()
    after = apply_overrides(before, [override])
    assert read(after) == expected
    assert type(read(after)) is type(expected)
    assert read(before) != expected
    assert apply_overrides(before, []) == before


def test_set_of_one_gate_leaves_the_others():
    after = apply_overrides(a_pipeline(), ["gates.accuracy.limit=0.5", "gates.accuracy.advisory=true"])
    changed = [gate for gate in after.gates if gate not in DEFAULT_GATES]
    assert changed == [Gate(id="accuracy", metric="score_drop", limit=0.5, advisory=True)]


def test_the_last_set_of_a_field_wins():
    assert apply_overrides(a_pipeline(), ["train.epochs=3", "train.epochs=4"]).train.epochs == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=three", "unable to parse string as an integer"),
        ("train.epochs=0", "greater than or equal to 1"),
        ("train.epochs=2.5", "valid integer"),
        ("train.epochs=", "integer"),
        ("train.precision=int8", "'auto', 'fp32', 'tf32', 'bf16' or 'fp16'"),
        ("train.channels_last=perhaps", "valid boolean"),
        ("build.profile=[8,1,32]", "batches must rise"),
        ("build.profile=8", "valid tuple"),
        ("train.model=DigitsCnn", "callable"),
        ("gates.accuracy.limit=low", "valid number"),
        ("train.epochs", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("train=3", "'train' has no such part"),
        ("train.epochs.more=3", "'epochs' has no such part"),
        ("gates.accuracy=3", "no gate 'accuracy' with such a field"),
    ],
)
def test_a_set_that_cannot_be_is_refused_with_the_reason(override, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(a_pipeline(), [override])
    assert message in caught.value.message
    assert f"--set {override.split('=')[0]}" in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("train.epoch=3", "epochs"),
        ("trian.epochs=3", "train.epochs"),
        ("train.learningrate=1", "learning_rate"),
        ("gates.acuracy.limit=1", "accuracy"),
        ("gates.accuracy.limits=1", "limit"),
        ("epochs=3", "train.epochs"),
    ],
)
def test_a_misspelt_key_gets_a_suggestion(override, suggestion):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(a_pipeline(), [override])
    closest = str(caught.value).rpartition("closest")[2]
    assert suggestion in closest


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        apply_overrides(a_pipeline(), ["train.epochs=x", "train.lr=1", "nonsense", "train.batch_size=8"])
    lines = caught.value.message.splitlines()
    assert [line.split(":")[0] for line in lines] == ["--set train.epochs=x", "--set train.lr", "--set nonsense"]


# -- loading a file ----------------------------------------------------------------------------------------------------


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(text))
    return path


GOOD = """
from mpdeploy.config import DataConfig, Pipeline, TrainConfig

def network(): ...
def load(config): ...

def pipeline():
    return Pipeline(name="mine", data=DataConfig(load=load), train=TrainConfig(model=network, epochs=3))
"""


def test_a_pipeline_file_gives_its_pipeline(tmp_path):
    pipeline = load_pipeline(write(tmp_path, GOOD))
    assert (pipeline.name, pipeline.train.epochs) == ("mine", 3)


def test_a_pipeline_file_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "choices_beside.py").write_text("EPOCHS = 7")
    path = write(tmp_path, "from choices_beside import EPOCHS\n" + GOOD.replace("epochs=3", "epochs=EPOCHS"))
    assert load_pipeline(path).train.epochs == 7


def test_a_pipeline_file_that_was_edited_is_read_again(tmp_path):
    assert load_pipeline(write(tmp_path, GOOD)).train.epochs == 3
    assert load_pipeline(write(tmp_path, GOOD.replace("epochs=3", "epochs=44"))).train.epochs == 44


def test_a_missing_pipeline_file_suggests_the_closest(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(ConfigError, match="There is no pipeline file") as caught:
        load_pipeline(tmp_path / "mien.py")
    assert "mine.py" in (caught.value.hint or "")


def test_a_missing_pipeline_file_in_a_folder_without_any_says_how_to_write_one(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_pipeline(tmp_path / "nowhere" / "mine.py")
    assert "mpdeploy init" in (caught.value.hint or "")


def test_a_folder_is_no_pipeline_file(tmp_path):
    with pytest.raises(ConfigError, match="There is no pipeline file"):
        load_pipeline(tmp_path)


def test_a_file_that_is_not_python_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text(GOOD)
    with pytest.raises(UserCodeError, match="is not a Python file"):
        load_pipeline(tmp_path / "mine.txt")


@pytest.mark.parametrize("text", ["x = 3\n", "pipeline = 3\n"])
def test_a_file_without_a_pipeline_function_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="defines no function 'pipeline'"):
        load_pipeline(write(tmp_path, text))


@pytest.mark.parametrize(("value", "name"), [("None", "NoneType"), ("{'train': 3}", "dict"), ("3", "int")])
def test_a_pipeline_function_that_returns_something_else_is_refused(tmp_path, value, name):
    with pytest.raises(ConfigError, match=rf"pipeline\(\) returned {name}, expected mpdeploy.config.Pipeline"):
        load_pipeline(write(tmp_path, f"def pipeline():\n    return {value}\n"))


def test_every_fault_in_a_pipeline_is_told_at_once_with_its_place(tmp_path):
    text = GOOD.replace("epochs=3", "epochs=0, batch_size='many', epoch=4")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(write(tmp_path, text))
    assert [line.split(":")[0].strip() for line in caught.value.message.splitlines()[1:]] == [
        "epochs",
        "batch_size",
        "epoch",
    ]


def test_a_syntax_error_shows_their_line(tmp_path):
    with pytest.raises(UserCodeError) as caught:
        load_pipeline(write(tmp_path, GOOD + "\ndef broken(:\n    pass\n"))
    assert caught.value.exit_code == 20
    assert "def broken(:" in caught.value.message
    assert "mine.py" in caught.value.message
    assert_shows_only_their_code(caught.value.message)


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("import missing_library_xyz\n", 1, "ModuleNotFoundError"),
        ("x = 1\ny = x / 0\n", 2, "ZeroDivisionError"),
        ("def pipeline():\n    return helper()\ndef helper():\n    raise KeyError('digits')\n", 4, "KeyError"),
        ("import json\ndef pipeline():\n    return json.loads('{')\n", 3, "JSONDecodeError"),
    ],
)
def test_an_exception_in_their_code_shows_their_traceback_and_not_ours(tmp_path, text, line, named):
    with pytest.raises(UserCodeError) as caught:
        load_pipeline(write(tmp_path, text))
    message = caught.value.message
    assert message.startswith(f"mine.py, line {line}, raised {named}")
    assert f'mine.py", line {line}, in' in message
    assert caught.value.hint == "this comes from your own code, not from mpdeploy"
    assert_shows_only_their_code(message)


def assert_shows_only_their_code(message: str) -> None:
    """Nothing of mpdeploy's own files, and nothing of the import system, stands in the traceback."""
    import mpdeploy

    assert str(Path(mpdeploy.__file__).parent) not in message
    assert "importlib" not in message


def test_ctrl_c_while_a_pipeline_file_loads_is_ctrl_c(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        load_pipeline(write(tmp_path, "raise KeyboardInterrupt\n"))


def test_a_pipeline_file_that_ends_the_process_is_a_fault_of_theirs(tmp_path):
    with pytest.raises(UserCodeError, match="SystemExit"):
        load_pipeline(write(tmp_path, "import sys\nsys.exit(0)\n"))


def test_an_entry_of_a_mapping_is_set_by_its_name() -> None:
    changed = apply_overrides(a_pipeline(), ["build.options.tensorrt.tf32=true", "build.options.openvino.threads=2"])
    assert changed.build.options == {"tensorrt": {"tf32": True}, "openvino": {"threads": 2}}
    again = apply_overrides(changed, ["build.shortest.sequence=4"])
    assert again.build.shortest == {"sequence": 4}

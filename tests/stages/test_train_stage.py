"""10-train as a stage: what it hands on, what it never looks at, and that what `auto` chose is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mpdeploy.artifact import Checkpoint, Dataset
from mpdeploy.config import DataConfig, Gate, Pipeline, TrainConfig
from mpdeploy.errors import ConfigError, DataError, MissingExtraError, UserCodeError
from mpdeploy.gates.evidence import Evidence, Place
from mpdeploy.gates.gate import decide
from mpdeploy.pipeline import Context, Outcome, Silent
from mpdeploy.run_dir import RunDir
from mpdeploy.stages.train import TrainStage
from mpdeploy.train import precision as train_precision
from mpdeploy.train.data import load_digits
from mpdeploy.train.splits import Splits

FEATURES, CLASSES = 16, 4
SIZES = {"train": (0, 96), "early_stopping": (1000, 32), "calibration": (2000, 32), "gate": (3000, 32)}
SEEN: set[int] = set()


def blobs(first_id: int, count: int) -> Dataset:
    """Points around four centres; a sample's id is written into its last feature, times 1e-6."""
    rng = np.random.default_rng(first_id)
    labels = np.arange(count) % CLASSES
    centres = np.random.default_rng(7).normal(size=(CLASSES, FEATURES)) * 2
    inputs = (centres[labels] + rng.normal(size=(count, FEATURES))).astype(np.float32)
    ids = np.arange(first_id, first_id + count)
    inputs[:, -1] = ids * 1e-6
    return Dataset({"x": inputs}, ids, labels.astype(np.int64))


def load(config: DataConfig) -> Splits:
    return Splits(**{name: blobs(*of) for name, of in SIZES.items()})


def load_without_labels(config: DataConfig) -> Splits:
    bare = blobs(0, 96)
    return Splits(**{**load(config).__dict__, "train": Dataset(bare.inputs, bare.ids)})


class Watched(nn.Module):
    """Linear layers (FP16 convolutions on a CPU are 50 times slower) that write down which samples they saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SEEN.update(round(float(value) * 1e6) for value in x[:, -1].detach().float())
        return self.layers(x)


def a_pipeline(*, data: Any = load, folder: str | None = None, **train: Any) -> Pipeline:
    fields = {"model": Watched, "epochs": 2, "batch_size": 32, "cpu_precision": "fp32", **train}
    return Pipeline(name="test", data=DataConfig(load=data, folder=folder), train=TrainConfig(**fields))


def go(path: Path, pipeline: Pipeline, listener: Silent | None = None) -> Outcome:
    with RunDir.create(path) as run:
        run.set_header(pipeline=pipeline.name)
        return TrainStage().run(Context(run, pipeline, listener or Silent(), TrainStage.name))


def key(path: Path, pipeline: Pipeline) -> dict[str, Any]:
    return TrainStage().key(Context(RunDir(path), pipeline, Silent()))


class StopsAt(Silent):
    """Interrupts at the first progress whose text begins so."""

    def __init__(self, text: str) -> None:
        self.text = text

    def stage_progress(self, name: str, done: int, total: int, text: str) -> None:
        if text.startswith(self.text):
            raise KeyboardInterrupt


def test_it_hands_on_weights_ranges_and_a_reference(tmp_path):
    outcome = go(tmp_path, a_pipeline(cpu_precision="bf16"))
    assert {name: type(item) for name, item in outcome.artifacts.items()} == {
        "model": Checkpoint, "amax": type(outcome.artifacts["amax"]), "reference": Checkpoint,
    }  # fmt: skip
    assert outcome.artifacts["model"].sidecar == {"trained_in": "bf16"}
    assert outcome.artifacts["model"].sha256 != outcome.artifacts["reference"].sha256
    assert outcome.report["splits"] == {"train": 96, "early_stopping": 32, "calibration": 32, "gate": 32}
    assert len(outcome.report["history"]) == len(outcome.report["reference_history"]) == 2


def test_fp32_training_and_its_reference_are_the_same_weights(tmp_path):
    artifacts = go(tmp_path, a_pipeline()).artifacts
    from safetensors.torch import load_file

    model, reference = (load_file(artifacts[name].path) for name in ("model", "reference"))
    assert all(torch.equal(model[name], reference[name]) for name in reference)


def test_without_a_reference_there_is_none(tmp_path):
    outcome = go(tmp_path, a_pipeline(reference=False))
    assert set(outcome.artifacts) == {"model", "amax"}
    assert outcome.report["reference_history"] is None


def test_training_sees_no_sample_of_the_gates_nor_of_calibration(tmp_path):
    SEEN.clear()
    go(tmp_path, a_pipeline(cpu_precision="bf16"))
    allowed = {*range(96), *range(1000, 1032)}
    assert allowed == SEEN


def test_ranges_are_of_the_shipped_weights_in_fp32_over_the_training_split(tmp_path):
    outcome = go(tmp_path, a_pipeline(cpu_precision="bf16"))
    ranges = json.loads(outcome.artifacts["amax"].path.read_text())["modules"]
    from mpdeploy.train.checkpoint import load_weights

    model = Watched().eval()
    load_weights(model, outcome.artifacts["model"].path)
    with torch.no_grad():
        answers = model(torch.from_numpy(blobs(0, 96).inputs["x"]))
    assert set(ranges) == {"layers.0", "layers.1", "layers.2"}
    assert ranges["layers.2"] == pytest.approx(float(answers.abs().max()), rel=1e-6)


def tiny_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, labels) * 2.0**-14


@pytest.mark.parametrize(("scaling", "expected"), [("none", "fail"), ("dynamic", "pass")])
def test_gradients_that_vanish_in_fp16_fail_the_gradient_underflow_gate(tmp_path, scaling, expected):
    pipeline = a_pipeline(cpu_precision="fp16", loss=tiny_loss, loss_scaling=scaling)
    report = go(tmp_path, pipeline).report
    gate = next(gate for gate in pipeline.gates if gate.id == "gradient-underflow")
    place = Place(
        "parity", "fp32", "10-train",
        facts={"excess_zero_gradients": report["excess_zero_gradients"]}, arrays={"ids": np.arange(32)},
    )  # fmt: skip
    verdict = decide([gate], Evidence({"parity": place}, {}, {}))[0]
    assert verdict.verdict == expected
    if scaling == "none":
        assert report["num_skipped"] == 0, "nothing else tells"


# -- the choice ----------------------------------------------------------------------------------------------------------


def once(monkeypatch, *answers: str) -> list[str]:
    """Let choosing answer so, one after the other; returns what was answered."""
    given: list[str] = []

    def choose(config, device, run_step):
        run_step("bf16")
        given.append(answers[len(given)])
        return train_precision.PrecisionChoice(given[-1], device, "the test says so", {"fp32": 1.0, "bf16": 2.0})

    monkeypatch.setattr(train_precision, "choose_precision", choose)
    return given


@pytest.mark.parametrize("moment", ["AMP", "FP32 reference", "comparing gradients"])
def test_what_auto_chose_is_kept_when_an_interrupted_run_goes_on(tmp_path, monkeypatch, moment):
    asked = once(monkeypatch, "bf16", "fp32")
    pipeline = a_pipeline(cpu_precision=None)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, pipeline, StopsAt(moment))
    choice = go(tmp_path, pipeline).report["choice"]
    assert choice == {
        "precision": "bf16", "device": "cpu", "reason": "the test says so", "step_ms": {"fp32": 1.0, "bf16": 2.0},
    }  # fmt: skip
    assert asked == ["bf16"]


def test_what_auto_chose_is_written_before_the_first_step(tmp_path, monkeypatch):
    once(monkeypatch, "bf16")

    class AtFirstStep(Silent):
        def stage_progress(self, name, done, total, text):
            found = json.loads((tmp_path / "10-train" / "precision.json").read_text())
            assert found["choice"]["precision"] == "bf16"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, a_pipeline(cpu_precision=None), AtFirstStep())


def test_another_config_chooses_anew(tmp_path, monkeypatch):
    asked = once(monkeypatch, "bf16", "fp32")
    go(tmp_path, a_pipeline(cpu_precision=None))
    assert go(tmp_path, a_pipeline(cpu_precision=None, epochs=1)).report["choice"]["precision"] == "fp32"
    assert asked == ["bf16", "fp32"]


@pytest.mark.parametrize("moment", ["AMP bf16, epoch 2", "FP32 reference, epoch 1", "comparing gradients"])
def test_an_interrupted_stage_ends_in_the_same_checkpoints(tmp_path, moment):
    pipeline = a_pipeline(cpu_precision="bf16")
    whole = go(tmp_path / "whole", pipeline).artifacts
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", pipeline, StopsAt(moment))
    resumed = go(tmp_path / "run", pipeline).artifacts
    assert {name: item.sha256 for name, item in whole.items()} == {name: item.sha256 for name, item in resumed.items()}


# -- the key -------------------------------------------------------------------------------------------------------------


def test_the_key_knows_data_and_training_and_nothing_else(tmp_path):
    before = key(tmp_path, a_pipeline())
    assert key(tmp_path, a_pipeline(epochs=3)) != before
    assert key(tmp_path, a_pipeline(data=load_without_labels)) != before
    gates = (Gate(id="accuracy", metric="score_drop", limit=0.5),)
    assert key(tmp_path, a_pipeline().model_copy(update={"gates": gates})) == before
    assert json.loads(json.dumps(before)) == before


def test_a_file_that_changes_in_the_data_folder_changes_the_key(tmp_path):
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.npz").write_text("1")
    pipeline = a_pipeline(folder=str(folder))
    before = key(tmp_path, pipeline)
    assert key(tmp_path, pipeline) == before
    (folder / "deep" / "a.npz").write_text("22")
    assert key(tmp_path, pipeline) != before


def test_a_data_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.folder=.* is not a folder"):
        key(tmp_path, a_pipeline(folder=str(tmp_path / "none")))


# -- bad input -----------------------------------------------------------------------------------------------------------


def load_nothing(config: DataConfig) -> None:
    return None


def load_and_raise(config: DataConfig) -> None:
    raise FileNotFoundError("digits.npz")


def loss_that_raises(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    raise KeyError("theirs")


class RaisesWhenTimed(Watched):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("theirs")


def test_data_that_is_no_splits_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.load returned NoneType, expected mpdeploy\.train\.splits\.Splits"):
        go(tmp_path, a_pipeline(data=load_nothing))


def test_training_data_without_labels_is_refused(tmp_path):
    with pytest.raises(DataError, match="The training split has no labels"):
        go(tmp_path, a_pipeline(data=load_without_labels))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": load_and_raise}, "FileNotFoundError: digits.npz"),
        ({"loss": loss_that_raises, "cpu_precision": None}, "KeyError: 'theirs'"),
        ({"model": RaisesWhenTimed, "cpu_precision": None}, "KeyError: 'theirs'"),
    ],
    ids=["loading data", "the loss while precisions are timed", "the model while precisions are timed"],
)
def test_an_exception_in_the_users_own_functions_is_theirs(tmp_path, changes, named):
    with pytest.raises(UserCodeError, match=r"test_train_stage\.py, line \d+, raised") as caught:
        go(tmp_path, a_pipeline(**changes))
    assert named in caught.value.message


def test_without_torch_the_error_names_the_extra_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match="torch is not installed") as caught:
        go(tmp_path, a_pipeline())
    assert (caught.value.exit_code, caught.value.hint) == (21, "pip install 'mpdeploy[train]'")


def test_without_scikit_learn_the_digits_name_the_extra_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match="scikit-learn is not installed"):
        go(tmp_path, a_pipeline(data=load_digits))

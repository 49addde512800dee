"""Export: what is written is FP32 with a named batch, and answers as torch does at sizes it was never traced at."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from mpdeploy.engines.onnxruntime import OrtRunner
from mpdeploy.errors import StageFailedError, UserCodeError
from mpdeploy.export.handover import tensors_from_modules
from mpdeploy.export.small_constants import small_addends
from mpdeploy.export.to_onnx import (
    PARITY_BATCHES,
    TRACED_BATCH,
    answers_of,
    check_parity,
    dynamic_axes,
    export_onnx,
    named_outputs,
)
from mpdeploy.train.health import ActivationRanges

IMAGES = {"image": np.random.default_rng(0).random((16, 1, 8, 8), dtype=np.float32)}
NAMES = ("logits",)


class Net(nn.Module):
    """image [n, 1, 8, 8] -> logits [n, 10]; the exporter folds its BatchNorm into its convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(256, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.act(self.norm(self.conv(image))).flatten(1)))


class BranchesOnOne(Net):
    def forward(self, image):
        return super().forward(image) * (2 if image.shape[0] == 1 else 1)


class DiffersAtSeven(Net):
    """A batch of seven is never traced: only running it can tell."""

    def forward(self, image):
        answer = super().forward(image)
        return answer * 2 if image.shape[0] == 7 and not torch.compiler.is_exporting() else answer


class Draws(Net):
    def forward(self, image):
        return super().forward(image) + torch.rand(image.shape[0], 10)


class BranchesOnData(Net):
    def forward(self, image):
        return super().forward(image) * (2 if float(image.sum()) > 0 else 1)


class Raises(Net):
    def forward(self, image):
        raise KeyError("theirs")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, path = Net().eval(), tmp_path_factory.mktemp("export") / "model.onnx"
    export_onnx(model, IMAGES, path, opset=20, output_names=NAMES)
    return model, path


def test_the_file_is_whole_fp32_onnx_with_a_named_batch(exported):
    _, path = exported
    onnx.checker.check_model(path, full_check=True)
    graph = ir.load(path).graph
    assert graph.opset_imports[""] == 20
    assert [str(value.shape[0]) for value in (*graph.inputs, *graph.outputs)] == ["batch", "batch"]
    assert ([value.name for value in graph.inputs], [value.name for value in graph.outputs]) == (["image"], ["logits"])
    types = {value.dtype for node in graph for value in node.outputs} | {v.dtype for v in graph.initializers.values()}
    assert types <= {ir.DataType.FLOAT, ir.DataType.INT64}
    assert [item.name for item in path.parent.iterdir()] == ["model.onnx"], "no external data, no half-written file"


def test_dropout_and_batch_norm_are_exported_as_in_eval_mode(exported):
    ops = {node.op_type for node in ir.load(exported[1]).graph}
    assert not ops & {"Dropout", "RandomUniform", "RandomUniformLike", "Bernoulli"}


def test_it_answers_as_torch_does_at_three_batch_sizes_one_of_them_untraced(exported):
    model, path = exported
    found = check_parity(model, path, IMAGES, NAMES, rtol=1e-4)
    assert list(found) == [str(batch) for batch in PARITY_BATCHES]
    assert all(0 < difference < 1e-5 for difference in found.values())
    assert 1 in PARITY_BATCHES
    assert any(batch not in (1, TRACED_BATCH) for batch in PARITY_BATCHES)


def test_a_limit_below_what_is_measured_fails_with_every_number(exported):
    model, path = exported
    with pytest.raises(StageFailedError, match=r"limit is 1e-12 \(batch 1: .*, batch 2: .*, batch 7: ") as caught:
        check_parity(model, path, IMAGES, NAMES, rtol=1e-12)
    assert caught.value.exit_code == 20


def test_another_model_s_file_is_caught(exported):
    other = Net().eval()
    nn.init.zeros_(other.head.bias)
    with pytest.raises(StageFailedError, match="does not answer as torch does"):
        check_parity(other, exported[1], IMAGES, NAMES, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (BranchesOnOne, r"batch 1: 0\.5, batch 2: .*e-\d+, batch 7: .*e-\d+"),
        (DiffersAtSeven, r"batch 2: .*e-\d+, batch 7: 0\.5"),
        (Draws, r"batch 1: [\d.]+, batch 2: [\d.]+, batch 7: [\d.]+"),
    ],
    ids=["at one", "at an untraced size", "by chance"],
)
def test_a_model_that_answers_otherwise_than_it_was_traced_is_caught(tmp_path, model, message):
    net, path = model().eval(), tmp_path / "model.onnx"
    export_onnx(net, IMAGES, path, opset=20, output_names=NAMES)
    with pytest.raises(StageFailedError, match=message) as caught:
        check_parity(net, path, IMAGES, NAMES, rtol=1e-4)
    assert "branch on the batch size" in (caught.value.hint or "")


def test_a_model_that_cannot_be_exported_says_why_and_leaves_no_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with pytest.raises(StageFailedError, match="data-dependent") as caught:
        export_onnx(BranchesOnData().eval(), IMAGES, path, opset=20, output_names=NAMES)
    assert "\x1b" not in caught.value.message
    assert "torch.export.export" in (caught.value.hint or "")
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [("model.onnx", "old")]


def test_a_model_that_raises_shows_its_own_traceback(tmp_path):
    with pytest.raises(UserCodeError, match=r"test_to_onnx\.py, line \d+, raised KeyError: 'theirs'"):
        export_onnx(Raises().eval(), IMAGES, tmp_path / "model.onnx", opset=20, output_names=NAMES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_fp32_are_refused(tmp_path, dtype):
    with pytest.raises(StageFailedError, match="weights that are not FP32"):
        export_onnx(Net().eval().to(dtype), IMAGES, tmp_path / "model.onnx", opset=20, output_names=NAMES)


@pytest.mark.parametrize(("names", "answers"), [(("a", "b"), 1), ((), 1)])
def test_a_wrong_number_of_output_names_is_refused(names, answers):
    with pytest.raises(StageFailedError, match=f"answers {answers} outputs, export.output_names names {len(names)}"):
        answers_of(Net().eval(), IMAGES, names)


class TwoOutputs(Net):
    def forward(self, image):
        answer = super().forward(image)
        return answer, answer.softmax(-1)


def test_answers_come_by_name_and_do_not_depend_on_how_they_are_batched():
    model = TwoOutputs().eval()
    whole, parts = (answers_of(model, IMAGES, ("logits", "share"), batch_size=size) for size in (16, 3))
    assert list(whole) == ["logits", "share"]
    assert whole["share"].sum(axis=1) == pytest.approx(np.ones(16), abs=1e-6)
    for name in whole:
        assert whole[name].dtype == np.float32
        np.testing.assert_allclose(whole[name], parts[name], rtol=1e-5, atol=1e-6)


LENGTH = 12
_rng = np.random.default_rng(1)
TOKENS = {
    "input_ids": _rng.integers(1, 50, (16, LENGTH)),
    "attention_mask": (np.arange(LENGTH) < _rng.integers(1, LENGTH + 1, 16)[:, None]).astype(np.int64),
    "age": _rng.random((16, 3), dtype=np.float32),
}


class Reader(nn.Module):
    """input_ids, attention_mask [n, length], age [n, 3] -> a dict: logits [n, 2], hidden [n, 4], and more that nobody asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(50, 4), nn.Linear(7, 2)

    def forward(self, input_ids, attention_mask, age):
        weight = attention_mask.unsqueeze(-1).float()
        mean = (self.words(input_ids) * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        return {"loss": None, "hidden": mean, "unused": mean * 2, "logits": self.head(torch.cat([mean, age], 1))}


@dataclass
class Answer:
    """What a model may answer instead of a tensor."""

    logits: torch.Tensor
    hidden: torch.Tensor | None = None


def test_several_inputs_and_named_outputs_are_exported_with_batch_and_sequence(tmp_path):
    net, path, names = Reader().eval(), tmp_path / "model.onnx", ("logits", "hidden")
    assert export_onnx(net, TOKENS, path, opset=20, output_names=names) == ()
    graph = ir.load(path).graph
    assert {value.name: [str(axis) for axis in value.shape] for value in (*graph.inputs, *graph.outputs)} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "age": ["batch", "3"],
        "logits": ["batch", "2"],
        "hidden": ["batch", "4"],
    }
    found = check_parity(net, path, TOKENS, names, rtol=1e-5)
    assert list(found) == ["1x12", "2x12", "7x7", "7x12", "2x1"]
    assert list(answers_of(net, TOKENS, ("hidden",))) == ["hidden"]
    assert net(*map(torch.from_numpy, TOKENS.values())) is not None, "the model itself is as it was"
    assert "forward" not in vars(net)
    handed = tensors_from_modules(path, {"words": 1.0, "head": 2.0}).tensors
    assert set(handed) == {"embedding", "logits"}, "module names survive the choice of outputs"


def test_a_dataclass_is_read_by_the_names_of_its_fields():
    answer = Answer(torch.zeros(1), torch.ones(1))
    assert [float(value) for value in named_outputs(answer, ("hidden", "logits"))] == [1.0, 0.0]
    with pytest.raises(StageFailedError, match="The model answers logits, and no 'hidden'"):
        named_outputs(Answer(torch.zeros(1)), ("hidden",))
    with pytest.raises(StageFailedError, match="output 'logits' is list, expected a tensor"):
        named_outputs({"logits": [1.0]}, ("logits",))


def test_only_token_inputs_have_a_sequence():
    assert dynamic_axes(TOKENS) == {
        "input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}, "age": {0: "batch"},
    }  # fmt: skip
    assert dynamic_axes({"x": np.zeros((4, LENGTH), np.int64)}) == {"x": {0: "batch"}}, "a table of integers is no text"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("logits", "loss"), "The model answers hidden, unused, logits, and no 'loss'"),
        (("logit",), "and no 'logit'"),
    ],
)
def test_an_output_that_the_model_does_not_answer_is_refused_with_those_it_does(tmp_path, names, message):
    with pytest.raises(StageFailedError, match=message):
        export_onnx(Reader().eval(), TOKENS, tmp_path / "model.onnx", opset=20, output_names=names)


class Fixed(Reader):
    """It was written for one length."""

    def forward(self, input_ids, attention_mask, age):
        hidden = self.words(input_ids) + torch.arange(LENGTH).unsqueeze(-1)
        return self.head(torch.cat([hidden.mean(1), age], 1))


def test_a_model_that_fixes_the_sequence_is_an_error(tmp_path):
    with pytest.raises(StageFailedError, match="fixes the axis 'sequence' of its input 'input_ids' at 12"):
        export_onnx(Fixed().eval(), TOKENS, tmp_path / "model.onnx", opset=20, output_names=NAMES)


class Divides(nn.Module):
    """x [n, 4] -> x / (|x| + epsilon), which is 0 at 0."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.register_buffer("other", torch.tensor(3 * epsilon))

    def forward(self, x):
        return x / (x.abs() + self.epsilon) + x / (self.other + x.abs())


@pytest.mark.parametrize(("epsilon", "kept"), [(1e-9, False), (1e-6, True)])
def test_a_constant_that_the_exporter_would_delete_is_kept_and_told(tmp_path, epsilon, kept):
    """x / (x + 1e-9) becomes x / x: nothing shows it but zeros."""
    net, path = Divides(epsilon).eval(), tmp_path / "model.onnx"
    ordinary = {"x": np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)}
    notes = export_onnx(net, ordinary, path, opset=20, output_names=NAMES)
    zeros = {"x": np.zeros((16, 4), np.float32)}
    for samples in (ordinary, zeros):
        with OrtRunner(path) as runner:
            np.testing.assert_allclose(
                runner.infer(samples)["logits"], answers_of(net, samples, NAMES)["logits"], rtol=1e-6
            )
    assert bool(notes) is not kept
    if notes:
        assert f"deletes the constant {epsilon:.3g} (in " in notes[0]


def test_without_the_check_the_constant_is_lost():
    """The control: what torch.onnx.export alone makes of it. When this fails, the check is no longer needed."""
    x = torch.ones(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(Divides(1e-9).eval(), (x,), dynamo=True, opset_version=20, verbose=False)
    assert small_addends(program.model) == {}


def test_ranges_are_handed_over_to_the_tensors_they_were_measured_on(exported, tmp_path):
    """The largest magnitude that torch saw after a module is that of the ONNX tensor it is mapped to."""
    model, path = exported
    ranges = ActivationRanges()
    with ranges.recording(model), torch.no_grad():
        model(torch.from_numpy(IMAGES["image"]))
    handover = tensors_from_modules(path, ranges.to_json())
    assert "drop" in handover.unmapped, "dropout does nothing"
    assert len(handover.tensors) == 3
    graph = ir.load(path)
    values = {value.name: value for node in graph.graph for value in node.outputs}
    graph.graph.outputs.extend(values[name] for name in handover.tensors if values[name] not in graph.graph.outputs)
    ir.save(graph, tmp_path / "all.onnx")
    with OrtRunner(tmp_path / "all.onnx", optimise=False) as runner:
        found = runner.infer(IMAGES)
    for name, largest in handover.tensors.items():
        assert np.abs(found[name]).max() == pytest.approx(largest, rel=1e-5), name

"""Sentences: every format gives the same tokens, official splits stay official, and what is wrong is named with its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from small_models import bert_folder

from mpdeploy.config import ConvertConfig, DataConfig
from mpdeploy.errors import ConfigError, DataError, MissingExtraError
from mpdeploy.train.data import load_docstrings, load_text, pretrained
from mpdeploy.train.data.docstrings import SUBJECTS, _plain
from mpdeploy.train.data.pretrained import FineTuning, MadeForData, model_folder
from mpdeploy.train.data.text import class_names

NAMES = ("train", "early_stopping", "calibration", "gate")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def config(bert):
    def make(folder, **fields) -> DataConfig:
        return DataConfig(
            load=load_text, **{"folder": str(folder), "model_folder": str(bert), "max_length": 16, **fields}
        )

    return make


def rows(count: int, start: int = 0, **more) -> list[dict]:
    return [{"sentence": f"read the file {n}", "label": n % 2, **more} for n in range(start, start + count)]


def write(path: Path, found: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(found), path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(found[0]), *(separator.join(str(value) for value in row.values()) for row in found)]
        path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_tokens(tmp_path, config, suffix):
    write(tmp_path / "a" / f"train.{suffix}", rows(60))
    write(tmp_path / "a" / f"dev.{suffix}", rows(20, 60))
    write(tmp_path / "b" / "train.jsonl", rows(60))
    write(tmp_path / "b" / "validation-00000-of-00001.jsonl", rows(20, 60))
    splits, other = load_text(config(tmp_path / "a")), load_text(config(tmp_path / "b"))
    assert splits.digest == other.digest
    assert splits.sizes() == {"train": 48, "early_stopping": 6, "calibration": 6, "gate": 20}
    assert list(splits.gate.ids) == list(range(1_000_000_000, 1_000_000_020)), "the official split, in its order"
    assert splits.classes == ("0", "1")


def test_tokens_are_padded_masked_and_cut(tmp_path, config):
    found = rows(30)
    found[3]["sentence"] = "read"
    found[4]["sentence"] = "the file " * 40
    write(tmp_path / "all.csv", found)
    splits = load_text(config(tmp_path))
    samples = {
        name: np.concatenate([getattr(splits, part).inputs[name] for part in NAMES]) for name in splits.gate.inputs
    }
    order = np.argsort(np.concatenate([getattr(splits, part).ids for part in NAMES]))
    ids, mask = samples["input_ids"][order], samples["attention_mask"][order]
    assert list(samples) == ["input_ids", "attention_mask"], "one sentence needs no token types"
    assert (ids.dtype, mask.dtype, ids.shape) == (np.int64, np.int64, (30, 16))
    assert list(mask[3]) == [1] * 3 + [0] * 13
    assert (ids[3, 0], ids[3, 2], set(ids[3, 3:])) == (2, 3, {0}), "[CLS] read [SEP], then padding"
    assert mask[4].all()
    assert ids[4, -1] == 3, "cut to 16 tokens, the last of them [SEP]"


@pytest.mark.parametrize(("padding", "length"), [("longest", 8), ("max_length", 32)])
def test_padding_goes_to_the_longest_or_to_the_maximum(tmp_path, config, padding, length):
    write(
        tmp_path / "all.csv",
        [{"text": " ".join("abcde"[: 1 + n % 5]) + f" {n // 5 % 10}", "label": n % 2} for n in range(50)],
    )
    splits = load_text(config(tmp_path, padding=padding, max_length=32))
    assert splits.train.inputs["input_ids"].shape[1] == length


def test_two_sentences_are_told_apart(tmp_path, config):
    write(tmp_path / "all.jsonl", [{"premise": f"a {n}", "hypothesis": "read it", "label": n % 3} for n in range(60)])
    splits = load_text(config(tmp_path))
    assert list(splits.gate.inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert set(np.unique(splits.gate.inputs["token_type_ids"])) == {0, 1}
    assert splits.classes == ("0", "1", "2")


def test_labels_with_names_are_numbered_in_alphabetical_or_the_given_order(tmp_path, config):
    write(tmp_path / "all.csv", [{"text": f"read {n}", "kind": ("dog", "cat")[n % 2]} for n in range(40)])
    assert class_names(config(tmp_path, label_column="kind")) == ("cat", "dog")
    given = load_text(config(tmp_path, label_column="kind", classes=("dog", "cat")))
    assert list(given.gate.labels) == list(given.gate.ids % 2)


def test_a_test_file_without_labels_is_no_gate(tmp_path, config):
    """GLUE hides them: -1 everywhere."""
    write(tmp_path / "train.csv", rows(60))
    write(tmp_path / "test.csv", [row | {"label": -1} for row in rows(20, 60)])
    splits = load_text(config(tmp_path))
    assert sum(splits.sizes().values()) == 60


def test_sentences_in_both_files_are_taken_from_training(tmp_path, config):
    write(tmp_path / "train.csv", rows(60))
    write(tmp_path / "dev.csv", rows(20, 50))
    splits = load_text(config(tmp_path))
    assert splits.sizes()["gate"] == 20
    assert sum(splits.sizes().values()) == 70
    assert splits.notes == ("removed 10 of 60 training samples that are also in the official test split",)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.csv", "sentence,label\na,1\nb\n", r"train\.csv, line 3: 1 fields, the header names 2"),
        ("train.csv", "sentence,label\na,1\nb,c,0\n", r"train\.csv, line 3: 3 fields, the header names 2"),
        ("train.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": \n', r"train\.jsonl, line 2: "),
        ("train.jsonl", "[1, 2]\n", r"train\.jsonl, line 1 is no JSON object"),
        ("train.parquet", "PAR1", r"train\.parquet is not a readable parquet file"),
        ("train.csv", "phrase,label\na,1\n", r"train\.csv, sample 1 has the columns phrase, label: which is the sentence"),
        ("train.csv", "sentence,kind\na,1\n", r"train\.csv, sample 1 has no column 'label'"),
        ("train.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": null, "label": 1}\n', "sample 2: 'sentence' is None"),
        ("train.jsonl", '{"sentence": "a", "label": 2.5}\n', "sample 1: 'label' is 2.5, expected a class number or name"),
        ("train.csv", "sentence,label\na,0\nb,-2\n", r"train\.csv, sample 2: the label -2 is no class"),
        ("train.csv", "sentence,label\na,0\nb,2\n", "No sample has the label 1, and others have labels up to 2"),
        ("train.csv", "sentence,label\n", "the training file has no rows"),
        ("notes.txt", "hello", r"has no training samples; it holds notes\.txt"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(tmp_path, config, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message):
        load_text(config(tmp_path))


def test_a_name_that_is_no_class_is_an_error_with_the_closest(tmp_path, config):
    write(tmp_path / "all.csv", [{"text": f"read {n}", "label": ("cat", "dog", "dgo")[n % 3]} for n in range(40)])
    with pytest.raises(
        DataError, match=r"all\.csv, sample 3: the label 'dgo' is no class of this data \(13 such"
    ) as caught:
        load_text(config(tmp_path, classes=("cat", "dog")))
    assert "dog" in (caught.value.hint or "")


def test_too_few_samples_are_an_error(tmp_path, config):
    write(tmp_path / "all.csv", rows(3))
    with pytest.raises(DataError, match="3 different samples are too few"):
        load_text(config(tmp_path))


def test_what_datasets_saved_needs_datasets(tmp_path, config, monkeypatch):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="was saved by the package 'datasets', which is not installed"):
        load_text(config(tmp_path))


def test_a_folder_without_model_or_tokenizer_is_an_error(tmp_path, config):
    write(tmp_path / "all.csv", rows(30))
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        load_text(config(tmp_path, model_folder=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_text(config(tmp_path, model_folder=str(tmp_path)))


@pytest.fixture(scope="module")
def docstrings(bert):
    return load_docstrings(DataConfig(load=load_docstrings, model_folder=str(bert), max_length=16))


def test_docstrings_are_thousands_in_seven_classes_and_the_same_every_time(docstrings, bert):
    assert docstrings.classes == tuple(SUBJECTS)
    assert sum(docstrings.sizes().values()) > 2000
    assert np.bincount(docstrings.gate.labels).min() >= 30, "every subject is judged"
    again = load_docstrings(DataConfig(load=load_docstrings, model_folder=str(bert), max_length=16))
    assert again.digest == docstrings.digest


def test_no_docstring_names_its_package():
    assert _plain("Send an Email.\n\n    >>> email.send()\n    See smtplib.SMTP and emailing.") == (
        "Send an _. See _.SMTP and emailing."
    )


def test_a_model_made_for_data_follows_the_data_s_config(bert, tmp_path):
    from mpdeploy.config import TrainConfig, apply_overrides
    from mpdeploy.user_code import describe_callable

    pipeline = FineTuning(
        name="x",
        data=DataConfig(load=load_text, model_folder=str(bert)),
        train=TrainConfig(model=MadeForData(model_folder)),
    )
    assert pipeline.train.model() == bert
    other = bert_folder(tmp_path / "other", num_labels=3)
    changed = apply_overrides(pipeline, [f"data.model_folder={other}", "convert.calibration_samples=7"])
    assert changed.convert == ConvertConfig(calibration_samples=7)
    assert changed.train.model() == other
    described = describe_callable(pipeline.train.model)
    assert "0x" not in described["function"], "no address of this process: the run must be found again"
    assert described != describe_callable(changed.train.model), "other weights train again"


def test_a_model_may_be_named_after_the_pipeline_was_made(bert, monkeypatch):
    """MiniLM is not installed: the file loads, and what is wanted without a model is an error that says so."""
    from mpdeploy.config import TrainConfig, apply_overrides

    monkeypatch.setattr(pretrained, "PACKAGED", "no_such_package")
    pipeline = FineTuning(name="x", data=DataConfig(load=load_text), train=TrainConfig(model=MadeForData(model_folder)))
    assert apply_overrides(pipeline, [f"data.model_folder={bert}"]).train.model() == bert
    with pytest.raises(MissingExtraError, match=r"There is no model to fine-tune: data\.model_folder is not set"):
        pipeline.train.model()

"""Sentences, or pairs of them, with a label each: GLUE and what is laid out as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpdeploy.artifact import Array, Dataset
from mpdeploy.config import DataConfig
from mpdeploy.errors import DataError, closest_names
from mpdeploy.train.data.folders import data_folder, numbered
from mpdeploy.train.data.pretrained import tokenizer_of
from mpdeploy.train.data.tables import Row, Table, read_tables
from mpdeploy.train.splits import Splits, split_samples

KNOWN_COLUMNS = (
    ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"), ("sentence1", "sentence2"),
    ("sentence",), ("text",),
)  # fmt: skip
"""What GLUE's tasks, and most others, call the columns of their sentences."""
MULTIPLE = 8
OFFICIAL_FIRST_ID = 1_000_000_000


@dataclass(frozen=True)
class Texts:
    """Sentences before they are tokens.

    Attributes:
        sentences: one a sample, or the first of two.
        seconds: the second of two, or None.
        labels: int64 [n].
    """

    sentences: Sequence[str]
    seconds: Sequence[str] | None
    labels: Array


def load_text(config: DataConfig) -> Splits:
    """Labelled sentences in `data.folder`, as tokens of the model in `data.model_folder`.

    Inputs are `input_ids` and `attention_mask` (1 for a token, 0 for padding), both int64 [n, length]; and `token_type_ids` where there
    are two sentences and the model tells them apart. Labels are int64 [n].

    `validation` (GLUE's `dev`) is the gate's where it is there, else a `test` whose labels are known; the training file is split into
    the rest. A single file is split into all four. A sample's id is its position, and 1,000,000,000 more for one of the gate's own file.

    Raises:
        ConfigError: no such folder, no tokenizer.
        DataError: files, columns or labels that are missing or do not fit (each with its place).
    """
    train, official, classes = _read(config)
    return tokenised(train, config, official=official, classes=classes, source="text")


def class_names(config: DataConfig) -> tuple[str, ...]:
    """The classes of the data in `data.folder`, read without tokenising."""
    return config.classes or _read(config)[2]


def _read(config: DataConfig) -> tuple[Texts, Texts | None, tuple[str, ...]]:
    folder = data_folder(config, "csv, tsv, jsonl or parquet files of labelled sentences")
    tables = read_tables(folder)
    train = tables.get("train") or tables["all"]
    official = next((tables[name] for name in ("validation", "test") if _is_labelled(tables.get(name), config)), None)
    if not train.rows:
        raise DataError(f"{folder}: the training file has no rows.")
    columns = _columns(train.rows[0], config, train.places[0])
    both = Table(train.rows + (official.rows if official else []), train.places + (official.places if official else []))
    sentences = [_texts(both, column) for column in columns]
    labels, classes = numbered(_labels(both, config), config, both.places)
    count = len(train.rows)

    def part(rows: slice) -> Texts:
        return Texts(sentences[0][rows], sentences[1][rows] if len(sentences) == 2 else None, labels[rows])

    return part(slice(count)), part(slice(count, None)) if official else None, classes


def _is_labelled(table: Table | None, config: DataConfig) -> bool:
    """GLUE's test files have no labels, or -1 everywhere."""
    return table is not None and any(row.get(config.label_column) not in (None, "", -1, "-1") for row in table.rows)


def _columns(row: Row, config: DataConfig, place: str) -> tuple[str, ...]:
    if config.text_columns:
        wanted: tuple[str, ...] = config.text_columns
    else:
        wanted = next((names for names in KNOWN_COLUMNS if all(name in row for name in names)), ())
        if not wanted:
            raise DataError(
                f"{place} has the columns {', '.join(row)}: which is the sentence?",
                hint="--set 'data.text_columns=[\"NAME\"]', or two names for pairs of sentences",
            )
    for name in (*wanted, config.label_column):
        if name not in row:
            raise DataError(
                f"{place} has no column '{name}'.",
                hint=f"columns: {', '.join(row)}; data.text_columns and data.label_column name them "
                f"(closest: {closest_names(name, row)})",
            )
    return wanted


def _texts(table: Table, column: str) -> list[str]:
    texts = []
    for row, place in zip(table.rows, table.places, strict=True):
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{place}: '{column}' is {value!r}, expected a sentence.", hint="repair or drop the sample")
        texts.append(value)
    return texts


def _labels(table: Table, config: DataConfig) -> list[str | int]:
    found: list[str | int] = []
    for row, place in zip(table.rows, table.places, strict=True):
        value = row.get(config.label_column)
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise DataError(
                f"{place}: '{config.label_column}' is {value!r}, expected a class number or name.",
                hint="a score that is no class (GLUE's STS-B) is not classification",
            )
        found.append(value)
    if all(_is_number(value) for value in found):
        return [int(value) for value in found]
    return [str(value) for value in found]


def _is_number(value: str | int) -> bool:
    return isinstance(value, int) or value.lstrip("-").isdecimal()


def tokenised(
    train: Texts, config: DataConfig, *, official: Texts | None, classes: tuple[str, ...], source: str
) -> Splits:
    """Tokens of sentences (see `load_text`), split; all samples are padded to one length."""
    parts = [train] if official is None else [train, official]
    encoded = _encode(parts, config)
    datasets = [
        Dataset(inputs, np.arange(first, first + len(part.labels), dtype=np.int64), part.labels)
        for inputs, part, first in zip(encoded, parts, (0, OFFICIAL_FIRST_ID), strict=False)
    ]
    return split_samples(
        datasets[0], official=datasets[1] if official is not None else None, seed=config.seed, limit=config.limit,
        classes=classes, source=source,
    )  # fmt: skip


def _encode(parts: Sequence[Texts], config: DataConfig) -> list[dict[str, Array]]:
    tokenizer = tokenizer_of(config)
    sentences = [text for part in parts for text in part.sentences]
    seconds = None
    if all(part.seconds is not None for part in parts):
        seconds = [text for part in parts for text in part.seconds or ()]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    found = tokenizer(
        sentences, seconds, truncation=True, max_length=config.max_length, padding=config.padding,
        pad_to_multiple_of=MULTIPLE if config.padding == "longest" else None, return_tensors="np",
    )  # fmt: skip
    names = ["input_ids", "attention_mask"]
    if seconds is not None and "token_type_ids" in tokenizer.model_input_names:
        names.append("token_type_ids")
    arrays = {name: np.asarray(found[name], dtype=np.int64)[:, : config.max_length] for name in names}
    cuts = np.cumsum([len(part.labels) for part in parts])[:-1]
    split = {name: np.split(array, cuts) for name, array in arrays.items()}
    return [{name: split[name][number] for name in names} for number in range(len(parts))]

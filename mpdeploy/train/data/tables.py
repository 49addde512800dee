"""Rows of a data folder: csv, tsv, jsonl and parquet files, or what `datasets` saved, by split."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpdeploy.errors import DataError, MissingExtraError
from mpdeploy.train.data.folders import listed

Row = dict[str, Any]
SPLIT_OF_PREFIX = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass
class Table:
    """Rows of one split, and where each came from."""

    rows: list[Row] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def read(self, path: Path, rows: Iterator[Row]) -> None:
        """Append a file's rows."""
        for number, row in enumerate(rows, start=1):
            self.rows.append(row)
            self.places.append(f"{path}, sample {number}")


def read_tables(folder: Path) -> dict[str, Table]:
    """Split (`train`, `validation`, `test`, or `all` for a single file of another name) -> its rows.

    Files are told by the beginning of their names (`train.tsv`, `dev.tsv`, `validation-00000-of-00001.parquet`); several of one split
    are read one after the other. A folder that `datasets.save_to_disk` wrote is read with `datasets`.

    Raises:
        DataError: no such files, or one that cannot be read, with its line.
        MissingExtraError: a parquet file without pyarrow, a saved data set without `datasets`.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return _saved_by_datasets(folder)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in READERS and path.is_file()]
    tables: dict[str, Table] = {}
    for path in files:
        split = next((name for prefix, name in SPLIT_OF_PREFIX.items() if path.name.startswith(prefix)), None)
        if split is None and len(files) == 1:
            split = "all"
        if split is not None:
            tables.setdefault(split, Table()).read(path, READERS[path.suffix](path))
    if "train" not in tables and "all" not in tables:
        raise DataError(
            f"{folder} has no training samples; it holds {listed(folder)}.",
            hint=f"name the files train.*, validation.* (or dev.*) and test.*, or give one file; formats: {', '.join(READERS)}",
        )
    return tables


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from _checked(path, csv.DictReader(file))


def _tsv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:  # GLUE's files have quotation marks that mean nothing
        yield from _checked(path, csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _checked(path: Path, reader: csv.DictReader[str]) -> Iterator[Row]:
    try:
        for row in reader:
            if None in row or None in row.values():
                found = sum(value is not None for key, value in row.items() if key is not None)
                found += len(row.get(None) or ())
                raise DataError(
                    f"{path}, line {reader.line_num}: {found} fields, the header names {len(reader.fieldnames or ())}.",
                    hint="quote fields that hold the separator",
                )
            yield dict(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}, line {reader.line_num + 1}: {error}.", hint="it must be UTF-8 with a header"
        ) from error


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}.", hint="jsonl is one JSON object a line") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is no JSON object.", hint="jsonl is one JSON object a line")
            yield row


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError.for_extra("pyarrow", "text") from error
    try:
        yield from parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}", hint="get it again") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet,
}  # fmt: skip


def _saved_by_datasets(folder: Path) -> dict[str, Table]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"{folder} was saved by the package 'datasets', which is not installed.", hint="pip install datasets"
        ) from error
    found = datasets.load_from_disk(str(folder))
    parts = dict(found) if isinstance(found, dict) else {"all": found}
    tables: dict[str, Table] = {}
    for name, part in parts.items():
        split = next((split for prefix, split in SPLIT_OF_PREFIX.items() if name.startswith(prefix)), "all")
        tables.setdefault(split, Table()).read(folder / name, (dict(row) for row in part))
    return tables

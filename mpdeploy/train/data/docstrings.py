"""Short English texts that every machine has: docstrings of Python's own library, labelled by the subject of their package."""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mpdeploy.config import DataConfig
from mpdeploy.train.data.text import Texts, tokenised
from mpdeploy.train.splits import Splits

SUBJECTS: dict[str, tuple[str, ...]] = {
    "concurrency": ("asyncio", "concurrent", "multiprocessing", "queue", "sched", "subprocess", "threading"),
    "files": ("_pyio", "filecmp", "fileinput", "glob", "gzip", "lzma", "pathlib", "shutil", "tarfile", "tempfile", "zipfile"),
    "introspection": ("ast", "dis", "importlib", "inspect", "pkgutil", "pydoc", "tokenize", "typing"),
    "mail": ("email", "imaplib", "mailbox", "poplib", "smtplib"),
    "numbers": ("_pydecimal", "_pydatetime", "calendar", "datetime", "fractions", "ipaddress", "random", "statistics"),
    "testing": ("bdb", "doctest", "logging", "pdb", "profile", "pstats", "trace", "unittest"),
    "web": ("ftplib", "html", "http", "socketserver", "ssl", "urllib", "wsgiref", "xml", "xmlrpc"),
}  # fmt: skip
"""Class -> packages and modules; those that a Python does not have are left out."""
MIN_CHARACTERS, MIN_WORDS = 30, 5
_NAMES = re.compile(rf"\b({'|'.join(sorted(name for names in SUBJECTS.values() for name in names))})\b", re.IGNORECASE)


def load_docstrings(config: DataConfig) -> Splits:
    """About 3,500 docstrings of the running Python's library in seven classes, as tokens (see `load_text` for the arrays).

    A class is the subject of the package, for example `mail` for `email`, `mailbox` and `smtplib`. The names of all these packages
    are replaced by an underscore wherever they stand as a word, so that no label can be read off; examples (`>>>`) are dropped, and so
    are texts of less than 30 characters or five words. Another version of Python has other docstrings.
    """
    sentences, labels = _texts()
    texts = Texts(sentences, None, np.array(labels, dtype=np.int64))
    return tokenised(texts, config, official=None, classes=tuple(SUBJECTS), source="python-docstrings")


@functools.cache
def _texts() -> tuple[tuple[str, ...], tuple[int, ...]]:
    library = Path(sysconfig.get_path("stdlib"))
    sentences, labels = [], []
    for label, names in enumerate(SUBJECTS.values()):
        for name in names:
            for path in _sources(library, name):
                for text in _docstrings(path):
                    sentences.append(text)
                    labels.append(label)
    return tuple(sentences), tuple(labels)


def _sources(library: Path, name: str) -> list[Path]:
    """A module's file, or the files of a package without its tests, in the same order everywhere."""
    if (library / f"{name}.py").is_file():
        return [library / f"{name}.py"]
    paths = sorted((library / name).rglob("*.py"), key=lambda path: path.as_posix())
    return [path for path in paths if not {"test", "tests"} & set(path.relative_to(library).parts)]


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            text = _plain(ast.get_docstring(node) or "")
            if len(text) >= MIN_CHARACTERS and len(text.split()) >= MIN_WORDS:
                yield text


def _plain(docstring: str) -> str:
    """One line without examples and without the packages' names."""
    lines = [line.strip() for line in docstring.splitlines()]
    return _NAMES.sub("_", " ".join(line for line in lines if line and not line.startswith((">>>", "..."))))

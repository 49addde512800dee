"""What is written is whole or not there: exceptions, kill -9, a full disk, a folder that refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdeploy import files
from mpdeploy.errors import StageFailedError


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_holds_the_text_and_nothing_lies_beside_it(tmp_path):
    files.write_text(tmp_path / "new" / "a.txt", "drift: 3.2 ‰")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "drift: 3.2 ‰"
    assert names_in(tmp_path / "new") == ["a.txt"]


def test_a_written_file_can_be_read_by_others(tmp_path):
    files.write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


def test_an_exception_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_the_old_file_stays_in_place_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with files.atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_kill_9_in_the_middle_leaves_the_old_one_and_the_rest_is_swept_away(tmp_path, kind):
    code = f"""
import os, signal
from pathlib import Path
from mpdeploy import files
target = Path({str(tmp_path)!r}) / "target"
with files.atomic_{"path" if kind == "file" else "folder"}(target) as temporary:
    (temporary if {kind == "file"} else temporary / "part").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    if kind == "file":
        files.write_text(tmp_path / "target", "old")
    else:
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "part").write_text("old")
    killed = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(names_in(tmp_path)) == 2, "the killed process left no half-written file: this test proves nothing"
    files.remove_partials(tmp_path)
    assert names_in(tmp_path) == ["target"]
    assert (tmp_path / "target" if kind == "file" else tmp_path / "target" / "part").read_text() == "old"


@pytest.mark.parametrize("where", ["fsync", "write"])
def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path, monkeypatch, where):
    path = tmp_path / "run.json"
    files.write_text(path, "old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (Path, "write_text")), full)
    with pytest.raises(StageFailedError, match="No space left on device") as caught:
        files.write_text(path, "new")
    assert str(path) in caught.value.message
    assert "free some space" in (caught.value.hint or "")
    assert (path.read_text(), names_in(tmp_path)) == ("old", ["run.json"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB that is really full when it is full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full_keeps_the_old_file(small_disk):
    path = small_disk / "run.json"
    files.write_text(path, "old")
    with pytest.raises(StageFailedError, match="No space left on device"):
        files.write_text(path, "n" * 200_000)
    assert (path.read_text(), names_in(small_disk)) == ("old", ["run.json"])
    files.write_text(path, "it fits")
    assert path.read_text() == "it fits"


def test_a_limit_on_file_sizes_keeps_the_old_file(tmp_path):
    code = f"""
import resource, signal
from pathlib import Path
from mpdeploy import files
from mpdeploy.errors import StageFailedError
path = Path({str(tmp_path)!r}) / "a.txt"
files.write_text(path, "old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    files.write_text(path, "n" * 5000)
except StageFailedError as error:
    print(error.message)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout.strip() == f"Cannot write {tmp_path / 'a.txt'}: File too large."
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_a_folder_that_refuses_is_a_fault_with_a_hint(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    with pytest.raises(StageFailedError, match="Permission denied") as caught:
        files.write_text(tmp_path / "a.txt", "x")
    assert "permissions" in (caught.value.hint or "")


def test_an_error_of_the_disk_that_is_no_matter_of_space_or_rights_passes_through(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_text(tmp_path / "a.txt", "x")


def test_an_exception_in_an_atomic_folder_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "engine"
    with files.atomic_folder(folder) as temporary:
        (temporary / "plan").write_text("old")
    with pytest.raises(ZeroDivisionError), files.atomic_folder(folder) as temporary:  # noqa: PT012
        (temporary / "plan").write_text("half")
        raise ZeroDivisionError
    assert (folder / "plan").read_text() == "old"
    assert names_in(tmp_path) == ["engine"]


def test_a_new_atomic_folder_takes_the_old_ones_place_whole(tmp_path):
    for name in ("first", "second"):
        with files.atomic_folder(tmp_path / "engine") as temporary:
            (temporary / name).write_text("x")
    assert names_in(tmp_path / "engine") == ["second"]


def test_sweeping_leaves_what_is_finished(tmp_path):
    (tmp_path / "20-export").mkdir()
    for name in ("model.onnx", ".hidden", ".model.onnx.x1.partial"):
        (tmp_path / "20-export" / name).write_text("x")
    files.remove_partials(tmp_path)
    assert names_in(tmp_path / "20-export") == [".hidden", "model.onnx"]


def test_a_digest_is_sha256_of_the_bytes(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_of_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=3), st.integers() | st.floats(allow_nan=False) | st.none(), max_size=6))
def test_a_digest_of_json_does_not_know_the_order_of_keys(value):
    backwards = dict(reversed(value.items()))
    assert files.digest_of_json(value) == files.digest_of_json(backwards)


@pytest.mark.parametrize(("a", "b"), [({"x": 1}, {"x": 2}), ({"x": 1}, {"y": 1}), ([1, 2], [2, 1]), (1, "1")])
def test_different_values_have_different_digests(a, b):
    assert files.digest_of_json(a) != files.digest_of_json(b)


def test_numbers_that_are_not_finite_are_written_as_text_that_every_reader_accepts(tmp_path):
    files.write_json(
        tmp_path / "a.json", {"a": math.nan, "b": [math.inf, -math.inf], "c": np.float32(0.5), 3: np.int64(7)}
    )

    def refuse(name):
        raise AssertionError(f"bare {name} in JSON")

    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert read == {"a": "nan", "b": ["inf", "-inf"], "c": 0.5, "3": 7}

"""How the libraries are found, and what is said where they are missing or half installed."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys
from dataclasses import replace

import pytest

from mpdeploy.engines.base import Unavailable
from mpdeploy.engines.tensorrt import TENSORRT, TENSORRT_RTX, TensorRTBackend
from mpdeploy.engines.tensorrt.driver import Gpu, probe_gpu
from mpdeploy.engines.tensorrt.library import RTX_FAMILY, TENSORRT_FAMILY, import_library, version_from_text
from mpdeploy.errors import MissingExtraError, UnavailableError

NAMES = "Builder = OnnxParser = Runtime = BuilderFlag = object"


def test_importing_the_backends_imports_no_library():
    heavy = "('torch', 'tensorrt', 'tensorrt_rtx_bindings', 'tensorrt_rtx', 'polygraphy')"
    code = f"import sys, mpdeploy.engines.tensorrt; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_missing_library_is_named_with_the_extra_that_brings_it():
    family = replace(RTX_FAMILY, modules=("no_such_tensorrt_rtx",))
    problem = TensorRTBackend(family).available()
    assert problem == Unavailable(
        "TensorRT-RTX (no_such_tensorrt_rtx) is not installed.", "pip install 'mpdeploy[rtx]'"
    )
    with pytest.raises(MissingExtraError) as caught:
        import_library(replace(TENSORRT_FAMILY, modules=("no_such_tensorrt",)))
    assert caught.value.hint == "pip install 'mpdeploy[gpu]'"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('cannot fetch the real package')", "RuntimeError: cannot fetch the real package"),
        ("import no_such_tensorrt_libs", "No module named 'no_such_tensorrt_libs'"),
        ("import ctypes; ctypes.CDLL('libno_such_nvinfer.so')", "libno_such_nvinfer.so"),
        ("__version__ = '11.4.0.106'", "it has no Builder, OnnxParser, Runtime, BuilderFlag"),
    ],
)
def test_a_half_installed_library_is_told_from_a_missing_one(tmp_path, monkeypatch, source, reason):
    (tmp_path / "half_installed_tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "half_installed_tensorrt", raising=False)
    with pytest.raises(UnavailableError, match="installed but cannot be used") as caught:
        import_library(replace(TENSORRT_FAMILY, modules=("half_installed_tensorrt",)))
    monkeypatch.delitem(sys.modules, "half_installed_tensorrt", raising=False)
    assert not isinstance(caught.value, MissingExtraError)
    assert reason in caught.value.message
    assert "mpdeploy[gpu]" in caught.value.hint


@pytest.mark.parametrize(
    ("version", "is_too_old"), [("10.11.0.33", True), ("10.12.0.36", False), ("11.4.0.106", False)]
)
def test_the_oldest_version_is_10_12(tmp_path, monkeypatch, version, is_too_old):
    (tmp_path / "old_tensorrt.py").write_text(f"__version__ = '{version}'\n{NAMES}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "old_tensorrt", raising=False)
    family = replace(TENSORRT_FAMILY, modules=("old_tensorrt",))
    if is_too_old:
        with pytest.raises(UnavailableError, match=f"TensorRT {version} is installed; 10.12 or newer is needed"):
            import_library(family)
    else:
        assert import_library(family).__version__ == version
    monkeypatch.delitem(sys.modules, "old_tensorrt", raising=False)


def test_the_second_module_name_is_tried_where_the_first_is_missing(tmp_path, monkeypatch):
    (tmp_path / "second_tensorrt.py").write_text(f"__version__ = '1.7.1.116'\n{NAMES}\n")
    monkeypatch.syspath_prepend(tmp_path)
    family = replace(RTX_FAMILY, modules=("no_such_tensorrt_rtx", "second_tensorrt"))
    assert import_library(family).__name__ == "second_tensorrt"
    monkeypatch.delitem(sys.modules, "second_tensorrt")


def test_versions_compare_as_numbers():
    assert version_from_text("10.16.1.11") > version_from_text("10.9.0.34")
    assert version_from_text("11.4.0.106.dev1") == (11, 4, 0, 106)


def test_the_driver_is_asked_without_a_crash_and_a_reason_is_given():
    gpu = probe_gpu()
    if isinstance(gpu, Gpu):
        assert gpu.sm >= 50
        assert gpu.memory_bytes > 1 << 20
    else:
        assert "driver" in gpu.reason
        assert gpu.hint
    absent = probe_gpu(10_000)
    assert isinstance(absent, Unavailable)


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="this machine has an NVIDIA driver")
def test_without_a_driver_tensorrt_is_unavailable_and_rtx_cannot_run():
    for problem in (TENSORRT.available(), TENSORRT.can_run(), TENSORRT_RTX.can_run()):
        assert problem is not None
        assert problem.reason
        assert problem.hint


def test_both_rows_take_fp16_models_and_are_told_apart_by_name():
    assert (TENSORRT.name, TENSORRT_RTX.name) == ("tensorrt", "tensorrt-rtx")
    assert TENSORRT.takes() == TENSORRT_RTX.takes() == "fp16"

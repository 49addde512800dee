"""A plan's header, whether it fits this machine, and which profile holds some shapes: pure functions, no library."""

from __future__ import annotations

import platform
import struct

import pytest
from tensorrt_models import MLP, onnx_model

from mpdeploy.artifact import Engine
from mpdeploy.engines.tensorrt import TENSORRT
from mpdeploy.engines.tensorrt.driver import Gpu
from mpdeploy.engines.tensorrt.header import PlanHeader, check_fits, read_header
from mpdeploy.engines.tensorrt.library import RTX_FAMILY, TENSORRT_FAMILY
from mpdeploy.engines.tensorrt.options import TensorRTOptions
from mpdeploy.engines.tensorrt.session import profile_for
from mpdeploy.errors import BuildError, DataError, ModelError, UnavailableError

H100 = Gpu("NVIDIA H100", 90, 80 << 30, "580.65.06", "13.0")
ADA = Gpu("NVIDIA L4", 89, 24 << 30, "580.65.06", "13.0")
TURING = Gpu("NVIDIA T4", 75, 16 << 30, "580.65.06", "13.0")


def plan_bytes(magic: bytes, version: tuple[int, int, int, int], *, size: int = 64) -> bytes:
    return struct.pack("<4s12xQ4B", magic, size, *version).ljust(64, b"\0")


def sidecar(engine="tensorrt", version="11.4.0.106", sm=89, **options):
    return {
        "engine": engine,
        "library_version": version,
        "device": ADA.to_json() | {"sm": sm} if engine == "tensorrt" else None,
        "os": platform.system(),
        "machine": platform.machine(),
        "options": TensorRTOptions(**options).to_json(),
    }


def fits(made, gpu=ADA, version="11.4.0.106", family=TENSORRT_FAMILY, header=None):
    check_fits(made, header, family, version, gpu, where="engine.plan")


@pytest.mark.parametrize(("magic", "engine"), [(b"ftrt", "tensorrt"), (b"vtrt", "tensorrt-rtx")])
def test_the_header_tells_the_library_and_its_version(tmp_path, magic, engine):
    path = tmp_path / "engine.plan"
    path.write_bytes(plan_bytes(magic, (11, 4, 0, 106)))
    assert read_header(path) == PlanHeader(engine, (11, 4, 0, 106), 64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no TensorRT plan"),
        (b"\x08\x0a\x12\x07pytorch", "is no TensorRT plan: it begins with"),
        (b"ftrt\0\0", "is truncated: 6 bytes do not hold a header"),
        (plan_bytes(b"ftrt", (11, 4, 0, 106), size=1000), "is truncated: it has 64 of 1000 bytes"),
    ],
)
def test_a_foreign_or_truncated_file_is_refused_in_words(tmp_path, data, message):
    path = tmp_path / "engine.plan"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message) as caught:
        read_header(path)
    assert caught.value.hint


def test_a_plan_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match="No such file"):
        read_header(tmp_path / "engine.plan")


def test_a_plan_fits_the_machine_it_was_built_on():
    fits(sidecar())


def test_another_gpu_and_version_are_said_in_words():
    with pytest.raises(UnavailableError) as caught:
        fits(sidecar(), H100, "11.3.0.99")
    assert (
        "engine.plan was built for SM89 with TensorRT 11.4.0.106; "
        "this machine has SM90 (NVIDIA H100) with TensorRT 11.3.0.99:"
    ) in caught.value.message
    assert "exactly the version" in caught.value.message
    assert "compute capability it was built on" in caught.value.message


@pytest.mark.parametrize("here", ["11.4.0.107", "11.3.0.1", "12.0.0.1"])
def test_without_version_compatible_the_version_must_match_exactly(here):
    with pytest.raises(UnavailableError, match="exactly the version"):
        fits(sidecar(), version=here)


def test_a_version_compatible_plan_runs_with_later_versions_of_one_major_version():
    fits(sidecar(version_compatible=True), version="11.9.0.1")
    for here in ("11.3.0.1", "12.0.0.1"):
        with pytest.raises(UnavailableError, match="later version of one major version"):
            fits(sidecar(version_compatible=True), version=here)


def test_an_ampere_plus_plan_runs_from_sm80_on():
    fits(sidecar(hardware_compatible="ampere_plus"), H100)
    with pytest.raises(UnavailableError, match="SM80 and later"):
        fits(sidecar(hardware_compatible="ampere_plus"), TURING)
    with pytest.raises(UnavailableError, match="compute capability"):
        fits(sidecar(hardware_compatible="same_compute_capability"), H100)


def test_a_tensorrt_plan_stays_on_its_operating_system():
    with pytest.raises(UnavailableError, match="it was built on Windows AMD64"):
        fits(sidecar() | {"os": "Windows", "machine": "AMD64"})


def test_an_rtx_plan_runs_on_the_compute_capabilities_it_was_built_for():
    made = {"family": RTX_FAMILY, "version": "1.7.1.116"}
    rtx = sidecar("tensorrt-rtx", "1.7.1.116") | {"os": "Windows", "machine": "AMD64"}  # portable between systems
    fits(rtx, ADA, **made)
    with pytest.raises(UnavailableError, match=r"built for SM80 and later .* SM80 and later"):
        fits(rtx, TURING, **made)
    for_one = sidecar("tensorrt-rtx", "1.7.1.116", compute_capabilities=("SM120",))
    with pytest.raises(UnavailableError, match=r"built for SM120 .* not among the compute_capabilities"):
        fits(for_one, ADA, **made)


def test_a_plan_of_the_other_library_is_refused():
    with pytest.raises(BuildError, match="built by 'tensorrt-rtx' and cannot be loaded by 'tensorrt'"):
        fits(sidecar("tensorrt-rtx", "1.7.1.116"))
    with pytest.raises(BuildError, match="built by 'tensorrt-rtx' and cannot be loaded by 'tensorrt'"):
        fits(sidecar(), header=PlanHeader("tensorrt-rtx", (1, 7, 1, 116), 64))


def test_a_sidecar_of_another_plan_is_refused():
    with pytest.raises(BuildError, match=r"10\.16\.1\.11, its sidecar says 11\.4\.0\.106"):
        fits(sidecar(), header=PlanHeader("tensorrt", (10, 16, 1, 11), 64))


def test_the_first_profile_that_holds_the_shapes_is_chosen():
    small, large = {"x": ((1, 8), (4, 8))}, {"x": ((1, 8), (16, 8))}
    assert profile_for({"x": (4, 8)}, [small, large], where="engine.plan") == 0
    assert profile_for({"x": (5, 8)}, [small, large], where="engine.plan") == 1
    assert profile_for({"fixed": (3,)}, [{}], where="engine.plan") == 0


def test_shapes_that_no_profile_holds_are_refused_with_the_ranges():
    with pytest.raises(DataError) as caught:
        profile_for({"x": (32, 8)}, [{"x": ((1, 8), (16, 8))}], where="engine.plan")
    assert "was built for shapes x=1x8 to 16x8 and was given x=32x8" in caught.value.message


def test_a_runner_that_was_not_opened_says_so(tmp_path):
    model = onnx_model(MLP, tmp_path / "model.onnx")
    engine = Engine.of(model.path, inputs=model.inputs, outputs=model.outputs, sidecar=sidecar())
    with pytest.raises(UnavailableError, match="is closed"):
        TENSORRT.load(engine).infer({})
    with pytest.raises(UnavailableError, match="is closed"):
        TENSORRT.load(engine).time_ms({}, 3)

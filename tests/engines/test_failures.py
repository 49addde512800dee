"""What goes wrong with engines in real life: a full disk, a wrong provider, another release, a truncated plan, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from tensorrt_models import MLP, PROFILE, onnx_model

from mpdeploy.building import build, find_engine
from mpdeploy.engines import backend
from mpdeploy.engines.onnxruntime import CPU, CUDA, OrtRunner, check_provider, loads_cuda
from mpdeploy.errors import ModelError, UnavailableError

ROOT = Path(__file__).parents[2]
ENGINES = ["onnxruntime", "openvino", "tensorrt-rtx"]


def here_or_skip(engine: str) -> None:
    problem = backend(engine).available()
    if problem is not None:
        pytest.skip(problem.reason)


# -- disk --------------------------------------------------------------------------------------------------------------

FULL_DISK = """
import resource, sys
from pathlib import Path
from mpdeploy.building import build
from mpdeploy.errors import MpdeployError
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # no file may grow past it, for this process and its children
try:
    build(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
except MpdeployError as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory) -> Path:
    """A model whose engine has some hundred kilobytes."""
    path = tmp_path_factory.mktemp("large") / "model.onnx"
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> net (float[batch, 256] x) => (float[batch, 400] y) { [product] y = MatMul(x, w) }'
    )
    weight = np.random.default_rng(0).normal(size=(256, 400)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes are Linux's")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_disk_is_a_failed_build_that_says_so_and_leaves_no_engine(engine, large_model, tmp_path):
    here_or_skip(engine)
    folder = tmp_path / "engine"
    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(large_model), engine, str(folder)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert process.returncode == 20, process.stdout + process.stderr
    assert process.stdout.startswith(("BuildError", "StageFailedError"))
    assert "annot write" in process.stdout
    assert "hint:" in process.stdout
    assert "Traceback" not in process.stdout
    assert [path.name for path in folder.iterdir()] == ["build.log"], "nothing half-written stays"
    with pytest.raises(ModelError, match="holds no engine"):
        find_engine(folder)


# -- what is loaded ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_truncated_engine_is_never_loaded(engine, tmp_path):
    here_or_skip(engine)
    model = onnx_model(MLP, tmp_path / "model.onnx")
    built = backend(engine).build(model, PROFILE, {}, tmp_path)
    data = built.path.read_bytes()
    built.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="is not the engine that"):
        find_engine(tmp_path)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("change", "said"),
    [({"library_version": "0.9.1"}, "0.9.1; this machine is"), ({"machine": "riscv64"}, "was built on Linux riscv64")],
)
def test_an_engine_of_another_release_or_machine_says_what_it_was_built_for(engine, change, said, tmp_path):
    here_or_skip(engine)
    backend(engine).build(onnx_model(MLP, tmp_path / "model.onnx"), PROFILE, {}, tmp_path)
    sidecar = json.loads((tmp_path / "engine.json").read_text())
    (tmp_path / "engine.json").write_text(json.dumps(sidecar | change))
    with pytest.raises(UnavailableError, match=said) as caught:
        backend(engine).load(find_engine(tmp_path))
    assert "build it again" in str(caught.value.hint)


def test_a_patch_release_runs_the_engines_of_its_minor_release(tmp_path):
    here_or_skip("onnxruntime")
    import onnxruntime

    backend("onnxruntime").build(onnx_model(MLP, tmp_path / "model.onnx"), PROFILE, {}, tmp_path)
    sidecar = json.loads((tmp_path / "engine.json").read_text())
    minor = ".".join(onnxruntime.__version__.split(".")[:2])
    (tmp_path / "engine.json").write_text(json.dumps(sidecar | {"library_version": f"{minor}.99"}))
    with backend("onnxruntime").load(find_engine(tmp_path)) as runner:
        assert runner.infer({"x": np.zeros((2, 8), np.float32)})["y"].shape == (2, 4)


def test_openvino_s_weights_are_part_of_what_is_checked(tmp_path):
    here_or_skip("openvino")
    built = backend("openvino").build(onnx_model(MLP, tmp_path / "model.onnx"), PROFILE, {}, tmp_path)
    (tmp_path / "engine.bin").write_bytes(b"other weights")
    with pytest.raises(Exception, match="is missing or not the file that was built"):
        backend("openvino").load(built)


# -- the provider ------------------------------------------------------------------------------------------------------


def test_a_session_that_fell_back_to_the_cpu_is_refused(tmp_path):
    """A real session on the CPU, asked whether it is one on CUDA: what a driver that is too old leaves behind."""
    here_or_skip("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_model(MLP, tmp_path / "model.onnx").path, providers=[CPU])
    check_provider(session, CPU)
    with pytest.raises(UnavailableError, match=f"asked for {CUDA} and fell back to {CPU}"):
        check_provider(session, CUDA)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_asking_for_cuda_where_it_does_not_load_is_an_error_and_no_cpu_run(tmp_path):
    here_or_skip("onnxruntime")
    if loads_cuda() is None:
        pytest.skip("the CUDA provider loads here")
    model = onnx_model(MLP, tmp_path / "model.onnx")
    with pytest.raises(UnavailableError, match="CUDA provider does not load"):
        backend("onnxruntime").build(model, PROFILE, {"provider": "cuda"}, tmp_path)
    with (
        pytest.raises(UnavailableError, match="fell back to CPUExecutionProvider"),
        OrtRunner(model.path, provider=CUDA),
    ):
        pass


@pytest.mark.gpu
def test_on_cuda_inputs_and_outputs_are_bound_to_the_device(tmp_path):
    here_or_skip("onnxruntime")
    if loads_cuda() is not None:
        pytest.skip(f"the CUDA provider does not load here: {loads_cuda()}")
    model = onnx_model(MLP, tmp_path / "model.onnx")
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    with OrtRunner(model.path) as host, OrtRunner(model.path, provider=CUDA) as device:
        first = device.infer({"x": x})["y"]
        np.testing.assert_allclose(first, host.infer({"x": x})["y"], rtol=1e-2, atol=1e-3)
        kept = first.copy()
        device.infer({"x": x + 1})
        np.testing.assert_array_equal(first, kept)
        assert "bound device memory" in device.includes
        assert device.copies_ms({"x": x}, 3).keys() == {"to_device", "to_host"}


# -- Ctrl-C and progress -----------------------------------------------------------------------------------------------


def test_progress_of_the_builder_child_reaches_the_caller(tmp_path):
    here_or_skip("tensorrt-rtx")
    steps: list[tuple[str, int, int]] = []
    model = onnx_model(MLP, tmp_path / "model.onnx").path
    build(model, "tensorrt-rtx", tmp_path / "engine", progress=lambda *step: steps.append(step))
    assert "Building engine" in {phase for phase, _, _ in steps}
    assert all(done <= total for _, done, total in steps)


def test_ctrl_c_ends_mpdeploy_build_with_130_and_its_child_with_it(tmp_path):
    """The child is stopped where its library is at work: a signal reaches the whole group, as from a terminal."""
    here_or_skip("tensorrt-rtx")
    layers, width = 60, 64
    body = "\n".join(f"[layer_{i}] h{i + 1} = Conv<pads=[1,1,1,1]>(h{i}, w)" for i in range(layers))
    text = f'<ir_version: 9, opset_import: ["" : 18]> net (float[1, {width}, 64, 64] h0) => (float[1, {width}, 64, 64] h{layers}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).normal(size=(width, width, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "model.onnx")
    folder = tmp_path / "engine"
    command = ["build", str(tmp_path / "model.onnx"), "--engine", "tensorrt-rtx", "--output", str(folder), "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "mpdeploy", *command, "--option", "builder_level=5"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while not (folder / "build.log").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert json.loads(out)["error"]["exit_code"] == 130
    assert not (folder / "engine.plan").exists()
    assert not (folder / "engine.json").exists()
    deadline = time.monotonic() + 20
    while (left := alive_in_group(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def alive_in_group(group: int) -> list[str]:
    """Command lines of a process group's members that still run (what nobody waited for yet is dead all the same)."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found

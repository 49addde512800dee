"""The reference: a program of torch.export behind the same protocol as the engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mpdeploy.artifact import Runner  # noqa: E402
from mpdeploy.building import open_runner  # noqa: E402
from mpdeploy.engines.host import INCLUDES  # noqa: E402
from mpdeploy.engines.pytorch import TorchRunner, save_program  # noqa: E402
from mpdeploy.errors import DataError, ModelError, StageFailedError, UnavailableError, UsageError  # noqa: E402


class Net(torch.nn.Module):
    """One layer, a keyword input, and an output that is an input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(6, 3)

    def forward(self, x, *, scale):
        return {"logits": self.linear(x) * scale, "same": scale}


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> tuple[Path, Net]:
    path, net = tmp_path_factory.mktemp("program") / "model.pt2", Net().eval()
    shapes = {"x": {0: torch.export.Dim("batch")}, "scale": None}
    exported = torch.export.export(net, (torch.zeros(4, 6),), {"scale": torch.ones(3)}, dynamic_shapes=shapes)
    save_program(exported, path, ["logits", "kept"])
    return path, net


@pytest.fixture
def runner(program):
    with TorchRunner(program[0], device="cpu") as opened:
        yield opened


def feeds(batch: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    return {"x": rng.normal(size=(batch, 6)).astype(np.float32), "scale": np.full(3, 2, np.float32)}


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_its_answers_are_torch_s_own(program, runner, batch):
    given = feeds(batch)
    with torch.inference_mode():
        expected = program[1](torch.from_numpy(given["x"]), scale=torch.from_numpy(given["scale"]))["logits"].numpy()
    assert isinstance(runner, Runner)
    np.testing.assert_allclose(runner.infer(given)["logits"], expected, rtol=1e-6)


def test_it_says_its_inputs_and_the_outputs_names_that_were_saved(runner):
    assert [(spec.name, spec.dtype) for spec in runner.inputs] == [("x", "float32"), ("scale", "float32")]
    assert runner.inputs[0].has_symbolic_batch
    assert [spec.name for spec in runner.outputs] == ["logits", "kept"]


def test_answers_are_the_caller_s_own_even_where_an_output_is_an_input(runner):
    given = feeds()
    answer = runner.infer(given)
    answer["kept"][:] = 0
    answer["logits"][:] = 0
    assert (given["scale"] == 2).all()
    assert runner.infer(given)["logits"].any()


def test_feeds_that_do_not_fit_are_refused_and_a_closed_runner_says_so(program):
    with TorchRunner(program[0], device="cpu") as opened:
        with pytest.raises(DataError, match="no input named 'z'"):
            opened.infer({"z": feeds()["x"]})
        with pytest.raises(DataError, match="float64"):
            opened.infer(feeds() | {"x": np.zeros((4, 6))})
    with pytest.raises(StageFailedError, match="is closed"):
        opened.infer(feeds())


def test_its_times_include_what_the_cpu_engines_times_include(runner):
    assert len(runner.time_ms(feeds(), 5)) == 5
    assert runner.includes == INCLUDES
    assert runner.copies_ms(feeds(), 3) == {}


def test_bench_and_compare_open_it_and_an_engine_s_options_do_not_concern_it(program):
    with open_runner(program[0]) as opened:
        assert opened.infer(feeds())["logits"].shape == (4, 3)
    with pytest.raises(UsageError, match="torch alone runs"), open_runner(program[0], engine="openvino"):
        pass


def test_a_file_that_is_no_program_is_refused(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"PK not really")
    with pytest.raises(ModelError, match=r"is no program of torch\.export"), TorchRunner(tmp_path / "model.pt2"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(program):
    with pytest.raises(UnavailableError, match="cannot use a GPU"), TorchRunner(program[0], device="cuda"):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch cannot use a GPU here")
def test_on_a_gpu_it_is_timed_by_events_and_its_copies_apart(program):
    with TorchRunner(program[0], device="cuda") as opened:
        assert "CUDA events" in opened.includes
        assert min(opened.time_ms(feeds(), 5)) > 0
        copies = opened.copies_ms(feeds(), 3)
        assert copies.keys() == {"to_device", "to_host"}
        with TorchRunner(program[0], device="cpu") as host:
            np.testing.assert_allclose(
                opened.infer(feeds())["logits"], host.infer(feeds())["logits"], rtol=1e-3, atol=1e-4
            )

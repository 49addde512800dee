"""Every conformance graph through the whole converter: it loads, runs, keeps its interface, and answers the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from mpdeploy.conversion import Conversion, convert
from mpdeploy.data_files import FeedSet
from mpdeploy.engines.onnxruntime import OrtRunner
from mpdeploy.precision.model_io import input_specs, load_model
from tests.precision.conformance import CASES, FAMILIES, Case

LIMIT = {"fp16": 1e-2, "bf16": 6e-2}
COARSE = {
    # a few positions above 2048, sliced out of many: no statistic of whole tensors tells them from the others
    "hostile_arithmetic/positions_above_2048": 0.2,
}
CASE_NAMES = [pytest.param(name, id=name.replace("/", "-")) for name in CASES]


def _convert(case: Case, folder: Path, **more: object) -> tuple[Path, Conversion]:
    source, output = case.save(folder), folder / "out.onnx"
    return source, convert(source, output=output, keep_io=True, **more)  # type: ignore[arg-type]


def _answers(path: Path, case: Case) -> list[object]:
    with OrtRunner(path, optimise=False) as runner:
        return runner._session.run(None, dict(case.feeds))


def _types(model: onnx.ModelProto) -> list[tuple[str, int]]:
    constants = {tensor.name for tensor in model.graph.initializer} if model.ir_version < 4 else set()
    values = (*(value for value in model.graph.input if value.name not in constants), *model.graph.output)
    return [(value.name, value.type.tensor_type.elem_type) for value in values]


def test_all_23_families_of_the_issue_are_here() -> None:
    assert len(FAMILIES) >= 23
    assert len(CASES) >= 300


@pytest.mark.parametrize("name", CASE_NAMES)
def test_the_mixed_model_is_valid_keeps_its_interface_and_answers_as_before(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source, done = _convert(case, tmp_path)
    output = tmp_path / "out.onnx"
    onnx.checker.check_model(output, full_check=not case.stale_value_info)
    before, after = onnx.load(source, load_external_data=False), onnx.load(output, load_external_data=False)
    assert _types(after) == _types(before)
    assert {node.name for node in before.graph.node} <= {node.name for node in after.graph.node} | {""} or (
        before.functions or name == "node_names/duplicate"
    )
    assert all(reasons for reasons in done.plan.kept.values())
    if case.convertible:
        assert done.counts.half_nodes or done.plan.kept
    if case.refused_by_ort:
        return
    for expected, found in zip(_answers(source, case), _answers(output, case), strict=True):
        if not isinstance(expected, np.ndarray):
            assert type(found) is type(expected)
            continue
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        if expected.dtype.kind == "f" and expected.size and np.isfinite(expected).all() and not case.hostile:
            norm = max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30)
            assert np.linalg.norm(expected.astype(np.float64) - found) / norm < LIMIT["fp16"]


MEASURABLE = [
    name
    for name, case in CASES.items()
    if not case.refused_by_ort and all(isinstance(array, np.ndarray) for array in case.feeds.values())
]


@pytest.mark.parametrize("name", [pytest.param(name, id=name.replace("/", "-")) for name in MEASURABLE])
def test_rules_and_ranges_leave_no_output_lost_on_half_hardware(name: str, tmp_path: Path) -> None:
    """Hostile graphs too: this is the emulator's answer, not the CPU provider's."""
    case = CASES[name]
    if any(array.dtype.kind in "OU" or not array.size for array in case.feeds.values()):
        pytest.skip("texts or empty arrays are no samples to measure with")
    inputs = input_specs(load_model(case.save(tmp_path)))
    feed = {spec.name: case.feeds[spec.name] for spec in inputs if spec.name in case.feeds}
    if len(feed) != len(inputs):
        pytest.skip("an optional input is left out here: a feed is complete")
    _, done = _convert(case, tmp_path, data=FeedSet((feed,), inputs, frozenset()))
    assert done.drift is not None
    assert done.drift.num_nonfinite == 0
    assert done.drift.rel_l2 < COARSE.get(name, LIMIT["fp16"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASE_NAMES)
def test_bf16_too_is_valid_and_keeps_its_interface(name: str, tmp_path: Path) -> None:
    """Its answers are those of the emulated model: the CPU provider has no BF16 kernels."""
    case = CASES[name]
    source, done = _convert(case, tmp_path, precision="bf16")
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=not case.stale_value_info)
    before = onnx.load(source, load_external_data=False)
    assert _types(onnx.load(tmp_path / "out.onnx", load_external_data=False)) == _types(before)
    assert done.plan.half.name == "bf16"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASE_NAMES)
def test_converting_twice_equals_once(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, once = _convert(case, tmp_path)
    twice = convert(tmp_path / "out.onnx", output=tmp_path / "again.onnx", keep_io=True)
    assert twice.counts.ops == once.counts.ops
    assert twice.counts.casts == once.counts.casts

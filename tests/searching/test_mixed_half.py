"""`--mixed-half`: what FP16 cannot hold runs in BF16, where the gate is still met on the rewritten model."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from mpdeploy.cli import app
from mpdeploy.conversion import convert
from mpdeploy.data_files import load_feeds
from mpdeploy.emulated_runs import emulated_drift
from mpdeploy.errors import UsageError
from mpdeploy.precision.model_io import input_specs, load_model
from mpdeploy.precision.rewrite import count_precisions
from mpdeploy.precision.search.islands import rewrite_with_islands
from mpdeploy.searching import search_model
from tests.searching.planted import KINDS, PLANTED, planted_classifier, planted_feeds


def _written(zoo_folder: Path, kinds: Collection[str], tmp_path: Path) -> tuple[Path, str]:
    ir.save(planted_classifier(zoo_folder, kinds), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", **planted_feeds(zoo_folder, kinds))  # type: ignore[arg-type]
    return tmp_path / "m.onnx", str(tmp_path / "x.npz")


def test_what_only_leaves_the_range_goes_to_bf16_and_what_bf16_cannot_hold_stays_fp32(
    zoo_folder: Path, tmp_path: Path
) -> None:
    """The mask's sentinel is the lowest float of all, beyond BF16 too; the other traps are within it."""
    path, data = _written(zoo_folder, KINDS, tmp_path)
    found = search_model(path, data=data, max_drift=1e-2, mixed_half=True)
    assert found.met
    assert set(found.plan.bf16) == set().union(*(PLANTED[kind] for kind in KINDS if kind != "mask"))
    assert {"mask_b", "mask_c", "mask_d"} <= set(found.plan.kept)
    mixed = rewrite_with_islands(found.prepared, found.plan)
    kinds = [set(types) for types in count_precisions(mixed).ops.values()]
    assert {"float16", "bfloat16", "float32"} <= set().union(*kinds)
    feeds = load_feeds(data, input_specs(load_model(path)), where="test")
    assert emulated_drift(path, mixed.model, feeds).rel_l2 == found.confirmed.rel_l2 <= 1e-2
    assert {e["node"] for e in found.entries if e.get("precision") == "bf16"} == set(found.plan.bf16)


def test_a_gate_that_bf16_would_fail_leaves_fp32(zoo_folder: Path, tmp_path: Path) -> None:
    path, data = _written(zoo_folder, ["overflow", "epsilon"], tmp_path)
    plain = search_model(path, data=data, max_drift=1e-3)
    found = search_model(path, data=data, max_drift=1e-3, mixed_half=True)
    assert plain.met
    assert found.met
    assert set(found.plan.bf16) == PLANTED["epsilon"], "three BF16 nodes on the way of the signal add 1.6e-3"
    assert set(found.plan.kept) >= PLANTED["overflow"]
    assert found.confirmed.rel_l2 <= 1e-3
    assert found.evaluations > plain.evaluations


def test_the_command_line_writes_a_file_that_every_check_takes(zoo_folder: Path, tmp_path: Path) -> None:
    path, data = _written(zoo_folder, ["overflow"], tmp_path)
    arguments = ["convert", str(path), "--data", data, "--search", "--max-drift", "1e-2", "--mixed-half", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out.onnx")], catch_exceptions=False)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["search"]["bf16"] == ["overflow_b", "overflow_c", "overflow_d"]
    assert document["kept"] == []
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    types = {i.name: i.data_type for i in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16} <= set(types.values())
    # the keep-list goes back into a plain conversion, which holds in FP32 what was BF16
    keep = tmp_path / "out.search" / "keep.json"
    assert {entry["precision"] for entry in json.loads(keep.read_text())["keep"]} == {"bf16"}
    again = convert(path, data=data, keep=[f"@{keep}"], use_ranges=False, max_drift=1e-2)
    assert PLANTED["overflow"] <= set(again.plan.kept)


def test_bf16_throughout_has_nothing_to_mix(zoo_folder: Path, tmp_path: Path) -> None:
    path, data = _written(zoo_folder, ["overflow"], tmp_path)
    with pytest.raises(UsageError, match="mixes nothing"):
        search_model(path, data=data, max_drift=1e-2, precision="bf16", mixed_half=True)


# ---- an unreachable gate


def test_the_remedy_of_an_unreachable_gate_is_measured(zoo_folder: Path, tmp_path: Path) -> None:
    """The user wants every Mul in half; one of them overflows: BF16 there is tried, and meets the gate."""
    path, data = _written(zoo_folder, ["overflow"], tmp_path)
    found = search_model(path, data=data, max_drift=1e-2, must_half=["op:Mul"])
    assert not found.met
    assert any(line.startswith("BF16") and "overflow_b" in line for line in found.advice)
    assert found.advice[-1].startswith("measured with BF16 there: 0.00")
    assert found.advice[-1].endswith("which meets the gate")


def test_a_remedy_that_bf16_does_not_give_is_measured_in_fp32(zoo_folder: Path, tmp_path: Path) -> None:
    path, data = _written(zoo_folder, ["overflow"], tmp_path)
    found = search_model(path, data=data, max_drift=1e-5, must_half=["overflow_b"])
    assert not found.met
    assert "measured with BF16 there" in found.advice[-2]
    assert found.advice[-2].endswith("does not meet the gate")
    assert found.advice[-1].startswith("measured with FP32 there")
    assert found.advice[-1].endswith("which meets the gate")

"""Traps of five kinds in a trained classifier: the exact minimal set, and the right reason for each."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mpdeploy.data_files import load_feeds
from mpdeploy.emulated_runs import emulated_drift
from mpdeploy.engines.onnxruntime import OrtRunner
from mpdeploy.precision.flow import build_flow, shape_size
from mpdeploy.precision.formats import FORMATS
from mpdeploy.precision.model_io import input_specs, load_model
from mpdeploy.precision.plan import PrecisionPlan
from mpdeploy.precision.rewrite import prepare, rewrite
from mpdeploy.searching import ModelSearch, search_model
from tests import zoo
from tests.searching.planted import KINDS, PLANTED, planted_classifier, planted_feeds

FP16 = FORMATS["fp16"]
REASONS = {
    "overflow_b": ["overflow_b reaches 3.0"],
    "overflow_c": ["overflow_c reaches 3.0"],
    "overflow_d": ["overflow_c reaches 3.0"],
    "epsilon_a": ["constant: k_eps: 2e-08 becomes 0"],
    "epsilon_b": ["Div of epsilon_a, which comes down to 2e-08"],
    "constant_b": ["constant: k_huge: |1.311e+05| is above the largest value held"],
    "reduction_d": ["reduction: reduction_d is a reduction over 8,192 values", "reduction_d reaches 1.0"],
    "reduction_e": ["reduction: reduction_d is a reduction over 8,192 values"],
    "mask_b": ["mask: mask_b is, or holds, an attention mask: its sentinel, near 3.4e+38, becomes infinite"],
    "mask_c": ["mask: mask_c is, or holds, an attention mask"],
    "mask_d": ["mask: mask_c is, or holds, an attention mask"],
    "input:mask": ["mask: mask is, or holds, an attention mask"],
}
"""Unit -> what its reason must say."""


def _written(zoo_folder: Path, kinds: Collection[str], tmp_path: Path) -> tuple[Path, str]:
    ir.save(planted_classifier(zoo_folder, kinds), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", **planted_feeds(zoo_folder, kinds))  # type: ignore[arg-type]
    return tmp_path / "m.onnx", str(tmp_path / "x.npz")


def _needed(path: Path, data: str, limit: float) -> frozenset[str]:
    """Units that fail the gate when they alone are half: every keep-list that meets it holds them all."""
    prepared = prepare(load_model(path), FP16)
    feeds = load_feeds(data, input_specs(prepared.model), where="test")
    flow = build_flow(prepared.index, FP16, is_fixed=lambda _: False, float_io=lambda _: False, size_of=shape_size)
    units = [unit.key for unit in flow.units if not unit.fixed]

    def fails(unit: str) -> bool:
        mixed = rewrite(prepared, PrecisionPlan(FP16, frozenset({unit}), {}, {}))
        return not emulated_drift(path, mixed, feeds).rel_l2 <= limit

    return frozenset(unit for unit in units if fails(unit))


def _is_exact(found: ModelSearch, kinds: Collection[str]) -> None:
    assert found.met
    assert found.answer.is_minimal
    assert found.answer.kept == frozenset().union(*(PLANTED[kind] for kind in kinds))
    for entry in found.entries:
        for words in REASONS[entry["node"]]:
            assert words in entry["reason"]
    assert {frozenset(group) for group in found.groups} == {frozenset(PLANTED[kind]) for kind in kinds}


@pytest.mark.parametrize("kind", KINDS)
def test_a_trap_of_each_kind_is_found_exactly_and_named(kind: str, zoo_folder: Path, tmp_path: Path) -> None:
    path, data = _written(zoo_folder, [kind], tmp_path)
    found = search_model(path, data=data, max_drift=1e-2)
    _is_exact(found, [kind])
    assert found.answer.kept == _needed(path, data, 1e-2), "any keep-list must hold these, so none is smaller"


@pytest.mark.parametrize("cost", ["nodes", "traffic"])
def test_traps_of_all_five_kinds_in_one_model_are_found_exactly(cost: str, zoo_folder: Path, tmp_path: Path) -> None:
    path, data = _written(zoo_folder, KINDS, tmp_path)
    found = search_model(path, data=data, max_drift=1e-2, cost=cost)  # type: ignore[arg-type]
    _is_exact(found, KINDS)
    assert found.answer.evaluations < found.num_free, "fewer than trying every unit once"


def test_the_traps_leave_the_trained_predictions_as_they_are(zoo_folder: Path, tmp_path: Path) -> None:
    path, _ = _written(zoo_folder, KINDS, tmp_path)
    feeds = planted_feeds(zoo_folder, KINDS, 360)
    with OrtRunner(path) as planted, OrtRunner(zoo.trained_digits_cnn(zoo_folder, "none").path) as trained:
        found, expected = planted.infer(feeds)["scores"], trained.infer({"images": feeds["images"]})["scores"]
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))


def test_traps_beside_an_additive_budget_are_kept_with_what_the_budget_needs(zoo_folder: Path, tmp_path: Path) -> None:
    path, data = _written(zoo_folder, KINDS, tmp_path)
    found = search_model(path, data=data, max_drift=2e-4, cost="nodes")
    planted = frozenset().union(*PLANTED.values())
    assert found.met
    assert found.answer.is_minimal
    assert planted < found.answer.kept
    assert len(found.answer.kept) < found.num_free
    assert found.confirmed.rel_l2 <= 2e-4

"""The kept set is no larger than that of a greedy search over all single nodes, which is really run beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpdeploy.data_files import load_feeds
from mpdeploy.precision.formats import FORMATS
from mpdeploy.precision.model_io import input_specs, load_model
from mpdeploy.precision.rewrite import prepare
from mpdeploy.searching import search_model
from mpdeploy.searching.open import open_search
from mpdeploy.searching.plan import fixed_reasons
from tests import zoo

FP16 = FORMATS["fp16"]


def greedy(path: Path, data: str, share: float, cost: str) -> tuple[float, frozenset[str], float, int]:
    """The limit (a share of the drift of all half), what greedy keeps at it, its cost, and its evaluations.

    From everything in FP32, units become half, the one that harms least by itself first, for as long as the gate holds; a unit that
    breaks it is passed over, and the next is tried. Then the really rewritten model must meet the gate too, as our answer does: the
    last units that went half are taken back until it is met.
    """
    prepared = prepare(load_model(path), FP16)
    feeds = load_feeds(data, input_specs(prepared.model), where="test")
    fixed = fixed_reasons(prepared.index, FP16, {})
    with open_search(path, prepared, feeds, FP16, gate="", limit=1.0, cost=cost, fixed=fixed) as opened:  # type: ignore[arg-type]
        problem = opened.problem
        limit = share * problem.evaluate(frozenset(), until="lost").drift
        kept = everything = frozenset(problem.units)
        harm = {unit: problem.evaluate(everything - {unit}, until="lost").drift for unit in problem.units}
        let_go = []
        for unit in sorted(problem.units, key=lambda unit: (harm[unit], unit)):
            if problem.evaluate(kept - {unit}, until="lost").drift <= limit:
                kept = kept - {unit}
                let_go.append(unit)
        while problem.confirm(kept) > limit:
            kept |= {let_go.pop()}
        return limit, kept, problem.cost(kept), 2 * len(harm)


def _beside_greedy(path: Path, data: str, share: float, cost: str) -> None:
    limit, kept, price, evaluations = greedy(path, data, share, cost)
    found = search_model(path, data=data, max_drift=limit, cost=cost)
    assert found.met
    assert found.answer.is_minimal
    assert found.answer.evaluation.drift == pytest.approx(found.switched_drift, rel=1e-6), (
        "the answer itself was measured"
    )
    if cost == "nodes":
        assert len(found.answer.kept) <= len(kept)
    else:
        assert found.answer.cost <= price * (1 + 1e-9)
    assert found.answer.evaluations < evaluations


@pytest.mark.parametrize("cost", ["nodes", "traffic"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.25])
def test_a_trained_cnn_keeps_no_more_than_greedy(share: float, cost: str, zoo_folder: Path, tmp_path: Path) -> None:
    model = zoo.trained_digits_cnn(zoo_folder, "none")
    np.savez(tmp_path / "x.npz", **model.feeds(32))  # type: ignore[arg-type]
    _beside_greedy(model.path, str(tmp_path / "x.npz"), share, cost)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # MiniLM by greedy search: two minutes of an idle machine
@pytest.mark.parametrize(
    ("name", "cost"),
    [("convnext", "nodes"), ("vit", "nodes"), ("minilm", "nodes"), ("convnext", "traffic"), ("vit", "traffic")],
)
def test_a_real_model_keeps_no_more_than_greedy(name: str, cost: str, zoo_folder: Path, tmp_path: Path) -> None:
    model = zoo.export(name, zoo_folder)
    if model is None:
        pytest.skip(f"the weights of {name} are not installed")
    np.savez(tmp_path / "x.npz", **model.feeds(32, 1))
    _beside_greedy(model.path, str(tmp_path / "x.npz"), 0.25, cost)

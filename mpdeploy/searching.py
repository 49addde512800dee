"""The search on a real model: joins `precision.search`, which runs nothing, with ONNX Runtime and the data.

found = search_model(Path("model.onnx"), data="calib.npz", max_drift=1e-3)
found.plan                      what `rewrite` carries out
found.write_keep_list(path)     what `--keep @path` takes back
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mpdeploy.artifact import Array
from mpdeploy.data_files import FeedSet, load_feeds
from mpdeploy.files import write_json
from mpdeploy.measure.accuracy import Metric
from mpdeploy.measure.drift import DriftReport
from mpdeploy.precision import formats
from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.keep_list import match_keep_list, read_patterns
from mpdeploy.precision.model_io import float_io_names, input_specs, load_model, weight_bytes
from mpdeploy.precision.plan import PrecisionPlan, Reason
from mpdeploy.precision.rewrite import Prepared, prepare
from mpdeploy.precision.search import SearchAnswer, search
from mpdeploy.precision.search_cost import CostKind
from mpdeploy.precision.search_file import entry_of, keep_list_json, patterns_for
from mpdeploy.precision.search_reasons import dominating, groups_of
from mpdeploy.precision.search_state import Best
from mpdeploy.precision.search_types import OnProgress
from mpdeploy.searching_gate import gate_of, parse_drop, scorer_of
from mpdeploy.searching_open import open_search
from mpdeploy.searching_plan import (
    advice_on,
    fixed_reasons,
    make_search_plan,
    ranges_around,
)

Progress = Callable[[str], None]
LARGE_BYTES = 256 << 20
PROOF_EVALUATIONS = 48.0


@dataclass(frozen=True)
class ModelSearch:
    """What a search on a model found.

    Attributes:
        answer: what was measured; its `kept` are node ids, `input:NAME` and `output:NAME`.
        plan: node -> precision with reasons: rules, what the search keeps, and what lies between.
        confirmed: drift of the really rewritten and emulated model on all samples.
        confirmed_measured: what the gate looks at, of that model: its drift, or the drop of the metric.
        limit, gate: the gate, as a number and in words.
        met: whether the rewritten model meets it.
        switched_drift: what the switchable emulation says of the same plan; it differs from `confirmed` by how a runtime orders sums.
        held_out_drift: drift on the samples that no probe saw; None with fewer than 8 samples.
        seen_drift: drift on the other ones.
        groups: kept units that stand or fall together.
        dominating: (rounding, drift it makes alone), largest first.
        advice: what would be needed, where the gate cannot be met.
        num_free: units that might have become half.
        entries: the keep-list.
        seconds: all in all.
    """

    answer: SearchAnswer
    plan: PrecisionPlan
    confirmed: DriftReport
    confirmed_measured: float
    limit: float
    gate: str
    met: bool
    switched_drift: float
    held_out_drift: float | None
    seen_drift: float | None
    groups: tuple[tuple[str, ...], ...]
    dominating: tuple[tuple[str, float], ...]
    advice: tuple[str, ...]
    num_free: int
    entries: tuple[Mapping[str, Any], ...]
    float_io: tuple[str, ...]
    seconds: float
    prepared: Prepared = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """What `convert --search --json` shows under `search`."""
        answer = self.answer
        return {
            "met": self.met,
            "gate": self.gate,
            "measured": self.confirmed_measured,
            "limit": self.limit,
            "all_half": answer.all_half.drift,
            "kept": len(answer.kept),
            "hard": list(answer.hard),
            "minimal": answer.is_minimal,
            "groups": [list(group) for group in self.groups],
            "evaluations": round(answer.evaluations, 2),
            "by_phase": {phase: round(count, 2) for phase, count in answer.by_phase.items()},
            "drift_searched": answer.evaluation.drift,
            "drift_switched": self.switched_drift,
            "drift_rewritten": self.confirmed.rel_l2,
            "drift_held_out": self.held_out_drift,
            "drift_seen": self.seen_drift,
            "pareto": [point.to_json() for point in answer.pareto],
            "dominating": [{"rounding": name, "drift": drift} for name, drift in self.dominating],
            "advice": list(self.advice),
            "stopped": answer.stopped,
            "finished": not answer.stopped,
            "seconds": round(self.seconds, 2),
        }

    def write_keep_list(self, path: Path) -> None:
        """Write the keep-list; `--keep @FILE` takes it back, edited or not."""
        write_json(path, keep_list_json(self.entries, self.float_io, self.to_json()))


def search_model(
    model: Path,
    *,
    data: str | FeedSet,
    keep: Sequence[str] = (),
    must_half: Sequence[str] = (),
    precision: formats.HalfName = "fp16",
    keep_io: bool = False,
    keep_io_names: Collection[str] = (),
    max_drift: float | None = None,
    metric: Metric | None = None,
    labels: Path | Array | None = None,
    max_drop: float | None = None,
    cost: CostKind | Mapping[str, float] = "traffic",
    seed: int = 0,
    folder: Path | None = None,
    max_evaluations: float = math.inf,
    max_seconds: float = math.inf,
    proof_evaluations: float | None = None,
    progress: Progress = lambda _: None,
    on_progress: OnProgress = lambda _: None,
) -> ModelSearch:
    """Find the smallest (or cheapest) FP32 keep-list with which a model meets a gate.

    Args:
        model: the FP32 model.
        data: samples; a quarter of them is held out from every choice and only counts in pass or fail.
        keep: what stays FP32 in any case.
        must_half: what must become half in any case (patterns as for `keep`): the search works around it.
        precision: `fp16` or `bf16`.
        keep_io: all inputs and outputs stay FP32.
        keep_io_names: these do.
        max_drift: the gate, as relative L2 drift of the worst output.
        metric: or a metric by name, or a function of (outputs, labels) that gives one score a sample.
        labels: for the metric.
        max_drop: the gate with a metric: how much its mean may fall.
        cost: `nodes`, `traffic`, or a profile {node: microseconds}.
        seed: the same one takes the same steps.
        folder: where the log and the best answer so far are kept; the same call goes on from there.
        max_evaluations: passes over all samples, after which the best answer so far is given.
        max_seconds: the same in time.
        proof_evaluations: what the proof of 1-minimality may cost: infinity measures every kept unit on all samples, None does so for
            models of up to 256 MB of weights and takes 48 beyond.
        progress: told what is being done.
        on_progress: told the numbers, after every measurement.

    Raises:
        ModelError, DataError, KeepListError, UsageError: bad input.
    """
    begin = time.perf_counter()
    half = formats.FORMATS[precision]
    limit, gate = gate_of(max_drift, metric, labels, max_drop)
    progress("reading")
    loaded = load_model(model)
    feeds = data if isinstance(data, FeedSet) else load_feeds(data, input_specs(loaded), where=str(model))
    float_io = float_io_names(loaded, keep_io, keep_io_names)
    prepared = prepare(loaded, half)
    user = match_keep_list(prepared.index, patterns_for(prepared.index, keep), model_name=str(model))
    never = frozenset(match_keep_list(prepared.index, read_patterns(must_half), model_name=str(model)))
    fixed = fixed_reasons(prepared.index, half, user)
    scorer = None if metric is None else scorer_of(metric, labels, feeds.num_samples)
    with open_search(
        model, prepared, feeds, half, gate=gate, limit=limit, scorer=scorer, cost=cost, seed=seed,
        fixed=fixed, float_io=float_io, never=never, progress=progress,
    ) as opened:  # fmt: skip

        def keep_best(best: Best) -> None:
            if folder is not None:
                reason = (
                    Reason("search", f"best so far: drift {best.evaluation.drift:.3g} with {len(best.kept)} kept"),
                )
                entries = [
                    entry_of(prepared.index, unit, reason, None) for unit in opened.problem.units if unit in best.kept
                ]
                state = {"met": True, "gate": gate, "finished": False, **best.evaluation.to_json()}
                write_json(folder / "keep.json", keep_list_json(entries, _io_of(best.kept, prepared.index), state))

        progress("searching")
        answer = search(
            opened.problem,
            opened.landscape,
            seed=seed,
            log=None if folder is None else folder / "search.jsonl",
            max_evaluations=max_evaluations,
            max_seconds=max_seconds,
            on_progress=on_progress,
            on_best=keep_best,
            num_samples=opened.model.num_samples,
            charged=1.0,
            proof_evaluations=_proof_evaluations(loaded) if proof_evaluations is None else proof_evaluations,
        )
        ranges = ranges_around(prepared, feeds, answer, opened.model.injected, opened.open_model)
        plan = make_search_plan(prepared, half, opened.model.costs, answer, fixed, ranges, float_io)
        confirmed, measured = opened.confirm(plan.half_keys)
        met = measured <= limit * (1 + 1e-9) and math.isfinite(confirmed.rel_l2)
        switched = opened.problem.measure(opened.model.graph.flags(plan.half_keys), until="lost").drift
        parts = [
            None if not samples else opened.problem.evaluate(answer.kept, samples, until="lost").drift
            for samples in (opened.held_out, opened.seen)
        ]
    found = ModelSearch(
        answer=answer,
        plan=plan,
        confirmed=confirmed,
        confirmed_measured=measured,
        limit=limit,
        gate=gate,
        met=met,
        switched_drift=switched,
        held_out_drift=parts[0],
        seen_drift=parts[1],
        groups=tuple(tuple(g) for g in groups_of(answer.kept, opened.model.graph.switches, opened.problem.units)),
        dominating=tuple(dominating(answer.energies, opened.model.graph.switches)),
        advice=() if met else tuple(advice_on(answer, opened.problem, half)),
        num_free=len(opened.problem.units),
        entries=tuple(
            entry_of(prepared.index, unit, plan.kept.get(unit, ()), answer)
            for unit in opened.problem.units
            if unit in answer.kept
        ),
        float_io=_io_of(answer.kept, prepared.index),
        seconds=time.perf_counter() - begin,
        prepared=prepared,
    )  # fmt: skip
    if folder is not None:
        found.write_keep_list(folder / "keep.json")
    return found


def _io_of(kept: Collection[str], index: GraphIndex) -> tuple[str, ...]:
    """Names of the graph inputs and outputs among kept units."""
    return tuple(sorted({unit.split(":", 1)[1] for unit in kept if unit not in index.nodes}))


def _proof_evaluations(model: ir.Model) -> float:
    return math.inf if weight_bytes(model) <= LARGE_BYTES else PROOF_EVALUATIONS


__all__ = ["ModelSearch", "parse_drop", "search_model"]

"""`search_model`: opens a model, searches, and confirms the answer on the model that is really rewritten."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpdeploy.artifact import Array
from mpdeploy.data_files import FeedSet, load_feeds
from mpdeploy.errors import UsageError
from mpdeploy.files import write_json
from mpdeploy.measure.accuracy import Metric
from mpdeploy.measure.drift import DriftReport
from mpdeploy.precision import formats
from mpdeploy.precision.engine_forms import USUAL, forms_of
from mpdeploy.precision.keep_list import match_keep_list, read_patterns
from mpdeploy.precision.model_io import float_io_names, input_specs, load_model, weight_bytes
from mpdeploy.precision.plan import PrecisionPlan, Reason
from mpdeploy.precision.rewrite import Prepared, prepare
from mpdeploy.precision.search.driver import QUICK, THOROUGH, Effort, SearchAnswer, search
from mpdeploy.precision.search.keep_file import entry_of, float_io_in, keep_list_json, patterns_for
from mpdeploy.precision.search.ledger import Best, set_aside
from mpdeploy.precision.search.reasons import dominating, explain, groups_of
from mpdeploy.precision.search.types import OnProgress
from mpdeploy.searching.advice import advice_on
from mpdeploy.searching.gate import gate_of, scorer_of
from mpdeploy.searching.mixed_half import MixedHalf, move_to_bf16
from mpdeploy.searching.open import open_search
from mpdeploy.searching.plan import (
    fixed_reasons,
    make_search_plan,
    ranges_around,
)
from mpdeploy.searching.profile import cost_from

Progress = Callable[[str], None]
LARGE_BYTES, LARGE_UNITS = 256 << 20, 3000
"""Of weights: beyond, a search is content with fewer evaluations."""


@dataclass(frozen=True)
class ModelSearch:
    """What a search on a model found.

    Attributes:
        answer: what was measured; its `kept` are node ids, `input:NAME` and `output:NAME`.
        plan: node -> precision with reasons: rules, what the search keeps, and what lies between.
        confirmed: drift of the really rewritten and emulated model on all samples.
        confirmed_measured: what the gate looks at, of that model: its drift, or the drop of the metric.
        limit, gate: the gate, as a number and in words.
        engine: whose forms were emulated.
        met: whether the rewritten model meets it.
        switched_drift: what the switchable emulation says of the same plan; it differs from `confirmed` by how a runtime orders sums.
        held_out_drift: drift on the samples that no probe saw; None with fewer than 8 samples.
        seen_drift: drift on the other ones.
        groups: kept units that stand or fall together.
        dominating: (rounding, drift it makes alone), largest first.
        advice: what would be needed, where the gate cannot be met.
        num_free: units that might have become half.
        entries: the keep-list.
        float_io: inputs and outputs that stay FP32 because the user said so.
        evaluations: passes over all samples, those that moved nodes to BF16 included.
        seconds: all in all.
    """

    answer: SearchAnswer
    plan: PrecisionPlan
    confirmed: DriftReport
    confirmed_measured: float
    limit: float
    gate: str
    engine: str
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
    evaluations: float
    seconds: float
    prepared: Prepared = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """What `convert --search --json` shows under `search`."""
        answer = self.answer
        return {
            "met": self.met,
            "gate": self.gate,
            "engine": self.engine,
            "measured": self.confirmed_measured,
            "limit": self.limit,
            "all_half": answer.all_half.drift,
            "kept": len(answer.kept),
            "searched": self.num_free,
            "cost": answer.cost,
            "hard": list(answer.hard),
            "minimal": answer.is_minimal,
            "groups": [list(group) for group in self.groups],
            "bf16": list(self.plan.bf16),
            "evaluations": round(self.evaluations, 2),
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
        write_json(path, keep_list_json(self.entries, self.to_json(), self.float_io))


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
    cost: str | Mapping[str, float] = "traffic",
    seed: int = 0,
    folder: Path | None = None,
    max_evaluations: float = math.inf,
    max_seconds: float = math.inf,
    effort: Effort | None = None,
    mixed_half: bool = False,
    engine: str = USUAL,
    progress: Progress = lambda _: None,
    on_progress: OnProgress = lambda _: None,
) -> ModelSearch:
    """Find the smallest (or cheapest) FP32 keep-list with which a model meets a gate.

    Args:
        model: the FP32 model.
        data: samples; a quarter of them is held out: nothing is learnt from them, they only count in pass or fail.
        keep: what stays FP32 in any case.
        must_half: what must become half in any case (patterns as for `keep`): the search works around it.
        precision: `fp16` or `bf16`.
        keep_io: all inputs and outputs stay FP32.
        keep_io_names: these do.
        max_drift: the gate, as relative L2 drift of the worst output.
        metric: or a metric by name, or a function of (outputs, labels) that gives one score a sample.
        labels: for the metric.
        max_drop: the gate with a metric: how much its mean may fall.
        cost: `nodes`, `traffic`, `profile:FILE` (see `searching.profile`), or a profile {node: microseconds}.
        seed: the same one takes the same steps.
        folder: where the log and the best answer so far are kept; the same call goes on from there.
        max_evaluations: passes over all samples, after which the best answer so far is given.
        max_seconds: the same in time.
        effort: how many evaluations its parts may take; None: `THOROUGH` for models of up to 256 MB of weights and 3,000 nodes, `QUICK` beyond.
        mixed_half: kept nodes that FP16 cannot hold run in BF16 where the gate is still met so.
        engine: the one the model is for: drift is emulated with what it takes apart (see `precision.engine_forms`).
        progress: told what is being done.
        on_progress: told the numbers, after every measurement.

    Raises:
        ModelError, DataError, KeepListError, UsageError: bad input.
    """
    begin = time.perf_counter()
    half = formats.FORMATS[precision]
    if mixed_half and precision != "fp16":
        raise UsageError("BF16 beside BF16 mixes nothing.", hint="--mixed-half goes with --precision fp16")
    forms_of(engine)
    limit, gate = gate_of(max_drift, metric, labels, max_drop)
    progress("reading")
    loaded = load_model(model)
    feeds = data if isinstance(data, FeedSet) else load_feeds(data, input_specs(loaded), where=str(model))
    float_io = float_io_names(loaded, keep_io, [*keep_io_names, *float_io_in(keep)])
    prepared = prepare(loaded, half)
    user = match_keep_list(prepared.index, patterns_for(prepared.index, keep), model_name=str(model))
    never = frozenset(match_keep_list(prepared.index, read_patterns(must_half), model_name=str(model)))
    fixed = fixed_reasons(prepared.index, half, user)
    scorer, num_labels = (None, None) if metric is None else scorer_of(metric, labels)
    with open_search(
        model, prepared, feeds, half, gate=gate, limit=limit, scorer=scorer, num_labels=num_labels, cost=cost_from(cost, prepared.index), seed=seed,
        fixed=fixed, float_io=float_io, never=never, engine=engine, progress=progress,
    ) as opened:  # fmt: skip

        def entries_of(why: Mapping[str, Sequence[Reason]], answer: SearchAnswer | None) -> list[dict[str, Any]]:
            """What the search keeps and what the user does, in the order of the graph."""
            reasons = {unit: fixed[unit] for unit in user if unit in fixed} | dict(why)
            units = [unit.key for unit in opened.model.costs.flow.units if unit.key in reasons]
            return [entry_of(prepared.index, unit, reasons[unit], answer) for unit in units]

        def keep_best(best: Best) -> None:
            if folder is not None:
                text = f"best so far: drift {best.evaluation.drift:.3g} with {len(best.kept)} kept"
                entries = entries_of(dict.fromkeys(best.kept, (Reason("search", text),)), None)
                state = {"met": True, "gate": gate, "finished": False, **best.evaluation.to_json()}
                write_json(folder / "keep.json", keep_list_json(entries, state, float_io))

        progress("searching")
        log = None if folder is None else folder / "search.jsonl"
        if log is not None:
            set_aside(log, opened.problem, seed)  # of another gate, other data: it is kept beside the new one
        is_large = weight_bytes(loaded) > LARGE_BYTES or len(opened.problem.units) > LARGE_UNITS
        answer = search(
            opened.problem,
            opened.landscape,
            seed=seed,
            log=log,
            max_evaluations=max_evaluations,
            max_seconds=max_seconds,
            on_progress=on_progress,
            on_best=keep_best,
            num_samples=opened.model.num_samples,
            charged=1.0,
            effort=effort or (QUICK if is_large else THOROUGH),
        )
        ranges = ranges_around(prepared, feeds, answer, opened.model.injected, opened.open_model)
        why = explain(prepared.index, half, ranges, answer.kept, answer.hard, answer.proofs, answer.evaluation.drift)
        plan = make_search_plan(prepared, half, opened.model.costs, answer, fixed, ranges, float_io, why)
        entries = entries_of(why, answer)
        confirmed, measured = opened.confirm(plan.half_keys)
        groups = groups_of(answer.kept, opened.model.graph.switches, opened.problem.units)
        moved = MixedHalf(plan, confirmed, measured, 0)
        met = measured <= limit * (1 + 1e-9) and math.isfinite(confirmed.rel_l2)
        if mixed_half and met:
            progress("moving kept nodes to BF16")
            moved = move_to_bf16(plan, groups, (confirmed, measured), limit, opened.measure_plan)
        advice = () if met else tuple(advice_on(answer, opened.problem, half.name, plan, measured, opened.measure_plan))
        switched = opened.problem.measure(opened.model.graph.flags(plan.half_keys), until="lost").drift
        parts = [
            None
            if not samples
            else opened.problem.evaluate(opened.problem.canonical(answer.kept), samples, until="lost").drift
            for samples in (opened.held_out, opened.seen)
        ]
    found = ModelSearch(
        answer=answer,
        plan=moved.plan,
        confirmed=moved.confirmed,
        confirmed_measured=moved.measured,
        limit=limit,
        gate=gate,
        engine=engine,
        met=met,
        switched_drift=switched,
        held_out_drift=parts[0],
        seen_drift=parts[1],
        groups=tuple(tuple(group) for group in groups),
        dominating=tuple(dominating(answer.energies, opened.model.graph.switches)),
        advice=advice,
        num_free=len(opened.problem.units),
        entries=tuple(
            {**entry, "precision": "bf16"} if entry["node"] in moved.plan.bf16 else entry for entry in entries
        ),
        float_io=tuple(sorted(float_io)),
        evaluations=answer.evaluations + moved.evaluations,
        seconds=time.perf_counter() - begin,
        prepared=prepared,
    )  # fmt: skip
    if folder is not None:
        found.write_keep_list(folder / "keep.json")
    return found

"""A model opened for a search: sessions up, FP32 answers taken, injected errors measured."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mpdeploy.data_files import FeedSet
from mpdeploy.emulated_runs import opener, reference_runner
from mpdeploy.engines import onnxruntime as ort_engine
from mpdeploy.errors import DataError, UsageError
from mpdeploy.files import digest_of_json, sha256_of_file
from mpdeploy.measure.drift import DriftReport
from mpdeploy.precision import formats
from mpdeploy.precision.engine_forms import USUAL
from mpdeploy.precision.flow import build_flow, shape_size
from mpdeploy.precision.model_io import SCRATCH_EXTERNAL_FROM_BYTES, load_model, weight_files, write_model
from mpdeploy.precision.plan import PrecisionPlan, Reason
from mpdeploy.precision.rewrite import Prepared
from mpdeploy.precision.search.cost import CostKind, FlowCosts, make_costs
from mpdeploy.precision.search.switch_graph import build_switch_graph
from mpdeploy.searching.plan import injected_errors, really_measured
from mpdeploy.searching.problem import (
    Model,
    ModelLandscape,
    ModelProblem,
    Scorer,
    held_out_samples,
    make_batches,
    scores_of,
)


@dataclass(frozen=True)
class OpenedSearch:
    """What a search, or a benchmark beside it, measures with.

    Attributes:
        model: the switchable emulation, its costs and the data.
        problem, landscape: for `precision.search.search`.
        held_out, seen: numbers of the samples that no probe sees, and of the others.
        confirm: keys of half units -> drift of the really rewritten model, and what the gate looks at.
        measure_plan: the same for a whole plan, with BF16 nodes where it has some.
        open_model: opens the FP32 model with chosen tensors as outputs.
    """

    model: Model
    problem: ModelProblem
    landscape: ModelLandscape
    held_out: Sequence[int]
    seen: Sequence[int]
    confirm: Callable[[frozenset[str]], tuple[DriftReport, float]]
    measure_plan: Callable[[PrecisionPlan], tuple[DriftReport, float]]
    open_model: Any


@contextlib.contextmanager
def open_search(
    path: Path,
    prepared: Prepared,
    feeds: FeedSet,
    half: formats.HalfFormat,
    *,
    gate: str,
    limit: float,
    scorer: Scorer | None = None,
    num_labels: int | None = None,
    cost: CostKind | Mapping[str, float] = "traffic",
    seed: int = 0,
    fixed: Mapping[str, Sequence[Reason]],
    float_io: Collection[str] = (),
    never: frozenset[str] = frozenset(),
    engine: str = USUAL,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[OpenedSearch]:
    """Open a model; see `search_model` for the arguments.

    Raises:
        UsageError: no node of the model can be half.
        DataError: not one label an answer, or the FP32 model's own score is not finite.
    """
    ort_engine.prove_pairs_are_kept(half.onnx)
    flow = build_flow(
        prepared.index,
        half,
        is_fixed=lambda node_id: bool(fixed.get(node_id)),
        float_io=lambda name: name in float_io,
        size_of=shape_size,
    )
    priced = cost if isinstance(cost, str) else dict(cost)
    files = [path, *weight_files(load_model(path))]
    sources = [*map(sha256_of_file, files), feeds.digest, sorted(fixed), sorted(float_io), sorted(never), engine]
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpdeploy-search-")))
        progress("building the switchable emulation")
        graph = build_switch_graph(prepared.model, half, flow, engine)
        if not graph.switches:
            raise UsageError(
                "There is nothing to search: no node of this model can be half.", hint="mpdeploy inspect shows why"
            )
        with reference_runner(path) as fp32:
            batches = make_batches(feeds, fp32.infer)
        # of labels the digest sees what they make of the FP32 model's answers
        num_rows = sum(len(batch.rows) for batch in batches)
        if num_labels is not None and num_labels != num_rows:
            raise DataError(
                f"There are {num_rows} answers and {num_labels} labels.", hint="one label an answer, in the same order"
            )
        scores = np.zeros(1) if scorer is None else scores_of(scorer, [batch.golden for batch in batches], batches)
        if not np.isfinite(scores).all():
            raise DataError(
                f"The metric of the FP32 model itself is not finite on {np.sum(~np.isfinite(scores))} samples: nothing can be held against that.",
                hint="mpdeploy compare shows what it answers",
            )
        reference = float(scores.mean())
        digest = digest_of_json([*sources, half.name, gate, priced, None if scorer is None else scores.tolist()])
        progress("measuring what each rounding injects")
        open_model = opener(prepared.model, scratch, "injected")
        injected = injected_errors(prepared, batches, half, graph.switches, open_model)
        costs = FlowCosts(flow, graph.switches, make_costs(prepared.index, flow, cost, shape_size), never)
        runner = stack.enter_context(ort_engine.OrtRunner(_written(graph.model, scratch)))
        model = Model(runner.infer, graph, costs, batches, feeds.batched, injected)
        held_out = held_out_samples(model.num_samples, seed)
        seen = tuple(sample for sample in range(model.num_samples) if sample not in held_out)
        really: dict[frozenset[str], tuple[DriftReport, float]] = {}

        def measure_plan(plan: PrecisionPlan) -> tuple[DriftReport, float]:
            return really_measured(prepared, plan, engine, scorer, reference, batches)

        def confirm(half_keys: frozenset[str]) -> tuple[DriftReport, float]:
            if half_keys not in really:
                progress("confirming on the rewritten model")
                really[half_keys] = measure_plan(PrecisionPlan(half, half_keys, {}, {}))
            return really[half_keys]

        problem = ModelProblem(
            model,
            limit=limit,
            scorer=scorer,
            reference=reference,
            held_out=held_out,
            digest=digest,
            confirm=lambda kept: confirm(costs.planned_half_keys(kept))[1],
        )
        landscape = ModelLandscape(model, seen)
        yield OpenedSearch(model, problem, landscape, held_out, seen, confirm, measure_plan, open_model)


def _written(model: ir.Model, scratch: Path) -> Path:
    return write_model(model, scratch, "switched.onnx", external_from_bytes=SCRATCH_EXTERNAL_FROM_BYTES)

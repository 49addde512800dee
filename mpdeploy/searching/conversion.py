"""`convert --search`: find the smallest keep-list that meets a gate, then prove and write the model that it gives."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpdeploy.artifact import Array
from mpdeploy.conversion import Accept, Conversion, refuse_to_overwrite
from mpdeploy.data_files import FeedSet
from mpdeploy.errors import GateFailedError, UsageError
from mpdeploy.precision.engine_forms import USUAL
from mpdeploy.precision.formats import FORMATS, HalfName
from mpdeploy.precision.rewrite import count_precisions
from mpdeploy.precision.search.islands import rewrite_with_islands
from mpdeploy.precision.verify import check_strict_types
from mpdeploy.proving import prove_and_write
from mpdeploy.searching.model_search import search_model


def convert_searched(
    model: Path,
    *,
    data: str | FeedSet,
    output: Path | None = None,
    keep: Sequence[str] = (),
    precision: HalfName = "fp16",
    keep_io: bool = False,
    keep_io_names: Collection[str] = (),
    max_drift: float | None = None,
    metric: str | Callable[..., Any] | None = None,
    labels: Path | Array | None = None,
    max_drop: float | None = None,
    cost: str | Mapping[str, float] = "traffic",
    mixed_half: bool = False,
    engine: str = USUAL,
    state: Path | None = None,
    accept: Accept = lambda drift, precision, facts: None,
    progress: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[Any], None] = lambda _: None,
) -> Conversion:
    """Search, then convert; the arguments are those of `convert` and of `search_model`.

    `state` is a folder for the search's log and the keep-list; the same command goes on from there. `on_progress` is told numbers.

    Raises:
        UsageError: the output is the model itself; or as `search_model`.
        GateFailedError: no keep-list meets the gate; the message says the best reached and what would be needed.
    """
    begin = time.perf_counter()
    refuse_to_overwrite(model, output)
    if state is not None and state.exists() and not state.is_dir():
        raise UsageError(f"{state}, where the search keeps its log, is a file.", hint="move it away")
    found = search_model(
        model, data=data, keep=keep, precision=precision, keep_io=keep_io, keep_io_names=keep_io_names, max_drift=max_drift,
        metric=metric, labels=labels, max_drop=max_drop, cost=cost, mixed_half=mixed_half, engine=engine, folder=state, progress=progress, on_progress=on_progress,
    )  # fmt: skip
    if not found.met:
        advice = "\n".join(f"  {line}" for line in found.advice)
        raise GateFailedError(
            f"No keep-list meets the gate ({found.gate}) in {precision}. Nothing was written.\n\n{advice}",
            hint=f"the search and its best keep-list are kept in {state}"
            if state
            else "try --precision bf16, or a wider gate",
        )
    mixed = rewrite_with_islands(found.prepared, found.plan, consume=True)
    check_strict_types(mixed)
    counts = count_precisions(mixed)
    accept(found.confirmed, precision, {"num_kept": len(found.plan.kept)})
    warnings: list[str] = []
    if output is not None:
        progress("proving and writing")
        with tempfile.TemporaryDirectory(prefix="mpdeploy-") as folder:
            proven = replace(found.plan, half=FORMATS["bf16"]) if found.plan.bf16 else found.plan
            warnings += prove_and_write(model, output, proven, mixed, Path(folder))
    return Conversion(
        output=output,
        plan=found.plan,
        counts=counts,
        drift=found.confirmed,
        warnings=tuple(warnings),
        seconds=time.perf_counter() - begin,
        engine=engine,
        evaluations=round(found.evaluations, 2),
        search=found.to_json() | ({} if state is None else {"keep_list": str(state / "keep.json")}),
    )
